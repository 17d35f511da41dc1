"""Which steps need not run."""

from __future__ import annotations

import pytest

from verifier import tree_steps


@pytest.mark.parametrize(
    ("code", "empty"),
    [
        ("", True),
        ("# a", True),
        (" \t\f\n\r# b\r\n", True),
        ("#a\u2028b", False),
        ("x", False),
        ("#\0", False),
        ("# \ud800", False),
        ("\u00a0", False),
        ('"""doc"""', False),
        ("\\\n", False),
    ],
)
def test_only_codes_without_any_statement_count_as_empty(code, empty):
    assert tree_steps._is_empty(code) is empty
