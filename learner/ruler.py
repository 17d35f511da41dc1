"""The ruler: how well a PPM ranks the pairs of problems that no model was trained on. Pure.

    trees or pairs --compared_problems--> texts of each problem, own question and another's
    values, log-probabilities of the texts --rank--> `Comparison` of each pair
                                           --measured--> accuracy by ranking, kind and depth

A PPM is worth a search only if it knows more than what costs nothing. So beside its accuracy always
stand, on the same pairs:

    chance    0.5
    logprob   the policy's own log-probability of what differs: the step, or the whole solution,
              without the outputs that the executor wrote; a ranking that only repeats it cannot
              correct the policy
    blind     the same PPM shown another problem's question. What it then still ranks right it
              knows from the form of the steps. (Emptied, the question would be a text it never met;
              a PPM fitted without questions would be another model, and as costly as the first.)

Intervals are bootstraps over problems (`verifier.bootstrap.bootstrap_ratio`): the pairs of one
problem share its question and most of their steps, so they are no independent cases.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from learner.candidates import Recipe, find, kept_pairs
from learner.pairs import PairKind, PreferencePair
from learner.signals import NUM_BINS, bin_of, calibration
from rollout.programs import one_per_program, program_of
from rollout.prompt import PromptTemplate, render_prompt, split_question
from rollout.trajectory import trajectories
from rollout.tree import Tree
from verifier.bootstrap import bootstrap_ratio

RANKINGS = ("ppm", "logprob", "blind")

MIN_PROBLEMS = 20
"""With pairs; a bootstrap over fewer says too little, and their PPM does not pass."""

DEEPEST = 4
"""Pairs with so many shared steps or more are told together."""


@dataclass(slots=True, kw_only=True)
class ComparedProblem:
    """What is asked of the models about one problem."""

    problem_id: str
    pairs: list[PreferencePair] = field(default_factory=list)
    solutions: dict[str, bool] = field(default_factory=dict)
    """Whole solutions with their question -> right or wrong, for the calibration."""
    blind: str | None = None
    """Rendered question of another problem; None: there is no other."""

    def texts(self, template: PromptTemplate) -> list[str]:
        """What the PPM is to value, each text once."""
        found = [text for pair in self.pairs for text in self.sides(pair)]
        if self.blind is not None:
            found += [text for pair in self.pairs for text in self.blind_sides(pair, template)]
        return list(dict.fromkeys([*found, *self.solutions]))

    @staticmethod
    def sides(pair: PreferencePair) -> tuple[str, str]:
        """Both texts of a pair, the chosen one first."""
        return pair.prefix + pair.chosen, pair.prefix + pair.rejected

    def blind_sides(self, pair: PreferencePair, template: PromptTemplate) -> tuple[str, str]:
        """The same under the other question."""
        rest = split_question(pair.prefix, template)[1]
        return f"{self.blind}{rest}{pair.chosen}", f"{self.blind}{rest}{pair.rejected}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How each ranking stands to one pair."""

    problem_id: str
    kind: PairKind
    shared_steps: int
    right: Mapping[str, float]
    """Ranking -> 1 right, 0 wrong, 0.5 a tie; a ranking that was not measured is absent."""


def is_pair_problem(original: str, *, share: float, split_seed: int) -> bool:
    """True if a problem of the training files is held out for pairs.

    Args:
        original: `Problem.original`, so that all variations of a problem go together; the draw is
            independent of `learner.select.is_validation`'s.
    """
    digest = hashlib.sha256(f"{split_seed}:pairs:{original}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def compared_trees(trees: Iterable[Tree], recipe: Recipe) -> list[ComparedProblem]:
    """What the trees of pair problems give: pairs by the rule of training, and every solution a
    rollout reached, one of each program."""
    problems: dict[str, ComparedProblem] = {}
    questions = {}
    for tree in trees:
        name = tree.problem.id
        problem = problems.setdefault(name, ComparedProblem(problem_id=name))
        questions[name] = render_prompt(tree.problem.text, (), recipe.template)
        problem.pairs += find(tree, recipe).pairs
        answered = [t for t in trajectories(tree) if t.correct is not None]
        for solution in one_per_program(answered, lambda t: program_of(t.steps)):
            text = render_prompt(tree.problem.text, solution.steps, recipe.template)
            problem.solutions[text] = bool(solution.correct)
    return _with_other_questions(problems, questions)


def compared_pairs(
    pairs: Iterable[PreferencePair], template: PromptTemplate, limit: int
) -> list[ComparedProblem]:
    """Likewise of the pairs of a dataset, of its first `limit` problems; the solutions are those of
    its answer pairs."""
    problems: dict[str, ComparedProblem] = {}
    questions: dict[str, str] = {}
    for pair in pairs:
        name = pair.problem_id
        if name not in problems and len(problems) == limit:
            break
        problem = problems.setdefault(name, ComparedProblem(problem_id=name))
        questions[name] = split_question(pair.prefix, template)[0]
        problem.pairs.append(pair)
        if pair.kind is PairKind.ANSWER:
            chosen, rejected = problem.sides(pair)
            problem.solutions |= {chosen: True, rejected: False}
    return _with_other_questions(problems, questions)


def _with_other_questions(
    problems: Mapping[str, ComparedProblem], questions: Mapping[str, str]
) -> list[ComparedProblem]:
    """The problems by id, each with the question of the next one."""
    ordered = [problems[name] for name in sorted(problems)]
    for problem, other in zip(ordered, [*ordered[1:], *ordered[:1]], strict=True):
        if other is not problem:
            problem.blind = questions[other.problem_id]
        pairs = problem.pairs
        kept, _ = kept_pairs([(pair.prefix, pair.chosen, pair.rejected) for pair in pairs])
        problem.pairs = [pair for pair, keep in zip(pairs, kept, strict=True) if keep]
    return ordered


def rank(
    problem: ComparedProblem,
    values: Mapping[str, float],
    logprobs: Mapping[tuple[str, str], float],
    template: PromptTemplate,
) -> list[Comparison]:
    """How the rankings stand to the pairs of a problem; a pair with a text too long for one of the
    models is left out of all.

    Args:
        values: of `texts`, by text; NaN: too long.
        logprobs: by (prefix, continuation); NaN likewise.
    """
    found = []
    for pair in problem.pairs:
        sides = {
            "ppm": [values[text] for text in problem.sides(pair)],
            "logprob": [logprobs[pair.prefix, text] for text in (pair.chosen, pair.rejected)],
        }
        if problem.blind is not None:
            sides["blind"] = [values[text] for text in problem.blind_sides(pair, template)]
        if any(math.isnan(value) for both in sides.values() for value in both):
            continue
        found.append(
            Comparison(
                problem_id=problem.problem_id,
                kind=pair.kind,
                shared_steps=pair.shared_steps,
                right={
                    name: 0.5 if better == worse else float(better > worse)
                    for name, (better, worse) in sides.items()
                },
            )
        )
    return found


def measured(
    comparisons: Sequence[Comparison], outcomes: Iterable[tuple[float, bool]]
) -> dict[str, Any]:
    """What the ruler shows, as plain data.

    Args:
        outcomes: value of each solution, and whether it is right.
    Returns:
        `num_pairs`, `num_problems` (with pairs), `rankings` (ranking -> mean, low, high,
        num_problems; absent if it was not measured), `groups` (likewise below "step", "answer" and
        "depth N" of step pairs by their shared steps, with `num_pairs`), `calibration` (bins as in
        `learner.fit.FitResult`), `calibration_error` (None without solutions), `num_solutions`,
        and `problems` (id -> pairs, and of each ranking those it has right), of which the other
        numbers can be made again for several runs together.
    """
    groups: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.kind.value].append(comparison)
        if comparison.kind is PairKind.STEP:
            depth = min(comparison.shared_steps, DEEPEST)
            groups[f"depth {depth}{'+' if depth == DEEPEST else ''}"].append(comparison)
    counts, chances, hits = ([0.0] * NUM_BINS for _ in range(3))
    for value, right in outcomes:
        counts[bin_of(value)] += 1
        chances[bin_of(value)] += (1.0 + value) / 2.0
        hits[bin_of(value)] += right
    bins, error = calibration(counts, chances, hits)
    sums = _sums(comparisons)
    return {
        "num_pairs": len(comparisons),
        "num_problems": len(sums),
        "rankings": accuracies(sums.values()),
        "groups": {
            name: {"num_pairs": len(own), "rankings": accuracies(_sums(own).values())}
            for name, own in sorted(groups.items())
        },
        "calibration": bins,
        "calibration_error": error,
        "num_solutions": int(sum(counts)),
        "problems": sums,
    }


def _sums(comparisons: Iterable[Comparison]) -> dict[str, dict[str, float]]:
    """Pairs of each problem, and of each ranking those it has right."""
    sums: dict[str, dict[str, float]] = {}
    for comparison in comparisons:
        own = sums.setdefault(comparison.problem_id, {"pairs": 0.0})
        own["pairs"] += 1
        for name, right in comparison.right.items():
            own[name] = own.get(name, 0.0) + right
    return sums


def accuracies(sums: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Accuracy of each ranking that was measured, and its interval.

    Args:
        sums: of each problem, as in `measured`.
    """
    rows = list(sums)
    found = {}
    for name in RANKINGS:
        own = [row for row in rows if name in row]
        if own:
            parts, wholes = [row[name] for row in own], [row["pairs"] for row in own]
            found[name] = asdict(bootstrap_ratio(parts, wholes))
    return found


def why_not(measure: Mapping[str, Any], minimum: float | None) -> str:
    """Why a PPM does not steer a search; "": it may.

    Args:
        measure: as `measured` gives it.
        minimum: `evaluation.min_pair_accuracy`; None: every PPM may.
    """
    if minimum is None:
        return ""
    problems, found = measure["num_problems"], measure["rankings"].get("ppm")
    if found is None:
        return "no held-out pairs to measure it on"
    told = (
        f"{100 * found['mean']:.1f} % of {measure['num_pairs']} held-out pairs right "
        f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    )
    if problems < MIN_PROBLEMS:
        return f"{told}, of {problems} problems only, {MIN_PROBLEMS} are needed"
    if found["low"] <= minimum:
        return f"{told}, the lower bound has to be above {100 * minimum:g}"
    return ""
