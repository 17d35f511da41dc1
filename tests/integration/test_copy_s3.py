"""A run copied to a bucket and back; every command that only reads takes either."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.folder.changes import Changes
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.reports.tree_view import show_tree
from cluster.runs import copy
from cluster.runs.copy import copy_run
from learner.checkpoint import CheckpointError, CheckpointStore
from learner.dataset import MANIFEST, writing_dataset
from rollout.run_store import RunStore, StoreError
from rollout.store import TrajectoryStore
from tests.builders import answered, code, make_problem, make_tree
from tests.unit.cluster.folder.test_run_folder import config


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.keep_config(config())
        folder.store.identify()
        trees = TrajectoryStore(folder.store, 1)
        tree = make_tree(
            code("x = 1", answered("7", correct=True)), problem=make_problem("a"), round=1
        )
        assert trees.commit("s1", [tree])
        trees.seal()
        with writing_dataset(folder.dataset(1)) as writer:
            writer.commit(template="rstar", counts={"all": {}}, excluded={})
        for kind in ("policy", "ppm"):
            CheckpointStore(folder.checkpoints).publish(
                kind,  # type: ignore[arg-type]
                1,
                lambda model: (model / "model.safetensors").write_bytes(b"w") and None,
            )
        folder.record_stage(1, "rollout", 1.0)
    return folder


def content(folder: RunFolder) -> dict[str, bytes]:
    names = folder.store.below_all("")
    left = ("drivers/", "run.id")
    return {n: folder.store.read(n) for n in names if not n.startswith(left)}


def test_copy_to_a_bucket_and_back_is_the_same_run(
    run: RunFolder, root: str, tmp_path: Path
) -> None:
    there = RunFolder(root)
    copied = copy_run(run, there)
    assert (copied.there, copied.files) == (0, len(content(run)))
    assert content(there) == content(run)
    back = RunFolder(tmp_path / "back")
    copy_run(there, back)
    assert content(back) == content(run)
    assert CheckpointStore(back.checkpoints).latest("ppm") is not None


def test_copy_that_was_broken_off_is_no_run_and_goes_on(
    run: RunFolder, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = RunFolder(root)
    inner = copy._copy

    def broken(source: RunFolder, target: RunFolder, name: str, expected: dict[str, str]) -> None:
        if name.endswith(MANIFEST):
            raise KeyboardInterrupt
        inner(source, target, name, expected)

    monkeypatch.setattr(copy, "_copy", broken)
    with pytest.raises(KeyboardInterrupt):
        copy_run(run, there)
    assert there.config() is None
    monkeypatch.setattr(copy, "_copy", inner)
    copied = copy_run(run, there)
    assert copied.there > 0 and content(there) == content(run)


def test_file_that_changed_is_named_and_the_copy_is_no_run(run: RunFolder, root: str) -> None:
    [commit] = TrajectoryStore(run.store, 1).commits().values()
    data = run.store.read(commit.path)
    run.store.put(commit.path, bytes(len(data)))
    with pytest.raises(StoreError, match=rf"{commit.path} has changed"):
        copy_run(run, RunFolder(root))
    run.store.put(commit.path, data)
    policy = CheckpointStore(run.checkpoints).current("policy", 1)
    assert policy is not None
    RunStore(policy.path).put("model.safetensors", b"x")
    with pytest.raises((StoreError, CheckpointError), match="not what its record says"):
        copy_run(run, RunFolder(f"{root}-2"))
    assert RunFolder(f"{root}-2").config() is None


def test_copy_onto_another_run_or_of_none_is_refused(run: RunFolder, root: str) -> None:
    RunFolder(root).keep_config(config(seed=1))
    with pytest.raises(RunFolderError, match="another run is there"):
        copy_run(run, RunFolder(root))
    with pytest.raises(RunFolderError, match="onto itself"):
        copy_run(run, RunFolder(run.root))
    with pytest.raises(RunFolderError, match=r"no config\.yaml|has no"):
        copy_run(RunFolder(run.root / "nowhere"), RunFolder(root))


def test_commands_that_read_a_run_take_its_address(run: RunFolder, root: str) -> None:
    command = CliRunner()
    done = command.invoke(app, ["copy", str(run.root), root], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    status = command.invoke(app, ["status", root, "--json"], catch_exceptions=False)
    [first] = json.loads(status.output)["rounds"]
    assert (
        first["sealed"] and first["trees"] == 1 and set(first["checkpoints"]) == {"policy", "ppm"}
    )
    output = io.StringIO()
    show_tree(root, "a", Console(file=output, width=100))
    assert "x = 1" in output.getvalue()
    top = command.invoke(app, ["top", root, "--once"], catch_exceptions=False)
    assert "no samples yet" in top.output
    regrade = command.invoke(app, ["regrade", root], catch_exceptions=False)
    assert regrade.exit_code == 0, regrade.output
    report = command.invoke(app, ["report", root])
    assert isinstance(report.exception, RunFolderError) and "no report" in str(report.exception)


def test_a_run_on_a_bucket_is_changed_from_anywhere(root: str) -> None:
    folder = RunFolder(root)
    folder.keep_config(config())
    driver = Changes(folder)
    driver.record_start(config())
    said = CliRunner().invoke(app, ["set", root, "cluster.policy.replicas=3", "log_level=debug"])
    assert said.exit_code == 0, said.output
    assert "cluster.policy.replicas = 3, before 1" in said.output
    assert "no driver runs; the next start takes it over" in said.output
    assert [change.values["cluster.policy.replicas"] for change in driver.newer()] == [3]
    assert driver.newer() == []
    assert Changes(folder).effective(config()).log_level == "debug"
    shown = CliRunner().invoke(app, ["status", root])
    assert "cluster.policy.replicas 1 -> 3" in " ".join(shown.output.split())
