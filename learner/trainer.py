"""The training loop: one fit, on one rank of a group, with torch and DeepSpeed.

    FitRequest -> read, tokenise, plan (the same on every rank)
               -> DeepSpeed engine over PolicyObjective | PreferenceObjective
               -> steps, now and then a state to go on from
               -> validation -> gate -> rank 0 publishes a Hugging Face checkpoint, or holds it

Every rank plans all steps from the same data and seed and computes its own share of each, so
nothing is negotiated while training. Losses are sums divided by what the *global* batch holds;
with DeepSpeed's averaging over ranks undone, the gradient does not depend on how a batch was split.
The run is a function of request and seed: same ranks, same threads, same losses, also when it was
cut off and went on (FlashAttention's backward pass adds in no fixed order: there they are close).

Faults: what every rank sees alike (bad data, a loss that is not finite) raises `LearnerError` on
all of them, and the group stays usable. What one rank meets alone (out of memory, a dead peer)
leaves the others inside a collective; the group must be restarted, which is its owner's part. A fit
that is asked for again goes on from its last state, and one that is published is only reported.

Not covered: models that do not fit into the host memory of one rank while they are loaded, and
going on with another number of ranks (DeepSpeed's states are cut by it).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from learner.attention import choose_backend
from learner.batch import check_markers
from learner.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    write_prompt_template,
)
from learner.dataset import DatasetError, read_manifest
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
from learner.flops import FlopCounter, flop_counter, peak_flops
from learner.model_card import write_model_card
from learner.objectives import PolicyObjective, PreferenceObjective, untied_output
from learner.packing import PlannedStep
from learner.preference_model import HEAD_NAME, load_preference_model, new_preference_model
from learner.resume import FitState, ResumeFolder, fingerprint
from learner.signals import LossWatch, MetricsLog, chance_warning, judge
from learner.spill import disk_is_full, no_room
from learner.task import Task, plan_fit, policy_task, preference_task
from learner.validation import HeldOut, validate
from rollout.seeds import derive_seed

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.5
_CURVE_POINTS = 500
_FINAL_STEPS = 20

ProgressCallback = Callable[[FitProgress], None]
T = TypeVar("T")


class _NotFinite(LearnerError):
    """The loss or its gradient left the numbers; alike on all ranks."""


def run_fit(
    request: FitRequest,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: ProgressCallback | None = None,
) -> FitResult:
    """Run one training run to its published checkpoint; every rank calls it and gets the result.

    With `world_size` > 1 the caller has set up torch.distributed; alone, a group of one is made. A
    request that was published before is answered from its record, one that was cut off goes on.

    Args:
        progress: called on rank 0 about twice a second and at the last step.
    Raises:
        LearnerError: bad data or model, a loss that is not finite, or a round that has a checkpoint
            of another request; alike on all ranks.
        RankError: this rank failed alone.
    """
    started = time.perf_counter()
    _ensure_group(rank, world_size)
    torch.set_num_threads(request.config.num_threads)
    torch.manual_seed(request.seed)
    try:
        finished = _from_rank_0(lambda: _finished(request), rank, request)
        if finished is not None:
            return finished
        # Before minutes are spent on data that cannot be gone on with.
        _from_rank_0(lambda: _resume_folder(request, world_size).read(), rank, request)
        problem, prepared = None, None
        try:
            prepared = _prepare(request)
        except (DatasetError, LearnerError, OSError, ValueError) as error:
            problem = no_room(error, request.checkpoints) if disk_is_full(error) else str(error)
        _agree(problem, request)
        assert prepared is not None
        return _Fit(request, prepared, rank, world_size, progress, started).run()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RankError(_out_of_memory(request, rank, error)) from error
    except OSError as error:
        if disk_is_full(error):
            said = no_room(error, request.checkpoints)
            raise RankError(f"fit {request.fit_id!r}: rank {rank} {said}") from error
        raise
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise RankError(_out_of_memory(request, rank, error)) from error
        raise


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
    train: Task
    validation: Task


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
    task = policy_task if isinstance(config, PolicyTrainConfig) else preference_task
    spill = CheckpointStore(request.checkpoints).folder(request.kind, request.round)
    spill.mkdir(parents=True, exist_ok=True)
    train, validation = (
        task(tokenizer, request, split, spill=spill) for split in ("train", "validation")
    )
    with _quiet_loading():
        if isinstance(config, PolicyTrainConfig):
            objective = _policy_objective(request.base)
        else:
            model = new_preference_model(request.base, seed=request.seed, dtype=torch.float32)
            lm_head = untied_output(request.base) if config.lm_weight else None
            objective = PreferenceObjective(model, config, lm_head)
    vocabulary = objective.model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise LearnerError(
            f"checkpoint {request.base} does not fit its tokenizer: {len(tokenizer)} tokens, "
            f"{vocabulary} embeddings"
        )
    if config.gradient_checkpointing:
        objective.model.gradient_checkpointing_enable()
    objective.to(dtype=_dtype(config))
    return _Prepared(tokenizer=tokenizer, objective=objective, train=train, validation=validation)


def _policy_objective(path: str) -> PolicyObjective | PreferenceObjective:
    from transformers import AutoModelForCausalLM

    return PolicyObjective(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


class _Fit:
    """One fit on one rank, after its data and model are there."""

    def __init__(
        self,
        request: FitRequest,
        prepared: _Prepared,
        rank: int,
        world_size: int,
        progress: ProgressCallback | None,
        started: float,
    ) -> None:
        self.request = request
        self.config = request.config
        self.prepared = prepared
        self.task = prepared.train
        self.rank = rank
        self.world_size = world_size
        self.progress = progress
        self.started = started
        self.steps = plan_fit(self.task, self.config, world_size=world_size, seed=request.seed)
        self.store = CheckpointStore(request.checkpoints)
        self.folder = self.store.folder(request.kind, request.round)
        self.fingerprint = _fingerprint(request)
        self.resume = _resume_folder(request, world_size)
        self.counter: FlopCounter = flop_counter(prepared.objective.model)
        self.watch = LossWatch()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.resumed_from = 0
        self.earlier_s = 0.0
        self.engine: Any = None
        self.peak: float | None = None

    def run(self) -> FitResult:
        """Train, measure, publish."""
        previous = self._measure_previous()
        self.engine, optimizer = _make_engine(self.prepared.objective, self.config, self.world_size)
        try:
            device = self.engine.device
            self.peak = peak_flops(device, self.config.peak_tflops)
            _choose_attention(self.prepared.objective, self.config, device)
            self._take_up()
            log = (
                MetricsLog(self.folder, resumed_from=self.resumed_from) if self.rank == 0 else None
            )
            setup_s = time.perf_counter() - self.started
            begun, begun_cpu = time.perf_counter(), time.process_time()
            try:
                try:
                    self._train(optimizer, log, begun)
                    broken = None
                except _NotFinite as error:
                    if not self._may_hold():
                        raise
                    broken = f"not_finite: {error}"
                train_s = self.earlier_s + time.perf_counter() - begun
                cpu_s = time.process_time() - begun_cpu
                found = HeldOut() if broken else self._validate()
                result = replace(
                    self._result(found, previous, broken),
                    seconds_setup=setup_s,
                    seconds_train=train_s,
                    seconds_cpu=cpu_s,
                    mfu=self._mfu(sum(map(self._flops, self.steps)), train_s),
                )
                if log is not None:
                    log.end(
                        len(self.losses),
                        result.metrics,
                        warnings=list(result.warnings),
                        held=result.held,
                    )
            finally:
                if log is not None:
                    log.close()
            saving = time.perf_counter()
            result = self._publish(result, keep=broken is None)
            return replace(result, seconds_save=time.perf_counter() - saving)
        finally:
            self.engine.destroy()

    # ---------------------------------------------------------------- the steps

    def _take_up(self) -> None:
        """Load the state of an attempt that was cut off, if there is one."""
        state = _from_rank_0(self.resume.read, self.rank, self.request)
        if state is None:
            return
        self.engine.load_checkpoint(str(self.resume.path), tag=state.tag)
        self.losses, self.norms = list(state.losses), list(state.grad_norms)
        self.resumed_from, self.earlier_s = state.step, state.seconds
        for number, loss in enumerate(self.losses, start=1):
            self.watch.observe(number, loss)
        logger.info("fit goes on. fit=%s step=%d", self.request.fit_id, state.step)

    def _train(
        self, optimizer: torch.optim.Optimizer, log: MetricsLog | None, begun: float
    ) -> None:
        config, task, steps = self.config, self.task, self.steps
        tokens = [task.total(task.tokens, step) for step in steps]
        flops = [self._flops(step) for step in steps]
        reported = before = begun
        first = self.resumed_from
        self.engine.train()
        for number in range(first, len(steps)):
            # Dropout, where a model has any, is drawn anew from the step: the same after a resume.
            torch.manual_seed(derive_seed(self.request.seed, "step", number, self.rank))
            rate = learning_rate_share(number, len(steps), config)
            _set_learning_rate(optimizer, rate)
            loss = _step(self.engine, task, steps[number], config, self.rank, self.world_size)
            self._check_finite("loss", loss, number)
            norm = _update(self.engine, config)
            if norm is not None:
                self._check_finite("gradient norm", norm, number)
                self.norms.append(norm)
            self.losses.append(loss)
            self.watch.observe(number + 1, loss)
            now = time.perf_counter()
            last = number + 1 == len(steps)
            if log is not None:
                log.step(
                    number + 1,
                    {
                        "loss": loss,
                        "grad_norm": norm,
                        "learning_rate": rate * config.learning_rate,
                        "tokens_per_s": tokens[number] / (now - before),
                        "mfu": self._mfu(flops[number], now - before),
                    },
                )
            before = now
            if self.rank == 0 and (last or now - reported > _PROGRESS_INTERVAL_S):
                reported = now
                if log is not None:
                    log.flush()
                if self.progress is not None:
                    self.progress(
                        FitProgress(
                            fit_id=self.request.fit_id,
                            step=number + 1,
                            num_steps=len(steps),
                            loss=loss,
                            tokens_per_s=sum(tokens[first : number + 1]) / (now - begun),
                            grad_norm=norm,
                            mfu=self._mfu(sum(flops[first : number + 1]), now - begun),
                        )
                    )
            every = config.save_every_steps
            if every is not None and (number + 1) % every == 0 and not last:
                self._save_state(self.earlier_s + time.perf_counter() - begun)
                before = time.perf_counter()

    def _check_finite(self, what: str, value: float, number: int) -> None:
        if not math.isfinite(value):
            raise _NotFinite(
                f"fit {self.request.fit_id!r}: {what} is {value} at step {number + 1} of "
                f"{len(self.steps)}; lower learning_rate ({self.config.learning_rate}) or "
                f"clip_norm ({self.config.clip_norm}), or check the base checkpoint "
                f"{self.request.base}"
            )

    def _save_state(self, seconds: float) -> None:
        """Write what an attempt after this one can go on from."""
        state = FitState(
            step=len(self.losses), losses=self.losses, grad_norms=self.norms, seconds=seconds
        )
        try:
            self.engine.save_checkpoint(str(self.resume.path), tag=state.tag, save_latest=False)
            if self.world_size > 1:
                dist.barrier()
            if self.rank == 0:
                self.resume.commit(state)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its archive writer.
            if isinstance(error, RuntimeError) and not _is_write_error(error):
                raise
            said = no_room(error, self.resume.path / state.tag)
            self.resume.drop(state.tag)
            raise RankError(
                f"fit {self.request.fit_id!r}: rank {self.rank} {said}; make room and start it "
                "again: it goes on from the state before"
            ) from error

    def _flops(self, step: PlannedStep) -> float:
        task = self.task
        return self.counter.total(
            tokens=task.total(task.computed, step),
            attended=task.total(task.attended, step),
            outputs=task.total(task.trained, step),
        )

    def _mfu(self, flops: float, seconds: float) -> float | None:
        if self.peak is None or seconds <= 0.0:
            return None
        return flops / (seconds * self.peak * self.world_size)

    # ---------------------------------------------------------------- what came of it

    def _validate(self) -> HeldOut:
        self.engine.eval()
        return validate(
            self.engine,
            self.prepared.validation,
            self.config,
            rank=self.rank,
            world_size=self.world_size,
            device=self.engine.device,
        )

    def _may_hold(self) -> bool:
        request = self.request
        return (
            self.config.gate.action == "hold" and request.previous is not None and not request.force
        )

    def _measure_previous(self) -> HeldOut:
        """The checkpoint in service on this fit's held-out examples; empty if it is not judged."""
        request, config = self.request, self.config
        if request.previous is None or config.gate.action == "off" or not self.prepared.validation:
            return HeldOut()
        problem = None
        objective: PolicyObjective | PreferenceObjective | None = None
        try:
            with _quiet_loading():
                if isinstance(config, PreferenceTrainConfig):
                    objective = PreferenceObjective(load_preference_model(request.previous), config)
                else:
                    objective = _policy_objective(request.previous)
            vocabulary = objective.model.get_input_embeddings().num_embeddings
            if vocabulary != self.prepared.objective.model.get_input_embeddings().num_embeddings:
                problem = f"checkpoint in service {request.previous} has another vocabulary"
        except (OSError, ValueError) as error:
            problem = f"checkpoint in service {request.previous} cannot be read: {error}"
        _agree(problem, request)
        assert objective is not None
        device = _device(self.rank)
        objective.to(device=device, dtype=_dtype(config)).eval()
        _choose_attention(objective, config, device)
        return validate(
            objective,
            self.prepared.validation,
            config,
            rank=self.rank,
            world_size=self.world_size,
            device=device,
        )

    def _result(self, found: HeldOut, previous: HeldOut, broken: str | None) -> FitResult:
        """All but the times and the checkpoint."""
        task, steps, gate = self.task, self.steps[: len(self.losses)], self.config.gate
        worse = judge(found.metrics, previous.metrics, gate) if not broken else None
        said = [*self.watch.warnings(), *chance_warning(found.metrics)]
        said += [line for line in (broken, worse) if line is not None]
        useful = sum(task.total(task.tokens, step) for step in steps)
        return FitResult(
            fit_id=self.request.fit_id,
            checkpoint=Checkpoint(
                kind=self.request.kind, round=self.request.round, path="", digest=""
            ),
            steps=len(steps),
            examples=sum(task.counts),
            epochs=sum(len(step.examples) for step in steps) / len(task),
            loss_curve=_thin(self.losses),
            final_loss=_mean(self.losses[-_FINAL_STEPS:]),
            computed_tokens=sum(task.total(task.computed, step) for step in steps),
            useful_tokens=useful,
            loss_tokens=sum(task.total(task.trained, step) for step in steps),
            seconds_setup=0.0,
            seconds_train=0.0,
            seconds_cpu=0.0,
            seconds_save=0.0,
            skipped_long=task.skipped_long,
            metrics=found.metrics
            | {f"previous_{name}": value for name, value in previous.metrics.items()},
            calibration=found.calibration,
            mean_grad_norm=_mean(self.norms) if self.norms else None,
            warnings=tuple(said),
            held=(broken or worse) if self._may_hold() else None,
            resumed_from=self.resumed_from,
        )

    def _publish(self, result: FitResult, *, keep: bool) -> FitResult:
        """Rank 0 writes and publishes; all ranks get the result, or the same error."""
        request = self.request
        model = self.engine.module.model
        state = _gathered_state(model, self.config, self.rank) if keep else {}
        manifest = read_manifest(request.data) or {}
        info = {
            "fit": request.fit_id,
            "fingerprint": self.fingerprint,
            "base": request.base,
            "config": self.config.model_dump(mode="json"),
            "seed": request.seed,
            "data_digest": manifest.get("digest"),
            "data_counts": manifest.get("counts", {}).get("all", {}),
            "final_loss": result.final_loss,
            "metrics": result.metrics,
            "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
            "result": result.as_record(),
        }

        def write(directory: Path) -> None:
            with _quiet_loading():
                model.save_pretrained(directory, state_dict=state)
                self.prepared.tokenizer.save_pretrained(directory)
            if manifest.get("template") is not None:
                write_prompt_template(directory, manifest["template"])
            write_model_card(directory, request.kind, info)

        def publish() -> Checkpoint:
            if result.held is None:
                made = self.store.publish(request.kind, request.round, write, info)
            else:
                assert request.previous is not None
                made = self.store.hold(
                    request.kind,
                    request.round,
                    request.previous,
                    result.held,
                    write if keep else None,
                    info,
                )
            self.resume.clear()
            return made

        return replace(result, checkpoint=_from_rank_0(publish, self.rank, request))


def _fingerprint(request: FitRequest) -> str:
    return fingerprint(request, (read_manifest(request.data) or {}).get("digest"))


def _resume_folder(request: FitRequest, world_size: int) -> ResumeFolder:
    folder = CheckpointStore(request.checkpoints).folder(request.kind, request.round)
    return ResumeFolder(folder, _fingerprint(request), world_size=world_size)


def _finished(request: FitRequest) -> FitResult | None:
    """The result of this very request, if its round has it; None if the round has nothing.

    Raises:
        LearnerError: the round has the checkpoint of another request.
    """
    store = CheckpointStore(request.checkpoints)
    if store.current(request.kind, request.round) is None:
        return None
    info = store.info(request.kind, request.round)
    if info.get("fingerprint") != _fingerprint(request):
        raise LearnerError(
            f"round {request.round} has a {request.kind} checkpoint of another base, dataset, "
            f"config or seed in {store.folder(request.kind, request.round)}"
        )
    released = request.force and store.held(request.kind, request.round) is not None
    if released:
        store.release(request.kind, request.round)
    current = store.current(request.kind, request.round)
    assert current is not None
    result = FitResult.from_record(info["result"], current)
    return replace(result, held=None) if released else result


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
    task: Task,
    step: PlannedStep,
    config: TrainConfig,
    rank: int,
    world_size: int,
) -> float:
    """Forward and backward of one global batch; its loss, the same on every rank."""
    scale = 1.0 / task.denominator(step)
    auxiliary = getattr(config, "lm_weight", 0.0)
    if auxiliary:
        tokens = max(task.total(task.trained, step), 1)
        auxiliary = auxiliary / tokens / scale
    total = torch.zeros((), device=engine.device)
    for number, shares in enumerate(step.micro):
        batch = task.pack(shares[rank]).to(engine.device)
        engine.set_gradient_accumulation_boundary(number + 1 == len(step.micro))
        loss = engine(batch, auxiliary) if auxiliary else engine(batch)
        loss = loss * scale
        total += loss.detach()
        # DeepSpeed averages gradients over the ranks; the loss is already a share of the whole.
        engine.backward(loss * world_size)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total)


def _update(engine: Any, config: TrainConfig) -> float | None:
    """Clip and apply the gradient; its norm before clipping, None where DeepSpeed does not say."""
    if _clips_itself(config):
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)
    limit = config.clip_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
    # A gradient that is not finite must not reach the weights: the caller stops on its norm.
    if math.isfinite(norm):
        engine.step()
    return norm


def _clips_itself(config: TrainConfig) -> bool:
    """True if DeepSpeed's optimiser clips and knows the norm; plain float32 has none of its own."""
    return config.zero_stage > 0 or _dtype(config) != torch.float32


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
        "gradient_clipping": config.clip_norm if _clips_itself(config) else 0.0,
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


def _choose_attention(
    objective: PolicyObjective | PreferenceObjective, config: TrainConfig, device: torch.device
) -> None:
    """Set the objective's attention backend. Raises LearnerError if flash is asked for in vain."""
    shape = objective.model.config
    heads = shape.num_attention_heads
    try:
        objective.backend = choose_backend(
            config.attention,
            device,
            _dtype(config),
            num_heads=heads,
            num_key_heads=getattr(shape, "num_key_value_heads", None) or heads,
            head_size=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        )
    except ValueError as error:
        raise LearnerError(str(error)) from error


def _device(rank: int) -> torch.device:
    """Where the engine will put this rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))


def _from_rank_0(function: Callable[[], T], rank: int, request: FitRequest) -> T:
    """What a function says on rank 0, on every rank.

    Raises:
        LearnerError: it failed; alike on all ranks.
    """
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except (CheckpointError, LearnerError, OSError, ValueError, KeyError, TypeError) as error:
            outcome[1] = f"fit {request.fit_id!r}: {error}"
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise LearnerError(outcome[1])
    return outcome[0]


def _is_write_error(error: RuntimeError) -> bool:
    """True for what torch says when a file it writes cannot grow."""
    said = str(error)
    return any(text in said for text in ("PytorchStreamWriter", "unexpected pos", "write failed"))


def _dtype(config: TrainConfig) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def _out_of_memory(request: FitRequest, rank: int, error: BaseException) -> str:
    config = request.config
    return (
        f"fit {request.fit_id!r}: rank {rank} is out of memory ({error}); lower micro_batch_tokens "
        f"({config.micro_batch_tokens}) or max_sequence_tokens ({config.max_sequence_tokens}), set "
        f"gradient_checkpointing ({config.gradient_checkpointing}) or raise zero_stage "
        f"({config.zero_stage})"
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
