from __future__ import annotations

import pytest

from rollout.prompt import parse_step
from rollout.self_correction import corrections


def found(*sources: str) -> list[tuple[int, str, str]]:
    steps = [parse_step(f"\n{source}\n<end_of_step>") for source in sources]
    return [(c.step, c.sign, c.evidence) for c in corrections(steps)]


@pytest.mark.parametrize(
    "comment",
    [
        "Wait, the train leaves at 8",
        "Oops! That counts the corners twice",
        "The previous equation is wrong, since x cannot be negative",
        "Our first simple approach was not valid",
        "We made a mistake with the sign",
        "Let's try a different approach",
        "Correcting the earlier value",
    ],
)
def test_comment_of_a_later_step_that_takes_something_back(comment: str) -> None:
    assert found("a = 1", f"# {comment}\nb = a") == [(1, "comment", comment)]
    assert found(f"# {comment}\nb = 1") == []  # nothing is earlier


@pytest.mark.parametrize(
    "comment",
    [
        "The customers wait, on average, 5 minutes",
        "Let's verify the previous result",
        "Probability that an answer is wrong",
        "Use another variable for the height",
        "Actually compute the sum",
    ],
)
def test_ordinary_comment_is_no_correction(comment: str) -> None:
    assert found("a = 1", f"# {comment}\nb = a") == []


def test_name_assigned_anew_before_anything_read_it_gives_up_a_step() -> None:
    assert found("x = 3\ny = x + 4", "y = x * 4", "print(y)") == [(1, "code", "y")]


@pytest.mark.parametrize(
    "sources",
    [
        ("y = 3", "z = y", "y = 4"),  # read in between
        ("y = 3", "y = y + 4"),  # made from what it was
        ("y = 3", "y = 3"),  # the same again
        ("y = 3\ny = 4",),  # within one step
        ("y = 3", "y += 1"),
        ("def f():\n    return y", "y = 3", "z = f()", "y = 4"),  # a function may have read it
        ("for i in range(3):\n    pass", "i = 4"),
        ("y = 3", "y = = 4", "y = 5"),  # what does not parse may have read it
        ("a, b = 1, 2", "a = 3"),
    ],
)
def test_name_used_as_it_was_or_not_surely_unread_is_no_correction(
    sources: tuple[str, ...],
) -> None:
    assert found(*sources) == []
