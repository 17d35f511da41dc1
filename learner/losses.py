"""The losses, as sums: the caller divides by what the whole global batch holds.

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


def value_regression_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum of w (tanh(logit) - Q)^2: the head predicts the Q-value itself (PQM).

    Source: the ablation of rStar-Math (arXiv 2501.04519), Table 8.

    Args:
        logits: [B], one per text.
        targets: [B] Q-values in [-1, 1].
        weights: [B] >= 0.
    """
    return (weights * (torch.tanh(logits) - targets) ** 2).sum()


def outcome_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum of w times the cross-entropy of a trajectory being correct (ORM).

    The chance is (1 + tanh(logit)) / 2 = sigmoid(2 logit), so the value that is served is twice
    the chance less one.

    Args:
        logits: [B], one per text.
        targets: [B], 1 for correct and -1 for incorrect.
        weights: [B] >= 0.
    """
    losses = F.binary_cross_entropy_with_logits(
        2.0 * logits, (1.0 + targets) / 2.0, reduction="none"
    )
    return (weights * losses).sum()
