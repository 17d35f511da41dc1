"""Trees of the rounds so far -> the dataset of a round."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cluster.runs.regrade import verdicts_of
from learner.dataset import Demonstration
from learner.select import DatasetConfig, select_dataset
from rollout.prompt import PromptTemplate
from rollout.store import RunStore, TrajectoryStore
from rollout.trajectory import trajectories
from rollout.tree import Tree


class RoundSelection:
    """Selects SFT examples and preference pairs for round `number`, of the rounds its config lets;
    counts that round's trajectories on the way. `select` runs in a thread; `stop` ends it from
    another."""

    def __init__(self, store: RunStore, number: int) -> None:
        self.store = store
        self.number = number
        self.trajectories = 0
        self.correct = 0
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
        """Write the dataset whole and return its manifest; `valued_steps` as `select_dataset`."""
        only_this = {config.sft_rounds, config.pair_rounds} == {"this"}
        rounds = range(self.number if only_this else 1, self.number + 1)
        return select_dataset(
            chain.from_iterable(self._trees(number) for number in rounds),
            directory,
            template=template,
            config=config,
            demonstrations=demonstrations,
            valued_steps=valued_steps,
            info={"rounds": list(rounds), "verdicts": verdicts_of(self.store, rounds)},
        )

    def stop(self) -> None:
        """End a thread that still reads: after Ctrl-C nobody waits for hours of trees."""
        self._stopped.set()

    def _trees(self, number: int) -> Iterator[Tree]:
        for tree in TrajectoryStore(self.store, number).trees():
            if self._stopped.is_set():
                raise RuntimeError("the selection was stopped")
            if number == self.number:
                found = trajectories(tree)
                self.trajectories += len(found)
                self.correct += sum(1 for t in found if t.correct)
            yield tree
