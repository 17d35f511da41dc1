"""UCT and the choice of the next child; reads a tree, never changes it."""

from __future__ import annotations

import math
from enum import StrEnum

from rollout.tree import Node, Tree


class Unvisited(StrEnum):
    """What an unvisited child (N = 0) is worth, which Eq. 1 leaves open.

    The released code uses ZERO. That choice changes cost and diversity more than any other: with
    it a child that failed once soon outranks every sibling that was never tried.
    """

    INFINITE = "infinite"
    ZERO = "zero"


def uct(child: Node, parent_visits: int, exploration: float, unvisited: Unvisited) -> float:
    """Upper confidence bound of a child: Q(s) + c * sqrt(ln N_parent / N(s)).

    Source: arXiv 2501.04519, Eq. 1.

    Args:
        child: value sum q and visit count N >= 0, Q = q/N.
        parent_visits: N_parent >= 0; below 1 the exploration term is 0, which happens on the
            first descent through a root whose children carry PPM values.
        exploration: c >= 0, unitless.
        unvisited: what N(s) = 0 is worth.
    """
    if child.visit_count == 0:
        return math.inf if unvisited is Unvisited.INFINITE else 0.0
    if parent_visits < 1:
        return child.q_value
    bonus = exploration * math.sqrt(math.log(parent_visits) / child.visit_count)
    return child.q_value + bonus


def select_child(
    tree: Tree, node: Node, *, exploration: float, unvisited: Unvisited
) -> Node | None:
    """The valid, not exhausted child with the highest UCT; ties go to the first generated.

    Returns None if there is none.
    """
    best: Node | None = None
    best_score = -math.inf
    for child in tree.valid_children(node):
        if child.exhausted:
            continue
        score = uct(child, node.visit_count, exploration, unvisited)
        if best is None or score > best_score:
            best, best_score = child, score
    return best
