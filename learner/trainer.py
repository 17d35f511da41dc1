"""The training loop: one fit, on one rank of a group.

    FitRequest -> read, tokenise, load, plan (the same on every rank; `learner.prepare`)
               -> DeepSpeed engine over PolicyObjective | PreferenceObjective (`learner.optimiser`)
               -> steps, now and then a state to go on from
               -> validation -> gate -> rank 0 publishes a Hugging Face checkpoint, or holds it

Every rank plans all steps from the same data and seed and computes its own share of each, so
nothing is negotiated while training. The run is a function of request and seed: same ranks, same
threads, same losses, also when it was cut off and went on (FlashAttention's backward pass adds in
no fixed order: there they are close).

Faults: what every rank sees alike (bad data, a loss that is not finite) raises `LearnerError` on
all of them, and the group stays usable. What one rank meets alone (out of memory, a dead peer)
leaves the others inside a collective; the group must be restarted, which is its owner's part. A fit
that is asked for again goes on from its last state, and one that is published is only reported.

Not covered: going on with another number of ranks (DeepSpeed's states are cut by it).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from learner.checkpoint import Checkpoint, CheckpointStore, write_prompt_template
from learner.dataset import read_manifest
from learner.fit import FitProgress, FitRequest, FitResult, LearnerError, RankError
from learner.flops import FlopCounter, flop_counter, peak_flops
from learner.model_card import write_model_card
from learner.optimiser import (
    forward_backward,
    gathered_state,
    import_deepspeed,
    learning_rate_share,
    make_engine,
    set_learning_rate,
    update,
)
from learner.packing import PlannedStep
from learner.prepare import (
    Objective,
    Prepared,
    choose_attention,
    load_in_service,
    num_embeddings,
    prepare,
    quiet_loading,
    training_dtype,
)
from learner.ranks import device_of, ensure_group, from_rank_0, on_all_ranks
from learner.resume import FitState, ResumeFolder, fingerprint
from learner.signals import LossWatch, MetricsLog, chance_warning, judge
from learner.spill import disk_is_full, no_room
from learner.task import plan_fit
from learner.validation import HeldOut, validate
from rollout.seeds import derive_seed

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.5
_CURVE_POINTS = 500
_FINAL_STEPS = 20

ProgressCallback = Callable[[FitProgress], None]


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
    ensure_group(rank, world_size)
    torch.set_num_threads(request.config.num_threads)
    torch.manual_seed(request.seed)
    try:
        finished = from_rank_0(lambda: _finished(request), request.fit_id)
        if finished is not None:
            return finished
        # Before minutes are spent on data that cannot be gone on with.
        from_rank_0(lambda: _resume_folder(request, world_size).read(), request.fit_id)
        tell = _Teller(request.fit_id, progress if rank == 0 else None)
        prepared = prepare(request, tell)
        return _Fit(request, prepared, rank, world_size, tell, started).run()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RankError(_out_of_memory(request, rank, error)) from error
    except OSError as error:
        if disk_is_full(error):
            said = no_room(error, CheckpointStore(request.checkpoints).store.root)
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
    import_deepspeed()
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


class _Teller:
    """Tells where a fit stands, about twice a second: whoever waits takes silence for a fault."""

    def __init__(self, fit_id: str, progress: ProgressCallback | None) -> None:
        self.fit_id = fit_id
        self.progress = progress
        self._told_s = -math.inf

    @property
    def due(self) -> bool:
        return time.perf_counter() - self._told_s > _PROGRESS_INTERVAL_S

    def __call__(
        self, phase: str, done: int, total: int, *, now: bool = False, **facts: float | None
    ) -> None:
        """Tell it if it is time, or `now`.

        Args:
            facts: fields of `FitProgress`.
        """
        if self.progress is None or not (now or self.due):
            return
        self._told_s = time.perf_counter()
        self.progress(
            FitProgress(fit_id=self.fit_id, step=done, num_steps=total, phase=phase, **facts)
        )


class _Fit:
    """One fit on one rank, after its data and model are there."""

    def __init__(
        self,
        request: FitRequest,
        prepared: Prepared,
        rank: int,
        world_size: int,
        tell: _Teller,
        started: float,
    ) -> None:
        self.request = request
        self.config = request.config
        self.prepared = prepared
        self.task = prepared.train
        self.rank = rank
        self.world_size = world_size
        self.tell = tell
        self.started = started
        self.steps = plan_fit(self.task, self.config, world_size=world_size, seed=request.seed)
        self.store = CheckpointStore(request.checkpoints)
        self.home = self.store.home(request.kind, request.round)
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
        self.engine, optimizer = make_engine(self.prepared.objective, self.config)
        try:
            device = self.engine.device
            self.peak = peak_flops(device, self.config.peak_tflops)
            choose_attention(self.prepared.objective, self.config, device)
            self._take_up()
            log = (
                MetricsLog(self.home, self.resume.path, resumed_from=self.resumed_from)
                if self.rank == 0
                else None
            )
            setup_s = time.perf_counter() - self.started
            begun, begun_cpu = time.perf_counter(), time.process_time()
            with contextlib.closing(log) if log is not None else contextlib.nullcontext():
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
                result = self._result(found, previous, broken, setup_s, train_s, cpu_s)
                if log is not None:
                    log.end(
                        len(self.losses),
                        result.metrics,
                        warnings=list(result.warnings),
                        held=result.held,
                    )
            saving = time.perf_counter()
            self.tell("saving", 0, 0, now=True)
            result = self._publish(result, keep=broken is None)
            self._once_a_machine(self.resume.leave)
            return replace(result, seconds_save=time.perf_counter() - saving)
        finally:
            self.engine.destroy()

    # ---------------------------------------------------------------- the steps

    def _take_up(self) -> None:
        """Load the state of an attempt that was cut off, if there is one."""
        state = from_rank_0(self.resume.read, self.request.fit_id)
        if state is None:
            return
        self._once_a_machine(partial(self.resume.fetch, state.tag))
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
        before = begun
        first = self.resumed_from
        self.engine.train()
        for number in range(first, len(steps)):
            # Dropout, where a model has any, is drawn anew from the step: the same after a resume.
            torch.manual_seed(derive_seed(self.request.seed, "step", number, self.rank))
            rate = learning_rate_share(number, len(steps), config)
            set_learning_rate(optimizer, rate)
            loss = forward_backward(self.engine, task, steps[number], config)
            self._check_finite("loss", loss, number)
            norm = update(self.engine, config)
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
            if last or self.tell.due:
                if log is not None:
                    log.flush()
                self.tell(
                    "training",
                    number + 1,
                    len(steps),
                    now=True,
                    loss=loss,
                    tokens_per_s=sum(tokens[first : number + 1]) / (now - begun),
                    grad_norm=norm,
                    mfu=self._mfu(sum(flops[first : number + 1]), now - begun),
                )
            every = config.save_every_steps
            if every is not None and (number + 1) % every == 0 and not last:
                self._save_state(self.earlier_s + time.perf_counter() - begun)
                if log is not None:
                    log.keep()
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
            self._once_a_machine(partial(self.resume.keep, state.tag))
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

    def _once_a_machine(self, work: Callable[[], None]) -> None:
        """Have the first rank of each machine do something, and all wait for it."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        on_all_ranks(work if first else lambda: None, self.request.fit_id)

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
            self.engine.device,
            on_step=partial(self.tell, "validating"),
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
        previous = request.previous

        def load() -> Objective:
            objective = load_in_service(previous, config)
            if num_embeddings(objective) != num_embeddings(self.prepared.objective):
                raise LearnerError(f"checkpoint in service {previous} has another vocabulary")
            return objective

        objective = on_all_ranks(load, request.fit_id)
        device = device_of(self.rank)
        objective.to(device=device, dtype=training_dtype(config)).eval()
        choose_attention(objective, config, device)
        told = partial(self.tell, "measuring")
        return validate(objective, self.prepared.validation, config, device, on_step=told)

    def _result(
        self,
        found: HeldOut,
        previous: HeldOut,
        broken: str | None,
        setup_s: float,
        train_s: float,
        cpu_s: float,
    ) -> FitResult:
        """All but the checkpoint and the time to save it."""
        task, steps, gate = self.task, self.steps[: len(self.losses)], self.config.gate
        worse = judge(found.metrics, previous.metrics, gate) if not broken else None
        said = [*self.watch.warnings(), *chance_warning(found.metrics)]
        said += [line for line in (broken, worse) if line is not None]
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
            useful_tokens=sum(task.total(task.tokens, step) for step in steps),
            loss_tokens=sum(task.total(task.trained, step) for step in steps),
            seconds_setup=setup_s,
            seconds_train=train_s,
            seconds_cpu=cpu_s,
            seconds_save=0.0,
            left_out=task.left_out,
            metrics=found.metrics
            | {f"previous_{name}": value for name, value in previous.metrics.items()},
            calibration=found.calibration,
            mean_grad_norm=_mean(self.norms) if self.norms else None,
            mfu=self._mfu(sum(map(self._flops, self.steps)), train_s),
            warnings=tuple(said),
            held=(broken or worse) if self._may_hold() else None,
            resumed_from=self.resumed_from,
        )

    def _publish(self, result: FitResult, *, keep: bool) -> FitResult:
        """Rank 0 writes and publishes; all ranks get the result, or the same error."""
        request = self.request
        model = self.engine.module.model
        state = gathered_state(model, self.config) if keep else {}
        manifest = read_manifest(request.data) or {}
        info = {
            "fit": request.fit_id,
            "fingerprint": self.fingerprint,
            "base": request.origins.get(request.base, request.base),
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
            with quiet_loading():
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
                    request.origins.get(request.previous, request.previous),
                    result.held,
                    write if keep else None,
                    info,
                    previous_here=Path(request.previous),
                )
            self.resume.clear()
            return made

        return replace(result, checkpoint=from_rank_0(publish, request.fit_id))


def _fingerprint(request: FitRequest) -> str:
    return fingerprint(request, (read_manifest(request.data) or {}).get("digest"))


def _resume_folder(request: FitRequest, world_size: int) -> ResumeFolder:
    home = CheckpointStore(request.checkpoints).home(request.kind, request.round)
    return ResumeFolder(home, _fingerprint(request), world_size=world_size)


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
            f"config or seed in {store.home(request.kind, request.round).root}"
        )
    released = request.force and store.held(request.kind, request.round) is not None
    if released:
        store.release(request.kind, request.round)
    current = store.current(request.kind, request.round)
    assert current is not None
    result = FitResult.from_record(info["result"], current)
    return replace(result, held=None) if released else result


def _is_write_error(error: RuntimeError) -> bool:
    """True for what torch says when a file it writes cannot grow."""
    said = str(error)
    return any(text in said for text in ("PytorchStreamWriter", "unexpected pos", "write failed"))


def _out_of_memory(request: FitRequest, rank: int, error: BaseException) -> str:
    config = request.config
    return (
        f"fit {request.fit_id!r}: rank {rank} is out of memory ({error}); lower micro_batch_tokens "
        f"({config.micro_batch_tokens}) or max_sequence_tokens ({config.max_sequence_tokens}), set "
        f"gradient_checkpointing ({config.gradient_checkpointing}) or raise zero_stage "
        f"({config.zero_stage})"
    )


def _thin(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    stride = max(1, math.ceil(len(losses) / _CURVE_POINTS))
    numbers = [n for n in range(len(losses)) if n % stride == 0 or n + 1 == len(losses)]
    return tuple((n + 1, losses[n]) for n in numbers)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
