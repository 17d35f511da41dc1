"""What a training run is asked and what it answers: records only, no torch.

    FitRequest (kind, base checkpoint, dataset directory, config) -> run_fit -> FitResult

Requests travel to a worker group on other machines, so everything in them is plain data and all
paths are on a file system both sides see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from learner.checkpoint import Checkpoint, Kind


class LearnerError(RuntimeError):
    """A training run could not be done; the message says why and what to change.

    Raised on every rank alike: the group that ran it is still whole.
    """


class RankError(LearnerError):
    """A rank failed alone: its peers wait inside a collective, so the group must be restarted."""


class GateConfig(BaseModel):
    """When a new checkpoint is not promoted: the one in service before stays.

    Both are judged on the same held-out examples. A loss that is not finite is always reason
    enough. Without an earlier checkpoint, or with too few examples, nothing is judged.

    The earlier policy wrote most of the held-out trajectories of its round and so has a low loss on
    them: a sound new one may have half as much again (0.8 to 1.6 times in four rounds of the
    miniature). The default ratio only stops what is broken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["hold", "warn", "off"] = Field(
        "hold", description="hold: the earlier checkpoint stays; warn: only say so; off: not judged"
    )
    max_loss_ratio: float = Field(
        3.0, gt=1.0, description="Policy: most held-out loss, relative to the earlier one's."
    )
    max_accuracy_drop: float = Field(
        0.1,
        gt=0.0,
        le=1.0,
        description="PPM: most held-out pair accuracy lost; it must also be over two standard "
        "errors.",
    )
    min_examples: int = Field(
        20, ge=1, description="Fewer held-out trajectories or pairs are not judged."
    )


class TrainConfig(BaseModel):
    """What both training runs share: budget, optimiser, precision, parallelism.

    Tokens of budgets (`total_tokens`, `batch_tokens`) are those of the texts, each counted whole;
    nothing is padded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_epochs: float = Field(
        1.0, gt=0.0, description="Passes over the data; ignored where total_tokens is set."
    )
    total_tokens: int | None = Field(
        None,
        ge=1,
        description="Stop after this many tokens over all ranks, repeating the data.",
    )
    batch_tokens: int | None = Field(
        None, ge=16, description="Most tokens in one optimiser step, over all ranks."
    )
    batch_examples: int | None = Field(
        None, ge=1, description="Most sequences (policy) or pairs (PPM) in one optimiser step."
    )
    micro_batch_tokens: int = Field(
        16384,
        ge=16,
        description="Tokens of one packed row, which is one forward pass of one rank; a shared "
        "prefix counts once, a longer example stands alone.",
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
        False,
        description="Keep optimiser states in host memory, where num_threads step them; needs ZeRO "
        "1 to 3.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU."
    )
    attention: Literal["auto", "sdpa", "flex", "flash"] = Field(
        "auto",
        description="auto: on a GPU variable-length FlashAttention, else FlexAttention; sdpa where "
        "neither runs, and on a CPU.",
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of each rank.")
    save_every_steps: int | None = Field(
        500,
        ge=1,
        description="Optimiser steps between states a fit that is cut off goes on from; null: it "
        "starts over.",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0.0,
        description="Peak TFLOP/s of one rank's device in the training precision, for the model "
        "FLOP/s utilisation; null: known GPUs by name, else unknown.",
    )
    gate: GateConfig = Field(
        default_factory=GateConfig, description="When the earlier checkpoint stays in service."
    )

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
        512,
        ge=1,
        description="Most preference pairs, or with q_regression steps, in one optimiser step; "
        "null: no limit.",
    )
    objective: Literal["pairwise", "q_regression", "outcome"] = Field(
        "pairwise",
        description="pairwise: Eq. 4; q_regression: squared distance of the value to the Q-value "
        "of every step that a rollout passed through (PQM); outcome: cross-entropy of whole "
        "trajectories being correct (ORM).",
    )
    loss_on: Literal["value", "logit"] = Field(
        "value",
        description="Pairwise only. value: r in Eq. 4 is tanh(logit), as in the paper; logit: "
        "logit_scale * logit, as in the released code.",
    )
    logit_scale: float = Field(
        1.0,
        gt=0.0,
        description="r / logit with loss_on = logit; 5 makes the served tanh(logit) the released "
        "tanh(r / 5).",
    )
    outcome_weight: float = Field(
        0.0,
        ge=0.0,
        description="Pairwise only. Weight of the cross-entropy of whole trajectories being "
        "correct, which objective outcome learns alone: pairs say which value is higher, this how "
        "high it is (weighted-majority).",
    )
    lm_weight: float = Field(
        0.0,
        ge=0.0,
        description="Weight of an auxiliary next-token loss on the chosen texts; q_regression: on "
        "steps with Q > 0.",
    )
    head_learning_rate: float | None = Field(
        None, gt=0.0, description="Peak learning rate of the scalar head; null: as the trunk."
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout in front of the head while training."
    )


PPM_PRESETS: Mapping[str, PreferenceTrainConfig] = {
    "paper": PreferenceTrainConfig(),
    "released": PreferenceTrainConfig(
        num_epochs=2.0,
        loss_on="logit",
        logit_scale=5.0,
        dropout=0.1,
        max_sequence_tokens=2048,
        weight_decay=0.0,
    ),
    "pqm": PreferenceTrainConfig(objective="q_regression"),
    "orm": PreferenceTrainConfig(objective="outcome"),
}
"""Named settings: the paper's, the released scripts', and the two heads it is compared with
(arXiv 2501.04519, Table 8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """One training run."""

    fit_id: str
    """Unique in a run, as `round=2/policy`; names it in logs and errors."""
    kind: Kind
    round: int
    """Round whose checkpoint this makes; 0 is the cold start."""
    base: str
    """Directory of the checkpoint to start from; for a PPM the language model that gives the
    trunk."""
    data: str
    """A dataset directory (`learner.dataset`)."""
    checkpoints: str
    """Root of the `CheckpointStore` to publish into."""
    config: PolicyTrainConfig | PreferenceTrainConfig
    seed: int = 0
    previous: str | None = None
    """Directory of the checkpoint of this kind in service, which stays there if the new one is
    clearly worse; None: there is none, or whatever is made is promoted."""
    force: bool = False
    """Promote what the gate would hold back."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Of what the paths above are copies, as they are named in records; empty: of nothing."""

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
    """Of what `phase` counts: steps, rows that are read, rows that are validated."""
    num_steps: int
    """0: not known."""
    phase: str = "training"
    """As it follows: "reading", "measuring", "training", "validating", "saving"."""
    loss: float | None = None
    """Of that step's global batch; None outside training, likewise below."""
    tokens_per_s: float | None = None
    """Tokens of the texts over all ranks, per second since the first step."""

    def facts(self) -> dict[str, str | float]:
        """For a progress view."""
        if self.phase != "training":
            return {"now": self.phase}
        return {"loss": self.loss or 0.0, "tokens/s": self.tokens_per_s or 0.0}

    grad_norm: float | None = None
    """Before clipping; None where it is not known."""
    mfu: float | None = None
    """Model FLOP/s over the devices' peak; None where the peak is not known."""


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
    computed_tokens: int
    """Tokens of all packed rows: a prefix that texts share once."""
    useful_tokens: int
    """Tokens of all texts, each counted whole."""
    loss_tokens: int
    """Tokens the next-token loss applied to; 0 for a PPM without auxiliary loss."""
    seconds_setup: float
    """Reading data and model, building the DeepSpeed engine."""
    seconds_train: float
    seconds_cpu: float
    """CPU seconds of this rank's process while it trained, in this attempt; far below
    `seconds_train` where it waited for a peer or a busy machine."""
    seconds_save: float
    left_out: Mapping[str, int]
    """Reason -> training examples: too_long (over max_sequence_tokens), empty (no token to train
    on), untokenisable (refused by the tokenizer)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """On the validation problems. Policy: loss, num_examples. PPM: pair_accuracy,
    pair_accuracy_{step,answer}, pair_margin, value_chosen, value_rejected, value_correct,
    value_incorrect, num_pairs, and calibration_error of values as chances of being correct.
    previous_*: the same of the checkpoint in service, where there is one."""
    calibration: tuple[tuple[float, float, float], ...] = ()
    """Held-out trajectories in ten equal bins of the chance (1 + value) / 2: how many, their mean
    chance, the share that is correct. Empty for a policy."""
    mean_grad_norm: float | None = None
    mfu: float | None = None
    """Model FLOP/s over the devices' peak; None where the peak is not known."""
    warnings: tuple[str, ...] = ()
    """What a person should look at, each beginning with a name: `loss_spike`, `not_finite`,
    `accuracy_at_chance`, `worse_than_previous`."""
    held: str | None = None
    """Why the new checkpoint was not promoted, so that `checkpoint` is the earlier one's; None: it
    was."""
    resumed_from: int = 0
    """Steps taken over from an attempt that was cut off."""

    @property
    def tokens_per_s(self) -> float:
        """Useful tokens per second over all ranks, set-up and saving excluded."""
        return self.useful_tokens / self.seconds_train if self.seconds_train else 0.0

    def as_record(self) -> dict[str, Any]:
        """Plain data without the checkpoint, which its store knows."""
        record = asdict(self)
        del record["checkpoint"]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any], checkpoint: Checkpoint) -> FitResult:
        """The inverse of `as_record`, after a way through JSON."""
        return TypeAdapter(cls).validate_python({**record, "checkpoint": checkpoint})
