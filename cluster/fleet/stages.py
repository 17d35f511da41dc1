"""What a rollout is asked for and what came of it: stages, the search of a worker, the outcome.

RolloutStage, RolloutStage, ... --> StageSearch, pickled into the workers: problem, task -> trees
                                --> RolloutOutcome, of the whole round
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from cluster.engines.endpoint import EndpointStats
from cluster.fleet.membership import Losses
from cluster.jobs.admission import EnginePressure
from cluster.jobs.pool import ReplicaPool
from cluster.jobs.queue import SearchTask
from rollout.difficulty import SuspectLabel
from rollout.engine import PolicyEngine, PreferenceEngine
from rollout.problem import Level, Problem
from rollout.search import SearchConfig, StepSandbox, run_search
from rollout.store import Manifest
from rollout.tree import Tree
from verifier.verify import start_symbolic_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStage:
    """One pass over problems in a round."""

    name: str
    search: SearchConfig
    trees: int = 1
    unsolved_only: bool = False
    """Only the problems no tree of the round has solved so far."""
    answers: Callable[..., Awaitable[list[Tree]]] | None = None
    """Of an evaluation: how the problem of a tree is answered, as `rollout.solution_tree`'s
    `answer_tree` does; None: problems are searched for training data."""
    shard_size: int | None = None
    """Problems per job; None: as the cluster's config says."""

    @property
    def tree_stages(self) -> list[str]:
        """One stage of the coordinator per tree of a problem."""
        if self.trees == 1:
            return [self.name]
        return [f"{self.name}-tree{number}" for number in range(self.trees)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOutcome:
    """A sealed round and how it went."""

    manifest: Manifest
    solved: int
    expected: int
    lost: int
    doubled: int
    seconds: float
    generated_tokens: int
    """By this process's workers; a continued round had more before."""
    executions: int
    prefix_hit_rate: float
    endpoint: EndpointStats | None = None
    """What was asked of the endpoint since it was taken; None: replicas were the policy."""
    suspects: tuple[SuspectLabel, ...] = ()
    """Unsolved problems whose searches agree on another answer."""
    losses: Mapping[str, Losses] = field(default_factory=dict)
    """Deaths of actors while it ran, by kind; kinds without any are left out."""
    resumed_trees: int = 0
    """Searches gone on with from what a worker had left."""

    def loss_lines(self) -> list[str]:
        """For people: what died and what that cost."""
        return [
            f"{loss.deaths} x {kind} died, {loss.restarts} replaced, {loss.away_s:.1f} s without "
            f"(last: {loss.last_reason})"
            for kind, loss in self.losses.items()
        ]

    def facts(self) -> dict[str, Any]:
        """For the stage's record."""
        return {
            "solved": self.solved,
            "expected": self.expected,
            "lost": self.lost,
            "doubled": self.doubled,
            "generated_tokens_per_s": self.generated_tokens / self.seconds,
            "sandbox_steps_per_s": self.executions / self.seconds,
            "prefix_hit_rate": self.prefix_hit_rate,
            "suspect_labels": len(self.suspects),
            "deaths": {kind: asdict(loss) for kind, loss in self.losses.items()},
            "resumed_trees": self.resumed_trees,
            "totals": asdict(self.manifest.totals),
            **({"endpoint": asdict(self.endpoint)} if self.endpoint is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class StageSearch:
    """What a rollout worker runs for each task: as the task's stage says."""

    stages: Mapping[str, RolloutStage]
    """By their name for the coordinator, see `RolloutStage.tree_stages`."""
    policy: PolicyEngine
    preference: PreferenceEngine | None
    sandbox: StepSandbox

    POOLS: ClassVar = ("policy", "ppm", "sandbox")

    def set_replicas(self, pool: str, handles: Mapping[str, Any], revision: int) -> None:
        """Change who serves one of the engines, where it is a pool."""
        engine = self._engine(pool)
        if isinstance(engine, ReplicaPool):
            engine.set_replicas(handles, revision)

    def set_pressures(self, pool: str, pressures: Mapping[str, EnginePressure]) -> None:
        """Say how full the replicas of one of the engines are, where it is a pool."""
        engine = self._engine(pool)
        if isinstance(engine, ReplicaPool):
            engine.set_pressures(pressures)

    def waits(self) -> dict[str, dict[str, tuple[int, float]]]:
        """Whom searches wait for; by engine, see `ReplicaPool.waits`."""
        engines = {name: self._engine(name) for name in self.POOLS}
        return {name: e.waits() for name, e in engines.items() if isinstance(e, ReplicaPool)}

    def _engine(self, pool: str) -> object:
        return {"policy": self.policy, "ppm": self.preference, "sandbox": self.sandbox}[pool]

    async def __call__(self, problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        stage = self.stages[task.stage]
        search = stage.search
        if tree.search_config not in ("", search.model_dump_json()):
            raise ValueError(
                f"the open tree of problem {problem.id} was searched with other settings than "
                f"those of stage {task.stage!r}"
            )
        # A symbolic question that has to wait for its process would end undecided.
        await asyncio.to_thread(start_symbolic_worker)
        engines: dict[str, Any] = {
            "policy": self.policy,
            "preference": self.preference,
            "sandbox": self.sandbox,
            "clock": time.monotonic,
        }
        if stage.answers is not None:
            return await stage.answers(tree, search=search, **engines)
        found = await run_search(
            problem,
            config=search,
            round=task.round,
            index=task.index,
            seed=task.seed,
            resume=tree,
            **engines,
        )
        return [found]


def in_sets(problems: Iterable[Problem], size: int) -> list[str]:
    """Ids of problems, hardest first, such that jobs of `size` hold problems of one source each.

    So a set (all problems of a source) can be searched before the others at any time. What is left
    of each set, less than a job, stands at the end.
    """
    problems = list(problems)
    source = {problem.id: problem.source for problem in problems}
    ordered: list[str] = []
    filling: dict[str, list[str]] = {}
    for problem_id in hardest_first(problems):
        job = filling.setdefault(source[problem_id], [])
        job.append(problem_id)
        if len(job) == size:
            ordered += job
            job.clear()
    return [*ordered, *(problem_id for job in filling.values() for problem_id in job)]


def hardest_first(problems: Iterable[Problem]) -> list[str]:
    """Ids of problems, hard levels first, else in their order.

    Hard problems take longest: searched last they would keep a few engines busy at the end of a
    round and leave the others idle.
    """
    rank = {level: place for place, level in enumerate(Level)}
    return [p.id for p in sorted(problems, key=lambda problem: -rank[problem.level])]
