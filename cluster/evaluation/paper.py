"""What arXiv 2501.04519 (v1) reports, to stand beside our own numbers. All in percent.

A number without its protocol says little: "8 trajectories" there are 8 independent searches of 32
candidates, and the answer is voted among the best-valued. Greedy rows are one sample each.
Evaluated on MATH-500, AIME 2024 (30 problems), AMC 2023 (40), OlympiadBench, College Math, GSM8K
and GaokaoEn 2023; single runs, no intervals given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BENCHMARKS: Mapping[str, str] = {
    "math500": "MATH-500",
    "aime2024": "AIME 2024",
    "amc23": "AMC 2023",
    "olympiadbench": "Olympiad",
    "collegemath": "College",
    "gsm8k_test": "GSM8K",
    "gaokao2023en": "GaokaoEn",
    "omni": "Omni-MATH",
    "math_test": "MATH (5,000)",
}
"""File name of a benchmark -> its name for people, in the order of the paper's columns."""

_COLUMNS = tuple(BENCHMARKS)[:7]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """One row of one table."""

    table: int
    name: str
    accuracy: Mapping[str, float]
    """Percent by benchmark file name; a benchmark the table lacks is left out."""

    @property
    def label(self) -> str:
        return f"paper, Table {self.table}: {self.name}"


def _row(table: int, name: str, *cells: float | None) -> PaperRow:
    known = {
        benchmark: cell for benchmark, cell in zip(_COLUMNS, cells, strict=True) if cell is not None
    }
    return PaperRow(table=table, name=name, accuracy=known)


COVERAGE: Mapping[int, Mapping[str, float]] = {
    1: {"gsm": 96.61, "math": 67.36, "olympiad": 20.99, "all": 60.17},
    2: {"gsm": 97.88, "math": 67.40, "olympiad": 56.04, "all": 66.60},
    3: {"gsm": 98.15, "math": 88.69, "olympiad": 62.16, "all": 77.86},
    4: {"gsm": 98.15, "math": 94.53, "olympiad": 80.58, "all": 90.25},
}
"""Table 2: share of the 747k problems solved, by round and level."""

GPU_SECONDS_PER_PROBLEM: Mapping[int, int] = {1: 130, 2: 21, 3: 21, 4: 49}
"""Worked out from Appendix A.1: nodes x GPUs x days over 747k problems (H100 in round 1, then A100
of 40 GB)."""

GREEDY_ROUNDS: tuple[PaperRow, ...] = (
    _row(3, "Qwen2.5-Math-7B base", 58.8, 0.0, 22.5, 21.8, 41.6, 91.6, 51.7),
    _row(3, "policy of round 1", 69.6, 3.3, 30.0, 34.7, 44.5, 88.4, 57.4),
    _row(3, "policy of round 2", 73.6, 10.0, 35.0, 39.0, 45.7, 89.1, 59.7),
    _row(3, "policy of round 3", 75.8, 16.7, 45.0, 44.1, 49.6, 89.3, 62.8),
    _row(3, "policy of round 4", 78.4, 26.7, 47.5, 47.1, 52.5, 89.7, 65.7),
)
"""The policy alone, greedy."""

SEARCH_ROUNDS: tuple[PaperRow, ...] = (
    _row(6, "round 1, 8 trajectories", 75.2, 10.0, 57.5, 35.7, 45.4, 90.9, 60.3),
    _row(6, "round 2, 8 trajectories", 86.6, 43.3, 75.0, 59.4, 55.6, 94.0, 76.4),
    _row(6, "round 3, 8 trajectories", 87.0, 46.7, 80.0, 61.6, 56.5, 94.2, 77.1),
    _row(6, "round 4, 8 trajectories", 89.4, 50.0, 87.5, 65.3, 59.0, 95.0, 80.5),
)
"""Policy and PPM of each round, searched."""

# The last columns of this row could not be read with certainty and are left out.
SEARCHED_LONG = _row(5, "rStar-Math 7B, 64 trajectories", 90.0, 53.3, None, 65.6, 60.5, None, None)

BEST_OF_N: tuple[PaperRow, ...] = (
    _row(8, "best-of-N by an ORM", 82.6, 26.7, 65.0, 55.1, 55.5, 92.3, 72.5),
)


def rows_beside(method: str) -> tuple[PaperRow, ...]:
    """Rows of the paper that stand beside a method's row in a table; () if it has none.

    Args:
        method: as in `cluster.evaluation.results.Result.method`.
    """
    return {
        "greedy": GREEDY_ROUNDS,
        "best-of-n": BEST_OF_N,
        "mcts": (*SEARCH_ROUNDS, SEARCHED_LONG),
    }.get(method, ())
