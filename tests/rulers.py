"""A ruler's record by hand."""

from __future__ import annotations

from typing import Any

from learner.pairs import PairKind
from learner.ruler import Comparison, measured, why_not


def ruler_record(
    round: int, *, right: int = 12, problems: int = 24, minimum: float | None = 0.55
) -> dict[str, Any]:
    """Of `problems` with a step pair each, of which the PPM has the first `right` right."""
    pairs = [
        Comparison(
            problem_id=f"p{n}",
            kind=PairKind.STEP,
            shared_steps=n % 3,
            right={"ppm": float(n < right), "logprob": 1.0, "blind": 0.5},
        )
        for n in range(problems)
    ]
    measure = measured(pairs, [(0.5, True), (-0.5, False)] * 6)
    why = why_not(measure, minimum)
    return {
        "round": round,
        "policy": f"policy-r{round}-d",
        "ppm": f"ppm-r{round}-d",
        "source": "pair problems",
        "num_searched": 30,
        "left_out": 0,
        "min_pair_accuracy": minimum,
        "passes": not why,
        "why": why,
        **measure,
    }
