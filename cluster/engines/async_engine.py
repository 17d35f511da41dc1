"""vLLM's asynchronous engine as replicas run it: how full it is, and where its core runs.

    generate --> AsyncLLM --messages--> engine core      a process of its own (vLLM's way; GPUs)
    generate --> AsyncLLM --calls-----> engine core      a thread of this one (`CoreThread`; CPUs)

What a step of a small model costs is Python, of which messages between processes are a tenth; what
an engine's start costs is the import of vLLM, which a second process does again. On a GPU a process
of its own is worth both: the core goes on while the replies to its last step are read.

vLLM hands what its scheduler counts to "stat loggers". `EngineGauge` keeps the last of it and adds
up preemptions. It is a `PrometheusStatLogger` by name only: vLLM adds one of those, which costs as
much CPU time as the rest of a small engine's front end, unless it is given one.

`CoreThread` stands where vLLM 0.32 makes the client of its core's process and knows what replicas
ask of it (requests, aborts, weights, prefix cache); vLLM has no such client of its own ("Running
EngineCore in asyncio without multiprocessing is not currently supported").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import async_llm
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from cluster.jobs.admission import EnginePressure

logger = logging.getLogger(__name__)

Call = Callable[[EngineCore], None]


def make_async_engine(arguments: Mapping[str, Any], *, in_process: bool) -> Any:
    """Start an `AsyncLLM`; takes seconds.

    Args:
        arguments: of vLLM's `AsyncEngineArgs`.
        in_process: the engine core is a thread of this process.
    """

    def start() -> Any:
        return async_llm.AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments),
            # Where throughput counts: with it vLLM takes the larger batches of its offline engine.
            usage_context=UsageContext.LLM_CLASS,
            stat_loggers=[EngineGauge],
        )

    if not in_process:
        return start()
    module: Any = async_llm
    theirs, module.EngineCoreClient = module.EngineCoreClient, _InProcess
    try:
        return start()
    finally:
        module.EngineCoreClient = theirs


def gauge_of(engine: Any) -> EngineGauge:
    """The gauge of an engine made here."""
    loggers = engine.logger_manager.stat_loggers
    return next(gauge for gauge in loggers if isinstance(gauge, EngineGauge))


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


@dataclass(slots=True)
class _Resources:
    """What `AsyncLLM` asks of a client's resources."""

    engine_dead: bool = False


class CoreThread(EngineCoreClient):
    """An engine core in a thread, for an `AsyncLLM` of this process.

    The thread makes the core and is all that touches it: parts of torch's state belong to a thread.
    Between two steps it takes the calls that wait; without requests it waits for one.
    """

    def __init__(self, *arguments: Any) -> None:
        """Start the core; takes seconds.

        Args:
            arguments: of `EngineCore`.
        Raises:
            Exception: what the core raised.
        """
        self.engine_ranks_managed = [0]
        self.resources = _Resources()
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Of those who ask."""
        started: Future[EngineCore] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(arguments, started), name="engine-core", daemon=True
        )
        self._thread.start()
        self._core = started.result()

    async def get_output_async(self) -> Any:
        found = await self._outputs.get()
        if isinstance(found, Exception):
            raise EngineDeadError(suppress_context=True) from found
        return found

    async def add_request_async(self, request: Any) -> None:
        self._check_alive()
        # The answer may be there before anybody has waited for it.
        self._loop = asyncio.get_running_loop()
        prepared = self._core.preprocess_add_request(request)
        self._calls.put(lambda core: core.add_request(*prepared))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        if request_ids:
            self._calls.put(lambda core: core.abort_requests(request_ids))

    async def get_supported_tasks_async(self) -> Any:
        return self._core.get_supported_tasks()

    async def reset_prefix_cache_async(self, *arguments: Any) -> bool:
        return await self._ask(lambda core: core.reset_prefix_cache(*arguments))

    async def collective_rpc_async(self, *arguments: Any) -> Any:
        return await self._ask(lambda core: core.collective_rpc(*arguments))

    def shutdown(self, timeout: float | None = None) -> None:
        """End the core, after the step it is at."""
        self._calls.put(None)
        if not sys.is_finalizing():  # the interpreter waits for no thread like this one any more
            self._thread.join(timeout)

    def _check_alive(self) -> None:
        if self.resources.engine_dead or not self._thread.is_alive():
            raise EngineDeadError

    async def _ask(self, function: Callable[[EngineCore], Any]) -> Any:
        self._check_alive()
        answer: Future[Any] = Future()

        def call(core: EngineCore) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function(core))
            except Exception as error:
                answer.set_exception(error)

        self._calls.put(call)
        return await asyncio.wrap_future(answer)

    def _run(self, arguments: tuple[Any, ...], started: Future[EngineCore]) -> None:
        try:
            core = EngineCore(*arguments)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(core)
        try:
            self._serve(core)
        except Exception as error:
            logger.exception("the engine core failed")
            self.resources.engine_dead = True
            self._tell(error)
            while (call := self._calls.get()) is not None:
                with contextlib.suppress(Exception):
                    call(core)
        finally:
            core.shutdown()

    def _serve(self, core: EngineCore) -> None:
        while True:
            idle = not core.scheduler.has_requests()
            try:
                call = self._calls.get(block=idle)
            except queue.Empty:
                self._step(core)
                continue
            if call is None:
                return
            call(core)

    def _step(self, core: EngineCore) -> None:
        outputs, executed = core.step_fn()
        core.post_step(model_executed=executed)
        told = (outputs or {}).get(0)
        if told is not None and (told.outputs or told.scheduler_stats):
            self._tell(told)
        if not executed and core.scheduler.has_unfinished_requests():
            # None of them can go on yet; the other threads shall.
            time.sleep(0.001)

    def _tell(self, output: Any) -> None:
        # Closed: nobody is left who asked.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)


class _InProcess(EngineCoreClient):
    """Where `AsyncLLM` has its client made."""

    @staticmethod
    def make_async_mp_client(
        vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any
    ) -> Any:
        return CoreThread(vllm_config, executor_class, log_stats)
