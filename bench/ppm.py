"""What the PPM of finished runs is worth: what it ranks right, and what its choices gain.

    python -m bench.ppm RUN [RUN...] [--json FILE]

    RUN/rulers/round=R.json       pairs ranked right by the PPM, the policy's log-probability, and
                                  the PPM under another question, by problem
    RUN/evaluations/round=R.json  verdicts of each method on the held-out problems, by problem

Differences are in points of held-out accuracy, on the problems that were sampled and searched, at
the same generated tokens: samples are drawn until they have those of the search, and how near they
came stands beside it (`tokens_search_over_samples`). Each has a paired 95 % bootstrap interval over
problems. Of several runs (seeds) the mean is given twice: `low` and `high` draw problems again
within each run, and say how far other problems would move it; `low_of_runs` and `high_of_runs` are
Student's t interval of the runs' means, and say how far other runs would. Pair accuracies are of
the pairs of all runs together.

Nothing is computed anew: what a run's files do not hold is named under `missing`. Prints a table
and, last, one JSON line; its pair accuracies are those of the last round that all runs have.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from cluster.folder.run_folder import RunFolder, RunFolderError
from learner.ruler import accuracies
from verifier.bootstrap import NUM_DRAWS, bootstrap_difference

DIFFERENCES = {
    "vote_minus_majority": ("weighted_majority", "majority"),
    "best_of_n_minus_majority": ("best_of_n", "majority"),
    "mcts_minus_majority": ("search", "majority"),
    "mcts_minus_greedy": ("search", "greedy"),
    "weighted_mcts_minus_majority": ("weighted_search", "majority"),
    "weighted_mcts_minus_greedy": ("weighted_search", "greedy"),
    "any_minus_majority": ("any_sample", "majority"),
}
"""Name -> the two methods, as the evaluation's rows have them; the last one is the head-room."""

RANKINGS = {"ppm": "pair_accuracy", "logprob": "logprob_accuracy", "blind": "blind_accuracy"}


def figures(runs: Sequence[Path]) -> dict[str, Any]:
    """Everything that is printed.

    Raises:
        RunFolderError: a folder holds no evaluated round; names it.
    """
    folders = {str(run): RunFolder(run) for run in runs}
    found: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any] | None]]] = {}
    for name, folder in folders.items():
        numbers = sorted(
            int(path.stem.removeprefix("round="))
            for path in (folder.root / "evaluations").glob("round=*.json")
        )
        if not any(numbers):
            raise RunFolderError(f"{folder.root}: no evaluation of a round; is it a finished run?")
        for number in filter(None, numbers):
            evaluation = folder.read(folder.evaluation_name(number))
            assert evaluation is not None
            ruler = folder.read(folder.ruler_name(number))
            found.setdefault(number, {})[name] = (evaluation, ruler)
    missing: list[str] = []
    rounds = {}
    for number, of_runs in sorted(found.items()):
        missing += [f"{name}: no round {number}" for name in folders if name not in of_runs]
        rounds[str(number)] = _round(number, of_runs, missing)
    last = max((n for n, of_runs in found.items() if len(of_runs) == len(folders)), default=None)
    headline = rounds[str(last)] if last is not None else {}
    names = [name for own in RANKINGS.values() for name in (own, f"{own}_low", f"{own}_high")]
    return {
        **{name: headline.get(name) for name in names},
        "round": last,
        "rounds": rounds,
        "runs": list(folders),
        "missing": missing,
    }


def _round(
    number: int,
    of_runs: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]],
    missing: list[str],
) -> dict[str, Any]:
    """One round of all runs that have it; adds what they lack to `missing`."""
    entry: dict[str, Any] = {"runs": len(of_runs)}
    rulers = {name: ruler for name, (_, ruler) in of_runs.items() if ruler is not None}
    missing += [f"{n}, round {number}: no ruler" for n in of_runs if n not in rulers]
    told = accuracies(row for ruler in rulers.values() for row in ruler["problems"].values())
    for ranking, name in RANKINGS.items():
        if ranking in told:
            own = told[ranking]
            entry |= {name: own["mean"], f"{name}_low": own["low"], f"{name}_high": own["high"]}
    entry["pair_problems"] = sum(len(ruler["problems"]) for ruler in rulers.values())
    entry["passes"] = [ruler["passes"] for ruler in rulers.values()]
    rows = {
        name: [row for row in evaluation["problems"] if row["majority"] is not None]
        for name, (evaluation, _) in of_runs.items()
    }
    rows = {name: own for name, own in rows.items() if own}
    missing += [f"{n}, round {number}: nothing was sampled" for n in of_runs if n not in rows]
    entry["problems"] = sum(map(len, rows.values()))
    tokens = [
        sum(row[f"{kind}_tokens"] for own in rows.values() for row in own)
        for kind in ("search", "sample")
    ]
    entry["tokens_search_over_samples"] = tokens[0] / tokens[1] if tokens[1] else None
    for name, (better, worse) in DIFFERENCES.items():
        lacking = [n for n, own in rows.items() if any(row.get(better) is None for row in own)]
        missing += [f"{run}, round {number}: no {better}, so no {name}" for run in lacking]
        pairs = {
            run: ([float(r[worse]) for r in own], [float(r[better]) for r in own])
            for run, own in rows.items()
            if run not in lacking
        }
        if pairs:
            entry[name] = difference_of_runs(pairs)
    return entry


def difference_of_runs(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> dict[str, Any]:
    """Mean over runs of a paired difference, in points, and what each run says.

    Args:
        pairs: run -> results of the two methods on its problems, in the same order.
    """
    own = {run: bootstrap_difference(*both) for run, both in pairs.items()}
    means = [found.mean for found in own.values()]
    rng = np.random.default_rng(0)
    draws = np.zeros(NUM_DRAWS)
    for first, second in pairs.values():
        apart = np.subtract(second, first)
        chosen = rng.integers(0, len(apart), size=(NUM_DRAWS, len(apart)))
        draws += apart[chosen].mean(axis=1) / len(pairs)
    low, high = np.quantile(draws, [0.025, 0.975])
    entry: dict[str, Any] = {
        "mean": statistics.fmean(means),
        "low": float(low),
        "high": float(high),
        "low_of_runs": None,
        "high_of_runs": None,
    }
    if len(means) > 1:
        reach = student.ppf(0.975, len(means) - 1) * statistics.stdev(means) / len(means) ** 0.5
        entry |= {"low_of_runs": entry["mean"] - reach, "high_of_runs": entry["mean"] + reach}
    points = {name: value if value is None else 100 * value for name, value in entry.items()}
    of_runs = {run: [100 * f.mean, 100 * f.low, 100 * f.high] for run, f in own.items()}
    return {**points, "of_runs": of_runs}


def _table(found: Mapping[str, Any]) -> Table:
    table = Table(title="by round; differences in points", box=box.SIMPLE)
    table.add_column("")
    for number in found["rounds"]:
        table.add_column(f"round {number}", justify="right")
    entries = list(found["rounds"].values())

    def shown(entry: Mapping[str, Any], name: str) -> str:
        value = entry.get(name)
        if value is None:
            return "not in this run"
        if isinstance(value, Mapping):
            return f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"
        if f"{name}_low" in entry:
            low, high = entry[f"{name}_low"], entry[f"{name}_high"]
            return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{value:.2f}" if isinstance(value, float) else f"{value}"

    counts = ("pair_problems", "problems", "tokens_search_over_samples")
    for name in (*RANKINGS.values(), *DIFFERENCES, *counts):
        table.add_row(name.replace("_", " "), *(shown(entry, name) for entry in entries))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    try:
        found = figures(arguments.runs)
    except RunFolderError as error:
        raise SystemExit(str(error)) from error
    console = Console()
    console.print(_table(found))
    for line in found["missing"]:
        console.print(f"missing: {line}", markup=False, highlight=False, soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
