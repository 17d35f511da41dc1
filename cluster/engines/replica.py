"""Policy and preference replicas: one vLLM engine each, behind the Protocols of the search.

    actor process                                        engine process (vLLM)
    generate --token ids--> AsyncLLM ------------------> continuous batching, prefix cache
    evaluate --token ids--> BatchEngine ---------------> (on CPU: a thread of the actor)
            ^                     |                      lives for the whole run
            +--- text, values <---+

    NEW --ready()--> READY --load()--> LOADING --> READY --shutdown()--> CLOSED
    FAILED from anywhere, when the engine fails

A replica is an ordinary class; Ray is one line at the foot. `vllm` is imported when the engine is
started. The same code serves GPUs and vLLM's CPU build; what differs is in `engine_environment`
and `engine_arguments`, and nowhere else.

Weights are loaded in place. A reply carries the version of the weights that wrote all of it:
`load` lets the requests in flight end, keeps new ones waiting, swaps the weights, empties the
prefix cache and then compares fingerprints (log-probabilities, or values, of fixed texts): they
must be finite, repeatable, other than before if the weight files differ, and, for a small model in
float32, what transformers says (an engine may renew a part of its weights only).

Prefix caches are salted with the version: what other weights wrote into one is never found.

Stop strings that are one special token of the tokenizer are handed to the engine core as token
ids, so that it stops by itself; text is then decoded once, at the end. Whatever the way, the text
is cut behind the earliest stop string in it.

What vLLM's CPU build (0.32) needs, all measured on 2 cores with a 0.6 M-parameter model:
- engine core and worker in one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): start 10 s, not 33 s;
- no chunked prefill: a seeded request whose prefill is split kills the engine ("CPU Generator does
  not use offset");
- no torch.compile for helper functions: the first request with log-probabilities waits 18 s;
- an explicit cache size, or it takes a share of the whole machine; block size 32, or short prompts
  share nothing.

An engine spread over several GPUs (tensor and pipeline parallel) is run by vLLM's Ray executor: its
ranks are Ray actors in the bundles of the placement group that this actor stands in, on as many
nodes as that has (`cluster.fleet.actors`). Weights are then read from a path that all of them see.

Not covered: LoRA, changing the architecture or the tokenizer of a running
replica (`load` refuses; start another one).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import ray

from cluster.engines.batch import BatchEngine
from cluster.engines.config import EngineConfig
from cluster.engines.model_check import (
    GIB,
    ModelCheckError,
    ModelInfo,
    available_memory_bytes,
    check_cpu_memory,
    check_gpu_memory,
    check_policy_checkpoint,
    check_preference_checkpoint,
)
from cluster.engines.process import EndsWithOwner
from cluster.jobs.admission import EnginePressure
from cluster.telemetry import logs, metrics
from cluster.telemetry.tracing import Traced
from rollout.engine import (
    Completion,
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    cut_completion,
)
from rollout.prompt import MARKERS

logger = logging.getLogger(__name__)

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_MAX_REFERENCE_BYTES = 256 << 20
"""Weight files up to this size are also read by transformers, to compare what the engine says."""

_REPEATED_TOKENS = 32
"""Longest passage whose repetition is looked for."""

_FINGERPRINT_TEXTS = (
    "<|user|>There are 12 boxes with 5 pens each. How many pens are there?<|assistant|><code>",
    "<|user|>Solve 3*x + 4 = 19 for x.<|assistant|><code>\n# Step 1: import\nimport sympy\n",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """A replica that serves."""

    name: str
    version: str
    path: str
    device: str
    """"cpu" or "gpu"."""
    max_model_len: int
    dtype: str
    pid: int
    start_s: float
    """From the call to the first possible request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """Counters since the start, and the present load."""

    name: str
    version: str
    healthy: bool
    requests: int
    """Answered."""
    failed: int
    """Ended by an exception, aborted ones included."""
    prompt_tokens: int
    """Of a policy: once a request, however many candidates."""
    cached_tokens: int
    """Prompt tokens (as counted above) found in the prefix cache."""
    generated_tokens: int
    too_long: int
    """Prompts or texts that did not fit."""
    running_requests: int
    running_sequences: int
    idle_s: float
    """Seconds without any request in flight, since the engine first served."""
    sequence_s: float
    """Sum over answered requests of sequences x seconds: divided by a time, the mean in flight."""
    waiting_requests: int
    """Held back while weights are loaded."""
    loads: int
    load_s: float
    """Seconds spent loading weights, waiting for requests included."""
    rss_bytes: int
    """Actor and engine processes together; pages they share are counted in each."""


class ReplicaState(StrEnum):
    """Where a replica is in its life."""

    NEW = "new"
    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"
    CLOSED = "closed"


class TextTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], **kwargs: Any) -> str: ...

    def get_added_vocab(self) -> dict[str, int]: ...


# --- What is asked of vLLM: plain functions ---------------------------------------------------


def engine_environment(
    config: EngineConfig, *, on_cpu: bool, ray_address: str = ""
) -> dict[str, str | None]:
    """Environment variables to set before `vllm` is imported; None: to unset.

    Args:
        ray_address: of the cluster this process is an actor of; "" if it is none.
    """
    environment: dict[str, str | None] = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A forked engine would not learn whose child it is (`EndsWithOwner`).
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if on_cpu:
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(config.cpu_threads),
            # It would win over the size in the engine arguments.
            "VLLM_CPU_KVCACHE_SPACE": None,
        }
        if config.enforce_eager is not False:
            environment["TORCHDYNAMO_DISABLE"] = "1"
    elif config.num_ranks > 1 and ray_address:
        # The engine core is a process of its own, which asks Ray for the actors of its ranks. vLLM
        # tells it where Ray is only if nobody chose how it is started.
        environment["RAY_ADDRESS"] = ray_address
    return environment


def engine_arguments(
    config: EngineConfig, info: ModelInfo, *, runner: Literal["generate", "pooling"], on_cpu: bool
) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs` for a checked checkpoint."""
    max_model_len = config.max_model_len or info.max_positions
    arguments: dict[str, Any] = {
        "model": info.path,
        "runner": runner,
        "dtype": serving_dtype(config, info, on_cpu=on_cpu),
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "enable_prefix_caching": True,
        "worker_extension_cls": "cluster.engines.worker_extension.EngineWorkerExtension",
        "disable_log_stats": True,
        "seed": config.seed,
        "additional_config": {"lifetime": EndsWithOwner()},
    }
    if config.block_size is not None:
        arguments["block_size"] = config.block_size
    if config.max_num_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = config.max_num_batched_tokens
    if on_cpu:
        arguments.setdefault("block_size", 32)
        arguments.setdefault("max_num_batched_tokens", max(4096, max_model_len))
        arguments["enable_chunked_prefill"] = False
        if runner == "generate":
            arguments["scheduler_cls"] = "cluster.engines.scheduler.WholeAnswers"
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        if config.num_ranks > 1:
            # Into the placement group this actor stands in (`cluster.fleet.actors`).
            arguments["distributed_executor_backend"] = "ray"
    return arguments | config.engine_args


def serving_dtype(config: EngineConfig, info: ModelInfo, *, on_cpu: bool) -> str:
    """Type to serve in. vLLM's own "auto" would turn float32 checkpoints into half precision."""
    if config.dtype != "auto":
        return config.dtype
    if info.dtype in _BYTES:
        return info.dtype
    return "float32" if on_cpu else "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopPlan:
    """How the stop strings of a request are watched for."""

    token_ids: tuple[int, ...]
    """By the engine core: strings that are one special token."""
    strings: tuple[str, ...]
    """By the detokenizer in the actor's process: all others."""


def plan_stops(stop: Sequence[str], special_tokens: Mapping[str, int]) -> StopPlan:
    """Split stop strings into token ids and texts.

    An ordinary token will not do: a newline may also come as part of a longer one.

    Args:
        special_tokens: text to id of the tokens that text is never merged into.
    """
    return StopPlan(
        token_ids=tuple(special_tokens[text] for text in stop if text in special_tokens),
        strings=tuple(text for text in stop if text not in special_tokens),
    )


def sampling_arguments(
    request: GenerationRequest, stops: StopPlan, *, room: int, logprobs: bool
) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`.

    Args:
        room: tokens left in the model's context behind the prompt, >= 1.
    """
    arguments: dict[str, Any] = {
        # Greedy candidates are all alike; vLLM refuses to write them more than once.
        "n": request.num_candidates if request.temperature > 0 else 1,
        "max_tokens": min(request.max_tokens, room),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(stops.strings),
        "stop_token_ids": list(stops.token_ids),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "detokenize": bool(stops.strings),
    }
    if logprobs:
        arguments["logprobs"] = 0
    return arguments


def decode_continuation(
    tokenizer: TextTokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]
) -> str:
    """Text of generated tokens as it continues the prompt, special tokens included.

    The last tokens of the prompt are decoded with them, because some decoders strip the blank
    before the first token they see.
    """
    before = list(prompt_ids[-4:])
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    whole = tokenizer.decode(before + list(token_ids), **options)
    return whole[len(tokenizer.decode(before, **options)) :]


def check_fingerprint(
    first: Sequence[float],
    second: Sequence[float],
    previous: Sequence[float] | None,
    *,
    reference: Sequence[float] | None,
    weights_differ: bool,
    tolerance: float,
) -> None:
    """Check what an engine says of fixed texts after it took new weights.

    Args:
        first, second: of two calls, the prefix cache emptied between them.
        previous: of the weights before; None: there were none.
        reference: what transformers says of them with the new weights; None: not asked.
        weights_differ: the files differ from those before.
        tolerance: largest difference two calls, or engine and reference, may show.
    Raises:
        EngineError: a number is not finite, the two calls disagree, nothing changed, or it is not
            what the reference says.
    """
    if not all(math.isfinite(number) for number in first):
        raise EngineError(f"new weights give numbers that are not finite: {list(first)}")
    apart = max(abs(a - b) for a, b in zip(first, second, strict=True))
    if apart > tolerance:
        raise EngineError(f"two calls with the same weights differ by {apart:.3g}")
    if weights_differ and previous is not None and list(first) == list(previous):
        raise EngineError("the weight files differ but the engine's output did not change")
    if reference is not None:
        apart = max(abs(a - b) for a, b in zip(first, reference, strict=True))
        if apart > tolerance:
            raise EngineError(f"the engine's output differs by {apart:.3g} from transformers'")


def weights_digest(path: str | Path) -> str:
    """Digest of names, sizes and samples of the weight files: other weights, other digest.

    Samples 64 blocks of 4 KiB a file, so that it costs the same for every model size.
    """
    digest = hashlib.sha256()
    root = Path(path)
    for file in sorted([*root.glob("*.safetensors"), *root.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(size * i // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()


class RequestGate:
    """Counts requests in flight and can hold new ones back until none is left."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._exclusive = asyncio.Lock()
        self._idle_s = 0.0
        self._idle_since_s = time.monotonic()

    def idle_from_now(self) -> None:
        """Start to count the time without a request anew."""
        self._idle_s, self._idle_since_s = 0.0, time.monotonic()

    def idle_s(self) -> float:
        """Seconds without a request in flight."""
        now_s = time.monotonic()
        return self._idle_s + (now_s - self._idle_since_s if not self.running else 0.0)

    @property
    def is_open(self) -> bool:
        """New requests pass."""
        return self._open.is_set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around one request; waits while somebody has the gate for himself."""
        self.waiting += 1
        began_s = time.monotonic()
        try:
            while not self.is_open:
                await self._open.wait()
        finally:
            self.waiting -= 1
        metrics.observe(metrics.ENGINE_WAIT, time.monotonic() - began_s)
        if not self.running:
            self._idle_s += time.monotonic() - self._idle_since_s
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle_since_s = time.monotonic()
                self._idle.set()

    @asynccontextmanager
    async def exclusive(self, timeout_s: float) -> AsyncIterator[None]:
        """Around what must not overlap with requests.

        Raises:
            TimeoutError: requests were still in flight after `timeout_s`; the gate is open again.
        """
        async with self._exclusive:
            self._open.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), timeout_s)
                yield
            finally:
                self._open.set()


# --- The replicas -----------------------------------------------------------------------------


class _Replica(Traced, ABC):
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
    ) -> None:
        """Remember what to serve; nothing is started or checked before `ready`.

        Args:
            path: checkpoint directory in Hugging Face format, tokenizer included.
            version: what replies shall carry while these weights are served.
            name: for logs and errors.
        """
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
        self._gauge: Any = None
        self._tokenizer: Any = None
        self._fingerprint: tuple[float, ...] = ()
        self._max_model_len = 0
        self._device = ""
        self._dtype = ""
        self._salt = _salt(self._version, 0)
        self._next_request = 0
        self._sequences = 0
        self._sequence_s = 0.0
        self._requests = 0
        self._failed = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._too_long = 0
        self._loads = 0
        self._load_s = 0.0

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
                reference = await asyncio.to_thread(self._reference, self._path, self._model)
                try:
                    await self._check_output(None, reference, weights_differ=True)
                except Exception as error:
                    self._fail(f"the engine started but cannot serve: {error}")
                    raise EngineError(f"{self._name}: {self._failure}") from error
                self._state = ReplicaState.READY
                self._gate.idle_from_now()
                self._info = self._describe(time.monotonic() - started)
                logger.info(
                    "Replica serves after %.1f s. replica=%s version=%s path=%s",
                    self._info.start_s,
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
        model = await asyncio.to_thread(self._check_model, path)
        self._check_loadable(model)
        differ = weights_digest(path) != weights_digest(self._path)
        reference = await asyncio.to_thread(self._reference, path, model)
        try:
            async with self._gate.exclusive(self._config.load_timeout_s):
                self._check_state()
                self._state = ReplicaState.LOADING
                await self._swap_weights(path, version, reference, differ)
                self._path, self._version, self._model = path, version, model
                logs.carry(**{self._version_id: version})
                self._state = ReplicaState.READY
        except TimeoutError as error:
            raise EngineError(
                f"{self._name}: requests still in flight after {self._config.load_timeout_s} s; "
                f"{version} was not loaded"
            ) from error
        seconds = time.monotonic() - started
        self._loads += 1
        self._load_s += seconds
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
        return ReplicaStats(
            name=self._name,
            version=self._version,
            healthy=self._state in (ReplicaState.READY, ReplicaState.LOADING)
            and not self._engine.errored,
            requests=self._requests,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            too_long=self._too_long,
            running_requests=self._gate.running,
            running_sequences=self._sequences,
            idle_s=self._gate.idle_s(),
            sequence_s=self._sequence_s,
            waiting_requests=self._gate.waiting,
            loads=self._loads,
            load_s=self._load_s,
            rss_bytes=_rss_bytes(),
        )

    async def pressure(self) -> EnginePressure | None:
        """How full the engine is; None before it has started."""
        return self._gauge.pressure() if self._gauge is not None else None

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

    def _start_engine(self) -> None:
        model = self._check_model(self._path)
        if self._config.num_ranks > 1 and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            # The GPUs are booked for the ranks, so Ray hides them all from this actor; the engine
            # has to see what kind they are.
            del os.environ["CUDA_VISIBLE_DEVICES"]
        on_cpu = not _has_gpu()
        environment = engine_environment(self._config, on_cpu=on_cpu, ray_address=_ray_address())
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._check_memory(model, on_cpu)
        arguments = engine_arguments(self._config, model, runner=self._runner, on_cpu=on_cpu)
        try:
            engine = self._make_engine(arguments)
        except Exception as error:
            self._fail(f"the engine did not start: {error}")
            raise EngineError(f"{self._name}: {self._failure} (path={self._path})") from error
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._model = model
        self._max_model_len = arguments["max_model_len"]
        self._device = "cpu" if on_cpu else "gpu"
        self._dtype = arguments["dtype"]

    def _describe(self, start_s: float) -> ReplicaInfo:
        return ReplicaInfo(
            name=self._name,
            version=self._version,
            path=self._path,
            device=self._device,
            max_model_len=self._max_model_len,
            dtype=self._dtype,
            pid=os.getpid(),
            start_s=start_s,
        )

    def _check_memory(self, model: ModelInfo, on_cpu: bool) -> None:
        bytes_per_weight = _BYTES[serving_dtype(self._config, model, on_cpu=on_cpu)]
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

    def _reference(self, path: str, model: ModelInfo) -> tuple[float, ...] | None:
        """What transformers says of the fixed texts; None where that is dear or not comparable."""
        if self._dtype != "float32" or model.weight_bytes > _MAX_REFERENCE_BYTES:
            return None
        return self._take_reference(path)

    async def _swap_weights(
        self, path: str, version: str, reference: tuple[float, ...] | None, weights_differ: bool
    ) -> None:
        self._salt = _salt(version, self._loads + 1)
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

    def _request_id(self) -> str:
        self._next_request += 1
        return f"{self._name}-{self._next_request}"

    def _engine_input(self, token_ids: list[int]) -> dict[str, Any]:
        """What vLLM's own renderer makes of token ids; given so, it does no work of its own.

        The salt keeps what other weights wrote into the prefix cache from ever being found.
        """
        return {"type": "token", "prompt_token_ids": token_ids, "cache_salt": self._salt}

    @asynccontextmanager
    async def _answering(self, num_sequences: int) -> AsyncIterator[None]:
        """Around one request: gate, deadline, counters, and errors under one name."""
        if self._state is ReplicaState.NEW:
            await self.ready()
        async with self._gate.request():
            self._check_state()
            self._sequences += num_sequences
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    yield
            except TimeoutError as error:
                self._failed += 1
                raise EngineError(
                    f"{self._name}: no answer within {self._config.request_timeout_s} s"
                ) from error
            except asyncio.CancelledError:
                self._failed += 1
                raise
            except Exception as error:
                self._failed += 1
                if self._engine is None or self._engine.errored:
                    self._fail("the engine process died")
                raise EngineError(f"{self._name}: {type(error).__name__}: {error}") from error
            finally:
                self._sequences -= num_sequences
                self._sequence_s += num_sequences * (time.monotonic() - began_s)
            self._requests += 1


class PolicyReplica(_Replica):
    """Serves a policy: `rollout.engine.PolicyEngine`."""

    _runner = "generate"
    _version_id = "policy_version"

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """Sample continuations; see `PolicyEngine`.

        A prompt without room for one token gets empty completions that say so; `max_tokens` is
        cut to the room there is. With a seed, a request gives the same text again, as far as
        floating-point sums in another batch allow.

        Raises:
            EngineError: the engine failed, or did not answer in time.
        """
        async with self._answering(request.num_candidates):
            return await self._generate(request)

    async def _generate(self, request: GenerationRequest) -> GenerationReply:
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

        prompt_ids = self._tokenizer.encode(request.prompt)
        room = self._max_model_len - len(prompt_ids)
        if room < 1:
            self._too_long += 1
            empty = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
            return GenerationReply(
                completions=(empty,) * request.num_candidates,
                prompt_tokens=len(prompt_ids),
                policy_version=self._version,
            )
        stops = plan_stops(request.stop, self._special_tokens())
        params = SamplingParams(
            **sampling_arguments(request, stops, room=room, logprobs=self._config.logprobs),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self._config.max_repeats is not None:
            params.repetition_detection = RepetitionDetectionParams(
                max_pattern_size=_REPEATED_TOKENS, min_count=self._config.max_repeats
            )
        output = await self._run(prompt_ids, params)
        completions = tuple(
            self._read(choice, request, prompt_ids, bool(stops.strings))
            for choice in sorted(output.outputs, key=lambda choice: choice.index)
        )
        cached = output.num_cached_tokens or 0
        self._prompt_tokens += len(prompt_ids)
        self._cached_tokens += cached
        self._generated_tokens += sum(completion.num_tokens for completion in completions)
        if len(completions) < request.num_candidates:
            completions *= request.num_candidates
        return GenerationReply(
            completions=completions,
            prompt_tokens=len(prompt_ids),
            cached_tokens=cached,
            policy_version=self._version,
        )

    def _read(
        self, choice: Any, request: GenerationRequest, prompt_ids: list[int], detokenized: bool
    ) -> Completion:
        if choice.finish_reason not in ("stop", "length", "repetition"):
            raise EngineError(f"completion ended by {choice.finish_reason!r}")
        token_ids = list(choice.token_ids)
        text = (
            choice.text
            if detokenized
            else decode_continuation(self._tokenizer, prompt_ids, token_ids)
        )
        stopped = choice.finish_reason == "stop"
        cut = text.endswith(request.stop) if request.stop else False
        completion = cut_completion(
            text,
            stop=request.stop,
            stopped=stopped,
            end_of_sequence=self._tokenizer.decode(token_ids[-1:], skip_special_tokens=False)
            if stopped and not cut
            else "",
            num_tokens=len(token_ids),
            logprob=choice.cumulative_logprob if self._config.logprobs else None,
        )
        if choice.finish_reason == "repetition" and completion.stop_string is None:
            return replace(completion, finish=FinishReason.REPETITION)
        return completion

    async def _run(self, prompt_ids: list[int], params: Any) -> Any:
        prompt = self._engine_input(prompt_ids)
        return await _only(self._engine.generate(prompt, params, self._request_id()))

    def _special_tokens(self) -> Mapping[str, int]:
        if self._added_tokens is None:
            self._added_tokens = dict(self._tokenizer.get_added_vocab())
        return self._added_tokens

    _added_tokens: dict[str, int] | None = None

    def _make_engine(self, arguments: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from cluster.engines.gauge import EngineGauge

        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[EngineGauge])
        assert engine.logger_manager is not None
        loggers = engine.logger_manager.stat_loggers
        self._gauge = next(gauge for gauge in loggers if isinstance(gauge, EngineGauge))
        return engine

    def _check_model(self, path: str) -> ModelInfo:
        return check_policy_checkpoint(path, markers=MARKERS if self._config.step_markers else ())

    async def _take_fingerprint(self) -> tuple[float, ...]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        numbers = []
        for text in _FINGERPRINT_TEXTS:
            prompt_ids = self._tokenizer.encode(text)[: self._max_model_len - 1]
            output = await self._run(prompt_ids, params)
            numbers += [
                entry[token].logprob
                for token, entry in zip(prompt_ids, output.prompt_logprobs, strict=True)
                if entry is not None
            ]
        return tuple(numbers)

    def _take_reference(self, path: str) -> tuple[float, ...]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        numbers: list[float] = []
        for text in _FINGERPRINT_TEXTS:
            ids = torch.tensor([self._tokenizer.encode(text)[: self._max_model_len - 1]])
            with torch.no_grad():
                logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            numbers += logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return tuple(numbers)


class PreferenceReplica(_Replica):
    """Serves a process preference model: `rollout.engine.PreferenceEngine`."""

    _runner = "pooling"
    _version_id = "ppm_version"

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        """Value each text in (-1, 1); see `PreferenceEngine`.

        A text longer than the model's context gets NaN: the value of a text the model was not
        shown whole would be of another text.

        Raises:
            EngineError: the engine failed, or did not answer in time.
        """
        async with self._answering(len(request.texts)):
            rows = [self._tokenizer.encode(text) for text in request.texts]
            values = await self._values(rows)
            num_tokens = sum(len(row) for row in rows)
            self._prompt_tokens += num_tokens
            return EvaluationReply(
                values=tuple(values), num_tokens=num_tokens, preference_version=self._version
            )

    async def _values(self, rows: Sequence[list[int]]) -> list[float]:
        fits = [0 < len(row) <= self._max_model_len for row in rows]
        self._too_long += fits.count(False)
        fitting = [row for row, fit in zip(rows, fits, strict=True) if fit]
        outputs, cached = await self._engine.outputs(fitting, self._salt)
        self._cached_tokens += cached
        found = iter(outputs)
        return [math.tanh(next(found)) if fit else math.nan for fit in fits]

    def _make_engine(self, arguments: dict[str, Any]) -> Any:
        return BatchEngine(arguments)

    def _check_model(self, path: str) -> ModelInfo:
        return check_preference_checkpoint(path)

    async def _take_fingerprint(self) -> tuple[float, ...]:
        rows = [self._tokenizer.encode(t)[: self._max_model_len] for t in _FINGERPRINT_TEXTS]
        return tuple(await self._values(rows))

    def _take_reference(self, path: str) -> tuple[float, ...]:
        from learner.preference_model import load_preference_model, values

        texts = [
            self._tokenizer.decode(self._tokenizer.encode(text)[: self._max_model_len])
            for text in _FINGERPRINT_TEXTS
        ]
        return tuple(values(load_preference_model(path), self._tokenizer, texts))


def _salt(version: str, loads: int) -> str:
    """Of the prefix cache: another one for each load, since a version may be loaded again."""
    return f"{version}#{loads}"


async def _only(outputs: AsyncIterator[Any]) -> Any:
    """The one output of a request that asked for the final one only."""
    last = None
    # To the end: leaving the loop early would abort the request once more.
    async for output in outputs:
        last = output
    if last is None:
        raise EngineError("the engine ended a request without an answer")
    return last


def _ray_address() -> str:
    """Of the cluster this process belongs to; "" if it belongs to none."""
    return ray.get_runtime_context().gcs_address if ray.is_initialized() else ""


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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


PolicyReplicaActor = ray.remote(PolicyReplica)
PreferenceReplicaActor = ray.remote(PreferenceReplica)
