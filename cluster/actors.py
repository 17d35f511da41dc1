"""What a keeper knows of each kind of actor of a run: how it is made, looked at, and synchronised.

PolicyKind, PreferenceKind   one engine each; serve a checkpoint, loaded in place
SandboxKind                  CPU actors; no version
WorkerKind                   rollout workers of one round; a run that ends has failed
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from cluster import nodes
from cluster.config import ActorConfig
from cluster.coordinator import CoordinatorActor, WorkerProgress
from cluster.jobs import QueueConfig
from cluster.keeper import ActorKind, Look, cause
from cluster.placement import Ask, explain
from cluster.replica import (
    EngineConfig,
    PolicyReplicaActor,
    PreferenceReplicaActor,
    ReplicaStats,
)
from cluster.sandbox_worker import SandboxWorkerActor
from cluster.weight_sync import Answer, Finding, judge, sync_weights
from rollout.engine import EngineError
from verifier import SandboxLimits
from verifier.sandbox import Isolation

logger = logging.getLogger(__name__)

FINGERPRINT_TOLERANCE = 0.05
"""Largest difference between replicas of one version; half precision passes."""


async def as_future(ref: Any) -> Any:
    """An object reference, or anything else that can be awaited, as a coroutine."""
    return await ref


def actor_options(settings: ActorConfig) -> dict[str, Any]:
    """What an actor asks of Ray."""
    options: dict[str, Any] = {"num_cpus": settings.num_cpus}
    if settings.num_gpus:
        options["num_gpus"] = settings.num_gpus
    if settings.resources:
        options["resources"] = dict(settings.resources)
    return options


def actor_bundle(settings: ActorConfig) -> dict[str, float]:
    """The same as the bundle of resources that one actor takes."""
    bundle = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    return {name: amount for name, amount in bundle.items() if amount > 0}


class _RayKind(ActorKind):
    def __init__(self, settings: ActorConfig) -> None:
        self.settings = settings

    def why_pending(self) -> str:
        """What is asked and what the cluster has, in words; "" if one more fits."""
        ask = Ask(name=self.kind, bundle=actor_bundle(self.settings))
        return " ".join(explain([ask], list(nodes.living().values())))


class EngineKind(_RayKind):
    """Replicas that serve a checkpoint."""

    actor: Any

    def __init__(self, settings: ActorConfig, engine: EngineConfig) -> None:
        super().__init__(settings)
        self.engine = engine
        self.path = ""

    def serve(self, path: str, version: str) -> None:
        """Say what all should serve from now on."""
        self.path, self.version = path, version

    def start(self, name: str) -> Any:
        return self.actor.options(**actor_options(self.settings)).remote(
            self.path, self.engine, version=self.version, name=name
        )

    async def placed(self, handle: Any) -> None:
        await handle.stats.remote()

    async def ready(self, handle: Any) -> None:
        await handle.ready.remote()

    async def look(self, name: str, handle: Any) -> Look:
        stats: ReplicaStats = await handle.stats.remote()
        return Look(
            broken="" if stats.healthy else "its engine died",
            done=stats.requests + stats.failed + stats.generated_tokens + stats.loads,
            open=stats.running_requests,
        )

    async def sync(self, handle: Any, siblings: Mapping[str, Any]) -> str:
        path, version = self.path, self.version
        report = await sync_weights({"it": handle}, path, version)
        fingerprints = await asyncio.gather(
            *(as_future(one.fingerprint.remote()) for one in (handle, *siblings.values())),
            return_exceptions=True,
        )
        own, *others = fingerprints
        if isinstance(own, BaseException):
            raise EngineError(cause(own)) from own
        answers = {"it": Answer(version=version, fingerprint=tuple(own))}
        answers |= {
            name: Answer(version=version, fingerprint=tuple(found))
            for name, found in zip(siblings, others, strict=True)
            if not isinstance(found, BaseException)
        }
        finding, reason = judge(answers, version, tolerance=FINGERPRINT_TOLERANCE)["it"]
        if finding is not Finding.SERVES:
            raise EngineError(reason)
        return report.version

    async def sync_all(self, handles: Mapping[str, Any]) -> None:
        await sync_weights(handles, self.path, self.version, tolerance=FINGERPRINT_TOLERANCE)

    async def leave(self, handle: Any) -> None:
        await handle.shutdown.remote()


class PolicyKind(EngineKind):
    """Policy replicas."""

    kind = "policy replica"
    prefix = "policy"
    actor = PolicyReplicaActor


class PreferenceKind(EngineKind):
    """PPM replicas."""

    kind = "PPM replica"
    prefix = "ppm"
    actor = PreferenceReplicaActor


class SandboxKind(_RayKind):
    """Sandbox workers; a supervisor that dies inside one is its own affair."""

    kind = "sandbox worker"
    prefix = "sandbox"

    def __init__(self, settings: ActorConfig, limits: SandboxLimits, isolation: Isolation) -> None:
        super().__init__(settings)
        self.limits = limits
        self.isolation = isolation
        self.supervisor_restarts: dict[str, int] = {}
        """Of each sandbox worker there ever was, as last heard."""

    def start(self, name: str) -> Any:
        return SandboxWorkerActor.options(**actor_options(self.settings)).remote(
            limits=self.limits, isolation=self.isolation
        )

    async def placed(self, handle: Any) -> None:
        await handle.pid.remote()

    async def ready(self, handle: Any) -> None:
        await handle.stats.remote()

    async def look(self, name: str, handle: Any) -> Look:
        stats = await handle.stats.remote()
        self.supervisor_restarts[name] = stats.get("restarts", 0)
        steps = sum(count for key, count in stats.items() if key.startswith("steps/"))
        return Look(done=steps, open=stats["running"] + stats["queued"])


class CoordinatorKind(_RayKind):
    """The one coordinator; Ray restarts its process, which then reads the store."""

    kind = "coordinator"
    prefix = "coordinator"

    def __init__(self, root: str, queue: QueueConfig, *, patience_s: float) -> None:
        """
        Args:
            root: of the run's store.
            patience_s: it may be silent so long while it reads the store.
        """
        super().__init__(ActorConfig())
        self.silent_s = patience_s
        self._root = root
        self._queue = queue
        self._epoch = ""
        self._heard_s = 0.0

    def start(self, name: str) -> Any:
        self._epoch = ""
        return CoordinatorActor.options(name=f"{name}-{uuid.uuid4().hex[:8]}").remote(
            self._root, self._queue
        )

    async def placed(self, handle: Any) -> None:
        await handle.pid.remote()

    async def ready(self, handle: Any) -> None:
        await handle.pid.remote()

    async def look(self, name: str, handle: Any) -> Look:
        stats = await handle.stats.remote()
        now_s = time.monotonic()
        away_s = now_s - self._heard_s if self._epoch not in ("", stats.epoch) else None
        self._epoch, self._heard_s = stats.epoch, now_s
        return Look(revived_after_s=away_s)


class WorkerKind(_RayKind):
    """Rollout workers of one round, made by `make` and running from the first moment."""

    kind = "rollout worker"
    prefix = "worker"

    def __init__(
        self,
        settings: ActorConfig,
        make: Callable[[str], Any],
        *,
        incarnation: str,
        forget: Callable[[str], None],
    ) -> None:
        """
        Args:
            make: a worker actor by its name.
            incarnation: keeps the names apart from those of other rounds and drivers.
            forget: told the name of each worker that is gone, so that its leases end.
        """
        super().__init__(settings)
        self.prefix = f"worker-{incarnation}"
        self.progress: dict[str, WorkerProgress] = {}
        """Last report of every worker there ever was."""
        self.runs: dict[str, asyncio.Future[WorkerProgress]] = {}
        self._make = make
        self._forget = forget

    def start(self, name: str) -> Any:
        worker = self._make(name)
        self.runs[name] = asyncio.ensure_future(as_future(worker.run.remote()))
        return worker

    async def placed(self, handle: Any) -> None:
        await handle.pid.remote()

    async def ready(self, handle: Any) -> None:
        await handle.pid.remote()

    async def look(self, name: str, handle: Any) -> Look:
        run = self.runs[name]
        if run.done():
            error = None if run.cancelled() else run.exception()
            return Look(broken=cause(error) if error is not None else "its run ended")
        self.progress[name] = await handle.progress.remote()
        return Look()

    def lost(self, name: str) -> None:
        run = self.runs.pop(name, None)
        if run is not None:
            run.cancel()
        self._forget(name)

    async def leave(self, handle: Any) -> None:
        await handle.drain.remote()

    async def finish(self, handles: Mapping[str, Any], drain_s: float, limit_s: float) -> bool:
        """Drain workers and take their last reports; True if all of them ended in time."""
        drains = {n: as_future(h.drain.remote(drain_s)) for n, h in handles.items()}
        try:
            async with asyncio.timeout(limit_s):
                reports = await asyncio.gather(*drains.values(), return_exceptions=True)
                for name, report in zip(drains, reports, strict=True):
                    if isinstance(report, WorkerProgress):
                        self.progress[name] = report
                await asyncio.gather(*self.runs.values(), return_exceptions=True)
        except TimeoutError:
            return False
        finally:
            for run in self.runs.values():
                run.cancel()
        return True


def end_all(handles: Mapping[str, Any]) -> None:
    """Kill actors; those that are gone are no trouble."""
    for name, handle in handles.items():
        try:
            ray.kill(handle)
        except RayError as error:
            logger.info("An actor could not be killed: %s name=%s", error, name)
