"""A set of like actors that looks like one engine: choose, bound, retry.

    call -> choose a replica (pure `choose`) -> one of its slots -> await handle.method.remote(...)
              ^                                                          |
              +---- replica died or failed: rest or forget it, again ----+

Requests of one tree go to the replica that holds their prefix in its cache (`routing_key`, by
rendezvous hashing, so that a replica that comes or goes moves only its own trees), unless it is
full or far above the others in load; then they go to the next one in the tree's own order, always
the same. Load is what all workers together have at a replica, as it was last told
(`set_pressures`), with what this pool has sent and got back since; where nothing is told, it is
what this pool has in flight.

A replica whose actor is gone for good is forgotten; one that restarts or fails rests for a while.
When no replica is left the call waits up to `vacancy_s` for a new one (`set_replicas`) and then
ends with `EngineError`, and so it does after `attempts` tries. A pool can be pickled (into an
actor); the copy starts with nothing in flight.

Not covered: routing by policy version; a state in a sandbox does not move, so a tree whose sandbox
worker died ends with `EngineError` and is searched again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import statistics
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.exceptions import ActorUnavailableError, RayActorError

from cluster.jobs.admission import EnginePressure
from cluster.jobs.pace import FIRST_S_PER_TOKEN, Pace, limit_s
from cluster.jobs.ray_errors import describe
from cluster.telemetry import metrics, tracing
from rollout.engine import (
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    GenerationReply,
    GenerationRequest,
    LogprobReply,
    LogprobRequest,
)
from verifier import SandboxError, StepResult

logger = logging.getLogger(__name__)

SPILL_SHARE = 0.25
"""Of the usual load of a replica, by which a tree's own replica may exceed it."""

SLOW = 1.5
"""Times the usual pace of its pool that make a replica a slow one."""

FORGET_PRESSURE_S = 10.0
"""What was told of a replica's load is not believed for longer."""


class PoolConfig(BaseModel):
    """How one pool uses its replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_in_flight: int = Field(
        default=256, ge=1, description="requests this pool has at one replica at a time"
    )
    spill_over: int = Field(
        default=16,
        ge=0,
        description="requests by which a tree's own replica may exceed the usual one; a quarter "
        "of what that has is allowed in any case",
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        description="seconds until a request counts as failed, waiting included; null: by the "
        "tokens it may write and its replica's pace",
    )
    attempts: int = Field(
        default=3, ge=1, description="tries of a request, each on another replica"
    )
    rest_s: float = Field(default=2.0, ge=0, description="seconds a failing replica is left alone")
    vacancy_s: float = Field(
        default=0.0, ge=0, description="seconds to wait for a replica where none is left"
    )


class Load(NamedTuple):
    """A replica that may be chosen, and how busy it is."""

    name: str
    load: float
    full: bool = False
    """Its engine cannot take more without queueing or throwing something out."""
    pace_s: float | None = None
    """See `EnginePressure`."""


def choose(loads: Sequence[Load], key: str, spill_over: int) -> str:
    """The replica for a request.

    Of those that are not full, nor above the median load by more than `spill_over` and a quarter,
    the first in the order of `key`; its own one if there is none such. The load of one that is
    clearly slower than most counts so many times. Rendezvous hashing with bounded loads, after
    Mirrokni et al., arXiv 1608.01350: keys keep their replica, and what a slow one cannot take is
    spread over all others. For an empty key the least loaded.

    Raises:
        ValueError: there is none to choose from.
    """
    if not loads:
        raise ValueError("no replica to choose from")
    paces = [load.pace_s for load in loads if load.pace_s]
    if paces:
        usual_s = statistics.median_low(paces)
        loads = [
            load._replace(load=load.load * load.pace_s / usual_s)
            if load.pace_s and load.pace_s > SLOW * usual_s
            else load
            for load in loads
        ]
    usual = statistics.median_low(load.load for load in loads)
    most = usual + max(spill_over, SPILL_SHARE * usual)
    if not key:
        most = min(load.load for load in loads)
    roomy = [load for load in loads if load.load <= most and not (key and load.full)]
    return max(roomy or loads, key=lambda load: _weight(key, load.name)).name


def _weight(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{key}\x1f{name}".encode(), digest_size=8).digest()


@dataclass(slots=True)
class _Replica:
    name: str
    handle: Any
    in_flight: int = 0
    pinned: int = 0
    """Open trees that can only be served here."""
    rests_until_s: float = 0.0
    pace: Pace = field(default_factory=Pace)
    told: EnginePressure | None = None
    """What was last said of it, with all its callers counted."""
    told_s: float = float("-inf")
    told_in_flight: int = 0
    """What this pool had in flight then."""
    asked: dict[object, float] = field(default_factory=dict)
    """Requests that have no answer yet, and when each was sent; the oldest first."""

    def load(self, now_s: float) -> Load:
        """How busy it is, to choose by."""
        requests, told = self.in_flight, self.told
        if told is None or now_s - self.told_s > FORGET_PRESSURE_S:
            return Load(self.name, requests + self.pinned)
        everybodys = told.requests + self.in_flight - self.told_in_flight
        return Load(self.name, max(requests, everybodys) + self.pinned, told.full, told.pace_s)


class ReplicaPool:
    """Calls methods on a set of like actors; the engines below give it their interface."""

    kind = "replica"
    label = "replica"
    """In metrics."""

    def __init__(self, handles: Mapping[str, Any], config: PoolConfig | None = None) -> None:
        """
        Args:
            handles: actor handles by a name that is unique in the pool.
        """
        self.config = config or PoolConfig()
        self._replicas = {name: _Replica(name, handle) for name, handle in handles.items()}
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._queued: dict[object, tuple[float, str]] = {}
        """Requests without a slot: since when, and of which replica if it must be that one."""
        self._lost: list[str] = []
        self._revision = -1

    def __reduce__(self) -> tuple[Any, ...]:
        handles = {name: replica.handle for name, replica in self._replicas.items()}
        return (type(self), (handles, self.config))

    def set_replicas(self, handles: Mapping[str, Any], revision: int) -> None:
        """Let exactly these replicas take requests from now on.

        Those that leave are sent nothing more; requests they have are awaited by their callers. A
        known name may come with a new handle.

        Args:
            revision: of this list, growing; one that comes after a later one is ignored.
        """
        if revision <= self._revision:
            return
        self._revision = revision
        known = self._replicas
        self._replicas = {
            name: known[name]
            if name in known and known[name].handle == handle
            else _Replica(name, handle)
            for name, handle in handles.items()
        }
        self._wake_all()

    def set_pressures(self, pressures: Mapping[str, EnginePressure]) -> None:
        """Take in how busy replicas said they are just now, all their callers counted."""
        now_s = time.monotonic()
        for name, pressure in pressures.items():
            replica = self._replicas.get(name)
            if replica is not None:
                replica.told, replica.told_s = pressure, now_s
                replica.told_in_flight = replica.in_flight

    def waits(self) -> dict[str, tuple[int, float]]:
        """Who is waited for: replica -> how many requests, and for how many seconds the oldest.

        Those that wait for a replica to have room, or to be there at all, are under "".
        """
        now_s = time.monotonic()
        since: dict[str, list[float]] = {}
        for replica in self._replicas.values():
            if replica.asked:
                since[replica.name] = list(replica.asked.values())
        for begun_s, only in self._queued.values():
            since.setdefault(only, []).append(begun_s)
        return {name: (len(times), now_s - min(times)) for name, times in since.items()}

    async def call(
        self, method: str, *arguments: Any, key: str = "", max_tokens: int = 0
    ) -> tuple[Any, str]:
        """Call a method on some replica; returns its result and the replica's name.

        Args:
            max_tokens: that the answer may have, one after the other.
        Raises:
            EngineError: no replica is left, or every try failed or took too long.
            Exception: what the method itself raised, other than an engine's or sandbox's failure.
        """
        tried: set[str] = set()
        for attempt in range(1, self.config.attempts + 1):
            start_s = time.monotonic()
            replica = await self._reserve(key, start_s, max_tokens, avoid=tried)
            try:
                answer = await self._invoke(
                    replica, start_s, method, arguments, max_tokens, attempt=attempt
                )
                return answer, replica.name
            except _Failed as failure:
                tried.add(replica.name)
                if attempt == self.config.attempts:
                    raise EngineError(
                        f"{self.kind} call {method} failed {attempt} times, last on "
                        f"{replica.name}: {failure.reason}"
                    ) from failure.__cause__
                logger.warning(
                    "A call is tried again: %s method=%s replica=%s",
                    failure.reason,
                    method,
                    replica.name,
                )
        raise AssertionError("unreachable")

    async def call_on(self, name: str, method: str, *arguments: Any) -> Any:
        """Call a method on one replica and no other.

        Raises:
            EngineError: it is gone, failed or took too long.
        """
        start_s = time.monotonic()
        replica = await self._reserve("", start_s, only=name)
        try:
            return await self._invoke(replica, start_s, method, arguments)
        except _Failed as failure:
            raise EngineError(
                f"{self.kind} call {method} failed on {name}: {failure.reason}"
            ) from failure.__cause__

    # -- choosing

    def _patience_s(self, max_tokens: int, replica: _Replica | None = None) -> float:
        """How long a request may take, at one replica, or at the slowest."""
        if self.config.deadline_s is not None:
            return self.config.deadline_s
        own = replica.pace.s_per_token if replica is not None else None
        if own is None:
            known = [one.pace.s_per_token or 0.0 for one in self._replicas.values()]
            own = max([FIRST_S_PER_TOKEN, *known])
        return limit_s(max_tokens, own)

    async def _reserve(
        self,
        key: str,
        start_s: float,
        max_tokens: int = 0,
        *,
        avoid: Iterable[str] = (),
        only: str = "",
    ) -> _Replica:
        """Take a slot of the chosen replica, waiting for one if need be."""
        request = object()
        self._queued[request] = (start_s, only)
        try:
            return await self._slot(key, start_s, max_tokens, avoid=avoid, only=only)
        finally:
            del self._queued[request]

    async def _slot(
        self, key: str, start_s: float, max_tokens: int, *, avoid: Iterable[str], only: str
    ) -> _Replica:
        patience_s = self._patience_s(max_tokens)
        deadline_s = start_s + patience_s
        while True:
            now_s = time.monotonic()
            candidates = [r for r in self._replicas.values() if not only or r.name == only]
            vacant_until_s = min(deadline_s, start_s + self.config.vacancy_s)
            if not candidates and not only and now_s < vacant_until_s:
                await self._wait(vacant_until_s - now_s)
                continue
            if not candidates:
                which = f"{self.kind} {only}" if only else f"{self.kind} replica"
                lost = f" (gone: {', '.join(self._lost)})" if self._lost else ""
                raise EngineError(f"no {which} is left{lost}")
            awake = [r for r in candidates if only or r.rests_until_s <= now_s]
            free = [r for r in awake if r.in_flight < self.config.max_in_flight]
            untried = [r for r in free if r.name not in avoid] or free
            if untried:
                loads = [replica.load(now_s) for replica in untried]
                replica = self._replicas[choose(loads, key, self.config.spill_over)]
                replica.in_flight += 1
                metrics.observe(metrics.POOL_WAIT, now_s - start_s, pool=self.label)
                return replica
            if now_s >= deadline_s:
                raise EngineError(f"no {self.kind} replica had room within {patience_s:g} s")
            wakes_s = min((r.rests_until_s for r in candidates if r not in awake), default=now_s)
            until_s = min(deadline_s, wakes_s) if wakes_s > now_s else deadline_s
            await self._wait(until_s - now_s)

    async def _wait(self, timeout_s: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake_one()  # the slot this caller was woken for is another's now
            raise
        finally:
            if not waiter.done():
                waiter.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._waiters:
            self._wake_one()

    # -- calling

    async def _invoke(
        self,
        replica: _Replica,
        start_s: float,
        method: str,
        arguments: tuple[Any, ...],
        max_tokens: int = 0,
        *,
        attempt: int = 1,
    ) -> Any:
        """One call in a reserved slot; `_Failed` if another replica may do better."""
        name = f"{self.kind}.{method}"
        waited_s = round(time.monotonic() - start_s, 6)
        with tracing.span(name, replica=replica.name, attempt=attempt, queue_s=waited_s) as span:
            if span is not None:
                call = getattr(replica.handle, "traced", None)
                if call is not None:
                    arguments = (tracing.traceparent(), name, method, *arguments)
                    method = "traced"
            return await self._ask(replica, start_s, method, arguments, max_tokens)

    async def _ask(
        self,
        replica: _Replica,
        start_s: float,
        method: str,
        arguments: tuple[Any, ...],
        max_tokens: int,
    ) -> Any:
        answer: Any = None
        began_s = time.monotonic()
        patience_s = self._patience_s(max_tokens, replica)
        if self.config.deadline_s is not None:
            patience_s = max(0.0, start_s + patience_s - began_s)
        timeout = asyncio.timeout(patience_s)
        request = object()
        replica.asked[request] = began_s
        try:
            async with timeout:
                answer = getattr(replica.handle, method).remote(*arguments)
                result = await answer
            seconds = time.monotonic() - began_s
            metrics.observe(metrics.REQUEST_SECONDS, seconds, pool=self.label)
            replica.pace.observe(self._length(result), seconds)
            self._count(replica, "ok")
            return result
        except TimeoutError as error:
            if not timeout.expired():
                raise
            _cancel(answer)
            self._rest(replica)
            replica.pace.observe(max_tokens, time.monotonic() - began_s)
            reason = f"no answer within {self.config.deadline_s or patience_s:g} s"
            raise _Failed(reason) from error
        except asyncio.CancelledError:
            _cancel(answer)
            raise
        except ActorUnavailableError as error:
            self._rest(replica)
            raise _Failed("its actor is restarting") from error
        except RayActorError as error:
            self._lose(replica)
            raise _Failed(f"its actor died ({describe(error).splitlines()[0]})") from error
        except (EngineError, SandboxError) as error:
            self._rest(replica)
            raise _Failed(describe(error).splitlines()[0]) from error
        finally:
            del replica.asked[request]
            replica.in_flight -= 1
            self._wake_one()

    def _length(self, answer: Any) -> int:
        """Tokens that were written one after the other for an answer; 0: none were."""
        return 0

    def _count(self, replica: _Replica, outcome: str) -> None:
        metrics.count(metrics.REQUESTS, pool=self.label, replica=replica.name, outcome=outcome)

    def _rest(self, replica: _Replica) -> None:
        self._count(replica, "failed")
        replica.rests_until_s = time.monotonic() + self.config.rest_s

    def _lose(self, replica: _Replica) -> None:
        self._count(replica, "failed")
        if self._replicas.get(replica.name) is replica:
            del self._replicas[replica.name]
            self._lost.append(replica.name)
            logger.error("A %s is gone replica=%s", self.kind, replica.name)
        self._wake_all()


class _Failed(Exception):
    """A call failed in a way that says nothing about the request."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _cancel(answer: Any) -> None:
    """Tell the actor that nobody waits for its answer any more."""
    if isinstance(answer, ray.ObjectRef):
        ray.cancel(answer, force=False)


class PolicyPool(ReplicaPool):
    """`PolicyEngine` over policy replicas."""

    kind = "policy"
    label = "policy"

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """Send the request to the replica of its tree; see `PolicyEngine.generate`."""
        reply, name = await self.call(
            "generate", request, key=request.routing_key, max_tokens=request.max_tokens
        )
        written = sum(completion.num_tokens for completion in reply.completions)
        metrics.count(metrics.GENERATED_TOKENS, written, replica=name)
        metrics.count(metrics.PROMPT_TOKENS, reply.prompt_tokens, replica=name)
        metrics.count(metrics.CACHED_TOKENS, reply.cached_tokens, replica=name)
        return reply

    async def logprobs(self, request: LogprobRequest) -> LogprobReply:
        """How likely the policy is to write given texts; an endpoint cannot be asked.

        Raises:
            EngineError: as `generate`.
        """
        reply, _ = await self.call("logprobs", request, key=request.routing_key)
        return reply

    def _length(self, answer: Any) -> int:
        if not isinstance(answer, GenerationReply):
            return 0
        return max((completion.num_tokens for completion in answer.completions), default=0)


class PreferencePool(ReplicaPool):
    """`PreferenceEngine` over PPM replicas."""

    kind = "preference model"
    label = "ppm"

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        """Send the request to the replica of its tree; see `PreferenceEngine.evaluate`."""
        reply, name = await self.call("evaluate", request, key=request.routing_key)
        metrics.count(metrics.SCORED_TOKENS, reply.num_tokens, replica=name)
        return reply


class SandboxPool(ReplicaPool):
    """`StepSandbox` over sandbox workers: a tree lives on the one that opened it.

    State ids are the worker's, prefixed with its name.
    """

    kind = "sandbox"
    label = "sandbox"

    def __init__(self, handles: Mapping[str, Any], config: PoolConfig | None = None) -> None:
        """
        Args:
            handles: actor handles by a unique name without a slash.
        """
        for name in handles:
            if "/" in name:
                raise ValueError(f"the name of a sandbox worker has no slash, got {name!r}")
        super().__init__(handles, config)
        self._owner = uuid.uuid4().hex[:8]
        self._worker_of: dict[str, _Replica] = {}

    async def open(self, tree_id: str) -> str:
        """Open a tree on the worker with the fewest open trees; returns its root state.

        Raises:
            EngineError: no worker could open it.
        """
        state, name = await self.call("open", tree_id, self._owner)
        replica = self._replicas.get(name)
        if replica is not None:
            self._unpin(tree_id)
            replica.pinned += 1
            self._worker_of[tree_id] = replica
        return f"{name}/{state}"

    async def run(self, state: str, codes: Sequence[str]) -> list[StepResult]:
        """Run sibling codes where their tree lives.

        Raises:
            EngineError: that worker is gone or failed; the tree has to be searched again.
        """
        name, _, own_state = state.partition("/")
        results = await self.call_on(name, "run", own_state, list(codes))
        return [r if r.state is None else replace(r, state=f"{name}/{r.state}") for r in results]

    async def close(self, tree_id: str) -> None:
        """Free a tree's states; harmless if its worker is gone or it is not open."""
        replica = self._unpin(tree_id)
        if replica is None:
            return
        try:
            await self.call_on(replica.name, "close", tree_id, self._owner)
        except EngineError as error:
            logger.info("A tree was not closed: %s tree=%s", error, tree_id)

    def _unpin(self, tree_id: str) -> _Replica | None:
        replica = self._worker_of.pop(tree_id, None)
        if replica is not None:
            replica.pinned -= 1
        return replica
