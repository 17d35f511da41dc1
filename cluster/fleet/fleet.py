"""The actors of a run: engines, sandbox workers, coordinator, learner group, rollout workers.

    driver -- start --> Ray -- coordinator, sandbox workers, policy replicas, learner group
           -- serve_policy / serve_preference --> new weights in the running engines
           -- serve_endpoint --> a completions endpoint in place of the policy replicas
           -- rollout --> rollout workers, one stage after the other, until the round is sealed
           -- fit     --> learner group
           -- stop    --> drain, then everything ends
           -- dies    --> all but learner and endpoint go on for a while (`cluster.fleet.left_over`)

The PPM's replicas start when the first PPM is served, and so do the policy's where the run starts
with an endpoint. Rollout workers live for one round: they carry its search settings.

Nothing that dies ends the run: replicas, sandbox workers, rollout workers, the endpoint's actor and
the coordinator each have a keeper (`cluster.fleet.keeper`) that replaces what is dead, silent or
stalled, until deaths are too many; the learner group looks after itself. Every pool, here and in
the rollout workers, is told at once who is READY (`_announce`).

With `cluster.hand_over` engines and learner take turns on the same GPUs: engines end before a fit
and start again, with the new checkpoint, when a model is to be served; then the learner ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError

from cluster.engines.config import EndpointConfig
from cluster.engines.endpoint import EndpointStats, read_api_key
from cluster.fleet.actors import (
    CoordinatorKind,
    EndpointKind,
    PolicyKind,
    PreferenceKind,
    RayKind,
    SandboxKind,
    WatchmanKind,
    WorkerKind,
)
from cluster.fleet.config import ClusterConfig, ServingConfig
from cluster.fleet.keeper import PoolKeeper, cause, guard
from cluster.fleet.learner_group import LearnerGroup
from cluster.fleet.left_over import (
    FindCoordinator,
    Home,
    end_all,
    end_left_over,
    namespace_of,
    remove_groups,
)
from cluster.fleet.membership import Losses
from cluster.fleet.meter import Meter
from cluster.fleet.stages import (
    RolloutOutcome,
    RolloutStage,
    StageSearch,
    hardest_first,
    solved_problems,
)
from cluster.fleet.stall import Stall, StallDetector
from cluster.folder.run_folder import RunFolder
from cluster.jobs.coordinator import (
    RemoteCoordinator,
    RoundStatus,
    WorkerProgress,
    audit_round,
)
from cluster.jobs.escalation import EscalationPlan, StageCost, plan_escalation, rollout_share
from cluster.jobs.pool import PolicyPool, PoolConfig, PreferencePool, ReplicaPool, SandboxPool
from cluster.jobs.queue import JobState, QueueConfig, StagePlan
from cluster.jobs.worker import RolloutWorkerActor, WorkerConfig
from cluster.machines import nodes
from cluster.machines.placement import Ask, explain
from cluster.machines.scaler import PoolLoad, Scaler, ask_ray
from cluster.telemetry.process import Telemetry
from cluster.telemetry.process import end as end_telemetry
from cluster.telemetry.progress import LEVELS_FACT, SHARE_FACT, solved_by_level
from learner.checkpoint import Checkpoint
from learner.fit import FitProgress, FitRequest, FitResult
from rollout.engine import EngineError
from rollout.open_trees import OpenTreeStore
from rollout.problem import Problem
from rollout.store import RunStore, Totals, TrajectoryStore
from rollout.tasks import all_of
from verifier import GRADER_VERSION

logger = logging.getLogger(__name__)

POLL_S = 0.5
MIND_S = 2.0
"""Pause between two looks at the nodes."""

DRAIN_S = 20.0
"""How long a stopped rollout may take to commit what is finished."""

RENEW_S = 1.0
"""Pause between two renewals of a rollout worker's leases."""

ENDPOINT_WAIT_S = 86_400.0
"""Bound on one call of the endpoint's actor, which bounds each request itself once it has a slot:
waiting for one, or for a limit per minute, is no failure."""

Progress = Callable[[int, int, Mapping[str, str | float]], None]

T = TypeVar("T")
P = TypeVar("P", bound=ReplicaPool)


class Fleet:
    """Everything of a run that lives in Ray."""

    def __init__(self, config: ServingConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self.note: Callable[[str], None] = logger.info
        """Told what a person should know now."""
        self._keepers: dict[str, PoolKeeper] = {}
        """By kind, in the order they were started."""
        self._telemetry = Telemetry(run_dir=folder.root, tracing=config.tracing)
        self.meter = Meter(config.metrics, folder, self._keepers, budget_usd=config.cost.budget_usd)
        self._policy_kind = PolicyKind(config.cluster.policy, config.policy_engine)
        self._preference_kind = PreferenceKind(config.cluster.ppm, config.ppm_engine)
        self._worker_kind: WorkerKind | None = None
        self._pools: dict[str, weakref.WeakSet[ReplicaPool]] = {}
        self._revision = 0
        self._endpoint: EndpointKind | None = None
        """None: replicas are the policy."""
        self._endpoint_ended = False
        self._home: Home | None = None
        self._learner: LearnerGroup | None = None
        self._ray_started = False
        self._minding: asyncio.Task[None] | None = None
        self._scaler: Scaler | None = None
        self._work = (0, 0, 0)
        """Trees of the stage that wait, are open, and were finished."""

    @property
    def policy(self) -> PolicyPool:
        if self._endpoint is None:
            return self._pool(PolicyPool, "policy")
        # It sends requests again itself, and knows best when to rest.
        patient = PoolConfig(
            deadline_s=ENDPOINT_WAIT_S,
            attempts=1,
            rest_s=0.0,
            vacancy_s=self.config.cluster.start_timeout_s,
        )
        return self._pool(PolicyPool, "endpoint", patient)

    @property
    def preference(self) -> PreferencePool:
        return self._pool(PreferencePool, "ppm")

    @property
    def sandbox(self) -> SandboxPool:
        return self._pool(SandboxPool, "sandbox")

    def _pool(self, kind: type[P], name: str, config: PoolConfig | None = None) -> P:
        """A new pool that is told of all changes."""
        usual = PoolConfig(
            deadline_s=self.config.cluster.request_timeout_s,
            vacancy_s=self.config.cluster.start_timeout_s,
        )
        pool = kind(self._handles(name), config or usual)
        self._pools.setdefault(name, weakref.WeakSet()).add(pool)
        return pool

    def _handles(self, name: str) -> dict[str, Any]:
        keeper = self._keepers.get(name)
        return keeper.handles if keeper is not None else {}

    def _announce(self, name: str, handles: Mapping[str, Any]) -> None:
        """Tell everybody who uses a pool which replicas may be given work."""
        self._revision += 1
        for pool in self._pools.get(name, ()):
            pool.set_replicas(handles, self._revision)
        workers = self._keepers.get("worker")
        engine = "policy" if name == "endpoint" else name
        if workers is None or engine not in StageSearch.POOLS:
            return
        for worker in workers.all_handles.values():
            worker.set_replicas.remote(engine, dict(handles), self._revision)

    async def _keep(self, name: str, kind: RayKind, size: int) -> PoolKeeper:
        """Start a pool of actors and look after it from now on."""
        kind.home = self._home
        keeper = PoolKeeper(
            kind,
            size,
            self.config.cluster.supervision,
            start_timeout_s=self.config.cluster.start_timeout_s,
            announce=lambda handles: self._announce(name, handles),
            note=lambda text: self.note(text),
            tried=lambda ready: self._tried(name, ready),
            made=lambda name, handle: self._telemetry.begin_in(handle, name, **kind.ids(name)),
        )
        self._keepers[name] = keeper
        try:
            await keeper.start()
        except BaseException:
            del self._keepers[name]
            raise
        return keeper

    def _tried(self, name: str, ready: bool) -> None:
        """A start succeeded or failed: a pool that is scaled pauses after failures."""
        if self._scaler is None or name not in self.config.cluster.autoscale:
            return
        if ready:
            self._scaler.started(name)
        else:
            self._scaler.start_failed(name, time.monotonic())

    async def guarded(self, work: Awaitable[T]) -> T:
        """Await what needs the pools.

        Raises:
            EngineError: members of a pool died too often to go on.
        """
        return await guard(work, lambda: list(self._keepers.values()))

    def _losses(self) -> dict[str, Losses]:
        now_s = time.monotonic()
        found = {k.kind.kind: k.members.losses(now_s) for k in self._keepers.values()}
        sandbox = self._keepers.get("sandbox")
        if sandbox is not None and isinstance(sandbox.kind, SandboxKind):
            restarts = sum(sandbox.kind.supervisor_restarts.values())
            found["sandbox supervisor"] = Losses(
                deaths=restarts, restarts=restarts, last_reason="restarted by its sandbox worker"
            )
        return found

    def describe(self) -> str:
        """For people: what runs."""
        parts = [f"{len(self._handles(name))} {name}" for name in ("policy", "sandbox")]
        if self._endpoint is not None:
            parts.insert(0, self._endpoint.endpoint.version)
        if self._handles("ppm"):
            parts.append(f"{len(self._handles('ppm'))} PPM")
        if self._learner is not None:
            parts.append(f"{self._learner.num_workers} learner ranks")
        if self.config.cluster.hand_over:
            parts.append("engines and learner take turns")
        return ", ".join(part for part in parts if not part.startswith("0 "))

    async def start(
        self, policy: Path | None, *, version: str = "base", learner: bool = True
    ) -> None:
        """Bring up Ray and the actors; the policy engines start from `policy` (None: later).

        What a driver that died has left of this run is drained and ended first.

        Raises:
            EngineError: an actor did not start in time or failed; says which and why.
        """
        self._telemetry.begin(f"driver-{os.getpid()}")
        cluster = self.config.cluster
        self._home = Home(namespace=await asyncio.to_thread(namespace_of, self.folder.root))
        self._start_ray()
        self.meter.start()
        if cluster.address != "local":
            await self._end_left_over()
            watchman = WatchmanKind(self._home.namespace, cluster.orphan_s)
            await self._keep("watchman", watchman, 1)
        if learner:
            self._learner = LearnerGroup(
                cluster.learner,
                self.folder.root / "ray_train",
                start_timeout_s=cluster.start_timeout_s,
                why_pending=self._why_learner_waits,
                note=lambda text: self.note(text),
            )
            if not cluster.hand_over:
                self._learner.start()
        coordinator = CoordinatorKind(
            str(self.folder.root), queue_config(cluster), patience_s=cluster.start_timeout_s
        )
        sandbox = SandboxKind(
            cluster.sandbox, self.config.sandbox.limits, self.config.sandbox.isolation
        )
        started = [
            self._keep("coordinator", coordinator, 1),
            self._keep("sandbox", sandbox, cluster.sandbox.replicas),
        ]
        if policy is not None and not (cluster.hand_over and learner):
            started.append(self._serve("policy", self._policy_kind, str(policy), version))
        await all_of(started)
        if cluster.address != "local" or cluster.autoscale or cluster.spot is not None:
            self._minding = asyncio.create_task(self._mind())

    async def _serve(
        self, name: str, kind: PolicyKind | PreferenceKind, path: str, version: str
    ) -> PoolKeeper:
        """Have a pool serve a checkpoint; starts it the first time."""
        if self.config.cluster.hand_over and self._learner is not None:
            await asyncio.to_thread(self._learner.shutdown)
        same = version == kind.version
        kind.serve(path, version)
        keeper = self._keepers.get(name)
        if keeper is None:
            return await self._keep(name, kind, kind.settings.replicas)
        if not same:
            await keeper.serve()
        return keeper

    async def _end_engines(self) -> None:
        """End the engines, which have nothing to do now: their GPUs are free then."""
        for name in ("policy", "ppm"):
            keeper = self._keepers.pop(name, None)
            if keeper is not None:
                self._announce(name, {})
                await self._end(keeper, self.note)

    async def _end(self, keeper: PoolKeeper, note: Callable[[str], None]) -> None:
        """End the members of a pool in good order, or by force after 15 s."""
        handles = await keeper.stop()
        leaving = [handle.shutdown.remote() for handle in handles.values()]
        try:
            async with asyncio.timeout(15.0):
                await asyncio.gather(*leaving, return_exceptions=True)
        except TimeoutError:
            note(f"{len(leaving)} x {keeper.kind.kind} did not stop within 15 s and are killed")
        end_all(handles)
        for name in handles:
            keeper.kind.lost(name)

    async def _end_left_over(self) -> None:
        """End what a driver of this run has left in the cluster when it died."""
        assert self._home is not None
        ended = await asyncio.to_thread(end_left_over, self._home.namespace, DRAIN_S)
        if ended:
            self.note(
                f"{len(ended)} actors of an earlier start, whose driver is gone, were ended; their "
                "rollout workers committed what was finished"
            )

    def _why_learner_waits(self) -> str:
        """What the learner asks and what the cluster has, in words; "" if it fits."""
        learner = self.config.cluster.learner
        bundle = learner.learner_bundle()
        ask = Ask(name="learner rank", bundle=bundle, count=learner.replicas)
        sentences = explain([ask], list(nodes.living().values()))
        holders = [
            f"{len(keeper.all_handles)} x {keeper.kind.kind}"
            for keeper in (self._keepers.get("policy"), self._keepers.get("ppm"))
            if keeper is not None
            and isinstance(keeper.kind, RayKind)
            and keeper.kind.settings.bundle().keys() & bundle.keys()
        ]
        if sentences and holders:
            sentences.append(
                f"{' and '.join(holders)} hold the like; with cluster.hand_over: true they end "
                "before the learner starts."
            )
        return " ".join(sentences)

    # ---------------------------------------------------------------- nodes come and go

    async def _mind(self) -> None:
        """Leave nodes that drain, watch new ones for spot notices, and scale; for ever."""
        watchers: dict[str, Any] = {}
        spot = self.config.cluster.spot
        while True:
            try:
                if spot is not None:
                    for node in await asyncio.to_thread(nodes.living):
                        if node not in watchers:
                            watchers[node] = nodes.start_spot_watcher(node, spot)
                await self._leave_draining_nodes()
                self._scale()
            except Exception:
                # Whatever fails here is tried again; what dies meanwhile is replaced anyway.
                logger.exception("The nodes could not be looked at")
            await asyncio.sleep(MIND_S)

    async def _leave_draining_nodes(self) -> None:
        """Drain what runs on nodes that are about to go; it is started anew elsewhere."""
        ends = await asyncio.to_thread(nodes.draining)
        if not ends:
            return
        for name, keeper in list(self._keepers.items()):
            if name in ("coordinator", "watchman"):
                continue  # Ray restarts them elsewhere, and the store has what they need
            for member, handle in keeper.handles.items():
                end_s = ends.get(await asyncio.to_thread(nodes.node_of, handle))
                if end_s is not None:
                    left_s = end_s - time.time() if end_s else nodes.ADVICE_S
                    self.note(f"{member} leaves its node, which goes in {left_s:.0f} s")
                    # What is not empty by then is retried; half the time is for the rest.
                    keeper.drain([member], max(1.0, left_s / 2))

    def _scale(self) -> None:
        """Give pools that may grow and shrink the size their work asks for."""
        cluster = self.config.cluster
        settings = {"policy": cluster.policy, "ppm": cluster.ppm, "sandbox": cluster.sandbox}
        if not cluster.autoscale:
            return
        if self._scaler is None:
            learner = [cluster.learner.learner_bundle()] * cluster.learner.replicas
            self._scaler = Scaler(
                {
                    name: (config, settings[name].bundle())
                    for name, config in cluster.autoscale.items()
                },
                reserved=learner if self._learner is not None else (),
            )
        now_s = time.monotonic()
        waiting, open_trees, finished = self._work
        for name in cluster.autoscale:
            keeper = self._keepers.get(name)
            if keeper is None:
                continue
            load = PoolLoad(waiting=waiting, in_service=open_trees, served=finished)
            self._scaler.observe(name, now_s, load, keeper.loads())
        decision = self._scaler.decide(now_s)
        for scaled, pool in decision.pools.items():
            keeper = self._keepers.get(scaled)
            if keeper is None:
                continue
            # While the scaler pauses after failed starts, the keeper must not start anybody either.
            size = min(pool.target, keeper.living + pool.start)
            if size == keeper.members.size:
                continue
            self.note(f"{scaled} replicas: {pool.reason}")
            keeper.resize(size)
            keeper.drain(pool.drain, cluster.request_timeout_s)
        if cluster.address != "local":
            ask_ray([part for bundle in decision.bundles for part in self._parts(bundle)])

    def _parts(self, bundle: Mapping[str, float]) -> Sequence[Mapping[str, float]]:
        """What a replica's bundle has to be on one node each: all of it, or what a rank takes."""
        for kind in (self._policy_kind, self._preference_kind):
            if bundle == kind.settings.bundle():
                return kind.settings.rank_bundles(kind.engine.num_ranks) or [bundle]
        return [bundle]

    def _start_ray(self) -> None:
        cluster = self.config.cluster
        if ray.is_initialized():
            return
        assert self._home is not None
        arguments: dict[str, Any] = {
            "namespace": self._home.namespace,
            # As the terminal is asked for; this package logs into the run's folder in any case.
            "log_to_driver": logging.getLogger().isEnabledFor(logging.INFO),
            "logging_level": logging.ERROR,
            "configure_logging": True,
        }
        if cluster.address == "local":
            port = cluster.dashboard_port
            if port is not None and not _port_is_free(port):
                raise EngineError(
                    f"port {port} of cluster.dashboard_port is in use; choose another one, or null"
                )
            arguments |= {
                "include_dashboard": port is not None,
                **({"dashboard_port": port} if port is not None else {}),
                "num_cpus": cluster.num_cpus,
                "object_store_memory": cluster.object_store_mib * 2**20,
            }
        counting = self.meter.prepare()
        if counting and cluster.address != "local":  # what is started here inherits them
            arguments["runtime_env"] = {"env_vars": counting}
        try:
            ray.init(address=cluster.address, **arguments)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"Ray could not be started at cluster.address={cluster.address!r}: {error}"
            ) from error
        self._ray_started = True

    async def serve_policy(self, base: Path, checkpoint: Checkpoint | None) -> None:
        """Have every policy replica serve a checkpoint (None: the base model).

        Starts them the first time; an endpoint is the policy no more.
        """
        await self._leave_endpoint()
        version = checkpoint.version if checkpoint is not None else "base"
        path = checkpoint.path if checkpoint is not None else str(base)
        await self._serve("policy", self._policy_kind, path, version)

    async def serve_endpoint(self, endpoint: EndpointConfig) -> None:
        """Make a completions endpoint the policy, until a checkpoint is served.

        Raises:
            EngineError: its key is not in the environment, or it does not answer.
        """
        key = read_api_key(endpoint, os.environ)
        kind = EndpointKind(endpoint, key)
        self._endpoint_ended = False
        try:
            await self._keep("endpoint", kind, 1)
        except EngineError as error:
            raise EngineError(kind.refusal or str(error)) from None
        self._endpoint = kind

    async def _leave_endpoint(self) -> None:
        """End the endpoint's actor, if there is one."""
        self._endpoint = None
        keeper = self._keepers.pop("endpoint", None)
        if keeper is not None:
            await self._end(keeper, logger.info)

    async def _endpoint_stats(self) -> EndpointStats | None:
        """What the endpoint has done, as of now if it answers; None: it is not the policy."""
        if self._endpoint is None:
            return None
        for handle in self._handles("endpoint").values():
            try:
                self._endpoint.stats = await handle.stats.remote()
            except RayActorError as error:
                logger.info("The endpoint's actor is being replaced: %s", cause(error))
        return self._endpoint.stats

    async def _check_endpoint(self) -> None:
        """An endpoint that will answer no more (wrong key, budget used up) ends the round."""
        stats = await self._endpoint_stats()
        if stats is not None and stats.fatal:
            self._endpoint_ended = True
            raise EngineError(stats.fatal)

    async def serve_preference(self, checkpoint: Checkpoint) -> None:
        """Have every PPM replica serve a checkpoint; starts them the first time."""
        await self._serve("ppm", self._preference_kind, checkpoint.path, checkpoint.version)

    # ---------------------------------------------------------------- rollouts

    async def rollout(
        self,
        round: int,
        problems: Sequence[Problem],
        stages: Sequence[RolloutStage],
        *,
        preference: bool,
        on_progress: Progress,
    ) -> RolloutOutcome:
        """Search the problems through all stages and seal the round.

        Cancelling drains: trees that are finished are committed, the rest is handed back.
        """
        began_s = time.monotonic()
        losses_before = self._losses()
        by_id = {problem.id: problem for problem in problems}
        search = StageSearch(
            searches={name: stage.search for stage in stages for name in stage.tree_stages},
            policy=self.policy,
            preference=self.preference if preference else None,
            sandbox=self.sandbox,
            stages={stage.name: stage for stage in stages if stage.method is not None},
        )
        trees = TrajectoryStore(RunStore(str(self.folder.root)), round)
        await self._start_workers(round, by_id, search)
        planned = {
            name: StagePlan.from_json(data)
            for name, data in (await asyncio.to_thread(trees.plans)).items()
        }
        costs = [
            StageCost(
                rollouts=stage.search.num_rollouts * stage.search.num_candidates,
                unsolved_only=stage.unsolved_only,
            )
            for stage in stages
            for _ in stage.tree_stages
        ]
        behind = 0.0
        try:
            index = 0
            for stage in stages:
                wanted = hardest_first(by_id.values())
                if stage.unsolved_only:
                    unsolved = (await self._plan_escalation(trees, by_id)).search
                    wanted = hardest_first(by_id[problem_id] for problem_id in unsolved)
                for name in stage.tree_stages:
                    if name in planned:  # a continued round: what was planned stands
                        wanted = list(planned[name].problem_ids)
                    if wanted:
                        plan = StagePlan(
                            round=round,
                            stage=name,
                            tree_index=index,
                            problem_ids=tuple(wanted),
                            shard_size=self.config.cluster.shard_size,
                            seed=self.config.seed,
                            priority=index,
                        )
                        time_left = _TimeLeft(behind, costs[index:], len(wanted))
                        await self._run_stage(plan, time_left, on_progress, began_s)
                    behind += len(wanted) * costs[index].rollouts
                    index += 1
            left = await self._plan_escalation(trees, by_id)
            endpoint = await self._endpoint_stats()
            finished = await self._ask("status", round)
            manifest = await self._ask("seal", round)
        finally:
            losses = self._losses()
            # Without its engines no open search comes to its end.
            crippled = self._endpoint_ended or any(k.hopeless for k in self._keepers.values())
            progress = await self._stop_workers(0.0 if crippled else DRAIN_S)
            self._work = (0, 0, 0)
            self.meter.end_round()
        await asyncio.to_thread(OpenTreeStore(trees.store, round).remove_all)
        audit = await asyncio.to_thread(
            audit_round, trees, reported=finished.totals.trees if not finished.sealed else None
        )
        prompt = sum(p.finished.prompt_tokens for p in progress)
        cached = sum(p.finished.cached_tokens for p in progress)
        lost = {
            kind: loss.since(losses_before.get(kind, Losses())) for kind, loss in losses.items()
        }
        return RolloutOutcome(
            manifest=manifest,
            solved=len(await asyncio.to_thread(solved_problems, trees)),
            expected=audit.expected,
            lost=len(audit.lost),
            doubled=len(audit.doubled),
            seconds=time.monotonic() - began_s,
            generated_tokens=sum(p.finished.generated_tokens for p in progress),
            executions=sum(p.finished.executions for p in progress),
            prefix_hit_rate=cached / prompt if prompt else 0.0,
            endpoint=endpoint,
            suspects=tuple(left.suspects),
            losses={kind: loss for kind, loss in lost.items() if loss.deaths},
            resumed_trees=sum(p.resumed_trees for p in progress),
        )

    async def _plan_escalation(
        self, trees: TrajectoryStore, problems: Mapping[str, Problem]
    ) -> EscalationPlan:
        settings = self.config.hard_problems
        return await asyncio.to_thread(
            plan_escalation,
            trees,
            problems,
            suspect=settings.suspect,
            leave_suspects=settings.leave_suspects,
            max_generated_tokens=settings.max_generated_tokens,
        )

    async def _run_stage(
        self, plan: StagePlan, time_left: _TimeLeft, on_progress: Progress, began_s: float
    ) -> None:
        """Search one stage to its end."""
        round, name, num_problems = plan.round, plan.stage, len(plan.problem_ids)
        status: RoundStatus = await self._ask("plan", plan)
        before = sum(stage.totals.trees for other, stage in status.stages.items() if other != name)
        detector = StallDetector(self.config.cluster.stalled_after_s)
        while not status.finished:
            await asyncio.sleep(POLL_S)
            self._check()
            status = await self._ask("status", round)
            if not status.finished:
                await self._check_endpoint()
            workers = list(self._progress().values())
            tokens = sum(p.finished.generated_tokens for p in workers)
            steps = sum(p.finished.executions for p in workers)
            done = sum(p.finished.trees for p in workers)
            solved = sum(p.finished.solved for p in workers)
            elapsed_s = max(time.monotonic() - began_s, 1e-9)
            own = status.stages[name]
            facts: dict[str, str | float] = {
                "stage": name,
                LEVELS_FACT: solved_by_level(Totals.sum(p.finished for p in workers)),
                "solved": f"{solved} of {done} trees",
                "open": str(sum(p.open_trees for p in self._progress(living=True).values())),
                "tokens/s": tokens / elapsed_s,
                "steps/s": steps / elapsed_s,
            }
            open_trees = sum(p.open_trees for p in self._progress(living=True).values())
            unfinished = sum(own.counts.problems.values()) - own.counts.problems[JobState.DONE]
            self._work = (max(0, unfinished - open_trees), open_trees, done)
            stalls = self._stalls(detector)
            self.meter.tell_round(status, open_trees=open_trees, stalls=stalls)
            if stalls:
                facts["stalled"] = str(stalls[0])
            deaths = sum(loss.deaths for loss in self._losses().values())
            if deaths:
                facts["replaced"] = f"{deaths} dead actors"
            if own.failed:
                facts["quarantined"] = str(len(own.failed))
            waiting = sum(p.waiting_commits for p in self._progress(living=True).values())
            if waiting:
                facts["wait for the store"] = f"{waiting} finished shards"
            errors = {p.error for p in workers if p.error}
            if errors:
                facts["last error"] = sorted(errors)[0][:80]
            # A worker's count runs ahead of what it has committed, and lacks what others had.
            shown = min(max(done - before, own.totals.trees), num_problems)
            facts[SHARE_FACT] = time_left.share(shown, own.totals)
            on_progress(shown, num_problems, facts)

    def _stalls(self, detector: StallDetector) -> list[Stall]:
        """Parts that have work and do not move, the causes first."""
        now_s = time.monotonic()
        open_trees = sum(p.open_trees for p in self._progress(living=True).values())
        waits_on = ""
        for name in StageSearch.POOLS:
            keeper = self._keepers.get(name)
            if keeper is None:
                continue
            looks = keeper.looks.values()
            done, open_ = sum(look.done for look in looks), sum(look.open for look in looks)
            if keeper.members.ready():
                detector.report(name, now_s, done=done, open=open_)
            else:
                waits_on = name
                detector.report(
                    name, now_s, done=0, open=open_trees, waits_on=f"a new {keeper.kind.kind}"
                )
        if not waits_on and self._keepers.get("policy") is not None:
            waits_on = "policy"
        waiting = sum(p.waiting_commits for p in self._progress(living=True).values())
        committed = sum(p.committed.trees for p in self._progress().values())
        detector.report("commit", now_s, done=committed, open=waiting, waits_on="the store")
        requests = sum(p.requests + p.finished.trees for p in self._progress().values())
        detector.report("search", now_s, done=requests, open=open_trees, waits_on=waits_on)
        return detector.stalls(now_s)

    async def _start_workers(
        self, round: int, problems: Mapping[str, Problem], search: StageSearch
    ) -> None:
        cluster = self.config.cluster
        shared = ray.put(dict(problems))
        config = WorkerConfig(
            max_open_trees=cluster.max_open_trees,
            admission=cluster.admission,
            renew_s=RENEW_S,
            checkpoint_open_trees_s=cluster.checkpoint_open_trees_s,
        )
        info = {
            "policy": self._endpoint.endpoint.version
            if self._endpoint is not None
            else self._policy_kind.version,
            "ppm": self._preference_kind.version,
            "grader": GRADER_VERSION,
        }
        engines = self.policy if self._endpoint is None else None

        assert self._home is not None
        find = FindCoordinator(self._home.namespace)

        def make(name: str, options: Mapping[str, Any]) -> Any:
            # Pickled now, the pools hold the replicas of now; later ones are announced.
            return RolloutWorkerActor.options(**options).remote(
                name,
                RemoteCoordinator(self._coordinator(), find=find),
                str(self.folder.root),
                shared,
                search,
                config,
                engines=engines,
                info=info,
            )

        self._worker_kind = WorkerKind(
            cluster.workers,
            make,
            incarnation=f"r{round}-{self._home.driver}",
            forget=self._forget_worker,
        )
        await self._keep("worker", self._worker_kind, cluster.workers.replicas)

    def _coordinator(self) -> Any:
        """The coordinator's handle.

        Raises:
            EngineError: there is none now.
        """
        for handle in self._handles("coordinator").values():
            return handle
        raise EngineError("the coordinator is being replaced")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the coordinator, which may be replaced meanwhile.

        Raises:
            EngineError: it died too often.
        """
        while True:
            self._check()
            try:
                return await getattr(self._coordinator(), method).remote(*arguments)
            except (EngineError, RayActorError) as error:
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise
                logger.info("The coordinator is asked again: %s", error)
            await asyncio.sleep(POLL_S)

    def _forget_worker(self, name: str) -> None:
        """End the leases of a worker that is gone; if that is not heard they expire."""
        for handle in self._handles("coordinator").values():
            handle.forget_worker.remote(name)

    def _check(self) -> None:
        """Raises EngineError if members of some pool died too often to go on."""
        for keeper in self._keepers.values():
            keeper.check()

    def _progress(self, *, living: bool = False) -> dict[str, WorkerProgress]:
        """Last reports of this rollout's workers, of dead ones too unless `living`."""
        if self._worker_kind is None:
            return {}
        names = self._worker_kind.runs if living else self._worker_kind.progress
        progress = self._worker_kind.progress
        return {name: progress[name] for name in names if name in progress}

    async def _stop_workers(self, drain_s: float) -> list[WorkerProgress]:
        """Drain the workers and end them; returns what each there ever was reported last."""
        keeper, kind = self._keepers.pop("worker", None), self._worker_kind
        if keeper is None or kind is None:
            return []
        handles = await keeper.stop()
        if not await kind.finish(handles, drain_s, DRAIN_S + 5.0):
            logger.warning("Rollout workers did not drain within %.0f s", DRAIN_S)
        end_all(handles)
        self._worker_kind = None
        return list(kind.progress.values())

    # ---------------------------------------------------------------- learner, end

    async def fit(
        self, request: FitRequest, on_progress: Callable[[FitProgress], None]
    ) -> FitResult:
        """Train on the learner group.

        Raises:
            LearnerError: the training run could not be done.
        """
        assert self._learner is not None

        def progress(report: FitProgress) -> None:
            self.meter.tell_fit(report)
            on_progress(report)

        if self.config.cluster.hand_over:
            await self._end_engines()
        result = await asyncio.to_thread(self._learner.fit, request, progress)
        self.meter.end_fit(result)
        return result

    async def stop(self, note: Callable[[str], None] = lambda text: None) -> None:
        """End every actor, and Ray if it was started here. Bounded in time; safe to call twice."""
        if not self._ray_started:
            return
        await self.meter.stop()
        if self._minding is not None:
            self._minding.cancel()
            await asyncio.gather(self._minding, return_exceptions=True)
            self._minding = None
            if self._scaler is not None and self.config.cluster.address != "local":
                ask_ray(())
                self._scaler = None
        await self._leave_endpoint()
        parts = [self._keepers.pop(n) for n in StageSearch.POOLS if n in self._keepers]
        await asyncio.gather(*(self._end(keeper, note) for keeper in parts))
        for keeper in self._keepers.values():
            end_all(await keeper.stop())
        self._keepers.clear()
        if self._learner is not None:
            await asyncio.to_thread(self._learner.shutdown, 5.0)
            self._learner = None
        if self._home is not None:
            await asyncio.to_thread(remove_groups, self._home.namespace)
        ray.shutdown()
        self._ray_started = False
        end_telemetry()
        shutil.rmtree(self.folder.root / "ray_train", ignore_errors=True)


@dataclass(slots=True)
class _TimeLeft:
    """How much is done of what was left of a rollout when this process came to a stage."""

    behind: float
    """See `rollout_share`."""
    costs: Sequence[StageCost]
    num_problems: int
    _at_start: float | None = None
    """Share that an earlier process, not this one's time, has done of this stage."""

    def share(self, done: int, committed: Totals) -> float:
        """See `SHARE_FACT`; `committed` is of this stage."""
        unsolved = 1.0 - committed.solved / committed.trees if committed.trees else 1.0
        share = rollout_share(self.behind, self.costs, self.num_problems, done, unsolved)
        if self._at_start is None:
            before = rollout_share(self.behind, self.costs, self.num_problems, 0, unsolved)
            self._at_start = share - before
        return (share - self._at_start) / (1.0 - self._at_start) if self._at_start < 1.0 else 1.0


def queue_config(cluster: ClusterConfig) -> QueueConfig:
    """Of the coordinator: after a restart it waits until every living worker has renewed."""
    return QueueConfig(lease_s=cluster.lease_s, adopt_s=3 * RENEW_S)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
