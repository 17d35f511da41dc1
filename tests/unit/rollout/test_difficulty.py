from __future__ import annotations

from collections.abc import Sequence

import pytest

from rollout.difficulty import (
    Difficulty,
    Next,
    SuspectConfig,
    difficulty,
    escalate,
    right_share,
    suspect_label,
)
from rollout.tree import Tree, solution_shares
from tests.builders import Branch, answer, answered, code, failed, make_problem, make_tree


def tree(
    *answers: str,
    index: int = 0,
    gold: str = "7",
    value: float | None = None,
    tokens: int = 100,
    visited: bool = True,
) -> Tree:
    """A tree whose rollouts reached these answers; a dead end if there is none."""
    found = [answer(a, correct=a == gold, value=value, visited=visited) for a in answers]
    made = make_tree(*(found or [failed()]), problem=make_problem(answer=gold), index=index)
    made.generated_tokens = tokens
    return made


@pytest.mark.parametrize(
    ("first", "further", "expected"),
    [
        (["7", "7"], None, Difficulty.EASY),
        (["7", "8"], None, Difficulty.MEDIUM),
        (["8", "9"], None, Difficulty.HARD),
        ([], None, Difficulty.HARD),
        (["8"], ["9", "7"], Difficulty.HARD),
        (["8"], ["9", "8"], Difficulty.UNSOLVED),
        ([], [], Difficulty.UNSOLVED),
    ],
)
def test_difficulty_is_that_of_the_first_search_and_unsolved_needs_a_further_one(
    first: Sequence[str], further: Sequence[str] | None, expected: Difficulty
) -> None:
    trees = [tree(*first)] + ([tree(*further, index=1)] if further is not None else [])
    assert difficulty(trees) is expected
    assert difficulty(trees[::-1]) is expected


def test_answers_no_rollout_reached_do_not_count() -> None:
    for unreached in (tree("8", visited=False), tree("7", visited=False)):
        assert difficulty([unreached]) is Difficulty.HARD
        assert right_share(unreached) is None
    rules = {"suspect": SuspectConfig()}
    assert escalate([tree("7", visited=False)], **rules).next is Next.SEARCH


def sampled(branch: Branch, times: int) -> Branch:
    """A step that so many candidates of its expansion agreed on."""
    branch.extra["multiplicity"] = times
    return branch


def test_a_merged_step_counts_as_often_as_it_was_sampled() -> None:
    found = make_tree(
        sampled(code("a = 7", answered("7", correct=True)), 14),
        code("a = 8", answered("8", correct=False)),
        code("a = 9", answered("9", correct=False)),
    )
    assert right_share(found) == pytest.approx(14 / 16)


def test_a_branch_counts_no_more_for_having_been_searched_more() -> None:
    one, other = answered("8", correct=False, source="print(8)"), answered("9", correct=False)
    found = make_tree(
        code("a = 7", answered("7", correct=True)),
        code("a = 8", one, other, sampled(answered("7", correct=True), 2)),
    )
    # the first branch is right; of the second's four samples, two are
    assert right_share(found) == pytest.approx((1 + 2 / 4) / 2)
    shares = solution_shares(found, list(found.reached_answers()))
    assert list(shares.values()) == [1 / 2, 1 / 8, 1 / 8, 1 / 4]


def test_trees_that_agree_on_another_answer_make_the_label_suspect() -> None:
    trees = [tree("1/2", "0.5", "\\frac{1}{2}", "3"), tree("0.5", "0.5", "1/2", "2/4", index=1)]
    found = suspect_label(trees, SuspectConfig())
    assert found is not None
    assert (found.answer, found.gold) == ("1/2", "7")
    assert (found.votes, found.num_answers, found.num_trees) == (7, 8, 2)
    assert (found.mean_value, found.generated_tokens) == (None, 200)


def test_wordings_of_one_program_are_one_vote_of_a_tree() -> None:
    def agreed(index: int) -> Tree:
        wordings = [f"# {n}\nprint(8)" for n in range(8)]
        programs = [answered("8", correct=False, source=source) for source in wordings]
        return make_tree(*programs, problem=make_problem(), index=index)

    few = SuspectConfig(min_answers=3)
    assert suspect_label([agreed(0), agreed(1)], few) is None
    found = suspect_label([agreed(0), agreed(1), agreed(2)], few)
    assert found is not None
    assert (found.votes, found.num_answers, found.num_trees) == (3, 3, 3)


EIGHTS = ["8"] * 4


@pytest.mark.parametrize(
    ("trees", "why_not"),
    [
        ([tree(*EIGHTS, "7"), tree(*EIGHTS, index=1)], "it is solved"),
        ([tree("8", "8"), tree("8", "8", index=1)], "too few answers"),
        ([tree(*EIGHTS, *EIGHTS), tree(index=1)], "one tree alone"),
        ([tree(*EIGHTS, "1", "2"), tree(*EIGHTS, "3", "4", index=1)], "no clear majority"),
        (
            [tree(*EIGHTS, value=-0.5), tree(*EIGHTS, index=1, value=-0.1)],
            "the PPM thinks little of it",
        ),
        ([tree(*EIGHTS, gold=""), tree(*EIGHTS, gold="", index=1)], "there is no label"),
    ],
)
def test_label_stands_unless_everything_speaks_against_it(trees: list[Tree], why_not: str) -> None:
    assert suspect_label(trees, SuspectConfig()) is None, why_not


def test_high_ppm_value_confirms_a_suspect() -> None:
    trees = [tree(*EIGHTS, value=0.9), tree(*EIGHTS, index=1, value=0.7)]
    found = suspect_label(trees, SuspectConfig(min_value=0.5))
    assert found is not None
    assert found.mean_value == pytest.approx(0.8)


def test_escalation_ends_when_solved_suspect_or_out_of_budget() -> None:
    rules = {"suspect": SuspectConfig(), "leave_suspects": True, "max_generated_tokens": 250}
    assert escalate([tree("8"), tree("7", index=1)], **rules).next is Next.SOLVED
    assert escalate([tree("8"), tree("9", index=1)], **rules).next is Next.SEARCH
    spent = [tree("8"), tree("9", index=1, tokens=150)]
    assert escalate(spent, **rules).next is Next.OUT_OF_BUDGET
    suspect = escalate([tree(*EIGHTS), tree(*EIGHTS, index=1, tokens=900)], **rules)
    assert suspect.next is Next.SUSPECT
    assert suspect.suspect is not None
    assert escalate([tree("8", gold="")], **rules).next is Next.UNLABELLED


def test_suspect_is_searched_on_and_still_named_unless_told_to_leave_it() -> None:
    decision = escalate([tree(*EIGHTS), tree(*EIGHTS, index=1)], suspect=SuspectConfig())
    assert decision.next is Next.SEARCH
    assert decision.suspect is not None and decision.suspect.answer == "8"


def test_trees_of_several_problems_are_refused() -> None:
    other = make_tree(problem=make_problem("p2"))
    for trees in ([], [tree("8"), other]):
        with pytest.raises(ValueError, match="trees of one problem"):
            difficulty(trees)
