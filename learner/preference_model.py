"""The process preference model: a policy's trunk with a scalar head; one class trains and serves.

    value(text) = tanh(head(hidden state of the last token)), in (-1, 1)
    (arXiv 2501.04519 section 3.4.1)

On disk it is an ordinary one-label `...ForSequenceClassification` checkpoint with its tokenizer:
transformers loads it with `AutoModelForSequenceClassification`, vLLM with `runner="pooling"`, both
without conversion and both with the activation switched off, so that tanh is applied by whoever
asks (`values`, or the replica).

New heads start near zero, as in the released code, so that no pair is preferred at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HEAD_NAME = "score"


def new_preference_model(policy: str | Path, *, seed: int, dtype: torch.dtype) -> Any:
    """A PPM whose trunk is a checkpoint; of a policy, its head is new; of a PPM, both go on.

    Raises:
        ValueError: the architecture has no sequence-classification form in transformers.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(policy)
    config.num_labels = 1
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            policy, config=config, dtype=dtype
        )
    except ValueError as error:
        raise ValueError(
            f"{config.model_type!r} of {policy} has no sequence-classification form: {error}"
        ) from error
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return model
    generator = torch.Generator().manual_seed(seed)
    head = getattr(model, HEAD_NAME)
    with torch.no_grad():
        # Drawn in float32 and on the CPU: the same head for every precision and device.
        weight = torch.empty(head.weight.shape, dtype=torch.float32)
        head.weight.copy_(weight.normal_(0.0, 1e-3, generator=generator))
    return model


def load_preference_model(path: str | Path) -> Any:
    """A saved PPM in float32, in evaluation mode."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def values(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 32
) -> list[float]:
    """Values of partial solutions, each in (-1, 1), order kept.

    The plain form of what a replica serves, for tests and small evaluations.
    """
    found: list[float] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(texts), batch_size):
        rows = [tokenizer(text).input_ids for text in texts[start : start + batch_size]]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False)[0]
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = getattr(model, HEAD_NAME)(hidden[torch.arange(len(rows)), last])
        found += torch.tanh(logits.float()).squeeze(-1).tolist()
    return found
