"""The actor that hands out jobs: a thin shell around `JobQueue` whose truth is the store.

    plan(stage)  -> trajectories/round=R/plans/<stage>.json (create-only), jobs queued
    grant/renew  -> a lease, in memory only
    complete     -> the marker the worker has committed is read from the store: the job is done, its
                    handed-back part is queued
    job out of attempts -> an empty shard is committed that hands each problem back as a job of its
                    own (several problems) or quarantines it with its error (one problem)

Killed at any moment it comes back by reading plans and commit markers of the rounds that are not
sealed. Workers go on meanwhile: a lease it does not know is taken over when it is renewed (so it
grants none for the first `adopt_s`), a completion is accepted from anybody. A split and a
quarantine are commits as well, so a worker that comes late with the whole shard loses against them
and no tree is counted twice.

All methods are idempotent and short; Ray may call them again after a restart
(`max_task_retries=-1`).
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from cluster.jobs.queue import (
    Job,
    JobQueue,
    JobState,
    Lease,
    LeaseCounters,
    QueueConfig,
    StageCounts,
    StagePlan,
    committed_jobs,
    plan_jobs,
)
from cluster.telemetry import metrics, tracing
from rollout.open_trees import OpenTreeStore
from rollout.store import (
    Commit,
    Manifest,
    RunStore,
    StoreError,
    Totals,
    TrajectoryStore,
    stored_rounds,
)
from rollout.table import trees_to_table

logger = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 5.0
"""Pause before a split or quarantine that the store refused is tried again."""


@dataclass(slots=True, kw_only=True)
class WorkerProgress:
    """What a worker has done since it started and is doing now; sent with every renewal."""

    open_trees: int = 0
    committed: Totals = field(default_factory=Totals)
    finished: Totals = field(default_factory=Totals)
    """Trees searched to their end, committed or not."""
    failed_problems: int = 0
    retried_searches: int = 0
    resumed_trees: int = 0
    """Searches gone on with from what another worker had left."""
    requests: int = 0
    """Of the trees in hand to the policy; any change is a sign of work."""
    lost_leases: int = 0
    waiting_commits: int = 0
    """Shards that are finished and wait for a store that fails."""
    error: str = ""
    """The last error a search or a commit ended with."""
    searches: int = 0
    """Of one problem each, that ended with all their trees."""
    candidates: int = 0
    """Completions of trees searched to their end."""
    unfinished: int = 0
    """Those of them that ended in no step marker."""
    unfinished_text: str = ""
    """The first of these; "" if there is none."""
    waits: Mapping[str, Mapping[str, tuple[int, float]]] = field(default_factory=dict)
    """By pool, see `ReplicaPool.waits`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """How far a stage is, by committed shards."""

    stage: str
    counts: StageCounts
    totals: Totals
    """Of all committed trees of the stage."""
    failed: Mapping[str, str]
    """Quarantined problems: id -> error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """How far a round is."""

    round: int
    sealed: bool
    stages: Mapping[str, StageStatus]
    epoch: str = ""
    """Of the coordinator: different after each start."""

    @property
    def finished(self) -> bool:
        """True if every job of every planned stage is done."""
        return self.sealed or all(stage.counts.finished for stage in self.stages.values())

    @property
    def totals(self) -> Totals:
        """Of all committed trees of the round."""
        return Totals.sum(stage.totals for stage in self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorStats:
    """What the coordinator knows beside the rounds."""

    epoch: str
    """Different after each start."""
    leases: LeaseCounters
    workers: Mapping[str, WorkerProgress]
    """Last report of each worker that has been heard of."""


class Coordinator:
    """Plans stages, leases their jobs and knows when they are done; see the module."""

    def __init__(
        self,
        root: str,
        config: QueueConfig | None = None,
        run_id: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            root, run_id: see `RunStore`.
        Raises:
            StoreError: the store is not the run's, cannot be written, or lets a key be created
                twice.
        """
        self.store = RunStore(root, run_id=run_id)
        self.store.check_run()
        self.store.self_check()
        self.epoch = uuid.uuid4().hex[:8]
        self._clock = clock
        self._queue = JobQueue(config or QueueConfig(), epoch=self.epoch)
        self._trajectories: dict[int, TrajectoryStore] = {}
        self._sealed: set[int] = set()
        self._plans: dict[tuple[int, str], StagePlan] = {}
        self._totals: dict[tuple[int, str], Totals] = {}
        self._quarantined: dict[tuple[int, str], dict[str, str]] = {}
        self._workers: dict[str, WorkerProgress] = {}
        self._resolve_after_s = 0.0
        for round in stored_rounds(self.store, evaluations=True):
            self._rebuild(round)
        self._grants_after_s = clock() + (self._queue.config.adopt_s if self._plans else 0.0)

    # -- rounds and stages

    def plan(self, plan: StagePlan) -> RoundStatus:
        """Queue what a stage is to search, or go on with it if it was planned before.

        A stored plan stands: its shard size and priority win over those asked for now.

        Raises:
            ValueError: the stage was planned with other problems, another seed or tree index, or
                another stage of the round has the same tree index.
        """
        trajectories = self._of_round(plan.round)
        if plan.round in self._sealed:
            return self.status(plan.round)
        known = self._plans.get((plan.round, plan.stage))
        if known is None:
            for (round, stage), other in self._plans.items():
                if round == plan.round and other.tree_index == plan.tree_index:
                    raise ValueError(
                        f"stages {stage!r} and {plan.stage!r} of round {round} both have tree "
                        f"index {plan.tree_index}"
                    )
            known = StagePlan.from_json(trajectories.create_plan(plan.stage, plan.to_json()))
        for name in ("tree_index", "seed", "problem_ids"):
            if getattr(known, name) != getattr(plan, name):
                raise ValueError(
                    f"stage {plan.stage!r} of round {plan.round} was planned with another {name}; "
                    f"continue with the first one or start a new run"
                )
        if (plan.round, plan.stage) not in self._plans:
            self._adopt(known, trajectories.commits(trees=False))
        return self.status(plan.round)

    def status(self, round: int) -> RoundStatus:
        """How far a round is."""
        self._of_round(round)
        self._tick()
        return RoundStatus(
            round=round,
            sealed=round in self._sealed,
            epoch=self.epoch,
            stages={
                stage: StageStatus(
                    stage=stage,
                    counts=self._queue.counts(round, stage),
                    totals=self._totals[round, stage],
                    failed=dict(self._quarantined[round, stage]),
                )
                for r, stage in self._plans
                if r == round
            },
        )

    def committed(self, round: int) -> list[str] | None:
        """Shards of a round that are committed; None if it is sealed: its manifest says it then."""
        self._of_round(round)
        if round in self._sealed:
            return None
        return [job.id for job in self._queue.jobs(round, done=True)]

    def seal(self, round: int) -> Manifest:
        """Write the round's manifest; later calls return it.

        Raises:
            ValueError: jobs of the round are not done.
        """
        trajectories = self._of_round(round)
        if round in self._sealed:
            manifest = trajectories.manifest()
            assert manifest is not None
            return manifest
        if not self.status(round).finished:
            raise ValueError(f"round {round} cannot be sealed: some of its jobs are not done")
        manifest = trajectories.seal(job.id for job in self._queue.jobs(round))
        self._sealed.add(round)
        return manifest

    def prioritise(self, ranks: Mapping[str, int]) -> None:
        """See `JobQueue.prioritise`; one that was restarted has to be told again (`epoch`)."""
        self._queue.prioritise(ranks)

    # -- workers

    def grant(self, worker: str) -> Lease | None:
        """Lease the next job to a worker; None if there is none now."""
        self._tick()
        now_s = self._clock()
        lease = None if now_s < self._grants_after_s else self._queue.grant(worker, now_s)
        if lease is not None:
            self._trace("coordinator.grant", lease.job, lease=lease.id, worker=worker)
        return lease

    def renew(
        self, worker: str, leases: Sequence[tuple[str, str]], progress: WorkerProgress
    ) -> list[str]:
        """Extend leases, given as (job id, lease id), and take a worker's report.

        Returns the ids of the jobs the worker should drop.
        """
        now_s = self._clock()
        self._workers[worker] = progress
        # Renewing first: the renewal shows that the worker lives, even if it comes late.
        dropped = [
            job_id
            for job_id, lease_id in leases
            if not self._queue.renew(job_id, lease_id, worker, now_s)
        ]
        self._tick()
        return dropped

    def complete(self, job_id: str, lease_id: str) -> bool:
        """Take note that a job's shard is committed, whoever did it; False if that was known.

        What is committed is read from the marker, which nobody is believed to have written.

        Raises:
            StoreError: there is no marker, or it cannot be read; the job stays as it was.
        """
        state = self._queue.state(job_id)
        if state is None:  # of a round that is sealed
            return False
        if state is JobState.DONE:  # counted as late
            return self._queue.complete(job_id, lease_id)
        job = self._queue.job(job_id)
        try:
            commit = self._of_round(job.round).gathered_commit(job_id)
        except FileNotFoundError:
            message = (
                f"job {job_id} is said to be committed, and store {self.store.root} has no marker "
                f"of it on machine {socket.gethostname()}, where the coordinator runs: have all "
                "machines mount the same file system there, or choose another run_dir"
            )
            logger.error("%s job=%s lease=%s", message, job_id, lease_id)
            raise StoreError(message) from None
        self._trace("coordinator.complete", job, lease=lease_id)
        return self._record(job_id, lease_id, commit)

    def release(self, job_id: str, lease_id: str) -> bool:
        """Take a job back untried."""
        return self._queue.release(job_id, lease_id)

    def fail(self, job_id: str, lease_id: str, error: str) -> bool:
        """Take a job back that the worker could not do."""
        taken = self._queue.fail(job_id, lease_id, error)
        if taken:
            logger.warning("A job failed: %s job=%s lease=%s", error, job_id, lease_id)
        self._tick()
        return taken

    def forget_worker(self, worker: str) -> list[str]:
        """End all leases of a worker that is known to be gone; returns their jobs' ids."""
        self._workers.pop(worker, None)
        ended = self._queue.forget_worker(worker)
        self._tick()
        return ended

    def stats(self) -> CoordinatorStats:
        """Leases and workers."""
        return CoordinatorStats(
            epoch=self.epoch, leases=self._queue.counters, workers=dict(self._workers)
        )

    def pid(self) -> int:
        """Process id, for logs and tests."""
        return os.getpid()

    # -- inside

    def _trace(self, name: str, job: Job, **facts: str) -> None:
        tracing.note(job.round, job.problem_ids, job.tree_index, name, job=job.id, **facts)

    def _of_round(self, round: int) -> TrajectoryStore:
        trajectories = self._trajectories.get(round)
        if trajectories is None:
            trajectories = self._trajectories[round] = TrajectoryStore(self.store, round)
            if trajectories.manifest() is not None:
                self._sealed.add(round)
        return trajectories

    def _rebuild(self, round: int) -> None:
        trajectories = self._of_round(round)
        if round in self._sealed:
            return
        plans = [StagePlan.from_json(data) for data in trajectories.plans().values()]
        found = trajectories.each_commit(trees=False, gather=True) if plans else ()
        commits = {commit.shard: commit for commit in found}
        for plan in sorted(plans, key=lambda plan: plan.tree_index):
            self._adopt(plan, commits)
        if plans:
            logger.info("Rebuilt a round from %d commits round=%d", len(commits), round)

    def _adopt(self, plan: StagePlan, commits: Mapping[str, Commit]) -> None:
        """Queue the jobs of a plan and mark those done that are committed, parts included."""
        self._plans[plan.round, plan.stage] = plan
        self._totals[plan.round, plan.stage] = Totals()
        self._quarantined[plan.round, plan.stage] = {}
        jobs = plan_jobs(plan)
        for job in jobs:
            self._queue.add(job)
        for job, commit in committed_jobs(jobs, commits):
            self._record(job.id, "", commit)

    def _record(self, job_id: str, lease_id: str, commit: Commit) -> bool:
        if not self._queue.complete(job_id, lease_id, commit.remaining):
            return False
        job = self._queue.job(job_id)
        key = (job.round, job.stage)
        self._totals[key] = Totals.sum((self._totals[key], commit.totals))
        self._quarantined[key].update(commit.failed)
        return True

    def _tick(self) -> None:
        now_s = self._clock()
        for job_id in self._queue.expire(now_s):
            logger.warning("A lease expired job=%s", job_id)
        if now_s < self._resolve_after_s:
            return
        for job, error in self._queue.failed():
            try:
                self._resolve(job, error)
            except StoreError as failure:
                self._resolve_after_s = now_s + RESOLVE_INTERVAL_S
                metrics.count(metrics.STORE_ERRORS, operation="resolve")
                logger.error("A failed job could not be set aside: %s job=%s", failure, job.id)
                return

    def _resolve(self, job: Job, error: str) -> None:
        """Split a job that is out of attempts, or quarantine its only problem."""
        trajectories = self._of_round(job.round)
        single = len(job.problem_ids) == 1
        if not single:
            # Before the commit, which lets others have the parts.
            self._hand_down_open_trees(job)
        trajectories.commit(
            job.id,
            [],
            failed={job.problem_ids[0]: error} if single else {},
            remaining=() if single else [[problem_id] for problem_id in job.problem_ids],
            info={"stage": job.stage, "writer": "coordinator", "error": error},
        )
        # Whoever won: what stands in the store counts.
        self._record(job.id, "", trajectories.gathered_commit(job.id))
        logger.warning(
            "A job out of attempts was %s: %s job=%s",
            "quarantined" if single else "split",
            error,
            job.id,
        )

    def _hand_down_open_trees(self, job: Job) -> None:
        """Give each part of a job that is split what workers have left of its search.

        Raises:
            StoreError: the store cannot be written.
        """
        kept = OpenTreeStore(self.store, job.round)
        for tree in kept.load(job.id):
            if tree.problem.id in job.problem_ids:
                kept.save(job.child([tree.problem.id]).id, trees_to_table([tree]))
        kept.remove(job.id)


CoordinatorActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Coordinator)
