"""Step markers for a base model that was trained elsewhere: one token each, added once.

A general model's tokenizer splits `<end_of_step>` into pieces. Before the first round the markers
it lacks are added as special tokens, its embeddings grow by as many rows, and both are saved
together. Every later checkpoint starts from that folder and so agrees with it.

The row of a marker is the mean of those of its pieces. Where it is drawn around the mean of all
rows, as is usual, a fit of a few dozen steps learns everything but to write a marker
(docs/pretrained.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout.files import new_folder
from rollout.prompt import MARKERS


def with_markers(source: Path, target: Path) -> Path:
    """A model directory whose tokenizer holds every marker as one token.

    Args:
        source: Hugging Face directory of a causal language model.
        target: written, whole or not at all, if `source` lacks a marker; used as it is if there.
    Returns:
        `source` if it lacks none, else `target`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if target.exists():
        return target
    tokenizer = AutoTokenizer.from_pretrained(source)
    missing = [m for m in MARKERS if len(tokenizer(m, add_special_tokens=False).input_ids) != 1]
    if not missing:
        return source
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    pieces = [tokenizer(marker, add_special_tokens=False).input_ids for marker in missing]
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    added = tokenizer.convert_tokens_to_ids(missing)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in layers:
        rows = layer.weight.data  # of a tied model the same, twice
        means = [rows[ids].float().mean(0).to(rows.dtype) for ids in pieces]
        rows[added] = torch.stack(means)
    try:
        with new_folder(target) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except OSError:
        # Another process may have been faster: its folder serves as well.
        if not target.exists():
            raise
    return target
