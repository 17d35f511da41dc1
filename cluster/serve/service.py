"""Searches for many users over one set of engines: a queue, deadlines, cancellation. No HTTP here.

    admitted --> tickets --turn--> Solver (the one of `rstar solve`) --> SolveResult
       | BusyError: queue full         | EngineError, SandboxError, SearchError: begun again
       | StoppingError                 | deadline: the best answer so far
       +-- leaving the block, or cancelling the caller, ends the search and frees what it holds

A search is one coroutine over the pools of the fleet, with the seed of its request: the same
problem, seed and budget give what `rstar solve` gives. Two requests may ask the same at the same
time: in the sandbox, where states are kept by the search's name, each has its own.

A deadline counts from admission. Who has waited so long without a turn gets `NeverBegunError`.

Not covered: more searches than one event loop can drive; a second server on the same cluster has a
queue of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.serve.config import ServiceConfig
from cluster.serve.queue import FairQueue, QueueFullError, Ticket, User
from cluster.telemetry import metrics
from rollout.engine import EngineError, PolicyEngine, PreferenceEngine
from rollout.methods import Event, MethodConfig, OnEvent, Solver, SolveResult
from rollout.problem import Problem
from rollout.search import SearchConfig, SearchError, StepSandbox
from verifier import SandboxError, StepResult
from verifier.sandbox_wire import TWIN

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_RETRY_AFTER_S = 120

FIRST_SEARCH_S = 10.0
"""What a search is believed to take before one has ended."""

SMOOTHING = 0.1
"""Weight of the last search in the mean time of one."""


class BusyError(RuntimeError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class StoppingError(RuntimeError):
    """The server takes no requests any more."""


class NeverBegunError(BusyError):
    """A search's deadline came before its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What every search uses."""

    policy: PolicyEngine
    preference: PreferenceEngine | None
    """None: there is no PPM."""
    sandbox: StepSandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One search that somebody wants."""

    problem: Problem
    method: MethodConfig
    search: SearchConfig
    seed: int
    timeout_s: float
    """From admission to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How the service stands."""

    running: int
    waiting: int


class Service:
    """See the module."""

    def __init__(
        self,
        engines: Engines,
        config: ServiceConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.engines = engines
        self._clock = clock
        self._queue = FairQueue(config.max_running, config.max_queued)
        """Its `max_running` grows with the replicas."""
        self._turns: dict[Ticket, asyncio.Event] = {}
        self._mean_s = FIRST_SEARCH_S
        self._holds = 0
        """Why no further search begins; 0: they do."""
        self._stopping = False
        self._left = asyncio.Event()
        """Set whenever a search ends."""
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def standing(self) -> Standing:
        return Standing(running=self._queue.running, waiting=self._queue.waiting)

    @property
    def max_running(self) -> int:
        """Searches at a time, as of now."""
        return self._queue.max_running

    def scale(self, replicas: int) -> None:
        """Run as many searches at a time as so many policy replicas (at least one) are to have."""
        self._queue.max_running = self.config.max_running * max(replicas, 1)
        self._give_turns()

    # ---------------------------------------------------------------- requests

    @contextmanager
    def admitted(self, user: User, count: int = 1) -> Iterator[list[Ticket]]:
        """Places for so many searches of a user, to be given to `solve`; all or none.

        Raises:
            BusyError: too many wait.
            StoppingError: the server ends.
        """
        if self._stopping:
            raise StoppingError("the server is stopping")
        try:
            tickets = self._queue.add(user, count)
        except QueueFullError as error:
            raise BusyError(f"too many requests: {error}", self._retry_after_s()) from error
        for ticket in tickets:
            self._turns[ticket] = asyncio.Event()
        self._give_turns()
        try:
            yield tickets
        finally:
            for ticket in tickets:
                self._leave(ticket)

    async def solve(self, ticket: Ticket, ask: Ask, on_event: OnEvent | None = None) -> SolveResult:
        """Wait for the ticket's turn, then search; at the deadline the best answer so far.

        Args:
            on_event: as `Solver.solve` has it. After a failure the search begins again, with the
                same seed, and so do its events.
        Raises:
            NeverBegunError: its deadline came before its turn.
            EngineError, SandboxError, SearchError: a part failed again and again.
            ValueError: the method needs a PPM, and there is none.
        """
        began_s = self._clock()
        deadline_s = began_s + ask.timeout_s
        method = ask.method.name.value
        try:
            async with asyncio.timeout(ask.timeout_s):
                await self._turns[ticket].wait()
        except TimeoutError:
            raise NeverBegunError(
                f"the request waited {ask.timeout_s:g} s for its turn, which is its time-out",
                self._retry_after_s(),
            ) from None
        turn_s = self._clock()
        metrics.observe(metrics.SERVE_WAIT, turn_s - began_s, method=method)
        spent = 0

        def note(event: Event) -> None:
            nonlocal spent
            spent = event.cost.generated_tokens
            if on_event is not None:
                on_event(event)

        try:
            result = await self._search(ask, note, deadline_s)
            spent = result.generated_tokens
            self._mean_s += SMOOTHING * (self._clock() - turn_s - self._mean_s)
            return result
        finally:
            if not ticket.gone:
                self._queue.charge(ticket.user, spent)
            self._leave(ticket)

    async def _search(self, ask: Ask, note: OnEvent, deadline_s: float) -> SolveResult:
        for attempt in range(1, self.config.attempts + 1):
            solver = Solver(
                config=ask.method,
                search=ask.search,
                policy=self.engines.policy,
                preference=self.engines.preference,
                sandbox=OwnSandbox(self.engines.sandbox, self._spawn),
                clock=self._clock,
            )
            try:
                limit_s = max(deadline_s - self._clock(), 0.0)
                return await solver.solve(
                    ask.problem, seed=ask.seed, on_event=note, limit_s=limit_s
                )
            except (EngineError, SandboxError, SearchError) as error:
                if attempt == self.config.attempts:
                    raise
                logger.warning("A search begins again: %s problem=%s", error, ask.problem.id)
        raise AssertionError("unreachable")

    def _leave(self, ticket: Ticket) -> None:
        self._queue.leave(ticket)
        self._turns.pop(ticket, None)
        self._left.set()
        self._give_turns()

    def _give_turns(self) -> None:
        while not self._holds and (ticket := self._queue.next()) is not None:
            self._turns[ticket].set()

    def _retry_after_s(self) -> int:
        """When there is room again, as it goes now."""
        ahead = self._queue.waiting + 1
        seconds = math.ceil(self._mean_s * ahead / self.max_running)
        return min(max(seconds, 1), MAX_RETRY_AFTER_S)

    # ---------------------------------------------------------------- life

    @asynccontextmanager
    async def held(self, limit_s: float) -> AsyncIterator[None]:
        """Begin no search inside the block, which is entered when none runs or time is up.

        Requests wait meanwhile; none is refused for it, unless the queue fills.
        """
        self._holds += 1
        try:
            await self._emptied(limit_s)
            yield
        finally:
            self._holds -= 1
            self._give_turns()

    async def stop(self) -> None:
        """Take nothing more, and wait for what is in hand as long as the config allows."""
        self._stopping = True
        await self._emptied(self.config.stop_s, waiting=True)

    async def settled(self) -> None:
        """Wait until what ended searches hold is freed."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _emptied(self, limit_s: float, *, waiting: bool = False) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while self._queue.running or (waiting and self._queue.waiting):
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            logger.info("%d searches still run after %g s", self._queue.running, limit_s)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("A sandbox was not opened or closed: %s", error)


class OwnSandbox:
    """The sandbox as one search sees it: its trees are its own, and none stays open.

    They are twins of those that other searches of the same problem and seed have, with the same
    random state. Opening and closing go on when the search is cancelled in the middle of them: what
    was opened for nobody is closed.
    """

    def __init__(
        self,
        sandbox: StepSandbox,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._sandbox = sandbox
        self._spawn = spawn
        self._owner = uuid.uuid4().hex

    async def open(self, tree_id: str) -> str:
        """As `StepSandbox`."""
        opening = self._spawn(self._sandbox.open(self._named(tree_id)))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._spawn(self._close_after(opening, tree_id))
            raise

    async def run(self, state: str, codes: Sequence[str]) -> Sequence[StepResult]:
        """As `StepSandbox`."""
        return await self._sandbox.run(state, codes)

    async def close(self, tree_id: str) -> None:
        """As `StepSandbox`."""
        await asyncio.shield(self._spawn(self._sandbox.close(self._named(tree_id))))

    async def _close_after(self, opening: asyncio.Task[str], tree_id: str) -> None:
        await asyncio.wait({opening})
        await self._sandbox.close(self._named(tree_id))

    def _named(self, tree_id: str) -> str:
        return f"{tree_id}{TWIN}{self._owner}"
