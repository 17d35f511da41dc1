"""Who belongs to a pool of actors, who of them may be given work, and when a new one is due.

    add --> STARTING --started--> SYNCING(version) --synced--> READY --drain--> DRAINING
                                      ^                          |
                                      +------ want(another) -----+
    DEAD is not kept: `lost`, from anywhere, forgets the member and makes room for a new one.

Only READY members, which all serve the wanted version, are given work. A pool is of use when a
share of its size is READY (`enough`); the others join when they come. A member that was lost while
it drained is no failure; any other one is, and the first is replaced at once. If replacements die
too, the next ones are started after a pause that doubles; members that ran before the first death
lengthen no pause, so that a node's actors, which die together, are all replaced at once. Too many
failures within a time (`max_failures` for each member the pool should have) mean that replacing
does not help: `hopeless` then says so, with the last cause.

The time a pool lost is the sum, over its failures, of the time until another member became READY in
the place.

It owns no clock (`now_s` is an argument), no actor and no task.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from cluster.machines.scaler import MemberState


class SupervisionConfig(BaseModel):
    """How actors are watched, and how often they are replaced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    look_s: float = Field(default=1.0, gt=0, description="pause between two looks at an actor")
    silent_s: float = Field(
        default=60.0, gt=0, description="an actor that says nothing for so long is replaced"
    )
    stall_s: float = Field(
        default=900.0,
        gt=0,
        description="one that has work and neither answers nor has an engine that makes a step "
        "for so long is replaced",
    )
    max_failures: int = Field(
        default=5,
        ge=0,
        description="deaths within window_s, per actor a pool should have, that do not end the run",
    )
    window_s: float = Field(default=600.0, gt=0, description="time over which deaths are counted")
    backoff_s: float = Field(
        default=2.0, ge=0, description="pause before the second start in window_s; then doubled"
    )
    max_backoff_s: float = Field(default=60.0, ge=0, description="longest such pause")


@dataclass(slots=True)
class Member:
    """One actor of a pool that is not dead."""

    state: MemberState
    added_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What a pool has been through."""

    deaths: int = 0
    """Members lost that did not drain."""
    restarts: int = 0
    """Members that took the place of a lost one and became READY."""
    away_s: float = 0.0
    """Sum over deaths of the seconds until the place was taken again."""
    last_reason: str = ""

    def since(self, earlier: Losses) -> Losses:
        """What was lost after `earlier` was taken."""
        return Losses(
            deaths=self.deaths - earlier.deaths,
            restarts=self.restarts - earlier.restarts,
            away_s=self.away_s - earlier.away_s,
            last_reason=self.last_reason if self.deaths > earlier.deaths else "",
        )


class Membership:
    """The members of one pool; see the module."""

    def __init__(
        self,
        kind: str,
        size: int,
        config: SupervisionConfig,
        version: str = "",
        *,
        min_ready: float = 1.0,
    ) -> None:
        """
        Args:
            kind: for messages: "policy replica".
            size: members the pool should have.
            version: that members should serve; "" where there is no such thing.
            min_ready: share of them that is enough, in (0, 1].
        """
        self.kind = kind
        self.config = config
        self._size = size
        self._min_ready = min_ready
        self._version = version
        self._members: dict[str, Member] = {}
        self._failures: deque[float] = deque()
        self._blows: deque[float] = deque()
        """Times of those failures that a replacement did not prevent."""
        self._starts_after_s = float("-inf")
        self._gaps: deque[float] = deque()
        """Times of deaths whose place is not taken yet."""
        self._deaths = 0
        self._restarts = 0
        self._away_s = 0.0
        self._last_reason = ""

    # -- told

    def resize(self, size: int) -> None:
        """Change how many members there should be; who leaves is said by `drain`."""
        self._size = size
        while len(self._gaps) > size:
            self._gaps.pop()

    def want(self, version: str) -> None:
        """Change what members should serve: nobody is READY until it is `synced`."""
        if version != self._version:
            for name in self.ready():
                self.doubt(name)
        self._version = version

    def add(self, name: str, now_s: float) -> None:
        """A member was asked for.

        Raises:
            ValueError: there is one of this name.
        """
        if name in self._members:
            raise ValueError(f"{self.kind} {name} is a member already")
        self._members[name] = Member(MemberState.STARTING, now_s)

    def started(self, name: str) -> None:
        """A member runs; what it serves is not known yet."""
        member = self._members.get(name)
        if member is not None and member.state is MemberState.STARTING:
            member.state = MemberState.SYNCING

    def synced(self, name: str, version: str, now_s: float) -> bool:
        """A member serves a version; True if it may be given work now."""
        member = self._members.get(name)
        if member is None:
            return False
        if member.state is MemberState.SYNCING and version == self._version:
            member.state = MemberState.READY
            if self._gaps:
                self._away_s += now_s - self._gaps.popleft()
                self._restarts += 1
        return member.state is MemberState.READY

    def doubt(self, name: str) -> None:
        """What a READY member serves is not known any more."""
        member = self._members.get(name)
        if member is not None and member.state is MemberState.READY:
            member.state = MemberState.SYNCING

    def drain(self, name: str) -> None:
        """Give a member nothing more."""
        member = self._members.get(name)
        if member is not None:
            member.state = MemberState.DRAINING

    def lost(self, name: str, reason: str, now_s: float) -> bool:
        """A member is dead; True if it was one, and not expected to go."""
        member = self._members.pop(name, None)
        if member is None or member.state is MemberState.DRAINING:
            return False
        self._deaths += 1
        self._last_reason = f"{name}: {reason}"
        # A member that dies before it is READY leaves the place as empty as it was.
        served = member.state is MemberState.READY or not self._gaps
        if served and len(self._gaps) < self._size:
            self._gaps.append(now_s)
        self._failures.append(now_s)
        self._forget_old_failures(now_s)
        if not self._blows or member.added_s >= self._blows[-1]:
            self._blows.append(now_s)
            number = len(self._blows)
            pause_s = 0.0 if number == 1 else self.config.backoff_s * 2.0 ** min(number - 2, 30)
            self._starts_after_s = now_s + min(pause_s, self.config.max_backoff_s)
        return True

    def revived(self, name: str, reason: str, died_s: float, now_s: float) -> None:
        """A member died and came back by itself, under the same name: a death like others."""
        if name not in self._members:
            return
        self._deaths += 1
        self._restarts += 1
        self._away_s += now_s - died_s
        self._last_reason = f"{name}: {reason}"
        self._failures.append(now_s)

    def forgive(self) -> None:
        """What died so far is no reason any more to wait, or to give up."""
        self._failures.clear()
        self._blows.clear()
        self._starts_after_s = float("-inf")

    # -- asked

    @property
    def size(self) -> int:
        """Members there should be."""
        return self._size

    @property
    def needed(self) -> int:
        """READY members without which the pool is of no use."""
        return math.ceil(round(self._size * self._min_ready, 6))

    @property
    def spare(self) -> int:
        """Members that may be missing."""
        return self._size - self.needed

    @property
    def enough(self) -> bool:
        """Whether as many are READY as are needed."""
        return len(self.ready()) >= self.needed

    def state(self, name: str) -> MemberState | None:
        """None: not a member (dead, or never one)."""
        member = self._members.get(name)
        return None if member is None else member.state

    def names(self, *states: MemberState) -> list[str]:
        """Members in one of these states, or all of them, in the order they came."""
        return [n for n, member in self._members.items() if not states or member.state in states]

    def ready(self) -> list[str]:
        """Members that may be given work."""
        return self.names(MemberState.READY)

    def due(self, now_s: float) -> int:
        """How many members are to be started now."""
        living = len(self._members) - len(self.names(MemberState.DRAINING))
        return max(0, self._size - living) if now_s >= self._starts_after_s else 0

    def hopeless(self, now_s: float) -> str:
        """Why replacing members is no use any more; "" while it is."""
        self._forget_old_failures(now_s)
        allowed = self.config.max_failures * max(1, self._size)
        if len(self._failures) <= allowed:
            return ""
        return (
            f"{len(self._failures)} deaths of a {self.kind} within {self.config.window_s:g} s, "
            f"{allowed} are allowed (cluster.supervision); the last one: {self._last_reason}"
        )

    def losses(self, now_s: float) -> Losses:
        """Deaths and what they cost so far."""
        return Losses(
            deaths=self._deaths,
            restarts=self._restarts,
            away_s=self._away_s + sum(now_s - gap_s for gap_s in self._gaps),
            last_reason=self._last_reason,
        )

    def _forget_old_failures(self, now_s: float) -> None:
        for times in (self._failures, self._blows):
            while times and times[0] < now_s - self.config.window_s:
                times.popleft()
