"""Which unsolved problems of a round are searched on, and whose labels are suspect.

    commits of the round --answers of unsolved problems--> rollout.difficulty.escalate, per problem
                                                       --> problem ids to search, suspects, spent

Only of unsolved problems, and of their trees only the answers are kept, one of each distinct
program, so that a round of hundreds of thousands of problems needs megabytes here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollout.difficulty import Next, SuspectConfig, SuspectLabel, escalate
from rollout.problem import Problem
from rollout.programs import one_per_program, program_key
from rollout.prompt import Step, StepKind
from rollout.store import Commit, TrajectoryStore
from rollout.tree import Node, Terminal, Tree

_COLUMNS = (
    *("problem_id", "tree", "node", "parent", "discard", "terminal", "visit_count"),
    *("step_code", "step_answer", "correct", "value", "generated_tokens"),
)


@dataclass(slots=True)
class EscalationPlan:
    """What becomes of the problems a round has not solved."""

    search: list[str] = field(default_factory=list)
    """Ids to search on, in the order given."""
    suspects: list[SuspectLabel] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    """Problems not searched on, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage of a rollout costs for each of its problems, against the other stages."""

    rollouts: float
    """Candidates that its trees ask for, or anything else that grows with their time."""
    unsolved_only: bool = False


def rollout_share(
    behind: float, stages: Sequence[StageCost], num_problems: int, done: int, unsolved: float
) -> float:
    """Share of a whole rollout that is done, the stages to come included; 0 to 1.

    How many problems escalation will have is not known before: as many as the present stage leaves
    unsolved so far.

    Args:
        behind: of earlier stages, the sum of problems x `rollouts`.
        stages: the present one and those that may follow.
        num_problems, done: of the present one.
        unsolved: share of the done ones that are not solved.
    """
    now, *later = stages
    ahead, left = 0.0, float(num_problems)
    for stage in later:
        left = left * unsolved if stage.unsolved_only else left
        ahead += left * stage.rollouts
    finished = behind + done * now.rollouts
    whole = behind + num_problems * now.rollouts + ahead
    return finished / whole if whole else 1.0


def plan_escalation(
    trees: TrajectoryStore,
    problems: Mapping[str, Problem],
    *,
    suspect: SuspectConfig,
    leave_suspects: bool,
    max_generated_tokens: int | None,
    shards: Iterable[str] | None = None,
) -> EscalationPlan:
    """Decide for every problem no committed tree of the round has solved.

    Args:
        trees: of the round, sealed or not.
        shards: those that are committed, as the coordinator knows them: a listing of what other
            machines have just written may be old. None: those that are listed.
        problems: of the round, by id.
        suspect, leave_suspects, max_generated_tokens: see `rollout.difficulty.escalate`.
    Raises:
        StoreError: a committed file or its marker cannot be read.
    """
    commits = trees.commits() if shards is None else trees.named_commits(shards)
    found = _answers_of_unsolved(trees, commits.values(), problems)
    plan = EscalationPlan()
    for problem_id, of_problem in found.items():
        if not of_problem:  # quarantined, or never committed: nothing speaks against a search
            plan.search.append(problem_id)
            continue
        decision = escalate(
            of_problem,
            suspect=suspect,
            leave_suspects=leave_suspects,
            max_generated_tokens=max_generated_tokens,
        )
        if decision.suspect is not None:
            plan.suspects.append(decision.suspect)
        if decision.next is Next.SEARCH:
            plan.search.append(problem_id)
        else:
            plan.ended[str(decision.next)] += 1
    return plan


def _answers_of_unsolved(
    trees: TrajectoryStore, commits: Collection[Commit], problems: Mapping[str, Problem]
) -> dict[str, list[Tree]]:
    """Trees of each unsolved problem, reduced to the programs whose answer a rollout reached."""
    solved = {key.problem_id for commit in commits for key in commit.trees if key.solved}
    found: dict[str, list[Tree]] = {name: [] for name in problems if name not in solved}
    for commit in commits:
        here = {key.problem_id for key in commit.trees if key.problem_id in found}
        if not here:
            continue
        table = trees.read_table(commit, _COLUMNS)
        wanted = pc.is_in(table["problem_id"], value_set=pa.array(sorted(here), pa.string()))
        kept = table.filter(pc.and_(wanted, pc.is_null(table["discard"])))
        for tree in _reduced_trees(kept, trees.round, problems):
            found[tree.problem.id].append(tree)
    return found


def _reduced_trees(table: pa.Table, round: int, problems: Mapping[str, Problem]) -> list[Tree]:
    made: list[Tree] = []
    for rows in _by_tree(table.to_pylist()):
        root = rows[0]
        tree = Tree(problem=problems[root["problem_id"]], round=round, index=root["tree"])
        tree.generated_tokens = root["generated_tokens"]
        codes: dict[int, tuple[str, ...]] = {}
        answers: list[tuple[str, Mapping[str, Any]]] = []
        for row in rows:
            codes[row["node"]] = (*codes.get(row["parent"], ()), row["step_code"] or "")
            if row["terminal"] == Terminal.ANSWER and row["visit_count"] > 0:
                answers.append((program_key(codes[row["node"]]), row))
        answers.sort(key=lambda a: -a[1]["value"] if a[1]["value"] is not None else math.inf)
        for _, row in one_per_program(answers, itemgetter(0)):
            tree.nodes.append(
                Node(
                    id=len(tree.nodes),
                    parent=0,
                    depth=1,
                    step=Step(kind=StepKind.ANSWER, text="", answer=row["step_answer"]),
                    terminal=Terminal.ANSWER,
                    correct=row["correct"],
                    value=row["value"],
                    visit_count=row["visit_count"],
                )
            )
        made.append(tree)
    return made


def _by_tree(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    tree: list[Mapping[str, Any]] = []
    for row in rows:
        if row["node"] == 0 and tree:
            yield tree
            tree = []
        tree.append(row)
    if tree:
        yield tree
