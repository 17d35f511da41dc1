"""A set of like actors that looks like one engine: choose, bound, retry.

    call -> choose a replica (pure `choose`) -> one of its slots -> await handle.method.remote(...)
              ^                                                          |
              +---- replica died or failed: rest or forget it, again ----+

Requests of one tree go to the replica that holds their prefix in its cache (`routing_key`, by
rendezvous hashing, so that a replica that comes or goes moves only its own trees), unless it has
more than `spill_over` requests more than the least loaded one. Load is what this pool has in
flight: each worker has a pool of its own and knows nothing of the others'.

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
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster.jobs.admission import EnginePressure
from cluster.jobs.ray_errors import describe
from cluster.telemetry import metrics, tracing
from rollout.engine import (
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    GenerationReply,
    GenerationRequest,
)
from verifier import SandboxError, StepResult

logger = logging.getLogger(__name__)

PRESSURE_TIMEOUT_S = 5.0
"""A replica that does not say by then how full it is, is not waited for."""


class PoolConfig(BaseModel):
    """How one pool uses its replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_in_flight: int = Field(
        default=256, ge=1, description="requests this pool has at one replica at a time"
    )
    spill_over: int = Field(
        default=16,
        ge=0,
        description="requests by which a tree's own replica may exceed the least loaded one",
    )
    deadline_s: float = Field(
        default=600.0,
        gt=0,
        description="seconds until a request counts as failed, waiting included",
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
    load: int


def choose(loads: Sequence[Load], key: str, spill_over: int) -> str:
    """The replica for a request.

    The one `key` belongs to, unless it is busier than the least loaded by more than `spill_over`;
    the least loaded for an empty key. Ties go by the hash of key and name, so that different keys
    spread over idle replicas.

    Raises:
        ValueError: there is none to choose from.
    """
    if not loads:
        raise ValueError("no replica to choose from")
    least = min(load.load for load in loads)
    if key:
        own = max(loads, key=lambda load: _weight(key, load.name))
        if own.load <= least + spill_over:
            return own.name
    idle = [load for load in loads if load.load == least]
    return max(idle, key=lambda load: _weight(key, load.name)).name


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

    async def call(self, method: str, *arguments: Any, key: str = "") -> tuple[Any, str]:
        """Call a method on some replica; returns its result and the replica's name.

        Raises:
            EngineError: no replica is left, or every try failed or took too long.
            Exception: what the method itself raised, other than an engine's or sandbox's failure.
        """
        tried: set[str] = set()
        for attempt in range(1, self.config.attempts + 1):
            start_s = time.monotonic()
            replica = await self._reserve(key, start_s + self.config.deadline_s, avoid=tried)
            try:
                answer = await self._invoke(replica, start_s, method, arguments, attempt=attempt)
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
        replica = await self._reserve("", start_s + self.config.deadline_s, only=name)
        try:
            return await self._invoke(replica, start_s, method, arguments)
        except _Failed as failure:
            raise EngineError(
                f"{self.kind} call {method} failed on {name}: {failure.reason}"
            ) from failure.__cause__

    # -- choosing

    async def _reserve(
        self, key: str, deadline_s: float, *, avoid: Iterable[str] = (), only: str = ""
    ) -> _Replica:
        """Take a slot of the chosen replica, waiting for one if need be."""
        start_s = time.monotonic()
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
                loads = [Load(r.name, r.in_flight + r.pinned) for r in untried]
                replica = self._replicas[choose(loads, key, self.config.spill_over)]
                replica.in_flight += 1
                metrics.observe(metrics.POOL_WAIT, now_s - start_s, pool=self.label)
                return replica
            if now_s >= deadline_s:
                raise EngineError(
                    f"no {self.kind} replica had room within {self.config.deadline_s:g} s"
                )
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
            return await self._ask(replica, start_s, method, arguments)

    async def _ask(
        self, replica: _Replica, start_s: float, method: str, arguments: tuple[Any, ...]
    ) -> Any:
        answer: Any = None
        timeout = asyncio.timeout(max(0.0, start_s + self.config.deadline_s - time.monotonic()))
        began_s = time.monotonic()
        try:
            async with timeout:
                answer = getattr(replica.handle, method).remote(*arguments)
                result = await answer
            metrics.observe(metrics.REQUEST_SECONDS, time.monotonic() - began_s, pool=self.label)
            self._count(replica, "ok")
            return result
        except TimeoutError as error:
            if not timeout.expired():
                raise
            _cancel(answer)
            self._rest(replica)
            reason = f"no answer within {self.config.deadline_s:g} s"
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
            replica.in_flight -= 1
            self._wake_one()

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
        reply, name = await self.call("generate", request, key=request.routing_key)
        written = sum(completion.num_tokens for completion in reply.completions)
        metrics.count(metrics.GENERATED_TOKENS, written, replica=name)
        metrics.count(metrics.PROMPT_TOKENS, reply.prompt_tokens, replica=name)
        metrics.count(metrics.CACHED_TOKENS, reply.cached_tokens, replica=name)
        return reply

    async def pressures(self) -> list[EnginePressure]:
        """How full the replicas say they are; those that do not say so soon are left out."""
        found = await asyncio.gather(
            *(self._pressure(replica) for replica in list(self._replicas.values()))
        )
        return [pressure for pressure in found if pressure is not None]

    async def _pressure(self, replica: _Replica) -> EnginePressure | None:
        """Beside the slots: a replica without room is just the one to ask."""
        try:
            async with asyncio.timeout(PRESSURE_TIMEOUT_S):
                return await replica.handle.pressure.remote()
        except (TimeoutError, AttributeError, EngineError, RayError):
            # Requests find out for themselves what is wrong; an endpoint has no such method.
            return None


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
