"""Reliability of the PPM: the chances it gave, in bins, against the shares that were right."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cluster.evaluation.results import ProblemAttempts

NUM_BINS = 10

Bins = list[tuple[int, float, float]]
"""(count, mean predicted chance, share right) of each bin."""


class BinSums:
    """Counts of a reliability diagram."""

    def __init__(self) -> None:
        self._sums = np.zeros((NUM_BINS, 3))

    def add(self, values: np.ndarray, outcome: np.ndarray) -> None:
        """Take values of the PPM in -1..1 and what came of them in 0..1, `[N]` both."""
        chances = (values + 1) / 2
        places = np.clip((chances * NUM_BINS).astype(int), 0, NUM_BINS - 1)
        for column, weights in enumerate((np.ones(len(places)), chances, outcome)):
            self._sums[:, column] += np.bincount(places, weights=weights, minlength=NUM_BINS)

    def bins(self) -> Bins:
        return [
            (int(count), predicted / count if count else 0.0, right / count if count else 0.0)
            for count, predicted, right in self._sums.tolist()
        ]


def reliability_bins(found: Iterable[ProblemAttempts]) -> Bins:
    """Of valued answers."""
    valued = [
        (a.value, a.correct)
        for of_problem in found
        for a in of_problem.attempts
        if a.value is not None and a.answer is not None
    ]
    sums = BinSums()
    if valued:
        values, correct = np.array(valued, float).T
        sums.add(values, correct)
    return sums.bins()
