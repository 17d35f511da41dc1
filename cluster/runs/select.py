"""Trees of the rounds so far -> the dataset of a round.

    data file of a shard --the candidates a worker left--> table --> sorted runs --> dataset
                         \\-else its trees, read again -----/

Data files are shared out to processes, which read and sort; the runs are merged here. Where trees
had to be read again (a run of an earlier version, another `dataset.pairs` or template than the
rollout's, verdicts of a regrade) that is said, and with `keep` what came of it stays beside the
trees, so that the next round does not read them once more.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.runs.regrade import verdicts_of
from learner.candidates import Recipe, candidates, table_from_bytes, table_to_bytes
from learner.dataset import Demonstration
from learner.select import (
    MEMORY_BYTES,
    DatasetConfig,
    Runs,
    columns_of,
    recipe_of,
    select_runs,
    working_folder,
    write_runs,
)
from rollout.prompt import PromptTemplate
from rollout.store import ManifestFile, RunStore, StoreError, TrajectoryStore
from rollout.table import table_to_trees

logger = logging.getLogger(__name__)

FILES_AT_ONCE = 512
"""Data files that a process reads into runs of their own, of which all but the last are full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Some data files of a round, for one process."""

    store: RunStore
    round: int
    files: tuple[ManifestFile, ...]
    recipe: Recipe
    columns: tuple[str, ...]
    folder: Path
    name: str
    """Of the runs it writes."""
    memory_bytes: int
    keep: bool


@dataclass(slots=True, kw_only=True)
class _Read:
    """What became of a share."""

    runs: Runs
    round: int
    remade: int
    """Data files whose trees were read, for want of candidates."""


class RoundSelection:
    """Selects SFT examples and preference pairs for round `number`, of the rounds its config lets;
    counts that round's trajectories on the way. `select` runs in a thread; `stop` ends it from
    another."""

    def __init__(
        self,
        store: RunStore,
        number: int,
        *,
        keep: bool = False,
        num_processes: int | None = None,
    ) -> None:
        """
        Args:
            keep: leave what trees gave beside them, where no worker did.
            num_processes: that read; 1: this one. None: one a core, where there is enough to read.
        """
        self.store = store
        self.number = number
        self.trajectories = 0
        self.correct = 0
        self.remade: Counter[int] = Counter()
        """Round -> data files whose trees had to be read."""
        self._keep = keep
        self._num_processes = num_processes
        self._stopped = threading.Event()

    def select(
        self,
        directory: Path,
        *,
        template: PromptTemplate,
        config: DatasetConfig,
        demonstrations: Sequence[Demonstration] = (),
        valued_steps: bool = False,
    ) -> dict[str, Any]:
        """Write the dataset whole and return its manifest; `valued_steps` as `select_dataset`.

        Raises:
            StoreError: a round is not sealed, or a file is missing or changed.
            DatasetError: the disk is full.
        """
        only_this = {config.sft_rounds, config.pair_rounds} == {"this"}
        rounds = range(self.number if only_this else 1, self.number + 1)
        recipe = recipe_of(config, template, valued_steps=valued_steps)
        with working_folder(directory) as folder:
            runs = Runs.none()
            for read in self._read(list(self._shares(rounds, recipe, config, folder))):
                runs += read.runs
                self.remade[read.round] += read.remade
            self.trajectories = runs.reached[self.number]
            self.correct = runs.correct[self.number]
            for line in self.notes():
                logger.info(line)
            return select_runs(
                runs,
                directory,
                template=template,
                config=config,
                demonstrations=demonstrations,
                info={"rounds": list(rounds), "verdicts": verdicts_of(self.store, rounds)},
                check=self._check,
            )

    def notes(self) -> list[str]:
        """What somebody should know who wonders how long it took."""
        return [
            f"round {number}: the trees of {count} data files were read again, which hold no "
            "candidates for training made with these settings and verdicts"
            for number, count in sorted(self.remade.items())
            if count
        ]

    def stop(self) -> None:
        """End a thread that still reads: after Ctrl-C nobody waits for hours of trees."""
        self._stopped.set()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise RuntimeError("the selection was stopped")

    def _shares(
        self, rounds: Sequence[int], recipe: Recipe, config: DatasetConfig, folder: Path
    ) -> Iterator[_Share]:
        for number in rounds:
            manifest = TrajectoryStore(self.store, number).manifest()
            if manifest is None:
                raise StoreError(
                    f"round {number} of {self.store.root} has no manifest: it is not finished"
                )
            columns = columns_of(config, newest=number == self.number)
            for start in range(0, len(manifest.files), FILES_AT_ONCE):
                yield _Share(
                    store=self.store,
                    round=number,
                    files=manifest.files[start : start + FILES_AT_ONCE],
                    recipe=recipe,
                    columns=tuple(columns),
                    folder=folder,
                    name=f"round-{number}-{start:07d}",
                    memory_bytes=MEMORY_BYTES,
                    keep=self._keep,
                )

    def _read(self, shares: Sequence[_Share]) -> Iterator[_Read]:
        """What became of all shares, in any order."""
        cores = len(os.sched_getaffinity(0))
        # A process takes seconds to start.
        enough = sum(len(share.files) for share in shares) // FILES_AT_ONCE
        processes = self._num_processes or min(cores, enough)
        if processes <= 1:
            for share in shares:
                yield _read_share(share, self._check)
            return
        # Not forked: this process has threads, Ray's among them.
        context = multiprocessing.get_context("spawn")
        halt = context.Event()
        with ProcessPoolExecutor(
            processes, mp_context=context, initializer=_halted_by, initargs=(halt,)
        ) as pool:
            try:
                left = {pool.submit(_read_in_process, share) for share in shares}
                while left:
                    done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                    self._check()
                    yield from (future.result() for future in done)
            finally:
                halt.set()
                pool.shutdown(cancel_futures=True)


_halt: Event | None = None
"""Of a process that reads: set once nobody waits for it."""


def _halted_by(halt: Event) -> None:
    global _halt
    _halt = halt


def _read_in_process(share: _Share) -> _Read:
    def check() -> None:
        if _halt is not None and _halt.is_set():
            raise RuntimeError("the selection was stopped")

    return _read_share(share, check)


def _read_share(share: _Share, check: Callable[[], None]) -> _Read:
    """Read and sort what some data files give; what `check` raises ends it."""
    trees = TrajectoryStore(share.store, share.round)
    read = _Read(runs=Runs.none(), round=share.round, remade=0)

    def tables() -> Iterator[pa.Table]:
        for file in share.files:
            check()
            table = _written(trees, file, share)
            if table is None:
                read.remade += 1
                table = _remade(trees, file, share)
            yield table

    read.runs = write_runs(tables(), share.folder, share.name, memory_bytes=share.memory_bytes)
    return read


def _written(trees: TrajectoryStore, file: ManifestFile, share: _Share) -> pa.Table | None:
    """The candidates that stand beside a data file; None: there are none that can be used."""
    data = trees.read_derived(file, share.recipe.name)
    if data is None:
        return None
    try:
        return table_from_bytes(data, share.columns)
    except (ValueError, pa.ArrowInvalid) as error:
        logger.warning("Candidates of data file %s cannot be used: %s", file.path, error)
        return None


def _remade(trees: TrajectoryStore, file: ManifestFile, share: _Share) -> pa.Table:
    """What the trees of a data file give."""
    table = trees.read_table(file)
    try:
        found = candidates(table_to_trees(table), share.recipe)
    except ValueError as error:
        raise StoreError(f"data file {file.path} cannot be read: {error}") from error
    if share.keep:
        trees.put_derived(file, share.recipe.name, table_to_bytes(found))
    return found.select(share.columns)
