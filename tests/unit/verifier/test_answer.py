"""Cleaning an answer before it is parsed."""

from __future__ import annotations

import pytest

from verifier.answer import normalise


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
