"""The training loop: one fit, on one rank of a group, with torch and DeepSpeed.

    FitRequest -> read, tokenise, plan (the same on every rank)
               -> DeepSpeed engine over PolicyObjective | PreferenceObjective
               -> steps -> validation -> rank 0 publishes a Hugging Face checkpoint

Every rank plans all steps from the same data and seed and computes its own share of each, so
nothing is negotiated while training. Losses are sums divided by what the *global* batch holds;
with DeepSpeed's averaging over ranks undone, the gradient does not depend on how a batch was split.
The run is a function of request and seed: same ranks, same threads, same losses.

Faults: what every rank sees alike (bad data, a loss that is not finite) raises `LearnerError` on
all of them, and the group stays usable. What one rank meets alone (out of memory, a dead peer)
leaves the others inside a collective; the group must be restarted, which is its owner's part.

Not covered: resuming inside a fit (a restarted fit begins at its first step), and models that do
not fit into the host memory of one rank while they are loaded.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from learner.batch import (
    PairGroup,
    PlannedStep,
    PolicyBatch,
    PreferenceBatch,
    Share,
    TokenisedText,
    check_markers,
    collate_policy,
    collate_preference,
    padded_tokens,
    plan_batches,
    tokenise_pairs,
    tokenise_segments,
)
from learner.checkpoint import Checkpoint, CheckpointStore, Kind, write_prompt_template
from learner.dataset import DatasetError, read_manifest, read_pairs, read_sft
from learner.fit import (
    FitProgress,
    FitRequest,
    FitResult,
    LearnerError,
    PolicyTrainConfig,
    PreferenceTrainConfig,
    RankError,
    TrainConfig,
)
from learner.losses import next_token_loss, pairwise_loss
from learner.pairs import PairKind
from learner.preference_model import HEAD_NAME, new_preference_model

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.5
_CURVE_POINTS = 500
_FINAL_STEPS = 20

ProgressCallback = Callable[[FitProgress], None]


class PolicyObjective(torch.nn.Module):
    """A causal language model with the next-token loss as its forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PolicyBatch) -> torch.Tensor:
        """Sum of the next-token loss over the batch's loss positions."""
        hidden = self.model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        return next_token_loss(hidden, head.weight, batch.positions, batch.targets, head.bias)


class PreferenceObjective(torch.nn.Module):
    """A PPM with the pairwise loss as its forward pass."""

    def __init__(self, model: Any, config: PreferenceTrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def logits(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] head outputs at the last tokens, and the [B, T, H] hidden states."""
        hidden = self.model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        last = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.last)
        last = torch.nn.functional.dropout(last, self.config.dropout, self.training)
        return getattr(self.model, HEAD_NAME)(last).float().squeeze(-1), hidden

    def forward(self, batch: PreferenceBatch, lm_scale: float = 0.0) -> torch.Tensor:
        """Sum of the pairwise loss, plus `lm_scale` times the sum of the auxiliary loss.

        The [B] values are returned instead in evaluation mode.
        """
        logits, hidden = self.logits(batch)
        if not self.training:
            return torch.tanh(logits)
        rewards = torch.tanh(logits) if self.config.loss_on == "value" else logits
        loss = pairwise_loss(rewards, batch.chosen, batch.rejected, batch.weights)
        if lm_scale:
            # The trunk's input embedding reads out the auxiliary loss: the classification form
            # has no language-model head, and the policies it is meant for tie the two.
            embedding = self.model.get_input_embeddings().weight
            loss = loss + lm_scale * next_token_loss(
                hidden, embedding, batch.positions, batch.targets
            )
        return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """The data of a fit, tokenised: policy and PPM differ only here and in their objective."""

    lengths: list[int]
    counts: list[int]
    rows: list[int]
    collate: Callable[[Share], PolicyBatch | PreferenceBatch]
    denominator: Callable[[PlannedStep], float]
    """What the loss sum of a global batch is divided by."""
    useful: list[int]
    """Unpadded tokens of each example."""
    trained: list[int]
    """Tokens of each example with a next-token loss."""
    skipped_long: int


def run_fit(
    request: FitRequest,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: ProgressCallback | None = None,
) -> FitResult:
    """Run one training run to its published checkpoint; every rank calls it and gets the result.

    With `world_size` > 1 the caller has set up torch.distributed; alone, a group of one is made.

    Args:
        progress: called on rank 0 about twice a second and at the last step.
    Raises:
        LearnerError: bad data or model, or a loss that is not finite; alike on all ranks.
        RankError: this rank failed alone.
    """
    started = time.perf_counter()
    _ensure_group(rank, world_size)
    torch.set_num_threads(request.config.num_threads)
    torch.manual_seed(request.seed)
    try:
        problem, prepared = None, None
        try:
            prepared = _prepare(request)
        except (DatasetError, LearnerError, OSError, ValueError) as error:
            problem = str(error)
        _agree(problem, request)
        assert prepared is not None
        return _train(request, prepared, rank, world_size, progress, started)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RankError(_out_of_memory(request, rank, error)) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise RankError(_out_of_memory(request, rank, error)) from error
        raise


def train_policy(
    base: str | Path,
    data: str | Path,
    checkpoints: str | Path,
    *,
    config: PolicyTrainConfig,
    round: int = 0,
    seed: int = 0,
    fit: Callable[[FitRequest], FitResult] = run_fit,
) -> FitResult:
    """Fine-tune a policy on a dataset directory, outside of an evolution run.

    Args:
        base: Hugging Face directory to start from.
        data: what `learner.dataset.write_dataset` wrote.
        fit: `run_fit` trains in this process; `LearnerGroup.fit` on a group of ranks.
    Raises:
        LearnerError: the run could not be done.
    """
    return fit(_request("policy", base, data, checkpoints, config, round, seed))


def train_ppm(
    policy: str | Path,
    data: str | Path,
    checkpoints: str | Path,
    *,
    config: PreferenceTrainConfig,
    round: int = 0,
    seed: int = 0,
    fit: Callable[[FitRequest], FitResult] = run_fit,
) -> FitResult:
    """Train a PPM on a dataset directory, outside of an evolution run; as `train_policy`.

    Args:
        policy: Hugging Face directory of the policy that gives the trunk.
    """
    return fit(_request("ppm", policy, data, checkpoints, config, round, seed))


def _request(
    kind: Kind,
    base: str | Path,
    data: str | Path,
    checkpoints: str | Path,
    config: PolicyTrainConfig | PreferenceTrainConfig,
    round: int,
    seed: int,
) -> FitRequest:
    return FitRequest(
        fit_id=f"round={round}/{kind}",
        kind=kind,
        round=round,
        base=str(base),
        data=str(data),
        checkpoints=str(checkpoints),
        config=config,
        seed=seed,
    )


def warm_up() -> None:
    """Load the libraries a fit needs, so that the first one does not wait for them.

    torch.distributed must be initialised.
    """
    _import_deepspeed()
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


@dataclass(slots=True, kw_only=True)
class _Prepared:
    """A fit's data and model before the engine exists."""

    tokenizer: Any
    objective: PolicyObjective | PreferenceObjective
    train: _Task
    validation: _Task
    groups: list[PairGroup]
    """Validation groups of a PPM; empty for a policy."""


def _prepare(request: FitRequest) -> _Prepared:
    """Read, tokenise and load. Raises LearnerError, DatasetError, OSError or ValueError."""
    from transformers import AutoTokenizer

    config = request.config
    if not (Path(request.base) / "config.json").is_file():
        raise LearnerError(f"no checkpoint in {request.base} (config.json is missing)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.base)
    except (OSError, ValueError) as error:
        raise LearnerError(f"no tokenizer in checkpoint {request.base}: {error}") from error
    check_markers(tokenizer, where=request.base)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id
    dtype = _dtype(config)
    groups: list[PairGroup] = []
    model: Any
    with _quiet_loading():
        if isinstance(config, PolicyTrainConfig):
            train, validation = (
                _policy_task(tokenizer, request, split, pad_id) for split in ("train", "validation")
            )
            model = _load_policy(request.base)
            objective: PolicyObjective | PreferenceObjective = PolicyObjective(model)
        else:
            train, _ = _preference_task(tokenizer, request, "train", pad_id)
            validation, groups = _preference_task(tokenizer, request, "validation", pad_id)
            model = new_preference_model(request.base, seed=request.seed, dtype=torch.float32)
            objective = PreferenceObjective(model, config)
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise LearnerError(
            f"checkpoint {request.base} does not fit its tokenizer: {len(tokenizer)} tokens, "
            f"{vocabulary} embeddings"
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(dtype=dtype)
    return _Prepared(
        tokenizer=tokenizer,
        objective=objective,
        train=train,
        validation=validation,
        groups=groups,
    )


def _load_policy(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _policy_task(tokenizer: Any, request: FitRequest, split: str, pad_id: int) -> _Task:
    config = request.config
    examples = read_sft(request.data, split)
    texts = [tokenise_segments(tokenizer, example.segments) for example in examples]
    kept: list[TokenisedText] = [t for t in texts if t.length <= config.max_sequence_tokens]
    if split == "train" and not kept:
        raise LearnerError(_nothing_to_train(request, "trajectories", len(texts)))
    trained = [text.num_trained for text in kept]
    return _Task(
        lengths=[text.length for text in kept],
        counts=[1] * len(kept),
        rows=[1] * len(kept),
        collate=lambda share: collate_policy(
            [kept[e] for e in share.examples], pad_id=pad_id, filler=share.filler
        ),
        denominator=lambda step: float(max(sum(trained[e] for e in step.examples), 1)),
        useful=[text.length for text in kept],
        trained=trained,
        skipped_long=len(texts) - len(kept),
    )


def _preference_task(
    tokenizer: Any, request: FitRequest, split: str, pad_id: int
) -> tuple[_Task, list[PairGroup]]:
    config = request.config
    assert isinstance(config, PreferenceTrainConfig)
    groups = tokenise_pairs(tokenizer, read_pairs(request.data, split))
    kept = [group for group in groups if group.length <= config.max_sequence_tokens]
    if split == "train" and not kept:
        raise LearnerError(_nothing_to_train(request, "preference pairs", len(groups)))
    weights = [sum(group.weights) for group in kept]
    auxiliary = config.lm_weight > 0.0
    task = _Task(
        lengths=[group.length for group in kept],
        counts=[len(group.weights) for group in kept],
        rows=[len(group.texts) for group in kept],
        collate=lambda share: collate_preference(
            [kept[e] for e in share.examples], pad_id=pad_id, filler=share.filler
        ),
        denominator=lambda step: sum(weights[e] for e in step.examples) or 1.0,
        useful=[sum(text.length for text in group.texts) for group in kept],
        trained=[
            sum(text.num_trained for text in group.texts) if auxiliary else 0 for group in kept
        ],
        skipped_long=len(groups) - len(kept),
    )
    return task, kept


def _train(
    request: FitRequest,
    prepared: _Prepared,
    rank: int,
    world_size: int,
    progress: ProgressCallback | None,
    started: float,
) -> FitResult:
    config, task = request.config, prepared.train
    steps = plan_fit(task, config, world_size=world_size, seed=request.seed)
    engine, optimizer = _make_engine(prepared.objective, config, world_size)
    device = engine.device
    seconds_setup = time.perf_counter() - started
    losses: list[float] = []
    useful = 0
    begun = reported = time.perf_counter()
    try:
        engine.train()
        for number, step in enumerate(steps):
            _set_learning_rate(optimizer, learning_rate_share(number, len(steps), config))
            losses.append(_step(engine, task, step, config, rank, world_size, device))
            if not math.isfinite(losses[-1]):
                raise LearnerError(
                    f"fit {request.fit_id!r}: loss is {losses[-1]} at step {number + 1} of "
                    f"{len(steps)}; lower learning_rate ({config.learning_rate}) or clip_norm "
                    f"({config.clip_norm}), or check the base checkpoint {request.base}"
                )
            engine.step()
            useful += sum(task.useful[e] for e in step.examples)
            now = time.perf_counter()
            last = number + 1 == len(steps)
            if (
                progress is not None
                and rank == 0
                and (last or now - reported > _PROGRESS_INTERVAL_S)
            ):
                reported = now
                progress(
                    FitProgress(
                        fit_id=request.fit_id,
                        step=number + 1,
                        num_steps=len(steps),
                        loss=losses[-1],
                        tokens_per_s=useful / (now - begun),
                    )
                )
        seconds_train = time.perf_counter() - begun
        metrics = _validate(engine, prepared, config, rank, world_size, device)
        saving = time.perf_counter()
        info = {
            "fit": request.fit_id,
            "base": request.base,
            "config": config.model_dump(mode="json"),
            "seed": request.seed,
            "data_digest": (read_manifest(request.data) or {}).get("digest"),
            "final_loss": _mean(losses[-_FINAL_STEPS:]),
            "metrics": metrics,
        }
        checkpoint = _publish(request, prepared, engine, info, rank)
    finally:
        engine.destroy()
    return FitResult(
        fit_id=request.fit_id,
        checkpoint=checkpoint,
        steps=len(steps),
        examples=sum(task.counts),
        epochs=sum(len(step.examples) for step in steps) / len(task.lengths),
        loss_curve=_thin(losses),
        final_loss=_mean(losses[-_FINAL_STEPS:]),
        padded_tokens=sum(padded_tokens(step, task.lengths, task.rows) for step in steps),
        useful_tokens=useful,
        loss_tokens=sum(task.trained[e] for step in steps for e in step.examples),
        seconds_setup=seconds_setup,
        seconds_train=seconds_train,
        seconds_save=time.perf_counter() - saving,
        skipped_long=task.skipped_long,
        metrics=metrics,
    )


def plan_fit(task: _Task, config: TrainConfig, *, world_size: int, seed: int) -> list[PlannedStep]:
    """All steps of a fit: `total_tokens` padded tokens, or `num_epochs` passes."""
    steps: list[PlannedStep] = []
    tokens = epoch = 0
    while True:
        one_pass = plan_batches(
            task.lengths,
            task.counts,
            rows=task.rows,
            max_tokens=config.batch_tokens,
            max_examples=config.batch_examples,
            micro_tokens=config.micro_batch_tokens,
            world_size=world_size,
            rng=random.Random(f"{seed}:{epoch}"),
        )
        if config.total_tokens is None:
            left = config.num_epochs - epoch
            steps += one_pass[: math.ceil(len(one_pass) * min(left, 1.0))]
            if left <= 1.0:
                return steps
        else:
            for step in one_pass:
                steps.append(step)
                tokens += padded_tokens(step, task.lengths, task.rows)
                if tokens >= config.total_tokens:
                    return steps
        epoch += 1


def learning_rate_share(step: int, num_steps: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0) as a share of the peak."""
    warmup = math.ceil(config.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(num_steps - warmup, 1)
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_share + (1.0 - config.final_share) * left


def _step(
    engine: Any,
    task: _Task,
    step: PlannedStep,
    config: TrainConfig,
    rank: int,
    world_size: int,
    device: torch.device,
) -> float:
    """Forward and backward of one global batch; its loss, the same on every rank."""
    scale = 1.0 / task.denominator(step)
    auxiliary = getattr(config, "lm_weight", 0.0)
    if auxiliary:
        tokens = max(sum(task.trained[e] for e in step.examples), 1)
        auxiliary = auxiliary / tokens / scale
    total = torch.zeros((), device=device)
    for number, shares in enumerate(step.micro):
        batch = task.collate(shares[rank]).to(device)
        engine.set_gradient_accumulation_boundary(number + 1 == len(step.micro))
        loss = engine(batch, auxiliary) if auxiliary else engine(batch)
        loss = loss * scale
        total += loss.detach()
        # DeepSpeed averages gradients over the ranks; the loss is already a share of the whole.
        engine.backward(loss * world_size)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total)


def _make_engine(
    objective: torch.nn.Module, config: TrainConfig, world_size: int
) -> tuple[Any, torch.optim.Optimizer]:
    deepspeed = _import_deepspeed()
    optimizer = torch.optim.AdamW(
        _parameter_groups(objective, config),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )
    with _quiet_loading():
        engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(config, world_size, bfloat16=_dtype(config) == torch.bfloat16),
            dist_init_required=False,
        )
    return engine, optimizer


def deepspeed_config(config: TrainConfig, world_size: int, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's settings; batches are counted by us, so it sees one sample per step and rank."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _parameter_groups(objective: torch.nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without, the PPM's head with its own learning rate."""
    head_rate = getattr(config, "head_learning_rate", None) or config.learning_rate
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        rate = head_rate if name.startswith(f"model.{HEAD_NAME}.") else config.learning_rate
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


@torch.no_grad()
def _validate(
    engine: Any,
    prepared: _Prepared,
    config: TrainConfig,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Metrics on the held-out problems; empty if there are none."""
    task = prepared.validation
    if not task.lengths:
        return {}
    engine.eval()
    steps = plan_batches(
        task.lengths,
        task.counts,
        rows=task.rows,
        max_tokens=config.micro_batch_tokens * world_size,
        max_examples=None,
        micro_tokens=config.micro_batch_tokens,
        world_size=world_size,
        rng=None,
    )
    sums = torch.zeros(len(_PAIR_SUMS), dtype=torch.float64)
    for step in steps:
        for shares in step.micro:
            output = engine(task.collate(shares[rank]).to(device))
            if shares[rank].filler:
                continue
            if prepared.groups:
                members = [prepared.groups[e] for e in shares[rank].examples]
                sums += _pair_sums(members, output.float().tolist())
            else:
                sums[0] += float(output)
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    if not prepared.groups:
        tokens = max(sum(task.trained), 1)
        return {"loss": float(sums[0]) / tokens, "num_examples": float(len(task.lengths))}
    return _pair_metrics(dict(zip(_PAIR_SUMS, sums.tolist(), strict=True)))


_PAIR_SUMS = (
    "pairs",
    "right",
    "pairs_step",
    "right_step",
    "pairs_answer",
    "right_answer",
    "margin",
    "chosen",
    "rejected",
    "num_correct",
    "correct",
    "num_incorrect",
    "incorrect",
)


def _pair_sums(groups: Sequence[PairGroup], values: Sequence[float]) -> torch.Tensor:
    """Sums over the pairs of some groups, in the order of `_PAIR_SUMS`; a tie is half right."""
    sums = dict.fromkeys(_PAIR_SUMS, 0.0)
    base = 0
    for group in groups:
        for chosen, rejected in zip(group.chosen, group.rejected, strict=True):
            better, worse = values[base + chosen], values[base + rejected]
            right = 0.5 if better == worse else float(better > worse)
            sums["pairs"] += 1
            sums["right"] += right
            sums[f"pairs_{group.kind.value}"] += 1
            sums[f"right_{group.kind.value}"] += right
            sums["margin"] += better - worse
            sums["chosen"] += better
            sums["rejected"] += worse
        if group.kind is PairKind.ANSWER:
            for name, members in (("correct", group.chosen), ("incorrect", group.rejected)):
                for text in set(members):
                    sums[f"num_{name}"] += 1
                    sums[name] += values[base + text]
        base += len(group.texts)
    return torch.tensor([sums[name] for name in _PAIR_SUMS], dtype=torch.float64)


def _pair_metrics(sums: dict[str, float]) -> dict[str, float]:
    metrics = {"num_pairs": sums["pairs"]}
    for name, top, bottom in (
        ("pair_accuracy", "right", "pairs"),
        ("pair_accuracy_step", "right_step", "pairs_step"),
        ("pair_accuracy_answer", "right_answer", "pairs_answer"),
        ("pair_margin", "margin", "pairs"),
        ("value_chosen", "chosen", "pairs"),
        ("value_rejected", "rejected", "pairs"),
        ("value_correct", "correct", "num_correct"),
        ("value_incorrect", "incorrect", "num_incorrect"),
    ):
        if sums[bottom]:
            metrics[name] = sums[top] / sums[bottom]
    return metrics


def _publish(
    request: FitRequest, prepared: _Prepared, engine: Any, info: dict[str, Any], rank: int
) -> Checkpoint:
    """Rank 0 writes and publishes; all ranks get the checkpoint, or the same error."""
    state = _gathered_state(engine.module.model, request.config, rank)
    outcome: list[Any] = [None]
    if rank == 0:
        template = (read_manifest(request.data) or {}).get("template")

        def write(directory: Path) -> None:
            with _quiet_loading():
                engine.module.model.save_pretrained(directory, state_dict=state)
                prepared.tokenizer.save_pretrained(directory)
            if template is not None:
                write_prompt_template(directory, template)

        try:
            store = CheckpointStore(request.checkpoints)
            outcome[0] = store.publish(request.kind, request.round, write, info)
        except Exception as error:
            outcome[0] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise LearnerError(
            f"fit {request.fit_id!r}: checkpoint not published: {outcome[0]}"
        ) from outcome[0]
    return outcome[0]


def _gathered_state(model: Any, config: TrainConfig, rank: int) -> dict[str, torch.Tensor]:
    """Whole weights on the host of rank 0 (empty elsewhere); tied weights once."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if config.zero_stage == 3:
            deepspeed = _import_deepspeed()
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        elif rank == 0:
            state[name] = parameter.detach().cpu().contiguous()
    if rank == 0:
        kept = model.state_dict().keys()
        state |= {n: b.detach().cpu() for n, b in model.named_buffers() if n in kept}
    return state


def _ensure_group(rank: int, world_size: int) -> None:
    """Join the caller's process group, or make one of a single rank."""
    if not dist.is_initialized():
        if world_size != 1:
            raise LearnerError(f"{world_size} ranks need an initialised torch.distributed group")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != world_size or dist.get_rank() != rank:
        raise LearnerError(
            f"rank {rank} of {world_size} asked, torch.distributed says "
            f"{dist.get_rank()} of {dist.get_world_size()}"
        )
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ.setdefault(name, str(value))


def _import_deepspeed() -> Any:
    """DeepSpeed, told which accelerator to use and to compile nothing on a CPU.

    On a CPU its first communication backend would build a shared-memory all-reduce in C++ (about
    40 s and a C++ compiler). Gloo carries what a CPU learner sends, so the operator is entered as
    not compatible in the table DeepSpeed asks before building.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    if not on_gpu:
        table = vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        table["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed


def _agree(problem: str | None, request: FitRequest) -> None:
    """Raise on every rank if any rank could not prepare."""
    problems: list[str | None] = [problem]
    if dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise LearnerError(f"fit {request.fit_id!r}: {first}")


def _dtype(config: TrainConfig) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def _nothing_to_train(request: FitRequest, what: str, num_read: int) -> str:
    if num_read:
        return (
            f"all {num_read} {what} in {request.data} are longer than max_sequence_tokens = "
            f"{request.config.max_sequence_tokens}"
        )
    return f"no {what} to train on in {request.data}"


def _out_of_memory(request: FitRequest, rank: int, error: BaseException) -> str:
    config = request.config
    return (
        f"fit {request.fit_id!r}: rank {rank} is out of memory ({error}); lower micro_batch_tokens "
        f"({config.micro_batch_tokens}), set gradient_checkpointing "
        f"({config.gradient_checkpointing}) or raise zero_stage ({config.zero_stage})"
    )


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence what is expected: a new head, a left-out output layer, progress bars."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _thin(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    stride = max(1, math.ceil(len(losses) / _CURVE_POINTS))
    numbers = [n for n in range(len(losses)) if n % stride == 0 or n + 1 == len(losses)]
    return tuple((n + 1, losses[n]) for n in numbers)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
