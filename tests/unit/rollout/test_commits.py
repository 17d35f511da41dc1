"""Markers as JSON."""

from __future__ import annotations

from rollout.commits import Commit, Totals


def test_a_commit_survives_json() -> None:
    commit = Commit(
        shard="s",
        attempt="a",
        path="p",
        num_rows=1,
        num_bytes=2,
        sha256="0",
        failed={"x": "y"},
        remaining=(("b",), ("c", "d")),
        totals=Totals(trees=1, trees_by_level={"gsm": 1}),
    )
    assert Commit.from_json(commit.to_json()) == commit
