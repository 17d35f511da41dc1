"""How often a set of sampled answers is right: pass@1, pass@k, majority vote and best-by-value.

Plain functions over answers (text, or None for a rollout without one) and their values (the
preference model's estimate of each, any scale, higher is better). Answers are grouped by
`answers_match`, so "1/2" and "0.5" vote together. Ties between groups go to the higher best value,
then to a seeded draw, so that a result is reproducible and does not lean on the order of the
samples.

Grouping asks for a mathematical comparison only where the text cannot tell: equal normal forms are
one answer, two different whole numbers are two.

The paper's test-time protocol (arXiv 2501.04519, section 4) keeps the `top_k` trajectories with the
highest values and takes the best of them; `majority_vote(..., values=..., top_k=...)` is the voting
form of it.
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
    value: float | None
    """Best value of its samples; None: none of them has one."""
    members: tuple[int, ...]
    """Indices of its samples: those with a vote first, best value first, then in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemAccuracy:
    """One problem's results; each number is 0..1 so that a mean over problems is the benchmark's
    accuracy."""

    num_samples: int
    num_correct: int
    pass_at_1: float
    """Share of samples that are right."""
    pass_at_k: dict[int, float]
    """Unbiased estimate for each k <= num_samples asked for."""
    majority: float
    """1.0 when the majority answer is right."""
    best_by_value: float | None
    """1.0 when the sample with the highest value is right; None without values."""
    top_k_majority: float | None
    """1.0 when the majority among the top-K by value is right; None without values or top_k."""


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
    seed: int = 0,
) -> list[RankedAnswer]:
    """Every distinct answer, the winner of the vote first.

    Order: votes, then best value, then a seeded draw. Answers outside the top K have no vote and
    follow, best value first.

    Args:
        values: one per answer, higher is better; None ranks below every value.
        top_k: only the K answers with the highest values vote; needs `values`. None: all vote.
        seed: settles what is still tied, both at the top-K cut and between groups.
    Raises:
        ValueError: lengths differ, a value is NaN, top_k < 1, or top_k without values.
    """
    _check_values(answers, values)
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

    def strength(group: list[int]) -> tuple[int, float, float]:
        voting = [index for index in group if index in voters]
        heard = voting or group
        return (
            len(voting),
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
                value=best if best > -math.inf else None,
                members=tuple(members),
            )
        )
    return ranked


def majority_vote(
    answers: Sequence[str | None],
    *,
    values: Sequence[float | None] | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> str | None:
    """The answer most samples agree on, up to mathematical equality; the first of `rank_answers`.

    Returns:
        The voted answer as written by the group's best-valued (or else first) member; None when no
        sample has an answer.
    Raises:
        ValueError: as `rank_answers`.
    """
    ranked = rank_answers(answers, values=values, top_k=top_k, seed=seed)
    return ranked[0].answer if ranked else None


def best_by_value(
    answers: Sequence[str | None], values: Sequence[float], *, seed: int = 0
) -> str | None:
    """The answer of the sample with the highest value, among samples that have one; ties by seed.

    Raises:
        ValueError: lengths differ or a value is NaN.
    """
    _check_values(answers, values)
    rng = random.Random(seed)
    draws = [rng.random() for _ in answers]
    answered = [index for index, answer in enumerate(answers) if answer is not None]
    if not answered:
        return None
    return answers[max(answered, key=lambda index: (values[index], draws[index]))]


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


def problem_accuracy(
    golds: str | Sequence[str],
    answers: Sequence[str | None],
    *,
    values: Sequence[float] | None = None,
    ks: Sequence[int] = (1, 8, 64),
    top_k: int | None = None,
    seed: int = 0,
) -> ProblemAccuracy:
    """Grade one problem's samples against its gold answer, or against any of several accepted ones.

    Args:
        ks: the k of pass@k; those above the number of samples are left out of the result.
    Raises:
        ValueError: no samples, no golds, or values that do not fit the answers.
    """
    accepted = [golds] if isinstance(golds, str) else list(golds)
    if not accepted:
        raise ValueError("golds is empty; at least one accepted answer is needed")
    if not answers:
        raise ValueError("answers is empty; a problem needs at least one sample")
    _check_values(answers, values)

    def right(answer: str | None) -> bool:
        return answer is not None and any(answers_match(gold, answer) for gold in accepted)

    num_correct = sum(right(answer) for answer in answers)
    voted = majority_vote(answers, values=values, seed=seed)
    best = top = None
    if values is not None:
        best = float(right(best_by_value(answers, values, seed=seed)))
        if top_k is not None:
            chosen = majority_vote(answers, values=values, top_k=top_k, seed=seed)
            top = float(right(chosen))
    return ProblemAccuracy(
        num_samples=len(answers),
        num_correct=num_correct,
        pass_at_1=num_correct / len(answers),
        pass_at_k={k: pass_at_k(len(answers), num_correct, k) for k in ks if k <= len(answers)},
        majority=float(right(voted)),
        best_by_value=best,
        top_k_majority=top,
    )


def _check_values(answers: Sequence[str | None], values: Sequence[float | None] | None) -> None:
    if values is None:
        return
    if len(values) != len(answers):
        raise ValueError(f"expected one value per answer, got {len(values)} for {len(answers)}")
    for index, value in enumerate(values):
        if value is not None and math.isnan(value):
            raise ValueError(f"value {index} is NaN; answers cannot be ranked by it")
