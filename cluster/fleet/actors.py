"""What a keeper knows of each kind of actor of a run: how it is made, looked at, and synchronised.

PolicyKind, PreferenceKind   one engine each; serve a checkpoint, loaded in place
SandboxKind                  CPU actors; no version
CoordinatorKind              one; restarted by Ray in its place, else replaced
EndpointKind                 one; a new one goes on with the account of the one before
WorkerKind                   rollout workers of one round; a run that ends has failed
WatchmanKind                 one; being looked at is what it wants (`cluster.fleet.left_over`)

A replica whose engine is spread over several GPUs stands in a placement group of its own, a bundle
for each rank, on one node where they fit and on several where they do not:

    [actor + GPU] [GPU] [GPU] ... <-- vLLM's Ray executor puts a rank on each

The group is made before the replica and removed after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.engines.config import EndpointConfig, EngineConfig
from cluster.engines.endpoint import EndpointActor, EndpointStats
from cluster.engines.lifecycle import ReplicaStats
from cluster.engines.replica import PolicyReplicaActor, PreferenceReplicaActor
from cluster.engines.weight_sync import (
    POLICY_TOLERANCE,
    PREFERENCE_TOLERANCE,
    Fingerprint,
    odd_ones,
    take_weights,
)
from cluster.fleet.config import MembersConfig
from cluster.fleet.keeper import ActorKind, Look
from cluster.fleet.left_over import (
    COORDINATOR,
    WATCHMAN,
    WORKER,
    Home,
    WatchmanActor,
    groups_of,
)
from cluster.fleet.stages import StageSearch
from cluster.folder.machine import source_digest
from cluster.folder.staging import Stager
from cluster.jobs.coordinator import CoordinatorActor, WorkerProgress
from cluster.jobs.queue import QueueConfig
from cluster.jobs.ray_errors import cause, plain
from cluster.jobs.sandbox_worker import SandboxWorkerActor
from cluster.jobs.worker import RolloutWorker, RolloutWorkerActor
from cluster.machines import nodes
from cluster.machines.placement import Ask, explain
from rollout.engine import EngineError
from rollout.run_store import address_of
from rollout.store import RunStore
from verifier import SandboxLimits
from verifier.sandbox import Isolation


class RayKind(ActorKind):
    """What all kinds have in common."""

    actor: Any
    """The class of the actors, as `ray.remote` makes it."""
    home: Home | None = None
    """Where its actors are found when their driver is gone; None: they end with it."""

    def __init__(self, settings: MembersConfig, *arguments: Any) -> None:
        """
        Args:
            arguments: that each actor is made with.
        """
        self.settings = settings
        self._arguments = arguments

    def options(self, name: str) -> dict[str, Any]:
        """What an actor asks of Ray."""
        return self.settings.ray_options() | (self.home.options(name) if self.home else {})

    def ids(self, name: str) -> dict[str, str]:
        """What every line carries that an actor logs."""
        return {}

    def code(self) -> str:
        """Of the source that its actors run; blocks."""
        return source_digest(self.actor.__ray_metadata__.modified_class.__module__)

    def made_of(self) -> dict[str, Any]:
        """What makes its actors what they are, as in the config; plain data."""
        asked = self.settings.model_dump(mode="json", exclude={"replicas", "min_ready"})
        return {"cluster": {self.prefix: asked}}

    def start(self, name: str) -> Any:
        return self.actor.options(**self.options(name)).remote(*self._arguments)

    async def placed(self, handle: Any) -> None:
        await handle.pid.remote()

    async def ready(self, handle: Any) -> None:
        await handle.pid.remote()

    def why_pending(self) -> str:
        """What is asked and what the cluster has, in words; "" if one more fits."""
        ask = Ask(name=self.kind, bundle=self.settings.bundle())
        why = explain([ask], list(nodes.living().values()))
        coming = nodes.starting() if why else {}
        if coming:
            kinds = ", ".join(f"{number} x {kind}" for kind, number in coming.items())
            why.append(f"The autoscaler is starting {kinds}.")
        return " ".join(why)


class BesideDriver(RayKind):
    """One actor on the machine of the driver, if there is room."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(MembersConfig(), *arguments)

    def options(self, name: str) -> dict[str, Any]:
        return super().options(name) | nodes.near_driver()


class EngineKind(RayKind):
    """Replicas that serve a checkpoint."""

    tolerance: float
    """See `odd_ones`."""
    store: RunStore | None = None
    """Of the run whose checkpoints they are to read; None: they only serve what was given."""

    def __init__(
        self,
        settings: MembersConfig,
        engine: EngineConfig,
        *,
        stage_weights: Path | None = None,
        on_bucket: bool = False,
    ) -> None:
        """
        Args:
            on_bucket: checkpoints are there, where no engine can read them.
            stage_weights: folder of each node that checkpoints are copied to; None: they are read
                where they are.
        """
        super().__init__(settings)
        self.engine = engine
        self.take_s = engine.load_timeout_s
        self.stage = Stager(stage_weights) if on_bucket or stage_weights is not None else None
        self.path = ""
        self._groups: dict[str, PlacementGroup] = {}

    def serve(self, path: str, version: str) -> None:
        """Say what all should serve from now on."""
        self.path, self.version = path, version

    def options(self, name: str) -> dict[str, Any]:
        """What a replica asks of Ray; one of several ranks gets its placement group here."""
        options = super().options(name)
        bundles = self.settings.rank_bundles(self.engine.num_ranks)
        if self.engine.num_ranks == 1 or not bundles:
            return options
        group = self._groups[name] = placement_group(
            bundles,
            strategy="PACK",
            name=self.home.group(name) if self.home else "",
            lifetime="detached" if self.home else None,
        )
        # The GPUs are for the ranks, which the engine puts into the other bundles itself.
        for taken in ("num_gpus", "resources"):
            options.pop(taken, None)
        return options | {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        }

    def ids(self, name: str) -> dict[str, str]:
        return {"replica": name, f"{self.prefix}_version": self.version}

    def made_of(self) -> dict[str, Any]:
        cluster = super().made_of()["cluster"]
        stage = None if self.stage is None else str(self.stage.folder)
        return {
            "cluster": cluster | {"stage_weights": stage},
            f"{self.prefix}_engine": self.engine.model_dump(mode="json"),
        }

    def adopted(self, name: str, handle: Any) -> None:
        if self.engine.num_ranks == 1 or self.home is None:
            return
        for actor, group in groups_of(self.home.namespace).items():
            if actor.rpartition("-")[0] == name:
                self._groups[name] = group

    async def served(self, handles: Iterable[Any], answer_s: float) -> tuple[str, str] | None:
        """Path and version that most replicas serve; None if none serves anything yet."""

        async def ask(handle: Any) -> tuple[str, str] | None:
            with contextlib.suppress(TimeoutError, EngineError, RayError):
                async with asyncio.timeout(answer_s):
                    info = await handle.ready.remote()
                    return info.path, info.version
            return None

        found = Counter(filter(None, await asyncio.gather(*map(ask, handles))))
        return found.most_common(1)[0][0] if found else None

    def start(self, name: str) -> Any:
        stage = self.stage or (Stager(None) if address_of(self.path) is not None else None)
        staged = {} if stage is None else {"stage": stage}
        return self.actor.options(**self.options(name)).remote(
            self.path, self.engine, version=self.version, name=name, **staged
        )

    def lost(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            remove_placement_group(group)

    def why_pending(self) -> str:
        """What is asked and what the cluster has, in words; "" if one more fits."""
        if self.engine.num_ranks == 1:
            return super().why_pending()
        asks = [
            Ask(name=f"rank of a {self.kind}", bundle=bundle, count=len(list(alike)))
            for bundle, alike in groupby(self.settings.rank_bundles(self.engine.num_ranks))
        ]
        return " ".join(explain(asks, list(nodes.living().values())))

    async def placed(self, handle: Any) -> None:
        await handle.stats.remote()

    async def ready(self, handle: Any) -> None:
        if self.store is not None:
            await handle.__ray_call__.remote(lambda _, store: store.check_run(), self.store)
        await handle.ready.remote()

    async def look(self, name: str, handle: Any) -> Look:
        stats: ReplicaStats = await handle.stats.remote()
        return Look(
            broken="" if stats.healthy else "its engine died",
            # Not those that failed: one that hangs fails at every deadline.
            done=stats.requests + stats.generated_tokens + stats.loads + stats.steps,
            open=stats.running_requests,
        )

    async def take(self, handle: Any, *, again: bool) -> Fingerprint:
        return await take_weights(handle, self.path, self.version, again=again)

    def odd_ones(self, said: Mapping[str, Fingerprint]) -> dict[str, str]:
        return odd_ones(said, tolerance=self.tolerance)

    async def leave(self, handle: Any) -> None:
        await handle.shutdown.remote()


class PolicyKind(EngineKind):
    """Policy replicas."""

    kind = "policy replica"
    prefix = "policy"
    actor = PolicyReplicaActor
    tolerance = POLICY_TOLERANCE


class PreferenceKind(EngineKind):
    """PPM replicas."""

    kind = "PPM replica"
    prefix = "ppm"
    actor = PreferenceReplicaActor
    tolerance = PREFERENCE_TOLERANCE


class SandboxKind(RayKind):
    """Sandbox workers; a supervisor that dies inside one is its own affair."""

    kind = "sandbox worker"
    prefix = "sandbox"
    actor = SandboxWorkerActor

    def __init__(
        self, settings: MembersConfig, limits: SandboxLimits, isolation: Isolation, *, most: int
    ) -> None:
        """
        Args:
            most: workers the pool may grow to.
        """
        super().__init__(settings, limits, isolation, most)
        self._limits, self._isolation, self._most = limits, isolation, most
        self.supervisor_restarts: dict[str, int] = {}
        """Of each sandbox worker there ever was, as last heard."""

    def made_of(self) -> dict[str, Any]:
        asked = super().made_of()["cluster"]["sandbox"]
        return {
            # What each takes of its node follows from how many there may be.
            "cluster": {"sandbox": asked | {"replicas": self._most}},
            "sandbox": {"limits": asdict(self._limits), "isolation": self._isolation},
        }

    async def ready(self, handle: Any) -> None:
        await handle.stats.remote()

    async def look(self, name: str, handle: Any) -> Look:
        stats = await handle.stats.remote()
        self.supervisor_restarts[name] = stats.get("restarts", 0)
        steps = sum(count for key, count in stats.items() if key.startswith("steps/"))
        return Look(done=steps, open=stats["running"] + stats["queued"])


class CoordinatorKind(BesideDriver):
    """The one coordinator; Ray restarts its process, which then reads the store."""

    kind = "coordinator"
    prefix = COORDINATOR
    actor = CoordinatorActor

    def __init__(self, store: RunStore, queue: QueueConfig, *, patience_s: float) -> None:
        """
        Args:
            store: of the run, whose id it knows.
            patience_s: it may be silent so long while it reads the store.
        """
        super().__init__(store.root, queue, store.run_id)
        self._queue = queue
        self.silent_s = patience_s
        self._epoch = ""
        self._heard_s = 0.0

    def made_of(self) -> dict[str, Any]:
        return {"cluster": self._queue.model_dump(mode="json")}

    def start(self, name: str) -> Any:
        self._epoch = ""
        return super().start(name)

    async def look(self, name: str, handle: Any) -> Look:
        stats = await handle.stats.remote()
        now_s = time.monotonic()
        away_s = now_s - self._heard_s if self._epoch not in ("", stats.epoch) else None
        self._epoch, self._heard_s = stats.epoch, now_s
        return Look(revived_after_s=away_s)


class EndpointKind(BesideDriver):
    """The actor before a completions endpoint, on the machine of the driver; ends with it."""

    kind = "endpoint actor"
    prefix = "endpoint"
    actor = EndpointActor

    def __init__(self, endpoint: EndpointConfig, key: str) -> None:
        super().__init__()
        self.endpoint = endpoint
        self._key = key
        self.stats: EndpointStats | None = None
        """As last heard, of the whole time since the first one was started."""
        self.refusal = ""
        """Why the endpoint cannot be used, in its own words; "" while it can."""

    def start(self, name: str) -> Any:
        return EndpointActor.options(**nodes.near_driver(soft=False)).remote(
            self.endpoint, before=self.stats
        )

    async def placed(self, handle: Any) -> None:
        await handle.stats.remote()

    async def ready(self, handle: Any) -> None:
        try:
            # As an argument of a call it is kept nowhere; of the actor, Ray would keep it.
            await handle.ready.remote(self._key)
        except RayTaskError as error:
            self.refusal = str(plain(error))
            raise

    async def look(self, name: str, handle: Any) -> Look:
        # What ends the endpoint is for the driver to see; it bounds its requests itself.
        self.stats = await handle.stats.remote()
        return Look()

    async def leave(self, handle: Any) -> None:
        await handle.shutdown.remote()


class WatchmanKind(BesideDriver):
    """The one actor that ends all others when nobody looks at it any more."""

    kind = "watchman"
    prefix = WATCHMAN
    actor = WatchmanActor

    def made_of(self) -> dict[str, Any]:
        return {"cluster": {"orphan_s": self._arguments[1]}}

    async def look(self, name: str, handle: Any) -> Look:
        await handle.seen.remote()
        return Look()


class WorkerKind(RayKind):
    """Rollout workers of one round, made by `make` and running from the first moment."""

    kind = "rollout worker"
    prefix = "worker"
    actor = RolloutWorkerActor

    def __init__(
        self,
        settings: MembersConfig,
        make: Callable[[str, Mapping[str, Any]], Any],
        *,
        incarnation: str,
        forget: Callable[[str], None],
        work: Mapping[str, Any],
    ) -> None:
        """
        Args:
            make: a worker actor from its name and what it asks of Ray.
            work: what they are to do, see `made_of`; "round" is one of it.
            incarnation: keeps the names apart from those of other rollouts and drivers.
            forget: told the name of each worker that is gone, so that its leases end.
        """
        super().__init__(settings)
        self.prefix = f"{WORKER}-{incarnation}"
        self.progress: dict[str, WorkerProgress] = {}
        """Last report of every worker there ever was."""
        self.runs: dict[str, asyncio.Future[WorkerProgress]] = {}
        self._make = make
        self._forget = forget
        self._work = work

    def code(self) -> str:
        return source_digest(RolloutWorker.__module__, StageSearch.__module__)

    def made_of(self) -> dict[str, Any]:
        asked = self.settings.model_dump(mode="json", exclude={"replicas", "min_ready"})
        return {"cluster": {"workers": asked}, **self._work}

    def adopted(self, name: str, handle: Any) -> None:
        self.runs[name] = asyncio.ensure_future(handle.run.remote())

    def start(self, name: str) -> Any:
        worker = self._make(name, self.options(name))
        self.runs[name] = asyncio.ensure_future(worker.run.remote())
        return worker

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
        drains = {name: handle.drain.remote(drain_s) for name, handle in handles.items()}
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
