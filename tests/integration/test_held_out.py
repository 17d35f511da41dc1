"""The evaluation inside a run, on a real cluster with scripted engines and real sandboxes.

Engines say what the request's seed says, so an undisturbed evaluation is known: it is the same
solutions in this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import Evaluation, balanced, evaluate, evaluate_problem, judge
from cluster.evaluation.ruler import measure
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutOutcome
from learner.candidates import Recipe
from learner.checkpoint import Checkpoint
from learner.pairs import PairConfig
from rollout.engine import GenerationReply, GenerationRequest
from rollout.problem import Level, Problem
from rollout.prompt import SHORT_TEMPLATE
from rollout.search import SearchConfig, SearchError
from rollout.store import RunStore, Totals, TrajectoryStore, evaluation_of, ruler_of
from rollout.tree import Tree
from tests.builders import make_problem
from tests.fakes import ScriptedPolicy, TablePreference, random_steps
from tests.saboteur import Saboteur, stopped_at_the_end, until
from tests.scripted_fleet import scripted_fleet
from tests.scripted_replicas import (
    HELD,
    ScriptedPolicyReplica,
    hash_value,
)
from verifier import AsyncSandbox

ROOT = Path(__file__).resolve().parents[2]
CONFIG = EvaluationConfig(num_rollouts=4, num_candidates=3, num_search_problems=20)
SEARCH = SearchConfig(template="short", max_depth=4)
BROKEN = "How many are broken?"
SEED, ROUND = 5, 2
VICTIMS = ("sandbox worker", "rollout worker", "policy replica")


def problem(number: int, text: str = "How many?") -> Problem:
    level = list(Level)[number % 3]
    return make_problem(f"p{number}", text=text, answer="3" if number % 3 else "4", level=level)


PROBLEMS = [problem(n, "How many?" if n else HELD) for n in range(30)]


class BreakingPolicyReplica(ScriptedPolicyReplica):
    """Answers one question with what is no completion."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        reply = await super().generate(request)
        if BROKEN in request.prompt:
            return replace(reply, completions=(None,))  # type: ignore[arg-type]
        return reply


def make_fleet(root: Path, monkeypatch: pytest.MonkeyPatch, **cluster: Any) -> Fleet:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return scripted_fleet(
        root, replica=BreakingPolicyReplica, seed=SEED, max_open_trees=4, **cluster
    )


async def start(fleet: Fleet) -> Path:
    """Start the fleet; returns the file that holds the first problem while it is there."""
    hold = fleet.folder.root / "hold"
    await fleet.start(hold, version="policy-r2", learner=False)
    await fleet.serve_preference(Checkpoint(kind="ppm", round=ROUND, path="unused", digest="d"))
    hold.touch()
    return hold


async def evaluated(
    fleet: Fleet, problems: Sequence[Problem] = PROBLEMS
) -> tuple[Evaluation, RolloutOutcome]:
    return await evaluate(
        fleet,
        problems,
        config=CONFIG,
        search=SEARCH,
        round=ROUND,
        seed=SEED,
        preference=True,
        on_progress=lambda done, total, facts: None,
    )


async def undisturbed() -> Evaluation:
    """What an evaluation shows that nothing happens to."""
    sandbox = AsyncSandbox(isolation="best_effort", cores=1)
    searched = {p.id for p in balanced(PROBLEMS, CONFIG.num_search_problems)}
    trees: list[Tree] = []
    try:
        for each in PROBLEMS:
            trees += await evaluate_problem(
                Tree(problem=each, round=ROUND),
                config=CONFIG,
                round=ROUND,
                seed=SEED,
                searched=searched,
                search=SEARCH.model_copy(update={"num_candidates": CONFIG.num_candidates}),
                policy=ScriptedPolicy(random_steps),
                preference=TablePreference(hash_value),
                sandbox=sandbox,
                clock=time.monotonic,
            )
    finally:
        sandbox.shutdown()
    return Evaluation(round=ROUND, problems=tuple(judge(trees, top_k=CONFIG.vote_top_k).values()))


def committed(fleet: Fleet) -> dict[str, int]:
    """When each shard was committed, by the name of its marker."""
    folder = fleet.folder.root / f"evaluations/round={ROUND}/commits"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


async def test_evaluation_in_which_actors_are_killed_shows_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"replicas": 2}
    fleet = make_fleet(tmp_path / "run", monkeypatch, policy=two, sandbox=two, workers=two)
    async with stopped_at_the_end(fleet):
        hold = await start(fleet)
        sabotage = asyncio.create_task(Saboteur(fleet, VICTIMS).work())
        sabotage.add_done_callback(lambda _: hold.unlink())
        found, outcome = await evaluated(fleet)
        await sabotage
    assert {kind: loss.deaths for kind, loss in outcome.losses.items()} == dict.fromkeys(VICTIMS, 1)
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    expected = await undisturbed()
    assert found == expected
    assert {p.search for p in expected.problems} == {True, False, None}


async def test_evaluation_outlives_the_node_of_its_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **node})
    try:
        box = {"num_cpus": 1, "resources": {"box": 1}, **node}
        first = cluster.add_node(**box)
        sandbox = {"replicas": 1, "resources": {"box": 1}}
        fleet = make_fleet(tmp_path / "run", monkeypatch, address=cluster.address, sandbox=sandbox)
        async with stopped_at_the_end(fleet, processes=False):
            hold = await start(fleet)
            work = asyncio.create_task(evaluated(fleet))
            await until(lambda: len(committed(fleet)) >= 2)
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(**box)
            hold.unlink()
            found, outcome = await work
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert outcome.losses["sandbox worker"].deaths == 1
    assert found == await undisturbed()


async def test_stopped_evaluation_goes_on_and_what_keeps_failing_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [*PROBLEMS, problem(len(PROBLEMS), BROKEN)]
    first = make_fleet(tmp_path / "run", monkeypatch)
    async with stopped_at_the_end(first):
        (await start(first)).unlink()
        work = asyncio.create_task(evaluated(first, problems))
        await until(lambda: len(committed(first)) >= 2)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    before = committed(first)
    assert 2 <= len(before) < len(problems) // 4
    store = TrajectoryStore(RunStore(str(tmp_path / "run")), evaluation_of(ROUND))
    paid_for = Totals.sum(commit.totals for commit in store.commits().values())

    second = make_fleet(tmp_path / "run", monkeypatch)
    async with stopped_at_the_end(second):
        (await start(second)).unlink()
        found, outcome = await evaluated(second, problems)
    assert before.items() <= committed(second).items()
    in_all = outcome.manifest.totals.generated_tokens
    assert outcome.generated_tokens == in_all - paid_for.generated_tokens > 0
    *others, broken = found.problems
    assert tuple(others) == (await undisturbed()).problems
    assert (broken.greedy, broken.search) == (False, None)
    assert "AttributeError" in broken.failure


async def test_nothing_but_failures_ends_the_run_with_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(tmp_path / "run", monkeypatch)
    async with stopped_at_the_end(fleet):
        await start(fleet)
        with pytest.raises(
            SearchError, match=r"none of 2 problems .* AttributeError.* remove .*run"
        ):
            await evaluated(fleet, [problem(n, BROKEN) for n in range(2)])


async def test_stopped_ruler_goes_on_and_is_searched_without_the_ppm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = {
        kind: Checkpoint(kind=kind, round=ROUND, path="unused", digest="d" * 64)  # type: ignore[arg-type]
        for kind in ("policy", "ppm")
    }

    async def measured(fleet: Fleet) -> tuple[dict[str, Any], RolloutOutcome | None]:
        return await measure(
            fleet,
            PROBLEMS,
            tmp_path / "unused",
            config=CONFIG,
            search=SEARCH,
            recipe=Recipe(template=SHORT_TEMPLATE, pairs=PairConfig()),
            round=ROUND,
            **served,
            on_progress=lambda done, total, facts: None,
        )

    store = TrajectoryStore(RunStore(str(tmp_path / "run")), ruler_of(ROUND))
    first = make_fleet(tmp_path / "run", monkeypatch, shard_size=2)
    async with stopped_at_the_end(first):
        await start(first)  # the first problem is held
        work = asyncio.create_task(measured(first))
        await until(lambda: len(store.commits()) >= 2)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    before = {name: commit.attempt for name, commit in store.commits().items()}

    second = make_fleet(tmp_path / "run", monkeypatch, shard_size=2)
    async with stopped_at_the_end(second):
        (await start(second)).unlink()
        record, outcome = await measured(second)
        again, _ = await measured(second)
    assert outcome is not None
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    commits = store.commits()
    assert before.items() <= {name: commit.attempt for name, commit in commits.items()}.items()
    assert {commit.info["ppm"] for commit in commits.values()} == {""}
    assert record == again
    assert record["num_searched"] == len(PROBLEMS) and record["num_pairs"] > 20
    assert set(record["rankings"]) == {"ppm", "logprob", "blind"}
