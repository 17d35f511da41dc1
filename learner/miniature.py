"""A base model and tokenizer small enough to be trained on a CPU: the miniature's starting point.

**It stands in for a pretrained base model.** A real run starts from a checkpoint that already
knows how to copy a number from the question into a program; a 0.46 M-parameter transformer with
ordinary random weights does not learn that within a few hundred steps. `write_base_model`
therefore writes a *structured* initialisation, fixed and free of data: attention heads start as
previous-token, induction and copy heads. Precedent: "mimetic initialisation" (Trockman and Kolter,
arXiv 2305.09828) and induction heads (Olsson et al., arXiv 2209.11895). Nothing else of the
product knows of it: what is written is an ordinary Hugging Face checkpoint directory.

    layer 0, head h    attends to position t - (h+1) (query and key biases, turned by RoPE) and
                       writes that token's identity into fresh directions
    layer 1, head 0    looks for positions whose previous token is the current one (induction)
    layers >= 1        value and output maps are transposes of each other, so a head writes the
                       embedding of the token it attends to; tied output makes that a logit

The checkpoint is `LlamaForCausalLM` with `attention_bias=True`, in float32. Both matter: for
`model_type: qwen2` transformers replaces the saved tokenizer by its own without a warning, and in
bfloat16 a model this small confuses digits.

The tokenizer is a byte-level BPE made for copying: numbers are cut left to right into pairs of
digits, every pair and digit is one token, and no number token carries a space, so a number reads
the same in prose and in code.

Not covered: a tokenizer for languages other than the miniature's (any text round-trips, but in
many tokens), weights for a layout other than Llama's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rollout.prompt import MARKERS

END_OF_TEXT = "<|endoftext|>"
"""Follows <end_of_answer> in training; ends a generation."""

PADDING = "<|padding|>"

ROPE_THETA = 1_000_000.0

DIGIT_TOKENS = tuple(str(number) for number in range(100)) + tuple(f"0{n}" for n in range(10))
"""What a number is made of: 0..99 and 00..09."""

_WORD = r"[\p{L}_]+"
_SPLIT_PATTERN = "|".join(
    (
        r"\n?# Step (?=[0-9])",
        # A word before a number takes the space between them, so that the number has none.
        rf" ?{_WORD} (?=[0-9])",
        rf" ?{_WORD}",
        r"[0-9]{1,2}",
        r" ?[-+*/%=<>^]+ ?",
        r"\n",
        r"[^\S\n]+",
        r"[^\s\p{L}0-9_]",
    )
)

_SLOW_FREQUENCY = 0.02
"""Rotary pairs slower than this (radians a position) hardly turn within one example."""


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = 1280) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the step markers as special tokens of one token each.

    Args:
        texts: what merges are learned from; few texts give fewer than `vocab_size` tokens.
        vocab_size: upper bound; 256 bytes, the special tokens and `DIGIT_TOKENS` are always in.
    Raises:
        ValueError: `vocab_size` leaves no room for `DIGIT_TOKENS`, or no text was given.
    """
    corpus = list(texts)
    if not corpus:
        raise ValueError("build_tokenizer needs at least one text to learn merges from")
    special = [END_OF_TEXT, PADDING, *MARKERS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Merges are taken by frequency: once per text puts every pair of digits before rare words.
    tokenizer.train_from_iterator([*corpus, *[" ".join(DIGIT_TOKENS)] * len(corpus)], trainer)
    missing = [token for token in DIGIT_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room for {len(missing)} number tokens "
            f"(first: {missing[0]!r}); raise it"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        extra_special_tokens=list(MARKERS),
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def structured_initialisation(model: LlamaForCausalLM, *, seed: int) -> None:
    """Overwrite the weights of `model` by the structured initialisation (module docstring).

    Args:
        model: tied embeddings, attention biases, at least two layers, RoPE in the half-split
            layout of Hugging Face with `ROPE_THETA`.
        seed: decides every random number; the global generator is not touched.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    num_heads = config.num_attention_heads
    num_kv = config.num_key_value_heads or num_heads
    head_dim = hidden // num_heads
    half = head_dim // 2
    group = num_heads // num_kv
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2).float() / head_dim)  # [head_dim / 2]

    def orthonormal_rows() -> torch.Tensor:  # [num_kv * head_dim, hidden]
        noise = torch.randn(hidden, num_kv * head_dim, generator=generator)
        return torch.linalg.qr(noise)[0].t().contiguous()

    def rows_of(kv_head: int) -> slice:
        return slice(kv_head * head_dim, (kv_head + 1) * head_dim)

    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, hidden**-0.5, generator=generator)
        model.model.norm.weight.fill_(1.0)
        first_values = first_outputs = torch.empty(0)
        for index, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
            for projection in (attention.q_proj, attention.k_proj, mlp.gate_proj, mlp.up_proj):
                projection.weight.normal_(0, hidden**-0.5, generator=generator)
            mlp.down_proj.weight.normal_(0, 0.3 * inner**-0.5, generator=generator)
            for projection in (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.o_proj,
            ):
                projection.bias.zero_()
            values = orthonormal_rows()
            if index == 0:
                outputs = orthonormal_rows()
                attention.v_proj.weight.copy_(0.4 * values)
                attention.q_proj.weight.mul_(0.1)
                attention.k_proj.weight.mul_(0.1)
                for head in range(num_heads):
                    kv = head // group
                    # Heads that share values write them into different directions.
                    target = outputs if head % group == 0 else orthonormal_rows()
                    attention.o_proj.weight[:, rows_of(head)] = 0.4 * target[rows_of(kv)].t()
                    bias = attention.q_proj.bias[rows_of(head)]
                    bias[:half] = 6 * torch.cos((head + 1) * frequency)
                    bias[half:] = -6 * torch.sin((head + 1) * frequency)
                for kv in range(num_kv):
                    attention.k_proj.bias[rows_of(kv)][:half] = 6.0
                first_values, first_outputs = values, outputs
                continue
            attention.v_proj.weight.copy_(values)
            for head in range(num_heads):
                kv = head // group
                attention.o_proj.weight[:, rows_of(head)] = values[rows_of(kv)].t()
            if index == 1:
                slow = (frequency < _SLOW_FREQUENCY).float()
                mask = torch.cat([slow, slow])[:, None]
                attention.q_proj.weight[:head_dim] = 1.6 * mask * first_values[:head_dim]
                attention.k_proj.weight[:head_dim] = 1.6 * mask * first_outputs[:head_dim]


def write_base_model(
    directory: str | os.PathLike[str],
    *,
    seed: int,
    texts: Iterable[str],
    vocab_size: int = 1280,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 1024,
) -> Path:
    """Write a Hugging Face checkpoint (float32) with its tokenizer; returns the directory.

    The weights stand in for a pretrained base model (module docstring).

    Args:
        texts: what the tokenizer is built from: problems and written solutions, never the
            held-out set.
        vocab_size: upper bound of the vocabulary.
        intermediate_size: width of the gated MLP; None takes twice `hidden_size`.
    Raises:
        ValueError: sizes that do not divide, fewer than two layers, or as `build_tokenizer`.
    """
    if num_layers < 2:
        raise ValueError(f"num_layers must be >= 2 (induction spans two layers), got {num_layers}")
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size must be a multiple of 2 * num_heads = {2 * num_heads}, got {hidden_size}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}"
        )
    tokenizer = build_tokenizer(texts, vocab_size=vocab_size)
    tokenizer.model_max_length = max_position_embeddings
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    structured_initialisation(model, seed=seed)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
