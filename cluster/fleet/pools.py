"""The pools of a run: actors of one kind each, kept at their number, and who may use them.

    find_left(), judge_left() --> actors of a driver that is gone, for `keep`; others end
    keep(name, kind) --> PoolKeeper: starts, looks, replaces --> READY members, as they change
        --> every request pool made here (`policy`, `preference`, `sandbox`), and every rollout
            worker's, each change with a growing number, so that a late one changes nothing

Names of pools: policy, ppm, sandbox, endpoint (in the policy's place), coordinator, watchman,
worker. Each new actor logs and traces into the run's folder.

What is known of them all, and of the nodes they stood on, is told to people by `account`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from cluster.fleet.actors import EndpointKind, RayKind, SandboxKind, WorkerKind
from cluster.fleet.config import ServingConfig
from cluster.fleet.keeper import PoolKeeper
from cluster.fleet.left_over import (
    DRAIN_S,
    SILENT,
    WORKER,
    Home,
    LeftActor,
    Mark,
    end_all,
    end_left_over,
    find_left,
    put_mark,
)
from cluster.fleet.membership import Losses
from cluster.fleet.stages import StageSearch
from cluster.fleet.stall import Stall
from cluster.folder.machine import versions
from cluster.folder.run_folder import RunFolder
from cluster.jobs.admission import EnginePressure
from cluster.jobs.coordinator import WorkerProgress
from cluster.jobs.pool import PolicyPool, PoolConfig, PreferencePool, ReplicaPool, SandboxPool
from cluster.machines import nodes
from cluster.machines.scaler import PoolLoad, emptiest
from cluster.telemetry import metrics
from cluster.telemetry.live import (
    ActorAccount,
    FleetAccount,
    LossAccount,
    NodeAccount,
    PartAccount,
    WaitAccount,
)
from cluster.telemetry.logs import set_level
from cluster.telemetry.process import Place, Telemetry, place_of, set_level_in
from rollout.engine import EngineError
from rollout.store import TrajectoryStore

SHUTDOWN_S = 15.0
"""How long actors may take to end by themselves."""

PRESSURE_TIMEOUT_S = 5.0
"""A replica that does not say by then how full it is, is not waited for."""

ENDPOINT_WAIT_S = 86_400.0
"""Bound on one call of the endpoint's actor, which bounds each request itself once it has a slot:
waiting for one, or for a limit per minute, is no failure."""

HAND_OVER_S = 2.0
"""How long the last counts of actors that end are waited for."""

MAX_TOLD = 64
"""Actors, and waits, that the driver's account names."""

LOOK_S = 2.0
"""Pause between two looks at the nodes for it."""

SETTINGS = {"policy": "policy", "ppm": "ppm", "sandbox": "sandbox", "worker": "workers"}
"""Of pools with a size: the section of the cluster's config that has it."""

NO_LOAD = PoolLoad(waiting=0, in_service=0, served=0)

logger = logging.getLogger(__name__)

P = TypeVar("P", bound=ReplicaPool)


class Pools:
    """All pools of one run; see the module."""

    def __init__(
        self,
        config: ServingConfig,
        folder: RunFolder,
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
        self.telemetry = Telemetry(
            store=folder.store, tracing=config.tracing, level=config.log_level
        )
        self.left: dict[str, list[LeftActor]] = {}
        """Of a driver that is gone, by pool, until they are taken over."""
        self.folder = folder
        self._config = config
        self.parts: tuple[float, Sequence[Stall]] = (0.0, ())
        """When the rollout in hand was last looked at, and what of it did not move just then."""
        self._places: dict[str, Place] = {}
        """Of every actor that ever had a process."""
        self._moves: dict[str, _Moves] = {}
        self._address = ""
        self._nodes: dict[str, NodeAccount] = {}
        """Those that are about to go or went since the start, with the time they began to."""
        self._num_nodes = 0
        self._pulse_s = 0.0
        self._watching: asyncio.Task[None] | None = None
        self._placing: set[asyncio.Task[None]] = set()
        self._cluster = config.cluster
        self._note = note
        self._tried = tried
        self._users: dict[str, weakref.WeakSet[ReplicaPool]] = {}
        self._revision = 0

    def change(self, config: ServingConfig) -> None:
        """Go on with another config: sizes of pools that do not scale by themselves, log level."""
        before, self._cluster, self._config = self._cluster, config.cluster, config
        for name, keeper in self.keepers.items():
            if name not in SETTINGS or not isinstance(keeper.kind, RayKind):
                continue
            settings = keeper.kind.settings = getattr(config.cluster, SETTINGS[name])
            same = settings.replicas == getattr(before, SETTINGS[name]).replicas
            if same or name in config.cluster.autoscale:
                continue
            keeper.resize(settings.replicas)
            limit_s = config.cluster.request_timeout_s or config.cluster.supervision.stall_s
            keeper.drain(emptiest(keeper.loads(), keeper.living - settings.replicas), limit_s)
        if config.log_level != self.telemetry.level:
            self.telemetry = replace(self.telemetry, level=config.log_level)
            set_level(config.log_level)
            for keeper in self.keepers.values():
                for handle in keeper.all_handles.values():
                    set_level_in(handle, config.log_level)

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
        # Workers that are taken over have heard of an earlier driver's.
        revision = (self.folder.turn << 32) + self._revision
        for pool in self._users.get(name, ()):
            pool.set_replicas(handles, revision)
        workers = self.keepers.get("worker")
        engine = "policy" if name == "endpoint" else name
        if workers is None or engine not in StageSearch.POOLS:
            return
        for worker in workers.all_handles.values():
            worker.set_replicas.remote(engine, dict(handles), revision)

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

    async def find_left(self) -> None:
        """Find what a driver that is gone has left of this run: `keep` takes it over."""
        assert self.home is not None
        silent_s = self._cluster.supervision.silent_s
        found = await asyncio.to_thread(find_left, self.home.namespace, silent_s)
        self.left = defaultdict(list)
        for actor in found:
            self.left[actor.pool].append(actor)

    async def judge_left(self, kinds: Mapping[str, RayKind]) -> None:
        """End what cannot be taken over, and say why; rollout workers commit what is finished.

        They are taken over only while some of each pool that they work with are, and if their round
        goes on; `keep` is told what else they should be.

        Args:
            kinds: of the pools that are not kept yet, but the rollout workers'.
        """
        found = [actor for actors in self.left.values() for actor in actors]
        refused: dict[LeftActor, str] = {}
        for name, kind in kinds.items():
            mark = await self._mark(kind)
            refused |= self._refused(self.left.get(name, ()), mark)
        kept = {actor.pool for actor in found if actor not in refused}
        lost = {actor.pool for actor in refused} - kept
        for actor in self.left.get(WORKER, ()):
            if lost.intersection(StageSearch.POOLS):
                refused[actor] = "what it works with ends"
            elif actor.mark is None:
                refused[actor] = SILENT
            elif await asyncio.to_thread(self._is_sealed, actor.mark.settings["round"]):
                refused[actor] = "its round is over"
        self.left = defaultdict(list)
        for actor in found:
            if actor not in refused:
                self.left[actor.pool].append(actor)
        await self._end_left(refused)
        if self.left:
            said = ", ".join(f"{len(actors)} {pool}" for pool, actors in self.left.items())
            self._note(f"taken over from a driver that is gone, as they run: {said}")

    async def end_left(self) -> None:
        """End what nobody has taken over, because the run stops."""
        left = [actor for actors in self.left.values() for actor in actors]
        self.left = {}
        await self._end_left(dict.fromkeys(left, "the run stops"))

    def _is_sealed(self, round: int) -> bool:
        return TrajectoryStore(self.telemetry.store, round).manifest() is not None

    def _refused(self, left: Iterable[LeftActor], mark: Mark) -> dict[LeftActor, str]:
        """Why, of each of those that are left of a pool and are not what is wanted."""
        if not self.folder.turn:
            return dict.fromkeys(left, "this command does not hold the run")
        return {actor: why for actor in left if (why := actor.why_not(mark))}

    async def _end_left(self, refused: Mapping[LeftActor, str]) -> None:
        """End what an earlier driver has left and is not taken over; says why."""
        if not refused:
            return
        assert self.home is not None
        names = {actor.name for actor in refused}
        await asyncio.to_thread(end_left_over, self.home.namespace, DRAIN_S, names)
        for (pool, why), count in Counter((a.pool, why) for a, why in refused.items()).items():
            self._note(f"{count} {pool} of an earlier start not taken over, but ended: {why}")

    async def _take_left(self, name: str, mark: Mark, size: int) -> dict[str, Any]:
        """Handles, by member, of those left of a pool that are what is wanted; others end."""
        left = sorted(self.left.pop(name, ()), key=lambda actor: (len(actor.name), actor.name))
        refused = self._refused(left, mark)
        fit = [actor for actor in left if actor not in refused]
        if name not in self._cluster.autoscale:
            refused |= dict.fromkeys(fit[size:], "more than there should be")
        await self._end_left(refused)
        return {actor.member: actor.handle for actor in left if actor not in refused}

    async def _mark(self, kind: RayKind) -> Mark:
        """What an actor of a kind is made of now."""
        packages = {name: v for name, v in versions().items() if name != "rstar-cluster"}
        alike = {
            "tracing": self._config.tracing.model_dump(mode="json"),
            "storage": self._config.storage.model_dump(mode="json"),
            "metrics": {"enabled": self._config.metrics.enabled},
            "packages": packages,
        }
        code = await asyncio.to_thread(kind.code)
        return Mark(code=code, settings=kind.made_of() | alike)

    async def keep(self, name: str, kind: RayKind, size: int) -> PoolKeeper:
        """Start a pool of actors, until enough of them serve, and look after it from now on.

        Those that an earlier driver has left (`find_left`) are members from the beginning.

        Raises:
            PoolLostError: too few started; says why. There is no such pool then.
            ModelCheckError: they cannot serve what they should.
        """
        kind.home = self.home
        mark = await self._mark(kind)
        adopted = await self._take_left(name, mark, size)

        def made(actor: str, handle: Any) -> None:
            self._place(actor, self.telemetry.begin_in(handle, actor, **kind.ids(actor)))
            put_mark(handle, mark)

        keeper = self.keepers[name] = PoolKeeper(
            kind,
            max(size, len(adopted)),
            self._cluster.supervision,
            start_timeout_s=self._cluster.start_timeout_s,
            min_ready=kind.settings.min_ready,
            announce=lambda handles: self.announce(name, handles),
            note=self._note,
            tried=lambda ready: self._tried(name, ready),
            made=made,
        )
        for actor, handle in adopted.items():  # which log into the run's folder already
            self._place(actor, place_of(handle))
            set_level_in(handle, self.telemetry.level)
        try:
            await keeper.start(adopted)
        except BaseException:
            del self.keepers[name]
            raise
        if name == WORKER and adopted:  # who know the replicas of another driver
            for engine in ("endpoint", *StageSearch.POOLS):
                if engine in self.keepers:
                    self.announce(engine, self.handles(engine))
        return keeper

    def _place(self, actor: str, asked: Any) -> None:
        """Learn where an actor runs, which it was asked."""

        async def place() -> None:
            with contextlib.suppress(RayError):  # its keeper finds out
                self._places[actor] = await asked

        task = asyncio.create_task(place())
        self._placing.add(task)
        task.add_done_callback(self._placing.discard)

    def leaving(self) -> None:
        """Say that this driver ends: if it is killed before it has ended its actors, they end soon.

        Returns at once.
        """
        if not self.folder.is_taken:
            for watchman in self.handles("watchman").values():
                watchman.leaving.remote()

    async def end(self, name: str, note: Callable[[str], None]) -> None:
        """End the members of a pool, if there is one, in good order, or by force after a time.

        They go on if another driver has taken the run.
        """
        keeper = self.keepers.pop(name, None)
        if keeper is None:
            return
        handles = await keeper.stop()
        if self.folder.is_taken:
            return
        leaving = [handle.shutdown.remote() for handle in handles.values()]
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.gather(*leaving, return_exceptions=True)
        except TimeoutError:
            note(
                f"{len(leaving)} x {keeper.kind.kind} did not stop within {SHUTDOWN_S:.0f} s "
                "and are killed"
            )
        await self.end_counted(handles)
        for actor in handles:
            keeper.kind.lost(actor)

    async def end_counted(self, handles: Mapping[str, Any]) -> None:
        """Kill actors after they handed over what they counted last."""
        if self._config.metrics.enabled:
            asked = [handle.__ray_call__.remote(_hand_over) for handle in handles.values()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HAND_OVER_S):
                    await asyncio.gather(*asked, return_exceptions=True)
        end_all(handles)

    # ---------------------------------------------------------------- for people

    def watch(self) -> None:
        """Look at the nodes from now on, for the account, if Ray runs here."""
        if not ray.is_initialized():
            return
        self._address = ray.get_runtime_context().gcs_address
        self._watching = asyncio.create_task(self._watch(), name="watch-nodes")

    async def unwatch(self) -> None:
        """Look no more."""
        if self._watching is not None:
            looks = (self._watching, *self._placing)  # an actor may have no place yet
            for task in looks:
                task.cancel()
            await asyncio.gather(*looks, return_exceptions=True)
            self._watching, self._address = None, ""

    async def _watch(self) -> None:
        past: set[str] | None = None
        since: dict[str, float] = {}
        while True:
            self._pulse_s = now_s = time.monotonic()
            try:
                every = await nodes.asked(nodes.table)
                going = await nodes.asked(nodes.draining)
            except (RayError, OSError, RuntimeError, ValueError):
                logger.debug("The nodes could not be looked at", exc_info=True)
            else:
                if past is None:
                    past = {node["NodeID"] for node in every if not node["Alive"]}
                self._num_nodes = sum(node["Alive"] for node in every)
                for node in every:
                    name = node["NodeID"]
                    if name in past or (node["Alive"] and name not in going):
                        continue
                    state = "draining" if node["Alive"] else "gone"
                    self._nodes[name] = NodeAccount(
                        node=name,
                        host=node.get("NodeManagerHostname") or name[:8],
                        state=state,
                        for_s=since.setdefault(f"{name} {state}", now_s),
                        reason=node.get("DeathReasonMessage") or "",
                    )
            await asyncio.sleep(LOOK_S)

    def account(self) -> FleetAccount | None:
        """Who is there, who waits for whom and since when; asks nobody, for any thread."""
        for _ in range(3):
            with contextlib.suppress(RuntimeError):  # a member came while they were counted
                return self._account(time.monotonic())
        return None

    def _account(self, now_s: float) -> FleetAccount:
        keepers = dict(self.keepers)
        actors = [
            self._account_of(keeper, pool, name, now_s)
            for pool, keeper in keepers.items()
            for name in keeper.members.names()
        ]
        waits: list[WaitAccount] = []
        workers = keepers["worker"].kind if "worker" in keepers else None
        if isinstance(workers, WorkerKind):
            for who in keepers["worker"].members.names():
                told, look = workers.progress.get(who), keepers["worker"].looks.get(who)
                age_s = now_s - look.seen_s if look is not None else 0.0
                waits += (
                    WaitAccount(who=who, pool=pool, on=on, count=count, for_s=oldest_s + age_s)
                    for pool, replicas in (told.waits.items() if told is not None else ())
                    for on, (count, oldest_s) in replicas.items()
                )
        told_s, parts = self.parts
        return FleetAccount(
            address=self._address,
            short=self.short(),
            num_actors=len(actors),
            num_nodes=self._num_nodes,
            loop_still_s=max(0.0, now_s - self._pulse_s - LOOK_S) if self._address else 0.0,
            actors=sorted(actors, key=lambda a: -max(a.still_s, a.silent_s))[:MAX_TOLD],
            waits=sorted(waits, key=lambda w: -w.for_s)[:MAX_TOLD],
            parts=[
                PartAccount(
                    part=stall.stage,
                    waits_on=stall.waits_on,
                    open=stall.open,
                    for_s=stall.for_s + now_s - told_s,
                )
                for stall in parts
            ],
            losses=[
                LossAccount(
                    name=name,
                    pool=pool,
                    host=place.host,
                    node=place.node,
                    reason=reason,
                    ago_s=now_s - lost_s,
                )
                for pool, keeper in keepers.items()
                for name, reason, lost_s in list(keeper.lost)
                for place in [self._places.get(name, NO_PLACE)]
            ],
            nodes=[replace(n, for_s=now_s - n.for_s) for n in list(self._nodes.values())],
        )

    def _account_of(self, keeper: PoolKeeper, pool: str, name: str, now_s: float) -> ActorAccount:
        look, place = keeper.looks.get(name), self._places.get(name, NO_PLACE)
        moves = self._moves.setdefault(name, _Moves(now_s))
        if look is not None:
            done, open_ = look.done, look.open
            if isinstance(keeper.kind, WorkerKind):
                told = keeper.kind.progress.get(name, WorkerProgress())
                done, open_ = told.requests + told.finished.trees, told.open_trees
            moves.take(look.seen_s, done, open_)
        state = keeper.members.state(name)
        return ActorAccount(
            name=name,
            pool=pool,
            state="" if state is None else state.value,
            host=place.host,
            node=place.node,
            pid=place.pid,
            open=moves.open,
            speed=moves.speed,
            still_s=now_s - moves.moved_s if moves.open else 0.0,
            silent_s=now_s - (moves.began_s if look is None else look.seen_s),
        )

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


def _hand_over(actor: Any) -> None:
    metrics.flush()


NO_PLACE = Place("", "", 0)


@dataclass(slots=True)
class _Moves:
    """How an actor's counter went."""

    began_s: float
    """When it was first heard of."""
    done: float = 0.0
    open: int = 0
    speed: float | None = None
    moved_s: float = 0.0
    """When `done` last changed, or work came."""
    _looked_s: float = 0.0

    def take(self, seen_s: float, done: float, open: int) -> None:
        """Take one look."""
        if seen_s == self._looked_s:
            return
        if self._looked_s and self.open and open:
            now = max(0.0, done - self.done) / (seen_s - self._looked_s)
            self.speed = now if self.speed is None else 0.8 * self.speed + 0.2 * now
        if done != self.done or not self.open:
            self.moved_s = seen_s
        self.done, self.open, self._looked_s = done, open, seen_s


async def _pressure(replica: Any) -> EnginePressure | None:
    """How full a replica says it is; None if it does not say so soon."""
    try:
        async with asyncio.timeout(PRESSURE_TIMEOUT_S):
            return await replica.pressure.remote()
    except (TimeoutError, EngineError, RayError):
        return None  # its keeper finds out what is wrong
