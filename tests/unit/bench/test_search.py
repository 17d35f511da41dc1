"""The engines that cost nothing lead a search to answers: their figures are of whole trees."""

from __future__ import annotations

import asyncio

import pytest

from bench.search import OPEN_TREE, scripted_problems, search_scripted
from bench.search_engines import OpensCode, ScriptedEngines
from rollout.engine import Completion, FinishReason, GenerationReply, GenerationRequest
from rollout.prompt import END_OF_STEP
from rollout.search import SearchConfig
from rollout.tree import Discard


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_scripted_search_grows_a_tree_with_answers_at_its_end(preset: str) -> None:
    config = SearchConfig(preset=preset, **OPEN_TREE)
    (tree,) = asyncio.run(search_scripted(scripted_problems(1), config, ScriptedEngines(5)))
    assert {node.discard for node in tree.nodes} <= {None, Discard.NOT_KEPT}
    assert len(tree.nodes) > 20 * config.num_candidates
    assert {node.depth for node in tree.answers()} == {6}


class Writes:
    """The same kind of step wherever it stands, as a policy of random weights does."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        texts = [f"x = {n}\n{END_OF_STEP}" for n in range(request.num_candidates)]
        return GenerationReply(
            completions=tuple(
                Completion(text=text, finish=FinishReason.STOP, stop_string=END_OF_STEP)
                for text in texts
            )
        )


@pytest.mark.parametrize(("opened", "depth"), [(True, 4), (False, 1)])
def test_policy_that_writes_anything_needs_its_first_steps_opened(opened: bool, depth: int) -> None:
    engines = ScriptedEngines(4)
    policy = OpensCode(Writes()) if opened else Writes()
    engines.generate = policy.generate  # type: ignore[method-assign]
    config = SearchConfig(num_candidates=3, num_rollouts=4, max_depth=4, template="short")
    (tree,) = asyncio.run(search_scripted(scripted_problems(1), config, engines))
    assert max(node.depth for node in tree.nodes) == depth
    assert {node.discard for node in tree.nodes[1:]} == {None if opened else Discard.OUT_OF_PLACE}
