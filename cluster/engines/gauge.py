"""How full a vLLM engine is, as its scheduler last said, read in the process that asks it.

vLLM hands what its scheduler counts to "stat loggers". `EngineGauge` keeps the last of it and adds
up preemptions. It is a `PrometheusStatLogger` by name only: vLLM adds one of those, which costs as
much CPU time as the rest of a small engine's front end, unless it is given one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger

from cluster.jobs.admission import EnginePressure


class EngineGauge(PrometheusStatLogger):
    """Keeps the last `EnginePressure` of one engine."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        self._last = EnginePressure(running=0, waiting=0, kv_usage=0.0, preemptions=0)
        self.steps = 0
        """Times the scheduler said anything: it goes on, whether or not a request ends."""

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM, often; either argument may be None."""
        if scheduler_stats is not None:
            self.steps += 1
            self._last = replace(
                self._last,
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs,
                kv_usage=scheduler_stats.kv_cache_usage,
            )
        if iteration_stats is not None and iteration_stats.num_preempted_reqs:
            preemptions = self._last.preemptions + iteration_stats.num_preempted_reqs
            self._last = replace(self._last, preemptions=preemptions)

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""

    def record_admission_rejection(self, reason: str) -> None:
        """Nothing to count."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """Engines of this project do not sleep."""

    def pressure(self) -> EnginePressure:
        """The last known state; zeros before the first step."""
        return self._last
