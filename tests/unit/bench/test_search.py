"""The engines that cost nothing lead a search to answers: their figures are of whole trees."""

from __future__ import annotations

import asyncio

import pytest

from bench.search import OPEN_TREE, scripted_problems, search_scripted
from bench.search_engines import ScriptedEngines
from rollout.search import SearchConfig
from rollout.tree import Discard


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_scripted_search_grows_a_tree_with_answers_at_its_end(preset: str) -> None:
    config = SearchConfig(preset=preset, **OPEN_TREE)
    (tree,) = asyncio.run(search_scripted(scripted_problems(1), config, ScriptedEngines(5)))
    assert {node.discard for node in tree.nodes} <= {None, Discard.NOT_KEPT}
    assert len(tree.nodes) > 20 * config.num_candidates
    assert {node.depth for node in tree.answers()} == {6}
