"""What a ruler shows, worked by hand."""

from __future__ import annotations

import math

import pytest

from learner.candidates import Recipe
from learner.pairs import PairConfig, PairKind
from learner.ruler import (
    ComparedProblem,
    Comparison,
    accuracies,
    compared_pairs,
    compared_trees,
    is_pair_problem,
    measured,
    rank,
    why_not,
)
from rollout.prompt import SHORT_TEMPLATE, render_question
from rollout.tree import Tree
from tests.builders import answered, code, make_problem, make_tree

RECIPE = Recipe(template=SHORT_TEMPLATE, pairs=PairConfig())


def tree(name: str, *, solved: bool = True) -> Tree:
    """A right program `a` and a wrong one `b`: a step pair and an answer pair."""
    branches = [
        code("a = 1", answered("7", correct=solved)),
        code("b = 2", answered("8", correct=False)),
    ]
    return make_tree(*branches, problem=make_problem(name, text=f"How many in {name}?"))


def likes(*words: str, of: ComparedProblem) -> dict[str, float]:
    """Values of a PPM that likes texts with one of these words."""
    return {
        text: 0.9 if any(word in text for word in words) else -0.9
        for text in of.texts(SHORT_TEMPLATE)
    }


def shorter(of: ComparedProblem) -> dict[tuple[str, str], float]:
    sides = [(p.prefix, text) for p in of.pairs for text in (p.chosen, p.rejected)]
    return {key: -float(len(key[1])) for key in sides}


def test_trees_give_the_pairs_of_training_their_solutions_and_another_question() -> None:
    first, second, third = compared_trees([tree("y"), tree("x"), tree("z", solved=False)], RECIPE)
    assert [p.problem_id for p in (first, second, third)] == ["x", "y", "z"]
    assert [pair.kind for pair in first.pairs] == [PairKind.ANSWER, PairKind.STEP]
    assert sorted(first.solutions.values()) == [False, True] and not third.pairs
    blind = [p.blind for p in (first, second, third)]
    questions = [render_question(f"How many in {n}?", SHORT_TEMPLATE) for n in "yzx"]
    assert blind == questions
    step = first.pairs[1]
    assert first.blind_sides(step, SHORT_TEMPLATE)[0] == questions[0] + step.chosen


def test_pairs_of_a_dataset_give_the_same_as_their_trees() -> None:
    of_trees = compared_trees([tree("x"), tree("y")], RECIPE)
    pairs = [pair for problem in of_trees for pair in problem.pairs]
    assert compared_pairs(pairs, SHORT_TEMPLATE, limit=2) == of_trees
    (only,) = compared_pairs(pairs, SHORT_TEMPLATE, limit=1)
    assert only.problem_id == "x" and only.blind is None


def test_rankings_are_told_apart() -> None:
    x, _ = compared_trees([tree("x"), tree("y")], RECIPE)
    told = rank(x, likes("a = 1", of=x), shorter(x), SHORT_TEMPLATE)
    # Both sides are as long, and the other question does not matter to this PPM.
    assert [c.right for c in told] == [{"ppm": 1.0, "logprob": 0.5, "blind": 1.0}] * 2
    reads = likes("in x?", of=x) | {text: 0.95 for text in x.solutions if "a = 1" in text}
    told = rank(x, reads, shorter(x), SHORT_TEMPLATE)
    assert [c.right["blind"] for c in told] == [0.5, 0.5]
    assert {c.kind: c.right["ppm"] for c in told} == {PairKind.ANSWER: 1.0, PairKind.STEP: 0.5}


def test_pair_with_a_text_too_long_is_left_out_of_every_ranking() -> None:
    x, _ = compared_trees([tree("x"), tree("y")], RECIPE)
    values = likes("a = 1", of=x)
    values[x.sides(x.pairs[0])[1]] = math.nan
    assert [c.kind for c in rank(x, values, shorter(x), SHORT_TEMPLATE)] == [PairKind.STEP]


def comparison(name: str, right: float, *, depth: int = 0, kind: str = "step") -> Comparison:
    return Comparison(
        problem_id=name,
        kind=PairKind(kind),
        shared_steps=depth,
        right={"ppm": right, "logprob": 1.0 - right},
    )


def test_problems_count_by_their_pairs_and_are_drawn_whole() -> None:
    pairs = [comparison("a", 1.0, depth=n) for n in range(6)]
    pairs += [comparison("b", 0.0, kind="answer"), comparison("c", 0.5)]
    found = measured(pairs, [(0.9, True), (0.9, False), (-1.0, False)])
    assert (found["num_pairs"], found["num_problems"]) == (8, 3)
    ppm = found["rankings"]["ppm"]
    assert ppm["mean"] == pytest.approx(6.5 / 8)
    # A draw may hold b alone, or a alone: 8 pairs of 3 problems say no more than that.
    assert (ppm["low"], ppm["high"]) == (0.0, 1.0)
    assert "blind" not in found["rankings"]
    assert {name: own["num_pairs"] for name, own in found["groups"].items()} == {
        **{"answer": 1, "step": 7, "depth 0": 2, "depth 1": 1, "depth 2": 1, "depth 3": 1},
        "depth 4+": 2,
    }
    assert found["problems"]["a"] == {"pairs": 6.0, "ppm": 6.0, "logprob": 0.0}
    assert accuracies(found["problems"].values()) == found["rankings"]
    # (2 * |0.95 - 0.5| + 1 * |0 - 0|) / 3
    assert found["calibration_error"] == pytest.approx(0.3)
    assert found["calibration"][9] == (2.0, pytest.approx(0.95), 0.5)


def test_gate_asks_for_the_lower_bound_and_for_enough_problems() -> None:
    def why(problems: int, share: float, minimum: float | None = 0.55) -> str:
        pairs = [comparison(f"p{n}", float(n < share * problems)) for n in range(problems)]
        return why_not(measured(pairs, []), minimum)

    assert why(100, 0.75) == ""
    assert "60.0 % of 100 held-out pairs right" in why(100, 0.6)
    assert "the lower bound has to be above 55" in why(100, 0.6)
    assert "of 19 problems only, 20 are needed" in why(19, 1.0)
    assert why(20, 1.0) == ""
    assert why_not(measured([], []), 0.55) == "no held-out pairs to measure it on"
    assert why(3, 0.0, None) == ""


def test_variations_of_a_problem_are_held_out_together() -> None:
    held = [f"p{n}" for n in range(2000) if is_pair_problem(f"p{n}", share=0.1, split_seed=3)]
    assert 150 < len(held) < 250
    assert held == [n for n in held if is_pair_problem(n, share=0.2, split_seed=3)]
    other = {f"p{n}" for n in range(2000) if is_pair_problem(f"p{n}", share=0.1, split_seed=4)}
    assert len(other & set(held)) < 50
