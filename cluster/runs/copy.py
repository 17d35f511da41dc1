"""`rstar copy RUN TO`: a run moved between stores: from a disk to a bucket, or back, or on.

    data --checked by the digests of markers, manifests--> TO   4 files at a time
    markers --> manifests, CURRENT.json --checkpoints checked--> config.yaml, which says it is whole

Both are held, as by a driver. A file that is in TO with the same size is not written again, unless
it is one that is replaced during a run, so a copy that was broken off goes on. Until config.yaml is
there, at the very end, TO is no run to any command. Who had the run (`drivers/`) and its id stay
behind: the copy is another run, with the same content.

Not covered: files that were changed in TO by hand and kept their size.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cluster.folder import lease
from cluster.folder.run_folder import CONFIG, RunFolder, RunFolderError
from cluster.folder.staging import Stager
from learner.checkpoint import CURRENT, CheckpointStore, Kind, directory_digest
from learner.dataset import MANIFEST
from rollout.run_store import RUN_ID, STREAMS, StoreError
from rollout.store import TrajectoryStore, stored_rounds

_LEFT = (f"{lease.FOLDER}/", "ray_train/")
"""Beginnings of what stays behind."""


@dataclass(slots=True, kw_only=True)
class Copied:
    """What a copy did."""

    files: int = 0
    bytes: int = 0
    there: int = 0
    """Files that an earlier copy had brought."""


def copy_run(
    source: RunFolder, target: RunFolder, tell: Callable[[int, int], None] = lambda done, all: None
) -> Copied:
    """Copy a run, or what is left of it; the target may hold nothing else.

    Args:
        tell: told (done, all) bytes.
    Raises:
        RunFolderError: there is no such run, one of the two is in use, or the target is another.
        StoreError: a file is not what its marker, manifest or record says; names it.
    """
    if source.config() is None:
        raise RunFolderError(f"{source.store.root}: not a run: it has no {CONFIG}")
    if source.store.root == target.store.root:
        raise RunFolderError(f"{source.store.root}: a run cannot be copied onto itself")
    with source.locked(), target.locked():
        if target.config() not in (None, source.config()):
            raise RunFolderError(f"{target.store.root}: another run is there")
        sizes = {
            name: size
            for name, size in source.store.below_all("").items()
            if name != RUN_ID and not name.startswith(_LEFT) and "/." not in f"/{name}"
        }
        there = target.store.below_all("")
        left = [name for name in sizes if there.get(name) != sizes[name] or _is_replaced(name)]
        copied = Copied(there=len(sizes) - len(left))
        copied.bytes = sum(sizes[name] for name in sizes.keys() - set(left))
        expected = dict(_digests(source))
        for stage in range(4):
            if stage == 3:
                _check_checkpoints(target)
            some = [name for name in left if _stage(name) == stage]
            with ThreadPoolExecutor(STREAMS) as threads:
                work = threads.map(lambda name: _copy(source, target, name, expected), some)
                for name, _ in zip(some, work, strict=True):
                    copied.files += 1
                    copied.bytes += sizes[name]
                    tell(copied.bytes, sum(sizes.values()))
    return copied


def _stage(name: str) -> int:
    """When a file is copied: what names others comes after them."""
    if name == CONFIG:
        return 3
    if name.endswith((f"/{MANIFEST}", f"/{CURRENT}")):
        return 2
    return 1 if "/commits/" in name else 0


def _is_replaced(name: str) -> bool:
    """False for files that are written once, or whose names tell what is in them."""
    once = ("trajectories/", "evaluations/round=", "problem_blocks/", "checkpoints/")
    return not name.startswith(once) or name.endswith((".json", ".jsonl"))


def _digests(source: RunFolder) -> Iterator[tuple[str, str]]:
    """SHA-256 of files by name, as markers and manifests have them."""
    for number in stored_rounds(source.store, evaluations=True):
        trees = TrajectoryStore(source.store, number)
        for generation in range(trees.generation() + 1):
            for commit in trees.each_commit(trees=False, generation=generation):
                yield commit.path, commit.sha256
    for number in source.rounds("datasets"):
        for name, file in (source.dataset_manifest(number) or {"files": {}})["files"].items():
            yield f"datasets/round={number}/{name}.parquet", file["sha256"]


def _check_checkpoints(folder: RunFolder) -> None:
    """Read every published checkpoint where it now is, and compare it with its record."""
    store = CheckpointStore(folder.checkpoints)
    for number in folder.rounds("checkpoints"):
        for kind in get_args(Kind):
            checkpoint = store.current(kind, number)
            if checkpoint is None:
                continue
            with tempfile.TemporaryDirectory(prefix="rstar-") as scratch:
                here = checkpoint.path
                if folder.store.local is None:  # compared as it is copied, too
                    here = Stager(scratch)(here).path
                if directory_digest(Path(here)) != checkpoint.digest:
                    raise StoreError(f"checkpoint {checkpoint.path} is not what its record says")


def _copy(source: RunFolder, target: RunFolder, name: str, expected: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="rstar-") as scratch:
        here = Path(scratch) / "file"
        if source.store.local is not None:
            here = source.store.local / name
        else:
            source.store.fetch(name, here)
        if name in expected:
            with here.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected[name]:
                raise StoreError(
                    f"{source.at(name)} has changed since it was written (its SHA-256 differs)"
                )
        target.store.put_file(name, here)
