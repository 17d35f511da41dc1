"""Searches that are cut off anywhere and go on; sandboxes that die under them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence

import pytest

from rollout.engine import EngineError
from rollout.problem import Level, Problem
from rollout.search import MAX_REOPENINGS, SearchConfig, SearchError, run_search
from rollout.tree import Tree
from tests.fakes import (
    Failure,
    ScriptedPolicy,
    ScriptedSandbox,
    TablePreference,
    random_steps,
)
from verifier import StepResult

PROBLEM = Problem(id="p", source="s", level=Level.GSM, text="How many?", answer="3")
SEED = 7
KINDS: dict[str, dict[str, object]] = {
    "terminal-guided": {},
    "ppm": {"ppm": True},
    "released": {"preset": "released", "num_answer_candidates": None},
    "token budget": {"max_generated_tokens": 150},
    "three at a time": {"parallel_rollouts": 3},
    "three at a time, ppm": {"parallel_rollouts": 3, "ppm": True},
}


def config_of(kind: str) -> tuple[SearchConfig, bool]:
    given = dict(KINDS[kind])
    ppm = bool(given.pop("ppm", False))
    base: dict[str, object] = {
        "template": "short",
        "num_candidates": 4,
        "num_answer_candidates": 4,
        "num_rollouts": 10,
        "max_depth": 5,
    }
    return SearchConfig.model_validate({**base, **given}), ppm


def new_tree() -> Tree:
    return Tree(problem=PROBLEM, round=1, seed=SEED)


def new_sandbox() -> ScriptedSandbox:
    return ScriptedSandbox({"bad": Failure()}, default="3\n")


async def search(
    kind: str,
    *,
    tree: Tree | None = None,
    sandbox: ScriptedSandbox | None = None,
    policy: ScriptedPolicy | None = None,
) -> Tree:
    config, ppm = config_of(kind)
    return await run_search(
        PROBLEM,
        config=config,
        policy=policy or ScriptedPolicy(random_steps),
        preference=TablePreference(lambda t: math.sin(len(t))) if ppm else None,
        sandbox=sandbox or new_sandbox(),
        round=1,
        seed=SEED,
        resume=tree,
    )


async def cut_off(kind: str, tree: Tree, sandbox: ScriptedSandbox, num_awaits: int) -> bool:
    """Search and cancel after so many turns of the event loop; True if it had ended before."""
    task = asyncio.create_task(search(kind, tree=tree, sandbox=sandbox))
    for _ in range(num_awaits):
        await asyncio.sleep(0)
        if task.done():
            break
    ended = task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return ended


@pytest.mark.parametrize("kind", KINDS)
def test_search_cancelled_at_any_await_goes_on_to_the_same_tree(kind: str) -> None:
    whole = asyncio.run(search(kind))

    async def at(num_awaits: int) -> tuple[bool, Tree]:
        tree, sandbox = new_tree(), new_sandbox()
        ended = await cut_off(kind, tree, sandbox, num_awaits)
        assert sandbox.open_trees == []
        return ended, await search(kind, tree=tree, sandbox=sandbox)

    num_awaits, ended = 0, False
    while not ended:
        ended, tree = asyncio.run(at(num_awaits))
        assert tree == whole, f"cancelled after {num_awaits} awaits"
        num_awaits += 1
    assert num_awaits > 10


@pytest.mark.parametrize("kind", KINDS)
def test_search_cancelled_again_and_again_comes_to_the_same_tree(kind: str) -> None:
    async def in_pieces() -> Tree:
        tree, sandbox = new_tree(), new_sandbox()
        pieces = 1
        while not await cut_off(kind, tree, sandbox, 9):
            pieces += 1
        assert pieces > 1
        return tree

    assert asyncio.run(in_pieces()) == asyncio.run(search(kind))


def test_search_goes_on_where_an_engine_died_and_asks_only_for_what_is_missing() -> None:
    whole_policy = ScriptedPolicy(random_steps)
    whole = asyncio.run(search("ppm", policy=whole_policy))

    class DyingPolicy(ScriptedPolicy):
        async def generate(self, request):
            if len(self.requests) == 4:
                raise EngineError("the replica died")
            return await super().generate(request)

    tree, sandbox = new_tree(), new_sandbox()
    dying = DyingPolicy(random_steps)
    with pytest.raises(EngineError, match="the replica died"):
        asyncio.run(search("ppm", tree=tree, sandbox=sandbox, policy=dying))
    assert tree.num_requests == 4
    rest = ScriptedPolicy(random_steps)
    assert asyncio.run(search("ppm", tree=tree, sandbox=sandbox, policy=rest)) == whole
    assert dying.requests + rest.requests == whole_policy.requests


def test_finished_tree_gets_more_rollouts_as_if_it_had_been_asked_for_them_at_first() -> None:
    config, _ = config_of("terminal-guided")

    def to(num_rollouts: int, tree: Tree | None = None) -> Tree:
        return asyncio.run(
            run_search(
                PROBLEM,
                config=config.model_copy(update={"num_rollouts": num_rollouts}),
                policy=ScriptedPolicy(random_steps),
                preference=None,
                sandbox=new_sandbox(),
                round=1,
                seed=SEED,
                resume=tree,
            )
        )

    assert to(10, to(2)) == to(10)


def test_tree_of_another_search_is_refused() -> None:
    for tree in (Tree(problem=PROBLEM, round=2, seed=SEED), Tree(problem=PROBLEM, round=1, seed=8)):
        with pytest.raises(ValueError, match="the tree to go on with has"):
            asyncio.run(search("terminal-guided", tree=tree))
    tree = new_tree()
    tree.grader_version = "older"
    with pytest.raises(ValueError, match="graded by 'older'"):
        asyncio.run(search("terminal-guided", tree=tree))


class DyingSandbox(ScriptedSandbox):
    """Loses every open tree at the runs with these numbers, as a worker that is killed."""

    def __init__(self, *deaths: int, then: str | Failure = "3\n") -> None:
        super().__init__({"bad": Failure()}, default="3\n")
        self.deaths = deaths
        self.then = then
        self.num_runs = 0

    async def run(
        self, state: str, codes: Sequence[str], limits: object = None
    ) -> list[StepResult]:
        self.num_runs += 1
        if self.num_runs in self.deaths:
            for tree_id in self.open_trees:
                await self.close(tree_id)
            self.default = self.then
            raise EngineError("the sandbox worker died")
        return await super().run(state, codes)


@pytest.mark.parametrize("kind", ["terminal-guided", "released", "three at a time"])
def test_search_outlives_the_death_of_its_sandbox_at_any_run(kind: str) -> None:
    whole = asyncio.run(search(kind))
    death, died = 1, True
    while died:
        sandbox = DyingSandbox(death)
        assert asyncio.run(search(kind, sandbox=sandbox)) == whole, f"died at run {death}"
        assert sandbox.open_trees == []
        died = sandbox.num_runs >= death
        death += 1
    assert death > 5


def test_sandbox_that_keeps_dying_ends_the_search_with_its_tree_as_it_was() -> None:
    whole = asyncio.run(search("terminal-guided"))
    first = 4
    tree = new_tree()
    sandbox = DyingSandbox(*range(first, first + MAX_REOPENINGS + 1))
    with pytest.raises(EngineError, match="the sandbox worker died"):
        asyncio.run(search("terminal-guided", tree=tree, sandbox=sandbox))
    assert 1 < len(tree.nodes) < len(whole.nodes)
    assert sandbox.open_trees == []
    assert asyncio.run(search("terminal-guided", tree=tree)) == whole


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("4\n", r"ran again and ended ok with '4\\n', before ok with '3\\n'"),
        (Failure(), "ended error"),
    ],
)
def test_replay_that_comes_out_otherwise_is_an_error_and_never_mixed_in(
    then: str | Failure, message: str
) -> None:
    with pytest.raises(SearchError, match=f"problem p: the code of node .* {message}"):
        asyncio.run(search("terminal-guided", sandbox=DyingSandbox(4, then=then)))
