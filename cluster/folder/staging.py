"""Checkpoints and datasets on a node's own disk: copied once a node, read by all who need them.

    replica 1 --lock--> not here: copy, check, rename --> holds it --> reads
    replica 2 --waits----------------------------------> holds it --> reads
    next version: the copy that nobody holds any more goes

What is on a bucket can be read in no other way. What is on a file system need not be copied, but:

Thirty-six replicas that map 15 GB each from one file server read in small pieces, all at once and
again for every replica that is replaced; a copy is one sequential read a node.

A copy is named for what it holds: the digest of the checkpoint's record or the dataset's manifest,
or else names, sizes and times of its files. It is written under another name and renamed when it
is whole, its bytes compared with that digest. Whoever reads it holds a lock on it, which
the kernel drops when the process ends; copies without one are removed when another is wanted. The
whole is locked too, so of replicas that start together one copies and the others wait.

Whatever stands in the way (no room, a disk that fails, a copy that is not what the record says) a
checkpoint on a file system is read where it is, and a note says why; of one on a bucket it is an
error.

Not covered: one checkpoint cut over several nodes; file systems without `flock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from learner.checkpoint import CheckpointError, recorded_digest
from learner.dataset import MANIFEST, read_manifest
from learner.fit import FitRequest
from rollout.run_store import STREAMS, RunStore, StoreError, absolute, address_of

logger = logging.getLogger(__name__)

TELL_S = 10.0
"""Pause between two lines of the log about a copy that is being made."""

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


def default_folder() -> Path:
    """Where copies from buckets go that are given no other place: RSTAR_STAGE, or below /tmp."""
    usual = Path(tempfile.gettempdir()) / f"rstar-staged-{os.getuid()}"
    return Path(os.environ.get("RSTAR_STAGE") or usual)


class Stager:
    """Has checkpoints and datasets at hand on this machine, for one reader; picklable before its
    use."""

    def __init__(self, folder: str | Path | None) -> None:
        """
        Args:
            folder: absolute, on a disk of the machine; made if it is not there. Any number of
                readers, of several runs too, may use it. None: what is on a file system is read
                where it is, copies from buckets go to `default_folder`.
        """
        self.always = folder is not None
        self.folder = Path(folder) if folder is not None else default_folder()
        self._held: dict[str, IO[str]] = {}
        """By name of a copy, the lock on it."""

    def __call__(self, path: str, *, keep: bool = False) -> Staged:
        """Have a checkpoint or dataset at hand; blocks while it is copied.

        The copy stays until the next call, or the end of the process.

        Args:
            path: a directory, or a file, as a path or an address.
            keep: those that were asked for before stay as well.
        Raises:
            CheckpointError: it is on a bucket and cannot be copied.
        """
        if not self.always and address_of(path) is None:
            return Staged(path=path, seconds=0.0)
        began_s = time.monotonic()
        note = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                path = str(self._have(path, keep))
        except (OSError, CheckpointError, StoreError) as error:
            if (address := address_of(path)) is not None:
                raise CheckpointError(f"{address} cannot be had: {error}") from error
            note = f"{path} is read where it is and not from {self.folder}: {error}"
            logger.warning("Weights were not staged: %s", note)
        return Staged(path=path, seconds=time.monotonic() - began_s, note=note)

    def _have(self, path: str, keep: bool) -> Path:
        """The copy of a checkpoint, made if need be; under the folder's lock."""
        source = RunStore(path)
        sizes = source.below_all("")
        if not sizes:
            raise CheckpointError("it is empty or missing")
        digest = recorded_digest(path)
        files: dict[str, str] = {}
        if digest is None and MANIFEST in sizes and (said := read_manifest(path)) is not None:
            digest = said["digest"]
            files = {f"{name}.parquet": file["sha256"] for name, file in said["files"].items()}
        name = digest or _stamp(source, list(sizes))
        copy = self.folder / f"{name}.copy"
        if not keep:
            self._leave()
        if name not in self._held:
            users = (self.folder / f"{name}.users").open("w")
            fcntl.flock(users, fcntl.LOCK_SH)
            self._held[name] = users
        self._remove_unused()
        alone = source.root.rpartition("/")[2] if list(sizes) == [""] else ""
        here = {alone or name: size for name, size in sizes.items()}
        if not _is_whole(copy, here):
            shutil.rmtree(copy, ignore_errors=True)
            self._copy(source, copy, sizes, alone, digest, files)
        return copy / alone

    def _copy(
        self,
        source: RunStore,
        copy: Path,
        sizes: dict[str, int],
        alone: str,
        digest: str | None,
        files: dict[str, str],
    ) -> None:
        total, disk = sum(sizes.values()), shutil.disk_usage(self.folder)
        if total > disk.free - SPARE_SHARE * disk.total:
            raise OSError(f"no room for {total / 2**30:.1f} GiB, {disk.free / 2**30:.1f} are free")
        partial = copy.with_suffix(".partial")
        done = 0
        told_s = time.monotonic()
        found: dict[str, str] = {}
        try:
            with ThreadPoolExecutor(STREAMS) as threads:
                each = threads.map(lambda f: _copy(source, f, partial / (f or alone)), sizes)
                for file, sha256 in zip(sizes, each, strict=True):
                    found[file] = sha256
                    done += sizes[file]
                    if time.monotonic() - told_s > TELL_S:
                        told_s = time.monotonic()
                        logger.info(
                            "Copied %.1f of %.1f GiB of %s",
                            done / 2**30,
                            total / 2**30,
                            source.root,
                        )
            whole = "".join(f"{file}\0{sha256}\n" for file, sha256 in found.items())
            same = digest is None or digest == hashlib.sha256(whole.encode()).hexdigest()
            if files:  # of a dataset, whose digest is made otherwise
                same = files.items() <= found.items()
            if not same:
                raise CheckpointError("what was read is not what its record says")
            partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _leave(self) -> None:
        held, self._held = self._held, {}
        for lock in held.values():
            lock.close()

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


def _stamp(source: RunStore, files: list[str]) -> str:
    """Name of a checkpoint without a record: another one once a file of it is written anew."""
    stamp = hashlib.sha256(source.root.encode())
    for file in files:
        stamp.update(f"{file}\0{source.stamp(file)}\n".encode())
    return stamp.hexdigest()


def _is_whole(copy: Path, sizes: dict[str, int]) -> bool:
    """Whether all files are there still: who cleans a disk of temporary files takes some."""
    try:
        return all((copy / file).stat().st_size == size for file, size in sizes.items())
    except OSError:
        return False


def _copy(source: RunStore, file: str, target: Path) -> str:
    """Copy one file; returns the SHA-256 of what was read."""
    source.fetch(file, target)
    with target.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


_of_process: Stager | None = None


def at_hand(place: Path) -> Path:
    """Where this process can read a model, a dataset or a file: there, or a copy of what is on a
    bucket, which stays until the process ends.

    Raises:
        CheckpointError: it cannot be copied.
    """
    global _of_process
    if address_of(place) is None:
        return place
    if _of_process is None:
        _of_process = Stager(None)
    return Path(_of_process(str(place), keep=True).path)


def staged_request(request: FitRequest, stage: Stager) -> FitRequest:
    """A fit that reads copies on this machine of what is on a bucket.

    Raises:
        CheckpointError: one cannot be had.
    """
    copies: dict[str, str] = {}
    for place in filter(None, (request.base, request.data, request.previous)):
        if address_of(place) is not None:
            copies[place] = stage(place, keep=bool(copies)).path
    return replace(
        request,
        base=copies.get(request.base, request.base),
        data=copies.get(request.data, request.data),
        previous=copies.get(request.previous or "", request.previous),
        origins={copy: absolute(place) for place, copy in copies.items()},
    )
