from __future__ import annotations

import math

import pytest

from rollout.problem import Level, Problem
from rollout.selection import Unvisited, select_child, uct
from rollout.tree import Discard, Node, Terminal, Tree, expand

PROBLEM = Problem(id="p", source="s", level=Level.GSM, text="q", answer="1")


def node(visits: int = 0, q: float = 0.0, **more: object) -> Node:
    return Node(id=-1, parent=-1, depth=-1, step=None, visit_count=visits, value_sum=q, **more)  # type: ignore[arg-type]


def test_uct_is_q_plus_c_root_of_log_parent_over_n() -> None:
    # Q = 1/2, ln 10 = 2.302585, sqrt(2.302585 / 2) = 1.072983
    assert uct(node(2, 1.0), 10, 2.0, Unvisited.INFINITE) == pytest.approx(0.5 + 2 * 1.072983)


def test_failed_child_outranks_untried_ones_under_the_released_rule() -> None:
    # a child with Q = -1, N = 1 is worth 0.67 when its parent has 2 visits
    assert uct(node(1, -1.0), 2, 2.0, Unvisited.ZERO) == pytest.approx(
        2 * math.sqrt(math.log(2)) - 1
    )
    assert uct(node(0), 2, 2.0, Unvisited.ZERO) == 0.0
    assert uct(node(0), 2, 2.0, Unvisited.INFINITE) == math.inf


def test_first_descent_follows_the_ppm_alone() -> None:
    tree = Tree(problem=PROBLEM, round=3)
    expand(tree, tree.root, [node(value=0.1), node(value=0.7), node(value=0.4)])
    chosen = select_child(tree, tree.root, exploration=2.0, unvisited=Unvisited.INFINITE)
    assert chosen is tree.nodes[2]


def test_child_no_rollout_went_through_is_worth_its_first_value_alone() -> None:
    rule = Unvisited.FIRST_PLAY
    assert uct(node(0), 5, 2.0, rule) == 0.0
    assert uct(node(1, 0.7, value=0.7), 5, 2.0, rule) == 0.7
    assert uct(node(0, value=-0.4, terminal=Terminal.ANSWER), 5, 2.0, rule) == -0.4
    # PPM value 0.7 and one reward of -1: Q = -0.15, N = 2, ln 5 = 1.609438
    assert uct(node(2, -0.3, value=0.7), 5, 2.0, rule) == pytest.approx(-0.15 + 2 * 0.897062)
    # a rollout below it now: N = 1 + 1, q = 0.7 - 1
    assert uct(node(1, 0.7, value=0.7), 5, 2.0, rule, 1) == pytest.approx(-0.15 + 2 * 0.897062)


def test_under_first_play_a_valued_child_is_gone_on_with_and_under_zero_left_at_once() -> None:
    def second(unvisited: Unvisited) -> int:
        tree = Tree(problem=PROBLEM, round=3)
        expand(tree, tree.root, [node(value=0.9), node(value=0.8)])
        tree.root.visit_count = 2
        tree.nodes[1].visit_count, tree.nodes[1].value_sum = 3, 0.9 + 2.0
        found = select_child(tree, tree.root, exploration=2.0, unvisited=unvisited)
        assert found is not None
        return found.id

    # Q = 0.97 + 2 sqrt(ln 2 / 3) = 1.93 against 0.8, or against 0.8 + 2 sqrt(ln 2) = 2.47
    assert second(Unvisited.FIRST_PLAY) == 1
    assert second(Unvisited.ZERO) == second(Unvisited.INFINITE) == 2


def test_ties_go_to_the_first_generated_and_discarded_or_exhausted_never() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    candidates = [node(discard=Discard.CODE_FAILED), node(exhausted=True), node(), node()]
    expand(tree, tree.root, candidates)
    chosen = select_child(tree, tree.root, exploration=2.0, unvisited=Unvisited.INFINITE)
    assert chosen is candidates[2]


@pytest.mark.parametrize("unvisited", list(Unvisited))
def test_of_answers_no_rollout_has_reached_the_best_valued_is_next(unvisited: Unvisited) -> None:
    tree = Tree(problem=PROBLEM, round=3)
    answers = [node(terminal=Terminal.ANSWER, value=v) for v in (None, -0.9, 0.99, 0.99)]
    expand(tree, tree.root, [*answers, node(terminal=Terminal.TOO_DEEP)])
    order = []
    while True:
        chosen = select_child(tree, tree.root, exploration=2.0, unvisited=unvisited)
        if chosen is None:
            break
        order.append(chosen.id)
        chosen.exhausted = True
    # first_play takes one without a value as worth 0, which is more than -0.9
    assert order == ([3, 4, 1, 5, 2] if unvisited is Unvisited.FIRST_PLAY else [3, 4, 2, 1, 5])


@pytest.mark.parametrize("unvisited", list(Unvisited))
def test_inner_nodes_no_rollout_went_through_come_by_their_ppm_value(unvisited: Unvisited) -> None:
    tree = Tree(problem=PROBLEM, round=3)
    expand(tree, tree.root, [node(value=v) for v in (-0.9, 0.3, 0.99, 0.3, 0.6)])
    tree.root.visit_count = 4
    order = []
    while (
        chosen := select_child(tree, tree.root, exploration=2.0, unvisited=unvisited)
    ) is not None:
        order.append(chosen.id)
        chosen.exhausted = True
    assert order == [3, 5, 2, 4, 1]


def test_nothing_left_gives_none() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [node(exhausted=True), node(discard=Discard.EMPTY)])
    assert select_child(tree, tree.root, exploration=2.0, unvisited=Unvisited.ZERO) is None


def test_rollouts_below_a_child_count_as_visits_that_failed() -> None:
    # N = 2 + 1, q = 1 - 1: Q = 0, ln 10 = 2.302585, sqrt(2.302585 / 3) = 0.876087
    assert uct(node(2, 1.0), 10, 2.0, Unvisited.INFINITE, 1) == pytest.approx(2 * 0.876087)
    assert uct(node(0), 1, 2.0, Unvisited.INFINITE, 1) == -1.0


def test_next_rollout_goes_where_no_other_one_is() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [node(), node(), node()])
    pending: dict[int, int] = {}
    chosen = []
    for _ in range(4):
        found = select_child(
            tree, tree.root, exploration=2.0, unvisited=Unvisited.INFINITE, pending=pending
        )
        assert found is not None
        pending[found.id] = pending.get(found.id, 0) + 1
        chosen.append(found.id)
    assert chosen == [1, 2, 3, 1]


def test_terminal_another_rollout_is_at_is_taken() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [node(terminal=Terminal.ANSWER), node(terminal=Terminal.ANSWER)])

    def choose(pending: dict[int, int]) -> int | None:
        found = select_child(
            tree, tree.root, exploration=2.0, unvisited=Unvisited.INFINITE, pending=pending
        )
        return found.id if found is not None else None

    assert [choose({}), choose({1: 1}), choose({1: 1, 2: 1})] == [1, 2, None]
