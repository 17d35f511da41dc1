"""Which boxes of a solution are its answer."""

from __future__ import annotations

import pytest

from verifier import extract_answer, verify_answer
from verifier.boxes import join_answers, read_statements


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{7}.", "7"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ x = \boxed{5} }", r"x = \boxed{5}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{9}", "9"),
        (r"or $\framebox{204}$ minutes", "204"),
        (r"\boxed 7", "7"),
        (r"\boxed{7}. No: \boxed 8", "8"),
        (r"\boxed{7}, in \boxed as asked", "7"),
        (r"\boxed{}", ""),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_box_is_found_and_unwrapped(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"$\boxed{(2,2)} \text{ and } \boxed{(6,2)}$", "(2,2),(6,2)"),
        (r"$\boxed{k=45}, \boxed{n=2}$", "k=45, n=2"),
        (r"The roots are $\boxed{1}$ and $\boxed{-2}$.", "1, -2"),
        (r"**\boxed{1}**, \boxed{2}, **and** \boxed{3}", "1,2,3"),
        (r"\[\boxed{1}; \quad \boxed{2}\]", "1,2"),
        (r"\boxed{x=1} \text{ or } \boxed{x=3}", "1,3"),
        (r"$x = \boxed{1}$ or $x = \boxed{3}$", "1,3"),
        (r"$y = \boxed{1}$ and $x = \boxed{2}$", "(2,1)"),
        (r"$x_{1} = \boxed{2}, x_{2} = \boxed{2}$", "(2,2)"),
        (r"\begin{aligned} x &= \boxed{1}, \\ y &= \boxed{2} \end{aligned}", "(1,2)"),
        (r"\boxed{p=5,q=2}; \boxed{p=7,q=2}", "p=5,q=2;p=7,q=2"),
        (r"$\left(\boxed{3}, \boxed{3}\right)$", "(3,3)"),
        (r"$[\boxed{0}, \boxed{1})$", "[0,1)"),
        (r"\boxed{30}^{\circ} and $\boxed{60}^\circ$", "30, 60"),
        (r"\boxed{2} cm and \boxed{3} cm", "2, 3"),
        (r"\$\boxed{1,000}$ and \$\boxed{2,000}$", "1000, 2000"),
        (r"\boxed{\text{A}}, \boxed{\text{C}}", "AC"),
        (r"\fbox{$1$}, \fbox{$2$}", "1, 2"),
        (r"\boxed{1,} and \boxed{2}", "1, 2"),
        (r"$\boxed{2}$ or $-\boxed{2}$", "2, -2"),
        (r"$x = -\boxed{2}$ or $x = \boxed{2}$", "2, -2"),
        (r"$-\boxed{x+1}$ and $\boxed{x}$", "-x-1, x"),
        (r"$\color{blue}{\boxed{3}}$ and $\color{blue}{\boxed{4}}$", "3, 4"),
        (r"$x\in\boxed{(-1,2)}$ or $x\in\boxed{(3,4)}$", "(-1,2), (3,4)"),
        (r"$(a,b)=\boxed{(1,2)}$ and $(a,b)=\boxed{(3,4)}$", "(1,2), (3,4)"),
        (r"$\angle A=\boxed{30}$ and $\angle B=\boxed{60}$", "30, 60"),
        (r"\boxed{1} hour or \boxed{2} hours", "1, 2"),
        (r"\boxed{2}, and also \boxed{3}", "2, 3"),
    ],
)
def test_boxes_that_are_joined_are_one_answer(text: str, gold: str) -> None:
    assert verify_answer(gold, extract_answer(text)).equal


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"\boxed{5} or \boxed{6}", "5"),
        (r"\boxed{5} or \boxed{6}", "6"),
        (r"$(\boxed{3}, \boxed{4})$", "(4,3)"),
        (r"$y = \boxed{1}$ and $x = \boxed{2}$", "(1,2)"),
    ],
)
def test_joined_boxes_are_not_one_of_them_nor_another_order(text: str, gold: str) -> None:
    assert not verify_answer(gold, extract_answer(text)).equal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{7} and \boxed{7}", "7"),
        (r"\boxed{\dfrac{1}{2}}, \boxed{\frac{1}{2}}", r"\dfrac{1}{2}"),
        (r"So $\boxed{3}$. The answer is $\boxed{5}$.", "5"),
        (r"$\boxed{\frac12}$ or $\boxed{0.5}$", r"\frac12"),
        (r"\boxed{\frac12} or \boxed{0.6}", r"\frac12, 0.6"),
        (r"\boxed{3}, no, \boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}, so the sum is \boxed{3}", "3"),
        (r"The roots are \boxed{1} and \boxed{2}. Their sum: \boxed{3}", "3"),
        (r"\boxed{3} hours and \boxed{20} minutes", "20"),
        (r"\boxed{1}, \frac{\boxed{2}}{3}", "2"),
        (r"$2x = \boxed{4}$, $x = \boxed{2}$", "2"),
        (r"$x=\boxed{4}, \therefore y=\boxed{2}$", "2"),
        (r"\boxed{1} and not \boxed{2}", "2"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{7}, \boxed{}", "7"),
        (r"red \boxed{3}, total = \boxed{7}", "7"),
        (r"(A) \boxed{1}, (B) \boxed{2}. The answer is \boxed{2}", "2"),
        (r"\boxed{5} = \boxed{5.0}", "5.0"),
        (r"\boxed{[0, 1]} \cup \boxed{[2, 3]}", "[2, 3]"),
        (r"\boxed{1} and 3", "1"),
        (r"\boxed{4}\boxed{2}", "2"),
        (r"\boxed{1 or 2}", "1 or 2"),
    ],
)
def test_equal_boxes_are_one_and_other_words_make_the_last_its_own(
    text: str, expected: str
) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "end",
    [
        r"\boxed{",
        r"\boxed{\frac{1}",
        r"\boxed{4",
        r"$\boxed",
        r"\box",
        r"\fbox{",
        r"\boxed{1}, \boxed{",
    ],
)
def test_a_solution_cut_off_in_its_last_box_has_no_answer(end: str) -> None:
    for begin in (r"So \boxed{7}. Wait, redo: ", r"So \boxed 7. Wait, redo: "):
        assert extract_answer(begin + end) is None


def test_a_box_left_open_before_the_last_one_does_not_count() -> None:
    assert extract_answer(r"That is \boxed{7. So the answer is \boxed{8}.") == "8"


def test_statements_are_told_apart_with_their_places() -> None:
    text = r"\boxed{1}, \boxed{2}. Then \boxed{3}"
    first, second = read_statements(text)
    assert (first.parts, first.answer) == (("1", "2"), "1, 2")
    assert text[first.start : first.end] == r"\boxed{1}, \boxed{2}"
    assert text[second.start : second.end] == r"\boxed{3}"


def test_a_list_of_answers_keeps_cases_apart() -> None:
    assert join_answers(["1", "2"]) == "1, 2"
    assert join_answers(["p=5, q=2", "p=7, q=2"]) == "p=5, q=2; p=7, q=2"
    assert join_answers(["p=5, q=2"]) == "p=5, q=2"


@pytest.mark.parametrize("value", [None, 5, b"\\boxed{5}", ["\\boxed{5}"]])
def test_a_solution_that_is_not_text_has_no_answer(value: object) -> None:
    assert extract_answer(value) is None  # type: ignore[arg-type]


def test_a_hundred_thousand_open_boxes_are_one_pass() -> None:
    assert extract_answer("\\boxed{" * 100_000) is None
    assert extract_answer("\\boxed{" * 50_000 + "1" + "}" * 50_000) is not None
