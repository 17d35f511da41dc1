"""Models and problem files by their address on a Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import HfFileSystem
from rich.console import Console

from cluster.folder import staging
from cluster.folder.lineage import record_start
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.folder.staging import Stager
from cluster.runs.config import RunConfig
from cluster.runs.evolve import Evolution
from cluster.telemetry.progress import ProgressView
from learner.checkpoint import CheckpointError
from learner.miniature import write_base_model
from rollout.problems.miniature import generate, write_miniature
from tests.hub import Hub, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub(tmp_path / "hub", gated=("acme/gated",))
    (made.root / "models/acme/gated").mkdir(parents=True)
    monkeypatch.setenv("RSTAR_STAGE", str(tmp_path / "staged"))
    monkeypatch.setattr(staging, "_of_process", None)
    with serving(made) as url:
        # HF_ENDPOINT, which users set, is read when the package is imported.
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url, "token": False})
        HfFileSystem.clear_instance_cache()
        yield made
    HfFileSystem.clear_instance_cache()


def test_a_run_starts_from_a_model_and_problems_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    problems = hub.root / "datasets/acme/sums"
    miniature = generate(seed=0, num_demonstrations=20, num_train=12, num_test=6)
    write_miniature(problems / "data", miniature)
    model = write_base_model(hub.root / "models/acme/tiny", seed=0, texts=["1 + 1 = 2"] * 50)
    there = "hf://datasets/acme/sums/data"
    config = RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": str(tmp_path / "run"),
            "models": {"base_model": "hf://acme/tiny@main"},
            "problems": {
                "train": [f"{there}/train.parquet"],
                "test": f"{there}/test.parquet",
                "demonstrations": f"{there}/demonstrations.parquet",
            },
            "search": {"template": "short"},
            "cold_start": {"total_tokens": 1000},
            "rounds": [{"preference": False}],
        }
    )
    evolution = Evolution(config, ProgressView(Console(quiet=True)))
    evolution._prepare()
    assert [p.id for p in evolution.train] == [p.id for p in miniature.train]
    base = Path(Stager(None)("hf://acme/tiny@main").path)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == {
        file.name: file.read_bytes() for file in Path(model).iterdir()
    }
    record_start(evolution.folder, [p for p in evolution.inputs if p is not None])
    [start] = (evolution.folder.read("versions.json") or {})["starts"]
    assert {entry["path"] for entry in start["inputs"]} >= {f"{there}/train.parquet"}
    hub.asked.clear()
    assert Stager(None)("hf://acme/tiny@main").path == str(base)
    assert not [path for path in hub.asked if "/resolve/" in path]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hf://acme/none", "repository not found"),
        ("hf://acme/gated", "gated"),
    ],
)
def test_what_the_hub_does_not_give_is_named(hub: Hub, place: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{place} cannot be had: .*{said}"):
        Stager(None)(place)


def test_a_run_does_not_live_on_the_hub(hub: Hub) -> None:
    folder = RunFolder("hf://acme/gated/run")
    with pytest.raises(RunFolderError, match="HfFileSystem has no atomic create"), folder.locked():
        pass
