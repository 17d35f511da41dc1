"""The ruler of a round: its PPM on problems held out for pairs, and whether it may steer a search.

    pair problems --leased, without the PPM--> trees, RUN/rulers/round=R/ --the rule of training-->
        pairs --PPM, policy--> values, log-probabilities --learner.ruler--> RUN/rulers/round=R.json

The trees are those of the round's policy, which is the one that the PPM is to steer next, and of
the run's own search settings, the same in every round. They are a round of their own
(`rollout.store.ruler_of`), with the leases, retries and exactly-once commits of any other; what the
models say of their texts is asked here and is asked again if that is cut off.

A run without pair problems is measured on the validation pairs of its dataset, which are of few
problems and of the policies before.

Not covered: verdicts of a later regrade, which change no ruler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import balanced
from cluster.fleet.fleet import Fleet
from cluster.fleet.rollouts import Progress
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.jobs.pool import PolicyPool, PreferencePool
from learner.candidates import Recipe
from learner.dataset import read_pairs
from learner.ruler import (
    ComparedProblem,
    Comparison,
    compared_pairs,
    compared_trees,
    measured,
    rank,
    why_not,
)
from rollout.engine import EvaluationRequest, LogprobRequest, values_of
from rollout.problem import Problem
from rollout.prompt import PromptTemplate, segments_of
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore, ruler_of
from rollout.tasks import all_of

_AT_ONCE = 32
"""Problems about which the models are asked at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """Whether the PPM takes part in a round whose config asks for it."""

    ppm: str
    """Its version."""
    steers: bool
    why: str
    """Why not; "" if it does."""


def steering_of(record: dict[str, Any]) -> Steering:
    """What a ruler's record decides about the round after it."""
    return Steering(ppm=record["ppm"], steers=record["passes"], why=record["why"])


async def measure(
    fleet: Fleet,
    problems: Sequence[Problem],
    dataset: Path,
    *,
    config: EvaluationConfig,
    search: SearchConfig,
    recipe: Recipe,
    round: int,
    on_progress: Progress,
) -> tuple[dict[str, Any], RolloutOutcome | None]:
    """Measure the PPM that a fleet serves, beside the policy it serves.

    Args:
        problems: held out for pairs; none: the validation pairs of `dataset` are taken.
        search: of the pair problems.
        recipe: how trees give pairs.
        round: of the models.
    Returns:
        The ruler's record: what `learner.ruler.measured` gives, with `round`, `policy` and `ppm`
        (versions), `source` ("pair problems" or "validation pairs"), `num_searched` (problems),
        `left_out` (pairs with a text too long for a model), `min_pair_accuracy`, `passes` and
        `why` (not; "" if it does). And how the search went; None without one.
    Raises:
        EngineError: members of a pool died too often.
        DatasetError, StoreError: pairs or trees cannot be read.
    """
    outcome = None
    if problems:
        chosen = balanced(problems, config.num_pair_problems)
        stage = RolloutStage(name="ruler", search=search)
        outcome = await fleet.rollout(
            ruler_of(round), chosen, [stage], preference=False, on_progress=on_progress
        )
        trees = TrajectoryStore(RunStore(str(fleet.folder.root)), ruler_of(round)).trees()
        compared = await asyncio.to_thread(compared_trees, trees, recipe)
    else:
        pairs = read_pairs(dataset, "validation")
        compared = await asyncio.to_thread(
            compared_pairs, pairs, recipe.template, config.num_pair_problems
        )
    asked = _Asked(fleet.policy, fleet.preference, recipe.template)
    await asked.about(compared, on_progress)
    measure = measured(asked.comparisons, asked.outcomes)
    why = why_not(measure, config.min_pair_accuracy)
    record = {
        "round": round,
        "policy": asked.policy_version,
        "ppm": asked.preference_version,
        "source": "pair problems" if problems else "validation pairs",
        "num_searched": len(compared),
        "left_out": sum(len(problem.pairs) for problem in compared) - len(asked.comparisons),
        "min_pair_accuracy": config.min_pair_accuracy,
        "passes": not why,
        "why": why,
        **measure,
    }
    return record, outcome


class _Asked:
    """What both models say of problems, and what comes of it; in the order of the problems."""

    def __init__(
        self, policy: PolicyPool, preference: PreferencePool, template: PromptTemplate
    ) -> None:
        self.comparisons: list[Comparison] = []
        self.outcomes: list[tuple[float, bool]] = []
        self.policy_version = self.preference_version = ""
        self._policy, self._preference, self._template = policy, preference, template

    async def about(self, problems: Sequence[ComparedProblem], on_progress: Progress) -> None:
        """Ask, a few problems at a time."""
        room, done = asyncio.Semaphore(_AT_ONCE), 0

        async def one(problem: ComparedProblem) -> Found:
            nonlocal done
            async with room:
                found = await self._about(problem)
            done += 1
            on_progress(done, len(problems), {"now": "measuring"})
            return found

        for comparisons, outcomes in await all_of(one(problem) for problem in problems):
            self.comparisons += comparisons
            self.outcomes += outcomes

    async def _about(self, problem: ComparedProblem) -> Found:
        values = await self._values(problem)
        logprobs = await self._logprobs(problem)
        outcomes = [
            (values[text], right)
            for text, right in problem.solutions.items()
            if values[text] == values[text]
        ]
        return rank(problem, values, logprobs, self._template), outcomes

    async def _values(self, problem: ComparedProblem) -> dict[str, float]:
        texts = tuple(problem.texts(self._template))
        if not texts:
            return {}
        request = EvaluationRequest(texts=texts, routing_key=problem.problem_id)
        reply = await self._preference.evaluate(request)
        self.preference_version = reply.preference_version
        values = values_of(request, reply)
        return {
            text: float("nan") if value is None else value
            for text, value in zip(texts, values, strict=True)
        }

    async def _logprobs(self, problem: ComparedProblem) -> dict[tuple[str, str], float]:
        sides: Iterable[tuple[str, str]] = (
            (pair.prefix, text) for pair in problem.pairs for text in (pair.chosen, pair.rejected)
        )
        keys = list(dict.fromkeys(sides))
        if not keys:
            return {}
        texts = tuple(segments_of(*key) for key in keys)
        request = LogprobRequest(texts=texts, routing_key=problem.problem_id)
        reply = await self._policy.logprobs(request)
        self.policy_version = reply.policy_version
        return dict(zip(keys, reply.values, strict=True))


Found = tuple[list[Comparison], list[tuple[float, bool]]]
