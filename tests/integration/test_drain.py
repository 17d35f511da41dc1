"""Stopped in the middle: a rollout drains by its deadline, and the next one takes up its trees."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.fleet import rollouts
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from rollout.engine import GenerationReply, GenerationRequest
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import make_problem
from tests.fakes import ScriptedPolicy, random_steps
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_fleet import scripted_fleet
from tests.scripted_replicas import HELD, ScriptedPolicyReplica

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=12, max_depth=5)
HELD_IDS = ("p0", "p7")
"""With the seeds of this test their trees are among those that grow deep."""
PROBLEMS = [
    make_problem(f"p{n}", text=HELD if f"p{n}" in HELD_IDS else "How many?", answer="3")
    for n in range(8)
]
DRAIN_S = 2.0


class HoldsDeepTrees(ScriptedPolicyReplica):
    """Says nothing to held problems once they have a step, while its checkpoint's path exists."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        while (
            HELD in request.prompt
            and request.prompt.count("<end_of_step>")
            and Path(self.path).exists()
        ):
            await asyncio.sleep(0.05)
        await self._work()
        return await ScriptedPolicy(random_steps, version=self.version).generate(request)


def make_fleet(root: Path) -> Fleet:
    return scripted_fleet(
        root, replica=HoldsDeepTrees, max_open_trees=8, shard_size=4, checkpoint_open_trees_s=None
    )


async def rollout(fleet: Fleet) -> RolloutOutcome:
    return await fleet.rollout(
        1,
        PROBLEMS,
        [RolloutStage(name="base", search=SEARCH)],
        preference=False,
        on_progress=lambda done, total, facts: None,
    )


async def test_stopped_rollout_commits_what_is_finished_by_its_deadline_and_keeps_open_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(rollouts, "DRAIN_S", DRAIN_S)
    root = tmp_path / "run"
    root.mkdir()
    hold = tmp_path / "hold"
    hold.touch()
    store = RunStore(str(root))
    trees = TrajectoryStore(store, 1)

    first = make_fleet(root)
    async with stopped_at_the_end(first):
        await first.start(hold, version="policy-r0", learner=False)
        work = asyncio.create_task(rollout(first))
        await until(lambda: sum(p.finished.trees for p in first.progress()) == 6)
        assert trees.commits() == {}
        stopped_s = time.monotonic()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        drained_s = time.monotonic() - stopped_s
    parts = trees.commits()
    assert sum(len(commit.trees) for commit in parts.values()) == 6
    rest = [p for commit in parts.values() for group in commit.remaining for p in group]
    assert sorted(rest) == sorted(HELD_IDS)
    assert len(store.files("trajectories/round=1/open")) == 2
    assert len(store.files("problem_blocks")) == 1, "who comes next needs it"

    hold.unlink()
    second = make_fleet(root)
    async with stopped_at_the_end(second):
        await second.start(hold, version="policy-r0", learner=False)
        outcome = await rollout(second)
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.resumed_trees == 2
    assert store.files("trajectories/round=1/open") == []
    assert store.files("problem_blocks") == []
    with capsys.disabled():
        print(
            f"\ndrained in {drained_s:.1f} s of {DRAIN_S:.0f} s and the time to store; 6 trees "
            f"committed in {len(parts)} parts, 2 open ones gone on with"
        )
