"""Regrading a run: exactly once, resumed after a kill, read by everybody afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs import regrade as regrade_module
from cluster.runs.regrade import print_regrade, regrade_run, run_regrade, stale_datasets
from learner.select import DatasetConfig, select_dataset
from rollout.problem import Level
from rollout.prompt import SHORT_TEMPLATE
from rollout.store import RunStore, StoreError, TrajectoryStore
from rollout.tree import Tree
from tests.builders import answered, code, make_problem, make_tree
from tests.datasets import Rows, selected
from verifier import GRADER_VERSION

SHARDS = ("a", "b", "c")


def planted(id: str, level: Level) -> Tree:
    """A tree of an older grader that took the right answer (7) for wrong and 8 for right."""
    tree = make_tree(
        code("x = 1", answered("7", correct=False)),
        code("x = 2", answered("8", correct=True)),
        problem=make_problem(id, level=level),
        round=1,
    )
    for node in tree.answers():
        node.verdict = "exact" if node.correct else "different"
    tree.grader_version = "answers-0"
    return tree


def sound(id: str) -> Tree:
    tree = make_tree(
        code("x = 1", answered("7", correct=True)),
        code("x = 2", answered("9", correct=False)),
        problem=make_problem(id),
        round=1,
    )
    for node in tree.answers():
        node.verdict = "exact" if node.correct else "different"
    tree.grader_version = "answers-0"
    return tree


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished round of three shards whose verdicts are partly wrong."""
    trees = TrajectoryStore(RunStore(tmp_path), 1)
    wrong = make_tree(
        code("x = 1", answered("8", correct=True)), problem=make_problem("only-wrong"), round=1
    )
    wrong.grader_version = "answers-0"
    trees.commit("a", [planted("p1", Level.GSM), sound("p2")], info={"grader": "answers-0"})
    trees.commit("b", [planted("p3", Level.MATH)])
    trees.commit("c", [wrong])
    trees.seal()
    folder = RunFolder(tmp_path)
    folder.write_problems([make_problem(i) for i in ("p1", "p2", "only-wrong")])
    return tmp_path


def files(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent.name != "drivers"
    }


def test_planted_verdicts_are_put_right_and_reported(run: Path) -> None:
    before = files(run)
    (result,) = regrade_run(run)
    assert (result.generation, result.written) == (1, True)
    assert (result.answers, result.solved_before, result.solved) == (7, 4, 3)
    assert result.by_level()["all"] == {"to_right": 2, "to_wrong": 3, "reason_only": 0}
    assert result.by_level()["math"] == {"to_right": 1, "to_wrong": 1, "reason_only": 0}
    assert result.from_graders == ("answers-0",) and result.grader == GRADER_VERSION
    trees = {tree.problem.id: tree for tree in TrajectoryStore(RunStore(run), 1).trees()}
    right = {
        i: {n.step.answer: n.correct for n in tree.answers() if n.step is not None}
        for i, tree in trees.items()
    }
    assert right == {
        "p1": {"7": True, "8": False},
        "p2": {"7": True, "9": False},
        "p3": {"7": True, "8": False},
        "only-wrong": {"8": False},
    }
    assert {tree.grader_version for tree in trees.values()} == {GRADER_VERSION}
    now = files(run)
    assert all(now[name] == data for name, data in before.items())
    lines = (run / "regrades/round=1-0001.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert json.loads(lines[0])["problem_id"] == "p1"


def test_markers_totals_and_solved_problems_are_those_of_the_newest_verdicts(run: Path) -> None:
    trees = TrajectoryStore(RunStore(run), 1)
    assert trees.solved() == {"p1", "p2", "p3", "only-wrong"}
    regrade_run(run)
    assert trees.solved() == {"p1", "p2", "p3"}
    manifest = trees.manifest()
    assert manifest is not None and manifest.totals.solved == 3
    assert trees.commits(generation=0)["c"].totals.solved == 1
    assert trees.seal() == manifest


def test_the_second_time_nothing_changes(run: Path) -> None:
    first = regrade_run(run)
    before = files(run)
    again = regrade_run(run)
    assert files(run) == before
    assert [r.written for r in again] == [False]
    assert again[0].changes == first[0].changes


def test_a_round_of_this_grader_is_left_alone(tmp_path: Path) -> None:
    trees = TrajectoryStore(RunStore(tmp_path), 1)
    trees.commit("a", [sound("p1")], info={"grader": GRADER_VERSION})
    trees.seal()
    (result,) = regrade_run(tmp_path)
    assert (result.generation, result.written) == (0, False)
    assert not (tmp_path / "regrades").exists()


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_kill_anywhere_is_made_up_for(
    run: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, total: int) -> None:
        if done > after:
            raise KeyboardInterrupt

    def killed_at_the_seal(self: Any, generation: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if after == 3:
            patch.setattr(TrajectoryStore, "seal_regrade", killed_at_the_seal)
        regrade_run(run, on_shard=lambda number: killed)
    trees = TrajectoryStore(RunStore(run), 1)
    assert trees.generation() == 0 and trees.solved() == {"p1", "p2", "p3", "only-wrong"}
    graded = []
    original = regrade_module.regrade_table

    def counted(table: Any, **more: Any) -> Any:
        graded.append(table)
        return original(table, **more)

    monkeypatch.setattr(regrade_module, "regrade_table", counted)
    (result,) = regrade_run(run)
    assert len(graded) == len(SHARDS) - min(after + 1, 3)
    assert (result.generation, result.solved, len(result.changes)) == (1, 3, 5)


def test_a_kill_between_seal_and_report_still_reports(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(regrade_module, "_write_record", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            regrade_run(run)
    (result,) = regrade_run(run)
    assert (result.written, len(result.changes)) == (False, 5)
    assert (run / "regrades/round=1-0001.json").exists()


def test_data_that_a_killed_writer_left_is_removed_with_the_seal(run: Path) -> None:
    left = run / "trajectories/round=1/regrades/0001/data/a-dead.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    regrade_run(run)
    assert not left.exists()
    assert len(list(left.parent.iterdir())) == len(SHARDS)


def test_orphans_are_looked_for_among_the_searches_own_files(run: Path) -> None:
    regrade_run(run)
    trees = TrajectoryStore(RunStore(run), 1)
    assert trees.remove_orphans(older_than_s=-1e9, now_unix_s=2e9) == []
    assert len(list((run / "trajectories/round=1/data").iterdir())) == len(SHARDS)


def test_each_grader_writes_its_own_generation(run: Path) -> None:
    regrade_run(run, grader="answers-1")
    (result,) = regrade_run(run, grader="answers-2")
    assert (result.generation, result.from_graders) == (2, ("answers-1",))
    assert result.changes == ()
    trees = TrajectoryStore(RunStore(run), 1)
    assert {tree.grader_version for tree in trees.trees()} == {"answers-2"}


def test_what_an_older_grader_left_unfinished_is_not_mixed_in(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.store.LISTING_S", 0.0)
    trees = TrajectoryStore(RunStore(run), 1)
    assert trees.begin_regrade("answers-1") == 1
    assert trees.begin_regrade("answers-1") == 1
    assert trees.begin_regrade("answers-2") == 2
    with pytest.raises(StoreError, match="3 shards are not graded, the first is a"):
        trees.seal_regrade(2)
    (result,) = regrade_run(run, grader="answers-2")
    assert result.generation == 2
    assert trees.generation() == 2


def test_coverage_and_stage_records_follow(run: Path) -> None:
    folder = RunFolder(run)
    folder.record_stage(1, "rollout", 3.0, solved=4, deaths={})
    folder.write("lineage/round=1.json", {"round": 1})
    folder.write(
        "report.json",
        {"rounds": [{"round": 1, "coverage": {}, "coverage_so_far": {}, "greedy": {"all": 0.5}}]},
    )
    regrade_run(run)
    stage = folder.stage(1, "rollout")
    assert (stage["seconds"], stage["solved"], stage["deaths"]) == (3.0, 3, {})
    assert stage["totals"]["solved"] == 3
    report = folder.read("report.json")
    assert report is not None
    assert report["rounds"][0]["coverage"]["all"] == pytest.approx(2 / 3)
    assert report["rounds"][0]["greedy"] == {"all": 0.5}
    lineage = folder.read("lineage/round=1.json")
    assert lineage is not None and lineage["regraded"]["verdicts_turned"] == 5


def test_learner_selects_by_the_new_verdicts(run: Path) -> None:
    def select() -> Rows:
        return selected(
            TrajectoryStore(RunStore(run), 1).trees(), config=DatasetConfig(validation_share=0.0)
        )

    def answers(dataset: Rows) -> dict[str, str]:
        return {e.problem_id: e.segments[-1].text[-24:] for e in dataset.sft_train}

    assert "8" in answers(select())["p1"]
    regrade_run(run)
    after = select()
    assert "7" in answers(after)["p1"] and "only-wrong" not in answers(after)
    # Q-values are the search's own and contradict the new verdicts: such pairs are dropped.
    assert {pair.problem_id for pair in after.pairs_train} == {"p2"}


def test_a_dataset_of_earlier_verdicts_is_named(run: Path) -> None:
    def select(number: int, info: dict[str, object]) -> None:
        folder, config = run / f"datasets/round={number}", DatasetConfig()
        select_dataset((), folder, template=SHORT_TEMPLATE, config=config, info=info)

    select(0, {"rounds": []})
    select(1, {"rounds": [1]})
    assert stale_datasets(run) == []
    regrade_run(run)
    assert stale_datasets(run) == [1]
    select(1, {"rounds": [1], "verdicts": {"1": 1}})
    assert stale_datasets(run) == []


def test_what_changed_is_printed(run: Path) -> None:
    console = Console(record=True, width=130)
    run_regrade(run, console)
    text = console.export_text()
    assert f"graded by answers-0, now by {GRADER_VERSION}; 0 more answers" in text
    assert "+2 -3" in text and "4 -> 3" in text
    assert "round 1 p1 tree 0 node 4: '7' for '7': wrong (different) -> right (exact)" in text
    console = Console(record=True, width=130)
    print_regrade(run, regrade_run(run), console)
    assert "nothing to do" in console.export_text()


def test_a_run_without_a_finished_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such run folder"):
        regrade_run(tmp_path / "none")
    TrajectoryStore(RunStore(tmp_path), 1).commit("a", [sound("p1")])
    with pytest.raises(RunFolderError, match="no finished round"):
        regrade_run(tmp_path)


def test_a_changed_file_is_an_error_and_nothing_is_sealed(run: Path) -> None:
    path = next((run / "trajectories/round=1/data").glob("b-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="has changed since it was written"):
        regrade_run(run)
    assert TrajectoryStore(RunStore(run), 1).generation() == 0
