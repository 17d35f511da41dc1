"""The pools of a run: actors of one kind each, kept at their number, and who may use them.

    keep(name, kind) --> PoolKeeper: starts, looks, replaces --> READY members, as they change
        --> every request pool made here (`policy`, `preference`, `sandbox`), and every rollout
            worker's, each change with a growing number, so that a late one changes nothing

Names of pools: policy, ppm, sandbox, endpoint (in the policy's place), coordinator, watchman,
worker. Each new actor logs and traces into the run's folder.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayError

from cluster.fleet.actors import EndpointKind, RayKind, SandboxKind
from cluster.fleet.config import ServingConfig
from cluster.fleet.keeper import PoolKeeper
from cluster.fleet.left_over import Home, end_all
from cluster.fleet.membership import Losses
from cluster.fleet.stages import StageSearch
from cluster.jobs.admission import EnginePressure
from cluster.jobs.pool import PolicyPool, PoolConfig, PreferencePool, ReplicaPool, SandboxPool
from cluster.machines.scaler import PoolLoad
from cluster.telemetry.process import Telemetry
from rollout.engine import EngineError
from rollout.run_store import RunStore

SHUTDOWN_S = 15.0
"""How long actors may take to end by themselves."""

PRESSURE_TIMEOUT_S = 5.0
"""A replica that does not say by then how full it is, is not waited for."""

ENDPOINT_WAIT_S = 86_400.0
"""Bound on one call of the endpoint's actor, which bounds each request itself once it has a slot:
waiting for one, or for a limit per minute, is no failure."""

NO_LOAD = PoolLoad(waiting=0, in_service=0, served=0)

P = TypeVar("P", bound=ReplicaPool)


class Pools:
    """All pools of one run; see the module."""

    def __init__(
        self,
        config: ServingConfig,
        store: RunStore,
        *,
        note: Callable[[str], None],
        tried: Callable[[str, bool], None],
    ) -> None:
        """
        Args:
            note: told what a person should know now.
            tried: told of each start its pool, and whether it made a READY member.
        """
        self.keepers: dict[str, PoolKeeper] = {}
        """By pool, in the order they were started."""
        self.home: Home | None = None
        """Where the actors stand; known when Ray is to start."""
        self.endpoint: EndpointKind | None = None
        """None: replicas are the policy."""
        self.load = NO_LOAD
        """What the rollout in hand has to do, in trees."""
        self.telemetry = Telemetry(store=store, tracing=config.tracing)
        self._cluster = config.cluster
        self._note = note
        self._tried = tried
        self._users: dict[str, weakref.WeakSet[ReplicaPool]] = {}
        self._revision = 0

    # ---------------------------------------------------------------- for requests

    @property
    def policy(self) -> PolicyPool:
        """A new request pool of the policy, told of all changes; likewise the other two."""
        if self.endpoint is None:
            return self._request_pool(PolicyPool, "policy")
        # It sends requests again itself, and knows best when to rest.
        patient = {"deadline_s": ENDPOINT_WAIT_S, "attempts": 1, "rest_s": 0.0}
        return self._request_pool(PolicyPool, "endpoint", **patient)

    @property
    def preference(self) -> PreferencePool:
        return self._request_pool(PreferencePool, "ppm")

    @property
    def sandbox(self) -> SandboxPool:
        return self._request_pool(SandboxPool, "sandbox")

    def _request_pool(self, kind: type[P], name: str, **other: Any) -> P:
        usual: dict[str, Any] = {
            "deadline_s": self._cluster.request_timeout_s,
            "vacancy_s": self._cluster.start_timeout_s,
        }
        pool = kind(self.handles(name), PoolConfig(**usual | other))
        self._users.setdefault(name, weakref.WeakSet()).add(pool)
        return pool

    def handles(self, name: str) -> dict[str, Any]:
        """Of the members of a pool that may be given work; none if there is no such pool."""
        keeper = self.keepers.get(name)
        return keeper.handles if keeper is not None else {}

    def announce(self, name: str, handles: Mapping[str, Any]) -> None:
        """Tell everybody who uses a pool which replicas may be given work."""
        self._revision += 1
        for pool in self._users.get(name, ()):
            pool.set_replicas(handles, self._revision)
        workers = self.keepers.get("worker")
        engine = "policy" if name == "endpoint" else name
        if workers is None or engine not in StageSearch.POOLS:
            return
        for worker in workers.all_handles.values():
            worker.set_replicas.remote(engine, dict(handles), self._revision)

    async def share_pressures(self, look_s: float) -> None:
        """Ask each engine how full it is and tell all rollout workers, again and again.

        One who asks 36 replicas and tells 36 workers is 72 calls a look, not 1,296.
        """
        while True:
            await asyncio.sleep(look_s)
            workers = self.keepers.get("worker")
            for name in ("policy", "ppm"):
                handles = self.handles(name)
                found = await asyncio.gather(*(_pressure(handle) for handle in handles.values()))
                pressures = {
                    replica: pressure
                    for replica, pressure in zip(handles, found, strict=True)
                    if pressure is not None
                }
                if pressures and workers is not None:
                    for worker in workers.all_handles.values():
                        worker.set_pressures.remote(name, pressures)

    # ---------------------------------------------------------------- life

    async def keep(self, name: str, kind: RayKind, size: int) -> PoolKeeper:
        """Start a pool of actors, until enough of them serve, and look after it from now on.

        Raises:
            PoolLostError: too few started; says why. There is no such pool then.
            ModelCheckError: they cannot serve what they should.
        """
        kind.home = self.home
        keeper = self.keepers[name] = PoolKeeper(
            kind,
            size,
            self._cluster.supervision,
            start_timeout_s=self._cluster.start_timeout_s,
            min_ready=kind.settings.min_ready,
            announce=lambda handles: self.announce(name, handles),
            note=self._note,
            tried=lambda ready: self._tried(name, ready),
            made=lambda actor, handle: self.telemetry.begin_in(handle, actor, **kind.ids(actor)),
        )
        try:
            await keeper.start()
        except BaseException:
            del self.keepers[name]
            raise
        return keeper

    async def end(self, name: str, note: Callable[[str], None]) -> None:
        """End the members of a pool, if there is one, in good order, or by force after a time."""
        keeper = self.keepers.pop(name, None)
        if keeper is None:
            return
        handles = await keeper.stop()
        leaving = [handle.shutdown.remote() for handle in handles.values()]
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.gather(*leaving, return_exceptions=True)
        except TimeoutError:
            note(
                f"{len(leaving)} x {keeper.kind.kind} did not stop within {SHUTDOWN_S:.0f} s "
                "and are killed"
            )
        end_all(handles)
        for actor in handles:
            keeper.kind.lost(actor)

    def check(self) -> None:
        """Raises EngineError if members of some pool died too often to go on."""
        for keeper in self.keepers.values():
            keeper.check()

    def short(self) -> str:
        """Which pools have fewer members at work than they should; "" if none."""
        return "; ".join(short for k in self.keepers.values() if (short := k.short()))

    def losses(self) -> dict[str, Losses]:
        """What each kind of actor has been through."""
        now_s = time.monotonic()
        found = {k.kind.kind: k.members.losses(now_s) for k in self.keepers.values()}
        sandbox = self.keepers.get("sandbox")
        if sandbox is not None and isinstance(sandbox.kind, SandboxKind):
            restarts = sum(sandbox.kind.supervisor_restarts.values())
            found["sandbox supervisor"] = Losses(
                deaths=restarts, restarts=restarts, last_reason="restarted by its sandbox worker"
            )
        return found


async def _pressure(replica: Any) -> EnginePressure | None:
    """How full a replica says it is; None if it does not say so soon."""
    try:
        async with asyncio.timeout(PRESSURE_TIMEOUT_S):
            return await replica.pressure.remote()
    except (TimeoutError, EngineError, RayError):
        return None  # its keeper finds out what is wrong
