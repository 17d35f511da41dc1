from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.runs import select as select_module
from cluster.runs.regrade import regrade_run
from cluster.runs.select import RoundSelection
from learner.candidates import Recipe, candidates_file
from learner.dataset import read_sft
from learner.pairs import PAIR_PRESETS
from learner.select import DatasetConfig, recipe_of
from rollout.prompt import SHORT_TEMPLATE
from rollout.store import RunStore, StoreError, TrajectoryStore
from rollout.tree import Tree
from tests.builders import answered, code, failed, make_problem, make_tree
from tests.datasets import rows_of, selected
from verifier import Verdict
from verifier.equivalence import Reason


@pytest.mark.parametrize(
    ("rules", "rounds", "found"),
    [
        ({}, [1, 2], {"again": 2, "once": 1}),
        ({"sft_rounds": "this"}, [2], {"again": 2}),
        ({"sft_rounds": "this", "pair_rounds": "all"}, [1, 2], {"again": 2}),
    ],
)
def test_only_rounds_that_may_give_something_are_read(tmp_path, rules, rounds, found):
    store = RunStore(tmp_path / "run")
    for number, names in ((1, ("again", "once")), (2, ("again",))):
        trees = TrajectoryStore(store, number)
        solved = code("a = 7", answered("7", correct=True))
        trees.commit(
            "s",
            [make_tree(solved, problem=make_problem(name), round=number) for name in names],
            info={},
        )
        trees.seal()
    selection = RoundSelection(store, 2)
    manifest = selection.select(
        tmp_path / "data",
        template=SHORT_TEMPLATE,
        config=DatasetConfig(validation_share=0.0, **rules),
    )
    assert manifest["info"]["rounds"] == rounds
    assert {e.problem_id: e.round for e in read_sft(tmp_path / "data", "train")} == found
    assert (selection.trajectories, selection.correct) == (1, 1)


# -- candidates that workers left


def right(source: str):
    return code(source, answered("7", correct=True))


def wrong(source: str):
    return code(source, answered("8", correct=False))


def trees_of(number: int) -> list[Tree]:
    """Of one round: solved twice by one program, solved and not, never solved, searched again."""
    return [
        make_tree(*branches, problem=make_problem(name), round=number, index=index)
        for name, index, branches in (
            (
                "p1",
                0,
                (right("a = 1"), right("a = 1  # again"), wrong(f"b = '{number}, another way'")),
            ),
            ("p2", 0, (wrong("c = 1"), wrong("c = 2"), code("c = 3", failed()))),
            ("p2", 1, (right(f"d = {number}"), wrong("c = 1"), code("e = 1", right("f = 1")))),
            ("p3", 0, (wrong("g = '\ud800'"), right("h = '\ud800'"), right("i = 1"))),
            ("p4", 0, (wrong("j = 1"),)),
        )
    ]


def write_round(store: RunStore, number: int, recipe: Recipe | None) -> list[Tree]:
    """A sealed round of two shards; its trees as they are read back."""
    trees = TrajectoryStore(store, number)
    found = trees_of(number)
    for shard, some in (("s1", found[:3]), ("s2", found[3:])):
        derived = {} if recipe is None else {recipe.name: candidates_file(some, recipe)}
        trees.commit(shard, some, derived=derived)
    trees.seal()
    return list(trees.trees())


def select(store: RunStore, folder: Path, config: DatasetConfig, **options):
    """What a selection of round 2 says, and its rows."""
    selection = RoundSelection(store, 2, **options)
    manifest = selection.select(folder, template=SHORT_TEMPLATE, config=config, valued_steps=True)
    return selection, rows(folder, manifest)


def rows(folder: Path, manifest):
    return asdict(rows_of(folder, manifest | {"info": {}}))


def wanted(trees: list[Tree], config: DatasetConfig):
    """What the trees themselves give."""
    found = asdict(selected(trees, config=config, valued_steps=True))
    return found | {"manifest": found["manifest"] | {"info": {}}}


def forbid_trees(patch: pytest.MonkeyPatch) -> None:
    def fails(self, file, columns=None):
        raise AssertionError("trees are read")

    patch.setattr(TrajectoryStore, "read_table", fails)


CONFIG = DatasetConfig(validation_share=0.3)


def recipe(config: DatasetConfig = CONFIG) -> Recipe:
    return recipe_of(config, SHORT_TEMPLATE, valued_steps=True)


@pytest.mark.parametrize("preset", PAIR_PRESETS)
@pytest.mark.parametrize("sft_rounds", ["all", "newest_solved", "this"])
@pytest.mark.parametrize("pair_rounds", ["all", "newest_solved", "this"])
def test_what_workers_left_gives_the_rows_that_trees_give(
    tmp_path, monkeypatch, preset, sft_rounds, pair_rounds
):
    rules = {"sft_rounds": sft_rounds, "pair_rounds": pair_rounds, "validation_share": 0.3}
    config = DatasetConfig(pairs=PAIR_PRESETS[preset], **rules)
    store = RunStore(tmp_path / "run")
    trees = [t for number in (1, 2) for t in write_round(store, number, recipe(config))]
    if sft_rounds == pair_rounds == "this":
        trees = [tree for tree in trees if tree.round == 2]
    forbid_trees(monkeypatch)
    selection, found = select(store, tmp_path / "data", config)
    assert found == wanted(trees, config)
    assert found["sft_train"] and found["pairs_train"] and found["steps_train"]
    assert not selection.notes()
    assert (selection.trajectories, selection.correct) == (12, 6)


def test_what_is_decided_between_trees_may_change_after_the_search(tmp_path, monkeypatch):
    store = RunStore(tmp_path / "run")
    trees = [t for number in (1, 2) for t in write_round(store, number, recipe())]
    forbid_trees(monkeypatch)
    later = DatasetConfig(
        trajectories_per_problem=4,
        sft_rounds="all",
        pair_rounds="all",
        validation_share=0.0,
        split_seed=3,
        synthetic_sources=("test",),
        min_synthetic_accuracy=0.4,
    )
    selection, found = select(store, tmp_path / "data", later)
    assert found == wanted(trees, later)
    assert not selection.notes()


@pytest.mark.parametrize(
    "later",
    [
        {"pairs": {"min_margin": 1.0}},
        {"pairs": {"best": 1}},
        {"trajectories_per_problem": 5},
    ],
)
def test_what_is_decided_by_tree_reads_them_again_and_says_so(tmp_path, later):
    store = RunStore(tmp_path / "run")
    trees = [t for number in (1, 2) for t in write_round(store, number, recipe())]
    config = DatasetConfig(validation_share=0.3, **later)
    selection, found = select(store, tmp_path / "data", config)
    assert found == wanted(trees, config)
    assert [note.split(" of ")[0] for note in selection.notes()] == [
        "round 1: the trees",
        "round 2: the trees",
    ]
    assert selection.remade == {1: 2, 2: 2}


def test_trees_of_an_earlier_version_are_read_once_where_that_is_kept(tmp_path, monkeypatch):
    store = RunStore(tmp_path / "run")
    trees = [t for number in (1, 2) for t in write_round(store, number, None)]
    before = sorted((tmp_path / "run").rglob("*"))
    selection, found = select(store, tmp_path / "a", CONFIG)
    assert (selection.remade, found) == ({1: 2, 2: 2}, wanted(trees, CONFIG))
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert select(store, tmp_path / "b", CONFIG, keep=True)[0].remade.total() == 4
    forbid_trees(monkeypatch)
    selection, found = select(store, tmp_path / "c", CONFIG)
    assert (selection.notes(), found) == ([], wanted(trees, CONFIG))


def test_verdicts_of_a_regrade_leave_no_stale_candidates(tmp_path):
    store = RunStore(tmp_path / "run")
    for number in (1, 2):
        write_round(store, number, recipe())
    regrade_run(tmp_path / "run", grade=lambda gold, answer: verdict(answer == "8"), grader="new")
    trees = [t for number in (1, 2) for t in TrajectoryStore(store, number).trees()]
    selection, found = select(store, tmp_path / "data", CONFIG, keep=True)
    assert selection.remade == {1: 2, 2: 2}
    assert found == wanted(trees, CONFIG)
    assert "j = 1" in str(found["sft_train"] + found["sft_validation"])
    again, same = select(store, tmp_path / "again", CONFIG)
    assert (again.notes(), same) == ([], found)


def verdict(equal: bool) -> Verdict:
    return Verdict(equal=equal, reason=Reason.EXACT if equal else Reason.DIFFERENT, path="test")


def test_candidates_that_were_changed_are_made_again(tmp_path, caplog):
    store = RunStore(tmp_path / "run")
    trees = [t for number in (1, 2) for t in write_round(store, number, recipe())]
    path = next((tmp_path / "run/trajectories/round=1/derived").rglob("s1-*"))
    path.write_bytes(path.read_bytes()[:-1])
    selection, found = select(store, tmp_path / "data", CONFIG)
    assert (selection.remade, found) == ({1: 1, 2: 0}, wanted(trees, CONFIG))
    assert "its SHA-256 differs" in caplog.text


def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(select_module, "FILES_AT_ONCE", 1)
    store = RunStore(tmp_path / "run")
    write_round(store, 1, recipe())
    write_round(store, 2, None)
    one = select(store, tmp_path / "one", CONFIG, num_processes=1)
    two = select(store, tmp_path / "two", CONFIG, num_processes=2)
    assert (one[0].remade, one[1]) == (two[0].remade, two[1])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_selection_that_is_stopped_ends_and_leaves_nothing(tmp_path, monkeypatch, num_processes):
    monkeypatch.setattr(select_module, "FILES_AT_ONCE", 1)
    store = RunStore(tmp_path / "run")
    for number in (1, 2):
        write_round(store, number, None)
    selection = RoundSelection(store, 2, num_processes=num_processes)
    selection.stop()
    with pytest.raises(RuntimeError, match="was stopped"):
        selection.select(tmp_path / "data", template=SHORT_TEMPLATE, config=CONFIG)
    assert not list((tmp_path / "data").iterdir())


def test_round_that_is_not_finished_is_named(tmp_path):
    store = RunStore(tmp_path / "run")
    write_round(store, 1, None)
    with pytest.raises(StoreError, match=r"round 2 of .* is not finished"):
        select(store, tmp_path / "data", CONFIG)
