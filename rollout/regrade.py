"""New verdicts on stored answers: what a newer grader says, and nothing else.

    table of a shard --grade each answer again--> the same table with other verdict columns
                                              \\-> what changed

    rewritten   correct, verdict            of each answer that has an accepted one to compare with
                reward                      of visited answers, where the search took it from the
                                            label (`terminal_value = label`)
                outcome                     of each tree
                grader_version              of each row
    kept        everything else: steps, outputs, values, and above all visit counts, value sums and
                which nodes there are

Q-values stay because they are not verdicts but what a search did with them: which leaf was expanded
next followed from the old ones, and a tree with recomputed Q would be one that no search has made.
A mean over Q-values therefore still holds the old rewards; `correct` and `reward` do not. Training
data is safe either way: a trajectory is kept for being correct by the new verdict, and a pair whose
Q-values contradict it is dropped for its margin (`learner.pairs`; with `q_source = terminal` pairs
are ranked by the new rewards).

Pure: reads and writes tables; `cluster.runs.regrade` is the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pyarrow as pa

from rollout.commits import Commit, TreeKey
from rollout.problem import Problem
from rollout.search import grade_any
from rollout.table import SCHEMA, problem_of
from rollout.tree import Outcome, Terminal, outcome_of
from verifier import GRADER_VERSION, Verdict, verify_answer
from verifier.equivalence import Reason

MAX_ASKED = 3
"""How often an answer is graded where the grader ran out of time."""

_READ = (
    "problem_id",
    "source",
    "level",
    "tree",
    "node",
    "terminal",
    "step_answer",
    "correct",
    "verdict",
    "reward",
    "visit_count",
    "grader_version",
    "problem_text",
    "problem_answer",
    "problem_answers_alt",
    "outcome",
    "search_config",
)

REWRITTEN = ("correct", "verdict", "reward", "outcome", "grader_version")
"""Columns that may differ between two generations of a shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictChange:
    """An answer on which two generations disagree."""

    problem_id: str
    level: str
    tree: int
    node: int
    gold: str
    """The accepted answer; the first of several."""
    answer: str
    visited: bool
    """A rollout ended there: it counts as a trajectory."""
    from_correct: bool | None
    to_correct: bool | None
    from_verdict: str
    to_verdict: str
    from_grader: str
    to_grader: str

    @property
    def turned(self) -> bool:
        """False: only the reason is another one."""
        return bool(self.from_correct) != bool(self.to_correct)


def regrade_table(
    table: pa.Table,
    *,
    grade: Callable[[str, str], Verdict] = verify_answer,
    grader: str = GRADER_VERSION,
) -> pa.Table:
    """The rows of a data file with the verdicts of `grade`; rows and other columns as they were.

    Args:
        table: as `rollout.table.trees_to_table` makes it.
        grade: (accepted answer, answer) -> verdict.
        grader: its version.
    """
    rows = table.select(list(_READ)).to_pylist()

    @cache
    def verdict_of(problem: Problem, answer: str) -> Verdict | None:
        for _ in range(MAX_ASKED):
            verdict = grade_any(problem, answer, grade)
            if verdict is None or verdict.reason is not Reason.UNDECIDED:
                break
        return verdict

    columns = {name: [row[name] for row in rows] for name in REWRITTEN}
    columns["grader_version"] = [grader] * len(rows)
    problem: Problem | None = None
    from_label = True
    for number, row in enumerate(rows):
        if row["node"] == 0:
            problem, from_label = problem_of(row), _rewards_are_labels(row["search_config"])
        assert problem is not None
        if row["terminal"] != Terminal.ANSWER or row["step_answer"] is None:
            continue
        verdict = verdict_of(problem, row["step_answer"])
        if verdict is None:
            continue
        columns["correct"][number] = verdict.equal
        columns["verdict"][number] = verdict.reason.value
        if from_label and row["reward"] is not None:
            columns["reward"][number] = 1.0 if verdict.equal else -1.0
    _settle_outcomes(rows, columns)
    for name, cells in columns.items():
        field = SCHEMA.field(name)
        table = table.set_column(
            table.schema.get_field_index(name), field, pa.array(cells, type=field.type)
        )
    return table.cast(SCHEMA)


def _settle_outcomes(rows: Sequence[dict[str, Any]], columns: dict[str, list[Any]]) -> None:
    """Outcome of each labelled tree, by the new verdicts of the answers it reached."""
    reached: dict[int, list[bool | None]] = {}
    root = 0
    for number, row in enumerate(rows):
        if row["node"] == 0:
            root = number
            if row["outcome"] != Outcome.UNLABELLED:
                reached[root] = []
        if row["terminal"] == Terminal.ANSWER and row["visit_count"] and root in reached:
            reached[root].append(columns["correct"][number])
    for number, verdicts in reached.items():
        columns["outcome"][number] = outcome_of(verdicts).value


def regraded_commit(commit: Commit, table: pa.Table, *, grader: str) -> Commit:
    """The marker of a shard whose rows were graded again: what its trees solve, and by whom."""
    rows = table.select(["problem_id", "level", "tree", "node", "outcome"])
    roots = [row for row in rows.to_pylist() if row["node"] == 0]
    solved = {(r["problem_id"], r["tree"]): r["outcome"] == Outcome.SOLVED for r in roots}
    by_level = dict.fromkeys(commit.totals.solved_by_level, 0)
    for row in roots:
        by_level[row["level"]] = by_level.get(row["level"], 0) + (row["outcome"] == Outcome.SOLVED)
    return replace(
        commit,
        num_rows=table.num_rows,
        trees=tuple(
            TreeKey(problem_id=k.problem_id, index=k.index, solved=solved[k.problem_id, k.index])
            for k in commit.trees
        ),
        totals=replace(commit.totals, solved=sum(by_level.values()), solved_by_level=by_level),
        info={**commit.info, "grader": grader},
    )


def compare_verdicts(before: pa.Table, after: pa.Table) -> tuple[int, list[VerdictChange]]:
    """How many answers two generations of a shard hold, and those on which they disagree.

    Raises:
        ValueError: they are not generations of one shard.
    """
    changes = []
    num_answers = 0
    gold = ""
    old_rows, new_rows = (t.select(list(_READ)).to_pylist() for t in (before, after))
    for old, new in zip(old_rows, new_rows, strict=True):
        key = (old["problem_id"], old["tree"], old["node"])
        if key != (new["problem_id"], new["tree"], new["node"]):
            raise ValueError(f"rows of problem {key[0]} are not those of the generation before")
        if old["node"] == 0:
            gold = old["problem_answer"]
        if old["terminal"] != Terminal.ANSWER:
            continue
        num_answers += 1
        if (old["correct"], old["verdict"]) == (new["correct"], new["verdict"]):
            continue
        changes.append(
            VerdictChange(
                problem_id=old["problem_id"],
                level=old["level"],
                tree=old["tree"],
                node=old["node"],
                gold=gold,
                answer=old["step_answer"] or "",
                visited=old["visit_count"] > 0,
                from_correct=old["correct"],
                to_correct=new["correct"],
                from_verdict=old["verdict"],
                to_verdict=new["verdict"],
                from_grader=old["grader_version"],
                to_grader=new["grader_version"],
            )
        )
    return num_answers, changes


def _rewards_are_labels(search_config: str | None) -> bool:
    """Whether a tree's search rewarded answers by their label; trees that do not say so did."""
    config = json.loads(search_config) if search_config else {}
    return config.get("terminal_value", "label") == "label"
