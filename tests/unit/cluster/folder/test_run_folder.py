from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from cluster.folder import lease
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs.config import RunConfig
from rollout import run_store
from rollout.problem import Level
from rollout.run_store import StoreError
from tests.builders import make_problem


def config(**more: object) -> RunConfig:
    data = {
        "name": "t",
        "run_dir": "x",
        "problems": {"miniature": {}},
        "rounds": [{"preference": False}],
        **more,
    }
    return RunConfig.model_validate(data)


def test_only_one_driver_at_a_time_holds_a_run(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
    with RunFolder(tmp_path / "run").locked():
        pass


def test_run_is_continued_with_an_equal_config_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(config())
    folder.keep_config(config())
    with pytest.raises(ConfigError, match=r"other values of search\.top_p, seed"):
        folder.keep_config(config(seed=1, search={"top_p": 0.9}))


def test_key_that_is_newer_than_the_run_counts_as_its_default(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(config())
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("  min_pair_accuracy: 0.55\n", ""))
    folder.keep_config(config())
    with pytest.raises(ConfigError, match=r"other values of evaluation\.min_pair_accuracy"):
        folder.keep_config(config(evaluation={"min_pair_accuracy": None}))


def test_run_may_be_continued_on_another_cluster(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(config())
    folder.keep_config(config(cluster={"policy": {"replicas": 4}}, cost={"usd_per_hour": 3.0}))


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="cannot be written"), folder.locked():
        pass


def test_folder_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_store, "create_only", full)
    folder = RunFolder(tmp_path / "run")
    folder.store.backoff_s = 0
    with pytest.raises(RunFolderError, match="disk full"), folder.locked():
        pass


def test_driver_whose_run_is_taken_over_is_stopped_and_told_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    folder = RunFolder(tmp_path / "run")
    taken = pytest.raises(RunFolderError, match="process 7 on elsewhere has taken over")
    assert (folder.turn, folder.is_taken) == (0, False)
    with taken, folder.locked():
        assert (folder.turn, folder.is_taken) == (1, False)
        other = json.loads(folder.store.read("drivers/00001.json")) | {"pid": 7}
        folder.write("drivers/00002.json", other | {"owner": "x", "host": "elsewhere"})
        threading.Event().wait(10)  # Ctrl-C comes
    assert folder.is_taken


@pytest.mark.parametrize("root", ["xyz://bucket/run", Path("xyz://bucket/run")])
def test_address_that_nothing_here_can_open_is_one_clear_error(root: str | Path) -> None:
    with pytest.raises(StoreError, match=r"^store xyz://bucket/run: .*extras s3, gcs and azure"):
        RunFolder(root)


def test_problems_are_read_back_with_their_levels(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.problem_levels() == {}
    folder.write_problems([make_problem("a", level=Level.MATH), make_problem("b", level=Level.GSM)])
    assert folder.problem_levels() == {"a": "math", "b": "gsm"}
    (tmp_path / "problems.parquet").write_bytes(b"cut off")
    with pytest.raises(RunFolderError, match=r"problems\.parquet: cannot be read"):
        folder.problem_levels()


def test_stage_records_are_read_back_and_missing_ones_are_empty(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.stage(1, "rollout") == {}
    folder.record_stage(1, "rollout", 1.234, lost=0)
    assert folder.stage(1, "rollout") == {"seconds": 1.23, "lost": 0}


def test_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"stages\.json: not JSON"):
        RunFolder(tmp_path).read("stages.json")
