from __future__ import annotations

import asyncio

import pytest

from cluster.fleet.stages import RolloutStage, StageSearch, hardest_first, in_sets
from cluster.jobs.queue import SearchTask
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from rollout.tree import Tree
from tests.builders import make_problem
from tests.fakes import ScriptedPolicy, ScriptedSandbox


def test_each_stage_of_a_round_has_its_own_search() -> None:
    policy = ScriptedPolicy({"": ["<answer>\\boxed{3}<end_of_answer>"]})
    search = StageSearch(
        stages={
            name: RolloutStage(name=name, search=SearchConfig(num_candidates=n, num_rollouts=1))
            for name, n in (("base", 2), ("escalation-1", 5))
        },
        policy=policy,
        preference=None,
        sandbox=ScriptedSandbox(),
    )
    problem = Problem(id="p", source="s", level=Level.GSM, text="q", answer="3")
    task = SearchTask(round=4, stage="escalation-1", index=1, seed=9)
    given = Tree(problem=problem, round=4, index=1, seed=9)
    (tree,) = asyncio.run(search(problem, task, given))
    assert tree is given
    assert [r.num_candidates for r in policy.requests] == [5]
    assert (tree.round, tree.index, tree.seed, tree.solved) == (4, 1, 9, True)


def test_tree_of_other_search_settings_is_not_gone_on_with() -> None:
    search = StageSearch(
        stages={"base": RolloutStage(name="base", search=SearchConfig(num_candidates=2))},
        policy=ScriptedPolicy({}),
        preference=None,
        sandbox=ScriptedSandbox(),
    )
    problem = Problem(id="p", source="s", level=Level.GSM, text="q", answer="3")
    tree = Tree(problem=problem, round=1, search_config=SearchConfig().model_dump_json())
    task = SearchTask(round=1, stage="base", index=0, seed=0)
    with pytest.raises(ValueError, match="other settings"):
        asyncio.run(search(problem, task, tree))


def test_several_trees_per_problem_are_stages_of_their_own() -> None:
    search = SearchConfig()
    assert RolloutStage(name="base", search=search).tree_stages == ["base"]
    twice = RolloutStage(name="base", search=search, trees=2)
    assert twice.tree_stages == ["base-tree0", "base-tree1"]


def test_hard_levels_are_searched_first_in_their_order() -> None:
    levels = {"g1": "gsm", "m1": "math", "o1": "olympiad", "m2": "math", "o2": "olympiad"}
    problems = [make_problem(name, level=Level(level)) for name, level in levels.items()]
    assert hardest_first(problems) == ["o1", "o2", "m1", "m2", "g1"]


def test_jobs_hold_problems_of_one_set_as_far_as_they_go() -> None:
    sets = {"a1": "a", "b1": "b", "a2": "a", "a3": "a", "b2": "b", "b3": "b", "c1": "c"}
    problems = [make_problem(name, source=source) for name, source in sets.items()]
    problems.append(make_problem("hard", level=Level.OLYMPIAD, source="c"))
    ordered = in_sets(problems, 2)
    assert ordered == ["a1", "a2", "b1", "b2", "hard", "c1", "a3", "b3"]
    one_set = [make_problem(f"p{n}", level=list(Level)[n % 3]) for n in range(7)]
    assert in_sets(one_set, 3) == hardest_first(one_set)
