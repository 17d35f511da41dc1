"""Problems on disk: read one by one, shared by rounds, damage named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rollout import stored_problems
from rollout.files import replacing
from rollout.problem import Level, Problem
from rollout.run_store import RunStore, StoreError
from rollout.stored_problems import StoredProblems, remove_blocks
from tests.builders import make_problem


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_problems, "BLOCK", 4)


PROBLEMS = [
    Problem(
        id=f"p{n}",
        source="numina",
        level=Level.OLYMPIAD,
        text=f"How many\nare {n} \udc80 \u2028?",
        answer=str(n),
        answers_alt=(f"{n}.0",) if n % 2 else (),
        rewording_of="p0" if n == 3 else "",
    )
    for n in range(10)
]


def test_problems_come_back_as_they_were(store: RunStore) -> None:
    stored = StoredProblems.write(store, PROBLEMS)
    assert [stored[problem.id] for problem in PROBLEMS] == PROBLEMS
    assert list(stored) == [problem.id for problem in PROBLEMS] and len(stored) == 10
    assert stored.get("other") is None and "other" not in stored
    with pytest.raises(KeyError, match="other"):
        stored["other"]


def test_they_travel_as_an_index(tmp_path: Path) -> None:
    problems = [make_problem(f"p{n}", text="How many? " * 50) for n in range(3000)]
    stored = StoredProblems.write(RunStore(tmp_path), problems)
    sent = pickle.dumps(stored)
    assert len(sent) < 3000 * 12 + 750 * 80 + 2000  # of 750 blocks the names
    assert pickle.loads(sent)["p2999"] == problems[2999]


def test_ids_of_one_hash_are_told_apart(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_problems, "_hash", lambda problem_id: len(problem_id))
    stored = StoredProblems.write(store, PROBLEMS)
    assert [stored[problem.id] for problem in PROBLEMS] == PROBLEMS
    assert "p99" not in stored and "pq" not in stored


def test_problems_that_stand_together_are_read_together(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredProblems.write(store, PROBLEMS)
    reads: list[str] = []
    read = RunStore.read
    monkeypatch.setattr(RunStore, "read", lambda self, path: reads.append(path) or read(self, path))
    assert [stored[f"p{n}"].answer for n in (4, 5, 6, 7)] == ["4", "5", "6", "7"]
    assert len(reads) == 1


def test_a_second_start_writes_nothing(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    StoredProblems.write(store, PROBLEMS)
    files = store.files("problem_blocks")
    assert len(files) == 3

    def never(*given: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(RunStore, "put", never)
    assert StoredProblems.write(store, PROBLEMS)["p7"] == PROBLEMS[7]
    assert store.files("problem_blocks") == files


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_a_damaged_block_is_named(store: RunStore, damage: str) -> None:
    stored = StoredProblems.write(store, PROBLEMS)
    (path, *_) = [p for p in store.files("problem_blocks") if stored._blocks[0] in p]
    (other, *_) = [p for p in store.files("problem_blocks") if stored._blocks[1] in p]
    if damage == "missing":
        store.delete(path)
    else:
        store.put(path, store.read(path)[:-9] if damage == "cut off" else store.read(other))
    why = {"missing": "is missing", "cut off": "cannot be read", "changed": "has changed"}
    with pytest.raises(StoreError, match=f"{path} .*{why[damage]}"):
        stored["p0"]


def test_blocks_go_and_what_a_killed_writer_left_of_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    remove_blocks(store)  # there are none
    StoredProblems.write(store, PROBLEMS)
    folder = tmp_path / "problem_blocks"
    with replacing(folder / "killed.jsonl.z") as hidden:
        hidden.touch()
    hidden.write_bytes(b"half")
    assert store.unfinished("problem_blocks")
    store.put("run.json", b"{}")
    remove_blocks(store)
    assert list(folder.iterdir()) == [] and store.exists("run.json")
    assert StoredProblems.write(store, PROBLEMS)["p7"] == PROBLEMS[7]


def test_no_problems_are_none(store: RunStore) -> None:
    stored = StoredProblems.write(store, [])
    assert len(stored) == 0 and "p0" not in stored
