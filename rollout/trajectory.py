"""`Trajectory`: a root-to-answer path of a finished tree, ranked by mean Q-value."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.problem import Problem
from rollout.prompt import Step
from rollout.tree import Tree, mean_q, own_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One complete solution found by a search."""

    problem: Problem
    round: int
    tree_index: int
    node: int
    """Id of its answer node."""
    steps: tuple[Step, ...]
    answer: str
    correct: bool | None
    mean_q: float
    """Mean Q-value over its steps, the answer included (arXiv 2501.04519 section 3.4.1)."""
    min_q: float
    value: float | None
    """PPM value of the whole solution; None: not scored."""
    num_tokens: int


def trajectories(tree: Tree) -> list[Trajectory]:
    """Every answer a rollout reached, best mean Q first, ties by min Q then by creation."""
    found = []
    for node in tree.reached_answers():
        if node.step is None or node.step.answer is None:
            continue
        path = tree.path(node)
        found.append(
            Trajectory(
                problem=tree.problem,
                round=tree.round,
                tree_index=tree.index,
                node=node.id,
                steps=tuple(tree.steps(node)),
                answer=node.step.answer,
                correct=node.correct,
                mean_q=mean_q(path),
                min_q=min(n.q_value for n in path[1:]),
                value=node.value,
                num_tokens=own_tokens(path),
            )
        )
    found.sort(key=lambda t: (-t.mean_q, -t.min_q, t.node))
    return found
