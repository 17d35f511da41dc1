"""How often a set of sampled answers is right: pass@1, pass@k, majority vote and best-by-value.

Plain functions over answers (text, or None for a rollout without one) and their values (the
preference model's estimate of each, any scale, higher is better). Answers are grouped by
`answers_match`, so "1/2" and "0.5" vote together. Ties between groups go to the higher best value,
then to a seeded draw, so that a result is reproducible and does not lean on the order of the
samples.

The paper's test-time protocol (arXiv 2501.04519, section 4) keeps the `top_k` trajectories with the
highest values and takes the best of them; `majority_vote(..., values=..., top_k=...)` is the voting
form of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verifier.verify import answers_match

Matcher = Callable[[str, str], bool]


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


def answer_groups(
    answers: Sequence[str | None], *, matcher: Matcher = answers_match
) -> list[list[int]]:
    """Group sample indices by equivalent answer, in order of first appearance; None is left out.

    A sample joins the first group whose first member it matches, so each distinct text is compared
    with group heads only.
    """
    by_text: dict[str, int] = {}
    groups: list[list[int]] = []
    heads: list[str] = []
    for index, answer in enumerate(answers):
        if answer is None or not answer.strip():
            continue
        group = by_text.get(answer)
        if group is None:
            group = next(
                (place for place, head in enumerate(heads) if matcher(head, answer)), len(heads)
            )
            if group == len(heads):
                heads.append(answer)
                groups.append([])
            by_text[answer] = group
        groups[group].append(index)
    return groups


def majority_vote(
    answers: Sequence[str | None],
    *,
    values: Sequence[float] | None = None,
    top_k: int | None = None,
    seed: int = 0,
    matcher: Matcher = answers_match,
) -> str | None:
    """The answer most samples agree on, up to mathematical equality.

    Args:
        values: one value per answer, the tie-break between groups of equal size (best value of the
        group). top_k: vote only among the K answers with the highest values; needs `values`. None:
        all vote. seed: settles what is still tied, both at the top-K cut and between groups.
    Returns:
        The voted answer as written by the group's best-valued (or else first) member; None when no
        sample has an answer.
    Raises:
        ValueError: lengths differ, top_k < 1, or top_k without values.
    """
    _check_values(answers, values)
    if top_k is not None:
        if values is None:
            raise ValueError("top_k was given without values; ranking needs one value per answer")
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
    rng = random.Random(seed)
    draws = [rng.random() for _ in answers]
    kept = list(range(len(answers)))
    if values is not None and top_k is not None:
        answered = [index for index in kept if answers[index] is not None]
        kept = sorted(answered, key=lambda index: (-values[index], draws[index]))[:top_k]
        kept.sort()
    groups = answer_groups([answers[index] for index in kept], matcher=matcher)
    if not groups:
        return None

    def strength(group: list[int]) -> tuple[int, float, float]:
        members = [kept[place] for place in group]
        best = max(values[index] for index in members) if values is not None else 0.0
        return len(group), best, max(draws[index] for index in members)

    winner = [kept[place] for place in max(groups, key=strength)]
    if values is not None:
        return answers[max(winner, key=lambda index: (values[index], -index))]
    return answers[winner[0]]


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
    matcher: Matcher = answers_match,
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
        return answer is not None and any(matcher(gold, answer) for gold in accepted)

    num_correct = sum(right(answer) for answer in answers)
    voted = majority_vote(answers, values=values, seed=seed, matcher=matcher)
    best = top = None
    if values is not None:
        best = float(right(best_by_value(answers, values, seed=seed)))
        if top_k is not None:
            chosen = majority_vote(answers, values=values, top_k=top_k, seed=seed, matcher=matcher)
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


def _check_values(answers: Sequence[str | None], values: Sequence[float] | None) -> None:
    if values is None:
        return
    if len(values) != len(answers):
        raise ValueError(f"expected one value per answer, got {len(values)} for {len(answers)}")
    for index, value in enumerate(values):
        if math.isnan(value):
            raise ValueError(f"value {index} is NaN; answers cannot be ranked by it")
