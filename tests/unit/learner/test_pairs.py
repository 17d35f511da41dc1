from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.pairs import (
    PAIR_PRESETS,
    PairConfig,
    PairKind,
    edit_distance_at_least,
    tree_pairs,
    valued_nodes,
)
from rollout.prompt import SHORT_TEMPLATE, render_question
from tests.builders import answer, answered, code, discarded, failed, last_code, make_tree

RIGHT, WRONG = {"correct": True}, {"correct": False}


def golden_tree():
    """Root children and their Q: a (+1 +1 -1)/3 = 1/3, b -1, c +1, d -1 (too deep), e open."""
    return make_tree(
        code(
            "a = 1",
            answered("7", **RIGHT),
            answered("7", **RIGHT, source="print(6 + 1)"),
            answered("8", **WRONG),
        ),
        code("b = 2", answered("9", **WRONG)),
        code("c = 3", answered("7", **RIGHT)),
        code("d = 4", failed()),
        code("e = 5"),
        discarded("f = 6"),
    )


def pairs_of(tree, **config):
    return tree_pairs(tree, template=SHORT_TEMPLATE, config=PairConfig(**config))


def sources(pairs):
    """(code of the chosen, code of the rejected, margin, weight), readable."""
    strip = str.maketrans("", "", "\n")
    return [
        (
            p.chosen.translate(strip).removeprefix("<code>").split("<end", 1)[0],
            p.rejected.translate(strip).removeprefix("<code>").split("<end", 1)[0],
            round(p.margin, 3),
            p.weight,
        )
        for p in pairs
    ]


def values_of(tree, **config):
    """Q-values of each node's steps, by node."""
    nodes = valued_nodes(tree, template=SHORT_TEMPLATE, config=PairConfig(**config))
    return {node.node: [round(step.q, 3) for step in node.steps] for node in nodes}


def test_every_step_a_rollout_passed_through_has_a_value():
    tree = golden_tree()
    values = values_of(tree)
    # e is open, f was discarded
    assert values[0] == [0.333, -1.0, 1.0, -1.0]
    # below a, b and c programs and their answers, below d a dead end
    assert sum(map(len, values.values())) == 4 + (3 + 3) + (1 + 1) + (1 + 1) + 1
    assert values_of(tree, min_visits=3)[0] == [0.333]


def test_only_step_of_a_node_and_a_tree_of_one_class_have_values():
    assert values_of(make_tree(code("a = 1", answered("7", **RIGHT)))) == {
        0: [1.0],
        1: [1.0],
        2: [1.0],
    }


def test_value_of_a_ppm_alone_is_no_value_to_learn():
    tree = make_tree(code("a = 1", answered("7", **RIGHT), value=0.5), code("b = 2", value=0.9))
    assert values_of(tree)[0] == [0.75]
    assert values_of(tree, q_source="terminal")[0] == [1.0]


def test_two_best_siblings_meet_two_worst_of_the_golden_tree():
    pairs = [p for p in pairs_of(golden_tree(), answer_pairs=False) if p.node == 0]

    assert sources(pairs) == [
        # chosen  rejected  margin  weight
        ("c = 3", "b = 2", 2.0, 0.25),
        ("c = 3", "d = 4", 2.0, 0.25),
        ("a = 1", "b = 2", 1.333, 0.25),
        ("a = 1", "d = 4", 1.333, 0.25),
    ]


def test_siblings_below_the_root_share_the_longer_prefix():
    pairs = [p for p in pairs_of(golden_tree(), answer_pairs=False) if p.node == 1]

    assert sources(pairs) == [
        ("print(7)", "print(8)", 2.0, 0.5),
        ("print(6 + 1)", "print(8)", 2.0, 0.5),
    ]
    question = render_question("How many?", SHORT_TEMPLATE)
    assert {p.prefix for p in pairs} == {question + "<code>\na = 1\n<end_of_step>"}
    assert pairs[0].chosen.endswith("<end_of_code>\n<output>7<end_of_output>\n")


def test_whole_trajectories_are_compared_for_the_answer():
    pairs = [p for p in pairs_of(golden_tree()) if p.kind is PairKind.ANSWER]

    # Mean Q: c (1, 1, 1) = 1; a's first right answer (1/3, 1, 1) = 7/9; b -1; a's wrong -5/9.
    assert [(round(p.chosen_q, 3), round(p.rejected_q, 3)) for p in pairs] == [
        (1.0, -1.0),
        (1.0, -0.556),
        (0.778, -1.0),
        (0.778, -0.556),
    ]
    assert {p.prefix for p in pairs} == {render_question("How many?", SHORT_TEMPLATE)}
    assert pairs[0].chosen.startswith("<code>\nc = 3") and "\\boxed{7}" in pairs[0].chosen


def test_whole_trajectories_are_of_distinct_programs_on_each_side():
    def program(source, value, **outcome):
        wordings = [f"{value}", f"{value}.0"]
        return last_code(source, *(answer(w, **outcome) for w in wordings), output=value)

    tree = make_tree(
        program("print(8)", "8", **RIGHT),
        program("# the same\nprint(8)", "8", **RIGHT),
        program("print(4 + 4)", "8", **RIGHT),
        program("print(9)", "9", **WRONG),
        program("print(7)", "7", **WRONG),
    )
    pairs = [p for p in pairs_of(tree) if p.kind is PairKind.ANSWER]
    assert [(chosen, rejected) for chosen, rejected, _, _ in sources(pairs)] == [
        ("print(8)", "print(7)"),
        ("print(8)", "print(9)"),
        ("print(4 + 4)", "print(7)"),
        ("print(4 + 4)", "print(9)"),
    ]


def test_tree_with_one_kind_of_outcome_gives_no_pairs():
    assert pairs_of(make_tree(code("a", answered("7", **RIGHT)), code("b"))) == []
    assert pairs_of(make_tree(code("a", answered("8", **WRONG)), code("b", failed()))) == []


def test_unvisited_sibling_is_never_rejected():
    tree = make_tree(
        code("a", answered("7", **RIGHT), answered("8", **WRONG)),
        code("b", last_code("print(8)", answer("8", **WRONG, visited=False), output="8")),
    )
    assert [p.node for p in pairs_of(tree, answer_pairs=False)] == [1]


def test_prior_of_a_preference_model_is_no_outcome_but_counts_in_q():
    tree = make_tree(
        code("a", answered("7", **RIGHT), value=-0.8),  # Q = (-0.8 + 1) / 2 = 0.1
        code("b", answered("8", **WRONG), value=0.9),  # Q = (0.9 - 1) / 2 = -0.05
        code("c", value=-1.0),
    )
    (by_search,) = pairs_of(tree, answer_pairs=False)
    (by_terminal,) = pairs_of(tree, answer_pairs=False, q_source="terminal")

    assert (by_search.chosen_q, by_search.rejected_q) == pytest.approx((0.1, -0.05))
    assert (by_terminal.chosen_q, by_terminal.rejected_q) == (1.0, -1.0)


def test_margin_and_edit_distance_of_the_released_preset_drop_near_pairs():
    tree = make_tree(
        code("x = 1 + 1 + 1 + 1 + 1 + 1 + 1", answered("7", **RIGHT)),
        code("x = 8", answered("8", **WRONG)),
        code("x = 1 + 1 + 1 + 1 + 1 + 1 + 2", answered("9", **WRONG)),
    )
    released = PAIR_PRESETS["released"].model_copy(update={"answer_pairs": False})
    pairs = tree_pairs(tree, template=SHORT_TEMPLATE, config=released)

    assert [s[1] for s in sources(pairs)] == ["x = 8"]
    assert pairs_of(golden_tree(), min_margin=1.5, answer_pairs=False)[0].margin == 2.0
    assert len(pairs_of(golden_tree(), min_margin=1.5, answer_pairs=False)) == 4


def test_steps_that_differ_in_comments_only_are_no_pair():
    tree = make_tree(
        code("# one way\nx = 7", answered("7", **RIGHT)),
        code("# other way\nx  =  7", answered("8", **WRONG)),
    )
    assert pairs_of(tree, answer_pairs=False) == []
    assert len(pairs_of(tree, answer_pairs=False, distinct_code=False)) == 1


def test_same_code_with_different_answers_is_a_pair():
    tree = make_tree(
        code("x = 7", last_code("print(x)", answer("7", **RIGHT), answer("8", **WRONG), output="7"))
    )
    (step, whole) = pairs_of(tree)
    assert (step.kind, whole.kind) == (PairKind.STEP, PairKind.ANSWER)
    assert "\\boxed{7}" in step.chosen and "\\boxed{8}" in step.rejected


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[j - 1] + 1))
    return row[-1]


@given(st.text("ab", max_size=12), st.text("ab", max_size=12), st.integers(0, 12))
def test_bounded_edit_distance_agrees_with_the_full_table(left, right, bound):
    assert edit_distance_at_least(left, right, bound) == (levenshtein(left, right) >= bound)
