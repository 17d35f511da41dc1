from __future__ import annotations

import pytest

from rollout.repetition import ends_in_repetition


@pytest.mark.parametrize(
    ("text", "repeats", "found"),
    [
        ("so x = 1, " * 30, 8, True),
        ("a fine beginning\n" + "so x = 1, " * 30, 8, True),
        ("so x = 1, " * 30 + "so x", 8, True),  # cut inside the passage
        ("=" * 200, 8, True),
        ("=" * 199, 8, False),  # a ruler
        ("# one long line of forty characters, yes\n" * 7, 8, False),
        ("# one long line of forty characters, yes\n" * 8, 8, True),
        ("so x = 1, " * 30 + "and that is the end of it.", 8, False),
        ("".join(f"# case {i}\n" for i in range(100)), 8, False),
        ("", 2, False),
    ],
)
def test_only_an_end_that_repeats_often_enough_counts(text: str, repeats: int, found: bool) -> None:
    assert ends_in_repetition(text, repeats) is found
