"""Make an engine process end with the process that started it.

A vLLM engine core is a child process. It leaves on a polite shutdown, but when its owner dies by
SIGKILL (out of memory, a killed Ray actor) it waits for requests for ever with all its memory
(vLLM 0.32: still there after minutes; five minutes if the owner died during the start).

`EndsWithOwner` is put among the engine's arguments, where vLLM carries it along unread. Pickled
for a child process it notes who pickled it; unpickled there, before anything else of the child
runs, it starts a thread that waits for that process to exit and then kills its own. Workers of a
tensor-parallel engine are children of the engine core and watch that.

The ranks of an engine that spans nodes (vLLM's Ray executor) are Ray actors, to which Ray brings
the same configuration. On the engine core's machine they watch it too; on another machine its
process id means nothing, so it binds nothing there, and Ray ends them with the engine core's job.

Not covered: other operating systems than Linux, children that are forked and not spawned.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path


class EndsWithOwner(str):
    """A piece of configuration that binds the process it is unpickled in to the one it came from.

    A string, because vLLM writes its configuration as JSON, and always the same, because the names
    of its caches derive from it.
    """

    __slots__ = ()

    def __new__(cls) -> EndsWithOwner:
        return super().__new__(cls, "ends with its owner")

    def __reduce__(self) -> tuple[object, ...]:
        pid = os.getpid()
        return _arrive, (pid, _start_time(pid), _pid_space())


def _arrive(pid: int, start_time: str, space: str) -> EndsWithOwner:
    if pid != os.getpid() and space == _pid_space():
        _watch(pid, start_time)
    return EndsWithOwner()


def _pid_space() -> str:
    """The boot of this machine and the namespace its process ids are of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


@functools.cache
def _watch(pid: int, start_time: str) -> threading.Thread:
    thread = threading.Thread(
        target=_end_with, args=(pid, start_time), name="engine-owner-watch", daemon=True
    )
    thread.start()
    return thread


def _end_with(pid: int, start_time: str) -> None:
    _wait_for_exit(pid, start_time)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_exit(pid: int, start_time: str) -> None:
    """Return when the process is gone; a later process with the same pid does not count."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        # Gone already, or an old kernel or a container profile that refuses pidfd_open.
        while _start_time(pid) == start_time:
            time.sleep(1.0)
        return
    if _start_time(pid) == start_time:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.poll()


def _start_time(pid: int) -> str | None:
    """Start time of a living process in clock ticks since boot; None: no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name, in parentheses, may hold blanks: count fields from behind it.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
