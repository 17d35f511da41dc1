from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from cluster.folder import lineage
from cluster.folder.lineage import record_lineage, record_start
from cluster.folder.machine import code_version
from cluster.folder.run_folder import RunFolder
from learner.checkpoint import CheckpointStore, directory_digest
from rollout.store import RunStore, TrajectoryStore
from tests.builders import answer, make_problem, make_tree
from verifier import GRADER_VERSION


def sealed_round(root: Path, round: int, **info: str) -> None:
    trees = TrajectoryStore(RunStore(root), round)
    tree = make_tree(answer("7", correct=True), problem=make_problem("a"), round=round)
    tree.grader_version = GRADER_VERSION
    trees.commit("s1", [tree], info=info)
    trees.seal()


def publish(root: Path, kind: str, round: int) -> str:
    def write(directory: Path) -> None:
        (directory / "weights").write_text(f"{kind} {round}", encoding="utf-8")

    info = {"base": str(root / "base"), "data_digest": "d" * 64, "seed": 5}
    store = CheckpointStore(root / "checkpoints")
    return store.publish(kind, round, write, info).digest  # type: ignore[arg-type]


def test_each_start_keeps_code_packages_machine_and_inputs(tmp_path: Path) -> None:
    data = tmp_path / "train.parquet"
    data.write_bytes(b"rows")
    folder = RunFolder(tmp_path / "run")
    record_start(folder, [data])
    record_start(folder, [data])
    starts = json.loads((tmp_path / "run" / "versions.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["versions"]["python"]
    assert starts[0]["grader"] == GRADER_VERSION
    assert starts[0]["hardware"]["cores"] >= 1
    assert starts[1]["inputs"][0]["sha256"] == hashlib.sha256(b"rows").hexdigest()


def test_inputs_are_read_again_only_if_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "model"
    data.mkdir()
    (data / "weights").write_bytes(b"one")
    folder = RunFolder(tmp_path / "run")
    record_start(folder, [data])
    monkeypatch.setattr(lineage, "_digest", lambda path: "read again")
    record_start(folder, [data])
    (data / "weights").write_bytes(b"three")
    record_start(folder, [data])
    starts = json.loads((tmp_path / "run" / "versions.json").read_text())["starts"]
    digests = [start["inputs"][0]["sha256"] for start in starts]
    assert digests[0] == digests[1] != "read again"
    assert digests[2] == "read again"


def test_round_tells_what_searched_it_and_what_was_made_of_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    searched_by = publish(tmp_path, "policy", 0)
    sealed_round(tmp_path, 1, policy=f"policy-r0-{searched_by[:8]}", ppm="")
    assert "dataset" not in record_lineage(folder, 1)
    folder.dataset(1).mkdir(parents=True)
    manifest = {"template": "rstar", "digest": "d" * 64, "info": {"rounds": [1]}}
    (folder.dataset(1) / "manifest.json").write_text(json.dumps(manifest))
    digest = publish(tmp_path, "policy", 1)
    record = record_lineage(folder, 1)
    assert record["searched_by"]["policy"][0]["sha256"] == searched_by
    assert record["searched_by"]["ppm"] == []
    assert record["searched_by"]["grader"] == [GRADER_VERSION]
    sealed = (tmp_path / "trajectories/round=1/manifest.json").read_bytes()
    assert record["trajectories"]["sha256"] == hashlib.sha256(sealed).hexdigest()
    assert record["dataset"]["trajectories"] == {"round=1": record["trajectories"]["sha256"]}
    assert record["policy"]["sha256"] == digest
    assert record["policy"]["started_from"] == "base"
    assert record["policy"]["dataset_sha256"] == record["dataset"]["sha256"]
    assert record == json.loads((tmp_path / "lineage/round=1.json").read_text())


def test_given_base_model_is_found_by_the_digest_of_the_start(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"w")
    folder = RunFolder(tmp_path / "run")
    record_start(folder, [model])
    sealed_round(tmp_path / "run", 1, policy="base")
    found = record_lineage(folder, 1)["searched_by"]["policy"]
    assert found == [{"version": "base", "path": str(model), "sha256": directory_digest(model)}]


def test_what_an_earlier_start_recorded_of_the_search_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    sealed_round(tmp_path, 1, policy="endpoint:big", grader="answers-0")
    first = record_lineage(folder, 1)
    assert first["searched_by"]["grader"] == ["answers-0"]
    for marker in (tmp_path / "trajectories/round=1/commits").iterdir():
        marker.unlink()
    assert record_lineage(folder, 1) == first


def test_code_outside_a_checkout_has_the_commit_of_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_version(tmp_path) is None
    monkeypatch.setenv("RSTAR_COMMIT", "0f" * 20)
    assert code_version(tmp_path) == {"commit": "0f" * 20, "changed_files": 0}
    monkeypatch.setenv("RSTAR_COMMIT", "0f" * 20 + "-dirty")
    assert code_version(tmp_path) == {"commit": "0f" * 20, "changed_files": 1}


def test_code_in_a_checkout_has_its_commit(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "a.py").write_text("a = 1\n")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True, env=env)
    clean = code_version(tmp_path)
    (tmp_path / "a.py").write_text("a = 2\n")
    changed = code_version(tmp_path)
    assert clean is not None
    assert changed is not None
    assert len(clean["commit"]) == 40
    assert (clean["changed_files"], changed["changed_files"]) == (0, 1)
