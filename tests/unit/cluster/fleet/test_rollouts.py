from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.fleet.config import ClusterConfig, HardProblemsConfig
from cluster.fleet.rollouts import RENEW_S, Rollout, _TimeLeft, queue_config
from cluster.fleet.stages import RolloutStage
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.escalation import StageCost
from cluster.jobs.queue import StagePlan
from rollout.problem import Problem
from rollout.search import SearchConfig, SearchError
from rollout.store import RunStore, Totals, TrajectoryStore
from tests.builders import answer, failed, make_problem, make_tree


def test_job_in_work_is_not_granted_again_after_a_restart_of_the_coordinator(
    tmp_path: Path,
) -> None:
    """An idle worker asks at once; the one at work renews a moment later."""
    now = [0.0]
    config = queue_config(ClusterConfig())
    first = Coordinator(str(tmp_path), config, clock=lambda: now[0])
    ids = ("a", "b")
    first.plan(
        StagePlan(round=1, stage="base", tree_index=0, problem_ids=ids, shard_size=1, seed=0)
    )
    held = first.grant("at-work")
    assert held is not None
    again = Coordinator(str(tmp_path), config, clock=lambda: now[0])
    granted = []
    for tick in range(50):
        now[0] = tick * RENEW_S / 5
        if tick % 5 == 4:
            assert again.renew("at-work", [(held.job.id, held.id)], WorkerProgress()) == []
        lease = again.grant("idle")
        granted += [lease.job.problem_ids] if lease is not None else []
    assert held.job.problem_ids == ("a",) and granted == [("b",)]
    assert again.stats().leases.adopted == 1


def test_time_left_leaves_out_what_an_earlier_process_did() -> None:
    left = _TimeLeft(0.0, [StageCost(rollouts=4)], num_problems=100)
    assert left.share(60, Totals()) == 0.0
    assert left.share(80, Totals()) == pytest.approx(0.5)
    assert left.share(100, Totals()) == pytest.approx(1.0)


def rollout(
    *,
    trees: Any = None,
    problems: dict[str, Problem] | None = None,
    stages: Sequence[RolloutStage] = (),
    **cluster: Any,
) -> Rollout:
    config = SimpleNamespace(
        cluster=ClusterConfig(**cluster), hard_problems=HardProblemsConfig(), seed=0
    )
    unused: Any = None
    return Rollout(
        config=cast(Any, config),
        pools=unused,
        meter=unused,
        trees=trees,
        problems=problems or {},
        stages=[RolloutStage(name="base", search=SearchConfig()), *stages],
        preference=False,
        versions={},
        on_progress=lambda done, total, facts: None,
    )


def test_a_further_tree_is_for_what_the_one_before_left_unsolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = TrajectoryStore(RunStore(str(tmp_path)), 1)
    solved_in = {"easy": "base", "hard": "again-tree0", "harder": "again-tree1", "never": ""}
    asked: list[tuple[str, tuple[str, ...]]] = []

    async def search(self: Rollout, plan: StagePlan, time_left: _TimeLeft) -> None:
        asked.append((plan.stage, tuple(sorted(plan.problem_ids))))
        made = [
            make_tree(
                answer("7", correct=True) if solved_in[name] == plan.stage else failed(),
                problem=self.problems[name],
                index=plan.tree_index,
            )
            for name in plan.problem_ids
        ]
        trees.commit(plan.stage, made, info={})

    async def ask(self: Rollout, method: str, round: int) -> list[str]:
        assert (method, round) == ("committed", 1)
        return [stage for stage, _ in asked]

    monkeypatch.setattr(Rollout, "_run_stage", search)
    monkeypatch.setattr(Rollout, "_ask", ask)
    again = RolloutStage(name="again", search=SearchConfig(), trees=3, unsolved_only=True)
    seen = rollout(
        trees=trees, problems={name: make_problem(name) for name in solved_in}, stages=[again]
    )
    asyncio.run(seen._run_stages())
    assert asked == [
        ("base", ("easy", "hard", "harder", "never")),
        ("again-tree0", ("hard", "harder", "never")),
        ("again-tree1", ("harder", "never")),
        ("again-tree2", ("never",)),
    ]


def test_a_policy_that_writes_no_steps_stops_the_rollout_with_an_example() -> None:
    seen = rollout()
    text = "Let me think about it step by step."
    few = WorkerProgress(candidates=100, unfinished=100, unfinished_text=text)
    seen._check_candidates([few])
    with pytest.raises(SearchError, match=r"4 of 200 candidates ended .* by step.*bootstrap"):
        seen._check_candidates([few, WorkerProgress(candidates=100, unfinished=96)])


def test_candidates_are_looked_at_once_and_a_key_lets_the_rollout_go_on() -> None:
    good = [WorkerProgress(candidates=200, unfinished=190)]
    bad = [WorkerProgress(candidates=900, unfinished=900)]
    seen = rollout()
    seen._check_candidates(good)
    seen._check_candidates(bad)
    rollout(min_step_share=0)._check_candidates(bad)
