"""A disk that is full, then damaged: a real small file system under the store of a real fleet."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import ray

from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.jobs.audit import audit_round
from cluster.runs.config import RolloutConfig
from rollout.search import SearchConfig
from rollout.store import RunStore, StoreError, TrajectoryStore
from tests.builders import make_problem
from tests.saboteur import fill, stopped_at_the_end, until
from tests.scripted_replicas import HELD, ScriptedPolicyReplica

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=2, num_rollouts=4, max_depth=4)
PROBLEMS = [
    make_problem(f"p{n}", text=HELD if n > 3 else "How many?", answer="3") for n in range(16)
]


async def test_run_waits_while_the_disk_is_full_and_goes_on_when_there_is_room(
    tmp_path: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    root = disk / "run"
    root.mkdir()
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cluster": {
                "num_cpus": 2,
                "object_store_mib": 80,
                "max_open_trees": 16,
                "shard_size": 2,
                "stalled_after_s": 1.0,
                "supervision": {"look_s": 0.2},
            },
        }
    )
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(ScriptedPolicyReplica)
    hold = tmp_path / "hold"
    hold.touch()
    shown: list[dict[str, object]] = []
    trees = TrajectoryStore(RunStore(str(root)), 1)
    async with stopped_at_the_end(fleet):
        await fleet.start(hold, version="policy-r0", learner=False)
        work = asyncio.create_task(
            fleet.rollout(
                1,
                PROBLEMS,
                [RolloutStage(name="base", search=SEARCH)],
                preference=False,
                on_progress=lambda done, total, facts: shown.append(dict(facts)),
            )
        )
        await until(lambda: len(trees.commits()) == 2)
        before = {path: path.read_bytes() for path in root.glob("trajectories/*/*/*.*")}
        fill(disk / "filler")
        full_s = time.monotonic()
        hold.unlink()
        await until(lambda: any("wait for the store" in facts for facts in shown))
        error_s = time.monotonic() - full_s
        await until(lambda: any("no space left" in str(f.get("last error")) for f in shown))
        await until(lambda: any("waits on the store" in str(f.get("stalled")) for f in shown))
        assert len(trees.commits()) == 2 and not work.done()
        (disk / "filler").unlink()
        free_s = time.monotonic()
        outcome = await work
        went_on_s = time.monotonic() - free_s
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {} and outcome.losses == {}
    assert outcome.manifest.totals.trees == len(PROBLEMS)
    assert {path: path.read_bytes() for path in before} == before
    assert all(commit.info["ended"] == "" for commit in trees.commits().values())
    with capsys.disabled():
        print(
            f"\nfull disk: said after {error_s:.1f} s; done {went_on_s:.1f} s after there was room"
        )

    # A committed file that is cut off later is named by whoever reads it.
    file = root / outcome.manifest.files[0].path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"{file.name} .* bytes, .* were written"):
        audit_round(trees)
    with pytest.raises(StoreError, match=file.name):
        list(trees.trees())
