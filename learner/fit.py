"""What a training run is asked and what it answers: records only, no torch.

    FitRequest (kind, base checkpoint, dataset directory, config) -> run_fit -> FitResult

Requests travel to a worker group on other machines, so everything in them is plain data and all
paths are on a file system both sides see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learner.checkpoint import Checkpoint, Kind


class LearnerError(RuntimeError):
    """A training run could not be done; the message says why and what to change.

    Raised on every rank alike: the group that ran it is still whole.
    """


class RankError(LearnerError):
    """A rank failed alone: its peers wait inside a collective, so the group must be restarted."""


class TrainConfig(BaseModel):
    """What both training runs share: budget, optimiser, precision, parallelism."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_epochs: float = Field(
        1.0, gt=0.0, description="Passes over the data; ignored where total_tokens is set."
    )
    total_tokens: int | None = Field(
        None,
        ge=1,
        description="Stop after this many padded tokens over all ranks, repeating the data.",
    )
    batch_tokens: int | None = Field(
        None, ge=16, description="Most padded tokens in one optimiser step, over all ranks."
    )
    batch_examples: int | None = Field(
        None, ge=1, description="Most sequences (policy) or pairs (PPM) in one optimiser step."
    )
    micro_batch_tokens: int = Field(
        16384, ge=16, description="Most padded tokens of one forward pass on one rank."
    )
    max_sequence_tokens: int = Field(
        4096, ge=8, description="Longer examples are left out and counted."
    )
    learning_rate: float = Field(7e-6, gt=0.0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after warm-up."
    )
    warmup_share: float = Field(0.0, ge=0.0, lt=1.0, description="Share of steps of warm-up.")
    final_share: float = Field(
        0.0, ge=0.0, le=1.0, description="Learning rate at the end, as a share of the peak."
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW moment decay rates.")
    weight_decay: float = Field(
        0.1, ge=0.0, description="AdamW weight decay of matrices; vectors have none."
    )
    clip_norm: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0 does not clip.")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage.")
    offload: bool = Field(
        False, description="Keep optimiser states in host memory; needs ZeRO 1 to 3."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU."
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of each rank.")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_tokens is None and self.batch_examples is None:
            raise ValueError("set batch_tokens, batch_examples or both")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage >= 1")
        return self


class PolicyTrainConfig(TrainConfig):
    """Supervised fine-tuning of the policy; defaults are the paper's (Appendix A.1)."""

    num_epochs: float = Field(
        2.0, gt=0.0, description=TrainConfig.model_fields["num_epochs"].description
    )
    batch_examples: int | None = Field(
        128, ge=1, description="Most sequences in one optimiser step; null: no limit."
    )


class PreferenceTrainConfig(TrainConfig):
    """Training of the process preference model; defaults are the paper's."""

    batch_examples: int | None = Field(
        512, ge=1, description="Most preference pairs in one optimiser step; null: no limit."
    )
    loss_on: Literal["value", "logit"] = Field(
        "value",
        description="value: r in Eq. 4 is tanh(logit), as in the paper; logit: the raw head "
        "output, as in the released code.",
    )
    lm_weight: float = Field(
        0.0, ge=0.0, description="Weight of an auxiliary next-token loss on the chosen texts."
    )
    head_learning_rate: float | None = Field(
        None, gt=0.0, description="Peak learning rate of the scalar head; null: as the trunk."
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout in front of the head while training."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """One training run."""

    fit_id: str
    """Unique in a run, as `round=2/policy`; names it in logs and errors."""
    kind: Kind
    round: int
    """Round whose checkpoint this makes; 0 is the cold start."""
    base: str
    """Directory of the checkpoint to start from; for a PPM the policy that gives the trunk."""
    data: str
    """Directory written by `learner.dataset.write_dataset`."""
    checkpoints: str
    """Root of the `CheckpointStore` to publish into."""
    config: PolicyTrainConfig | PreferenceTrainConfig
    seed: int = 0

    def __post_init__(self) -> None:
        expected = PolicyTrainConfig if self.kind == "policy" else PreferenceTrainConfig
        if type(self.config) is not expected:
            raise ValueError(
                f"fit {self.fit_id!r} of kind {self.kind!r} needs a {expected.__name__}, "
                f"got {type(self.config).__name__}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProgress:
    """Where a training run stands; from rank 0, about twice a second and after the last step."""

    fit_id: str
    step: int
    num_steps: int
    loss: float
    """Of that step's global batch."""
    tokens_per_s: float
    """Useful (unpadded) tokens over all ranks since the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a training run made and measured."""

    fit_id: str
    checkpoint: Checkpoint
    steps: int
    examples: int
    """Distinct sequences (policy) or pairs (PPM) it trained on."""
    epochs: float
    loss_curve: tuple[tuple[int, float], ...]
    """(step from 1, loss of that global batch), thinned to at most 500 points."""
    final_loss: float
    """Mean loss of the last 20 steps."""
    padded_tokens: int
    useful_tokens: int
    """Without padding."""
    loss_tokens: int
    """Tokens the next-token loss applied to; 0 for a PPM without auxiliary loss."""
    seconds_setup: float
    """Reading data and model, building the DeepSpeed engine."""
    seconds_train: float
    seconds_save: float
    skipped_long: int
    """Examples over max_sequence_tokens."""
    metrics: dict[str, float] = field(default_factory=dict)
    """On the validation problems. Policy: loss. PPM: pair_accuracy, pair_accuracy_{step,answer},
    pair_margin, value_chosen, value_rejected, value_correct, value_incorrect, num_pairs."""

    @property
    def tokens_per_s(self) -> float:
        """Useful tokens per second over all ranks, set-up and saving excluded."""
        return self.useful_tokens / self.seconds_train if self.seconds_train else 0.0
