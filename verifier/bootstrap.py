"""How sure an accuracy is: bootstrap over problems, of one system and of the difference of two.

    per-problem results [P] --draw P problems with replacement, B times--> mean of each draw [B]
                                                    --> percentile interval, p-value

A benchmark is a sample of problems: what is drawn again is problems, never samples of one problem.
Two systems are compared on the problems both have, each draw taking the same problems of both
(paired), which removes the difficulty that they share.

Where all problems ended alike (all right, all wrong) every draw is the same and a percentile
interval would have no width. Then the Wilson interval is given, which knows that P is finite.

Not covered: the variance of training runs and of sampling seeds. One run of each system cannot
tell it; the interval says how far another set of problems might move the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 2000
CONFIDENCE = 0.95

_DRAWN_AT_ONCE = 2_000_000
"""Indices drawn in one go: 16 MB."""

_WILSON_Z = 1.959963984540054
"""Of 95 % confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems and its interval."""

    mean: float
    low: float
    high: float
    num_problems: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much more of the common problems B has right than A."""

    mean: float
    """B minus A."""
    low: float
    high: float
    p_value: float
    """Two-sided: how often draws under "no difference" are at least as far from zero."""
    num_problems: int
    better: int
    """Problems on which B is better than A."""
    worse: int

    @property
    def within_noise(self) -> bool:
        """True if the interval holds zero."""
        return self.low <= 0.0 <= self.high


def bootstrap_mean(results: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean and 95 % interval of per-problem results.

    Args:
        results: one number in 0..1 a problem.
    Raises:
        ValueError: no results.
    """
    values = _values(results)
    mean = float(values.mean())
    if np.ptp(values) == 0.0:
        low, high = _wilson(mean, len(values))
    else:
        low, high = _interval(_drawn_means(values, seed))
    return Estimate(mean=mean, low=low, high=high, num_problems=len(values))


def bootstrap_ratio(parts: Sequence[float], wholes: Sequence[float], *, seed: int = 0) -> Estimate:
    """Share of all that problems give, as right pairs of all pairs: a problem counts by how much it
    gives, and is drawn with all of it.

    Args:
        parts, wholes: two numbers a problem, 0 <= part <= whole and whole > 0.
    Raises:
        ValueError: no problems, or not equally many numbers.
    """
    if len(parts) != len(wholes):
        raise ValueError(f"expected a whole for each part, got {len(wholes)} for {len(parts)}")
    numerators, denominators = _values(parts), _values(wholes)
    mean = float(numerators.sum() / denominators.sum())
    if np.ptp(numerators / denominators) == 0.0:
        low, high = _wilson(mean, len(numerators))
    else:
        # One seed: both are of the same draws.
        low, high = _interval(_drawn_means(numerators, seed) / _drawn_means(denominators, seed))
    return Estimate(mean=mean, low=low, high=high, num_problems=len(numerators))


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> Difference:
    """Paired bootstrap of `second` minus `first`.

    The p-value is of draws around the observed difference moved to zero, (1 + hits) / (1 + draws),
    so it is never 0.

    Args:
        first, second: results of two systems on the same problems, in the same order.
    Raises:
        ValueError: no results, or not equally many.
    """
    if len(first) != len(second):
        raise ValueError(f"paired results must be equally many, got {len(first)} and {len(second)}")
    apart = _values(second) - _values(first)
    mean = float(apart.mean())
    means = _drawn_means(apart, seed)
    low, high = _interval(means)
    # Sums in another order differ in the last bits.
    hits = int(np.count_nonzero(np.abs(means - mean) >= abs(mean) - 1e-12))
    return Difference(
        mean=mean,
        low=low,
        high=high,
        p_value=(1 + hits) / (1 + NUM_DRAWS),
        num_problems=len(apart),
        better=int(np.count_nonzero(apart > 0)),
        worse=int(np.count_nonzero(apart < 0)),
    )


def _values(results: Sequence[float]) -> np.ndarray:
    values = np.asarray(results, dtype=np.float64)
    if values.size == 0:
        raise ValueError("results: at least one problem is needed")
    return values


def _drawn_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of draws with replacement, `[NUM_DRAWS]`."""
    rng = np.random.default_rng(seed)
    rows = max(_DRAWN_AT_ONCE // len(values), 1)
    means = []
    for start in range(0, NUM_DRAWS, rows):
        size = (min(rows, NUM_DRAWS - start), len(values))
        means.append(values[rng.integers(0, len(values), size=size)].mean(axis=1))
    return np.concatenate(means)


def _interval(means: np.ndarray) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def _wilson(share: float, count: int) -> tuple[float, float]:
    z2 = _WILSON_Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = (
        _WILSON_Z / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    )
    return max(centre - spread, 0.0), min(centre + spread, 1.0)
