"""Logs and traces of one process of a run, begun together: in the driver, and in each actor.

From then on SIGUSR2 has the process write the stack of each of its threads into memory that others
of its user can read (`/proc/PID/fd`): what `rstar why` shows where py-spy may not look.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.telemetry import logs, tracing
from cluster.telemetry.tracing import Tracing, TracingConfig
from rollout.run_store import RunStore

STACKS = "rstar-stacks"
"""Name of the memory that stacks are written to."""

_stacks: int | None = None


def tell_stacks() -> None:
    """Have SIGUSR2 do what the module says, from now on."""
    global _stacks
    if _stacks is None:
        _stacks = os.memfd_create(STACKS)
        faulthandler.register(signal.SIGUSR2, file=_stacks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a process needs to know to tell what it does."""

    store: RunStore
    tracing: TracingConfig
    level: str = "info"
    """Of the lines that are kept."""

    def begin(self, process: str, **process_ids: Any) -> None:
        """Log and trace into the run's folder from now on.

        Args:
            process: unique in the run: "policy-0".
            process_ids: carried by every line logged.
        Raises:
            TracingError: the tracing that is asked for is not installed.
        """
        tell_stacks()
        logs.begin(self.store, process, level=self.level, **process_ids)
        on = self.tracing.sample > 0
        tracing.begin(Tracing(self.tracing, store=self.store, process=process) if on else None)

    def begin_in(self, handle: Any, process: str, **process_ids: Any) -> Any:
        """Have an actor begin, before its next call; returns at once what tells its `Place`."""
        return handle.__ray_call__.remote(_begin, self, process, process_ids)


class Place(NamedTuple):
    """Where a process runs."""

    node: str
    """Ray's id of it."""
    host: str
    pid: int


def place_of(handle: Any) -> Any:
    """Ask an actor for its `Place`; returns at once what tells it."""
    return handle.__ray_call__.remote(_place)


def _place(actor: Any) -> Place:
    import ray

    return Place(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid())


def set_level_in(handle: Any, level: str) -> None:
    """Have an actor keep log lines of this level and above; returns at once."""
    handle.__ray_call__.remote(_set_level, level)


def _set_level(actor: Any, level: str) -> None:
    logs.set_level(level)


def _begin(actor: Any, telemetry: Telemetry, process: str, process_ids: dict[str, Any]) -> Place:
    telemetry.begin(process, **process_ids)
    return _place(actor)


def end() -> None:
    """Write out what waits, and log and trace no more in this process."""
    tracing.begin(None)
    logs.end()
