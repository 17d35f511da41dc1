"""A driver that stands still for longer than anybody is believed to live in silence."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.fleet.membership import SupervisionConfig
from cluster.fleet.stages import RolloutStage
from rollout.search import SearchConfig
from tests.builders import make_problem
from tests.saboteur import check_solves_as_undisturbed, stopped_at_the_end, until
from tests.scripted_fleet import scripted_fleet

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=12, max_depth=5)
PROBLEMS = [make_problem(f"p{n}", answer="3" if n % 3 else "5") for n in range(60)]
STANDS_S = 90.0


async def test_event_loop_that_stands_still_for_ninety_seconds_costs_nobody_his_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    usual = SupervisionConfig()
    assert usual.silent_s < STANDS_S
    two = {"replicas": 2}
    fleet = scripted_fleet(
        tmp_path / "run",
        policy=two,
        workers=two,
        shard_size=4,
        max_open_trees=2,
        supervision=usual.model_dump(),
    )
    async with stopped_at_the_end(fleet):
        await fleet.start(tmp_path / "run" / "hold", version="policy-r0", learner=False)
        stage = RolloutStage(name="base", search=SEARCH)
        work = asyncio.create_task(
            fleet.rollout(1, PROBLEMS, [stage], preference=False, on_progress=lambda *_: None)
        )
        await until(lambda: sum(p.finished.trees for p in fleet.progress()) >= 2)
        time.sleep(STANDS_S)
        outcome = await work
    assert outcome.losses == {}
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    await check_solves_as_undisturbed(fleet, PROBLEMS, SEARCH)
