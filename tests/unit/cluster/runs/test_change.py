from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.folder.changes import Changes
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs.change import record_change, set_run
from cluster.runs.config import RunConfig
from cluster.telemetry.live import LiveFile, Snapshot


def made(tmp_path: Path, **cluster: Any) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    config = RunConfig.model_validate(
        {
            "name": "x",
            "run_dir": str(tmp_path / "run"),
            "problems": {"miniature": {}},
            "rounds": [{"preference": False}],
            "cluster": cluster,
        }
    )
    folder.keep_config(config)
    return folder


def test_a_change_is_checked_as_a_start_is_and_written_down(tmp_path: Path) -> None:
    folder = made(tmp_path)
    change = record_change(
        folder, ["cluster.policy.replicas=3", "cost.budget_usd=20", "cluster.priorities.gsm=2"]
    )
    assert change.values == {
        "cluster.policy.replicas": 3,
        "cost.budget_usd": 20.0,
        "cluster.priorities": {"gsm": 2},
    }
    assert change.before["cluster.policy.replicas"] == 1
    assert change.before["cost.budget_usd"] is None
    # The next one goes on from there.
    assert record_change(folder, ["cluster.priorities.math=1"]).values == {
        "cluster.priorities": {"gsm": 2, "math": 1}
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("cluster.policy.replica=3", "did you mean 'replicas'"),
        ("cluster.policy.replicas=0", "greater than or equal to 1"),
        ("cluster.policy.replicas", "expected KEY=VALUE"),
        ("cost.on_budget=explode", "'warn' or 'drain'"),
        ("log_level=loud", "'debug', 'info'"),
        ("cluster.learner.replicas=3", "cannot be changed while they run; stop the run"),
        ("search.num_rollouts=3", "decides what the run makes"),
        ("cost={budget_usd: 3}", "name the values one by one, as cost"),
        ("cluster.autoscale.ppm.max_replicas=3", "does not scale; set cluster.ppm.replicas"),
    ],
)
def test_what_cannot_be_set_is_refused_with_the_reason(
    tmp_path: Path, assignment: str, message: str
) -> None:
    folder = made(tmp_path)
    with pytest.raises(ConfigError, match=message):
        record_change(folder, ["log_level=debug", assignment])
    assert Changes(folder).known == []


def test_the_size_of_a_pool_that_scales_is_set_by_its_bounds(tmp_path: Path) -> None:
    folder = made(tmp_path, autoscale={"policy": {"max_replicas": 4}})
    with pytest.raises(ConfigError, match=r"autoscale\.policy\.min_replicas"):
        record_change(folder, ["cluster.policy.replicas=3"])
    change = record_change(folder, ["cluster.autoscale.policy.max_replicas=6"])
    assert change.before == {"cluster.autoscale.policy.max_replicas": 4}
    with pytest.raises(ConfigError, match="min_replicas must be <= max_replicas"):
        record_change(folder, ["cluster.autoscale.policy.min_replicas=9"])


def test_a_price_table_is_taken_from_its_file(tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text(
        "as_of: 2026-01-01\ninstances:\n  aws: {g6e.12xlarge: {on_demand: 10, spot: 5, cpus: 48}}\n"
    )
    change = record_change(made(tmp_path), [f"cost.prices=@{table}"])
    assert change.values == {"cost.prices": {"g6e.12xlarge": {"on_demand": 10.0, "spot": 5.0}}}


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run"):
        record_change(RunFolder(tmp_path / "none"), ["log_level=debug"])
    assert not (tmp_path / "none").exists()


def test_it_is_said_whether_a_driver_took_it_over(tmp_path: Path) -> None:
    folder = made(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    set_run(folder.root, ["log_level=debug"], console)
    change = 0
    with LiveFile(folder.store, lambda: Snapshot(change=change), interval_s=0.05):
        change = 2
        set_run(folder.root, ["log_level=error"], console)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[:2] == [
        "log_level = 'debug', before 'info'",
        "no driver runs; the next start takes it over",
    ]
    assert said[2] == "log_level = 'error', before 'debug'"
    assert said[3].startswith("taken over after ")


def test_waiting_for_a_driver_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.runs.change.WAIT_S", 0.3)
    folder = made(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    began_s = time.monotonic()
    with LiveFile(folder.store, Snapshot):
        set_run(folder.root, ["log_level=debug"], console)
    assert time.monotonic() - began_s < 10
    assert "not taken over within" in console.file.getvalue()  # type: ignore[attr-defined]
