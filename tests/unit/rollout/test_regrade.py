"""Grading stored rows again: verdict columns change, nothing else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from rollout.regrade import REWRITTEN, compare_verdicts, regrade_table, regraded_commit
from rollout.store import RunStore, Totals, TrajectoryStore
from rollout.table import SCHEMA, table_to_bytes, table_to_trees, trees_to_table
from rollout.tree import Outcome, Tree
from tests.builders import answer, answered, code, failed, make_problem, make_tree
from verifier import Verdict
from verifier.equivalence import Reason


def old_tree(id: str = "p1", *, config: str = "") -> Tree:
    """Searched by a grader that took 7 for wrong and 8 for right; the accepted answer is 7."""
    tree = make_tree(
        code("x = 1", answered("7", correct=False)),
        code("x = 2", answered("8", correct=True)),
        code("x = 3", answer("7.0", correct=False, visited=False)),
        failed(),
        problem=make_problem(id),
    )
    for node in tree.answers():
        node.verdict = "exact" if node.correct else "different"
    tree.grader_version = "answers-0"
    tree.search_config = config
    return tree


def verdicts(tree: Tree) -> dict[str, tuple[bool | None, str, float | None]]:
    return {
        node.step.answer or "": (node.correct, node.verdict, node.reward)
        for node in tree.answers()
        if node.step is not None
    }


def test_verdicts_and_rewards_are_those_of_the_new_grader() -> None:
    (tree,) = table_to_trees(regrade_table(trees_to_table([old_tree()]), grader="answers-9"))
    assert verdicts(tree) == {
        "7": (True, "exact", 1.0),
        "8": (False, "different", -1.0),
        "7.0": (True, "exact", None),
    }
    assert tree.grader_version == "answers-9"
    assert tree.solved and tree.outcome is Outcome.SOLVED


def test_every_other_column_stays_as_it_was() -> None:
    before = trees_to_table([old_tree("p1"), old_tree("p2")])
    after = regrade_table(before)
    assert after.schema.equals(SCHEMA, check_metadata=True)
    for name in SCHEMA.names:
        same = after[name].equals(before[name])
        assert same == (name not in REWRITTEN) or name == "outcome", name


def test_values_that_the_search_took_from_a_ppm_are_no_verdicts() -> None:
    tree = old_tree(config='{"terminal_value":"preference"}')
    next(tree.answers()).reward = 0.25
    (again,) = table_to_trees(regrade_table(trees_to_table([tree])))
    assert verdicts(again)["7"] == (True, "exact", 0.25)


def test_outcome_follows_the_verdicts() -> None:
    lost = make_tree(
        code("x = 1", answered("8", correct=True)),
        code("x = 2", answer("7", correct=False, visited=False)),
    )
    unlabelled = make_tree(
        code("x = 1", answered("8", correct=None)), problem=make_problem("p2", answer="")
    )
    nothing = make_tree(failed(), problem=make_problem("p3"))
    table = regrade_table(trees_to_table([lost, unlabelled, nothing]))
    roots = [row["outcome"] for row in table.to_pylist() if row["node"] == 0]
    assert roots == ["unsolved", "unlabelled", "no_answer"]
    assert [tree.outcome.value for tree in table_to_trees(table)] == roots


def test_an_answer_that_could_not_be_decided_is_asked_again() -> None:
    asked = []

    def slow(gold: str, candidate: str) -> Verdict:
        asked.append(candidate)
        if len(asked) < 3:
            return Verdict(equal=False, reason=Reason.UNDECIDED, path="sympy")
        return Verdict(equal=True, reason=Reason.SYMBOLIC, path="sympy")

    tree = make_tree(code("x = 1", answered("8", correct=False)))
    (again,) = table_to_trees(regrade_table(trees_to_table([tree]), grade=slow))
    assert verdicts(again)["8"] == (True, "symbolic", 1.0)
    assert asked == ["8", "8", "8"]


def test_marker_counts_what_is_solved_now(tmp_path: Any) -> None:
    trees = TrajectoryStore(RunStore(tmp_path), 1)
    lost = make_tree(code("x = 1", answered("8", correct=True)), problem=make_problem("p2"))
    trees.commit("s", [old_tree("p1"), lost], info={"policy": "v"})
    before = trees.read_commit("s")
    table = regrade_table(trees.read_table(before))
    after = regraded_commit(before, table, grader="answers-9")
    assert [(k.problem_id, k.solved) for k in after.trees] == [("p1", True), ("p2", False)]
    assert after.totals == replace(Totals.of(table_to_trees(table)))
    assert after.info == {"policy": "v", "grader": "answers-9"}


def test_changes_name_answer_and_both_verdicts() -> None:
    before = trees_to_table([old_tree()])
    count, changes = compare_verdicts(before, regrade_table(before, grader="answers-9"))
    assert count == 3
    assert [(c.answer, c.from_correct, c.to_correct, c.visited) for c in changes] == [
        ("7", False, True, True),
        ("8", True, False, True),
        ("7.0", False, True, False),
    ]
    assert {(c.gold, c.from_grader, c.to_grader) for c in changes} == {
        ("7", "answers-0", "answers-9")
    }
    assert compare_verdicts(before, before) == (3, [])


def test_rows_of_another_shard_are_not_compared() -> None:
    one, other = trees_to_table([old_tree("p1")]), trees_to_table([old_tree("p2")])
    with pytest.raises(ValueError, match="rows of problem p1 are not those"):
        compare_verdicts(one, other)


def test_a_regraded_table_is_written_as_any_other() -> None:
    table = regrade_table(trees_to_table([old_tree()]))
    back = pa.parquet.read_table(pa.BufferReader(table_to_bytes(table)))
    assert table_to_trees(back) == table_to_trees(table)
