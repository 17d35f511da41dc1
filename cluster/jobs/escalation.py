"""Which unsolved problems of a round are searched on, and whose labels are suspect.

    commits of the round --answers of unsolved problems--> rollout.difficulty.escalate, per problem
                                                       --> problem ids to search, suspects, spent

Only the columns about answers are read, and only of unsolved problems, so that a round of hundreds
of thousands of problems needs megabytes here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from rollout.difficulty import Next, SuspectConfig, SuspectLabel, escalate
from rollout.problem import Problem
from rollout.prompt import Step, StepKind
from rollout.store import TrajectoryStore
from rollout.tree import Node, Terminal, Tree

_COLUMNS = (
    *("problem_id", "tree", "node", "terminal", "visit_count"),
    *("step_answer", "correct", "value", "generated_tokens"),
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
) -> EscalationPlan:
    """Decide for every problem no committed tree of the round has solved.

    Args:
        trees: of the round, sealed or not.
        problems: of the round, by id.
        suspect, leave_suspects, max_generated_tokens: see `rollout.difficulty.escalate`.
    Raises:
        StoreError: a committed file cannot be read.
    """
    found = _answers_of_unsolved(trees, problems)
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
    trees: TrajectoryStore, problems: Mapping[str, Problem]
) -> dict[str, list[Tree]]:
    """Trees of each unsolved problem, reduced to the answers that rollouts reached."""
    commits = trees.commits()
    solved = {key.problem_id for commit in commits.values() for key in commit.trees if key.solved}
    found: dict[str, list[Tree]] = {name: [] for name in problems if name not in solved}
    for commit in commits.values():
        if not any(key.problem_id in found for key in commit.trees):
            continue
        table = trees.read_table(commit, _COLUMNS)
        is_tree = pc.equal(table["node"], 0)
        is_answer = pc.and_(
            pc.equal(table["terminal"], str(Terminal.ANSWER)), pc.greater(table["visit_count"], 0)
        )
        kept = table.filter(pc.or_(is_tree, pc.fill_null(is_answer, False)))
        for tree in _reduced_trees(kept, trees.round, problems, found.keys()):
            found[tree.problem.id].append(tree)
    return found


def _reduced_trees(
    table: pa.Table, round: int, problems: Mapping[str, Problem], wanted: Container[str]
) -> list[Tree]:
    made: list[Tree] = []
    for row in table.to_pylist():
        if row["problem_id"] not in wanted:
            continue
        if row["node"] == 0:
            tree = Tree(problem=problems[row["problem_id"]], round=round, index=row["tree"])
            tree.generated_tokens = row["generated_tokens"]
            made.append(tree)
            continue
        tree = made[-1]
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
    return made
