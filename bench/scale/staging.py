"""Four readers of one checkpoint on a throttled disk, with and without staging.

    weights_direct_s        each reads all of it for itself: machines or file systems without a
                            cache in common
    weights_cached_s        each maps it, and what one has read the others find in the page cache
    weights_stage_s         one copies it, all read the copy (`cluster.folder.staging`)
    weights_restart_s       one replica more, when the page cache has forgotten: from the copy
    weights_restart_direct_s   the same without a copy

The disk of the checkpoint is throttled by the kernel, for the readers alone (control group `blkio`
or `io`, which takes root); `weights_throttle_mb_per_s` is 0 where it could not be, and the times
are those of the disk as it is. Copies are read from the same disk unthrottled, as a node's own
would be.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.folder.staging import Stager

READERS = 4
FILES = 4
BLOCK_BYTES = 8 << 20

Read = Callable[[Path, "str | None", Path], None]


def measure(*, mib: int = 320, throttle_mb_per_s: int = 80) -> dict[str, float]:
    """Seconds until the last of four readers has read a made checkpoint.

    Args:
        mib: size of the checkpoint.
        throttle_mb_per_s: that all readers together may read from its disk.
    """
    with tempfile.TemporaryDirectory(prefix="bench-staging-") as name:
        folder = Path(name)
        source = folder / "checkpoint"
        source.mkdir()
        for number in range(FILES):
            with (source / f"model-{number}.safetensors").open("wb") as file:
                for _ in range(mib // FILES):
                    file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
        with _throttled(source, throttle_mb_per_s) as group:
            found: dict[str, float] = {
                "weights_mib": mib,
                "weights_throttle_mb_per_s": throttle_mb_per_s if group else 0,
            }
            for key, read, readers in (
                ("weights_direct_s", _direct, READERS),
                ("weights_cached_s", _mapped, READERS),
                ("weights_stage_s", _staged, READERS),
                ("weights_restart_s", _staged, 1),
                ("weights_restart_direct_s", _mapped, 1),
            ):
                _forget(folder)
                found[key] = round(_seconds(read, readers, source, group, folder / "local"), 2)
    return found


def _seconds(read: Read, readers: int, source: Path, group: str | None, local: Path) -> float:
    context = multiprocessing.get_context("spawn")
    ready, start = context.Semaphore(0), context.Event()
    processes = [
        context.Process(target=_reader, args=(read, ready, start, source, group, local))
        for _ in range(readers)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    began_s = time.monotonic()
    start.set()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a reader failed")
    return time.monotonic() - began_s


def _reader(
    read: Read, ready: Any, start: Any, source: Path, group: str | None, local: Path
) -> None:
    _join(group)
    ready.release()
    start.wait()
    read(source, group, local)


def _direct(source: Path, group: str | None, local: Path) -> None:
    """Around the page cache."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)  # aligned, as O_DIRECT wants it
    for file in sorted(source.iterdir()):
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)


def _mapped(source: Path, group: str | None, local: Path) -> None:
    """As safetensors are read."""
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
            for place in range(0, len(data), BLOCK_BYTES):
                bytes(data[place : place + BLOCK_BYTES])


def _staged(source: Path, group: str | None, local: Path) -> None:
    at_hand = Stager(local)(str(source))
    if at_hand.note:
        raise RuntimeError(at_hand.note)
    if group is not None:
        _join(str(Path(group).parent))  # a node's own disk is not throttled
    _mapped(Path(at_hand.path), group, local)


def _forget(folder: Path) -> None:
    """Drop what the page cache has of all files below."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextmanager
def _throttled(path: Path, mb_per_s: int) -> Iterator[str | None]:
    """A control group whose members read a path's disk so fast at most; None: not possible."""
    device = path.stat().st_dev
    disk, rate = f"{os.major(device)}:{os.minor(device)}", mb_per_s * 10**6
    for base, file, rule in (
        ("/sys/fs/cgroup/blkio", "blkio.throttle.read_bps_device", f"{disk} {rate}"),
        ("/sys/fs/cgroup", "io.max", f"{disk} rbps={rate}"),
    ):
        group = Path(base) / f"bench-staging-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(rule)
        except OSError:
            group.rmdir()
            continue
        try:
            yield str(group)
        finally:
            group.rmdir()
        return
    yield None


def _join(group: str | None) -> None:
    if group is not None:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
