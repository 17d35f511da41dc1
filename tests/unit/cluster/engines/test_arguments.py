"""What is asked of vLLM, and text out of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.engines.arguments import (
    StopPlan,
    decode_continuation,
    engine_arguments,
    engine_environment,
    plan_stops,
    sampling_arguments,
    serving_dtype,
)
from cluster.engines.config import EngineConfig
from rollout.engine import GenerationRequest
from rollout.prompt import END_OF_CODE, END_OF_STEP
from tests.models import make_model_info


def test_unknown_engine_key_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="kv_cache_gb"):
        EngineConfig.model_validate({"kv_cache_gb": 1})


def test_cpu_engine_gets_small_blocks_whole_prefills_and_a_fixed_cache() -> None:
    arguments = engine_arguments(
        EngineConfig(kv_cache_gib=0.5), make_model_info(), runner="generate", on_cpu=True
    )
    assert arguments["block_size"] == 32
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"] == 1024
    assert arguments["max_num_seqs"] == 256
    assert arguments["kv_cache_memory_bytes"] == 1 << 29
    assert arguments["enforce_eager"] is True
    assert "gpu_memory_utilization" not in arguments


def test_gpu_engine_keeps_the_defaults_of_vllm() -> None:
    arguments = engine_arguments(EngineConfig(), make_model_info(), runner="pooling", on_cpu=False)
    assert arguments["enforce_eager"] is False
    assert arguments["gpu_memory_utilization"] == 0.85
    left_to_vllm = {"block_size", "max_num_seqs", "max_num_batched_tokens"}
    of_cpu = {"kv_cache_memory_bytes", "enable_chunked_prefill", "scheduler_cls"}
    assert (left_to_vllm | of_cpu).isdisjoint(arguments)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_batches_are_as_large_as_the_config_says(on_cpu: bool) -> None:
    config = EngineConfig(max_num_seqs=7, max_num_batched_tokens=5000)
    arguments = engine_arguments(config, make_model_info(), runner="generate", on_cpu=on_cpu)
    assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (7, 5000)


def test_engine_of_several_gpus_is_run_by_ray_in_its_placement_group() -> None:
    config = EngineConfig(tensor_parallel_size=8, pipeline_parallel_size=2)
    arguments = engine_arguments(config, make_model_info(), runner="generate", on_cpu=False)
    assert config.num_ranks == 16
    assert arguments["tensor_parallel_size"] == 8
    assert arguments["pipeline_parallel_size"] == 2
    assert arguments["distributed_executor_backend"] == "ray"
    environment = engine_environment(config, on_cpu=False, ray_address="10.0.0.1:6379")
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"


def test_engine_of_one_gpu_leaves_ray_alone() -> None:
    config = EngineConfig()
    arguments = engine_arguments(config, make_model_info(), runner="generate", on_cpu=False)
    assert "distributed_executor_backend" not in arguments
    assert "RAY_ADDRESS" not in engine_environment(config, on_cpu=False, ray_address="here:1")


def test_a_whole_prompt_fits_in_one_step_on_cpu_however_long() -> None:
    info = make_model_info(max_positions=32768)
    arguments = engine_arguments(EngineConfig(), info, runner="generate", on_cpu=True)
    assert arguments["max_num_batched_tokens"] == 32768


def test_further_engine_arguments_win() -> None:
    config = EngineConfig(engine_args={"max_num_seqs": 7, "swap_space": 0})
    arguments = engine_arguments(config, make_model_info(), runner="generate", on_cpu=True)
    assert arguments["max_num_seqs"] == 7
    assert arguments["swap_space"] == 0


@pytest.mark.parametrize(
    ("asked", "saved", "on_cpu", "served"),
    [
        ("auto", "float32", True, "float32"),
        ("auto", "float32", False, "float32"),
        ("auto", "bfloat16", False, "bfloat16"),
        ("auto", "", True, "float32"),
        ("auto", "", False, "bfloat16"),
        ("float16", "float32", False, "float16"),
    ],
)
def test_auto_type_is_the_one_the_checkpoint_was_saved_in(
    asked: Any, saved: str, on_cpu: bool, served: str
) -> None:
    config = EngineConfig(dtype=asked)
    assert serving_dtype(config, make_model_info(dtype=saved), on_cpu=on_cpu) == served


def test_cache_size_of_the_environment_is_unset_on_cpu_and_left_alone_on_gpu() -> None:
    assert engine_environment(EngineConfig(), on_cpu=True)["VLLM_CPU_KVCACHE_SPACE"] is None
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environment(EngineConfig(), on_cpu=False)


# --- Requests and completions -----------------------------------------------------------------


def test_only_special_tokens_are_stopped_at_by_id() -> None:
    stops = plan_stops(("\n", END_OF_STEP, "def"), {END_OF_STEP: 260, END_OF_CODE: 261})
    assert stops == StopPlan(token_ids=(260,), strings=("\n", "def"))


def test_text_is_followed_token_by_token_only_for_stop_strings() -> None:
    request = GenerationRequest(prompt="p", num_candidates=4, max_tokens=64, seed=3, top_p=0.9)
    by_id = sampling_arguments(
        request, StopPlan(token_ids=(260,), strings=()), room=1000, logprobs=False
    )
    assert by_id["detokenize"] is False
    assert (by_id["n"], by_id["seed"], by_id["top_p"]) == (4, 3, 0.9)
    assert by_id["stop_token_ids"] == [260]
    by_text = sampling_arguments(
        request, StopPlan(token_ids=(), strings=("x",)), room=1000, logprobs=True
    )
    assert by_text["detokenize"] is True
    assert by_text["logprobs"] == 0


def test_max_tokens_is_cut_to_the_room_left() -> None:
    request = GenerationRequest(prompt="p", num_candidates=1, max_tokens=64)
    stops = StopPlan(token_ids=(), strings=())
    assert sampling_arguments(request, stops, room=9, logprobs=False)["max_tokens"] == 9
    assert sampling_arguments(request, stops, room=64, logprobs=False)["max_tokens"] == 64


def test_greedy_candidates_are_written_once() -> None:
    request = GenerationRequest(prompt="p", num_candidates=8, max_tokens=4, temperature=0.0)
    stops = StopPlan(token_ids=(), strings=())
    assert sampling_arguments(request, stops, room=9, logprobs=False)["n"] == 1


class StrippingTokenizer:
    """Words as ids; like some decoders it drops the blank before the first word."""

    words = ("<|assistant|>", " one", " two", " three")

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return "".join(self.words[i] for i in token_ids).lstrip(" ")

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|assistant|>": 0}


def test_continuation_keeps_the_blank_its_first_token_brings() -> None:
    assert decode_continuation(StrippingTokenizer(), [1, 1, 1, 1, 1], [2, 3]) == " two three"
    assert decode_continuation(StrippingTokenizer(), [0], [2]) == " two"
