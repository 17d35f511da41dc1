from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, replace

import pytest

from learner.dataset import Demonstration, read_manifest
from learner.select import (
    DatasetConfig,
    choose_of_problem,
    is_ppm_only,
    is_validation,
    select_dataset,
)
from rollout.problem import Level
from rollout.prompt import SHORT_TEMPLATE, parse_response
from tests.builders import answered, code, failed, make_problem, make_tree
from tests.datasets import rows_of, selected

NO_SPLIT = {"validation_share": 0.0}


def right(source: str):
    return code(source, answered("7", correct=True))


def wrong(source: str):
    return code(source, answered("8", correct=False))


def build(trees, demonstrations=(), **config):
    return selected(trees, config=DatasetConfig(**config), demonstrations=demonstrations)


def solution(example) -> str:
    return "".join(s.text for s in example.segments if s.trained)


def test_two_best_correct_trajectories_of_a_problem_are_kept():
    tree = make_tree(
        code("a = 1", answered("7", correct=True), answered("8", correct=False)),  # mean 1/3
        right("b = 2"),
        wrong("c = 3"),
        right("d = 4"),
    )
    dataset = build([tree], **NO_SPLIT)

    assert ["b = 2" in solution(dataset.sft_train[0]), "d = 4" in solution(dataset.sft_train[1])]
    assert len(dataset.sft_train) == 2
    assert dataset.manifest["counts"]["gsm"]["trajectories_correct"] == 3
    assert dataset.manifest["excluded"]["gsm"]["beyond_top"] == 1


def test_loss_falls_on_what_the_policy_wrote():
    (example,) = build([make_tree(right("b = 2"))], **NO_SPLIT).sft_train
    assert [(s.text, s.trained) for s in example.segments] == [
        ("<|user|>How many?<|assistant|>", False),
        ("<code>\nb = 2\n<end_of_step>", True),
        ("\nprint(7)\n<end_of_code>", True),
        ("\n<output>7<end_of_output>\n", False),
        ("<answer>The answer is \\boxed{7}<end_of_answer>", True),
    ]


def test_one_program_counts_once_over_all_rounds_and_its_best_run_stays():
    early = make_tree(
        code("# think\nx = 7", answered("7", correct=True), answered("8", correct=False)), round=1
    )
    late = make_tree(right("# think again\nx  = 7"), round=2)
    dataset = build([early, late], sft_rounds="all", **NO_SPLIT)

    (example,) = dataset.sft_train
    assert (example.round, example.mean_q) == (2, 1.0)
    assert "think again" in solution(example)
    assert dataset.manifest["excluded"]["all"]["same_program"] == 1


def test_result_does_not_depend_on_the_order_of_trees():
    trees = [
        make_tree(right(f"x = {i}"), wrong(f"y = {i}"), problem=make_problem(f"p{p}"), round=i)
        for p in range(3)
        for i in range(1, 4)
    ]
    forward, backward = (build(t, sft_rounds="all") for t in (trees, trees[::-1]))
    assert forward == backward
    assert len(forward.sft_train + forward.sft_validation) == 6


def test_validation_problem_is_in_no_training_data():
    problems = [make_problem(f"p{i}") for i in range(200)]
    trees = [make_tree(right("a = 1"), wrong("b = 2"), problem=p) for p in problems]
    dataset = build(trees, validation_share=0.2)

    held_out = {p.id for p in problems if is_validation(p.id, DatasetConfig(validation_share=0.2))}
    assert 20 < len(held_out) < 60
    assert {e.problem_id for e in dataset.sft_validation} == held_out
    assert {p.problem_id for p in dataset.pairs_validation} == held_out
    assert not held_out & {e.problem_id for e in dataset.sft_train}
    assert not held_out & {p.problem_id for p in dataset.pairs_train}


def test_problems_of_the_ppm_alone_are_not_in_the_policys_data_and_give_all_pairs():
    problems = [make_problem(f"p{i}") for i in range(200)]
    trees = [make_tree(right("a = 1"), wrong("b = 2"), problem=p) for p in problems]
    config = DatasetConfig(validation_share=0.2, ppm_only_share=0.5)
    dataset = build(trees, validation_share=0.2, ppm_only_share=0.5)

    held_out = {p.id for p in problems if is_validation(p.id, config)}
    apart = {p.id for p in problems if is_ppm_only(p.id, config)} - held_out
    rest = {p.id for p in problems} - held_out - apart
    assert min(len(apart), len(rest)) > 60
    assert {e.problem_id for e in dataset.sft_train} == rest
    assert {p.problem_id for p in dataset.pairs_train} == apart
    assert {p.problem_id for p in dataset.pairs_validation} == held_out
    counts, excluded = (dataset.manifest[name]["all"] for name in ("counts", "excluded"))
    assert (counts["policy_problems"], counts["ppm_problems"]) == (len(rest), len(apart))
    assert (counts["sft_train"], counts["pairs_train"]) == (len(rest), len(dataset.pairs_train))
    assert excluded["ppm_only"] == len(apart)
    # the same pairs in each of these trees
    assert excluded["policy_pair"] / len(rest) == counts["pairs_train"] / len(apart)


def test_variations_are_the_ppms_alone_with_their_original_and_for_all_rounds():
    config = DatasetConfig(validation_share=0.0, ppm_only_share=0.5)
    original = next(f"p{i}" for i in range(99) if is_ppm_only(f"p{i}", config))
    problem = replace(make_problem("reworded"), rewording_of=original)
    for number in (1, 2):
        tree = make_tree(right("a = 1"), wrong("b = 2"), problem=problem, round=number)
        chosen = choose_of_problem([tree], template=SHORT_TEMPLATE, config=config)
        assert chosen.ppm_only and chosen.pairs and not chosen.trajectories


def test_variations_of_a_problem_are_on_the_side_of_their_original():
    originals = [make_problem(f"p{i}") for i in range(100)]
    problems = originals + [
        replace(problem, id=f"{problem.id}-{n}", rewording_of=problem.id)
        for problem in originals
        for n in range(2)
    ]
    dataset = build([make_tree(right("a = 1"), problem=p) for p in problems], validation_share=0.2)
    held_out = Counter(e.problem_id.split("-")[0] for e in dataset.sft_validation)
    assert 10 < len(held_out) < 40
    assert set(held_out.values()) == {3}


def test_split_is_another_one_for_another_seed():
    ids = [f"p{i}" for i in range(200)]
    first, second = (
        {i for i in ids if is_validation(i, DatasetConfig(validation_share=0.2, split_seed=seed))}
        for seed in (0, 1)
    )
    assert first != second


def trees_of_three_rounds():
    """Round 1 and 2 solve p1, and both and round 3 p2; p3 is never solved. As a search without
    and with a PPM leaves them: the older, the higher the Q-values."""
    found = []
    for name, solving in (("p1", (1, 2)), ("p2", (1, 2, 3)), ("p3", ())):
        for round in (1, 2, 3):
            branch = right if round in solving else wrong
            steps = [branch(f"a = {round}"), wrong(f"b = {round}")]
            if round > 1 and round in solving:
                steps.append(code(f"c = {round}", *steps[0].children, *steps[1].children))
                steps.pop(0)
            found.append(make_tree(*steps, problem=make_problem(name), round=round))
    return found


@pytest.mark.parametrize(
    ("rule", "rounds", "newest", "left_out"),
    [
        ("all", {"p1": [1, 2], "p2": [1, 3]}, 0.25, {"beyond_top": 1, "unsolved": 1}),
        (
            "newest_solved",
            {"p1": [2], "p2": [3]},
            0.5,
            {"beyond_top": 0, "unsolved": 1, "other_round": 3},
        ),
        (
            "this",
            {"p2": [3]},
            1.0,
            {"beyond_top": 0, "unsolved": 1, "solved_earlier": 1, "other_round": 4},
        ),
    ],
)
def test_rounds_that_feed_the_policy(rule, rounds, newest, left_out):
    dataset = build(
        trees_of_three_rounds(), [DEMONSTRATION], sft_rounds=rule, pair_rounds="all", **NO_SPLIT
    )
    found = {}
    for example in dataset.sft_train:
        if example.origin == "tree":
            found.setdefault(example.problem_id, []).append(example.round)
    assert found == rounds
    manifest = dataset.manifest
    by_round = Counter(number for numbers in rounds.values() for number in numbers)
    assert manifest["origins"]["sft_train"] == {str(n): by_round[n] for n in sorted(by_round)}
    assert manifest["newest_round_share"] == newest
    assert manifest["counts"]["all"]["solved"] == 2
    assert manifest["excluded"]["all"] == left_out


def test_newest_round_is_the_default_for_trajectories_and_this_one_for_pairs():
    dataset = build(trees_of_three_rounds(), **NO_SPLIT)
    assert [(e.problem_id, e.round) for e in dataset.sft_train] == [("p1", 2), ("p2", 3)]
    assert {(p.problem_id, p.round) for p in dataset.pairs_train} == {("p2", 3)}
    assert dataset.manifest["excluded"]["all"]["other_round_pair"] > 0


@pytest.mark.parametrize(
    ("rule", "rounds"),
    [
        ("all", {("p1", 1), ("p1", 2), ("p2", 1), ("p2", 2), ("p2", 3)}),
        ("newest_solved", {("p1", 2), ("p2", 3)}),
        ("this", {("p2", 3)}),
    ],
)
def test_rounds_that_feed_the_ppm(rule, rounds):
    trees = trees_of_three_rounds()
    dataset = build(trees, pair_rounds=rule, **NO_SPLIT)
    assert {(p.problem_id, p.round) for p in dataset.pairs_train} == rounds
    origins = Counter(str(pair.round) for pair in dataset.pairs_train)
    assert dataset.manifest["origins"]["pairs_train"] == dict(sorted(origins.items()))
    every = len(build(trees, pair_rounds="all", **NO_SPLIT).pairs_train)
    left_out = dataset.manifest["excluded"]["all"].get("other_round_pair", 0)
    assert len(dataset.pairs_train) + left_out == every


def test_a_round_that_gave_no_example_has_a_share_of_none_of_them():
    first = make_tree(right("a = 1"), round=1)
    second = make_tree(wrong("a = 1"), round=2)
    assert build([first, second], **NO_SPLIT).manifest["newest_round_share"] == 0.0
    assert build([second], **NO_SPLIT).manifest["newest_round_share"] is None


def test_difficulty_is_counted_as_the_newest_round_found_it():
    def problem(name, *branches, round=2, index=0):
        return make_tree(*branches, problem=make_problem(name), round=round, index=index)

    trees = [
        problem("easy", right("a = 1")),
        problem("medium", right("a = 1"), wrong("b = 2")),
        problem("hard", wrong("a = 1")),
        problem("hard", right("a = 1"), index=1),
        problem("unsolved", wrong("a = 1")),
        problem("unsolved", wrong("b = 1"), index=1),
        problem("easy", wrong("a = 1"), round=1),
        problem("not searched again", wrong("a = 1"), round=1),
    ]
    found = build(trees, **NO_SPLIT).manifest["difficulty"]
    assert found["gsm"] == found["all"] == {"easy": 1, "hard": 1, "medium": 1, "unsolved": 1}


def test_values_of_steps_are_written_for_training_problems_of_the_pairs_rounds():
    def build_valued(**config):
        return selected(trees_of_three_rounds(), config=DatasetConfig(**config), valued_steps=True)

    found = build_valued(**NO_SPLIT)
    nodes, manifest = found.steps_train, found.manifest
    assert {(node.problem_id, node.round) for node in nodes} == {("p1", 3), ("p2", 3), ("p3", 3)}
    assert manifest["counts"]["all"]["steps_train"] == sum(len(node.steps) for node in nodes)
    assert manifest["origins"]["steps_train"] == {"3": len(nodes)}
    every = build_valued(pair_rounds="all", **NO_SPLIT).steps_train
    assert {node.round for node in every} == {1, 2, 3}
    assert build_valued(validation_share=0.999999).steps_train == []


def test_often_missed_synthetic_problem_is_left_out_as_mislabelled():
    def tree(source):
        problem = make_problem(source, source=source)
        return make_tree(right("a = 1"), wrong("b = 2"), wrong("c = 3"), problem=problem)

    config = {"synthetic_sources": ("made_up",), **NO_SPLIT}
    dataset = build([tree("made_up"), tree("real")], **config)

    assert {e.problem_id for e in dataset.sft_train} == {"real"}
    assert {p.problem_id for p in dataset.pairs_train} == {"real"}
    assert dataset.manifest["excluded"]["gsm"]["low_accuracy"] == 1
    assert dataset.manifest["excluded"]["gsm"]["low_accuracy_pair"] > 0


def test_accuracy_of_a_synthetic_problem_is_the_newest_rounds():
    problem = make_problem(source="made_up")
    weak = make_tree(*(wrong(f"a = {n}") for n in range(8)), problem=problem, round=1)
    strong = make_tree(
        *(right(f"a = {n}") for n in range(7)), wrong("a = 7"), problem=problem, round=4
    )
    nothing = make_tree(failed(), problem=problem, round=5)
    config = {"synthetic_sources": ("made_up",), **NO_SPLIT}

    assert len(build([weak, strong, nothing], **config).sft_train) == 2
    turned = [replace(weak, round=4), replace(strong, round=1)]
    assert build(turned, **config).sft_train == []


def test_identical_samples_count_each_in_the_accuracy_of_a_synthetic_problem():
    agreed = right("a = 7")
    agreed.extra["multiplicity"] = 14
    tree = make_tree(agreed, wrong("a = 8"), wrong("a = 9"), problem=make_problem(source="made_up"))
    assert len(build([tree], synthetic_sources=("made_up",), **NO_SPLIT).sft_train) == 1


def test_pair_that_another_tree_turns_round_is_dropped_and_a_repeated_one_kept_once():
    first = make_tree(right("a = 1"), wrong("b = 2"), index=0)
    again = make_tree(right("a = 1"), wrong("b = 2"), index=1)
    turned = make_tree(wrong("a = 1"), right("b = 2"), index=2)
    config = {"pairs": {"answer_pairs": False}, **NO_SPLIT}

    assert len(build([first, again], **config).pairs_train) == 1
    assert build([first, again], **config).manifest["excluded"]["gsm"]["duplicate_pair"] == 1
    assert build([first, turned], **config).pairs_train == []
    assert build([first, turned], **config).manifest["excluded"]["gsm"]["contradicted_pair"] == 2


def test_counts_stand_by_level_and_sum_up():
    solved = make_tree(right("a = 1"), problem=make_problem("g"))
    unsolved = make_tree(wrong("a = 1"), problem=make_problem("o", level=Level.OLYMPIAD))
    dataset = build([solved, unsolved], **NO_SPLIT)

    assert dataset.manifest["counts"]["gsm"]["solved"] == 1
    assert dataset.manifest["excluded"]["olympiad"] == {"unsolved": 1}
    assert dataset.manifest["counts"]["all"]["problems"] == 2


SOLUTION = (
    "<code>\na = 7\n<end_of_step>\nprint(a)\n<end_of_code>\n<output>7<end_of_output>\n"
    "<answer>It is \\boxed{7}<end_of_answer>"
)
DEMONSTRATION = Demonstration(
    id="d1", level="gsm", problem="Seven?", steps=tuple(parse_response(SOLUTION))
)


def test_demonstrations_enter_as_often_as_asked():
    dataset = build([], [DEMONSTRATION], demonstration_repeat=3)

    assert len(dataset.sft_train) == 3
    assert "".join(s.text for s in dataset.sft_train[0].segments).endswith(SOLUTION)
    assert dataset.manifest["counts"]["gsm"] == {"demonstrations": 1, "sft_train": 3}


DIGESTS = {
    "sft_train": "30b02509dd38958e",
    "sft_validation": "852086cd4a8f398a",
    "pairs_train": "173be0aca399707f",
    "pairs_validation": "5a3be9634c8069ef",
}
"""Of the rows that a selection with everything in memory made of the trees below."""


def test_selection_is_that_in_memory_whatever_the_memory_and_the_order_of_trees(tmp_path):
    trees = [
        make_tree(
            right(f"a = {index}"),
            wrong(f"b = {number % 7}"),
            code(f"c = {number}", answered("7", correct=index == 1), answered("8", correct=False)),
            problem=make_problem(f"p{number}", source="made_up" if number % 5 else "real"),
            round=round,
            index=index,
        )
        for number in range(40)
        for round in (1, 2)
        for index in (0, 1)
    ]
    config = DatasetConfig(
        sft_rounds="all",
        pair_rounds="all",
        validation_share=0.3,
        synthetic_sources=("made_up",),
        min_synthetic_accuracy=0.45,
    )

    def select(name, memory_bytes):
        return select_dataset(
            iter(trees),
            tmp_path / name,
            template=SHORT_TEMPLATE,
            config=config,
            demonstrations=[DEMONSTRATION],
            info={"rounds": [1, 2]},
            memory_bytes=memory_bytes,
        )

    held = select("held", 1 << 26)
    random.Random(0).shuffle(trees)
    assert select("shuffled", 1 << 26) == held
    assert select("spilled", 1) == held
    for name in ("shuffled", "spilled"):
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "held").iterdir()
        }
    dataset = rows_of(tmp_path / "held", held)
    found = {name: [asdict(row) for row in getattr(dataset, name)] for name in DIGESTS}
    assert {
        name: hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        for name, rows in found.items()
    } == DIGESTS
    assert held["counts"]["all"] == {
        "demonstrations": 1,
        "pairs_train": 60,
        "pairs_validation": 36,
        "problems": 40,
        "sft_train": 11,
        "sft_validation": 6,
        "solved": 40,
        "trajectories_correct": 240,
        "trajectories_kept": 16,
        "trees": 160,
    }
    assert held["excluded"]["gsm"] == {
        "beyond_top": 8,
        "duplicate_pair": 480,
        "low_accuracy": 32,
        "low_accuracy_pair": 384,
        "same_program": 120,
    }


def test_manifest_counts_step_pairs_by_depth_and_inner_nodes_by_visits():
    def tree(round):
        sides = answered("7", correct=True), answered("8", correct=False)
        return make_tree(code(f"a = {round}", code("b = 2", *sides)), wrong("c = 3"), round=round)

    shape = build([tree(1), tree(2)], pair_rounds="all", **NO_SPLIT).manifest["shape"]
    # behind nothing: a (+1 -1)/2 against c; behind a and b: 7 against 8
    assert shape["step_pairs"] == {"1": {"0": 1, "2": 1}, "2": {"0": 1, "2": 1}}
    # twice: a and b; once: c and the three last codes
    assert shape["node_visits"] == {"1": {"1": 4, "2": 2}, "2": {"1": 4, "2": 2}}


def test_choice_of_one_problem_is_what_the_dataset_takes():
    trees = [make_tree(right(f"a = {i}"), wrong(f"b = {i}"), index=i) for i in range(3)]
    dataset = build(trees, **NO_SPLIT)
    chosen = choose_of_problem(
        trees[::-1], template=SHORT_TEMPLATE, config=DatasetConfig(**NO_SPLIT)
    )
    assert chosen.pairs == dataset.pairs_train
    assert [t.mean_q for t in chosen.trajectories] == [e.mean_q for e in dataset.sft_train]
    assert not chosen.held_out


def test_selection_that_fails_leaves_the_dataset_before_it(tmp_path):
    config = DatasetConfig(**NO_SPLIT)
    before = select_dataset(
        [make_tree(right("a = 1"))], tmp_path, template=SHORT_TEMPLATE, config=config
    )

    def trees():
        yield make_tree(right("b = 2"))
        raise RuntimeError("a tree that cannot be read")

    with pytest.raises(RuntimeError, match="cannot be read"):
        select_dataset(trees(), tmp_path, template=SHORT_TEMPLATE, config=DatasetConfig())
    assert read_manifest(tmp_path) == json.loads(json.dumps(before))
    assert not list(tmp_path.glob(".*"))


def test_what_no_file_can_hold_is_left_out_and_counted():
    tree = make_tree(
        right("a = '\ud800'"), right("b = 2"), wrong("c = 3"), problem=make_problem("good")
    )
    lost = make_tree(right("a = 1"), wrong("b = 2"), problem=make_problem("lost", text="\ud800?"))
    steps = tuple(parse_response("<answer>It is \\boxed{7}<end_of_answer>"))
    given = [
        Demonstration(id="d1", level="gsm", problem="1?", steps=steps),
        Demonstration(id="d2", level="gsm", problem="\udfff?", steps=steps),
        Demonstration(id="d3", level="gsm", problem="3?", steps=()),
    ]
    dataset = build([tree, lost], demonstrations=given, trajectories_per_problem=1, **NO_SPLIT)

    assert [example.problem_id for example in dataset.sft_train] == ["good", "d1"]
    assert "b = 2" in solution(dataset.sft_train[0])
    assert {pair.problem_id for pair in dataset.pairs_train} == {"good"}
    counts, excluded = dataset.manifest["counts"]["gsm"], dataset.manifest["excluded"]["gsm"]
    assert (counts["solved"], counts["trajectories_correct"], counts["sft_train"]) == (2, 3, 2)
    # one trajectory of each problem and a demonstration; a step and a whole solution of each
    assert excluded == {"beyond_top": 0, "empty": 1, "unrenderable": 3, "unrenderable_pair": 4}
