"""What one choice of the recipe gained: runs with it against runs without, round by round.

    python -m bench.compare --runs RUN [RUN...] --against OTHER [OTHER...] [--json FILE]

    RUN/evaluations/round=R.json   greedy verdicts on the held-out problems
    RUN/report.json                training problems solved

The first run is compared with the first other one, and so on: runs of a pair have the same seed,
and so the same problems. Differences are in points; their intervals are those of `bench.ppm`: over
problems, and, of several pairs, over runs. A round that the choice could not reach yet is 0.0 in
every pair, which shows that nothing else differs.

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.ppm import difference_of_runs
from cluster.folder.run_folder import RunFolder, RunFolderError


def figures(runs: Sequence[Path], against: Sequence[Path]) -> dict[str, Any]:
    """Everything that is printed.

    Raises:
        RunFolderError: the runs do not form pairs, one is there twice or not finished, or a pair
            has not the same problems; names it.
    """
    if len(runs) != len(against):
        raise RunFolderError(f"{len(runs)} runs against {len(against)}: each needs one to face")
    if len(set(runs)) < len(runs):
        raise RunFolderError("a run is named twice in --runs")
    pairs = [(RunFolder(run), RunFolder(other)) for run, other in zip(runs, against, strict=True)]
    reports = [(_report(run), _report(other)) for run, other in pairs]
    last = min(len(report["rounds"]) for both in reports for report in both)
    rounds = {}
    for number in range(last + 1):
        verdicts = {str(run.root): _greedy(run, other, number) for run, other in pairs}
        entry: dict[str, Any] = {
            "greedy": _percent([own for own, _ in verdicts.values()]),
            "greedy_against": _percent([other for _, other in verdicts.values()]),
            "greedy_gained": difference_of_runs({k: (b, a) for k, (a, b) in verdicts.items()}),
        }
        if number:
            for place, name in enumerate(("solved", "solved_against")):
                entry[name] = statistics.fmean(
                    100 * both[place]["rounds"][number - 1]["coverage"]["all"] for both in reports
                )
        rounds[str(number)] = entry
    return {"rounds": rounds, "runs": [[str(a.root), str(b.root)] for a, b in pairs]}


def _report(run: RunFolder) -> dict[str, Any]:
    report = run.read("report.json")
    if report is None:
        raise RunFolderError(f"{run.root}: no report.json; is it a finished run?")
    return report


def _greedy(run: RunFolder, other: RunFolder, number: int) -> tuple[list[float], list[float]]:
    """Verdicts of both on the same problems, in one order."""
    found = []
    for folder in (run, other):
        record = folder.read(folder.evaluation_name(number))
        if record is None:
            raise RunFolderError(f"{folder.root}: no evaluation of round {number}")
        found.append({row["problem_id"]: float(row["greedy"]) for row in record["problems"]})
    if found[0].keys() != found[1].keys():
        raise RunFolderError(f"{run.root} and {other.root} were not evaluated on the same problems")
    return list(found[0].values()), [found[1][problem] for problem in found[0]]


def _percent(verdicts: Sequence[Sequence[float]]) -> float:
    return 100 * statistics.fmean(statistics.fmean(own) for own in verdicts)


def _table(found: dict[str, Any]) -> Table:
    table = Table(title="means over runs, %; what is gained, points", box=box.SIMPLE)
    columns = ("round", "greedy", "other", "gained", "problems", "runs", "solved", "other")
    for column in columns:
        table.add_column(column, justify="right")
    for number, entry in found["rounds"].items():
        gained = entry["greedy_gained"]
        low = gained["low_of_runs"]
        table.add_row(
            number,
            f"{entry['greedy']:.1f}",
            f"{entry['greedy_against']:.1f}",
            f"{gained['mean']:+.1f}",
            f"{gained['low']:+.1f}, {gained['high']:+.1f}",
            "" if low is None else f"{low:+.1f}, {gained['high_of_runs']:+.1f}",
            *(f"{entry[k]:.1f}" if k in entry else "" for k in ("solved", "solved_against")),
        )
    table.caption = "problems, runs: 95 % interval over these"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="one for each")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    try:
        found = figures(arguments.runs, arguments.against)
    except RunFolderError as error:
        raise SystemExit(str(error)) from error
    Console().print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
