"""How hard a problem is for the policy, and whether searching it on is worth anything.

    trees of a problem --> difficulty: easy | medium | hard | unsolved
                       --> escalate:   search again | solved | suspect label | out of budget | end

After the first search a problem is easy (every answer right), medium (some) or hard (none); a hard
one is searched again with new seeds and more rollouts (arXiv 2501.04519 section 3.4: 16 more, in
the last round 64, then 128). Of 20 problems still unsolved at the end the authors checked by hand,
19 had a wrong reference answer. So a problem leaves the escalation early when its searches agree on
another answer than the accepted one: its label is suspect, and a person should look at it.

Everything here is a function of finished trees. Answers are those that rollouts reached; two are
the same by mathematical equality, not by text. To an agreement each distinct program of a tree
counts once, however it was worded. `right_share` is how often the policy itself is right, which
says whether a made problem's own answer can be trusted.

Not covered: whether the label is wrong. The policy may agree with itself on a mistake, so a suspect
is reported, never relabelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from rollout.programs import one_per_program, program_of
from rollout.tree import Node, Tree, solution_shares
from verifier.accuracy import answer_groups


class Difficulty(StrEnum):
    """Class of a problem, from all trees that were searched for it."""

    EASY = "easy"
    """Every answer of the first trees is right."""
    MEDIUM = "medium"
    """Some are."""
    HARD = "hard"
    """None is, or none was reached; not searched again yet, or solved by a further tree."""
    UNSOLVED = "unsolved"
    """None is, and further trees found no right answer either."""


class SuspectConfig(BaseModel):
    """When the searches of a problem agree so well on another answer that its label is suspect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_answers: int = Field(8, ge=1, description="programs with an answer, fewer say nothing")
    min_trees: int = Field(2, ge=1, description="trees that reached the common answer")
    min_share: float = Field(0.7, gt=0, le=1, description="share of all answers it must have")
    min_value: float = Field(
        0.0, ge=-1, le=1, description="mean PPM value it must have, where a PPM gave one"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectLabel:
    """A problem whose searches agree on another answer than the accepted one."""

    problem_id: str
    gold: str
    answer: str
    """What they agree on, as it was written first."""
    votes: int
    """Of `num_answers`, those equal to it."""
    num_answers: int
    """One for each distinct program of a tree."""
    num_trees: int
    """Trees that reached it."""
    mean_value: float | None
    """PPM value of its votes; None: not scored."""
    generated_tokens: int
    """Spent on the problem so far."""


class Next(StrEnum):
    """What becomes of a problem."""

    SEARCH = "search"
    SOLVED = "solved"
    SUSPECT = "suspect"
    OUT_OF_BUDGET = "out_of_budget"
    UNLABELLED = "unlabelled"
    """It has no accepted answer: nothing to tell solved from unsolved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalation:
    """Whether to search a problem again."""

    next: Next
    suspect: SuspectLabel | None = None
    """Whenever the searches agree on another answer, also where that does not end them."""


def difficulty(trees: Sequence[Tree]) -> Difficulty:
    """Class of a problem.

    Args:
        trees: all of one problem's trees of a round, in any order; index 0 is the first search.
    Raises:
        ValueError: no tree is given, or they are not of one problem.
    """
    _check_one_problem(trees)
    verdicts = {tree.index: [node.correct for node in tree.reached_answers()] for tree in trees}
    return difficulty_of((index, sum(map(bool, of)), len(of)) for index, of in verdicts.items())


def difficulty_of(trees: Iterable[tuple[int, int, int]]) -> Difficulty:
    """`difficulty`, given (index, right answers, answers) of each tree."""
    found = list(trees)
    first = [(right, answers) for index, right, answers in found if index == 0]
    if any(right for right, _ in first):
        every = all(right == answers for right, answers in first)
        return Difficulty.EASY if every else Difficulty.MEDIUM
    solved = any(right for _, right, _ in found)
    return Difficulty.HARD if solved or len(first) == len(found) else Difficulty.UNSOLVED


def right_share(tree: Tree) -> float | None:
    """Share of the policy's solutions that are right, as the tree lets it be told; None without a
    graded answer."""
    graded = [node for node in tree.reached_answers() if node.correct is not None]
    shares = solution_shares(tree, graded)
    return math.fsum(shares[node.id] for node in graded if node.correct) if graded else None


def suspect_label(trees: Sequence[Tree], config: SuspectConfig) -> SuspectLabel | None:
    """The other answer a problem's searches agree on; None if they do not, or if it is solved.

    Raises:
        ValueError: no tree is given, or they are not of one problem.
    """
    _check_one_problem(trees)
    problem = trees[0].problem
    if not problem.golds or any(tree.solved for tree in trees):
        return None
    found = [(tree, node) for tree in trees for node in _votes(tree)]
    if len(found) < config.min_answers:
        return None
    answers = [node.step.answer if node.step is not None else None for _, node in found]
    largest = max(answer_groups(answers), key=len, default=[])
    agreed = [found[position] for position in largest]
    num_trees = len({tree.index for tree, _ in agreed})
    if len(agreed) < config.min_share * len(found) or num_trees < config.min_trees:
        return None
    values = [node.value for _, node in agreed if node.value is not None]
    mean_value = sum(values) / len(values) if values else None
    if mean_value is not None and mean_value < config.min_value:
        return None
    return SuspectLabel(
        problem_id=problem.id,
        gold=problem.answer,
        answer=answers[largest[0]] or "",
        votes=len(agreed),
        num_answers=len(found),
        num_trees=num_trees,
        mean_value=mean_value,
        generated_tokens=sum(tree.generated_tokens for tree in trees),
    )


def escalate(
    trees: Sequence[Tree],
    *,
    suspect: SuspectConfig,
    leave_suspects: bool = False,
    max_generated_tokens: int | None = None,
) -> Escalation:
    """What to do with a problem, given all its trees of a round so far.

    Args:
        leave_suspects: do not search a problem on whose label is suspect.
        max_generated_tokens: nor one that has cost so much; None: no cap.
    Raises:
        ValueError: no tree is given, or they are not of one problem.
    """
    _check_one_problem(trees)
    if not trees[0].problem.golds:
        return Escalation(next=Next.UNLABELLED)
    if any(tree.solved for tree in trees):
        return Escalation(next=Next.SOLVED)
    found = suspect_label(trees, suspect)
    if found is not None and leave_suspects:
        return Escalation(next=Next.SUSPECT, suspect=found)
    spent = sum(tree.generated_tokens for tree in trees)
    if max_generated_tokens is not None and spent >= max_generated_tokens:
        return Escalation(next=Next.OUT_OF_BUDGET, suspect=found)
    return Escalation(next=Next.SEARCH, suspect=found)


def _votes(tree: Tree) -> list[Node]:
    """Of the answers that rollouts reached one for each distinct program, the best-valued."""

    def value(node: Node) -> float:
        return node.value if node.value is not None else -math.inf

    best_first = sorted(tree.reached_answers(), key=lambda node: -value(node))
    return one_per_program(best_first, lambda node: program_of(tree.steps(node)))


def _check_one_problem(trees: Sequence[Tree]) -> None:
    found = sorted({tree.problem.id for tree in trees})
    if len(found) != 1:
        raise ValueError(f"expected trees of one problem, got {found or 'none'}")
