"""A fleet without Ray: coordinator, worker and store as they are, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.fleet.stages import RolloutStage, StageSearch
from cluster.folder.run_folder import RunFolder
from cluster.jobs.coordinator import Coordinator
from cluster.jobs.queue import QueueConfig, StagePlan
from cluster.jobs.worker import RolloutWorker, WorkerConfig
from rollout.problem import Problem
from rollout.store import RunStore
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference


class LocalFleet:
    """Rollouts in this process."""

    def __init__(self, root: Path, policy: ScriptedPolicy, preference: TablePreference) -> None:
        self.folder = RunFolder(root)
        self.store = RunStore(str(root))
        self.policy, self.preference = policy, preference
        self.versions = {"policy": "policy-r2-a", "ppm": "ppm-r2-a"}
        self.sandbox = ScriptedSandbox({"bad": Failure()}, default="3\n")

    async def rollout(
        self,
        number: int,
        problems: Sequence[Problem],
        stages: Sequence[RolloutStage],
        *,
        preference: bool,
        on_progress: Any,
    ) -> Any:
        (stage,) = stages
        inner = Coordinator(str(self.folder.root), QueueConfig(max_attempts=2))
        ids = tuple(p.id for p in problems)
        plan = StagePlan(
            round=number,
            stage=stage.name,
            tree_index=0,
            problem_ids=ids,
            shard_size=stage.shard_size or 1,
            seed=9,
        )
        inner.plan(plan)
        worker = RolloutWorker(
            "w",
            LocalCoordinator(inner),  # type: ignore[arg-type]
            str(self.folder.root),
            {p.id: p for p in problems},
            StageSearch(
                stages={stage.name: stage},
                policy=self.policy,
                preference=self.preference if preference else None,
                sandbox=self.sandbox,
            ),
            WorkerConfig(max_open_trees=4, poll_s=0.01, engine_backoff_s=0.01),
            info=self.versions,
        )
        running = asyncio.create_task(worker.run())
        try:
            while not inner.status(number).finished:
                await asyncio.sleep(0.01)
        finally:
            await worker.drain()
            await running
        return SimpleNamespace(manifest=inner.seal(number))


class LocalCoordinator:
    """Answers as its actor does."""

    def __init__(self, inner: Coordinator) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            return getattr(self.inner, name)(*arguments)

        return call
