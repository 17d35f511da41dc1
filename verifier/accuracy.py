"""Which of many sampled answers to believe, and how often one of k is right.

Plain functions over answers (text, or None for a rollout without one) and their values (the
preference model's estimate of each, any scale, higher is better). Answers are grouped by
`answers_match`, so "1/2" and "0.5" vote together. Ties between groups go to the higher best value,
then to a seeded draw, so that a result is reproducible and does not lean on the order of the
samples.

Grouping asks for a mathematical comparison only where the text cannot tell: equal normal forms are
one answer, two different whole numbers are two.

The paper's test-time protocol (arXiv 2501.04519, section 4) keeps the `top_k` trajectories with the
highest values and takes the best of them; `rank_answers(..., values=..., top_k=...)` is the voting
form of it. With `weights` each answer has the sum of its samples' weights instead of their number:
weighted majority (Li et al. 2023, arXiv 2206.02336, the voting verifier).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from verifier.answer import normalise
from verifier.verify import MAX_CHARACTERS, answers_match

_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,14}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedAnswer:
    """One distinct answer among many samples, and how it stands."""

    answer: str
    """As its best-valued sample wrote it, or the first without values."""
    votes: int
    """Samples that gave it and had a vote."""
    weight: float
    """Sum of the weights of these; without weights their number."""
    value: float | None
    """Best value of its samples; None: none of them has one."""
    members: tuple[int, ...]
    """Indices of its samples: those with a vote first, best value first, then in order."""


def answer_groups(answers: Sequence[str | None]) -> list[list[int]]:
    """Group sample indices by equivalent answer, in order of first appearance; None is left out.

    A sample joins the first group whose first member it matches, so each distinct text is compared
    with group heads only.
    """
    by_form: dict[str, int] = {}
    groups: list[list[int]] = []
    heads: list[tuple[str, bool]] = []
    for index, answer in enumerate(answers):
        if answer is None or not answer.strip():
            continue
        form = (normalise(answer) if len(answer) <= MAX_CHARACTERS else "") or answer
        group = by_form.get(form)
        if group is None:
            whole = _WHOLE_NUMBER.fullmatch(form) is not None
            group = next(
                (
                    place
                    for place, (head, head_whole) in enumerate(heads)
                    if not (whole and head_whole) and answers_match(head, answer)
                ),
                len(heads),
            )
            if group == len(heads):
                heads.append((answer, whole))
                groups.append([])
            by_form[form] = group
        groups[group].append(index)
    return groups


def rank_answers(
    answers: Sequence[str | None],
    *,
    values: Sequence[float | None] | None = None,
    top_k: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> list[RankedAnswer]:
    """Every distinct answer, the winner of the vote first.

    Order: votes by weight, then best value, then a seeded draw. Answers outside the top K have no
    vote and follow, best value first.

    Args:
        values: one per answer, higher is better; None ranks below every value.
        top_k: only the K answers with the highest values vote; needs `values`. None: all vote.
        weights: what the vote of each counts, >= 0; None: 1.
        seed: settles what is still tied, both at the top-K cut and between groups.
    Raises:
        ValueError: lengths differ, a value is NaN, a weight is negative or no finite number,
            top_k < 1, or top_k without values.
    """
    _check_values(answers, values)
    if weights is None:
        weights = [1.0] * len(answers)
    elif len(weights) != len(answers) or not all(0.0 <= w < math.inf for w in weights):
        raise ValueError(f"expected {len(answers)} finite weights >= 0, got {list(weights)}")
    if top_k is not None:
        if values is None:
            raise ValueError("top_k was given without values; ranking needs one value per answer")
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
    known = [value if value is not None else -math.inf for value in values or [None] * len(answers)]
    rng = random.Random(seed)
    draws = [rng.random() for _ in answers]
    groups = answer_groups(answers)
    voters = {index for group in groups for index in group}
    if top_k is not None:
        voters = set(sorted(voters, key=lambda index: (-known[index], draws[index]))[:top_k])

    def weight(group: list[int]) -> float:
        # Exactly rounded, so that equal votes are tied in whatever order they are added.
        return math.fsum(weights[index] for index in group if index in voters)

    def strength(group: list[int]) -> tuple[float, float, float]:
        heard = [index for index in group if index in voters] or group
        return (
            weight(group),
            max(known[index] for index in heard),
            max(draws[index] for index in heard),
        )

    ranked = []
    for group in sorted(groups, key=strength, reverse=True):
        members = sorted(group, key=lambda index: (index not in voters, -known[index], index))
        best = max(known[index] for index in group)
        ranked.append(
            RankedAnswer(
                answer=(answers[members[0]] or "").strip(),
                votes=sum(index in voters for index in group),
                weight=weight(group),
                value=best if best > -math.inf else None,
                members=tuple(members),
            )
        )
    return ranked


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples drawn without replacement is right.

    Source: Chen et al. 2021 (arXiv 2107.03374), 1 - C(n-c, k) / C(n, k).

    Raises:
        ValueError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be in 0..{num_samples}, got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in 1..{num_samples} (num_samples), got {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _check_values(answers: Sequence[str | None], values: Sequence[float | None] | None) -> None:
    if values is None:
        return
    if len(values) != len(answers):
        raise ValueError(f"expected one value per answer, got {len(values)} for {len(answers)}")
    for index, value in enumerate(values):
        if value is not None and math.isnan(value):
            raise ValueError(f"value {index} is NaN; answers cannot be ranked by it")
