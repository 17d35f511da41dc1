"""Everything of a run that lives in Ray: what is started, what it serves, and how it ends.

    driver -- start --> Ray -- coordinator, sandbox workers, policy replicas, learner group
           -- serve_policy / serve_preference --> new weights in the running engines
           -- serve_endpoint --> a completions endpoint in place of the policy replicas
           -- rollout --> rollout workers, one stage after the other, until the round is sealed
           -- fit     --> learner group
           -- stop    --> drain, then everything ends
           -- dies    --> all but learner and endpoint go on for a while, and the next driver
                          takes them over (`cluster.fleet.left_over`)

The PPM's replicas start when the first PPM is served, and so do the policy's where the run starts
with an endpoint. Rollout workers live for one round: they carry its search settings.

Nothing that dies ends the run: replicas, sandbox workers, rollout workers, the endpoint's actor and
the coordinator each have a keeper (`cluster.fleet.keeper`) that replaces what is dead, silent or
stalled, until deaths are too many; the learner group looks after itself. Who uses a pool is told at
once who is READY (`cluster.fleet.pools`). What becomes of a round is `cluster.fleet.rollouts`', of
nodes and the size of pools `cluster.fleet.minding`'s.

The learner's ranks are kept on an embedded Ray, whose machine is paid for anyway. On a cluster they
come when a fit is near (`want_learner`) and go after the last one (`leave_learner`), with their
machines. With `cluster.hand_over` engines and learner take turns on the same GPUs: engines end
before a fit and start again, with the new checkpoint, when a model is to be served; then the
learner ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from cluster.engines.config import EndpointConfig
from cluster.engines.endpoint import read_api_key
from cluster.engines.lifecycle import ReplicaStats
from cluster.fleet.actors import (
    CoordinatorKind,
    EndpointKind,
    PolicyKind,
    PreferenceKind,
    SandboxKind,
    WatchmanKind,
)
from cluster.fleet.config import ServingConfig
from cluster.fleet.keeper import PoolKeeper
from cluster.fleet.learner_group import RAY_TRAIN, LearnerGroup
from cluster.fleet.left_over import Home, end_all, namespace_of, remove_groups
from cluster.fleet.meter import Meter
from cluster.fleet.minding import Minder, why_learner_waits
from cluster.fleet.pools import Pools
from cluster.fleet.rollouts import Progress, Rollout, queue_config
from cluster.fleet.stages import RolloutOutcome, RolloutStage, StageSearch
from cluster.folder.run_folder import RunFolder
from cluster.jobs.attempts import Attempts
from cluster.jobs.coordinator import WorkerProgress
from cluster.jobs.pool import PolicyPool, PreferencePool, SandboxPool
from cluster.machines import nodes
from cluster.machines.cost import NodeUse
from cluster.telemetry.process import end as end_telemetry
from learner.candidates import Recipe
from learner.checkpoint import Checkpoint
from learner.fit import FitProgress, FitRequest, FitResult
from rollout.engine import EngineError
from rollout.problem import Problem
from rollout.run_store import StoreError
from rollout.store import TrajectoryStore
from rollout.tasks import all_of

logger = logging.getLogger(__name__)


class Fleet:
    """Everything of a run that lives in Ray."""

    def __init__(self, config: ServingConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self.store = folder.store
        self.note: Callable[[str], None] = logger.info
        """Told what a person should know now."""
        self.pools = Pools(config, folder, note=lambda text: self.note(text), tried=self._tried)
        self.meter = Meter(
            config.metrics, folder, self.pools.keepers, budget_usd=config.cost.budget_usd
        )
        self.attempts = Attempts(
            config.cluster.stage_attempts, mend=self.mend, note=lambda text: self.note(text)
        )
        """Does a stage of the run again that lost actors or machines."""
        staged: dict[str, Any] = {
            "stage_weights": config.cluster.stage_weights,
            "on_bucket": self.store.local is None,
        }
        self._policy_kind = PolicyKind(config.cluster.policy, config.policy_engine, **staged)
        self._preference_kind = PreferenceKind(config.cluster.ppm, config.ppm_engine, **staged)
        self.weights_stage_s: dict[str, float] = {}
        """By pool, until the last checkpoint served was at hand on every node."""
        self._learner: LearnerGroup | None = None
        self._ray_started = False
        self._minder: Minder | None = None
        self._rollout: Rollout | None = None

    @property
    def policy(self) -> PolicyPool:
        return self.pools.policy

    @property
    def preference(self) -> PreferencePool:
        return self.pools.preference

    @property
    def sandbox(self) -> SandboxPool:
        return self.pools.sandbox

    @property
    def versions(self) -> dict[str, str]:
        """Of the models that serve, for the record of each tree; "" of one that never did."""
        endpoint = self.pools.endpoint
        policy = self._policy_kind if endpoint is None else endpoint.endpoint
        return {"policy": policy.version, "ppm": self._preference_kind.version}

    def progress(self) -> list[WorkerProgress]:
        """Last report of each worker of the rollout in hand; none without one."""
        return self._rollout.progress() if self._rollout is not None else []

    def _tried(self, name: str, ready: bool) -> None:
        if self._minder is not None:
            self._minder.tried(name, ready)

    def describe(self) -> str:
        """For people: what runs."""
        parts = [] if self.pools.endpoint is None else [self.pools.endpoint.endpoint.version]
        for name, shown in (("policy", "policy"), ("sandbox", "sandbox"), ("ppm", "PPM")):
            if name in self.pools.keepers:
                members = self.pools.keepers[name].members
                ready, size = len(members.ready()), members.size
                parts.append(f"{ready} {shown}" if ready == size else f"{ready} of {size} {shown}")
        if self._learner is not None:
            parts.append(f"{self._learner.num_workers} learner ranks")
        if self.config.cluster.hand_over:
            parts.append("engines and learner take turns")
        return ", ".join(parts)

    async def start(
        self,
        policy: Path | None,
        *,
        version: str = "base",
        learner: bool = True,
        marked: bool = True,
    ) -> None:
        """Bring up Ray and the actors; the policy engines start from `policy` (None: later).

        What a driver that died has left of this run is taken over, engines with the weights that
        they serve: where the run makes its models, each stage says later which it needs. What
        cannot be taken over ends first. On a cluster pools that do not start are tried again
        (`attempts`); an embedded Ray's machine does not change.

        Args:
            marked: False: `policy` was never fine-tuned on the step markers.
        Raises:
            PoolLostError: too few actors of a kind started; says which and why.
            ModelCheckError, EngineError: something cannot start as it is configured.
        """
        self.pools.telemetry.begin(f"driver-{os.getpid()}")
        cluster = self.config.cluster
        namespace = await asyncio.to_thread(namespace_of, self.store)
        self.pools.home = Home(namespace=namespace)
        # Every process of the run that writes there, or reads what others do, is told its id.
        await asyncio.to_thread(self.store.identify)
        if learner:
            self._policy_kind.store = self._preference_kind.store = self.store
        self._start_ray(namespace)
        self.pools.watch()
        self.meter.start()
        if learner:
            self._learner = LearnerGroup(
                cluster.learner,
                self.store,
                start_timeout_s=cluster.start_timeout_s,
                stalled_after_s=cluster.fit_stalled_after_s,
                attempts=cluster.stage_attempts,
                why_pending=lambda: why_learner_waits(cluster, self.pools.keepers),
                coming=lambda: bool(nodes.starting()),
                note=lambda text: self.note(text),
                stage=cluster.stage_weights,
            )
            if cluster.address == "local":
                self.want_learner()
        coordinator = CoordinatorKind(
            self.store, queue_config(cluster), patience_s=cluster.start_timeout_s
        )
        scaled = cluster.autoscale.get("sandbox")
        sandbox = SandboxKind(
            cluster.sandbox,
            self.config.sandbox.limits,
            self.config.sandbox.isolation,
            most=scaled.max_replicas if scaled is not None else cluster.sandbox.replicas,
        )
        if not marked:
            await self._have_markers(False)
        if cluster.address != "local":
            watchman = WatchmanKind(namespace, cluster.orphan_s)
            await self.pools.find_left()
            await self.pools.keep("watchman", watchman, 1)
            await self.pools.judge_left(
                {
                    "coordinator": coordinator,
                    "sandbox": sandbox,
                    "policy": self._policy_kind,
                    "ppm": self._preference_kind,
                }
            )

        async def pools() -> None:
            await self._adopt_engines()
            starting = {
                "coordinator": partial(self.pools.keep, "coordinator", coordinator, 1),
                "sandbox": partial(self.pools.keep, "sandbox", sandbox, cluster.sandbox.replicas),
            }
            there = {*self.pools.keepers}  # some of them, in a further attempt
            if policy is not None and not (learner and (cluster.hand_over or "policy" in there)):
                starting["policy"] = partial(
                    self._serve, "policy", self._policy_kind, str(policy), version
                )
                there.discard("policy")
            await all_of(start() for name, start in starting.items() if name not in there)

        await (pools() if cluster.address == "local" else self.attempts("start", pools))
        if cluster.address != "local" or cluster.autoscale or cluster.spot is not None:
            self._minder = Minder(
                self.config,
                self.pools,
                learner=self._learner is not None,
                note=lambda text: self.note(text),
            )

    async def _adopt_engines(self) -> None:
        """Take over the engines that an earlier driver has left, as they serve."""
        for name, kind in (("policy", self._policy_kind), ("ppm", self._preference_kind)):
            handles = [actor.handle for actor in self.pools.left.get(name, ())]
            silent_s = self.config.cluster.supervision.silent_s
            if handles and (served := await kind.served(handles, silent_s)) is not None:
                kind.serve(*served)
                await self.pools.keep(name, kind, kind.settings.replicas)

    async def _serve(
        self, name: str, kind: PolicyKind | PreferenceKind, path: str, version: str
    ) -> PoolKeeper:
        """Have a pool serve a checkpoint; starts it the first time."""
        if self.config.cluster.hand_over and self._learner is not None:
            await asyncio.to_thread(self._learner.shutdown)
        same = version == kind.version
        kind.serve(path, version)
        keeper = self.pools.keepers.get(name)
        if keeper is None:
            keeper = await self.pools.keep(name, kind, kind.settings.replicas)
        elif not same:
            await keeper.serve()
        else:
            return keeper
        if kind.stage is not None:
            await self._tell_staging(name, keeper)
        return keeper

    async def _tell_staging(self, name: str, keeper: PoolKeeper) -> None:
        """Note how long it took to have the weights at hand, and where that failed."""
        asked = (handle.stats.remote() for handle in keeper.handles.values())
        found = await asyncio.gather(*asked, return_exceptions=True)
        stats = [one for one in found if isinstance(one, ReplicaStats)]
        seconds = self.weights_stage_s[name] = max((one.stage_s for one in stats), default=0.0)
        self.note(f"{keeper.kind.version}: at hand on every node after {seconds:.1f} s")
        for note in sorted({one.stage_note for one in stats if one.stage_note}):
            self.note(note)

    async def _end_engines(self) -> None:
        """End the engines, which have nothing to do now: their GPUs are free then."""
        for name in ("policy", "ppm"):
            if name in self.pools.keepers:
                self.pools.announce(name, {})
                await self.pools.end(name, self.note)

    def _start_ray(self, namespace: str) -> None:
        cluster = self.config.cluster
        if ray.is_initialized():
            return
        arguments: dict[str, Any] = {
            "namespace": namespace,
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
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=cluster.address, **arguments)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"Ray could not be started at cluster.address={cluster.address!r}: {error}"
            ) from error
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            # Ray's own would end this process in the middle of its drain.
            signal.signal(signal.SIGTERM, on_sigterm)
        self._ray_started = True

    async def serve_policy(
        self, base: Path, checkpoint: Checkpoint | None, *, marked: bool = True
    ) -> None:
        """Have the policy replicas serve a checkpoint (None: the base model).

        Starts them the first time, and anew where the tokenizer changes; an endpoint is the policy
        no more.

        Args:
            marked: False: the base model, which was never fine-tuned on the step markers.
        """
        await self._leave_endpoint()
        await self._have_markers(marked)
        version = checkpoint.version if checkpoint is not None else "base"
        path = checkpoint.path if checkpoint is not None else str(base)
        await self._serve("policy", self._policy_kind, path, version)

    async def _have_markers(self, marked: bool) -> None:
        """Make replicas for a tokenizer with, or without, the step markers; others end first."""
        kind = self._policy_kind
        if kind.engine.step_markers == marked:
            return
        kind.engine = kind.engine.model_copy(update={"step_markers": marked})
        if "policy" in self.pools.keepers:
            self.note("the policy's replicas start anew: the next checkpoint has another tokenizer")
            self.pools.announce("policy", {})
            await self.pools.end("policy", self.note)

    async def serve_endpoint(self, endpoint: EndpointConfig) -> None:
        """Make a completions endpoint the policy, until a checkpoint is served.

        Raises:
            EngineError: its key is not in the environment, or it does not answer.
        """
        key = read_api_key(endpoint, os.environ)
        kind = EndpointKind(endpoint, key)
        try:
            await self.pools.keep("endpoint", kind, 1)
        except EngineError:
            if kind.refusal:
                raise EngineError(kind.refusal) from None
            raise
        self.pools.endpoint = kind

    async def _leave_endpoint(self) -> None:
        """End the endpoint's actor, if there is one."""
        self.pools.endpoint = None
        await self.pools.end("endpoint", logger.info)

    async def serve_preference(self, checkpoint: Checkpoint) -> None:
        """Have the PPM replicas serve a checkpoint; starts them the first time."""
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
        recipe: Recipe | None = None,
    ) -> RolloutOutcome:
        """Search the problems through all stages and seal the round.

        Cancelling drains: trees that are finished are committed, the rest is handed back.

        Args:
            preference: whether the PPM takes part.
            recipe: by which trees are made into candidates for training; None: they are not.
        """
        self._rollout = Rollout(
            config=self.config,
            pools=self.pools,
            meter=self.meter,
            trees=TrajectoryStore(self.store, round),
            problems={problem.id: problem for problem in problems},
            stages=stages,
            preference=preference,
            versions=self.versions if preference else {**self.versions, "ppm": ""},
            on_progress=on_progress,
            recipe=recipe,
        )
        return await self._rollout.run()

    def change(self, config: ServingConfig) -> None:
        """Go on with a config that differs in what may change meanwhile (`folder.changes.LIVE`)."""
        self.config = config
        self._policy_kind.settings = config.cluster.policy
        self._preference_kind.settings = config.cluster.ppm
        self.pools.change(config)
        self.meter.budget_usd = config.cost.budget_usd
        for part in (self._minder, self._rollout):
            if part is not None:
                part.change(config)

    async def uses(self) -> dict[str, NodeUse]:
        """The nodes that are up, as the run pays for them; {} before Ray is."""
        if not self._ray_started or self.pools.home is None:
            return {}
        return await nodes.asked(nodes.uses, self.pools.home.namespace)

    def mend(self) -> None:
        """Replace members again in pools where too many died to go on."""
        for keeper in self.pools.keepers.values():
            if keeper.hopeless:
                self.note(f"every {keeper.kind.kind} that died is replaced again")
                keeper.revive()

    # ---------------------------------------------------------------- learner, end

    def want_learner(self) -> None:
        """Ask for the learner's machines, because a fit is near; returns at once."""
        if self._learner is not None and not self.config.cluster.hand_over:
            self._learner.start()

    async def leave_learner(self) -> None:
        """Give the learner's machines back, where they are others', because no fit is near."""
        if self._learner is not None and self.config.cluster.address != "local":
            await asyncio.to_thread(self._learner.shutdown)

    async def fit(
        self, request: FitRequest, on_progress: Callable[[FitProgress], None]
    ) -> FitResult:
        """Train on the learner group.

        Raises:
            LearnerLostError: the group was lost; the next fit starts another.
            LearnerError: the training run could not be done.
        """
        assert self._learner is not None

        def progress(report: FitProgress) -> None:
            self.meter.tell_fit(report)
            on_progress(report)

        if self.config.cluster.hand_over:
            await self._end_engines()
        result = await asyncio.to_thread(self._learner.fit, request, progress, self.attempts.again)
        self.meter.end_fit(result)
        return result

    async def stop(self, note: Callable[[str], None] = lambda text: None) -> None:
        """End every actor, and Ray if it was started here. Bounded in time; safe to call twice.

        Actors go on if another driver has taken the run.
        """
        if not self._ray_started:
            return
        self.pools.leaving()
        await self.pools.unwatch()
        if self._minder is not None:
            await self._minder.stop()
            self._minder = None
        await self._leave_endpoint()
        await asyncio.gather(*(self.pools.end(name, note) for name in StageSearch.POOLS))
        taken = self.folder.is_taken
        if not taken:
            await self.pools.end_left()
        keepers = list(self.pools.keepers.values())
        self.pools.keepers.clear()  # the meter still looks
        for keeper in keepers:
            handles = await keeper.stop()
            end_all({} if taken else handles)
        await self.meter.stop()
        if self._learner is not None:
            await asyncio.to_thread(self._learner.shutdown, 5.0)
            self._learner = None
        if self.pools.home is not None and not taken:
            await asyncio.to_thread(remove_groups, self.pools.home.namespace)
        ray.shutdown()
        self._ray_started = False
        end_telemetry()
        with contextlib.suppress(StoreError):
            if not taken:
                self.store.delete_folder(RAY_TRAIN)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
