"""Finding and cleaning the final answer."""

from __future__ import annotations

import pytest

from verifier import extract_answer
from verifier.answer import normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{7}.", "7"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ x = \boxed{5} }", r"x = \boxed{5}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{9}", "9"),
        (r"\boxed 7", "7"),
        (r"\boxed{}", ""),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_balanced_box_is_found_and_unwrapped(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize("value", [None, 5, b"\\boxed{5}", ["\\boxed{5}"]])
def test_a_solution_that_is_not_text_has_no_answer(value: object) -> None:
    assert extract_answer(value) is None  # type: ignore[arg-type]


def test_a_hundred_thousand_open_boxes_are_one_pass() -> None:
    assert extract_answer("\\boxed{" * 100_000) is None
    assert extract_answer("\\boxed{" * 50_000 + "1" + "}" * 50_000) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\[ x = 4 \]", "x = 4"),
        ("$5$", "5"),
        ("$15.48", "$15.48"),
        (r"\$15.48", r"\$15.48"),
        ("6.", "6"),
        ("The answer is 5.", "5"),
        (r"f(x) = x \text{ for all } x \in \mathbb{R}", "f(x) = x"),
        ("x²", "x^{2}"),
        ("−3", "-3"),
        (r"25_6", "25_6"),
        ("50%", "50%"),
    ],
)
def test_decoration_goes_and_meaning_stays(text: str, expected: str) -> None:
    assert normalise(text) == expected
