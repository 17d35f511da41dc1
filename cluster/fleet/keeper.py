"""Keeps a pool of actors at its size: starts them, looks at them, replaces the dead.

    start / due --> actor made --> it has a place --> it answers --> it took the wanted version -+
                                                                                                 |
    announce(handles of all READY) <-- READY <-- enough of them took it and say the same <-------+
            ^                           | every look_s
            +--- lost (killed to be sure) <-- dead, broken, silent, stalled, slow to take weights

What is decided is `Membership`'s; what differs between kinds of actors is an `ActorKind`'s. Whether
an actor lives is judged by its answers and by its progress: one that had work for `stall_s` and
finished nothing is replaced like a dead one. Requests that are given up, and the idle time behind
them, are neither progress nor a fault. Silence counts while this process listens
(`rollout.tasks`): a driver that stood still has heard nobody.

A cluster is never whole. A pool starts, and goes on with new weights, as soon as enough members are
READY (`Membership.enough`); the others join when they come, and what is missing is said. A member
waits for a place as long as it takes, and has failed if it is not ready some time after it found
one. One that takes no weights while the others have them is replaced. What is wrong with the
configuration ends the first start: so many failures that there cannot be enough, or no place for
enough of them in time. Later deaths are replaced until they are too many (`Membership.hopeless`),
which `check` raises.

Members of one version must say the same. The first to have taken it are judged together, when there
are enough of them; one that is odd takes it again, and is replaced if that does not help.

Not covered: an actor that answers, makes progress, and is wrong in what no fingerprint shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.engines.model_check import ModelCheckError
from cluster.fleet.membership import Membership, SupervisionConfig
from cluster.jobs.attempts import LostError
from cluster.jobs.ray_errors import cause
from cluster.machines import nodes
from cluster.machines.scaler import MemberState, ReplicaLoad
from rollout.engine import EngineError
from rollout.tasks import done_within, within
from verifier import SandboxError

logger = logging.getLogger(__name__)


PLACEMENT_S = 20.0
"""After so long without a process the reason is looked for."""

TRIES = 3
"""How often a member is told to take a version, or waited for while the others are late as well."""


class PoolLostError(LostError, EngineError):
    """Too few members of a pool started, or so many died that none is replaced any more; says of
    which and why."""


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
    seen_s: float = field(default_factory=time.monotonic, compare=False)
    """When it was taken."""


class ActorKind(ABC):
    """What a keeper has to know of one kind of actor."""

    kind: str
    """For messages: "policy replica"."""
    prefix: str
    """Of names: "policy" makes policy-0, policy-1, ..."""
    version: str = ""
    """That all should serve; "" where there is no such thing."""
    take_s: float = 600.0
    """One that has not taken a version by then, while others have, is replaced."""
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

    async def take(self, handle: Any, *, again: bool) -> tuple[float, ...]:
        """Have one serve `version`; returns what it says then, as all that serve it should.

        Args:
            again: even if it says that it serves it already.
        Raises:
            ModelCheckError: one like this cannot serve it.
            EngineError, RayError: it does not.
        """
        return ()

    def odd_ones(self, said: Mapping[str, tuple[float, ...]]) -> dict[str, str]:
        """Why, of each of those that took `version` and does not say what the others do."""
        return {}

    def adopted(self, name: str, handle: Any) -> None:
        """Told of one that an earlier driver has made."""
        return None

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
        min_ready: float = 1.0,
        announce: Announce = lambda handles: None,
        note: Callable[[str], None] = lambda text: None,
        tried: Callable[[bool], None] = lambda ready: None,
        made: Callable[[str, Any], None] = lambda name, handle: None,
    ) -> None:
        """
        Args:
            size: actors there should be.
            start_timeout_s: an actor that cannot serve so long after it found a place has failed;
                enough of the first ones have to find one in this time.
            min_ready: share of them, rounded up, that is enough.
            note: told what a person should know now.
            tried: told of each start whether it made a READY member.
            made: told name and handle of each actor as soon as it is made.
        """
        self.kind = kind
        self.members = Membership(kind.kind, size, config, kind.version, min_ready=min_ready)
        self._config = config
        self._start_timeout_s = start_timeout_s
        self._announce = announce
        self._note = note
        self._tried = tried
        self._made = made
        self.looks: dict[str, Look] = {}
        """What the last look at each READY member showed."""
        self.lost: deque[tuple[str, str, float]] = deque(maxlen=8)
        """Name, reason and time of the last deaths."""
        self._handles: dict[str, Any] = {}
        self._placed: set[str] = set()
        """Members that have a process."""
        self._said: dict[str, tuple[float, ...]] = {}
        """What members said that took the wanted version."""
        self._judged = not kind.version
        """Whether enough of them were judged together, where there is something to judge."""
        self._tries: Counter[str] = Counter()
        self._refusals: list[ModelCheckError] = []
        """Of members that cannot take the wanted version."""
        self._told_short = ""
        self._telling: asyncio.Task[None] | None = None
        self._next = 0
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

    async def start(self, adopted: Mapping[str, Any] | None = None) -> None:
        """Bring up the first members, until enough are READY, and look after all from then on.

        Args:
            adopted: actors of an earlier driver, by name, which are members already.
        Raises:
            PoolLostError: so many failed, or found no place in time, that there are not enough;
                says why. All are ended.
            ModelCheckError: too many cannot serve what they should.
        """
        for name, handle in (adopted or {}).items():
            self.members.add(name, time.monotonic())
            self.kind.adopted(name, handle)
            self._spawn(self._bring_up(name, handle))
            prefix, _, number = name.rpartition("-")
            if prefix == self.kind.prefix:
                self._next = max(self._next, int(number) + 1)
        self._keep_on()
        late = asyncio.create_task(done_within(asyncio.Future(), self._start_timeout_s))
        try:
            while not self.members.enough:
                losses = self.members.losses(time.monotonic())
                if losses.deaths > self.members.spare:
                    raise PoolLostError(f"{self.kind.kind} did not start: {losses.last_reason}")
                # Who has found a place is given its own time.
                if late.done() and len(self._placed) < self.members.needed:
                    raise PoolLostError(
                        f"{await self._shortage()} (after {self._start_timeout_s:.0f} s; "
                        f"{self.members.needed} are needed)"
                    )
                self.check()
                await self._wait()
        except BaseException:
            for name, handle in (await self.stop()).items():
                self._end(name, handle)
            raise
        finally:
            late.cancel()
        self._say_soon()

    async def stop(self) -> dict[str, Any]:
        """Watch no more; returns the handles of those that have a process, which go on."""
        tasks = [*self._tasks, *([self._keeping] if self._keeping is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handles, self._handles = self._handles, {}
        for name in handles.keys() - self._placed:
            self._end(name, handles.pop(name))
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
        self._judge()
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
            self._said.pop(name, None)
            if state is MemberState.STARTING:  # it may not even have a process to ask
                self._lose(name, "not needed any more")
                continue
            self._spawn(self._let_go(name, self._handles[name], limit_s))
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
        """See that the pool can go on.

        Raises:
            PoolLostError: too many members died.
            ModelCheckError: too many cannot serve what they should.
        """
        if self._keeping is not None and self._keeping.done():
            self._keeping.result()
        if len(self._refusals) > self.members.spare:
            raise self._refusals[-1]

    async def serve(self) -> None:
        """Have all members serve what `kind.version` now is, and wait until enough do.

        Raises:
            EngineError: too many died.
            ModelCheckError: too many cannot serve it.
        """
        took = list(self._said)
        self._said.clear()
        self._tries.clear()
        self._refusals.clear()
        self._judged = False
        self.members.want(self.kind.version)
        self._tell()
        for name in took:
            self._spawn(self._take(name, self._handles[name]))
        self._say_soon()
        while not self.members.enough:
            self.check()
            await self._wait()

    def short(self) -> str:
        """How many serve and what the others do, if some are missing; else ""."""
        size, ready = self.members.size, len(self.members.ready())
        if ready >= size:
            return ""
        waiting = self._waiting
        others = {
            "to start": len(self.members.names(MemberState.STARTING)) - waiting,
            "to take the weights": len(self.members.names(MemberState.SYNCING)),
            "for a place": waiting,
        }
        said = [f"{n} wait{'s' * (n == 1)} {what}" for what, n in others.items() if n]
        return "; ".join([f"{ready} of {size} {self.kind.kind}s serve", *said])

    @property
    def _waiting(self) -> int:
        """Members without a process."""
        return len(set(self.members.names(MemberState.STARTING)) - self._placed)

    async def _shortage(self) -> str:
        """The same, with the reason why there is no place."""
        short = self.short()
        why = await nodes.asked(self.kind.why_pending) if self._waiting else ""
        return f"{short}: {why}" if why else short

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
                self._spawn(self._bring_up(self._add()))
            await self._wait()

    async def _wait(self) -> None:
        """For a change after whatever was looked at last, or a while."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.look_s):
                await self._changed.wait()

    def _add(self) -> str:
        name = f"{self.kind.prefix}-{self._next}"
        self._next += 1
        self.members.add(name, time.monotonic())
        return name

    async def _bring_up(self, name: str, adopted: Any = None) -> None:
        """From nothing, or an adopted actor, to READY; a member that does not get there is lost."""
        try:
            handle = adopted if adopted is not None else self.kind.start(name)
            self._handles[name] = handle
            if adopted is None:
                self._made(name, handle)
            await self._until_ready(name, handle)
        except Exception as error:
            if self.members.state(name) is MemberState.STARTING:
                self._tried(False)
            self._lose(name, cause(error))
            return
        self.members.started(name)
        self._spawn(self._watch(name, handle))
        await self._take(name, handle)
        if self.members.state(name) is not MemberState.DRAINING:
            self._tried(self._handles.get(name) is handle)

    async def _until_ready(self, name: str, handle: Any) -> None:
        placed = asyncio.ensure_future(self.kind.placed(handle))
        ready = asyncio.ensure_future(self.kind.ready(handle))
        both = {placed, ready}
        try:
            done, _ = await asyncio.wait(
                both, timeout=PLACEMENT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                await self._say_shortage()
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            self._placed.add(name)
            if not await done_within(ready, self._start_timeout_s):
                raise EngineError(f"not ready {self._start_timeout_s:.0f} s after it had a place")
            await ready
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _take(self, name: str, handle: Any, *, again: bool = False) -> None:
        """Have a member take the wanted version; it is lost, or tries again, if it does not."""
        version = None
        try:
            while version != self.kind.version:  # which may change meanwhile
                version = self.kind.version
                said = await self._taken(handle, again)
        except ModelCheckError as error:
            self._refusals.append(error)
            self._lose(name, cause(error))
        except TimeoutError:
            self._lose(name, f"did not take {version} within {self.kind.take_s:g} s")
        except Exception as error:
            look = await self._look(name, handle)
            self._again(name, handle, cause(error), broken=bool(look.broken))
        else:
            if self.members.state(name) is MemberState.SYNCING:
                self._said[name] = said
                self._judge()

    async def _taken(self, handle: Any, again: bool) -> tuple[float, ...]:
        """What a member says that took the wanted version.

        Raises:
            TimeoutError: it did not in time, while others did.
        """
        task = asyncio.ensure_future(self.kind.take(handle, again=again))
        try:
            for _ in range(TRIES):
                if await done_within(task, self.kind.take_s):
                    return await task
                if self.members.enough:
                    break
                await self._say_shortage()
            raise TimeoutError
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _again(self, name: str, handle: Any, reason: str, *, broken: bool = False) -> None:
        """Have a member take the version once more, if that may help."""
        if self._handles.get(name) is not handle:
            return
        self._tries[name] += 1
        if broken or self._tries[name] >= TRIES:
            self._lose(name, reason)
            return
        logger.warning("A %s takes its weights again: %s name=%s", self.kind.kind, reason, name)
        self._said.pop(name, None)
        self.members.doubt(name)
        self._spawn(self._take(name, handle, again=True))

    def _judge(self) -> None:
        """Those that took the version and say the same are READY.

        The first to be so are judged when there are enough of them: one alone, or two, could not
        say which is wrong.
        """
        if not self._said or not (self._judged or len(self._said) >= self.members.needed):
            return
        self._judged = True
        odd = self.kind.odd_ones(self._said)
        for name in list(self._said):
            if name in odd:
                self._again(name, self._handles[name], odd[name])
            else:
                self.members.synced(name, self.kind.version, time.monotonic())
        self._tell()
        if self._told_short:
            self._say_soon()

    def _say_soon(self) -> None:
        """Say what is missing if it does not come soon."""

        async def say() -> None:
            await asyncio.sleep(PLACEMENT_S)
            await self._say_shortage()

        if self._telling is None or self._telling.done():
            self._telling = self._spawn(say())

    async def _say_shortage(self) -> None:
        """Say what is missing, once; and, if that was said, that nothing is any more."""
        short = self.short()
        if short == self._told_short:
            return
        self._told_short = short
        self._note(await self._shortage() or f"all {self.members.size} {self.kind.kind}s serve")

    async def _let_go(self, name: str, handle: Any, limit_s: float) -> None:
        try:
            await within(limit_s, self._emptied(name, handle))
        except (TimeoutError, RayError, EngineError) as error:
            logger.info("A %s was not let go in time: %s name=%s", self.kind.kind, error, name)
        if self._handles.get(name) is handle:
            self._lose(name, "drained")

    async def _emptied(self, name: str, handle: Any) -> None:
        while (await self._look(name, handle)).open:
            await asyncio.sleep(self._config.look_s)
        await self.kind.leave(handle)

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
            return await within(silent_s, self.kind.look(name, handle))
        except TimeoutError:
            return Look(broken=f"said nothing for {silent_s:g} s")
        except (RayError, EngineError, SandboxError) as error:
            return Look(broken=cause(error))

    def _lose(self, name: str, reason: str) -> None:
        handle = self._handles.pop(name, None)
        self.looks.pop(name, None)
        self._said.pop(name, None)
        self._tries.pop(name, None)
        self._placed.discard(name)
        if self.members.lost(name, reason, time.monotonic()):
            self.lost.append((name, reason, time.monotonic()))
            logger.error("A %s is lost: %s name=%s", self.kind.kind, reason, name)
        self._end(name, handle)
        self._tell()

    def _end(self, name: str, handle: Any) -> None:
        if handle is not None:
            with contextlib.suppress(RayError):
                self.kind.kill(handle)
        self.kind.lost(name)

    def _tell(self) -> None:
        self._changed.set()
        self._announce(self.handles)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
