"""How fast an engine generates at a given load: the curve the simulation and the planner use.

`python -m bench.search --json FILE` writes measured points under "latency_curve", as pairs
[requests in flight, tokens per second of the whole replica]. `DEFAULT_CURVE` stands in for them
where nothing was measured. Its shape is made up (one request alone is bound by memory, many share
its cost), its height is the paper's: 132 requests in flight give 1,714 tokens per second, with
which a tree of 36,000 tokens takes the 21 seconds of an A100-40GB that rStar-Math (arXiv
2501.04519, appendix A.1: 60 GPUs, 747k problems, 3 days a round) spent on a problem, policy and PPM
together. Good for the shape of a schedule, not for a bill.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEY = "latency_curve"


class CurveError(ValueError):
    """A latency curve cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """Tokens per second of one replica by the number of requests in flight."""

    points: tuple[tuple[float, float], ...]
    """(in flight, tokens/s), in flight rising from above 0."""

    def __post_init__(self) -> None:
        if not self.points:
            raise CurveError("a latency curve needs at least one point")
        loads = [load for load, _ in self.points]
        if loads[0] <= 0 or any(b <= a for a, b in itertools.pairwise(loads)):
            raise CurveError(f"requests in flight must rise from above 0, got {loads}")
        if any(speed <= 0 or not math.isfinite(speed) for _, speed in self.points):
            raise CurveError(f"tokens per second must be above 0, got {self.points}")

    @classmethod
    def of(cls, points: Sequence[Sequence[float]]) -> LatencyCurve:
        """From pairs in any order.

        Raises:
            CurveError: they are no pairs of numbers, or no curve.
        """
        try:
            pairs = sorted((float(load), float(speed)) for load, speed in points)
        except (TypeError, ValueError) as error:
            raise CurveError(f"expected pairs [in_flight, tokens_per_s]: {error}") from None
        return cls(tuple(pairs))

    @classmethod
    def read(cls, path: str | Path) -> LatencyCurve:
        """From the JSON file that `bench.search` writes.

        Raises:
            CurveError: the file cannot be read or holds no curve.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CurveError(f"{path}: cannot be read: {error}") from error
        if not isinstance(data, dict) or KEY not in data:
            raise CurveError(f"{path}: has no {KEY!r}; write it with python -m bench.search")
        try:
            return cls.of(data[KEY])
        except CurveError as error:
            raise CurveError(f"{path}: {KEY}: {error}") from None

    def tokens_per_s(self, in_flight: float) -> float:
        """Straight lines between the points, through (0, 0) and level after the last."""
        if in_flight <= 0:
            return 0.0
        points = self.points
        right = bisect_right(points, (in_flight, math.inf))
        if right == len(points):
            return points[-1][1]
        (load_0, speed_0) = points[right - 1] if right else (0.0, 0.0)
        load_1, speed_1 = points[right]
        return speed_0 + (speed_1 - speed_0) * (in_flight - load_0) / (load_1 - load_0)


DEFAULT_CURVE = LatencyCurve(
    ((1, 45), (8, 320), (16, 560), (32, 900), (64, 1300), (128, 1700), (256, 1900))
)
