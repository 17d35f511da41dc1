"""The parts of the replicas that need no engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
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
from cluster.engines.gate import RequestGate
from cluster.engines.model_check import (
    ModelCheckError,
    ModelInfo,
    check_fingerprint,
    weights_digest,
)
from cluster.engines.replica import PreferenceReplica
from rollout.engine import (
    EngineError,
    EvaluationRequest,
    GenerationRequest,
)
from rollout.prompt import END_OF_CODE, END_OF_STEP


def make_info(path: str = "model", **fields: Any) -> ModelInfo:
    known: dict[str, Any] = {
        "path": path,
        "architecture": "LlamaForSequenceClassification",
        "model_type": "llama",
        "dtype": "float32",
        "max_positions": 1024,
        "num_labels": 1,
        "weight_bytes": 4000,
        "kv_values_per_token": 256,
        "shape": "{}",
        "tokenizer_digest": "t",
    }
    return ModelInfo(**(known | fields))


# --- Configuration ----------------------------------------------------------------------------


def test_unknown_engine_key_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="kv_cache_gb"):
        EngineConfig.model_validate({"kv_cache_gb": 1})


def test_cpu_engine_gets_small_blocks_whole_prefills_and_a_fixed_cache() -> None:
    arguments = engine_arguments(
        EngineConfig(kv_cache_gib=0.5), make_info(), runner="generate", on_cpu=True
    )
    assert arguments["block_size"] == 32
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"] == 1024
    assert arguments["kv_cache_memory_bytes"] == 1 << 29
    assert arguments["enforce_eager"] is True
    assert "gpu_memory_utilization" not in arguments


def test_gpu_engine_keeps_the_defaults_of_vllm() -> None:
    arguments = engine_arguments(EngineConfig(), make_info(), runner="pooling", on_cpu=False)
    assert arguments["enforce_eager"] is False
    assert arguments["gpu_memory_utilization"] == 0.85
    assert {"block_size", "kv_cache_memory_bytes", "enable_chunked_prefill"}.isdisjoint(arguments)


def test_engine_of_several_gpus_is_run_by_ray_in_its_placement_group() -> None:
    config = EngineConfig(tensor_parallel_size=8, pipeline_parallel_size=2)
    arguments = engine_arguments(config, make_info(), runner="generate", on_cpu=False)
    assert config.num_ranks == 16
    assert arguments["tensor_parallel_size"] == 8
    assert arguments["pipeline_parallel_size"] == 2
    assert arguments["distributed_executor_backend"] == "ray"
    environment = engine_environment(config, on_cpu=False, ray_address="10.0.0.1:6379")
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"


def test_engine_of_one_gpu_leaves_ray_alone() -> None:
    config = EngineConfig()
    arguments = engine_arguments(config, make_info(), runner="generate", on_cpu=False)
    assert "distributed_executor_backend" not in arguments
    assert "RAY_ADDRESS" not in engine_environment(config, on_cpu=False, ray_address="here:1")


def test_a_whole_prompt_fits_in_one_step_on_cpu_however_long() -> None:
    info = make_info(max_positions=32768)
    arguments = engine_arguments(EngineConfig(), info, runner="generate", on_cpu=True)
    assert arguments["max_num_batched_tokens"] == 32768


def test_further_engine_arguments_win() -> None:
    config = EngineConfig(engine_args={"max_num_seqs": 7, "swap_space": 0})
    arguments = engine_arguments(config, make_info(), runner="generate", on_cpu=True)
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
    assert serving_dtype(config, make_info(dtype=saved), on_cpu=on_cpu) == served


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


# --- Loading weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "previous", "reference", "differ", "reason"),
    [
        (1.0, 1.0, 2.0, 1.0, True, None),
        (1.0, 1.0, 1.0, None, False, None),
        (math.nan, math.nan, None, None, True, "not finite"),
        (1.0, 1.5, None, None, True, r"two calls .* differ by 0\.5"),
        (1.0, 1.0, 1.0, None, True, "did not change"),
        (1.0, 1.0, 2.0, 1.25, True, r"differs by 0\.25 from transformers"),
    ],
)
def test_fingerprint_must_be_finite_repeatable_new_and_as_transformers_says(
    first: float,
    second: float,
    previous: float | None,
    reference: float | None,
    differ: bool,
    reason: str | None,
) -> None:
    def check() -> None:
        check_fingerprint(
            [first],
            [second],
            None if previous is None else [previous],
            reference=None if reference is None else [reference],
            weights_differ=differ,
            tolerance=1e-3,
        )

    if reason is None:
        check()
    else:
        with pytest.raises(EngineError, match=reason):
            check()


def test_weights_digest_sees_a_change_of_content_and_not_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 16))
    before = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"\1" + bytes((1 << 16) - 1))
    assert weights_digest(tmp_path) != before


async def test_gate_waits_for_running_requests_and_holds_new_ones_back() -> None:
    gate = RequestGate()
    events: list[str] = []
    first_may_end = asyncio.Event()

    async def request(name: str, end: asyncio.Event | None) -> None:
        async with gate.request():
            events.append(f"{name} in")
            if end is not None:
                await end.wait()
            events.append(f"{name} out")

    async def load() -> None:
        async with gate.exclusive(timeout_s=10):
            events.append("load")

    first = asyncio.create_task(request("first", first_may_end))
    await asyncio.sleep(0)
    loading = asyncio.create_task(load())
    await asyncio.sleep(0)
    second = asyncio.create_task(request("second", None))
    await asyncio.sleep(0)
    assert (gate.running, gate.waiting) == (1, 1)
    first_may_end.set()
    await asyncio.gather(first, loading, second)
    assert events == ["first in", "first out", "load", "second in", "second out"]
    assert (gate.running, gate.waiting) == (0, 0)


async def test_gate_opens_again_when_requests_do_not_end_in_time() -> None:
    gate = RequestGate()
    async with gate.request():
        with pytest.raises(TimeoutError):
            async with gate.exclusive(timeout_s=0.01):
                pass
        async with gate.request():
            assert gate.running == 2


# --- A replica around a scripted engine -------------------------------------------------------


class ScriptedEngine:
    """Remembers what it is told; `reload_weights` makes the named path's number its output."""

    def __init__(self, outputs: dict[str, float]) -> None:
        self.outputs = outputs
        self.output = 0.0
        self.errored = False
        self.told: list[str] = []

    async def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:
            self.told.append(method)
            return
        self.told.append(f"{method} {kwargs['weights_path']}")
        if kwargs["weights_path"] not in self.outputs:
            raise RuntimeError("no such weights")
        self.output = self.outputs[kwargs["weights_path"]]

    async def reset_prefix_cache(self) -> None:
        self.told.append("reset_prefix_cache")

    def shutdown(self) -> None:
        self.told.append("shutdown")


class ScriptedTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class ScriptedReplica(PreferenceReplica):
    """A preference replica whose engine answers with one number."""

    def __init__(self, engine: ScriptedEngine, config: EngineConfig | None = None) -> None:
        super().__init__("old", config, version="r0", name="ppm-0")
        self.scripted = engine
        self.answer = asyncio.Event()
        self.answer.set()
        self.shapes: dict[str, str] = {}
        self.references: dict[str, float] = {}
        self.salts: list[str] = []

    def _take_reference(self, path: str) -> tuple[float, ...]:
        return (self.references.get(path, self.scripted.outputs.get(path, 0.0)),) * 2

    def _start_engine(self) -> None:
        self._engine = self.scripted
        self._tokenizer = ScriptedTokenizer()
        self._model = self._check_model("old")
        self._max_model_len = 100
        self._device, self._dtype = "cpu", "float32"

    def _check_model(self, path: str) -> ModelInfo:
        return make_info(path, shape=self.shapes.get(path, "{}"))

    async def _values(self, rows: Sequence[list[int]]) -> list[float]:
        self.salts.append(self._salt)
        await self.answer.wait()
        return [self.scripted.output] * len(rows)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight files of the checkpoints "old" and "new", which differ."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        Path(name).mkdir()
        (Path(name) / "model.safetensors").write_bytes(name.encode())


async def test_load_swaps_weights_and_replies_carry_the_new_version(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    before = await replica.evaluate(EvaluationRequest(texts=("a", "b")))
    await replica.load("new", "r1")
    after = await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert (before.values, before.preference_version) == ((0.0, 0.0), "r0")
    assert (after.values, after.preference_version) == ((0.5,), "r1")
    told = replica.scripted.told
    assert told[told.index("reload_weights new") :] == [
        "reload_weights new",
        "repack_tied_head",
        "reset_prefix_cache",
        "reset_prefix_cache",
    ]
    stats = await replica.stats()
    assert (stats.version, stats.loads, stats.requests, stats.healthy) == ("r1", 1, 2, True)
    assert (await replica.ready()).version == "r1"


async def test_what_other_weights_left_in_the_prefix_cache_is_never_found(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5, "old": 0.0}))
    await replica.evaluate(EvaluationRequest(texts=("a",)))
    for path, version in (("new", "r1"), ("old", "r0"), ("new", "r1")):
        await replica.load(path, version)
        await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert len(dict.fromkeys(replica.salts)) == 4


async def test_time_without_a_request_is_counted_as_idle(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}))
    await replica.ready()
    replica.answer.clear()
    asked = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a", "b"))))
    await asyncio.sleep(0)
    before = (await replica.stats()).idle_s
    await asyncio.sleep(0.02)
    assert (await replica.stats()).idle_s == before
    replica.answer.set()
    await asked
    await asyncio.sleep(0.02)
    stats = await replica.stats()
    assert stats.idle_s >= before + 0.02
    assert stats.sequence_s >= 2 * 0.02


async def test_pressure_is_unknown_before_the_engine_has_started() -> None:
    assert await ScriptedReplica(ScriptedEngine({})).pressure() is None


async def test_request_in_flight_is_answered_by_the_weights_it_started_with(
    weights: None,
) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    await replica.ready()
    replica.answer.clear()
    early = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a",))))
    await asyncio.sleep(0)
    loading = asyncio.create_task(replica.load("new", "r1"))
    while replica._gate.is_open:
        await asyncio.sleep(0.001)
    late = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a",))))
    await asyncio.sleep(0)
    assert "reload_weights new" not in replica.scripted.told
    replica.answer.set()
    assert (await early).preference_version == "r0"
    assert (await late).preference_version == "r1"
    await loading


async def test_loading_what_is_served_does_nothing_unless_forced(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"old": 0.0}))
    assert await replica.load("old", "r0") == 0.0
    assert "reload_weights old" not in replica.scripted.told
    await replica.load("old", "r0", force=True)
    assert "reload_weights old" in replica.scripted.told


async def test_checkpoint_of_another_shape_is_refused_and_old_weights_serve_on(
    weights: None,
) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    replica.shapes = {"old": '{"hidden_size": 64}', "new": '{"hidden_size": 128}'}
    with pytest.raises(ModelCheckError, match="hidden_size: 64 served, 128 asked for"):
        await replica.load("new", "r1")
    reply = await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert reply.preference_version == "r0"


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({}, "no such weights"),
        ({"new": 0.0}, "did not change"),
        ({"new": math.nan}, "not finite"),
    ],
)
async def test_failed_load_makes_the_replica_refuse_requests(
    weights: None, outputs: dict[str, float], reason: str
) -> None:
    replica = ScriptedReplica(ScriptedEngine(outputs))
    with pytest.raises(EngineError, match=reason):
        await replica.load("new", "r1")
    with pytest.raises(EngineError, match=reason):
        await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert (await replica.stats()).healthy is False


async def test_engine_that_does_not_say_what_the_files_say_is_not_served(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    replica.references = {"new": 0.7}
    with pytest.raises(EngineError, match="from transformers"):
        await replica.load("new", "r1")
    with pytest.raises(EngineError, match="from transformers"):
        await replica.evaluate(EvaluationRequest(texts=("a",)))


async def test_load_gives_up_when_requests_do_not_end_and_old_weights_serve_on(
    weights: None,
) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}), EngineConfig(load_timeout_s=0.02))
    await replica.ready()
    replica.answer.clear()
    early = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a",))))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="still in flight"):
        await replica.load("new", "r1")
    replica.answer.set()
    assert (await early).preference_version == "r0"


async def test_request_over_its_deadline_is_an_engine_error(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}), EngineConfig(request_timeout_s=0.02))
    await replica.ready()
    replica.answer.clear()
    with pytest.raises(EngineError, match=r"no answer within 0\.02 s"):
        await replica.evaluate(EvaluationRequest(texts=("a",)))
    stats = await replica.stats()
    assert (stats.failed, stats.running_requests, stats.running_sequences) == (1, 0, 0)


async def test_replica_that_was_shut_down_refuses_requests(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}))
    await replica.ready()
    await replica.shutdown()
    assert replica.scripted.told[-1] == "shutdown"
    with pytest.raises(EngineError, match="shut down"):
        await replica.evaluate(EvaluationRequest(texts=("a",)))
