"""Floating-point operations of training, and the share of a device's peak they reach.

Model FLOP/s utilisation (MFU, as defined with PaLM, arXiv 2204.02311) counts what the model needs,
not what the program spends: three times the forward pass, activations recomputed not counted,
attention over the tokens that are seen only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

PEAK_TFLOPS = {
    "A100": 312.0,
    "A10G": 70.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.0,
}
"""Dense bfloat16 TFLOP/s from data sheets; the first name found in a device's counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounter:
    """FLOPs of a forward and backward pass of one model."""

    per_token: float
    per_attended: float
    """For each pair of a token and one it sees."""
    per_output: float
    """For each position whose next token is predicted."""

    def total(self, *, tokens: float, attended: float, outputs: float) -> float:
        """FLOPs of training on rows of so many tokens, attended pairs and predicted tokens."""
        return tokens * self.per_token + attended * self.per_attended + outputs * self.per_output


def flop_counter(model: Any) -> FlopCounter:
    """Count what a transformers model needs; a multiplication and an addition are two FLOPs."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    trunk = sum(
        parameter.numel()
        for name, parameter in model.base_model.named_parameters()
        if parameter.dim() > 1 and "embed" not in name
    )
    width = config.num_attention_heads * head_size
    return FlopCounter(
        per_token=6.0 * trunk,
        per_attended=12.0 * config.num_hidden_layers * width,
        per_output=6.0 * config.hidden_size * config.vocab_size,
    )


def peak_flops(device: torch.device, peak_tflops: float | None) -> float | None:
    """Peak FLOP/s of a rank's device; None where it is not known, as on a CPU."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
