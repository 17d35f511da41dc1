"""The store: whole files, and keys that are created once."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rollout import run_store
from rollout.run_store import RunStore, StoreError, absolute, address_of


class _Overwriting(MemoryFileSystem):
    """A store whose conditional create is ignored, as some clients do."""

    protocol = "overwriting"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        super().pipe_file(path, value, mode="overwrite")


class _TwoStep(MemoryFileSystem):
    """A store that inherits the check-then-write create."""

    protocol = "twostep"
    pipe_file = fsspec.AbstractFileSystem.pipe_file


for kind in (_Overwriting, _TwoStep):
    fsspec.register_implementation(str(kind.protocol), kind, clobber=True)


# -- any store


def test_what_is_put_is_read_and_listed(store: RunStore) -> None:
    store.put("a/x.bin", b"one")
    store.put("a/x.bin", b"two")
    store.put("a/y.bin", b"three")
    store.put("a/b/z.bin", b"four")
    assert store.read("a/x.bin") == b"two"
    assert store.read_many(["a/x.bin", "a/y.bin"]) == {"a/x.bin": b"two", "a/y.bin": b"three"}
    assert store.files("a") == ["a/x.bin", "a/y.bin"]
    assert store.folders("a") == ["b"]
    assert store.files("nowhere") == [] and store.folders("nowhere") == []
    assert store.exists("a/x.bin") and not store.exists("a/w.bin")
    store.delete("a/x.bin")
    store.delete("a/x.bin")
    assert store.files("a") == ["a/y.bin"]
    with pytest.raises(FileNotFoundError):
        store.read("a/x.bin")


def test_a_run_keeps_its_id(store: RunStore) -> None:
    first = store.identify()
    assert first and RunStore(store.root).identify() == first
    again = RunStore(store.root, run_id=first, backoff_s=0)
    again.check_run()
    again.put("a", b"1")
    assert again.create("b", b"2") and again.read("a") == b"1"


def test_a_store_of_another_run_is_refused(store: RunStore) -> None:
    store.put("something", b"")
    wanted = RunStore(store.root, run_id="wanted", backoff_s=0)
    where = f"on machine {socket.gethostname()}, .*'wanted' .*have every machine mount"
    with pytest.raises(StoreError, match=rf"{store.root} has no run\.id {where}"):
        wanted.check_run()
    other = store.identify()
    with pytest.raises(
        StoreError, match=rf"{store.root} is of another run \(run\.id: '{other}'\) "
    ):
        wanted.check_run()


def test_a_folder_that_is_not_the_runs_is_never_made_or_written(tmp_path: Path) -> None:
    """A machine without the mount, and one whose mount goes while it works."""
    wanted = RunStore(tmp_path / "mount" / "run", run_id="wanted", backoff_s=0)
    for write in (wanted.check_run, lambda: wanted.put("a", b""), lambda: wanted.create("a", b"")):
        with pytest.raises(StoreError, match="mount/run is not there on machine"):
            write()
    assert not (tmp_path / "mount").exists()
    run = RunStore(tmp_path / "mount" / "run", backoff_s=0)
    run.identify()
    (tmp_path / "mount").rename(tmp_path / "gone")
    with pytest.raises(StoreError, match="is not there"):
        run.put("a", b"")
    (tmp_path / "gone").rename(tmp_path / "mount")
    run.put("a", b"")


def test_a_key_is_created_once(store: RunStore) -> None:
    assert store.create("c/k.json", b"first")
    assert not store.create("c/k.json", b"second")
    assert store.read("c/k.json") == b"first"


def test_self_check_accepts_and_leaves_nothing(store: RunStore) -> None:
    store.self_check()
    assert store.files(".self-check") == []


def test_a_pickled_store_is_the_same_store(store: RunStore) -> None:
    store.put("a.bin", b"here")
    assert pickle.loads(pickle.dumps(store)).read("a.bin") == b"here"


def test_one_of_many_threads_creates_a_local_key(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    barrier = threading.Barrier(8)
    wins = []

    def create(number: int) -> None:
        barrier.wait()
        if store.create("k", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.read("k") == str(wins[0]).encode()
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


# -- stores that are refused


def test_a_store_whose_second_create_succeeds_is_refused() -> None:
    with pytest.raises(StoreError, match="lets a key be created twice"):
        RunStore("overwriting://x/run").self_check()


def test_a_store_without_atomic_create_is_refused() -> None:
    with pytest.raises(StoreError, match="_TwoStep has no atomic create"):
        RunStore("twostep://x/run").self_check()


def test_a_root_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot create .*file/run: NotADirectory"):
        RunStore(tmp_path / "file" / "run").self_check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_root_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="no permission"):
            RunStore(tmp_path / "run").self_check()
    finally:
        tmp_path.chmod(0o700)


def test_missing_permission_is_said_and_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(target: Path, data: bytes, *, durable: bool) -> None:
        calls.append(target)
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(run_store, "atomic_write", refuse)
    with pytest.raises(StoreError, match=r"^store: no permission: cannot write a\.bin of "):
        RunStore(tmp_path, backoff_s=0).put("a.bin", b"")
    assert len(calls) == 1


# -- failures that pass


def test_a_full_disk_is_retried_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.ENOSPC, "No space left on device")] * 2
    write = run_store.atomic_write

    def flaky(target: Path, data: bytes, *, durable: bool) -> None:
        if failures:
            raise failures.pop()
        write(target, data, durable=durable)

    monkeypatch.setattr(run_store, "atomic_write", flaky)
    monkeypatch.setattr(run_store, "NUM_ATTEMPTS", 3)
    RunStore(tmp_path, backoff_s=0).put("a.bin", b"here")
    assert (tmp_path / "a.bin").read_bytes() == b"here"
    failures += [OSError(errno.ENOSPC, "No space left on device")] * 3
    with pytest.raises(StoreError, match=r"^store: no space left: cannot write b\.bin .* 3 tries"):
        RunStore(tmp_path, backoff_s=0).put("b.bin", b"")


def test_a_write_that_breaks_off_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="cannot create k"):
        RunStore(tmp_path, backoff_s=0).create("k", b"half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "address", "whole"),
    [
        ("s3://bucket/run", "s3://bucket/run", "s3://bucket/run"),
        (Path("s3://bucket/run"), "s3://bucket/run", "s3://bucket/run"),
        (Path("gs://b") / "runs" / "x", "gs://b/runs/x", "gs://b/runs/x"),
        ("/mnt/runs/x", None, "/mnt/runs/x"),
        ("file:///mnt/x", None, "/mnt/x"),
        ("c:/x", None, str(Path("c:/x").absolute())),
    ],
)
def test_address_is_known_also_by_what_a_path_makes_of_it(
    place: str | Path, address: str | None, whole: str
) -> None:
    assert address_of(place) == address
    assert absolute(place) == whole


def test_store_below_has_its_own_root_and_no_id(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.identify()
    below = store.below("a/b")
    below.put("c", b"1")
    assert store.read("a/b/c") == b"1" and below.run_id is None
    assert (store.local, below.local) == (tmp_path, tmp_path / "a" / "b")


def test_folder_is_uploaded_its_last_file_last_and_found_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "manifest.json").write_bytes(b"{}")
    (source / "sub" / "data").write_bytes(b"12")
    store = RunStore(tmp_path / "store")
    written: list[str] = []
    put_file = RunStore.put_file

    def noted(self: RunStore, path: str, file: Path) -> None:
        assert not self.exists("manifest.json")
        written.append(path)
        put_file(self, path, file)

    store.put("set/manifest.json", b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunStore, "put_file", noted)
        store.upload(source, "set", last="manifest.json")
    assert written == ["sub/data", "manifest.json"]
    assert store.below_all("set") == {"manifest.json": 2, "sub/data": 2}
    store.fetch("set/sub/data", tmp_path / "there" / "data")
    assert (tmp_path / "there" / "data").read_bytes() == b"12"
    before = store.stamp("set/sub/data")
    store.put("set/sub/data", b"123")
    assert store.stamp("set/sub/data") != before and store.sizes("set/sub") == {"set/sub/data": 3}
    assert store.read("set/sub/data", start=1) == b"23"
    store.delete_folder("set")
    store.delete_folder("set")
    assert store.below_all("set") == {}
