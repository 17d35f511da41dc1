"""UCT and the choice of the next child; reads a tree, never changes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum

from rollout.tree import Node, Tree


class Unvisited(StrEnum):
    """What a child that no rollout went through is worth, which Eq. 1 leaves open.

    That choice changes cost and diversity more than any other. Where a PPM gives every child a
    first visit (Eq. 3), N = 0 happens at answers only, so INFINITE and ZERO hardly differ there
    and rollouts spread over the first steps.
    """

    FIRST_PLAY = "first_play"
    """Its PPM value, 0 without one, and no exploration term: a sibling is tried when those tried
    before are worth less (first-play urgency, Gelly and Wang 2006)."""
    ZERO = "zero"
    """The released code: 0 where N = 0; a child with a PPM value counts as visited once."""
    INFINITE = "infinite"
    """As Eq. 1 says where N = 0: every child before any a second time."""


def uct(
    child: Node,
    parent_visits: int,
    exploration: float,
    unvisited: Unvisited,
    pending: int = 0,
) -> float:
    """Upper confidence bound of a child: Q(s) + c * sqrt(ln N_parent / N(s)).

    Source: arXiv 2501.04519, Eq. 1.

    Args:
        child: value sum q and visit count N >= 0, Q = q/N.
        parent_visits: N_parent >= 0; below 1 the exploration term is 0, which happens on the
            first descent through a root whose children carry PPM values.
        exploration: c >= 0, unitless.
        unvisited: what a child is worth that no rollout went through.
        pending: rollouts of the same tree that are below the child now; each counts as a visit
            that ended in -1 (virtual loss), so that the next rollout looks elsewhere.
    """
    if unvisited is Unvisited.FIRST_PLAY and child.num_passes + pending == 0:
        return child.value if child.value is not None else 0.0
    visits = child.visit_count + pending
    if visits == 0:
        return math.inf if unvisited is Unvisited.INFINITE else 0.0
    q_value = (child.value_sum - pending) / visits
    if parent_visits < 1:
        return q_value
    return q_value + exploration * math.sqrt(math.log(parent_visits) / visits)


def select_child(
    tree: Tree,
    node: Node,
    *,
    exploration: float,
    unvisited: Unvisited,
    pending: Mapping[int, int] | None = None,
) -> Node | None:
    """The valid, not exhausted child with the highest UCT.

    Ties go to the unvisited child with the highest PPM value, then to the first generated: of
    answers that no rollout has reached, the best-valued is next.

    Args:
        pending: node id -> number of other rollouts below it now; a terminal that one of them is
            at is taken. None: there are no others.
    Returns:
        None if there is none to choose.
    """
    best: Node | None = None
    best_rank = (-math.inf, -math.inf)
    others = pending or {}
    parent_visits = node.visit_count
    if others:
        parent_visits += sum(others.get(i, 0) for i in node.children)
    for child_id in node.children:
        child = tree.nodes[child_id]
        if child.discard is not None or child.exhausted:
            continue
        below = others.get(child_id, 0)
        if below and child.terminal is not None:
            continue
        known = child.value if child.value is not None and not child.visit_count else -math.inf
        rank = (uct(child, parent_visits, exploration, unvisited, below), known)
        if best is None or rank > best_rank:
            best, best_rank = child, rank
    return best
