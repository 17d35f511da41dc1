"""Logs and traces of one process of a run, begun together: in the driver, and in each actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.telemetry import logs, tracing
from cluster.telemetry.tracing import Tracing, TracingConfig
from rollout.run_store import RunStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a process needs to know to tell what it does."""

    store: RunStore
    tracing: TracingConfig

    def begin(self, process: str, **process_ids: Any) -> None:
        """Log and trace into the run's folder from now on.

        Args:
            process: unique in the run: "policy-0".
            process_ids: carried by every line logged.
        Raises:
            TracingError: the tracing that is asked for is not installed.
        """
        logs.begin(self.store, process, **process_ids)
        on = self.tracing.sample > 0
        tracing.begin(Tracing(self.tracing, store=self.store, process=process) if on else None)

    def begin_in(self, handle: Any, process: str, **process_ids: Any) -> None:
        """Have an actor begin, before its next call; returns at once."""
        handle.__ray_call__.remote(_begin, self, process, process_ids)


def _begin(actor: Any, telemetry: Telemetry, process: str, process_ids: dict[str, Any]) -> None:
    telemetry.begin(process, **process_ids)


def end() -> None:
    """Write out what waits, and log and trace no more in this process."""
    tracing.begin(None)
    logs.end()
