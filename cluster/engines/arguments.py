"""What is asked of vLLM, and how its tokens become text: plain functions over plain data.

The same code serves GPUs and vLLM's CPU build; what differs is in `engine_environment`,
`engine_arguments` and where a policy's engine core runs (`async_engine`). What the CPU build (0.32)
needs, all measured on 2 cores with a 0.6 M-parameter model:
- engine core and worker in one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): start 10 s, not 33 s;
- no chunked prefill: a seeded request whose prefill is split kills the engine ("CPU Generator does
  not use offset");
- no torch.compile for helper functions: the first request with log-probabilities waits 18 s;
- an explicit cache size, or it takes a share of the whole machine; block size 32, or short prompts
  share nothing.

Stop strings that are one special token of the tokenizer are handed to the engine core as token
ids, so that it stops by itself; text is then decoded once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster.engines.config import EngineConfig
from cluster.engines.model_check import GIB, ModelInfo
from cluster.engines.process import EndsWithOwner
from rollout.engine import GenerationRequest

CPU_MAX_NUM_SEQS = 256
"""Sequences in one batch on a CPU, where the config says nothing."""


class TextTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], **kwargs: Any) -> str: ...

    def get_added_vocab(self) -> dict[str, int]: ...


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
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "enable_prefix_caching": True,
        "worker_extension_cls": "cluster.engines.worker_extension.EngineWorkerExtension",
        "disable_log_stats": True,
        "seed": config.seed,
        "additional_config": {"lifetime": EndsWithOwner()},
    }
    # Where nothing is said vLLM chooses by the card: an H100 takes four times what a CPU does.
    for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
        if (given := getattr(config, name)) is not None:
            arguments[name] = given
    if on_cpu:
        arguments.setdefault("block_size", 32)
        arguments.setdefault("max_num_seqs", CPU_MAX_NUM_SEQS)
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
    if info.dtype in ("float32", "bfloat16", "float16"):
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
