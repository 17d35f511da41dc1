"""One driver of a run at a time, on any store: a lease that is renewed while it is held.

    RUN/drivers/00001.json   the first driver: who, and a count that grows while it is there
    RUN/drivers/00002.json   created by the next one; the lease is the highest number

A number is created once, so of several drivers that find the lease free one gets it, and whoever
held a lower number sees that it lost it as soon as it looks. A lease is free when it was released,
when its owner was a process of this machine that is gone, or when it was watched for `EXPIRES_S`
and its count stood still. So no two clocks are compared, and a driver killed on another machine
costs the next one that wait. A file lock would need a file system, and one that has locks.

A driver that stood still for longer than that (a suspended machine) and goes on is told that it
lost the run, and stops; until it looks, both are there: what is committed is safe, since that is
create-only, and records it writes meanwhile are those of the run it was in.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rollout.run_store import RunStore, StoreError

logger = logging.getLogger(__name__)

FOLDER = "drivers"

RENEW_S = 5.0
"""Pause between two renewals."""

EXPIRES_S = 30.0
"""A lease that was not renewed while somebody looked for so long is free."""


class LeaseHeldError(RuntimeError):
    """Another driver has the run; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who has, or had, a lease."""

    owner: str
    """Unique to this holding."""
    host: str
    machine: str
    """Boot of the machine and its process numbers' space: where `pid` means something."""
    pid: int
    begun: str
    """When that process was started, in the kernel's words: numbers come again."""
    count: int = 0
    """Renewals."""
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """True if it was a process of this machine and is no more."""
        return self.machine == _machine() and _begun(self.pid) != self.begun


class RunLease:
    """A run's lease, as one driver sees it."""

    def __init__(
        self,
        store: RunStore,
        *,
        lost: Callable[[], None] = lambda: None,
        renew_s: float | None = None,
        expires_s: float | None = None,
    ) -> None:
        """
        Args:
            lost: called, in a thread, when another driver has taken the run.
            renew_s, expires_s: None: `RENEW_S`, `EXPIRES_S`.
        """
        self._store = store
        self._lost = lost
        self._renew_s = RENEW_S if renew_s is None else renew_s
        self._expires_s = EXPIRES_S if expires_s is None else expires_s
        self.number = 0
        """Of this driver among all that the run ever had, from 1; 0: the lease was not taken."""
        self._own = Holder(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            begun=_begun(os.getpid()),
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, name="lease", daemon=True)
        self.taken_by: Holder | None = None
        """Who has taken the run from this driver; None: nobody."""

    def take(self) -> None:
        """Get the lease, and renew it from now on; waits where only that shows that it is free.

        Raises:
            LeaseHeldError: another driver has it.
            StoreError: the store cannot be read or written.
        """
        names = [path.rsplit("/", 1)[-1] for path in self._store.files(FOLDER)]
        number = max((int(n[:-5]) for n in names if n[:-5].isdigit()), default=0)
        # A listing may lack what was made a moment ago.
        while self._read(number + 1) is not None:
            number += 1
        holder = self._read(number) if number else None
        if holder is not None and not self._is_free(number, holder):
            raise LeaseHeldError(str(holder))
        self.number = number + 1
        if not self._store.create(_name(self.number), _to_json(self._own)):
            holder = self._read(self.number)
            # It may be one's own: the answer to a first try can be lost.
            if holder is None or holder.owner != self._own.owner:
                raise LeaseHeldError(str(holder or "another process"))
        self._thread.start()

    def release(self) -> None:
        """Let the next driver have it at once."""
        self._ended.set()
        self._thread.join()
        if self.taken_by is None:
            try:
                self._write(replace(self._own, released=True))
            except StoreError as error:
                logger.warning("The run's lease was not released: %s", error)

    def _is_free(self, number: int, holder: Holder) -> bool:
        if holder.released or holder.is_gone:
            return True
        if holder.machine == self._own.machine:
            return False
        deadline_s = time.monotonic() + self._expires_s
        while time.monotonic() < deadline_s:
            time.sleep(min(self._renew_s / 2, max(deadline_s - time.monotonic(), 0.0)))
            now = self._read(number)
            if now is None or now.released:
                return True
            if now.count != holder.count:
                return False
        return True

    def _renew_forever(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                self.taken_by = self._read(self.number + 1)
                if self.taken_by is not None:
                    self._lost()
                    return
                self._own = replace(self._own, count=self._own.count + 1)
                self._write(self._own)
            except StoreError as error:
                # What the driver has to write meanwhile fails likewise, and says so.
                logger.warning("The run's lease could not be renewed: %s", error)

    def _read(self, number: int) -> Holder | None:
        try:
            data = self._store.read(_name(number))
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{_name(number)} of {self._store.root} cannot be read: {error}"
            ) from error

    def _write(self, holder: Holder) -> None:
        self._store.put(_name(self.number), _to_json(holder), durable=False)


def _name(number: int) -> str:
    return f"{FOLDER}/{number:05d}.json"


def _to_json(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _begun(pid: int) -> str:
    """When a process of this machine was started; "" if there is none, or only its remains."""
    try:
        # The second field is a name, which may hold blanks.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    state, *rest = fields.rpartition(")")[2].split()
    return "" if state == "Z" else rest[18]
