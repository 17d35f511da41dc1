"""Records on disk instead of in memory: sorts and a list that hold only what they must.

    records --add--> SortedSpill --read back--> in order of their keys, one at a time
    tables --write_run--> sorted runs --merged--> tables in order of their keys
    records --append--> DiskList --[i]--> any of them

`SortedSpill` collects records up to a size, writes them as a sorted run, and merges the runs when
it is read; every `_MAX_RUNS` runs of a level become one of the next, so that few files are open at
a time however much was added. In memory are one run's records while it is filled, and one record a
run while they are merged.

    memory --full--> run run run ... --16 of them--> run of level 1 --16--> level 2 ...

`write_run` and `merged` do the same with Arrow tables, whole columns at a time; runs are files that
several processes may have written, and all are merged at once.

`DiskList` keeps where each record begins (8 bytes) and the records in one file. Its pages are the
operating system's to cache.

The others are files that have no name (or lose it at once) in a folder the caller names: gone
when the process is, however it ends. Records are pickled; nobody but the process that wrote them
reads them.
"""

from __future__ import annotations

import errno
import heapq
import os
import pickle
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Generic, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

T = TypeVar("T")

_MAX_RUNS = 16
_BUFFER_BYTES = 1 << 16

_key = itemgetter(0)
"""Of a key and its pickled record."""


def no_room(error: BaseException, path: str | Path) -> str:
    """What a failed write is told as: the path, the cause and, of a disk, what is left of it."""
    path = Path(path)
    try:
        there = next((p for p in (path, *path.parents) if p.exists()), path)
        free = shutil.disk_usage(there).free
    except OSError:
        return f"cannot write {path}: {error}"
    return f"cannot write {path}: {error} ({free / 2**30:.2f} GiB free on that disk)"


def disk_is_full(error: BaseException) -> bool:
    """True for the errors of a full disk or a spent quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class SortedSpill(Generic[T]):
    """Records added in any order and read back by their key; equal keys in no promised order.

    A context manager: leaving it frees the disk.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 64 << 20) -> None:
        """
        Args:
            folder: existing, on a disk with room for all records.
            memory_bytes: size of the (pickled) records that are held before they go to disk.
        """
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._held: list[tuple[Any, bytes]] = []
        self._size = 0
        self._levels: list[list[IO[bytes]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for runs in self._levels:
            for run in runs:
                run.close()
        self._levels = []
        self._held = []

    def add(self, key: Any, record: T) -> None:
        """Take a record; keys must be comparable with each other.

        Raises:
            OSError: the disk is full.
        """
        data = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        self._held.append((key, data))
        self._size += len(data) + 200
        if self._size >= self._memory_bytes:
            self._spill()

    def __iter__(self) -> Iterator[T]:
        """All records in order of their keys; again and again, but by one iterator at a time."""
        self._held.sort(key=_key)
        runs = [run for level in self._levels for run in level]
        merged = heapq.merge(*(_read_run(run) for run in runs), self._held, key=_key)
        return (pickle.loads(data) for _, data in merged)

    def _spill(self) -> None:
        self._held.sort(key=_key)
        self._put(0, iter(self._held))
        self._held = []
        self._size = 0

    def _put(self, level: int, records: Iterator[tuple[Any, bytes]]) -> None:
        """Write a run; enough of them become one of the next level."""
        if len(self._levels) == level:
            self._levels.append([])
        run = tempfile.TemporaryFile(dir=self._folder, buffering=_BUFFER_BYTES)  # noqa: SIM115
        self._levels[level].append(run)
        for entry in records:
            pickle.dump(entry, run, protocol=pickle.HIGHEST_PROTOCOL)
        run.flush()
        if len(self._levels[level]) < _MAX_RUNS:
            return
        runs, self._levels[level] = self._levels[level], []
        self._put(level + 1, heapq.merge(*(_read_run(r) for r in runs), key=_key))
        for finished in runs:
            finished.close()


def _read_run(run: IO[bytes]) -> Iterator[tuple[Any, bytes]]:
    # A reader of its own, so that the run outlives it; the two share one place in the file, which
    # is why a spill is read by one iterator at a time.
    with os.fdopen(os.dup(run.fileno()), "rb", buffering=_BUFFER_BYTES) as file:
        file.seek(0)
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return


BATCH_BYTES = 1 << 18
"""Of a run: what is in memory of each while they are merged, up to twice."""

BLOCK_BYTES = 8 << 20
"""Least size of a merged table: smaller ones would be all overhead."""


def write_run(tables: Sequence[pa.Table], path: Path, *, keys: Sequence[str]) -> None:
    """Write the rows of some tables to a file, sorted.

    Raises:
        OSError: the disk is full.
    """
    table = _sorted(tables, keys)
    rows = max(1, len(table) * BATCH_BYTES // max(table.nbytes, 1))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as writer,
    ):
        writer.write_table(table, max_chunksize=rows)


def merged(runs: Sequence[Path], *, keys: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of runs in order of their keys, by table; rows with the same first key are in one.

    In memory are up to two batches of each run, more where one first key has more, and three times
    what is yielded: `BLOCK_BYTES`, or a batch of each run where that is more.
    """
    readers = [pa.ipc.open_stream(pa.OSFile(str(path))) for path in runs]
    heads: list[_Head] = [(reader.schema.empty_table(), reader) for reader in readers]
    ready: list[pa.Table] = []
    while heads:
        heads = [_longer(*head, keys[0]) for head in heads]
        # The last key of what is read of a run may go on in its next batch.
        unsure = [table[keys[0]][-1].as_py() for table, reader in heads if reader is not None]
        cutoff = min(unsure, default=None)
        left = []
        for table, reader in heads:
            count = len(table)
            if cutoff is not None:
                count = pc.sum(pc.less(table[keys[0]], cutoff)).as_py() or 0
            if count:
                ready.append(table.slice(0, count))
            if count < len(table) or reader is not None:
                left.append((table.slice(count), reader))
        heads = left
        if ready and (not heads or sum(table.nbytes for table in ready) >= BLOCK_BYTES):
            yield _sorted(ready, keys)
            ready = []


_Head = tuple[pa.Table, pa.RecordBatchReader | None]
"""What is read of a run and not merged yet, and its rest."""


def _longer(table: pa.Table, reader: pa.RecordBatchReader | None, key: str) -> _Head:
    """The head of a run with a batch of rows, of two keys at least, or with all that is left.

    All runs are topped up together, so that a merge goes through them by batches, not by rows.
    """
    while reader is not None and (table.nbytes < BATCH_BYTES or table[key][0] == table[key][-1]):
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return table, None
        table = pa.concat_tables([table, pa.Table.from_batches([batch])])
    return table, reader


def _sorted(tables: Sequence[pa.Table], keys: Sequence[str]) -> pa.Table:
    """The rows of some tables in order of their keys, in one piece."""
    table = pa.concat_tables(tables).combine_chunks()
    order = pc.sort_indices(table, sort_keys=[(key, "ascending") for key in keys])
    return table.take(order).combine_chunks()


class DiskList(Generic[T]):
    """A growing list of records that are in a file; only where each begins is in memory.

    Several processes of a machine may hold the same list in one file: one writes, the others
    `follow` it and are told the same records.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: existing, on a disk with room for all records.
        """
        self._file: IO[bytes] = tempfile.NamedTemporaryFile(  # noqa: SIM115
            dir=folder, buffering=_BUFFER_BYTES, delete=False
        )
        self.path = Path(self._file.name)
        """Of the file, until `hide`."""
        self._writes = True
        self._starts = array("q", [0])
        self._flushed = True

    def follow(self, path: Path) -> None:
        """Take the records from a file that another process writes; no record is held yet.

        Raises:
            OSError: there is no such file.
        """
        other = path.open("rb")
        self.hide()
        self._file.close()
        self._file, self._writes = other, False

    def hide(self) -> None:
        """Take the name off the own file: it is gone when those who opened it are."""
        self.path.unlink(missing_ok=True)

    def append(self, record: T) -> None:
        """Add a record.

        Raises:
            OSError: the disk is full.
        """
        self.append_pickled(pickled(record))

    def append_pickled(self, data: bytes) -> None:
        """Add a record as `pickled` gives it."""
        if self._writes:
            self._file.write(data)
            self._flushed = False
        self._starts.append(self._starts[-1] + len(data))

    def flush(self) -> None:
        """Have all records in the file.

        Raises:
            OSError: the disk is full.
        """
        if not self._flushed:
            self._file.flush()
            self._flushed = True

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> T:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        self.flush()
        start, stop = self._starts[number], self._starts[number + 1]
        return pickle.loads(os.pread(self._file.fileno(), stop - start, start))


def pickled(record: object) -> bytes:
    """A record as it stands in a file."""
    return pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
