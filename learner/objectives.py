"""The two models with their losses as forward pass, over packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from learner.attention import Backend, use_packed_attention
from learner.batch import PolicyBatch, PreferenceBatch
from learner.fit import PreferenceTrainConfig
from learner.losses import (
    next_token_loss,
    outcome_loss,
    pairwise_loss,
    value_regression_loss,
)
from learner.preference_model import HEAD_NAME


class PolicyObjective(torch.nn.Module):
    """A causal language model with the next-token loss as its forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.backend: Backend = "sdpa"
        use_packed_attention(model)

    def forward(self, batch: PolicyBatch) -> torch.Tensor:
        """Sum of the next-token loss over the row's loss positions."""
        hidden = _hidden(self.model, batch, self.backend)
        head = self.model.get_output_embeddings()
        return next_token_loss(hidden, head.weight, batch.positions, batch.targets, head.bias)


class PreferenceObjective(torch.nn.Module):
    """A PPM with the loss of its objective as its forward pass."""

    def __init__(
        self, model: Any, config: PreferenceTrainConfig, lm_head: torch.nn.Module | None = None
    ) -> None:
        """
        Args:
            lm_head: reads out the auxiliary loss and is trained with it, but not saved; None: the
                trunk's input embedding does, as in a policy that ties the two.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.lm_head = lm_head
        self.backend: Backend = "sdpa"
        use_packed_attention(model)

    def logits(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] head outputs at the last tokens, and the [1, T, hidden] states."""
        hidden = _hidden(self.model, batch, self.backend)
        last = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.last)
        last = torch.nn.functional.dropout(last, self.config.dropout, self.training)
        return getattr(self.model, HEAD_NAME)(last).float().squeeze(-1), hidden

    def forward(self, batch: PreferenceBatch, lm_scale: float = 0.0) -> torch.Tensor:
        """Sum of the objective's loss, plus `lm_scale` times the sum of the auxiliary loss.

        The [B] values are returned instead in evaluation mode.
        """
        logits, hidden = self.logits(batch)
        if not self.training:
            return torch.tanh(logits)
        config = self.config
        if config.objective == "q_regression":
            loss = value_regression_loss(logits, batch.value_targets, batch.text_weights)
        elif config.objective == "outcome":
            loss = outcome_loss(logits, batch.value_targets, batch.text_weights)
        else:
            rewards = torch.tanh(logits)
            if config.loss_on == "logit":
                rewards = config.logit_scale * logits
            loss = pairwise_loss(rewards, batch.chosen, batch.rejected, batch.weights)
            if config.outcome_weight:
                whole = outcome_loss(logits, batch.value_targets, batch.outcome_weights)
                loss = loss + config.outcome_weight * whole
        if lm_scale:
            head: Any = self.lm_head or self.model.get_input_embeddings()
            auxiliary = next_token_loss(
                hidden, head.weight, batch.positions, batch.targets, getattr(head, "bias", None)
            )
            loss = loss + lm_scale * auxiliary
        return loss


def untied_output(policy: str | Path) -> torch.nn.Module | None:
    """The output layer of a policy checkpoint, float32; None if it is the input embedding.

    Raises:
        ValueError: the checkpoint has none, as a PPM's.
    """
    from transformers import AutoModelForCausalLM

    # With its loading info, of which the stubs know nothing, it is a pair.
    found: Any = AutoModelForCausalLM.from_pretrained(
        policy, dtype=torch.float32, output_loading_info=True
    )
    model, loaded = found
    head = model.get_output_embeddings()
    if loaded["missing_keys"]:
        raise ValueError(f"{policy} has no output layer, which lm_weight trains with")
    return None if head.weight is model.get_input_embeddings().weight else head


def _hidden(model: Any, batch: PolicyBatch, backend: Backend) -> torch.Tensor:
    """[1, T, hidden] final hidden states of a packed row."""
    return model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        layout=batch.layout,
        backend=backend,
    )[0]
