from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rollout.open_trees import OpenTreeStore
from rollout.store import RunStore
from rollout.table import trees_to_table
from tests.builders import answered, code, make_problem, make_tree


@pytest.fixture
def open_trees(tmp_path: Path) -> OpenTreeStore:
    return OpenTreeStore(RunStore(tmp_path), 2)


def test_trees_come_back_as_they_were_kept(open_trees: OpenTreeStore) -> None:
    trees = [
        make_tree(code("x = 1"), answered("7", correct=True), problem=make_problem(p), round=2)
        for p in ("a", "b/../c")
    ]
    open_trees.save("job", trees_to_table(trees))
    assert open_trees.load("job") == trees
    assert open_trees.load("another job") == []


def test_later_trees_of_a_job_replace_the_earlier(open_trees: OpenTreeStore) -> None:
    early, late = make_tree(round=2), make_tree(code("x = 1"), round=2)
    open_trees.save("job", trees_to_table([early]))
    open_trees.save("job", trees_to_table([late]))
    assert open_trees.load("job") == [late]


def test_cut_off_file_is_ignored_and_said(
    open_trees: OpenTreeStore, caplog: pytest.LogCaptureFixture
) -> None:
    open_trees.save("job", trees_to_table([make_tree(round=2)]))
    path = "trajectories/round=2/open/job.trees"
    open_trees.store.put(path, open_trees.store.read(path)[:-9])
    with caplog.at_level(logging.WARNING):
        assert open_trees.load("job") == []
    assert path in caplog.text and "SHA-256 differs" in caplog.text


def test_removed_trees_are_gone(open_trees: OpenTreeStore) -> None:
    table = trees_to_table([make_tree(round=2)])
    for job in ("a", "b", "c"):
        open_trees.save(job, table)
    open_trees.remove("a")
    open_trees.remove("never kept")
    assert [bool(open_trees.load(job)) for job in "abc"] == [False, True, True]
    open_trees.remove_all()
    assert open_trees.store.files("trajectories/round=2/open") == []
