"""Step markers for a base model that was trained elsewhere: one token each, added once.

A general model's tokenizer splits `<end_of_step>` into pieces. Before the first round the markers
it lacks are added as special tokens, its embeddings grow by as many rows (drawn around the mean of
the old ones, so that none is likely before it is trained), and both are saved together. Every later
checkpoint starts from that folder and so agrees with it.
"""

from __future__ import annotations

from pathlib import Path

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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if target.exists():
        return target
    tokenizer = AutoTokenizer.from_pretrained(source)
    missing = [m for m in MARKERS if len(tokenizer(m, add_special_tokens=False).input_ids) != 1]
    if not missing:
        return source
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    try:
        with new_folder(target) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except OSError:
        # Another process may have been faster: its folder serves as well.
        if not target.exists():
            raise
    return target
