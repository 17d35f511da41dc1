"""`rstar train policy|ppm CONFIG`: one training run alone, on a committed round or plain files.

    CONFIG --> data: RUN/datasets/round=R, or built from the trees of RUN, or from files
           --> base: as given, or what that round of RUN starts from
           --> fit: in this process (one rank) or on a group over Ray (more), which is done again
                    if its machines are lost (`cluster.jobs.attempts`)
           --> RUN_DIR/checkpoints/round=R/{policy,ppm}; metrics as of a run's fits

The same command goes on after a stop: from the last state inside a fit, and a finished fit is only
reported.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.evaluation.ruler import at_chance
from cluster.fleet.given_models import marked
from cluster.fleet.meter import Meter
from cluster.folder.config_file import load_config
from cluster.folder.run_folder import (
    BASE,
    MARKED_BASE,
    MARKED_TRUNK,
    RunFolder,
    RunFolderError,
    dataset_name,
)
from cluster.folder.staging import Stager, at_hand, staged_request
from cluster.jobs.attempts import Attempts
from cluster.runs.config import TrainRunConfig
from cluster.runs.regrade import dataset_is_current, verdicts_of
from cluster.runs.select import RoundSelection
from cluster.telemetry.live import LiveFile
from cluster.telemetry.progress import ProgressView, say
from cluster.telemetry.tracking import Following
from learner.checkpoint import CheckpointStore, Kind, checkpoint_directory
from learner.dataset import MANIFEST, read_manifest
from learner.fit import FitProgress, FitRequest, FitResult, LearnerError
from learner.plain import write_plain_dataset
from rollout.prompt import TEMPLATES
from rollout.run_store import absolute
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore, stored_rounds


class _Interrupted(Exception):
    """Ends the training thread after Ctrl-C."""


async def run_train(
    kind: Kind,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    force: bool = False,
    console: Console | None = None,
) -> FitResult:
    """Train one model as a config file says, with a progress bar; returns its result.

    Args:
        overrides: `a.b=c`, over the file.
        force: promote a checkpoint that the gate holds back.
    Raises:
        ConfigError, RunFolderError, DatasetError, StoreError, CheckpointError, LearnerError,
            EngineError: what stopped it, in one line.
    """
    config = load_config(config_path, overrides, kind=TrainRunConfig)
    folder = RunFolder(config.run_dir, storage=config.storage.client)
    with folder.locked(), ProgressView(console or Console()) as view:
        request = await asyncio.to_thread(_request, kind, config, folder, force)
        folder.write(f"train/{kind}.json", config.effective())
        Following(folder, config.tracking, view.note).start()
        stage = f"train {kind}"
        view.plan = [stage]
        view.begin(stage, stage)
        async with _measured(config, folder, view) as meter:
            result = await _fit(request, config, folder, view, meter)
        seconds = view.end(
            f"{result.examples} examples, {result.steps} steps, loss {result.final_loss:.3f}"
        )
        folder.record_stage(request.round, f"train_{kind}", seconds, **result.as_record())
    return result


def print_train_report(result: FitResult, console: Console) -> None:
    """What a fit made and measured, and what of it a person should look at."""
    table = Table(box=None, show_header=False)
    facts: dict[str, Any] = {
        "steps": f"{result.steps} ({result.resumed_from} of them before a stop)"
        if result.resumed_from
        else result.steps,
        "tokens": f"{result.useful_tokens:,} ({result.tokens_per_s:,.0f}/s)",
        "MFU": "unknown" if result.mfu is None else f"{100 * result.mfu:.1f} %",
        "final training loss": f"{result.final_loss:.4f}",
    }
    for reason, count in result.left_out.items():
        facts[f"left out as {reason.replace('_', ' ')}"] = count
    facts |= {f"held-out {name}": f"{value:.4f}" for name, value in result.metrics.items()}
    for name, value in facts.items():
        table.add_row(name, str(value))
    console.print(table, soft_wrap=True)
    say(console, f"checkpoint {result.checkpoint.path}")
    for line in result.warnings:
        say(console, f"warning: {line}")
    if result.held is not None:
        say(console, "not promoted: the earlier checkpoint stays in service (--force promotes it)")


# -------------------------------------------------------------------- data and base


def _request(kind: Kind, config: TrainRunConfig, folder: RunFolder, force: bool) -> FitRequest:
    """Have the data and the base, and say what is to be trained."""
    number, data = _data(kind, config, folder)
    base = _base(kind, config, folder, number)
    previous = config.previous
    return FitRequest(
        fit_id=f"train/{kind}",
        kind=kind,
        round=number,
        base=str(base),
        data=str(data),
        checkpoints=str(folder.checkpoints),
        config=config.train_policy if kind == "policy" else config.train_ppm,
        seed=config.seed,
        previous=absolute(checkpoint_directory(previous)) if previous is not None else None,
        force=force,
    )


def _data(kind: Kind, config: TrainRunConfig, folder: RunFolder) -> tuple[int, Path]:
    """The round (0 for files) and the dataset directory."""
    source = config.data
    if source.train is not None:
        name = f"datasets/{kind}"
        template = TEMPLATES[source.template] if source.template is not None else None
        with folder.filling(name, last=MANIFEST) as directory:
            write_plain_dataset(
                kind,
                at_hand(source.train),
                directory,
                validation=source.validation and at_hand(source.validation),
                config=config.dataset,
                template=template,
            )
        return 0, folder.place(name)
    assert source.run is not None
    run = RunFolder(source.run)
    number = source.round if source.round is not None else _last_round(run)
    newest = verdicts_of(run.store, range(1, number + 1))
    valued_steps = kind == "ppm" and config.train_ppm.objective == "q_regression"
    for made in (run.dataset(number), folder.dataset(number)):
        manifest = read_manifest(made)
        if manifest is None or not dataset_is_current(manifest, newest):
            continue
        if not valued_steps or manifest["counts"]["all"].get("steps_train"):
            return number, made
    with folder.filling(dataset_name(number), last=MANIFEST) as directory:
        _select(run, number, config, directory, valued_steps=valued_steps)
    return number, folder.dataset(number)


def _last_round(run: RunFolder) -> int:
    """The last round of a run that was committed."""
    found = [number for number in run.rounds("datasets") if run.dataset_manifest(number)]
    trees = (TrajectoryStore(run.store, number) for number in stored_rounds(run.store))
    found += [each.round for each in trees if each.manifest() is not None]
    if not found:
        raise RunFolderError(f"{run.store.root}: no committed round in this folder")
    return max(found)


def _select(
    run: RunFolder, number: int, config: TrainRunConfig, directory: Path, *, valued_steps: bool
) -> None:
    """Build a round's dataset from the trees of the rounds up to it."""
    store = run.store
    for r in range(1, max(number, 1) + 1):
        if TrajectoryStore(store, r).manifest() is None:
            raise RunFolderError(f"{store.root}: round {r} is not committed")
    search = SearchConfig.model_validate((run.config() or {}).get("search", {}))
    RoundSelection(store, number).select(
        directory,
        template=search.training_template,
        config=config.dataset,
        valued_steps=valued_steps,
    )


def _base(kind: Kind, config: TrainRunConfig, folder: RunFolder, number: int) -> Path:
    """The checkpoint to start from."""
    if config.base is not None:
        base = Path(absolute(checkpoint_directory(config.base)))
        return marked(base, folder, MARKED_BASE if kind == "policy" else MARKED_TRUNK)
    if config.data.run is None:
        raise RunFolderError("base is missing: files do not say which checkpoint to start from")
    run = RunFolder(config.data.run)
    models = (run.config() or {}).get("models", {})
    trunk = "base"
    if kind == "ppm":
        trunk = config.ppm_trunk or models.get("ppm_trunk", "policy")
    if trunk == "previous":
        before = CheckpointStore(run.checkpoints).current("ppm", number - 1)
        if before is not None and not at_chance(run.read(run.ruler_name(number - 1))):
            return Path(before.path)
        trunk = "policy"
    if trunk in ("policy", "cold_start"):
        made_in = number if trunk == "policy" else 0
        policy = CheckpointStore(run.checkpoints).current("policy", made_in)
        if policy is None:
            raise RunFolderError(f"{run.store.root}: round {made_in} has no policy; give base")
        return Path(policy.path)
    if trunk != "base":
        return marked(Path(absolute(checkpoint_directory(trunk))), folder, MARKED_TRUNK)
    for name in (MARKED_BASE, BASE):
        if run.store.exists(name):
            return run.place(name)
    named = models.get("base_model")
    if named is None:
        raise RunFolderError(f"{run.store.root}: its config names no base model; give base")
    return Path(named)


# -------------------------------------------------------------------- the fit


@asynccontextmanager
async def _measured(
    config: TrainRunConfig, folder: RunFolder, view: ProgressView
) -> AsyncIterator[Meter]:
    """Export what a fit measures, and tell in its folder how it goes, unless that is a run's.

    Raises:
        EngineError: the endpoint's port is taken.
    """
    live = LiveFile(folder.store, view.snapshot)
    meter = Meter(config.metrics, folder, None, account=live.account)
    with live if folder.config() is None else nullcontext():
        meter.start()
        try:
            yield meter
        finally:
            await meter.stop()


async def _fit(
    request: FitRequest,
    config: TrainRunConfig,
    folder: RunFolder,
    view: ProgressView,
    meter: Meter,
) -> FitResult:
    """Train, and show how far it is; Ctrl-C ends it at its next step."""
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def show(progress: FitProgress) -> None:
        if stop.is_set():
            raise _Interrupted
        meter.tell_fit(progress)
        loop.call_soon_threadsafe(view.update, progress.step, progress.num_steps, _facts(progress))

    def note(text: str) -> None:
        loop.call_soon_threadsafe(view.note, text)

    attempts = Attempts(
        config.stage_attempts,
        key="stage_attempts",
        note=note,
    )

    def train() -> FitResult:
        if config.learner.replicas > 1:
            return _train_on_group(request, config, folder.store, show, attempts)
        from learner.trainer import run_fit

        return run_fit(staged_request(request, Stager(None)), progress=show)

    try:
        result = await asyncio.to_thread(train)
        meter.end_fit(result)
        return result
    except asyncio.CancelledError:
        stop.set()
        raise


def _facts(progress: FitProgress) -> dict[str, str | float]:
    facts = progress.facts()
    if progress.grad_norm is not None:
        facts["grad norm"] = f"{progress.grad_norm:.2f}"
    if progress.mfu is not None:
        facts["MFU"] = f"{100 * progress.mfu:.0f} %"
    return facts


def _train_on_group(
    request: FitRequest,
    config: TrainRunConfig,
    store: RunStore,
    show: Callable[[FitProgress], None],
    attempts: Attempts,
) -> FitResult:
    """Blocks until it is done, or was lost too often."""
    import ray

    from cluster.fleet.learner_group import LearnerGroup

    settings = config.learner
    arguments: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        arguments |= {"include_dashboard": False, "num_cpus": settings.replicas}
    try:
        ray.init(address=config.address, **arguments)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise LearnerError(
            f"Ray could not be started at address={config.address!r}: {error}"
        ) from error
    store.identify()
    group = LearnerGroup(settings, store, attempts=config.stage_attempts)

    async def fit() -> FitResult:
        return group.fit(request, show, attempts.again)

    try:
        return asyncio.run(attempts(f"train {request.kind}", fit))
    finally:
        group.shutdown(5.0)
        ray.shutdown()
