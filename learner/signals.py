"""What a fit shows while it runs and what of it a person should look at.

    every step --> MetricsLog: metrics.jsonl, TensorBoard
    losses     --> LossWatch: a spike is named
    held-out   --> calibration, accuracy at chance, the promotion gate

Everything but `MetricsLog` is pure. Both logs stand beside the checkpoint a fit makes, in its
round's folder: a checkpoint's own files never change.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learner.fit import GateConfig
from rollout.run_store import RunStore, StoreError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

NUM_BINS = 10


class LossWatch:
    """Notices a loss far above those just before it.

    A spike is over 1.5 times the median of the last 32 losses and 8 of their median deviations
    away; batches of a few texts stray without it.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=32)
        self._spikes: list[tuple[int, float, float]] = []

    def observe(self, step: int, loss: float) -> bool:
        """Note the loss of a step (from 1); True if it is a spike."""
        found = False
        if len(self._recent) >= 16:
            usual = statistics.median(self._recent)
            spread = statistics.median(abs(other - usual) for other in self._recent)
            found = loss > max(1.5 * usual, usual + 8.0 * 1.4826 * spread)
        if found:
            self._spikes.append((step, loss, usual))
        self._recent.append(loss)
        return found

    def warnings(self) -> list[str]:
        """One line if there was a spike, about the first and how many."""
        if not self._spikes:
            return []
        step, loss, usual = self._spikes[0]
        more = f", {len(self._spikes)} in all" if len(self._spikes) > 1 else ""
        return [f"loss_spike: {loss:.3f} at step {step}, {usual:.3f} was usual{more}"]


def bin_of(value: float) -> int:
    """The calibration bin of a value in [-1, 1], by its chance (1 + value) / 2."""
    return min(int((1.0 + value) / 2.0 * NUM_BINS), NUM_BINS - 1)


def calibration(
    counts: Sequence[float], chances: Sequence[float], correct: Sequence[float]
) -> tuple[tuple[tuple[float, float, float], ...], float | None]:
    """Reliability of values as chances of a trajectory being correct.

    Args:
        counts, chances, correct: per bin how many trajectories, the sum of their chances, and how
            many of them are correct.
    Returns:
        Per bin (count, mean chance, share correct), and the expected calibration error: the mean
        distance of the two, weighted by count; None without trajectories.
    """
    total = sum(counts)
    bins = tuple(
        (n, chance / n, right / n) if n else (0.0, 0.0, 0.0)
        for n, chance, right in zip(counts, chances, correct, strict=True)
    )
    if not total:
        return bins, None
    return bins, sum(n * abs(chance - share) for n, chance, share in bins) / total


def chance_warning(metrics: Mapping[str, float]) -> list[str]:
    """One line if held-out pair accuracy cannot be told from guessing (two standard errors)."""
    accuracy, pairs = metrics.get("pair_accuracy"), metrics.get("num_pairs", 0.0)
    if accuracy is None or not pairs:
        return []
    needed = 0.5 + 1.0 / math.sqrt(pairs)
    if accuracy >= needed:
        return []
    return [
        f"accuracy_at_chance: pair accuracy {accuracy:.3f} on {pairs:.0f} held-out pairs, over "
        f"{min(needed, 1.0):.3f} would be more than guessing"
    ]


def judge(
    new: Mapping[str, float], previous: Mapping[str, float], config: GateConfig
) -> str | None:
    """Why a checkpoint is clearly worse than the one in service; None: it is not.

    Both were measured on the same held-out examples; the smaller the set, the more it takes.
    """
    if "pair_accuracy" in new and "pair_accuracy" in previous:
        pairs = new["num_pairs"]
        if pairs < config.min_examples:
            return None
        before, after = previous["pair_accuracy"], new["pair_accuracy"]
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / pairs)
        if before - after > max(config.max_accuracy_drop, 2 * error):
            return (
                f"worse_than_previous: pair accuracy {after:.3f} on {pairs:.0f} held-out pairs, "
                f"{before:.3f} with the checkpoint in service (gate.max_accuracy_drop "
                f"{config.max_accuracy_drop})"
            )
    elif "loss" in new and "loss" in previous and "pair_accuracy" not in new:
        if new["num_examples"] < config.min_examples:
            return None
        if not new["loss"] <= config.max_loss_ratio * previous["loss"]:
            return (
                f"worse_than_previous: loss {new['loss']:.4f} on {new['num_examples']:.0f} "
                f"held-out trajectories, {previous['loss']:.4f} with the checkpoint in service "
                f"(gate.max_loss_ratio {config.max_loss_ratio})"
            )
    return None


class MetricsLog:
    """metrics.jsonl and TensorBoard of one fit; a fit that goes on continues both."""

    def __init__(self, home: RunStore, scratch: Path, *, resumed_from: int) -> None:
        """
        Args:
            home: of the fit's round and kind.
            scratch: folder of this machine for what is on its way to a bucket.
            resumed_from: steps of an earlier attempt to keep; later ones are dropped.
        """
        from tensorboardX import SummaryWriter

        self._home = home
        self._folder = folder = home.local or scratch / "log"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if home.local is None and resumed_from and home.exists(METRICS_FILE):
            home.fetch(METRICS_FILE, path)
        kept = []
        if resumed_from and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line).get("step", resumed_from + 1) <= resumed_from:
                        kept.append(line + "\n")
                except ValueError:
                    # The last line of a process that was killed while it wrote.
                    continue
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / TENSORBOARD_FOLDER), purge_step=resumed_from + 1, flush_secs=10
        )

    def step(self, number: int, record: Mapping[str, float | None]) -> None:
        """One optimiser step, from 1; values that are not known are left out."""
        known = {name: value for name, value in record.items() if value is not None}
        self._file.write(json.dumps({"step": number, **known}) + "\n")
        for name, value in known.items():
            self._board.add_scalar(f"train/{name}", value, number)

    def end(self, number: int, metrics: Mapping[str, float], **facts: Any) -> None:
        """What was measured at the end, after step `number`."""
        self._file.write(json.dumps({"validation": dict(metrics), **facts}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(f"validation/{name}", value, number)

    def flush(self) -> None:
        self._file.flush()

    def keep(self) -> None:
        """Have what was logged so far on the bucket, if the run is on one."""
        if self._home.local is not None:
            return
        self.flush()
        try:
            self._home.upload(self._folder, "")
        except StoreError as error:  # not worth the fit
            logger.warning("The log of a fit was not kept: %s", error)

    def close(self) -> None:
        self._board.close()
        self.keep()
        self._file.close()
