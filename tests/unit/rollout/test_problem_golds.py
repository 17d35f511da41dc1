"""Ground truths of answer columns and of solutions."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.problems.golds import (
    NO_GOLD,
    SEVERAL_ANSWERS,
    SEVERAL_BOXES,
    Gold,
    all_of,
    answer_of_solution,
    given,
)
from rollout.problems.rows import RowError


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"it is \boxed{\frac{2}{3}}.", r"\frac{2}{3}"),
        (r"cut off \boxed{\frac{2}{3}", None),
        (r"\boxed{7}. Wait, redo: \boxed{", None),
        ("so\n#### -1,234,567", "-1234567"),
        ("so\n#### (1,234)\nDone", "(1,234)"),
        (r"\boxed{} #### 5", "5"),
        ("nothing", None),
        (r"So \boxed{113}. ~a" "\n" r"Another way gives \boxed{113}", "113"),
        (r"So \boxed{0.5}. Or else: \boxed{\frac12}", r"\frac12"),
        (r"The answer is \boxed{\frac12} or \boxed{0.5}.", r"\frac12"),
        (r"There \boxed{3} come. So the final answer is $\boxed{5}$.", "5"),
        (r"There \boxed{3} come. The answer is" "\n\n" r"$$\boxed{5}$$", "5"),
    ],
)
def test_answer_of_a_solution_with_one_statement_or_one_that_is_called_the_answer(
    solution: str, answer: str | None
) -> None:
    assert answer_of_solution(solution) == Gold(answer)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{x=1} and \boxed{x=3}.", "x=1, x=3"),
        (r"so \boxed{1}. Then \boxed{3}. Together \boxed{1} and \boxed{3}.", "1, 3"),
        (r"so $x = \boxed{1}$, $y = \boxed{1}$", "x = 1, y = 1"),
    ],
)
def test_boxes_stated_together_are_all_in_the_answer(solution: str, answer: str) -> None:
    assert answer_of_solution(solution) == Gold(answer, joined=True)


def test_boxes_that_come_one_by_one_and_then_in_one_are_clear() -> None:
    assert answer_of_solution(r"\boxed{1}. Then \boxed{3}. So \boxed{1, 3}.").answer == "1, 3"


@pytest.mark.parametrize(
    "solution",
    [
        r"Case 1 gives \boxed{x=1}. Case 2 gives \boxed{x=3}.",
        r"(a) The answer is \boxed{1}. (b) The answer is \boxed{3}.",
        r"First \boxed{3}, no: \boxed{\frac{1}{2}}.",
        r"There are \boxed{3} boys in the room and also \boxed{4} girls.",
        r"a \boxed{1} b \boxed{2} and \boxed{3}",
    ],
)
def test_other_solutions_with_several_boxes_are_in_doubt(solution: str) -> None:
    assert answer_of_solution(solution) == Gold(None, doubt=SEVERAL_BOXES)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (145.0, "145"),
        (0.5, "0.5"),
        (7, "7"),
        ("145.0", "145.0"),
        (["2"], "2"),
        ('["$2$"]', "$2$"),
        ([], None),
        (" ", None),
        (float("nan"), None),
        (r"\boxed{1}, \boxed{-2}", "1, -2"),
        (r"\boxed{(a,1)} \text{ and permutations}", r"\boxed{(a,1)} \text{ and permutations}"),
        (r"\boxed{3}^2", r"\boxed{3}^2"),
        ("He has 9.\n#### 1,009", "1009"),
        ("9 (apples)", "9"),
        ("1/2 (square feet)", "1/2"),
        ("24 (apples); 30 (pears)", "24; 30"),
        ("6:30 (p.m.)", "6:30 p.m."),
        ("3 (cm)", "3"),
        ("2 (ab)", "2 (ab)"),
        ("2 (x+1)", "2 (x+1)"),
        ("2 (sin x)", "2 (sin x)"),
        ("5 (mod 7)", "5 (mod 7)"),
        ("12 (base six)", "12 (base six)"),
        ("f (apples)", "f (apples)"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_given_answer_is_a_text_a_number_or_a_list_of_one(value: Any, answer: str | None) -> None:
    assert given(value) == Gold(answer)


def test_lists_of_several_are_in_doubt_unless_all_are_meant() -> None:
    assert given(["1", "2"]) == Gold(None, doubt=SEVERAL_ANSWERS)
    assert given('["1", "2"]') == Gold(None, doubt=SEVERAL_ANSWERS)
    assert all_of(["$1$", 2.0]) == Gold("$1$, 2")
    assert all_of(["p=1, q=2", "p=3, q=4"]).answer == "p=1, q=2; p=3, q=4"
    assert all_of([]) == all_of(None) == NO_GOLD


@pytest.mark.parametrize("value", [True, {"a": 1}, "['2']", [["1"], {}]])
def test_what_is_no_answer_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="answer is"):
        given(value)
