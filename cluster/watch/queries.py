"""What a panel shows, once: as PromQL for Prometheus and Grafana, and as numbers from samples.

    Rate(TREES, by=("level",)).promql(...)         sum by (level) (rate(ray_rstar_trees_total[1m]))
    Rate(TREES, by=("level",)).evaluate(samples)   {(("level", "math"),): 1.5}

Expressions are built from entries of the catalogue, so that no name can be wrong, and both readings
agree: a test asks a real Prometheus and the samples of one run.

Labels of the left side stay; a right side without labels is divided by as one number.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cluster.telemetry.metrics import Metric
from cluster.telemetry.samples import Labels, Samples, Series

Result = dict[Labels, float]
"""Values by the labels an expression keeps."""

MIN_WINDOW_S = 60.0
"""Of rates: long enough for the ten seconds between two exports of Ray."""


def rate_window_s(samples: Samples) -> float:
    """Of rates that are read from samples."""
    return max(MIN_WINDOW_S, 4 * samples.interval_s)


class Expression(ABC):
    """Something that can be drawn over time."""

    by: tuple[str, ...]
    """Labels of the result."""

    @abstractmethod
    def promql(self, run: str, window: str) -> str:
        """As Prometheus reads it.

        Args:
            run: value of the label `run`, or a variable of Grafana.
            window: of rates, as "1m".
        """

    @abstractmethod
    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        """As numbers at a time; series without a value are left out."""

    def __truediv__(self, other: Expression) -> Expression:
        return Ratio(self, other)

    def __mul__(self, other: float) -> Expression:
        return Scaled(self, other)


@dataclass(frozen=True, slots=True)
class _OfMetric(Expression):
    metric: Metric
    by: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rate(_OfMetric):
    """Growth of a counter per second."""

    def promql(self, run: str, window: str) -> str:
        name = self.metric.exported
        return _sum(self.by, f"rate({name}{_selector(run, self.where)}[{window}])")

    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        return _rates(samples, self.metric.exported, self.by, self.where, time_s, window_s)


@dataclass(frozen=True, slots=True)
class Value(_OfMetric):
    """A gauge now."""

    def promql(self, run: str, window: str) -> str:
        inner = f"{self.metric.exported}{_selector(run, self.where)}"
        return _sum(self.by, inner, self.metric.combine)

    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        combine = max if self.metric.combine == "max" else operator.add
        found: Result = {}
        row_s = samples.row_before(time_s)
        if row_s is None:
            return found
        for labels, series in _matching(samples, self.metric.exported, self.where):
            # Every row holds all that has a value: what is not in the last one has none any more.
            value = series.at(row_s, 0.0)
            if value is not None:
                key = _kept(labels, self.by)
                found[key] = combine(found[key], value) if key in found else value
        return found


@dataclass(frozen=True, slots=True)
class Quantile(Expression):
    """A quantile of a histogram, by linear interpolation inside its buckets."""

    share: float
    metric: Metric
    by: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)

    def promql(self, run: str, window: str) -> str:
        name = f"{self.metric.exported}_bucket"
        rates = _sum((*self.by, "le"), f"rate({name}{_selector(run, self.where)}[{window}])")
        return f"histogram_quantile({self.share:g}, {rates})"

    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        name = f"{self.metric.exported}_bucket"
        buckets: dict[Labels, list[tuple[float, float]]] = {}
        by = (*self.by, "le")
        for labels, rate in _rates(samples, name, by, self.where, time_s, window_s).items():
            upper = float(dict(labels)["le"].replace("+Inf", "inf"))
            buckets.setdefault(_kept(labels, self.by), []).append((upper, rate))
        found = {key: _quantile(self.share, sorted(rates)) for key, rates in buckets.items()}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Mean(_OfMetric):
    """Mean of what a histogram was given."""

    def promql(self, run: str, window: str) -> str:
        parts = [
            _sum(
                self.by, f"rate({self.metric.exported}_{end}{_selector(run, self.where)}[{window}])"
            )
            for end in ("sum", "count")
        ]
        return f"{parts[0]} / {parts[1]}"

    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        sums, counts = (
            _rates(samples, f"{self.metric.exported}_{end}", self.by, self.where, time_s, window_s)
            for end in ("sum", "count")
        )
        return {key: sums[key] / counts[key] for key in sums if counts.get(key)}


@dataclass(frozen=True, slots=True)
class Scaled(Expression):
    """Another one times a number."""

    of: Expression
    factor: float

    @property
    def by(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.of.by

    def promql(self, run: str, window: str) -> str:
        return f"{_bracketed(self.of, run, window)} * {self.factor:g}"

    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        found = self.of.evaluate(samples, time_s, window_s)
        return {key: value * self.factor for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class Ratio(Expression):
    """One divided by another of the same labels, or by one without any."""

    left: Expression
    right: Expression

    def __post_init__(self) -> None:
        if self.right.by not in ((), self.left.by):
            raise ValueError(f"cannot divide labels {self.left.by} by {self.right.by}")

    @property
    def by(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.left.by

    def promql(self, run: str, window: str) -> str:
        match = " on() group_left()" if self.left.by and not self.right.by else ""
        left = _bracketed(self.left, run, window)
        return f"{left} /{match} {_bracketed(self.right, run, window)}"

    def evaluate(self, samples: Samples, time_s: float, window_s: float) -> Result:
        over = self.right.evaluate(samples, time_s, window_s)
        one = over.get(()) if not self.right.by else None
        found: Result = {}
        for key, value in self.left.evaluate(samples, time_s, window_s).items():
            divisor = over.get(key) if self.right.by else one
            if divisor:
                found[key] = value / divisor
        return found


def _bracketed(expression: Expression, run: str, window: str) -> str:
    text = expression.promql(run, window)
    return f"({text})" if isinstance(expression, (Ratio, Mean, Scaled)) else text


def _selector(run: str, where: Mapping[str, str]) -> str:
    pairs = [f'run="{run}"', *(f'{name}="{value}"' for name, value in where.items())]
    return "{" + ",".join(pairs) + "}"


def _sum(by: tuple[str, ...], inner: str, combine: str = "sum") -> str:
    return f"{combine} by ({', '.join(by)}) ({inner})" if by else f"{combine}({inner})"


def _matching(
    samples: Samples, name: str, where: Mapping[str, str]
) -> Iterator[tuple[Labels, Series]]:
    wanted = where.items()
    for labels, series in samples.series.get(name, {}).items():
        if wanted <= dict(labels).items():
            yield labels, series


def _kept(labels: Labels, by: tuple[str, ...]) -> Labels:
    found = dict(labels)
    return tuple((name, found.get(name, "")) for name in by)


def _rates(
    samples: Samples,
    name: str,
    by: tuple[str, ...],
    where: Mapping[str, str],
    time_s: float,
    window_s: float,
) -> Result:
    """Growth per second over the window; a series that began inside it began at 0."""
    first_s = samples.times[0] if samples.times else time_s
    began_s = max(time_s - window_s, first_s)
    if time_s <= began_s:
        return {}
    found: Result = {}
    for labels, series in _matching(samples, name, where):
        now = series.at(time_s, window_s)
        if now is None:
            continue
        before = series.at(began_s, math.inf) or 0.0
        if series.times[0] <= first_s:
            before = max(before, series.values[0])
        key = _kept(labels, by)
        found[key] = found.get(key, 0.0) + (now - before) / (time_s - began_s)
    return found


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float | None:
    """As Prometheus' histogram_quantile; None where nothing was observed."""
    total = buckets[-1][1]
    if total <= 0:
        return None
    wanted = share * total
    lower, below = 0.0, 0.0
    for upper, cumulative in buckets:
        if cumulative >= wanted:
            if math.isinf(upper):
                return lower
            inside = cumulative - below
            return lower + (upper - lower) * ((wanted - below) / inside if inside else 1.0)
        lower, below = upper, cumulative
    return lower
