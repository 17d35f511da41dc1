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
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import balanced
from cluster.fleet.fleet import Fleet
from cluster.fleet.rollouts import Progress
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.jobs.pool import PolicyPool, PreferencePool
from learner.candidates import Recipe
from learner.checkpoint import Checkpoint
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
from rollout.store import TrajectoryStore, ruler_of
from rollout.tasks import all_of

_AT_ONCE = 8
"""Problems about which the models are asked at a time: few, since a request that waits behind all
others on a slow machine would run out of time."""


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


def at_chance(record: dict[str, Any] | None) -> bool:
    """Whether a ruler cannot tell its PPM from chance; False where nothing was measured."""
    own = (record or {}).get("rankings", {}).get("ppm")
    return own is not None and own["low"] <= 0.5


async def measure(
    fleet: Fleet,
    problems: Sequence[Problem],
    dataset: Path,
    *,
    config: EvaluationConfig,
    search: SearchConfig,
    recipe: Recipe,
    round: int,
    policy: Checkpoint,
    ppm: Checkpoint,
    on_progress: Progress,
) -> tuple[dict[str, Any], RolloutOutcome | None]:
    """Measure the PPM that a fleet serves, beside the policy that it serves.

    Args:
        problems: held out for pairs; none: the validation pairs of `dataset` are taken.
        search: of the pair problems.
        recipe: how trees give pairs.
        round: the one that ends with these models; they may be of an earlier one.
        policy, ppm: what the fleet serves.
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
        trees = TrajectoryStore(fleet.folder.store, ruler_of(round)).trees()
        compared = await asyncio.to_thread(compared_trees, trees, recipe)
    else:
        pairs = read_pairs(dataset, "validation")
        compared = await asyncio.to_thread(
            compared_pairs, pairs, recipe.template, config.num_pair_problems
        )
    room = asyncio.Semaphore(_AT_ONCE)
    ask = partial(
        _ask, policy=fleet.policy, preference=fleet.preference, template=recipe.template, room=room
    )
    found = await all_of(ask(problem) for problem in compared)
    comparisons = [comparison for of_problem, _ in found for comparison in of_problem]
    measure = measured(comparisons, [outcome for _, of_problem in found for outcome in of_problem])
    why = why_not(measure, config.min_pair_accuracy)
    record = {
        "round": round,
        "policy": policy.version,
        "ppm": ppm.version,
        "source": "pair problems" if problems else "validation pairs",
        "num_searched": len(compared),
        "left_out": sum(len(problem.pairs) for problem in compared) - len(comparisons),
        "min_pair_accuracy": config.min_pair_accuracy,
        "passes": not why,
        "why": why,
        **measure,
    }
    return record, outcome


async def _ask(
    problem: ComparedProblem,
    *,
    policy: PolicyPool,
    preference: PreferencePool,
    template: PromptTemplate,
    room: asyncio.Semaphore,
) -> tuple[list[Comparison], list[tuple[float, bool]]]:
    """What both models say of a problem: its pairs, and the value and verdict of its solutions."""
    texts = tuple(problem.texts(template))
    if not texts:
        return [], []
    async with room:
        request = EvaluationRequest(texts=texts, routing_key=problem.problem_id)
        told = values_of(request, await preference.evaluate(request))
        values = {
            text: math.nan if value is None else value
            for text, value in zip(texts, told, strict=True)
        }
        sides = [(pair.prefix, t) for pair in problem.pairs for t in (pair.chosen, pair.rejected)]
        keys = list(dict.fromkeys(sides))
        written = tuple(segments_of(*key) for key in keys)
        asked = LogprobRequest(texts=written, routing_key=problem.problem_id)
        likely = (await policy.logprobs(asked)).values if keys else ()
    logprobs = dict(zip(keys, likely, strict=True))
    outcomes = [
        (values[text], right)
        for text, right in problem.solutions.items()
        if not math.isnan(values[text])
    ]
    return rank(problem, values, logprobs, template), outcomes
