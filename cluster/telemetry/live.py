"""What a run is doing right now, for people at another shell or machine: `RUN/live.json`.

    driver -- every 2 s --> RUN/live.json -- rstar status --> "running", or "not running since ..."
                                          -- rstar why    --> who waits for whom (`FleetAccount`)

A thread of the driver writes it, whole, so that a busy event loop is no reason to look dead. It is
an account, never a truth: nothing reads it to decide what is done, and what cannot be written is
left out silently (a full disk is reported by who has something to lose). A driver that was killed
leaves its last account behind, which is recognised by its age.

Not covered: clocks of two machines that differ by more than `STALE_S` (`cluster.watch.status` looks
a second time before it calls a run of another machine dead).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cluster.folder.machine import command_line
from rollout.run_store import RunStore, StoreError

LIVE_FILE = "live.json"

INTERVAL_S = 2.0
"""Pause between two accounts."""

STALE_S = 15.0
"""An account older than this is of a driver that does not run any more."""


class StoppedError(RuntimeError):
    """A run was ended in good order for a reason that a person can do something about."""


State = Literal["running", "stopping", "stopped", "failed", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where the progress view of a driver stands."""

    stage: str = ""
    """Kind, as "rollout"; "" between stages."""
    label: str = ""
    """For people."""
    round: int | None = None
    """None: of no round, as the start of the engines."""
    done: int = 0
    total: int = 0
    """0: the stage counts nothing."""
    facts: Mapping[str, str | float] = field(default_factory=dict)
    """Short name -> value, as "tokens/s" -> 3472.0."""
    stage_elapsed_s: float = 0.0
    stage_still_s: float = 0.0
    """Since its count last changed, or since it began."""
    stage_eta_s: float | None = None
    """None: nothing can be said yet; likewise below."""
    run_eta_s: float | None = None
    last_error: str = ""
    """What went wrong last and was dealt with; "" if nothing did."""
    stopping: bool = False
    usd_per_hour: float | None = None
    """Of the machines that are up; None: not known."""
    cost_usd: float | None = None
    """Of all starts together; None: not known."""
    change: int = 0
    """Number of the last change that was taken over (`cluster.folder.changes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorAccount:
    """One actor of the fleet as its driver knows it; seconds are until the account."""

    name: str
    pool: str
    state: str
    """starting | syncing | ready | draining"""
    host: str = ""
    """Of its node; "": it has no process yet. Likewise below."""
    node: str = ""
    """Ray's id of it."""
    pid: int = 0
    open: int = 0
    """Units of work in its hands."""
    speed: float | None = None
    """Units of its own work a second while it has any, lately; None: not known."""
    still_s: float = 0.0
    """For so long it has had work and made no progress."""
    silent_s: float = 0.0
    """Since it last answered, or since it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitAccount:
    """Requests of one rollout worker that have no answer yet."""

    who: str
    pool: str
    on: str
    """The replica they were sent to; "": there is none with room."""
    count: int
    for_s: float
    """The oldest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAccount:
    """A part of the stage that has work and did not move for a while (`cluster.fleet.stall`)."""

    part: str
    waits_on: str
    open: int
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAccount:
    """An actor that died."""

    name: str
    pool: str
    host: str
    node: str
    reason: str
    ago_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAccount:
    """A node that serves this driver no more, or not for long."""

    node: str
    host: str
    state: str
    """gone | draining"""
    for_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAccount:
    """Who works for a run, who waits for whom, and who was lost; the worst first, not all."""

    address: str = ""
    """Of Ray; "" before it runs."""
    short: str = ""
    """Which pools have fewer members at work than they should."""
    num_actors: int = 0
    num_nodes: int = 0
    """That live."""
    loop_still_s: float = 0.0
    """For so long the driver's event loop has heard nobody."""
    actors: Sequence[ActorAccount] = ()
    waits: Sequence[WaitAccount] = ()
    parts: Sequence[PartAccount] = ()
    losses: Sequence[LossAccount] = ()
    nodes: Sequence[NodeAccount] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FleetAccount:
        """Raises TypeError if it is none."""
        of: dict[str, Any] = {
            "actors": ActorAccount,
            "waits": WaitAccount,
            "parts": PartAccount,
            "losses": LossAccount,
            "nodes": NodeAccount,
        }
        lists = {name: tuple(kind(**e) for e in data[name]) for name, kind in of.items()}
        return cls(**{**data, **lists})


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """One account of a driver."""

    state: State
    time_unix_s: float
    """When it was written."""
    started_unix_s: float
    """Of this start of the run."""
    seconds_total: float
    """Of all starts of the run together."""
    host: str
    pid: int
    command: str
    """What was typed; the same goes on with the run."""
    cwd: str
    error: str = ""
    """Why it failed, or stopped by itself; "" if it did not."""
    progress: Snapshot = field(default_factory=Snapshot)
    fleet: FleetAccount | None = None
    """None: it has none, or is of an earlier version."""

    @property
    def claims_to_run(self) -> bool:
        return self.state in ("running", "stopping")

    def fresh(self, now_s: float) -> bool:
        """True if a driver that still runs could have written it."""
        return now_s - self.time_unix_s < STALE_S


class LiveFile:
    """Keeps the account while a driver is inside its `with` block.

    `state` of the last account says how it ended: finished, stopped (cancelled) or failed.
    """

    def __init__(
        self,
        store: RunStore,
        snapshot: Callable[[], Snapshot],
        *,
        fleet: Callable[[], FleetAccount | None] = lambda: None,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._snapshot = snapshot
        self._fleet = fleet
        self._interval_s = interval_s
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_forever, name="live-file", daemon=True)
        self.seconds_before = 0.0
        """Seconds of the starts before this one."""
        self._started_s = clock()

    def __enter__(self) -> LiveFile:
        earlier = read_live(self._store)
        self.seconds_before = earlier.seconds_total if earlier is not None else 0.0
        self._started_s = self._clock()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._write("finished")
        elif issubclass(kind, Exception):
            stopped = issubclass(kind, StoppedError)
            self._write("stopped" if stopped else "failed", _message(error))
        else:
            self._write("stopped")

    @property
    def seconds_total(self) -> float:
        """Seconds of all starts of the run together, up to now."""
        return self.seconds_before + max(self._clock() - self._started_s, 0.0)

    def _write_forever(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._write()

    def account(self, state: State | None = None, error: str = "") -> Live:
        """What is written next."""
        progress = self._snapshot()
        return Live(
            state=state or ("stopping" if progress.stopping else "running"),
            time_unix_s=self._clock(),
            started_unix_s=self._started_s,
            seconds_total=self.seconds_total,
            host=socket.gethostname(),
            pid=os.getpid(),
            command=command_line(),
            cwd=str(Path.cwd()),
            error=error,
            progress=progress,
            fleet=self._fleet(),
        )

    def _write(self, state: State | None = None, error: str = "") -> None:
        data = json.dumps(asdict(self.account(state, error)), indent=1) + "\n"
        with contextlib.suppress(StoreError):
            self._store.put(LIVE_FILE, data.encode(), durable=False)


def read_live(store: RunStore) -> Live | None:
    """The last account in a run's folder; None if there is none that can be read."""
    try:
        data = json.loads(store.read(LIVE_FILE))
        told = data.get("fleet")
        fleet = FleetAccount.from_json(told) if told is not None else None
        return Live(**{**data, "progress": Snapshot(**data["progress"]), "fleet": fleet})
    except (FileNotFoundError, StoreError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _message(error: BaseException | None) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error).strip()
    return text or type(error).__name__
