"""Memory of a rollout worker that may lease any of 747,000 problems, and of the driver beside it.

Coordinator and worker are the real actors on real Ray; the problems are as long as NuminaMath's
(a median of 200 characters, some of 2,000). The worker leases `NUM_JOBS` jobs of `SHARD_SIZE`
problems from all over the plan, whose searches end at once, and commits them. Its memory is that of
its process (RSS) then, less that of a worker that knows no problem.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from bench.coordinator import memory_mib
from cluster.jobs.coordinator import CoordinatorActor
from cluster.jobs.coordinator_client import RemoteCoordinator
from cluster.jobs.queue import QueueConfig, SearchTask, StagePlan
from cluster.jobs.worker import RolloutWorkerActor, WorkerConfig
from rollout.problem import Level, Problem
from rollout.run_store import RunStore
from rollout.stored_problems import StoredProblems
from rollout.tree import Tree

NUM_PROBLEMS = 747_000
NUM_JOBS = 60
SHARD_SIZE = 30
WORDS = ("let", "be", "the", "all", "positive", "such", "that", "find", "x", "\\frac{a}{b}")


class NoSearch:
    """Each search ends at once, with the root alone."""

    async def __call__(self, problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        await asyncio.sleep(0)
        return [tree]


def make_problems(count: int) -> Iterator[Problem]:
    """Texts of log-normal length, each from another place of a large one."""
    rng = random.Random(0)
    words = (rng.choice(WORDS) if rng.random() < 0.8 else str(rng.random()) for _ in range(10**6))
    text = " ".join(words)
    for number in range(count):
        length = min(2000, int(rng.lognormvariate(5.3, 0.6)) + 1)
        start = rng.randrange(len(text) - length)
        yield Problem(
            id=f"numina-olympiad-{number:07d}-{number * 7919 % 1000003:06x}",
            source="numina-olympiad",
            level=Level.OLYMPIAD,
            text=f"{number}: {text[start : start + length]}",
            answer=str(rng.randrange(10**4)),
        )


def measure(num_problems: int = NUM_PROBLEMS) -> dict[str, float]:
    """Figures by name, in MiB and seconds."""
    ray.init(
        address="local",
        namespace="bench",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        with tempfile.TemporaryDirectory() as root:
            return _measure(root, num_problems)
    finally:
        ray.shutdown()


def _measure(root: str, num_problems: int) -> dict[str, float]:
    store = RunStore(root)
    run_id = store.identify()
    ids: list[str] = []

    def problems() -> Iterator[Problem]:
        for problem in make_problems(num_problems):
            ids.append(problem.id)
            yield problem

    before_mib = memory_mib(os.getpid(), "VmRSS")
    began_s = time.perf_counter()
    stored = StoredProblems.write(store, problems())
    write_s = time.perf_counter() - began_s
    shared = ray.put(stored)
    # Jobs from all over the problems, in pieces of what is searched together.
    starts = range(0, num_problems, max(num_problems // NUM_JOBS, SHARD_SIZE))
    planned = [ids[row] for first in starts for row in range(first, first + SHARD_SIZE)]
    del ids[:]
    driver_mib = memory_mib(os.getpid(), "VmRSS") - before_mib
    coordinator: Any = CoordinatorActor.remote(root, QueueConfig(), run_id)
    plan = StagePlan(
        round=1,
        stage="base",
        tree_index=0,
        problem_ids=tuple(planned[: NUM_JOBS * SHARD_SIZE]),
        shard_size=SHARD_SIZE,
        seed=1,
    )
    ray.get(coordinator.plan.remote(plan))

    def worker(name: str, known: Any) -> tuple[Any, int]:
        client = RemoteCoordinator(coordinator)
        made: Any = RolloutWorkerActor.remote(
            name, client, root, known, NoSearch(), WorkerConfig(), run_id=run_id
        )
        pid: Any = ray.get(made.pid.remote())
        return made, pid

    _, idle_pid = worker("idle", {})
    busy, busy_pid = worker("busy", shared)
    idle_mib, known_mib = memory_mib(idle_pid, "VmRSS"), memory_mib(busy_pid, "VmRSS")
    busy.run.remote()
    status: Any = ray.get(coordinator.status.remote(1))
    while not status.finished:
        time.sleep(0.2)
        status = ray.get(coordinator.status.remote(1))
    assert not status.stages["base"].failed and status.totals.trees == len(plan.problem_ids)
    blocks = Path(root, "problem_blocks")
    return {
        "worker_mib_747k": memory_mib(busy_pid, "VmHWM") - idle_mib,
        "worker_index_mib": known_mib - idle_mib,
        "worker_idle_mib": idle_mib,
        "problems_write_s": write_s,
        "problems_driver_mib": driver_mib,
        "problems_disk_mib": sum(path.stat().st_size for path in blocks.iterdir()) / 2**20,
    }
