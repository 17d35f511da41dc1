"""What holds of every tree, whatever the rules and whatever runs beside it."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import (
    EvaluationReply,
    EvaluationRequest,
    GenerationReply,
    GenerationRequest,
)
from rollout.problem import Level, Problem
from rollout.search import SearchConfig, run_search
from rollout.table import table_to_trees, trees_to_table
from rollout.tree import Discard, Terminal, Tree
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference, random_steps

BASE: dict[str, Any] = {
    "template": "short",
    "num_candidates": 4,
    "num_rollouts": 8,
    "max_depth": 5,
}


def with_failures(drawn: dict[str, Any]) -> dict[str, Any]:
    invalid, backup = drawn.pop("failures")
    return {**drawn, "invalid_candidates": invalid, "failure_backup": backup}


configs = st.fixed_dictionaries(
    {
        "unvisited": st.sampled_from(["infinite", "zero", "first_play"]),
        "answer_candidates": st.sampled_from(["all", "first"]),
        "failures": st.sampled_from([("discard", "path"), ("discard", "leaf"), ("leaf", "leaf")]),
        "parallel_rollouts": st.sampled_from([1, 1, 2, 5]),
        "num_candidates": st.integers(1, 6),
        "max_depth": st.integers(1, 6),
    }
).map(with_failures)


def problem(number: int = 0) -> Problem:
    return Problem(id=f"p{number}", source="s", level=Level.GSM, text="How many?", answer="3")


async def search(
    *,
    seed: int,
    ppm: bool,
    number: int = 0,
    policy: ScriptedPolicy | None = None,
    preference: TablePreference | None = None,
    **config: Any,
) -> Tree:
    return await run_search(
        problem(number),
        config=SearchConfig.model_validate({**BASE, **config}),
        policy=policy or ScriptedPolicy(random_steps),
        preference=(preference or TablePreference(value_of)) if ppm else None,
        sandbox=ScriptedSandbox({"bad": Failure()}, default="3\n"),
        round=3 if ppm else 1,
        seed=seed,
    )


def value_of(text: str) -> float:
    return math.sin(len(text))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), ppm=st.booleans(), config=configs)
def test_every_tree_keeps_the_invariants(seed: int, ppm: bool, config: dict[str, Any]) -> None:
    tree = asyncio.run(search(seed=seed, ppm=ppm, **config))
    leaf_rule = config["failure_backup"] == "leaf"
    for node in tree.nodes:
        assert -1.0 <= node.q_value <= 1.0
        assert all(tree.nodes[i].parent == node.id for i in node.children)
        assert node.depth <= config["max_depth"]
        valid = tree.valid_children(node)
        if node.terminal is not None or node.discard is not None:
            # what ran and failed may be kept, but nothing below a terminal can be gone on with
            assert all(child.terminal is Terminal.CODE_ERROR for child in valid)
        if node.discard is not None:
            assert node.visit_count == 0
        if node.expanded and node.terminal is None and not leaf_rule:
            # N(s) = 1 for its own PPM value + one for each visit that went on to a child
            own = 1 if ppm and node.parent >= 0 else 0
            went_on = sum(
                child.visit_count - (1 if child.value is not None and is_open(child) else 0)
                for child in valid
                if child.terminal is not Terminal.CODE_ERROR
            )
            assert node.visit_count == own + went_on
    ends = sum(1 for n in tree.nodes if n.reward is not None and counts_for_root(n, leaf_rule))
    assert tree.root.visit_count == ends
    if not leaf_rule and config["parallel_rollouts"] == 1:
        assert ends == tree.num_rollouts


def is_open(node: Any) -> bool:
    """True if the node began with its PPM value as its first visit."""
    return node.terminal in (None, Terminal.NO_VALID_CHILD, Terminal.PROMPT_TOO_LONG)


def counts_for_root(node: Any, leaf_rule: bool) -> bool:
    if leaf_rule:
        return node.terminal is Terminal.ANSWER or node.id == 0
    return node.terminal is not Terminal.CODE_ERROR


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), ppm=st.booleans(), config=configs)
def test_every_candidate_is_kept_with_its_number_and_its_reason(
    seed: int, ppm: bool, config: dict[str, Any]
) -> None:
    policy = ScriptedPolicy(random_steps)
    tree = asyncio.run(search(seed=seed, ppm=ppm, policy=policy, **config))
    asked = sum(request.num_candidates for request in policy.requests)
    assert sum(n.multiplicity for n in tree.nodes[1:]) == asked
    for node in tree.nodes[1:]:
        assert (node.discard is Discard.CODE_FAILED) == (
            node.execution_status == "error" and config["invalid_candidates"] == "discard"
        )
        if node.execution_status == "error":
            assert node.execution_error
    assert sum(n.num_tokens for n in tree.nodes) == tree.generated_tokens


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), ppm=st.booleans(), config=configs)
def test_every_tree_comes_back_from_its_table(seed: int, ppm: bool, config: dict[str, Any]) -> None:
    tree = asyncio.run(search(seed=seed, ppm=ppm, **config))
    assert table_to_trees(trees_to_table([tree])) == [tree]


class Delayed:
    """Answers after a random number of turns of the event loop, other for every call."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    async def wait(self) -> None:
        for _ in range(self.rng.randrange(12)):
            await asyncio.sleep(0)


class DelayedPolicy(ScriptedPolicy, Delayed):
    def __init__(self, rng: random.Random) -> None:
        ScriptedPolicy.__init__(self, random_steps)
        self.rng = rng

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        await self.wait()
        return await super().generate(request)


class DelayedPreference(TablePreference, Delayed):
    def __init__(self, rng: random.Random) -> None:
        TablePreference.__init__(self, value_of)
        self.rng = rng

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        await self.wait()
        return await super().evaluate(request)


@pytest.mark.parametrize("parallel_rollouts", [1, 4])
def test_tree_is_the_same_whatever_runs_beside_it_and_however_long_the_engines_take(
    parallel_rollouts: int,
) -> None:
    num_trees = 60

    async def together() -> list[Tree]:
        rng = random.Random(1)
        policy, preference = DelayedPolicy(rng), DelayedPreference(rng)
        return list(
            await asyncio.gather(
                *(
                    search(
                        seed=number % 20,
                        ppm=number % 2 == 0,
                        number=number,
                        policy=policy,
                        preference=preference,
                        parallel_rollouts=parallel_rollouts,
                    )
                    for number in range(num_trees)
                )
            )
        )

    async def alone(number: int) -> Tree:
        return await search(
            seed=number % 20,
            ppm=number % 2 == 0,
            number=number,
            parallel_rollouts=parallel_rollouts,
        )

    assert asyncio.run(together()) == [asyncio.run(alone(number)) for number in range(num_trees)]
