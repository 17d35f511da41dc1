"""An engine's life in an actor: started, checked, given new weights, watched, ended.

    NEW --ready()--> READY --load()--> LOADING --> READY --shutdown()--> CLOSED
    FAILED from anywhere, when the engine fails

Weights are loaded in place. A reply carries the version of the weights that wrote all of it:
`load` lets the requests in flight end, keeps new ones waiting, swaps the weights, empties the
prefix cache and then compares fingerprints (log-probabilities, or values, of fixed texts): they
must be finite, repeatable, other than before if the weight files differ, and, for a small model in
float32, what transformers says (an engine may renew a part of its weights only).

Prefix caches are salted with the version: what other weights wrote into one is never found.

An engine spread over several GPUs (tensor and pipeline parallel) is run by vLLM's Ray executor: its
ranks are Ray actors in the bundles of the placement group that this actor stands in, on as many
nodes as that has (`cluster.fleet.actors`). Weights are then read from a path that all of them see.

Not covered: LoRA, changing the architecture or the tokenizer of a running replica (`load` refuses;
start another one).
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal, Protocol

import ray

from cluster.engines.arguments import engine_arguments, engine_environment, serving_dtype
from cluster.engines.config import EngineConfig
from cluster.engines.gate import RequestGate
from cluster.engines.model_check import (
    GIB,
    ModelCheckError,
    ModelInfo,
    available_memory_bytes,
    check_cpu_memory,
    check_fingerprint,
    check_gpu_memory,
    type_bytes,
    weights_digest,
)
from cluster.jobs.admission import EnginePressure
from cluster.jobs.pace import Pace
from cluster.telemetry import logs
from cluster.telemetry.tracing import Traced
from rollout.engine import EngineError

logger = logging.getLogger(__name__)


_MAX_REFERENCE_BYTES = 256 << 20
"""Weight files up to this size are also read by transformers, to compare what the engine says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """A replica that serves."""

    name: str
    version: str
    path: str
    device: str
    """"cpu" or "gpu"."""
    pid: int


@dataclass(slots=True, kw_only=True)
class ReplicaStats:
    """Counters since the start, and the present load."""

    name: str
    version: str
    healthy: bool = False
    requests: int = 0
    """Answered."""
    failed: int = 0
    """Ended by an exception, aborted ones included."""
    prompt_tokens: int = 0
    """Of a policy: once a request, however many candidates."""
    cached_tokens: int = 0
    """Prompt tokens (as counted above) found in the prefix cache."""
    generated_tokens: int = 0
    too_long: int = 0
    """Prompts or texts that did not fit."""
    running_requests: int = 0
    running_sequences: int = 0
    idle_s: float = 0.0
    """Seconds without any request in flight, since the engine first served."""
    sequence_s: float = 0.0
    """Sum over answered requests of sequences x seconds: divided by a time, the mean in flight."""
    steps: int = 0
    """Times the engine told of a step; 0 for engines that only answer."""
    waiting_requests: int = 0
    """Held back while weights are loaded."""
    loads: int = 0
    load_s: float = 0.0
    """Seconds spent loading weights, waiting for requests included."""
    stage_s: float = 0.0
    """Seconds until the weights were at hand that were loaded last (`cluster.stage_weights`)."""
    stage_note: str = ""
    """Why they are read where they are all the same."""
    rss_bytes: int = 0
    """Actor and engine processes together; pages they share are counted in each."""


@dataclass(slots=True)
class Answering:
    """A request in hand."""

    length: int = 1
    """Of its answer: tokens one after the other, or one pass of the model."""


class AtHand(Protocol):
    """A checkpoint that is to be read; `cluster.folder.staging.Staged` is one."""

    @property
    def path(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def note(self) -> str: ...


class ReplicaState(StrEnum):
    """Where a replica is in its life."""

    NEW = "new"
    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"
    CLOSED = "closed"


class Replica(Traced, ABC):
    """An engine's life; subclasses say how it is asked."""

    _runner: Literal["generate", "pooling"]
    _version_id: str
    """What log lines call the version that is served."""

    def __init__(
        self,
        path: str,
        config: EngineConfig | None = None,
        *,
        version: str = "base",
        name: str = "replica",
        stage: Callable[[str], AtHand] | None = None,
    ) -> None:
        """Remember what to serve; nothing is started or checked before `ready`.

        Args:
            path: checkpoint directory in Hugging Face format, tokenizer included.
            version: what replies shall carry while these weights are served.
            name: for logs and errors.
            stage: has a checkpoint at hand on this machine; None: it is read where it is.
        """
        self._stage = stage
        self._digest = ""
        """Of the weights served, see `weights_digest`."""
        self._path = str(path)
        self._version = version
        self._config = config or EngineConfig()
        self._name = name
        self._state = ReplicaState.NEW
        self._failure = ""
        self._gate = RequestGate()
        self._starting = asyncio.Lock()
        # First come, first served: of two loads the later one decides what is served then.
        self._loading = asyncio.Lock()
        self._info: ReplicaInfo | None = None
        self._model: ModelInfo | None = None
        self._engine: Any = None
        self._in_process = False
        self._gauge: Any = None
        self._tokenizer: Any = None
        self._fingerprint: tuple[float, ...] = ()
        self._max_model_len = 0
        self._device = ""
        self._dtype = ""
        self._salt = f"{version}#0"
        """Of the prefix cache: another one for each load, since a version may be loaded again."""
        self._stats = ReplicaStats(name=name, version=version)
        self._pace = Pace()

    async def ready(self) -> ReplicaInfo:
        """Start the engine if it is not running; returns when it can serve.

        Raises:
            ModelCheckError: the checkpoint cannot be served, or there is too little memory.
            EngineError: the engine did not start.
        """
        async with self._starting:
            if self._info is None:
                started = time.monotonic()
                # In a thread: the process answers other calls while the engine starts.
                await asyncio.to_thread(self._start_engine)
                assert self._model is not None
                reference = await asyncio.to_thread(self._reference, self._model)
                try:
                    await self._check_output(None, reference, weights_differ=True)
                except Exception as error:
                    self._fail(f"the engine started but cannot serve: {error}")
                    raise EngineError(f"{self._name}: {self._failure}") from error
                self._state = ReplicaState.READY
                self._gate.idle_from_now()
                self._info = ReplicaInfo(
                    name=self._name,
                    version=self._version,
                    path=self._path,
                    device=self._device,
                    pid=os.getpid(),
                )
                logger.info(
                    "Replica serves after %.1f s. replica=%s version=%s path=%s",
                    time.monotonic() - started,
                    self._name,
                    self._version,
                    self._path,
                )
            return replace(self._info, version=self._version, path=self._path)

    async def load(self, path: str, version: str, *, force: bool = False) -> float:
        """Serve other weights, loaded in place; returns seconds, waiting included.

        Requests in flight end first; those that come meanwhile wait and get the new weights.
        Loading what is already served does nothing, unless `force`.

        Raises:
            ModelCheckError: no checkpoint of this replica's architecture, shapes and tokenizer.
                The old weights go on serving.
            EngineError: requests did not end in time (the old weights go on serving), or the
                engine failed or does not serve what it was given (the replica is FAILED then).
        """
        await self.ready()
        async with self._loading:
            return await self._load(str(path), version, force)

    async def _load(self, path: str, version: str, force: bool) -> float:
        started = time.monotonic()
        self._check_state()
        if (path, version) == (self._path, self._version) and not force:
            return 0.0
        model = await asyncio.to_thread(self._have, path)
        self._check_loadable(model)
        digest = await asyncio.to_thread(weights_digest, model.path)
        reference = await asyncio.to_thread(self._reference, model)
        try:
            async with self._gate.exclusive(self._config.load_timeout_s):
                self._check_state()
                self._state = ReplicaState.LOADING
                await self._swap_weights(model.path, version, reference, digest != self._digest)
                self._path, self._version, self._model = path, version, model
                self._digest = digest
                logs.carry(**{self._version_id: version})
                self._state = ReplicaState.READY
        except TimeoutError as error:
            raise EngineError(
                f"{self._name}: requests still in flight after {self._config.load_timeout_s} s; "
                f"{version} was not loaded"
            ) from error
        seconds = time.monotonic() - started
        self._stats.loads += 1
        self._stats.load_s += seconds
        logger.info(
            "Loaded weights in %.2f s. replica=%s version=%s path=%s",
            seconds,
            self._name,
            version,
            path,
        )
        return seconds

    async def fingerprint(self) -> tuple[float, ...]:
        """What the weights now served say of fixed texts: equal, up to rounding, on all replicas
        that serve them. Empty before the first `ready`."""
        return self._fingerprint

    async def stats(self) -> ReplicaStats:
        """Counters and load."""
        return replace(
            self._stats,
            version=self._version,
            healthy=self._state in (ReplicaState.READY, ReplicaState.LOADING)
            and not self._engine.errored,
            running_requests=self._gate.running,
            steps=self._gauge.steps if self._gauge is not None else 0,
            idle_s=self._gate.idle_s(),
            waiting_requests=self._gate.waiting,
            rss_bytes=_rss_bytes(),
        )

    async def pressure(self) -> EnginePressure | None:
        """How full the engine is; None before it has started."""
        if self._engine is None:
            return None
        if self._gauge is None:  # one that batches what there is and keeps nothing
            said = EnginePressure(
                running=self._stats.running_sequences,
                waiting=self._gate.waiting,
                kv_usage=0.0,
                preemptions=0,
            )
        else:
            said = self._gauge.pressure()
        requests = self._gate.running + self._gate.waiting
        return replace(said, requests=requests, pace_s=self._pace.s_per_token)

    async def shutdown(self) -> None:
        """End the engine process; further requests are refused."""
        self._state = ReplicaState.CLOSED
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    # What subclasses say.

    @abstractmethod
    def _make_engine(self, arguments: dict[str, Any]) -> Any: ...

    @abstractmethod
    def _check_model(self, path: str) -> ModelInfo: ...

    @abstractmethod
    async def _take_fingerprint(self) -> tuple[float, ...]: ...

    @abstractmethod
    def _take_reference(self, path: str) -> tuple[float, ...]: ...

    # The engine.

    def _have(self, path: str) -> ModelInfo:
        """Check a checkpoint, and have it at hand first where that is wanted."""
        if self._stage is not None and (self._config.num_ranks == 1 or _on_one_node()):
            at_hand = self._stage(path)
            path = at_hand.path
            self._stats.stage_s, self._stats.stage_note = at_hand.seconds, at_hand.note
        return self._check_model(path)

    def _start_engine(self) -> None:
        model = self._have(self._path)
        if self._config.num_ranks > 1 and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            # The GPUs are booked for the ranks, so Ray hides them all from this actor; the engine
            # has to see what kind they are.
            del os.environ["CUDA_VISIBLE_DEVICES"]
        on_cpu = not _has_gpu()
        ray_address = ray.get_runtime_context().gcs_address if ray.is_initialized() else ""
        environment = engine_environment(self._config, on_cpu=on_cpu, ray_address=ray_address)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if on_cpu:
            _set_threads(self._config.cpu_threads)
        self._check_memory(model, on_cpu)
        arguments = engine_arguments(self._config, model, runner=self._runner, on_cpu=on_cpu)
        self._in_process = on_cpu if self._config.in_process is None else self._config.in_process
        try:
            # vLLM's import makes millions of objects that stay: looking through them again and
            # again takes a sixth of it.
            with _no_garbage_collection():
                engine = self._make_engine(arguments)
        except Exception as error:
            self._fail(f"the engine did not start: {error}")
            raise EngineError(f"{self._name}: {self._failure} (path={self._path})") from error
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._model = model
        self._digest = weights_digest(model.path)
        self._max_model_len = arguments["max_model_len"]
        self._device = "cpu" if on_cpu else "gpu"
        self._dtype = arguments["dtype"]

    def _check_memory(self, model: ModelInfo, on_cpu: bool) -> None:
        bytes_per_weight = type_bytes(serving_dtype(self._config, model, on_cpu=on_cpu))
        if on_cpu:
            check_cpu_memory(
                model,
                bytes_per_weight=bytes_per_weight,
                kv_cache_bytes=int(self._config.kv_cache_gib * GIB),
                available_bytes=available_memory_bytes(),
            )
            return
        import torch

        if self._config.num_ranks == 1:
            free, total = torch.cuda.mem_get_info()
        else:
            # Asking what is free would take memory of a GPU that may be another replica's; those of
            # the ranks are booked whole.
            free = total = torch.cuda.get_device_properties(0).total_memory
        check_gpu_memory(
            model,
            bytes_per_weight=bytes_per_weight,
            num_gpus=self._config.num_ranks,
            utilization=self._config.gpu_memory_utilization,
            free_bytes=free,
            total_bytes=total,
        )

    def _check_loadable(self, model: ModelInfo) -> None:
        assert self._model is not None
        for what, now, wanted in (
            ("architecture", self._model.architecture, model.architecture),
            ("tokenizer", self._model.tokenizer_digest, model.tokenizer_digest),
            ("config.json", self._model.shape, model.shape),
        ):
            if now != wanted:
                raise ModelCheckError(
                    f"{model.path}: its {what} differs from that of {self._path}, which replica "
                    f"{self._name} serves; weights are swapped only between checkpoints that "
                    "share it, another model needs another replica"
                    + (_first_difference(now, wanted) if what == "config.json" else "")
                )

    def _reference(self, model: ModelInfo) -> tuple[float, ...] | None:
        """What transformers says of the fixed texts; None where that is dear or not comparable."""
        if self._dtype != "float32" or model.weight_bytes > _MAX_REFERENCE_BYTES:
            return None
        return self._take_reference(model.path)

    async def _swap_weights(
        self, path: str, version: str, reference: tuple[float, ...] | None, weights_differ: bool
    ) -> None:
        self._salt = f"{version}#{self._stats.loads + 1}"
        try:
            async with asyncio.timeout(self._config.load_timeout_s):
                await self._engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
                await self._engine.collective_rpc("repack_tied_head")
                await self._check_output(
                    self._fingerprint, reference, weights_differ=weights_differ
                )
        except asyncio.CancelledError:
            self._fail(f"loading {path} was cancelled")
            raise
        except Exception as error:
            self._fail(f"loading {path} failed: {type(error).__name__}: {error}")
            raise EngineError(f"{self._name}: {self._failure}") from error

    async def _check_output(
        self,
        previous: tuple[float, ...] | None,
        reference: tuple[float, ...] | None,
        *,
        weights_differ: bool,
    ) -> None:
        """Take the fingerprint of the weights in the engine, with an empty prefix cache.

        Raises:
            EngineError: see `check_fingerprint`.
        """
        await self._engine.reset_prefix_cache()
        first = await self._take_fingerprint()
        await self._engine.reset_prefix_cache()
        check_fingerprint(
            first,
            await self._take_fingerprint(),
            previous,
            reference=reference,
            weights_differ=weights_differ,
            tolerance=1e-3 if self._dtype == "float32" else 0.1,
        )
        self._fingerprint = first

    def _fail(self, failure: str) -> None:
        self._failure = failure
        self._state = ReplicaState.FAILED
        logger.error("Replica failed: %s replica=%s", failure, self._name)

    def _check_state(self) -> None:
        if self._state is ReplicaState.FAILED:
            raise EngineError(f"{self._name}: {self._failure}")
        if self._state is ReplicaState.CLOSED:
            raise EngineError(f"{self._name}: shut down")

    @asynccontextmanager
    async def _answering(self, num_sequences: int) -> AsyncIterator[Answering]:
        """Around one request: gate, deadline, counters, and errors under one name."""
        if self._state is ReplicaState.NEW:
            await self.ready()
        async with self._gate.request():
            self._check_state()
            self._stats.running_sequences += num_sequences
            began_s = time.monotonic()
            answered = False
            answering = Answering()
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    yield answering
                answered = True
                self._pace.observe(answering.length, time.monotonic() - began_s)
            except TimeoutError as error:
                raise EngineError(
                    f"{self._name}: no answer within {self._config.request_timeout_s} s"
                ) from error
            except Exception as error:
                if self._engine is None or self._engine.errored:
                    self._fail("the engine died")
                raise EngineError(f"{self._name}: {type(error).__name__}: {error}") from error
            finally:
                self._stats.running_sequences -= num_sequences
                self._stats.sequence_s += num_sequences * (time.monotonic() - began_s)
                self._stats.requests += answered
                self._stats.failed += not answered


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _set_threads(number: int) -> None:
    """Of an engine in this process, where torch may have been loaded with another number."""
    import torch

    torch.set_num_threads(number)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _on_one_node() -> bool:
    """Whether all ranks of this replica stand on the machine of this actor."""
    from ray.util.placement_group import get_current_placement_group, placement_group_table

    group = get_current_placement_group()
    if group is None:
        return True
    places = placement_group_table(group)["bundles_to_node_id"].values()
    return set(places) == {ray.get_runtime_context().get_node_id()}


def _first_difference(now: str, wanted: str) -> str:
    old, new = json.loads(now), json.loads(wanted)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f" ({key}: {old.get(key)} served, {new.get(key)} asked for)"
    return ""


def _rss_bytes() -> int:
    import psutil

    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total
