"""Checkpoints on a node's own disk: copied once a node, then read by all its replicas.

    replica 1 --lock--> not here: copy, check, rename --> holds it --> reads
    replica 2 --waits----------------------------------> holds it --> reads
    next version: the copy that nobody holds any more goes

Thirty-six replicas that map 15 GB each from one file server read in small pieces, all at once and
again for every replica that is replaced; a copy is one sequential read a node.

A copy is named for what it holds: the digest of the checkpoint's record, or else names, sizes and
times of its files. It is written under another name and renamed when it is whole, with its bytes
hashed on the way and compared with the record's digest. Whoever reads it holds a lock on it, which
the kernel drops when the process ends; copies without one are removed when another is wanted. The
whole is locked too, so of replicas that start together one copies and the others wait.

Whatever stands in the way (no room, a disk that fails, a copy that is not what the record says) the
checkpoint is read where it is, and a note says why.

Not covered: one checkpoint cut over several nodes; file systems without `flock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from learner.checkpoint import CheckpointError, recorded_digest

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
STREAMS = 4
"""Files copied at a time: one stream seldom fills a network file system's line."""

SPARE_SHARE = 0.05
"""Of the disk, left free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Where a checkpoint is to be read."""

    path: str
    seconds: float
    """Taken by copying it, or by waiting for whoever did."""
    note: str = ""
    """Why it is read where it was; "" if it is not."""


class Stager:
    """Copies checkpoints to a folder of this machine, for one reader; picklable before its use."""

    def __init__(self, folder: str | Path) -> None:
        """
        Args:
            folder: absolute, on a disk of the machine; made if it is not there. Any number of
                readers, of several runs too, may use it.
        """
        self.folder = Path(folder)
        self._held: IO[str] | None = None
        """Lock on the copy this reader uses."""

    def __call__(self, path: str) -> Staged:
        """Have a checkpoint at hand; blocks while it is copied. Never raises.

        The copy stays until the next call, or the end of the process.

        Args:
            path: checkpoint directory in Hugging Face format.
        """
        began_s = time.monotonic()
        note = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                path = str(self._have(Path(path)))
        except (OSError, CheckpointError) as error:
            note = f"{path} is read where it is and not from {self.folder}: {error}"
            logger.warning("Weights were not staged: %s", note)
        return Staged(path=path, seconds=time.monotonic() - began_s, note=note)

    def _have(self, source: Path) -> Path:
        """The copy of a checkpoint, made if need be; under the folder's lock."""
        sizes = {
            file.relative_to(source): file.stat().st_size
            for file in sorted(source.rglob("*"))
            if file.is_file()
        }
        if not sizes:
            raise CheckpointError("it is empty or missing")
        digest = recorded_digest(source)
        name = digest or _stamp(source, list(sizes))
        copy = self.folder / f"{name}.copy"
        self._leave()
        users = (self.folder / f"{name}.users").open("w")
        fcntl.flock(users, fcntl.LOCK_SH)
        self._held = users
        self._remove_unused()
        if not _is_whole(copy, sizes):
            shutil.rmtree(copy, ignore_errors=True)
            self._copy(source, copy, sizes, digest)
        return copy

    def _copy(self, source: Path, copy: Path, sizes: dict[Path, int], digest: str | None) -> None:
        total, disk = sum(sizes.values()), shutil.disk_usage(self.folder)
        if total > disk.free - SPARE_SHARE * disk.total:
            raise OSError(f"no room for {total / 2**30:.1f} GiB, {disk.free / 2**30:.1f} are free")
        partial = copy.with_suffix(".partial")
        try:
            with ThreadPoolExecutor(STREAMS) as threads:
                found = list(threads.map(lambda file: _copy(source / file, partial / file), sizes))
            if digest is not None:
                whole = hashlib.sha256()
                for file, each in zip(sizes, found, strict=True):
                    whole.update(f"{file.as_posix()}\0{each}\n".encode())
                if whole.hexdigest() != digest:
                    raise CheckpointError("what was read is not what its record says")
            partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _leave(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _remove_unused(self) -> None:
        """Remove copies that nobody reads, and what a copier that died has left."""
        for partial in self.folder.glob("*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for path in self.folder.glob("*.users"):
            with path.open("w") as users, contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(".copy"), ignore_errors=True)
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _stamp(source: Path, files: list[Path]) -> str:
    """Name of a checkpoint without a record: another one once a file of it is written anew."""
    stamp = hashlib.sha256(str(source.resolve()).encode())
    for file in files:
        state = (source / file).stat()
        stamp.update(f"{file.as_posix()}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return stamp.hexdigest()


def _is_whole(copy: Path, sizes: dict[Path, int]) -> bool:
    """Whether all files are there still: who cleans a disk of temporary files takes some."""
    try:
        return all((copy / file).stat().st_size == size for file, size in sizes.items())
    except OSError:
        return False


def _copy(source: Path, target: Path) -> str:
    """Copy one file; returns the SHA-256 of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        os.posix_fadvise(reading.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := reading.read(BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()
