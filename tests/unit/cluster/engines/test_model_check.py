"""Directories that can and cannot be served, and engines that serve something else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.model_check import (
    CPU_PROCESS_BYTES,
    GIB,
    ModelCheckError,
    available_memory_bytes,
    check_cpu_memory,
    check_fingerprint,
    check_gpu_memory,
    check_policy_checkpoint,
    check_preference_checkpoint,
    weights_digest,
)
from rollout.engine import EngineError
from rollout.prompt import END_OF_CODE, MARKERS, OUTPUT
from tests.models import write_byte_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


def write_model(path: Path, *, markers: tuple[str, ...] = MARKERS, **changes: Any) -> Path:
    """A directory that looks like a model; its weights are zeros."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    (path / "model.safetensors").write_bytes(bytes(1000))
    write_byte_tokenizer(path, markers=markers)
    return path


def test_policy_directory_is_described(tmp_path: Path) -> None:
    info = check_policy_checkpoint(write_model(tmp_path))
    assert info.architecture == "LlamaForCausalLM"
    assert (info.dtype, info.max_positions, info.weight_bytes) == ("float32", 512, 1000)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_architectures_of_the_paper_are_accepted(tmp_path: Path, model_type: str) -> None:
    name = {"llama": "Llama", "qwen2": "Qwen2", "phi3": "Phi3"}[model_type]
    path = write_model(
        tmp_path, model_type=model_type, architectures=[f"{name}ForCausalLM"], pad_token_id=0
    )
    assert check_policy_checkpoint(path).model_type == model_type


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove("config.json"), "no config.json"),
        (lambda path: (path / "config.json").write_text("[1"), "not a JSON object"),
        (remove("model.safetensors"), "no weights"),
        (remove("tokenizer.json"), "no tokenizer"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
            ),
            "incomplete: model.safetensors.index.json names model-2.safetensors",
        ),
    ],
)
def test_missing_part_is_named(tmp_path: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    spoil(write_model(tmp_path))
    with pytest.raises(ModelCheckError, match=reason) as raised:
        check_policy_checkpoint(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelCheckError, match="does not exist"):
        check_policy_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ModelCheckError, match="is a file"):
        check_policy_checkpoint(tmp_path / "file")


def test_unknown_architecture_names_its_type(tmp_path: Path) -> None:
    write_model(tmp_path, model_type="perceptron")
    with pytest.raises(ModelCheckError, match="'perceptron' is not known"):
        check_policy_checkpoint(tmp_path)


def test_markers_that_are_no_single_tokens_are_listed(tmp_path: Path) -> None:
    kept = tuple(m for m in MARKERS if m not in (OUTPUT, END_OF_CODE))
    write_model(tmp_path, markers=kept)
    with pytest.raises(ModelCheckError, match=f"markers {END_OF_CODE}, {OUTPUT} into"):
        check_policy_checkpoint(tmp_path)
    assert check_policy_checkpoint(tmp_path, markers=()).model_type == "llama"


def test_tokenizer_that_transformers_replaces_is_refused(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    write_model(tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocabulary = {text: i for text, i in saved.get_vocab().items() if text not in MARKERS}
    # Two digits are one token, which the pre-tokenizer of Qwen2 (one digit each) never gives.
    vocabulary["63"] = len(vocabulary)
    changed = Tokenizer(models.BPE(vocab=vocabulary, merges=[("6", "3")]))
    changed.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    changed.add_special_tokens(["<|endoftext|>", *MARKERS])
    changed.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"})
    )
    with pytest.raises(ModelCheckError, match="AutoTokenizer replaces the saved tokenizer"):
        check_policy_checkpoint(tmp_path)


def test_policy_and_preference_model_are_told_apart(tmp_path: Path) -> None:
    policy = write_model(tmp_path / "policy")
    ppm = write_model(
        tmp_path / "ppm",
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "value"},
        label2id={"value": 0},
    )
    assert check_preference_checkpoint(ppm).num_labels == 1
    with pytest.raises(ModelCheckError, match="no causal language model"):
        check_policy_checkpoint(ppm)
    with pytest.raises(ModelCheckError, match="no preference model"):
        check_preference_checkpoint(policy)


def test_equal_shape_and_tokenizer_mean_that_weights_can_be_swapped(tmp_path: Path) -> None:
    one = check_policy_checkpoint(write_model(tmp_path / "one", transformers_version="5.1"))
    same = check_policy_checkpoint(write_model(tmp_path / "same", transformers_version="5.2"))
    other = check_policy_checkpoint(write_model(tmp_path / "other", rope_theta=5e5))
    assert one.shape == same.shape != other.shape
    assert one.tokenizer_digest == same.tokenizer_digest


def test_too_little_memory_says_what_is_asked_and_what_is_there(tmp_path: Path) -> None:
    info = check_policy_checkpoint(write_model(tmp_path))
    needed = check_cpu_memory(info, bytes_per_weight=4, kv_cache_bytes=GIB, available_bytes=8 * GIB)
    assert needed == 1000 + GIB + CPU_PROCESS_BYTES
    with pytest.raises(ModelCheckError, match=r"needs 2\.5 GiB .* but 2\.0 GiB are available"):
        check_cpu_memory(info, bytes_per_weight=4, kv_cache_bytes=GIB, available_bytes=2 * GIB)


def test_weights_saved_in_float32_take_half_when_served_in_half_precision(
    tmp_path: Path,
) -> None:
    info = check_policy_checkpoint(write_model(tmp_path))
    served = check_cpu_memory(info, bytes_per_weight=2, kv_cache_bytes=0, available_bytes=GIB * 9)
    assert served == 500 + CPU_PROCESS_BYTES


def test_gpu_share_must_be_free_and_hold_the_weights(tmp_path: Path) -> None:
    info = check_policy_checkpoint(write_model(tmp_path))
    sizes: dict[str, Any] = {"bytes_per_weight": 4, "num_gpus": 1}
    assert (
        check_gpu_memory(info, utilization=0.5, free_bytes=6000, total_bytes=10000, **sizes) == 5000
    )
    with pytest.raises(ModelCheckError, match="lower gpu_memory_utilization"):
        check_gpu_memory(info, utilization=0.9, free_bytes=6000, total_bytes=10000, **sizes)
    with pytest.raises(ModelCheckError, match="tensor_parallel_size"):
        check_gpu_memory(info, utilization=0.05, free_bytes=6000, total_bytes=10000, **sizes)


def test_available_memory_is_a_positive_number_of_bytes() -> None:
    assert available_memory_bytes() > 1 << 20


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
