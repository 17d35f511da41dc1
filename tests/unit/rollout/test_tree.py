from __future__ import annotations

from dataclasses import replace

import pytest

from rollout.problem import Level, Problem
from rollout.prompt import Step, StepKind
from rollout.tree import Discard, Node, Outcome, Terminal, Tree, backup, expand

PROBLEM = Problem(id="p", source="s", level=Level.GSM, text="q", answer="1")


def child(terminal: Terminal | None = None, **more: object) -> Node:
    step = Step(kind=StepKind.CODE, text="x<end_of_step>")
    return Node(id=-1, parent=-1, depth=-1, step=step, terminal=terminal, **more)  # type: ignore[arg-type]


def test_rewards_add_up_along_the_path_as_in_equation_2() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [child(), child()])
    a, b = tree.nodes[1], tree.nodes[2]
    expand(tree, a, [child(Terminal.ANSWER), child(Terminal.ANSWER)])
    expand(tree, b, [child(Terminal.ANSWER)])
    backup(tree, tree.nodes[3], 1.0)
    backup(tree, tree.nodes[4], -1.0)
    backup(tree, tree.nodes[5], 1.0)
    table = [(n.id, n.visit_count, n.value_sum, n.q_value) for n in tree.nodes]
    assert table == [
        # id, N,   q,    Q
        (0, 3, 1.0, pytest.approx(1 / 3)),
        (1, 2, 0.0, 0.0),
        (2, 1, 1.0, 1.0),
        (3, 1, 1.0, 1.0),
        (4, 1, -1.0, -1.0),
        (5, 1, 1.0, 1.0),
    ]


def test_ppm_value_is_the_initial_value_as_in_equation_3() -> None:
    tree = Tree(problem=PROBLEM, round=3)
    expand(tree, tree.root, [child(value=0.4)])
    a = tree.nodes[1]
    assert (a.visit_count, a.value_sum) == (1, 0.4)
    expand(tree, a, [child(Terminal.ANSWER, value=0.9)])
    answer = tree.nodes[2]
    assert answer.visit_count == 0  # a terminal's worth is its reward, not its estimate
    backup(tree, answer, -1.0)
    assert a.q_value == pytest.approx((0.4 - 1.0) / 2)
    assert answer.q_value == -1.0


def test_released_rule_keeps_a_failure_from_its_ancestors() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [child(Terminal.CODE_ERROR)])
    backup(tree, tree.nodes[1], -1.0, leaf_only=True)
    assert (tree.root.visit_count, tree.nodes[1].q_value) == (0, -1.0)


def test_a_node_is_exhausted_when_all_its_valid_children_are() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [child(), child(discard=Discard.CODE_FAILED)])
    a = tree.nodes[1]
    expand(tree, a, [child(Terminal.ANSWER), child(Terminal.ANSWER)])
    backup(tree, tree.nodes[3], 1.0)
    assert not a.exhausted
    backup(tree, tree.nodes[4], 1.0)
    assert a.exhausted
    assert tree.root.exhausted


def test_terminal_discarded_and_expanded_nodes_cannot_be_expanded() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [child(Terminal.ANSWER), child(discard=Discard.EMPTY)])
    for node in tree.nodes:
        with pytest.raises(ValueError, match=f"node {node.id} of problem p cannot be expanded"):
            expand(tree, node, [])


def test_reward_outside_its_range_is_refused() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [child(Terminal.ANSWER), child()])
    for reward in (1.5, float("nan")):
        with pytest.raises(ValueError, match="reward must be in"):
            backup(tree, tree.nodes[1], reward)
    with pytest.raises(ValueError, match="is not terminal"):
        backup(tree, tree.nodes[2], 1.0)


def test_discarded_candidates_stay_in_the_record_and_out_of_the_search() -> None:
    tree = Tree(problem=PROBLEM, round=1)
    expand(tree, tree.root, [child(discard=Discard.CODE_FAILED), child()])
    assert tree.root.children == (1, 2)
    assert [n.id for n in tree.valid_children(tree.root)] == [2]


@pytest.mark.parametrize(
    ("correct", "visits", "gold", "outcome"),
    [
        ([False, True], [0, 1], "1", Outcome.SOLVED),
        ([False, True], [1, 0], "1", Outcome.UNSOLVED),
        ([True], [0], "1", Outcome.NO_ANSWER),
        ([False], [0], "1", Outcome.NO_ANSWER),
        ([], [], "1", Outcome.NO_ANSWER),
        ([None], [1], "", Outcome.UNLABELLED),
    ],
)
def test_outcome_of_a_tree_follows_from_its_answers(
    correct: list[bool | None], visits: list[int], gold: str, outcome: Outcome
) -> None:
    tree = Tree(problem=replace(PROBLEM, answer=gold), round=1)
    answers = zip(correct, visits, strict=True)
    expand(tree, tree.root, [child(Terminal.ANSWER, correct=c, visit_count=n) for c, n in answers])
    assert tree.outcome == outcome
    assert tree.solved == (outcome is Outcome.SOLVED)
