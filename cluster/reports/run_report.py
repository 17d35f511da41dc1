"""`rstar report RUN`: what a run or an evaluation showed, in the terminal and as a page.

Everything is read from what the stages committed; nothing is measured, and the folder is not
changed but for the page and the plots. Shares are fractions of 1 in report.json and percent here.

Not covered: runs that have not finished (`rstar status` shows those).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.evaluation.shares import COLUMNS, percent, ruler_text, set_aside_lines, token_ratio
from cluster.evaluation.tables import REPORT as EVALUATION
from cluster.folder.run_folder import PAGE, REPORT, RunFolder, RunFolderError
from cluster.machines.cost import cost_lines
from cluster.reports import plots
from cluster.reports.evaluation_page import page as evaluation_page
from cluster.reports.evaluation_page import print_evaluation
from cluster.reports.page import write_page
from cluster.reports.run_facts import read_run
from cluster.reports.run_page import STAGES, figures, mark_of, run_page

WIDE = 96
"""Characters from which on the table also shows weighted majority."""


def show_report(run: Path, console: Console, *, page: Path | None = None) -> None:
    """Print the tables of a run or an evaluation and write its page.

    Args:
        page: None: report.html in the folder.
    Raises:
        RunFolderError: nothing is finished there, or the page cannot be written.
        StoreError: its trees cannot be read.
    """
    folder = RunFolder(run)
    evaluation = folder.read(EVALUATION)
    if evaluation is not None:
        print_evaluation(evaluation, console)
        text = evaluation_page(evaluation)
    else:
        report = folder.read(REPORT)
        if report is None:
            raise RunFolderError(
                f"{folder.at(REPORT)}: no report; has `rstar evolve` finished this run?"
            )
        if "rounds" not in report:
            from cluster.runs.rollout import print_rollout_report

            print_rollout_report(report, console)
            return
        print_report(report, console)
        facts = read_run(folder, report)
        text = run_page(facts)
        if page is None:
            for name, figure in figures(facts).items():
                folder.write_bytes(f"{name}.png", plots.as_png(figure))
    if page is None:
        folder.write_bytes(PAGE, text.encode())
    else:
        write_page(page, text)
    console.print(f"page {page or folder.at(PAGE)}", markup=False, highlight=False, soft_wrap=True)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table: one row for the cold start and one per round."""
    console.print(_accuracy_table(report, wide=console.width >= WIDE))
    console.print(_cost_table(report))
    own = [percent(r.get("newest_round_share"), digits=0) for r in report["rounds"]]
    line = f"SFT trajectories that the round itself found, %: {', '.join(own)}"
    console.print(line, markup=False, highlight=False)
    if not any(r.get("ruler") for r in report["rounds"]):
        pairs = ", ".join(percent(r.get("ppm_pair_accuracy")) for r in report["rounds"])
        line = f"validation pairs that the round's PPM ranks right, %: {pairs}"
        console.print(line, markup=False, highlight=False)
    for entry in report["rounds"]:
        if entry.get("ruler"):
            line = f"round {entry['round']}: {ruler_text(entry['ruler'])}"
            console.print(line, markup=False, highlight=False)
        if entry.get("steering") and not entry["steering"]["steers"]:
            line = f"round {entry['round']} stayed terminal-guided: {entry['steering']['why']}"
            console.print(line, markup=False, highlight=False)
    for line in cost_lines(report.get("cost", {})):
        console.print(line, markup=False, highlight=False)
    for line in set_aside_lines(report.get("set_aside", {})):
        console.print(line, markup=False, highlight=False)
    lost = sum(r["lost"] for r in report["rounds"])
    doubled = sum(r["doubled"] for r in report["rounds"])
    seconds = report.get("seconds_total")
    total = f"; {seconds:.0f} s in all" if seconds is not None else ""
    line = f"lost {lost}, doubled {doubled} (leases against committed rows){total}"
    console.print(line, markup=False, highlight=False)


def _accuracy_table(report: Mapping[str, Any], *, wide: bool) -> Table:
    methods = {"greedy": "greedy", "majority": "majority", "best_of_n": "best-of-N"}
    if wide:
        methods["weighted_majority"] = "weighted maj."
    methods["search"] = "MCTS+PPM"
    if wide:
        methods["weighted_search"] = "weighted MCTS"
    evaluation = report.get("evaluation", {})
    caption = ""
    if evaluation:
        caption = (
            f"held-out: greedy on {evaluation['num_problems']} problems; search of "
            f"{evaluation['num_rollouts']} rollouts on {evaluation['num_search_problems']}, "
            "majority and best-of-N of as many samples as its tokens pay for; ratio: generated "
            "tokens, search over samples; *: the PPM did not pass its ruler and steers no search"
        )
    table = Table(
        title=f"{report['name']}: % solved, {' '.join(COLUMNS)}",
        caption=caption,
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("", no_wrap=True)
    for name in ("coverage", *methods.values()):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    if report.get("cold_start"):
        table.add_row("cold", "", _cells(report["cold_start"].get("greedy")))
    for entry in report["rounds"]:
        table.add_row(
            f"{entry['round']}{mark_of(entry)}",
            _cells(entry["coverage"]),
            *(_cells(entry.get(method)) for method in methods),
            token_ratio(entry.get("search_over_samples_tokens")),
        )
    return table


def _cost_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        title="what each round made, and seconds per stage", box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    names = ("", "trees", "right/all", "tokens", "tok/s", "steps/s")
    for name in (*names, "roll", "sel", "SFT", "PPM", "rul", "eval"):
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
