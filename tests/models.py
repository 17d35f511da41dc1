"""Small random checkpoints on disk, for tests of whatever reads checkpoints.

Each is a real Hugging Face directory of one of the architectures a policy may have (Qwen2, Llama,
Phi-3), with a byte-level tokenizer that holds the step markers. The weights are random: such a
model writes noise, but the same noise in every engine, which is what the tests compare.

The tokenizer has no merges and one token per byte, so that no pre-tokenizer, not even one that a
library substitutes, can change the ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cluster.engines.model_check import ModelInfo
from rollout.prompt import MARKERS

Architecture = Literal["llama", "qwen2", "phi3"]

END_OF_TEXT = "<|endoftext|>"


def write_byte_tokenizer(path: Path, *, markers: tuple[str, ...] = MARKERS) -> int:
    """Save a byte-level tokenizer with `markers` as special tokens; returns the vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: i for i, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, *markers])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(markers),
    )
    fast.save_pretrained(path)
    return len(fast)


def write_tiny_policy(
    path: Path,
    *,
    architecture: Architecture = "llama",
    seed: int = 0,
    markers: tuple[str, ...] = MARKERS,
    max_positions: int = 512,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = False,
) -> Path:
    """A random causal language model with tokenizer in `path`, float32; returns `path`."""
    import torch

    path.mkdir(parents=True, exist_ok=True)
    vocab_size = write_byte_tokenizer(path, markers=markers)
    torch.manual_seed(seed)
    config = _config(architecture, vocab_size, max_positions, hidden, layers)
    config.tie_word_embeddings = tied
    model = _policy_class(architecture)(config)
    # The default initialisation (0.02) ties nearly every logit; larger weights make a greedy
    # path that two correct implementations must agree on.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    model.float().save_pretrained(path)
    return path


def write_tiny_ppm(
    path: Path,
    *,
    seed: int = 0,
    max_positions: int = 512,
    hidden: int = 64,
    layers: int = 2,
) -> Path:
    """A random one-label Llama sequence classifier with tokenizer in `path`; returns `path`."""
    import torch
    from transformers import LlamaForSequenceClassification

    path.mkdir(parents=True, exist_ok=True)
    vocab_size = write_byte_tokenizer(path)
    torch.manual_seed(seed)
    config = _config("llama", vocab_size, max_positions, hidden, layers)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    model.float().save_pretrained(path)
    return path


def _policy_class(architecture: Architecture) -> Any:
    from transformers import LlamaForCausalLM, Phi3ForCausalLM, Qwen2ForCausalLM

    return {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "phi3": Phi3ForCausalLM}[
        architecture
    ]


def _config(
    architecture: Architecture, vocab_size: int, max_positions: int, hidden: int, layers: int
) -> Any:
    from transformers import LlamaConfig, Phi3Config, Qwen2Config

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": max_positions,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if architecture == "llama":
        return LlamaConfig(**shape, attention_bias=True)
    if architecture == "qwen2":
        return Qwen2Config(**shape)
    return Phi3Config(**shape, original_max_position_embeddings=max_positions)


def make_model_info(path: str = "model", **fields: Any) -> ModelInfo:
    """What the check of a small preference model would find, but for `fields`."""
    known: dict[str, Any] = {
        "path": path,
        "architecture": "LlamaForSequenceClassification",
        "model_type": "llama",
        "dtype": "float32",
        "max_positions": 1024,
        "num_labels": 1,
        "weight_bytes": 4000,
        "shape": "{}",
        "tokenizer_digest": "t",
    }
    return ModelInfo(**(known | fields))
