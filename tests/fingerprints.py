"""What a policy says of fixed texts, by transformers, with weights as a test wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.engines.replica import _FINGERPRINT_TEXTS


def load_policy(path: Path, *, dtype: str = "float32", attention: str = "sdpa") -> Any:
    """A causal language model in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()


def with_noisy_layer(model: Any, share: float) -> Any:
    """The model after noise was added to its middle layer, of so many of its own deviations."""
    import torch

    torch.manual_seed(0)
    layers = model.model.layers
    with torch.no_grad():
        for parameter in layers[len(layers) // 2].parameters():
            if parameter.dim() > 1:
                parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return model


def fingerprint(model: Any, path: Path) -> tuple[float, ...]:
    """Log-probabilities of the tokens of the fixed texts.

    Args:
        path: folder with the tokenizer.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    numbers: list[float] = []
    for text in _FINGERPRINT_TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        numbers += logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return tuple(numbers)
