"""`rstar evaluate --compare A B`: is B better than A, or is it noise?

    A/results.parquet, B/results.parquet --> common problems of each benchmark, method and budget
                                         --> paired bootstrap --> difference, interval, p-value

Only problems both evaluations have are compared; how many one of them lacks is said. Many rows are
many tests: about one in twenty differs by chance alone, so the number of rows stands beside the
verdicts. Not covered: the variance of training runs and sampling seeds (`verifier.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.evaluation import paper
from cluster.evaluation.results import METHODS, method_label
from cluster.evaluation.shares import percent
from cluster.evaluation.tables import RESULTS, read_evaluation
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError
from verifier.bootstrap import Difference, bootstrap_difference

WIDE = 96
"""Characters from which on the table also tells on how many problems each was better."""

Key = tuple[str, str, int]
"""Benchmark, method, budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two evaluations under one method and budget on one benchmark."""

    benchmark: str
    method: str
    budget: int
    first: float
    """Accuracy of A on the common problems; `second`: of B."""
    second: float
    difference: Difference
    only_one: int
    """Problems that only one of the two has."""


def compare(first: Path, second: Path, *, seed: int = 0) -> list[Comparison]:
    """Compare two finished evaluations wherever they measured the same.

    Raises:
        RunFolderError: one of them is not the folder of a finished evaluation.
        ConfigError: they have no benchmark, method and budget in common.
    """
    one, other = _scores(RunFolder(first)), _scores(RunFolder(second))
    common = [key for key in one if key in other and one[key].keys() & other[key].keys()]
    if not common:
        raise ConfigError(
            f"{first} and {second} have nothing in common: {_described(one)}; {_described(other)}"
        )
    found = []
    for key in sorted(common, key=lambda key: (key[0], METHODS.index(key[1]), key[2])):
        problems = sorted(one[key].keys() & other[key].keys())
        a, b = ([scores[key][p] for p in problems] for scores in (one, other))
        found.append(
            Comparison(
                benchmark=key[0],
                method=key[1],
                budget=key[2],
                first=sum(a) / len(a),
                second=sum(b) / len(b),
                difference=bootstrap_difference(a, b, seed=seed),
                only_one=len(one[key].keys() ^ other[key].keys()),
            )
        )
    return found


def _scores(folder: RunFolder) -> dict[Key, dict[str, float]]:
    read_evaluation(folder)
    columns = ["benchmark", "method", "budget", "problem_id", "score"]
    table = folder.read_table(RESULTS, columns)
    if table is None:
        raise RunFolderError(f"{folder.at(RESULTS)}: no such file")
    scores: dict[Key, dict[str, float]] = {}
    for row in table.to_pylist():
        key = (row["benchmark"], row["method"], row["budget"])
        scores.setdefault(key, {})[row["problem_id"]] = row["score"]
    return scores


def _described(scores: Mapping[Key, Any]) -> str:
    benchmarks = ", ".join(dict.fromkeys(key[0] for key in scores))
    methods = ", ".join(dict.fromkeys(f"{key[1]} {key[2]}" for key in scores))
    return f"one has {benchmarks} with {methods}"


def show_comparison(first: Path, second: Path, console: Console) -> None:
    """The comparison as a table, and what it says in words.

    Raises:
        As `compare`.
    """
    top_k = read_evaluation(RunFolder(first))["vote_top_k"]
    found = compare(first, second)
    for name, root in (("A", first), ("B", second)):
        console.print(f"{name} = {root}", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    wide = console.width >= WIDE
    for name in ("A %", "B %", "B - A (95 %)", "p", *(["won:lost"] if wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    benchmark = ""
    for row in found:
        d = row.difference
        if row.benchmark != benchmark:
            benchmark = row.benchmark
            shown = escape(paper.BENCHMARKS.get(benchmark, benchmark))
            table.add_row(f"[bold]{shown}[/bold] ({d.num_problems:,})")
        table.add_row(
            f"  {method_label(row.method, row.budget, top_k)}",
            percent(row.first),
            percent(row.second),
            f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} {100 * d.high:+.1f})",
            "<0.001" if d.p_value < 0.001 else f"{d.p_value:.3f}",
            *([f"{d.better}:{d.worse}"] if wide else []),
            verdict(d),
        )
    console.print(table)
    apart = sum(not row.difference.within_noise for row in found)
    lines = [
        f"{len(found)} comparisons, {apart} beyond noise (5 % of such comparisons are, by chance "
        "alone); paired bootstrap over the common problems"
    ]
    missing = max(row.only_one for row in found)
    if missing:
        lines.append(f"warning: up to {missing} problems are in one of the two only and left out")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def verdict(difference: Difference) -> str:
    """`B better`, `A better` or `within noise`."""
    if difference.within_noise:
        return "within noise"
    return "B better" if difference.mean > 0 else "A better"
