"""How many trees may be open at once: as many as the engines take without queueing.

A pure state machine. It is told what the engines say (`observe`) and asked for the `limit`; it owns
no clock, no task and no engine. Time is an argument.

    most engines take everything             limit += increase    (if the limit is what binds)
    most have a queue, two looks running     limit -= increase
    most preempt, or are nearly full         limit *= decrease

An engine that preempts throws computed prompts away, so that is answered at once and by a factor;
a queue only costs memory, so it is answered late and by a step. After a cut nothing is changed for
`settle_s`: what was open then still runs. Between "room" and "too much" lies a band in which the
limit stays, so that it does not swing. What counts is what most engines say: a single hot one is
given fewer requests (`cluster.jobs.pool.choose`) and cuts nobody.

Not covered: sandboxes as the bottleneck (their queue is bounded by the open trees themselves), the
share of several workers in one engine (each acts on the same signals, so they end up alike).
"""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

MAX_QUEUE_SHARE = 0.5
FULL_KV_USAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePressure:
    """What one engine says of itself."""

    running: int
    """Sequences in its batch."""
    waiting: int
    """Sequences it has accepted and not started."""
    kv_usage: float
    """Share of the key-value cache in use, 0..1."""
    preemptions: int
    """Sequences thrown out of the batch for want of cache, since the engine's start."""
    requests: int = 0
    """It has accepted and not answered, of all its callers."""
    pace_s: float | None = None
    """Seconds that a token of an answer takes (of a PPM: an answer), lately; None: not known."""

    def queues(self, share: float = MAX_QUEUE_SHARE) -> bool:
        """More than this share of what runs waits."""
        return self.waiting > share * max(self.running, 1)

    @property
    def full(self) -> bool:
        """More would wait long, or throw something out."""
        return self.queues() or self.kv_usage >= FULL_KV_USAGE


class AdmissionConfig(BaseModel):
    """How the number of open trees follows the engines."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_trees: int = Field(default=4, ge=1, description="never fewer open trees than this")
    start_trees: int = Field(default=32, ge=1, description="open trees before anything is known")
    increase: int = Field(default=4, ge=1, description="trees added at a look that finds room")
    decrease: float = Field(
        default=0.75, gt=0, lt=1, description="factor of the limit after a preemption"
    )
    max_queue_share: float = Field(
        default=MAX_QUEUE_SHARE,
        ge=0,
        description="waiting over running sequences that count as a queue",
    )
    full_kv_usage: float = Field(
        default=FULL_KV_USAGE,
        gt=0,
        le=1,
        description="share of the cache in use that counts as full",
    )
    room_kv_usage: float = Field(
        default=0.85, gt=0, le=1, description="no further trees above this share"
    )
    look_s: float = Field(default=1.0, gt=0, description="pause between two looks at the engines")
    settle_s: float = Field(
        default=5.0, ge=0, description="after a cut the limit is left alone for so long"
    )


class AdmissionController:
    """Decides the number of trees that may be open; see the module."""

    def __init__(self, config: AdmissionConfig, max_trees: int) -> None:
        """
        Args:
            max_trees: upper bound of the limit, >= 1; it wins over the config's lower bound.
        """
        if max_trees < 1:
            raise ValueError(f"max_trees must be >= 1, got {max_trees}")
        self.config = config
        self.max_trees = max_trees
        self._limit = self._bounded(config.start_trees)
        self._preemptions: Mapping[str, int] = {}
        self._queued_looks = 0
        self._settled_s = float("-inf")
        self.reason = "start"
        """Why the limit is what it is, for people."""

    def bound(self, max_trees: int) -> int:
        """Change the upper bound, >= 1; returns the limit that follows."""
        self.max_trees = max_trees
        self._set(self._limit)
        return self._limit

    @property
    def limit(self) -> int:
        """Trees that may be open now."""
        return self._limit

    def observe(self, now_s: float, engines: Mapping[str, EnginePressure], open_trees: int) -> int:
        """Take in what the engines say and return the new limit.

        Args:
            now_s: of a clock that does not go back.
            engines: of one kind (the policy's), by name; empty: nothing is known, nothing changes.
            open_trees: open now; a limit that is not reached is not raised.
        """
        if not engines:
            return self._limit
        usual = statistics.median_low
        usage = usual(engine.kv_usage for engine in engines.values())
        waiting = usual(engine.waiting for engine in engines.values())
        preemptions = {name: engine.preemptions for name, engine in engines.items()}
        # A replica that was replaced starts to count from zero again.
        new = usual(
            max(0, now - self._preemptions.get(name, now)) for name, now in preemptions.items()
        )
        self._preemptions = preemptions
        queued = usual(one.queues(self.config.max_queue_share) for one in engines.values())
        self._queued_looks = self._queued_looks + 1 if queued else 0
        if now_s < self._settled_s:
            return self._limit
        if new or usage >= self.config.full_kv_usage:
            self._set(int(min(self._limit, max(open_trees, 1)) * self.config.decrease))
            self.reason = f"{new} preemptions, cache {usage:.0%} full"
            self._settled_s = now_s + self.config.settle_s
        elif self._queued_looks >= 2:
            self._set(self._limit - self.config.increase)
            self.reason = f"{waiting} sequences wait at an engine"
            self._settled_s = now_s + self.config.settle_s
        elif not waiting and usage < self.config.room_kv_usage and open_trees >= self._limit:
            self._set(self._limit + self.config.increase)
            self.reason = "room"
        return self._limit

    def _set(self, limit: int) -> None:
        self._limit = self._bounded(limit)

    def _bounded(self, limit: int) -> int:
        return min(self.max_trees, max(self.config.min_trees, limit))


class TreeSlots:
    """A semaphore whose size may change; first come, first served.

    Making it smaller ends nothing: what is open goes on, and nobody enters until fewer are.
    """

    def __init__(self, limit: int) -> None:
        self.open = 0
        self._limit = limit
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._let_in()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Around one open tree; waits for a slot."""
        if self.open >= self._limit or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()  # the slot that was given meanwhile is another's now
                else:
                    self._waiting.remove(turn)
                raise
        else:
            self.open += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self.open -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.open < self._limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.open += 1
                turn.set_result(None)
