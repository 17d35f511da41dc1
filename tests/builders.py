"""Finished trees by hand: a nested description in, a `Tree` with its counts out.

    make_tree(
        code("a = 1", answered("1", correct=True)),
        code("a = 2", failed()),
        code("a = 3", visited=False),
    )

Nodes are attached with `expand` and terminals are backed up with `backup`, in the order they are
written, each once: the visit counts and Q-values are those of a search that met them in that order.
Code is given without markers; steps end with the markers of the grammar.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.problem import Level, Problem
from rollout.prompt import (
    ANSWER,
    CODE,
    END_OF_ANSWER,
    END_OF_CODE,
    END_OF_STEP,
    Step,
    parse_step,
)
from rollout.tree import Discard, Node, Terminal, Tree, backup, expand


@dataclass(kw_only=True)
class Branch:
    """One node to be and what is below it."""

    step: Step | None
    children: tuple[Branch, ...] = ()
    terminal: Terminal | None = None
    correct: bool | None = None
    reward: float | None = None
    """None: +1 for a correct answer, -1 for every other terminal."""
    discard: Discard | None = None
    value: float | None = None
    visited: bool = True
    """False: the terminal is not backed up."""
    extra: dict[str, object] = field(default_factory=dict)
    """Further fields of the node."""


def code(source: str, *children: Branch, value: float | None = None) -> Branch:
    """A code step; without children it stays an open leaf."""
    step = parse_step(f"{CODE}\n{source}\n{END_OF_STEP}")
    return Branch(step=step, children=children, value=value)


def last_code(source: str, *children: Branch, output: str, value: float | None = None) -> Branch:
    """The last code step, with what it printed."""
    parsed = parse_step(f"\n{source}\n{END_OF_CODE}")
    step = Step(kind=parsed.kind, text=parsed.text, output=output)
    return Branch(step=step, children=children, value=value)


def answer(
    text: str, *, correct: bool | None, value: float | None = None, visited: bool = True
) -> Branch:
    """An answer step; `correct=None`: not graded."""
    step = parse_step(f"{ANSWER}The answer is \\boxed{{{text}}}{END_OF_ANSWER}")
    return Branch(
        step=step, terminal=Terminal.ANSWER, correct=correct, value=value, visited=visited
    )


def answered(text: str, *, correct: bool | None, source: str | None = None) -> Branch:
    """A last code step that prints `text`, and the answer that repeats it."""
    return last_code(source or f"print({text})", answer(text, correct=correct), output=text)


def failed(source: str = "pass", *, terminal: Terminal = Terminal.TOO_DEEP) -> Branch:
    """A code step after which nothing can follow."""
    return Branch(step=parse_step(f"\n{source}\n{END_OF_STEP}"), terminal=terminal)


def discarded(source: str, *, reason: Discard = Discard.CODE_FAILED) -> Branch:
    """A candidate that did not become a selectable child."""
    return Branch(step=parse_step(f"\n{source}\n{END_OF_STEP}"), discard=reason)


def make_problem(
    id: str = "p1",
    *,
    text: str = "How many?",
    answer: str = "7",
    level: Level = Level.GSM,
    source: str = "test",
) -> Problem:
    """A problem with everything set."""
    return Problem(id=id, source=source, level=level, text=text, answer=answer)


def make_tree(
    *children: Branch, problem: Problem | None = None, round: int = 1, index: int = 0
) -> Tree:
    """A tree with these branches below the root, terminals backed up in the order written."""
    tree = Tree(problem=problem or make_problem(), round=round, index=index)
    _grow(tree, tree.root, children)
    for node, branch in _terminals(tree, tree.root, children):
        reward = branch.reward
        if reward is None:
            reward = 1.0 if branch.correct else -1.0
        backup(tree, node, reward)
    tree.num_rollouts = tree.root.visit_count
    return tree


def _grow(tree: Tree, node: Node, branches: tuple[Branch, ...]) -> None:
    if not branches:
        return
    nodes = [
        Node(
            id=-1,
            parent=-1,
            depth=-1,
            step=branch.step,
            num_tokens=4,
            discard=branch.discard,
            terminal=branch.terminal,
            correct=branch.correct,
            value=branch.value,
        )
        for branch in branches
    ]
    for child, branch in zip(nodes, branches, strict=True):
        for name, value in branch.extra.items():
            setattr(child, name, value)
    expand(tree, node, nodes)
    for child, branch in zip(nodes, branches, strict=True):
        _grow(tree, child, branch.children)


def _terminals(tree: Tree, node: Node, branches: tuple[Branch, ...]) -> list[tuple[Node, Branch]]:
    found = []
    for child_id, branch in zip(node.children, branches, strict=True):
        child = tree.nodes[child_id]
        if branch.terminal is not None and branch.visited:
            found.append((child, branch))
        found += _terminals(tree, child, branch.children)
    return found
