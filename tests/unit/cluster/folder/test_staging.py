"""Checkpoints copied to a node's own disk: once, whole, and never in the way."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from cluster.folder import staging
from cluster.folder.staging import Staged, Stager
from learner.checkpoint import CheckpointStore
from rollout.run_store import RunStore

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 5000,
    "sub-a.json": b"after what is in sub, in the order of paths",
    "sub/tokenizer.json": b"t",
}


def write(folder: Path, **other: bytes) -> None:
    for name, data in (FILES | {"model.safetensors": other.get("weights", b"w" * 5000)}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model from elsewhere, without a record."""
    write(tmp_path / "base")
    return tmp_path / "base"


def published(root: Path, round: int) -> str:
    weights = str(round).encode() * 5000
    return CheckpointStore(root).publish("policy", round, lambda p: write(p, weights=weights)).path


def contents(path: str) -> dict[str, bytes]:
    root = Path(path)
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_copy_holds_the_same_files_and_is_used_again(base: Path, tmp_path: Path) -> None:
    stager = Stager(tmp_path / "local")
    first = stager(str(base))
    assert Path(first.path).parent == tmp_path / "local" and first.note == ""
    assert contents(first.path) == FILES
    written_ns = Path(first.path, "config.json").stat().st_mtime_ns
    second = Stager(tmp_path / "local")(str(base))
    assert second.path == first.path
    assert Path(first.path, "config.json").stat().st_mtime_ns == written_ns


def _stage_at(path: Path, folder: Path, start: Any, out: Any) -> None:
    copied = []
    inner = staging._copy
    staging._copy = lambda source, file, target: (copied.append(file), inner(source, file, target))[
        1
    ]
    start.wait()
    stager = Stager(folder)
    out.put((stager(str(path)), len(copied)))
    time.sleep(0.5)


def test_of_readers_that_start_together_one_copies(tmp_path: Path) -> None:
    path = Path(published(tmp_path / "checkpoints", 1))
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(4), context.Queue()
    arguments = (path, tmp_path / "local", start, out)
    processes = [context.Process(target=_stage_at, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found: list[tuple[Staged, int]] = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({staged.path for staged, _ in found}) == 1
    assert sorted(copied for _, copied in found) == [0, 0, 0, 4]
    assert {staged.note for staged, _ in found} == {""}


def test_a_copy_goes_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    paths = [published(tmp_path / "checkpoints", number) for number in (1, 2, 3)]
    local = tmp_path / "local"
    one, other = Stager(local), Stager(local)
    first = [one(paths[0]).path, other(paths[0]).path]
    second = one(paths[1]).path
    assert copies(local) == sorted(Path(p).name for p in {*first, second})  # `other` reads it yet
    other(paths[1])
    assert copies(local) == [Path(second).name]
    third = one(paths[2]).path
    other(paths[2])
    assert copies(local) == [Path(third).name]
    assert contents(third)["model.safetensors"] == b"3" * 5000


def test_what_a_copier_that_died_has_left_goes(base: Path, tmp_path: Path) -> None:
    (tmp_path / "local" / "x.partial").mkdir(parents=True)
    staged = Stager(tmp_path / "local")(str(base))
    assert copies(tmp_path / "local") == [Path(staged.path).name]


def test_a_copy_that_lost_a_file_is_made_anew(base: Path, tmp_path: Path) -> None:
    stager = Stager(tmp_path / "local")
    Path(stager(str(base)).path, "model.safetensors").unlink()
    assert contents(stager(str(base)).path) == FILES


def test_a_model_that_was_written_anew_is_copied_anew(base: Path, tmp_path: Path) -> None:
    stager = Stager(tmp_path / "local")
    before = stager(str(base)).path
    write(base, weights=b"v" * 5000)
    os.utime(base / "model.safetensors", ns=(1, 1))
    after = stager(str(base)).path
    assert after != before and contents(after)["model.safetensors"] == b"v" * 5000


def test_bytes_that_are_not_what_the_record_says_are_not_used(tmp_path: Path) -> None:
    path = published(tmp_path / "checkpoints", 1)
    Path(path, "model.safetensors").write_bytes(b"x" * 5000)
    staged = Stager(tmp_path / "local")(path)
    assert staged.path == path
    assert "what was read is not what its record says" in staged.note
    assert copies(tmp_path / "local") == []


def test_without_room_the_checkpoint_is_read_where_it_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**5, 0, 9000))
    staged = Stager(tmp_path / "local")(str(base))
    assert staged.path == str(base) and "no room for" in staged.note


def test_a_disk_that_fills_up_while_copying_leaves_nothing_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: RunStore, file: str, target: Path) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "_copy", full)
    staged = Stager(tmp_path / "local")(str(base))
    assert staged.path == str(base) and "No space left on device" in staged.note
    assert copies(tmp_path / "local") == []


def test_a_missing_checkpoint_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    staged = Stager(tmp_path / "local")(str(tmp_path / "absent"))
    assert staged.path == str(tmp_path / "absent") and "empty or missing" in staged.note


def test_a_stager_travels_to_its_actor(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(Stager(tmp_path))).folder == tmp_path
