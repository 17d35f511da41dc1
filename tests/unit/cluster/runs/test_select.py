from __future__ import annotations

import pytest

from cluster.runs.select import RoundSelection
from learner.dataset import read_sft
from learner.select import DatasetConfig
from rollout.prompt import SHORT_TEMPLATE
from rollout.store import RunStore, TrajectoryStore
from tests.builders import answered, code, make_problem, make_tree


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
