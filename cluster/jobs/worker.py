"""The rollout worker: takes leases, searches many problems at once, commits shards.

    grant --> shard: one coroutine a problem --> all ended --> commit --> complete --> next
                        |  search raises: again, then quarantined with its error
                        |  an engine fails: on with the same tree, with back-off; at last the
                        |    shard ends early: what is finished is committed, the rest handed back
                        |  lease lost: the rest of the shard is dropped
                        +- drain: what is finished is committed, the rest handed back

There is no barrier: the slots for open trees are shared by all open shards, and a new lease is
taken as soon as a slot would stay empty. Their number follows the policy engines, up to
`max_open_trees` (`cluster.jobs.admission`). A worker that is told there is no job asks again after
a pause that doubles, so that a thousand idle ones do not keep the coordinator busy. Problems of a
shard do not depend on each other, nor on what else the worker runs.

Whether a shard is done is decided in the store (`TrajectoryStore.commit`). The worker then says
that a marker stands there, its own or another's, so the coordinator, which reads it, learns what is
covered even when this worker lost its lease long ago.

A worker is of one run, by whose id it knows the store (`RunStore.check_run`): on a machine that has
another folder in its place, or none, it does not start. While the store cannot be written, is gone,
or the coordinator does not find there what was committed, a finished shard waits in memory, its
lease is renewed, no new lease is taken, and the commit is tried again with back-off.

Of all problems that may be leased a worker holds those of its shards.

A search fills a tree that the worker holds, so it goes on from there after an engine failure. What
is handed back takes its open trees along (`rollout.open_trees`), under the id of the job it
becomes; with `checkpoint_open_trees_s` they are also kept now and then, for whoever gets the job of
a worker that dies. A tree that cannot be gone on with is searched from the beginning.

Not covered: a search that never returns blocks its shard until the lease is dropped, so engines
must bound their waits.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.exceptions import RayActorError

from cluster.jobs.admission import AdmissionConfig, AdmissionController, EnginePressure, TreeSlots
from cluster.jobs.coordinator import WorkerProgress
from cluster.jobs.coordinator_client import CoordinatorClient
from cluster.jobs.queue import Job, Lease, SearchTask
from cluster.jobs.ray_errors import describe, plain
from cluster.telemetry import logs, metrics, tracing
from learner.candidates import Recipe, candidates_file
from rollout.engine import EngineError
from rollout.open_trees import OpenTreeStore
from rollout.problem import Problem
from rollout.search import SearchError
from rollout.store import RunStore, StoreError, Totals, TrajectoryStore
from rollout.table import trees_to_table
from rollout.tree import Discard, Tree

logger = logging.getLogger(__name__)

T = TypeVar("T")

Search = Callable[[Problem, SearchTask, Tree], Awaitable[Sequence[Tree]]]
"""Searches one problem, filling the tree it is given, which may hold a part of the search already.

Returns the tree of the task, and behind it what other trees the problem's job has. Raises
`EngineError` if an engine failed, and the tree can be gone on with; `SearchError` if another part
of the system did, and it cannot."""


@runtime_checkable
class PooledSearch(Protocol):
    """A search over pools whose replicas come and go."""

    def set_replicas(self, pool: str, handles: Mapping[str, Any], revision: int) -> None:
        """See `RolloutWorker.set_replicas`."""
        ...

    def set_pressures(self, pool: str, pressures: Mapping[str, EnginePressure]) -> None:
        """See `RolloutWorker.set_pressures`."""
        ...

    def waits(self) -> dict[str, dict[str, tuple[int, float]]]:
        """By pool, see `ReplicaPool.waits`."""
        ...


GC_THRESHOLD = (100_000, 50, 1000)
"""Trees hold no reference cycles: with Python's own thresholds a third of the time of a worker with
thousands of open trees goes into looking for them."""

INFRASTRUCTURE_ERRORS = (EngineError, SearchError, RayActorError)
"""Failures that say nothing about the problem being searched."""


class WorkerConfig(BaseModel):
    """How much one rollout worker does at once, and how patient it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_open_trees: int = Field(default=64, ge=1, description="most searches running at once")
    admission: AdmissionConfig = Field(
        default_factory=AdmissionConfig, description="how many of them the engines take now"
    )
    renew_s: float = Field(
        default=10.0, gt=0, description="pause between renewals; well below the lease time"
    )
    poll_s: float = Field(
        default=0.2, gt=0, description="pause before asking again for a lease; doubled each time"
    )
    max_poll_s: float = Field(
        default=2.0, gt=0, description="longest such pause: work that comes is found by then"
    )
    search_attempts: int = Field(
        default=2, ge=1, description="tries of a search that raises before it is quarantined"
    )
    engine_attempts: int = Field(
        default=6, ge=1, description="tries of a search whose engines fail before it is handed back"
    )
    engine_backoff_s: float = Field(
        default=0.5, ge=0, description="pause after the first engine failure; doubled each time"
    )
    outage_pause_s: float = Field(
        default=10.0, ge=0, description="pause before the next lease when no search succeeds"
    )
    outage_limit_s: float = Field(
        default=1800.0,
        ge=0,
        description="without a success for so long, a job of one problem is charged an attempt",
    )
    commit_patience_s: float = Field(
        default=86_400.0, ge=0, description="how long a finished shard waits for a failing store"
    )
    checkpoint_open_trees_s: float | None = Field(
        default=None,
        gt=0,
        description="pause between two checkpoints of open trees; null: only on drain",
    )


@dataclass(slots=True)
class _Shard:
    """A lease being worked on."""

    lease: Lease
    unstarted: int
    """Problems that wait for a slot."""
    problems: Mapping[str, Problem] = field(default_factory=dict)
    """Those of the job that were read, by id."""
    trees: list[Tree] = field(default_factory=list)
    open: dict[str, Tree] = field(default_factory=dict)
    """Trees in search, by problem."""
    kept: dict[str, Tree] = field(default_factory=dict)
    """Of an earlier holder of the job, not yet gone on with."""
    has_file: bool = False
    """Open trees of this job are in the store."""
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    failed: dict[str, str] = field(default_factory=dict)
    error: str = ""
    """Why the shard ends early; "" if it does not."""
    culprit: str = ""
    """Problem that the engines fail at while they serve others; "" if there is none."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when no further search of this shard should go on."""
    dropped: bool = False
    """Another worker has the job, or it is done."""


class RolloutWorker:
    """Searches leased problems until it is drained; see the module."""

    def __init__(
        self,
        name: str,
        coordinator: CoordinatorClient,
        root: str,
        problems: Mapping[str, Problem],
        search: Search,
        config: WorkerConfig | None = None,
        info: Mapping[str, Any] | None = None,
        follows_engines: bool = False,
        recipe: Recipe | None = None,
        run_id: str | None = None,
    ) -> None:
        """
        Args:
            name: unique among the workers of the run, other incarnations included.
            root, run_id: of the run's store, see `RunStore`.
            problems: every problem that may be leased, by id; asked in a thread, job by job.
            info: kept in each commit marker beside writer and stage.
            follows_engines: the number of open trees follows what `set_pressures` tells of the
                policy; False: it is `max_open_trees`.
            recipe: by which trees are made into candidates for training as they are committed;
                None: nobody selects from them.
        Raises:
            StoreError: the store on this machine is not the run's.
        """
        self.name = name
        self.config = config or WorkerConfig()
        self._coordinator = coordinator
        self._store = RunStore(root, run_id=run_id)
        self._store.check_run()
        self._problems = problems
        self._search = search
        self._info = dict(info or {})
        self._follows_engines = follows_engines
        self._recipe = recipe
        self._admission = AdmissionController(self.config.admission, self.config.max_open_trees)
        self._slots = TreeSlots(
            self._admission.limit if follows_engines else self.config.max_open_trees
        )
        self._shards: dict[str, _Shard] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self._changed = asyncio.Event()
        self._progress = WorkerProgress()
        self._paused_until_s = 0.0
        self._poll_s = self.config.poll_s
        # Workers that fall idle together do not ask together for ever.
        self._jitter = random.Random(name)
        self._succeeded_s = time.monotonic()
        self._run: asyncio.Task[WorkerProgress] | None = None

    # -- lifecycle

    async def run(self) -> WorkerProgress:
        """Work until `drain`; returns what was done.

        Asked again, by a driver that takes the worker over, it goes on: that driver is told what is
        done from now on, of the trees in hand all.

        Raises:
            RayActorError: the coordinator is gone for good.
        """
        if self._run is None:
            self._run = asyncio.ensure_future(self._run_until_drained())
        else:
            self._progress = WorkerProgress(
                open_trees=self._progress.open_trees,
                waiting_commits=self._progress.waiting_commits,
            )
        return await asyncio.shield(self._run)

    async def _run_until_drained(self) -> WorkerProgress:
        gc.set_threshold(*GC_THRESHOLD)
        renewal = asyncio.create_task(self._renew_forever())
        keeping = asyncio.create_task(self._keep_open_trees_forever())
        roomy_since_s: float | None = None
        try:
            while not self._draining.is_set():
                self._changed.clear()
                room = self._has_room()
                if room and roomy_since_s is None:
                    roomy_since_s = time.monotonic()
                lease = await self._coordinator.grant(self.name) if room else None
                if lease is None:
                    await self._pause(renewal, asked=room)
                elif lease.job.id in self._shards or self._draining.is_set():
                    # Lost before and still being wound up here, or `drain` came meanwhile.
                    await self._coordinator.release(lease.job.id, lease.id)
                    await self._pause(renewal)
                else:
                    self._poll_s = self.config.poll_s
                    if roomy_since_s is not None:
                        metrics.observe(metrics.LEASE_WAIT, time.monotonic() - roomy_since_s)
                    roomy_since_s = None
                    self._start(lease)
            while self._tasks:
                await asyncio.wait(set(self._tasks))
        finally:
            others = (renewal, keeping, *self._tasks)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        return self.progress()

    async def drain(self, timeout_s: float = 0.0) -> WorkerProgress:
        """Stop, commit finished trees as parts of their shards and hand the rest back.

        Returns when that is done. All is kept first, for whoever asks may be killed, and this
        worker with him, before the time is over.

        Args:
            timeout_s: time that open searches are given to end by themselves.
        """
        self._draining.set()
        self._changed.set()
        give_up_s = time.monotonic() + timeout_s
        if timeout_s:
            await self._keep_open_trees()
        while self._shards and time.monotonic() < give_up_s:
            await asyncio.sleep(min(0.05, timeout_s))
        for shard in self._shards.values():
            shard.stop.set()
        while self._shards:
            await asyncio.sleep(0.01)
        return self.progress()

    def progress(self) -> WorkerProgress:
        """What was done since the start and is being done now."""
        requests = sum(
            tree.num_requests
            for shard in self._shards.values()
            for tree in (*shard.trees, *shard.open.values())
        )
        search = self._search
        if not isinstance(search, PooledSearch):
            return replace(self._progress, requests=requests)
        return replace(self._progress, requests=requests, waits=search.waits())

    def set_replicas(self, pool: str, handles: Mapping[str, Any], revision: int) -> None:
        """Let a pool of the search consist of these replicas; see `ReplicaPool.set_replicas`.

        Args:
            pool: "policy", "ppm" or "sandbox".
        """
        if isinstance(self._search, PooledSearch):
            self._search.set_replicas(pool, handles, revision)

    def set_pressures(self, pool: str, pressures: Mapping[str, EnginePressure]) -> None:
        """Take in how full the replicas of a pool are; told now and then, by one who asked all.

        Args:
            pool: "policy" or "ppm".
            pressures: by replica; those that did not answer are left out.
        """
        if isinstance(self._search, PooledSearch):
            self._search.set_pressures(pool, pressures)
        if pool != "policy" or not self._follows_engines:
            return
        before = self._slots.limit
        limit = self._admission.observe(time.monotonic(), pressures, self._slots.open)
        if limit != before:
            logger.info(
                "Open trees: %d, before %d: %s worker=%s",
                limit,
                before,
                self._admission.reason,
                self.name,
            )
            self._slots.limit = limit
            self._changed.set()

    def set_max_open_trees(self, most: int) -> None:
        """Change how many searches may run at once; those above it end by themselves."""
        limit = self._admission.bound(most)
        self._slots.limit = limit if self._follows_engines else most
        self._changed.set()

    def pid(self) -> int:
        """Process id, for logs and tests."""
        return os.getpid()

    # -- leases

    def _has_room(self) -> bool:
        """True if a slot would stay empty with the shards at hand."""
        if self._progress.waiting_commits or time.monotonic() < self._paused_until_s:
            return False
        unstarted = sum(shard.unstarted for shard in self._shards.values())
        return self._progress.open_trees + unstarted < self._slots.limit

    def _start(self, lease: Lease) -> None:
        shard = _Shard(lease, unstarted=len(lease.job.problem_ids))
        self._shards[lease.job.id] = shard
        task = asyncio.create_task(self._work(shard), name=f"shard-{lease.job.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pause(self, renewal: asyncio.Task[None], *, asked: bool = False) -> None:
        """Wait for a free slot or the next poll; a failed renewal ends the worker.

        Args:
            asked: there was no job: the next question comes later.
        """
        if renewal.done():
            await renewal
        pause_s = self.config.poll_s
        if asked:
            pause_s = self._poll_s * self._jitter.uniform(0.75, 1.0)
            self._poll_s = min(2 * self._poll_s, max(self.config.poll_s, self.config.max_poll_s))
        try:
            async with asyncio.timeout(pause_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.renew_s)
            held = [(shard.lease.job.id, shard.lease.id) for shard in self._shards.values()]
            for job_id in await self._coordinator.renew(self.name, held, self.progress()):
                shard = self._shards.get(job_id)
                if shard is not None and not shard.dropped:
                    logger.warning("A lease was lost job=%s lease=%s", job_id, shard.lease.id)
                    self._progress.lost_leases += 1
                    metrics.count(metrics.LOST_LEASES)
                    shard.dropped = True
                    shard.stop.set()

    # -- one shard

    async def _work(self, shard: _Shard) -> None:
        job = shard.lease.job
        try:
            if not await self._patiently(
                lambda: self._committed_already(shard), f"read the marker job={job.id}"
            ):
                shard.problems = await self._patiently(
                    lambda: asyncio.to_thread(self._problems_of, job), f"read problems job={job.id}"
                )
                await self._take_over(shard)
                await self._search_all(shard)
                if not shard.dropped:
                    await self._finish(shard)
        except RayActorError:
            raise
        except Exception as error:
            # One broken shard must not stop the others; its lease is given back with the reason.
            logger.exception("A shard could not be worked on job=%s", job.id)
            self._progress.error = describe(error)
            await self._coordinator.fail(job.id, shard.lease.id, self._progress.error)
        finally:
            del self._shards[job.id]
            self._changed.set()

    def _count_candidates(self, tree: Tree) -> None:
        """How many candidates ended in a step: a policy that writes no steps shows at once."""
        progress = self._progress
        for node in tree.nodes[1:]:
            progress.candidates += node.multiplicity
            if node.discard is Discard.UNFINISHED:
                progress.unfinished += node.multiplicity
                assert node.step is not None
                progress.unfinished_text = progress.unfinished_text or node.step.text

    async def _committed_already(self, shard: _Shard) -> bool:
        """True if somebody committed the shard and died before saying so; says it for them."""
        trajectories = TrajectoryStore(self._store, shard.lease.job.round)
        try:
            await asyncio.to_thread(trajectories.read_commit, shard.lease.job.id)
        except FileNotFoundError:
            return False
        await self._coordinator.complete(shard.lease.job.id, shard.lease.id)
        return True

    def _problems_of(self, job: Job) -> dict[str, Problem]:
        """Those problems of a job that can be leased; blocks."""
        found = ((problem_id, self._problems.get(problem_id)) for problem_id in job.problem_ids)
        return {problem_id: problem for problem_id, problem in found if problem is not None}

    async def _search_all(self, shard: _Shard) -> None:
        """Run the searches of a shard until all have ended or the shard is stopped."""
        job = shard.lease.job
        searches = {
            asyncio.create_task(self._search_problem(shard, problem_id), name=problem_id)
            for problem_id in job.problem_ids
        }
        stopped = asyncio.create_task(shard.stop.wait())
        try:
            pending: set[asyncio.Task[Any]] = {*searches, stopped}
            while pending - {stopped} and not shard.stop.is_set():
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            for task in searches:
                task.cancel()
            ended = await asyncio.gather(*searches, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result

    async def _search_problem(self, shard: _Shard, problem_id: str) -> None:
        """Search one problem, with retries, into `shard.trees` or `shard.failed`."""
        leased_s = time.monotonic()
        async with self._slots.slot():
            metrics.observe(metrics.SLOT_WAIT, time.monotonic() - leased_s)
            shard.unstarted -= 1
            self._progress.open_trees += 1
            job, task = shard.lease.job, shard.lease.job.task(problem_id)
            about = {"job": job.id, "lease": shard.lease.id}
            try:
                with (
                    logs.ids(problem=problem_id, **about),
                    tracing.problem_span(
                        task.round, problem_id, task.index, {**about, "worker": self.name}
                    ),
                ):
                    await self._search_with_retries(shard, problem_id)
            finally:
                self._progress.open_trees -= 1
                self._changed.set()

    async def _search_with_retries(self, shard: _Shard, problem_id: str) -> None:
        task = shard.lease.job.task(problem_id)
        problem = shard.problems.get(problem_id)
        if problem is None:
            self._quarantine(shard, problem_id, "no problem of this id was read")
            return
        attempts = engine_attempts = 0
        finished_before = self._progress.finished.trees
        open_tree = shard.kept.pop(problem_id, None)
        kept = open_tree is not None and _continues(open_tree, problem, task)
        self._progress.resumed_trees += kept
        metrics.count(metrics.RESUMED, kept)
        began_s = time.monotonic()
        if open_tree is None or not kept:
            open_tree = _new_tree(problem, task)
        while True:
            shard.open[problem_id] = open_tree
            requests_before = open_tree.num_requests
            try:
                trees = await self._search(problem, task, open_tree)
                found = [(tree.problem.id, tree.index) for tree in trees]
                if found[0] != (problem_id, task.index) or {i for i, _ in found} != {problem_id}:
                    raise ValueError(
                        f"asked for tree {task.index} of problem {problem_id}, the search returned "
                        + ", ".join(f"tree {index} of problem {name}" for name, index in found)
                    )
            except INFRASTRUCTURE_ERRORS as error:
                # A tree that grows does not wait for ever.
                engine_attempts = (
                    1 if open_tree.num_requests > requests_before else engine_attempts + 1
                )
                self._progress.error = describe(error)
                retry = "search" if isinstance(error, SearchError) else "engine"
                if isinstance(error, SearchError):
                    kept, open_tree = False, _new_tree(problem, task)
                if engine_attempts >= self.config.engine_attempts:
                    self._give_up(shard, problem_id, finished_before)
                    return
                pause_s = self.config.engine_backoff_s * 2 ** (engine_attempts - 1)
            except Exception as error:
                # What another worker left may be at fault: that is no attempt of this one.
                attempts += not kept
                retry = "other"
                kept, open_tree = False, _new_tree(problem, task)
                self._progress.error = describe(error)
                logger.warning(
                    "A search raised problem=%s attempt=%d", problem_id, attempts, exc_info=True
                )
                if attempts >= self.config.search_attempts:
                    self._quarantine(shard, problem_id, self._progress.error)
                    return
                pause_s = 0.0
            else:
                del shard.open[problem_id]
                shard.trees += trees
                self._succeeded_s = time.monotonic()
                self._progress.searches += 1
                self._progress.finished = Totals.sum((self._progress.finished, Totals.of(trees)))
                for tree in trees:
                    self._count_candidates(tree)
                    metrics.count_tree(tree, self._succeeded_s - began_s)
                return
            self._progress.retried_searches += 1
            metrics.count(metrics.SEARCH_RETRIES, cause=retry)
            await asyncio.sleep(pause_s)

    def _give_up(self, shard: _Shard, problem_id: str, finished_before: int) -> None:
        """End a shard early because the engines keep failing: at one problem, or at all of them.

        Where nothing else succeeds that cannot be told apart. An outage must never quarantine
        problems, but the last problem of a round must not keep it open for ever either: after
        `outage_limit_s` a job of one problem is taken for the cause.
        """
        now_s = time.monotonic()
        shard.error = f"problem {problem_id}: {self._progress.error}"
        alone = len(shard.lease.job.problem_ids) == 1
        lasts_s = now_s - self._succeeded_s
        if self._progress.finished.trees > finished_before or (
            alone and lasts_s > self.config.outage_limit_s
        ):
            shard.culprit = problem_id
        else:
            self._paused_until_s = now_s + self.config.outage_pause_s
        logger.error("A shard ends early: %s job=%s", shard.error, shard.lease.job.id)
        shard.stop.set()

    def _quarantine(self, shard: _Shard, problem_id: str, error: str) -> None:
        logger.error("A problem is quarantined: %s problem=%s", error, problem_id)
        shard.failed[problem_id] = error
        metrics.count(metrics.QUARANTINED)
        shard.open.pop(problem_id, None)
        self._progress.failed_problems += 1

    # -- open trees

    async def _take_over(self, shard: _Shard) -> None:
        """Find what earlier holders of the job have left of its searches."""
        job = shard.lease.job
        trees = await asyncio.to_thread(self._open_trees_of(shard).load, job.id)
        shard.has_file = bool(trees)
        shard.kept = {tree.problem.id: tree for tree in trees if tree.index == job.tree_index}

    async def _keep_open_trees_forever(self) -> None:
        """Checkpoint the trees of all shards now and then."""
        while self.config.checkpoint_open_trees_s is not None:
            await asyncio.sleep(self.config.checkpoint_open_trees_s)
            await self._keep_open_trees()

    async def _keep_open_trees(self) -> None:
        for shard in list(self._shards.values()):
            async with shard.saving:
                if not shard.stop.is_set() and shard.lease.job.id in self._shards:
                    await self._save(shard, shard.lease.job.id, shard.lease.job.problem_ids)

    async def _save(self, shard: _Shard, job_id: str, problem_ids: Iterable[str]) -> None:
        """Keep what is known of these problems' trees for whoever holds `job_id` next."""
        known = {**shard.kept, **shard.open, **{tree.problem.id: tree for tree in shard.trees}}
        trees = [known[p] for p in problem_ids if p in known and known[p].num_requests]
        if not trees:
            return
        try:
            # Here, not in the thread: searches go on and change their trees.
            table = trees_to_table(trees)
            await asyncio.to_thread(self._open_trees_of(shard).save, job_id, table)
        except (StoreError, ValueError) as error:
            metrics.count(metrics.STORE_ERRORS, operation="keep")
            logger.warning("Open trees could not be kept: %s job=%s", error, job_id)
        else:
            shard.has_file |= job_id == shard.lease.job.id

    async def _forget_open_trees(self, shard: _Shard, job_ids: Sequence[str]) -> None:
        try:
            for job_id in job_ids:
                await asyncio.to_thread(self._open_trees_of(shard).remove, job_id)
        except StoreError as error:
            logger.info("Open trees are left until the round is sealed: %s", error)

    def _open_trees_of(self, shard: _Shard) -> OpenTreeStore:
        return OpenTreeStore(self._store, shard.lease.job.round)

    # -- the end of a shard

    async def _finish(self, shard: _Shard) -> None:
        """Commit what is finished and report it; hand back what is not."""
        job, lease = shard.lease.job, shard.lease
        done = {tree.problem.id for tree in shard.trees} | shard.failed.keys()
        if not done:
            async with shard.saving:
                await self._save(shard, job.id, job.problem_ids)
            if shard.culprit:
                await self._coordinator.fail(job.id, lease.id, shard.error)
            else:
                await self._coordinator.release(job.id, lease.id)
            return
        rest = [p for p in job.problem_ids if p not in done and p != shard.culprit]
        handed_back = [rest] if rest else []
        if shard.culprit:
            handed_back.append([shard.culprit])
        # Before the commit, which lets others have the rest.
        for group in handed_back:
            await self._save(shard, job.child(group).id, group)
        position = {problem_id: i for i, problem_id in enumerate(job.problem_ids)}
        shard.trees.sort(key=lambda tree: position[tree.problem.id])
        trajectories = TrajectoryStore(self._store, job.round)
        attempt = uuid.uuid4().hex[:16]
        derived = await asyncio.to_thread(self._derived, shard.trees)

        async def commit() -> bool:
            written = await asyncio.to_thread(
                trajectories.commit,
                job.id,
                shard.trees,
                info={**self._info, "stage": job.stage, "writer": self.name, "ended": shard.error},
                failed=shard.failed,
                remaining=handed_back,
                derived=derived,
                attempt=attempt,
            )
            metrics.observe(metrics.COMMIT_SECONDS, time.monotonic() - ended_s)
            await self._coordinator.complete(job.id, lease.id)
            return written

        ended_s = time.monotonic()
        written = await self._patiently(commit, f"commit job={job.id}")
        metrics.count(metrics.COMMITS, outcome="written" if written else "late")
        if written:
            self._progress.committed = Totals.sum(
                (self._progress.committed, Totals.of(shard.trees))
            )
        else:
            logger.warning("A shard was committed by another worker job=%s", job.id)
            await self._forget_open_trees(shard, [job.child(group).id for group in handed_back])
        async with shard.saving:
            shard.stop.set()
            if shard.has_file:
                await self._forget_open_trees(shard, [job.id])

    def _derived(self, trees: Sequence[Tree]) -> dict[str, bytes]:
        """What selection reads in place of the trees; nothing where it cannot be made."""
        if self._recipe is None:
            return {}
        try:
            return {self._recipe.name: candidates_file(trees, self._recipe)}
        except Exception:
            # The trees count; selection will meet the same error where somebody is told.
            logger.exception("Trees are committed without their candidates for training")
            return {}

    async def _patiently(self, operation: Callable[[], Awaitable[T]], what: str) -> T:
        """Do something with the store, again and again while the store fails."""
        give_up_s = time.monotonic() + self.config.commit_patience_s
        pause_s = 0.5
        waiting = False
        try:
            while True:
                try:
                    return await operation()
                except StoreError as error:
                    self._progress.error = describe(error)
                    metrics.count(metrics.STORE_ERRORS, operation=what.split()[0])
                    logger.error("The store failed at %s: %s", what, plain(error))
                    if self._draining.is_set() or time.monotonic() > give_up_s:
                        raise
                    if not waiting:
                        waiting = True
                        self._progress.waiting_commits += 1
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 30.0)
        finally:
            self._progress.waiting_commits -= waiting


def _new_tree(problem: Problem, task: SearchTask) -> Tree:
    return Tree(problem=problem, round=task.round, index=task.index, seed=task.seed)


def _continues(tree: Tree, problem: Problem, task: SearchTask) -> bool:
    """True if a tree that was found is of the very search that is asked for."""
    found = (tree.problem, tree.round, tree.index, tree.seed)
    same = found == (problem, task.round, task.index, task.seed)
    if not same:
        logger.warning("An open tree of another search is ignored problem=%s", problem.id)
    return same


RolloutWorkerActor = ray.remote(num_cpus=0)(RolloutWorker)
