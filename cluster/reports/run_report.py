"""What a run showed: `report.json`, the table in the terminal and the plot.

Everything is computed from what the stages committed; nothing here measures. Shares are fractions
of 1 in the JSON and percent in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from cluster.evaluation.shares import COLUMNS, percent

METHODS = ("greedy", "majority", "best_of_n", "search")
STAGES = ("rollout", "select", "train_policy", "train_ppm", "evaluate")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table: one row for the cold start and one per round."""
    console.print(_accuracy_table(report))
    console.print(_cost_table(report))
    lost = sum(r["lost"] for r in report["rounds"])
    doubled = sum(r["doubled"] for r in report["rounds"])
    seconds = report.get("seconds_total")
    total = f"; {seconds:.0f} s in all" if seconds is not None else ""
    line = f"lost {lost}, doubled {doubled} (leases against committed rows){total}"
    console.print(line, markup=False, highlight=False)


def _accuracy_table(report: Mapping[str, Any]) -> Table:
    evaluation = report.get("evaluation", {})
    caption = ""
    if evaluation:
        caption = (
            f"held-out: greedy on {evaluation['num_problems']} problems; majority, best-of-"
            f"{evaluation['num_samples']} and search on {evaluation['num_search_problems']} "
            "at one generated-token budget per problem"
        )
    table = Table(
        title=f"{report['name']}: % solved, {' '.join(COLUMNS)}",
        caption=caption,
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("round")
    for name in ("coverage", "greedy", "majority", "best-of-N", "MCTS+PPM"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("pairs", justify="right")
    if report.get("cold_start"):
        table.add_row("cold", "", _cells(report["cold_start"].get("greedy")), "", "", "", "")
    for entry in report["rounds"]:
        table.add_row(
            str(entry["round"]),
            _cells(entry["coverage"]),
            *(_cells(entry.get(method)) for method in METHODS),
            percent(entry.get("ppm_pair_accuracy")),
        )
    return table


def _cost_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        title="what each round made, and seconds per stage", box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    names = ("round", "trees", "correct/all", "tokens", "tok/s", "steps/s")
    for name in (*names, "roll", "sel", "SFT", "PPM", "eval"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in report["rounds"]:
        seconds = entry["seconds"]
        table.add_row(
            str(entry["round"]),
            f"{entry['trees']}",
            f"{entry['correct_trajectories']}/{entry['trajectories']}",
            f"{entry['generated_tokens']:,}",
            f"{entry['generated_tokens_per_s']:,.0f}",
            f"{entry['sandbox_steps_per_s']:,.0f}",
            *(_seconds(seconds.get(stage)) for stage in STAGES),
        )
    return table


def _cells(shares: Mapping[str, float | None] | None) -> str:
    if not shares:
        return ""
    return " ".join(percent(shares[column], digits=0) for column in COLUMNS)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def rounds_figure(report: Mapping[str, Any]) -> Figure:
    """Coverage by level and held-out accuracy by method, over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rounds = [entry["round"] for entry in report["rounds"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for column, style in zip(COLUMNS, ("-", "-", "-", "--"), strict=True):
        values = [entry["coverage"][column] for entry in report["rounds"]]
        _line(left, rounds, values, column, style)
    left.set_title("training problems solved by search")
    for method, name in zip(
        METHODS, ("greedy", "majority", "best-of-N by PPM", "MCTS + PPM"), strict=True
    ):
        xs, values = list(rounds), [_overall(entry.get(method)) for entry in report["rounds"]]
        if method == "greedy" and report.get("cold_start"):
            xs, values = [0, *xs], [_overall(report["cold_start"]["greedy"]), *values]
        _line(right, xs, values, name, "-")
    sizes = report.get("evaluation", {})
    counts = f" (greedy: {sizes['num_problems']}, others: {sizes['num_search_problems']})"
    right.set_title("held-out problems solved" + (counts if sizes else ""))
    for axes in (left, right):
        axes.set_xlabel("round (0: cold start)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(f"{report['name']} (seed {report['config']['seed']})")
    figure.tight_layout()
    return figure


def _overall(shares: Mapping[str, float | None] | None) -> float | None:
    return shares["all"] if shares else None


def _line(
    axes: Any, xs: Sequence[int], values: Sequence[float | None], label: str, style: str
) -> None:
    points = [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
