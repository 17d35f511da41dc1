"""Everything of a run that lives in Ray: what is started, what it serves, and how it ends.

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
stalled, until deaths are too many; the learner group looks after itself. Who uses a pool is told at
once who is READY (`cluster.fleet.pools`). What becomes of a round is `cluster.fleet.rollouts`', of
nodes and the size of pools `cluster.fleet.minding`'s.

With `cluster.hand_over` engines and learner take turns on the same GPUs: engines end before a fit
and start again, with the new checkpoint, when a model is to be served; then the learner ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

from cluster.engines.config import EndpointConfig
from cluster.engines.endpoint import read_api_key
from cluster.fleet.actors import (
    CoordinatorKind,
    EndpointKind,
    PolicyKind,
    PreferenceKind,
    SandboxKind,
    WatchmanKind,
)
from cluster.fleet.config import ServingConfig
from cluster.fleet.keeper import PoolKeeper, guard
from cluster.fleet.learner_group import LearnerGroup
from cluster.fleet.left_over import Home, end_all, end_left_over, namespace_of, remove_groups
from cluster.fleet.meter import Meter
from cluster.fleet.minding import Minder, why_learner_waits
from cluster.fleet.pools import Pools
from cluster.fleet.rollouts import DRAIN_S, Progress, Rollout, queue_config
from cluster.fleet.stages import RolloutOutcome, RolloutStage, StageSearch
from cluster.folder.run_folder import RunFolder
from cluster.jobs.coordinator import WorkerProgress
from cluster.jobs.pool import PolicyPool, PreferencePool, SandboxPool
from cluster.telemetry.process import end as end_telemetry
from learner.checkpoint import Checkpoint
from learner.fit import FitProgress, FitRequest, FitResult
from rollout.engine import EngineError
from rollout.problem import Problem
from rollout.store import RunStore, TrajectoryStore
from rollout.tasks import all_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Fleet:
    """Everything of a run that lives in Ray."""

    def __init__(self, config: ServingConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self.store = RunStore(str(folder.root))
        self.note: Callable[[str], None] = logger.info
        """Told what a person should know now."""
        self.pools = Pools(
            config, folder.root, note=lambda text: self.note(text), tried=self._tried
        )
        self.meter = Meter(
            config.metrics, folder, self.pools.keepers, budget_usd=config.cost.budget_usd
        )
        self._policy_kind = PolicyKind(config.cluster.policy, config.policy_engine)
        self._preference_kind = PreferenceKind(config.cluster.ppm, config.ppm_engine)
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

    async def guarded(self, work: Awaitable[T]) -> T:
        """Await what needs the pools.

        Raises:
            EngineError: members of a pool died too often to go on.
        """
        return await guard(work, self.pools.check)

    def progress(self) -> list[WorkerProgress]:
        """Last report of each worker of the rollout in hand; none without one."""
        return self._rollout.progress() if self._rollout is not None else []

    def _tried(self, name: str, ready: bool) -> None:
        if self._minder is not None:
            self._minder.tried(name, ready)

    def describe(self) -> str:
        """For people: what runs."""
        count = {name: len(self.pools.handles(name)) for name in StageSearch.POOLS}
        parts = [f"{count[name]} {name}" for name in ("policy", "sandbox")]
        if self.pools.endpoint is not None:
            parts.insert(0, self.pools.endpoint.endpoint.version)
        if count["ppm"]:
            parts.append(f"{count['ppm']} PPM")
        if self._learner is not None:
            parts.append(f"{self._learner.num_workers} learner ranks")
        if self.config.cluster.hand_over:
            parts.append("engines and learner take turns")
        return ", ".join(part for part in parts if not part.startswith("0 "))

    async def start(
        self,
        policy: Path | None,
        *,
        version: str = "base",
        learner: bool = True,
        marked: bool = True,
    ) -> None:
        """Bring up Ray and the actors; the policy engines start from `policy` (None: later).

        What a driver that died has left of this run is drained and ended first.

        Args:
            marked: False: `policy` was never fine-tuned on the step markers.
        Raises:
            EngineError: an actor did not start in time or failed; says which and why.
        """
        self.pools.telemetry.begin(f"driver-{os.getpid()}")
        cluster = self.config.cluster
        namespace = await asyncio.to_thread(namespace_of, self.folder.root)
        self.pools.home = Home(namespace=namespace)
        # Every process of the run that writes there, or reads what others do, is told its id.
        await asyncio.to_thread(self.store.identify)
        if learner:
            self._policy_kind.store = self._preference_kind.store = self.store
        self._start_ray(namespace)
        self.meter.start()
        if cluster.address != "local":
            ended = await asyncio.to_thread(end_left_over, namespace, DRAIN_S)
            if ended:
                self.note(
                    f"{len(ended)} actors of an earlier start, whose driver is gone, were ended; "
                    "their rollout workers committed what was finished"
                )
            await self.pools.keep("watchman", WatchmanKind(namespace, cluster.orphan_s), 1)
        if learner:
            self._learner = LearnerGroup(
                cluster.learner,
                self.folder.root / "ray_train",
                start_timeout_s=cluster.start_timeout_s,
                stalled_after_s=cluster.fit_stalled_after_s,
                why_pending=lambda: why_learner_waits(cluster, self.pools.keepers),
                note=lambda text: self.note(text),
                store=self.store,
            )
            if not cluster.hand_over:
                self._learner.start()
        coordinator = CoordinatorKind(
            self.store, queue_config(cluster), patience_s=cluster.start_timeout_s
        )
        sandbox = SandboxKind(
            cluster.sandbox, self.config.sandbox.limits, self.config.sandbox.isolation
        )
        started = [
            self.pools.keep("coordinator", coordinator, 1),
            self.pools.keep("sandbox", sandbox, cluster.sandbox.replicas),
        ]
        if not marked:
            await self._have_markers(False)
        if policy is not None and not (cluster.hand_over and learner):
            started.append(self._serve("policy", self._policy_kind, str(policy), version))
        await all_of(started)
        if cluster.address != "local" or cluster.autoscale or cluster.spot is not None:
            self._minder = Minder(
                self.config,
                self.pools,
                learner=self._learner is not None,
                note=lambda text: self.note(text),
            )

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
            return await self.pools.keep(name, kind, kind.settings.replicas)
        if not same:
            await keeper.serve()
        return keeper

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
        try:
            ray.init(address=cluster.address, **arguments)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"Ray could not be started at cluster.address={cluster.address!r}: {error}"
            ) from error
        self._ray_started = True

    async def serve_policy(
        self, base: Path, checkpoint: Checkpoint | None, *, marked: bool = True
    ) -> None:
        """Have every policy replica serve a checkpoint (None: the base model).

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
        except EngineError as error:
            raise EngineError(kind.refusal or str(error)) from None
        self.pools.endpoint = kind

    async def _leave_endpoint(self) -> None:
        """End the endpoint's actor, if there is one."""
        self.pools.endpoint = None
        await self.pools.end("endpoint", logger.info)

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
        endpoint = self.pools.endpoint
        self._rollout = Rollout(
            config=self.config,
            pools=self.pools,
            meter=self.meter,
            trees=TrajectoryStore(self.store, round),
            problems={problem.id: problem for problem in problems},
            stages=stages,
            preference=preference,
            versions={
                "policy": (self._policy_kind if endpoint is None else endpoint.endpoint).version,
                "ppm": self._preference_kind.version,
            },
            on_progress=on_progress,
        )
        return await self._rollout.run()

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
        if self._minder is not None:
            await self._minder.stop()
            self._minder = None
        await self._leave_endpoint()
        await asyncio.gather(*(self.pools.end(name, note) for name in StageSearch.POOLS))
        for keeper in self.pools.keepers.values():
            end_all(await keeper.stop())
        self.pools.keepers.clear()
        if self._learner is not None:
            await asyncio.to_thread(self._learner.shutdown, 5.0)
            self._learner = None
        if self.pools.home is not None:
            await asyncio.to_thread(remove_groups, self.pools.home.namespace)
        ray.shutdown()
        self._ray_started = False
        end_telemetry()
        shutil.rmtree(self.folder.root / "ray_train", ignore_errors=True)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
