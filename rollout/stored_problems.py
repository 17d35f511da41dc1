"""The problems of a rollout on disk: a worker holds those it works on, not all of them.

    driver:  StoredProblems.write --> problem_blocks/<SHA-256>.jsonl.z   `BLOCK` problems each
                 | which row an id has: 12 bytes a problem, and the names of the blocks
                 v
    worker:  problems[id] --> reads the block of that row, keeps the latest one

Problems that are searched together stand together, so a job costs one read. Blocks are named by
their content, so a second start writes none. When a round is sealed nobody needs them any more
(`remove_blocks`); the next one writes its own.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from rollout.problem import Level, Problem
from rollout.run_store import RunStore, StoreError

FOLDER = "problem_blocks"
BLOCK = 2048
"""Problems in a file: some hundred kilobytes to read for one job."""

_FIELDS = tuple(field.name for field in fields(Problem))


class StoredProblems(Mapping[str, Problem]):
    """Problems by id, read from a store when they are asked for; picklable, a few MB."""

    def __init__(
        self,
        store: RunStore,
        blocks: tuple[str, ...],
        hashes: npt.NDArray[np.uint64],
        rows: npt.NDArray[np.uint32],
    ) -> None:
        """Use `write`.

        Args:
            blocks: their names, in order; all but the last one are full.
            hashes: [N] of the ids, ascending.
            rows: [N] number of the problem with that hash, over all blocks.
        """
        self._store = store
        self._blocks = blocks
        self._hashes = hashes
        self._rows = rows
        self._latest: tuple[int, list[bytes]] = (-1, [])

    @classmethod
    def write(cls, store: RunStore, problems: Iterable[Problem]) -> StoredProblems:
        """Have the problems stand in a store, those that are searched together side by side.

        Raises:
            StoreError: it cannot be written.
        """
        blocks: list[str] = []
        hashes: list[int] = []
        left = iter(problems)
        while batch := list(islice(left, BLOCK)):
            hashes += [_hash(problem.id) for problem in batch]
            lines = b"\n".join(_to_json(problem) for problem in batch)
            name = hashlib.sha256(lines).hexdigest()
            if not store.exists(_path(name)):
                store.put(_path(name), zlib.compress(lines, level=1))
            blocks.append(name)
        found = np.array(hashes, dtype=np.uint64)
        order = np.argsort(found, kind="stable")
        return cls(store, tuple(blocks), found[order], order.astype(np.uint32))

    @property
    def digest(self) -> str:
        """Of all problems, in their order."""
        return hashlib.sha256("".join(self._blocks).encode()).hexdigest()

    def __getitem__(self, problem_id: str) -> Problem:
        """
        Raises:
            KeyError: there is no such problem.
            StoreError: its block is missing, cut off or changed.
        """
        wanted = np.uint64(_hash(problem_id))
        first, last = (int(np.searchsorted(self._hashes, wanted, s)) for s in ("left", "right"))
        for row in self._rows[first:last].tolist():
            problem = _from_json(self._lines(row // BLOCK)[row % BLOCK])
            if problem.id == problem_id:
                return problem
        raise KeyError(problem_id)

    def __iter__(self) -> Iterator[str]:
        """Ids in the order they were written."""
        for number in range(len(self._blocks)):
            for line in self._lines(number):
                yield _from_json(line).id

    def __len__(self) -> int:
        return len(self._rows)

    def _lines(self, number: int) -> list[bytes]:
        """One block, a problem a line."""
        kept, lines = self._latest
        if kept == number:
            return lines
        path = _path(self._blocks[number])
        try:
            data = zlib.decompress(self._store.read(path))
        except FileNotFoundError as error:
            raise StoreError(f"problem file {path} of {self._store.root} is missing") from error
        except zlib.error as error:
            raise StoreError(
                f"problem file {path} of {self._store.root} cannot be read: {error}"
            ) from error
        if hashlib.sha256(data).hexdigest() != self._blocks[number]:
            raise StoreError(
                f"problem file {path} of {self._store.root} has changed since it was written "
                "(its SHA-256 differs)"
            )
        lines = data.split(b"\n")
        self._latest = number, lines
        return lines


def remove_blocks(store: RunStore) -> None:
    """Remove all blocks, those that a killed writer left half-written included.

    Raises:
        StoreError: the store fails.
    """
    for path in [*store.files(FOLDER), *store.unfinished(FOLDER)]:
        store.delete(path)


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.jsonl.z"


def _hash(problem_id: str) -> int:
    name = problem_id.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())


def _to_json(problem: Problem) -> bytes:
    return json.dumps({name: getattr(problem, name) for name in _FIELDS}).encode()


def _from_json(line: bytes) -> Problem:
    record: dict[str, Any] = json.loads(line)
    record["level"] = Level(record["level"])
    record["answers_alt"] = tuple(record["answers_alt"])
    return Problem(**record)
