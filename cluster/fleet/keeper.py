"""Keeps a pool of actors at its size: starts them, looks at them, replaces the dead.

    start / due --> actor made --> it answers --> it serves the wanted version --> READY
                                                                                    | every look_s
    announce(handles of all READY) <-- lost (killed to be sure) <-- dead, broken, silent, stalled

What is decided is `Membership`'s; what differs between kinds of actors is an `ActorKind`'s. Whether
an actor lives is judged by its answers and by its progress: one that had work for `stall_s` and
finished nothing is replaced like a dead one. Requests that are given up, and the idle time behind
them, are neither progress nor a fault.

The first start must succeed: what is wrong then is a matter of configuration and ends the run at
once. Later deaths are replaced until they are too many (`Membership.hopeless`), which `check` and
`guard` raise. A later member waits for a place as long as it takes (a node that joins gives it one
at once), and has failed only if it is not ready some time after it found one.

Not covered: an actor that answers, makes progress, and is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from cluster.fleet.membership import Membership, SupervisionConfig
from cluster.jobs.attempts import LostError
from cluster.jobs.ray_errors import cause
from cluster.machines.scaler import MemberState, ReplicaLoad
from rollout.engine import EngineError
from rollout.tasks import all_of
from verifier import SandboxError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PLACEMENT_S = 20.0
"""After so long without a process the reason is looked for."""


class PoolLostError(LostError, EngineError):
    """Members of a pool died so often that none is replaced any more; says of which and why."""


Announce = Callable[[Mapping[str, Any]], None]
"""Told the handles of all READY members whenever they change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at a living actor showed."""

    broken: str = ""
    """Why it cannot be used any more; "" if it can."""
    done: float = 0.0
    """A counter that changes while the actor works."""
    open: int = 0
    """Units of work in its hands; while it has none it is idle, not stalled."""
    revived_after_s: float | None = None
    """It died since the last look and was restarted by Ray, after at most so long; None: no."""


class ActorKind(ABC):
    """What a keeper has to know of one kind of actor."""

    kind: str
    """For messages: "policy replica"."""
    prefix: str
    """Of names: "policy" makes policy-0, policy-1, ..."""
    version: str = ""
    """That all should serve; "" where there is no such thing."""
    silent_s: float | None = None
    """Overrides the config's patience with one that says nothing; None: it does not."""

    @abstractmethod
    def start(self, name: str) -> Any:
        """Make an actor; returns its handle at once."""

    @abstractmethod
    async def placed(self, handle: Any) -> None:
        """Return when the actor's process answers."""

    @abstractmethod
    async def ready(self, handle: Any) -> None:
        """Return when it can serve."""

    @abstractmethod
    async def look(self, name: str, handle: Any) -> Look:
        """Look at one that could serve before."""

    async def leave(self, handle: Any) -> None:
        """Have one end its work in good order, before it is killed."""
        return None

    async def sync(self, handle: Any, siblings: Mapping[str, Any]) -> str:
        """Have one serve `version`, as its READY siblings do; returns what it serves then.

        Raises:
            EngineError: it does not.
        """
        return self.version

    async def sync_all(self, handles: Mapping[str, Any]) -> None:
        """Have all serve `version`.

        Raises:
            EngineError: one of them does not, or is dead.
        """
        await all_of(self.sync(handle, {}) for handle in handles.values())

    def why_pending(self) -> str:
        """Why an actor of this kind finds no place; "" if it is not known."""
        return ""

    def lost(self, name: str) -> None:
        """Told that one is gone."""
        return None

    def kill(self, handle: Any) -> None:
        """End an actor's process now; harmless if it is gone."""
        ray.kill(handle)


class PoolKeeper:
    """The actors of one kind; see the module."""

    def __init__(
        self,
        kind: ActorKind,
        size: int,
        config: SupervisionConfig,
        *,
        start_timeout_s: float,
        announce: Announce = lambda handles: None,
        note: Callable[[str], None] = lambda text: None,
        tried: Callable[[bool], None] = lambda ready: None,
        made: Callable[[str, Any], None] = lambda name, handle: None,
    ) -> None:
        """
        Args:
            size: actors there should be.
            start_timeout_s: an actor that cannot serve by then has failed.
            note: told what a person should know now.
            tried: told of each start whether it made a READY member.
            made: told name and handle of each actor as soon as it is made.
        """
        self.kind = kind
        self.members = Membership(kind.kind, size, config, kind.version)
        self._config = config
        self._start_timeout_s = start_timeout_s
        self._announce = announce
        self._note = note
        self._tried = tried
        self._made = made
        self.looks: dict[str, Look] = {}
        """What the last look at each READY member showed."""
        self._handles: dict[str, Any] = {}
        self._next = 0
        self._syncing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def handles(self) -> dict[str, Any]:
        """Of the members that may be given work."""
        return {name: self._handles[name] for name in self.members.ready()}

    @property
    def all_handles(self) -> dict[str, Any]:
        """Of all members, those that are starting or draining included."""
        return dict(self._handles)

    async def start(self) -> None:
        """Bring up the first members and watch over them from then on.

        Raises:
            EngineError: one of them did not start; says why.
        """
        names = [self._add() for _ in range(self.members.size)]
        try:
            await all_of(self._bring_up(name) for name in names)
        except BaseException:
            for handle in (await self.stop()).values():
                self.kind.kill(handle)
            raise
        self._keep_on()

    async def stop(self) -> dict[str, Any]:
        """Watch no more; returns the handles of what is still there, none of it ended."""
        tasks = [*self._tasks, *([self._keeping] if self._keeping is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handles, self._handles = self._handles, {}
        return handles

    @property
    def living(self) -> int:
        """Members that are there to stay, those that are starting included."""
        return len(self.members.names()) - len(self.members.names(MemberState.DRAINING))

    def loads(self) -> dict[str, ReplicaLoad]:
        """All members as the scaler sees them."""
        idle = Look()
        return {
            name: ReplicaLoad(state=state, load=self.looks.get(name, idle).open)
            for state in MemberState
            for name in self.members.names(state)
        }

    def resize(self, size: int) -> None:
        """Change how many members there should be; `drain` says who leaves."""
        self.members.resize(size)
        self._changed.set()

    def drain(self, names: Iterable[str], limit_s: float) -> None:
        """Give members nothing more and end them when they are empty, at the latest after a time.

        Whoever is missing then, by the pool's size, is started anew.
        """
        for name in names:
            state = self.members.state(name)
            if state in (None, MemberState.DRAINING):
                continue
            self.members.drain(name)
            if state is MemberState.STARTING:  # it may not even have a process to ask
                self._lose(name, "not needed any more")
                continue
            self._spawn(self._let_go(name, self._handles.get(name), limit_s))
        self._tell()

    @property
    def hopeless(self) -> bool:
        """True if so many members died that none is replaced any more."""
        return self._keeping is not None and self._keeping.done()

    def revive(self) -> None:
        """Replace members again, after so many died that none was replaced any more."""
        self.members.forgive()
        self._keep_on()

    def check(self) -> None:
        """Raises PoolLostError if too many members died."""
        if self._keeping is not None and self._keeping.done():
            self._keeping.result()

    async def serve(self) -> None:
        """Have all members serve what `kind.version` now is, and wait until all are there.

        Raises:
            EngineError: a living member cannot, or too many died.
        """
        self.members.want(self.kind.version)
        self._tell()
        async with self._syncing:
            while handles := self._in(MemberState.SYNCING):
                try:
                    await self.kind.sync_all(handles)
                except EngineError:
                    if not await self._lose_broken(handles):
                        raise
                    continue
                for name in handles:
                    self.members.synced(name, self.kind.version, time.monotonic())
                break
        self._tell()
        await self.settled()

    async def settled(self) -> None:
        """Wait until the pool has its size.

        Raises:
            EngineError: too many members died.
        """
        while len(self.members.ready()) < self.members.size:
            self.check()
            self._changed.clear()
            await self._wait()

    # -- inside

    def _keep_on(self) -> None:
        self._keeping = asyncio.create_task(self._keep(), name=f"keep-{self.kind.prefix}")

    async def _keep(self) -> None:
        """Start what is due, for ever.

        Raises:
            PoolLostError: too many members died.
        """
        while True:
            reason = self.members.hopeless(time.monotonic())
            if reason:
                raise PoolLostError(reason)
            for _ in range(self.members.due(time.monotonic())):
                self._spawn(self._bring_up_again(self._add()))
            self._changed.clear()
            await self._wait()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.look_s):
                await self._changed.wait()

    def _add(self) -> str:
        name = f"{self.kind.prefix}-{self._next}"
        self._next += 1
        self.members.add(name, time.monotonic())
        return name

    async def _bring_up_again(self, name: str) -> None:
        try:
            await self._bring_up(name, patient=True)
        except EngineError as error:
            logger.warning("A %s did not come up: %s name=%s", self.kind.kind, error, name)

    async def _bring_up(self, name: str, *, patient: bool = False) -> None:
        """From nothing to READY; a member that does not get there is lost.

        Args:
            patient: the time it may take is counted from when it has found a place.
        """
        try:
            handle = self._handles[name] = self.kind.start(name)
            self._made(name, handle)
            await self._until_ready(name, handle, patient=patient)
            self.members.started(name)
            async with self._syncing:
                while self.members.state(name) is MemberState.SYNCING:
                    version = await self.kind.sync(handle, self.handles)
                    self.members.synced(name, version, time.monotonic())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = cause(error)
            if self.members.state(name) in (MemberState.STARTING, MemberState.SYNCING):
                self._tried(False)
            self._lose(name, reason)
            raise EngineError(f"{name} did not start: {reason}") from error
        self._tried(True)
        self._tell()
        self._spawn(self._watch(name, handle))

    async def _until_ready(self, name: str, handle: Any, *, patient: bool) -> None:
        why = ""
        watch = asyncio.ensure_future(self.kind.placed(handle))
        ready = asyncio.ensure_future(self.kind.ready(handle))
        try:
            async with asyncio.timeout(None if patient else self._start_timeout_s) as limit:
                await asyncio.wait(
                    {watch, ready}, timeout=PLACEMENT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if not watch.done() and not ready.done():
                    why = self.kind.why_pending()
                    if why:
                        logger.warning("%s waits for a place: %s", name, why)
                        self._note(f"{name} waits for a place: {why}")
                if patient:
                    await asyncio.wait({watch, ready}, return_when=asyncio.FIRST_COMPLETED)
                    now_s = asyncio.get_running_loop().time()
                    limit.reschedule(now_s + self._start_timeout_s)
                await ready
        except TimeoutError:
            raise EngineError(
                f"not ready after {self._start_timeout_s:.0f} s"
                + (f": {why or self.kind.why_pending()}" if not watch.done() else "")
            ) from None
        finally:
            for task in (watch, ready):
                task.cancel()
            await asyncio.gather(watch, ready, return_exceptions=True)

    async def _let_go(self, name: str, handle: Any, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while handle is not None and (await self._look(name, handle)).open:
                    await asyncio.sleep(self._config.look_s)
                if handle is not None:
                    await self.kind.leave(handle)
        except (TimeoutError, RayError, EngineError) as error:
            logger.info("A %s was not let go in time: %s name=%s", self.kind.kind, error, name)
        if self._handles.get(name) is handle:
            self._lose(name, "drained")

    async def _watch(self, name: str, handle: Any) -> None:
        """Look at a member until it is lost."""
        done: float | None = None
        looked_s = time.monotonic()
        stuck_s = 0.0
        while self._handles.get(name) is handle:
            await asyncio.sleep(self._config.look_s)
            if self.members.state(name) is MemberState.DRAINING:
                return
            if self.members.state(name) is MemberState.SYNCING:
                looked_s, stuck_s = time.monotonic(), 0.0
                continue  # it may be silent while it loads; whoever has it load bounds that
            look = self.looks[name] = await self._look(name, handle)
            now_s = time.monotonic()
            if look.revived_after_s is not None:
                self.members.revived(name, "restarted", now_s - look.revived_after_s, now_s)
                logger.warning("A %s was restarted name=%s", self.kind.kind, name)
            if look.done != done:
                done, stuck_s = look.done, 0.0
            elif look.open:
                stuck_s += now_s - looked_s
            looked_s = now_s
            reason = look.broken
            if not reason and stuck_s >= self._config.stall_s:
                reason = f"had requests for {stuck_s:.0f} s and finished none"
            if reason and self._handles.get(name) is handle:
                self._lose(name, reason)

    async def _look(self, name: str, handle: Any) -> Look:
        silent_s = self.kind.silent_s or self._config.silent_s
        try:
            async with asyncio.timeout(silent_s):
                return await self.kind.look(name, handle)
        except TimeoutError:
            return Look(broken=f"said nothing for {silent_s:g} s")
        except (RayError, EngineError, SandboxError) as error:
            return Look(broken=cause(error))

    async def _lose_broken(self, handles: Mapping[str, Any]) -> bool:
        """Lose those of these members that cannot be used any more; True if there were any."""
        looks = await asyncio.gather(*(self._look(n, h) for n, h in handles.items()))
        broken = {
            name: look.broken for name, look in zip(handles, looks, strict=True) if look.broken
        }
        for name, reason in broken.items():
            self._lose(name, reason)
        return bool(broken)

    def _lose(self, name: str, reason: str) -> None:
        handle = self._handles.pop(name, None)
        self.looks.pop(name, None)
        if handle is not None:
            with contextlib.suppress(RayError):
                self.kind.kill(handle)
        if self.members.lost(name, reason, time.monotonic()):
            logger.error("A %s is lost: %s name=%s", self.kind.kind, reason, name)
        self.kind.lost(name)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._announce(self.handles)

    def _in(self, state: MemberState) -> dict[str, Any]:
        return {name: self._handles[name] for name in self.members.names(state)}

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def guard(work: Awaitable[T], check: Callable[[], None]) -> T:
    """Await something that pools of actors are needed for; what `check` raises ends it."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.5)
            if not task.done():
                check()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
