"""Shares of problems solved, per level and over all, fractions of 1; and how they are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rollout.problem import Level
from rollout.store import Commit

LEVELS = tuple(level.value for level in Level)
COLUMNS = (*LEVELS, "all")


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


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent; "-" for None."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def token_ratio(ratio: float | None) -> str:
    """Tokens over other tokens; "" for None."""
    return "" if ratio is None else f"{ratio:.2f}"


def counts_text(counts: Mapping[str, int]) -> str:
    """`unfinished 12, code failed 3`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in ordered) or "none"


def interval(estimate: Mapping[str, float] | None) -> str:
    """`61.2 [55.0, 67.4]` in percent; "-" for None."""
    if estimate is None:
        return "-"
    low, high = percent(estimate["low"]), percent(estimate["high"])
    return f"{percent(estimate['mean'])} [{low}, {high}]"


def ruler_text(ruler: Mapping[str, Any]) -> str:
    """For people: what a PPM ranks right, beside the baselines, and of how much.

    Args:
        ruler: a record of `cluster.evaluation.ruler`.
    """
    found = ruler["rankings"]
    shares = {name: percent(found.get(name, {}).get("mean")) for name in ("logprob", "blind")}
    passes = "passes" if ruler["passes"] else "does not pass"
    return (
        f"PPM {passes}: {interval(found.get('ppm'))} % of {ruler['num_pairs']} pairs right "
        f"(log-probability {shares['logprob']}, question-blind {shares['blind']}, chance 50), "
        f"{ruler['num_problems']} of {ruler['num_searched']} problems have pairs"
        + ("" if ruler["source"] == "pair problems" else "; only validation problems of the data")
    )


def set_aside_lines(failures: Mapping[int, Mapping[str, str]]) -> list[str]:
    """For people: held-out problems that count as wrong because they could not be evaluated.

    Args:
        failures: by round, why, by problem.
    """
    lines = []
    for number, reasons in failures.items():
        if reasons:
            shown = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3])
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            lines.append(
                f"round {number}: {len(reasons)} held-out problems were set aside and count as "
                f"wrong ({shown}{more})"
            )
    return lines


def problems_by_level(
    commits: Mapping[str, Commit], levels: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """How many problems the committed trees of a round search and solve, for the stage's record.

    Args:
        levels: of every problem, by id.
    """
    keys = [key for commit in commits.values() for key in commit.trees]
    ids = {
        "searched_by_level": {problem_id for problem_id, _, _ in keys},
        "solved_by_level": {problem_id for problem_id, _, solved in keys if solved},
    }
    return {
        name: with_all(Counter(filter(None, map(levels.get, found))), len(found))
        for name, found in ids.items()
    }


def with_all(counts: Mapping[str, int], total: int | None = None) -> dict[str, int]:
    """Counts per level in order, and over all: `total`, or their sum."""
    ordered = {column: counts[column] for column in COLUMNS if column in counts}
    return {**ordered, "all": sum(counts.values()) if total is None else total}
