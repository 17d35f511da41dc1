"""The two losses, as sums: the caller divides by what the whole global batch holds.

Sums make gradients exact under any split of a batch over ranks and micro-batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def next_token_loss(
    hidden: torch.Tensor,
    output_weight: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    output_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of -log p(target) in nats; logits are computed at the loss positions only.

    Args:
        hidden: [B, T, H] final hidden states.
        output_weight: [V, H] of the output embedding.
        positions: [P] into the flattened [B * T].
        targets: [P] token ids.
    """
    selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    logits = F.linear(selected, output_weight, output_bias)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def pairwise_loss(
    rewards: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum of -w log sigmoid(r(chosen) - r(rejected)).

    Source: rStar-Math (arXiv 2501.04519), Eq. 4, whose 1 / (2 x 2) is each pair's weight.

    Args:
        rewards: [B], one per text.
        chosen, rejected: [R] into B.
        weights: [R] >= 0.
    """
    difference = rewards.index_select(0, chosen) - rewards.index_select(0, rejected)
    return -(weights * F.logsigmoid(difference)).sum()
