"""Options of multiple choice, and which of them is right."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.problems.choices import chosen, list_options, read_options
from rollout.problems.rows import RowError, WholeFileError


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        (["3", 4, 0.5], ("3", 4, 0.5)),
        (["A)3", "B)4"], ("3", "4")),
        (["(A) 3", "(B) 4"], ("3", "4")),
        (["A. 3", "4"], ("A. 3", "4")),
        (["B) 3", "A) 4"], ("B) 3", "A) 4")),
        ({"A": "3", "B": "4", "C": None}, ("3", "4")),
        ("A) 3 B) $f(A) = 4$", ("3", "$f(A) = 4$")),
        ("a ) 38 , b ) 27.5 , c ) none of these", ("38", "27.5", "none of these")),
        ('["3", "4"]', ("3", "4")),
    ],
)
def test_options_are_read_from_lists_letters_and_texts(value: Any, options: tuple) -> None:
    assert read_options(value) == options


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": ["3"], "label": ["A"]}, "options are named text, label, not A, B, C"),
        ("['3', '4']", "options cannot be told apart"),
        ("3 or 4", "options cannot be told apart"),
        ([["3"], ["4"]], "neither a list of texts nor texts by letter"),
        (["3"], "1 options; expected 2 to 10"),
        (3, "neither a list of texts"),
    ],
)
def test_options_that_cannot_be_told_apart_are_named(value: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_options(value)


def test_options_are_listed_a_letter_each() -> None:
    assert list_options(["3", 4]) == "(A) 3\n(B) 4"


@pytest.mark.parametrize(
    ("answer", "options", "letter", "also"),
    [
        ("B", ("3", "4"), "B", ("4",)),
        ("(b)", ("3", "4"), "B", ("4",)),
        ("B) 4", ("3", "4"), "B", ("4",)),
        ("4", ("3", "4"), "B", ("4",)),
        (["B"], ("3", "4"), "B", ("4",)),
        (1, ("3", "4"), "B", ("4",)),
        (1.0, ("3", "4"), "B", ("4",)),
        (0, (0, 7), "A", ("0",)),
        (7, (0, 7), "B", ("7",)),
        (2, ("0", "1", "4", "2"), "C", ("4",)),
        ("A", ("4", "4"), "A", ()),
        ("C", ("x", "y", "B"), "C", ()),
        (["A", "C"], ("x", "y", "z"), "A, C", ()),
        ("AC", ("x", "y", "z"), "A, C", ()),
    ],
)
def test_the_right_option_is_a_letter_and_its_text_where_that_is_clear(
    answer: Any, options: tuple, letter: str, also: tuple
) -> None:
    assert chosen(answer, options) == (letter, also)


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        ("D", ("3", "4"), "'D' is none of the 2 options"),
        ("B) 3", ("3", "4"), "is none of the 2"),
        ("2", ("3", "4"), "is none of the 2"),
        ("A", ("B", "A"), "'A' may be two of the 2"),
        (1, (1, 0), "answer 1 may be two"),
        (True, ("3", "4"), "answer is bool, neither an option nor its letter"),
        ([], ("3", "4"), "answer is a list, neither"),
    ],
)
def test_an_answer_that_is_no_option_or_could_be_two_is_named(
    answer: Any, options: tuple, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        chosen(answer, options)


def test_a_place_behind_the_list_may_mean_that_all_are_counted_from_one() -> None:
    with pytest.raises(WholeFileError, match="answer 2 is no place in a list of 2 options"):
        chosen(2, ("3", "4"))
