"""The learner's worker group: one Ray Train run that lives as long as the evolution does.

    driver: LearnerGroup.fit --put--> Mailbox <--take-- rank 0..n-1: run_fit (torch, DeepSpeed)
                             <-watch-         <-progress, finish-

Starting a group costs seconds to tens of seconds (controller, placement, processes, imports, the
process group), a run of four rounds trains nine times. So the train loop of a single
`TorchTrainer.fit` takes one `FitRequest` after the other from a small mailbox actor and waits
there, blocked and without a CPU, in between.

Faults:
- an error all ranks saw alike (`LearnerError`) is the answer to that request; the group stays;
- a rank out of memory (`RankError`) is the answer too, but its peers hang in a collective, so the
  group is started anew by Ray Train;
- a rank that dies or raises anything else: Ray Train starts the group anew and the ranks find the
  same request in the mailbox, at most `max_attempts` times.

The ranks of one life of the group share an incarnation id, by which the mailbox gives a request to
all of them or to none. A fit that was published but not answered runs again and takes the
checkpoint that is there.

Not covered: a driver that restarts finds no group; it starts its own.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from cluster.fleet.config import ActorConfig
from learner.fit import FitProgress, FitRequest, FitResult, LearnerError, RankError
from rollout.store import RunStore, StoreError

logger = logging.getLogger(__name__)

PLACEMENT_S = 20.0
"""After so long the reason why there is no group yet is looked for."""

MAX_ATTEMPTS = 3
"""Lives of the group one request may cost."""

MAX_RESTARTS = 20
"""Lives of the group over its whole use."""

COLLECTIVE_S = 1800
"""Bound of every torch.distributed operation."""

_TAKE_TIMEOUT_S = 600.0
_WATCH_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request on its way to the ranks."""

    number: int
    """From 1, in the order of `put`."""
    request: FitRequest
    attempt: int
    """From 1; counts the incarnations that took it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended: exactly one of the two is set."""

    result: FitResult | None = None
    error: str | None = None


class Mailbox:
    """Holds the one open request and what is known of it; an actor, but an ordinary class."""

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._changed = asyncio.Condition()
        self._ticket: Ticket | None = None
        """The latest request; open until it has an outcome."""
        self._outcome: Outcome | None = None
        self._incarnations: list[str] = []
        """Those that took the latest request."""
        self._causes: dict[str, str] = {}
        """Incarnation -> the first thing that went wrong in it, over the mailbox's life."""
        self._progress: FitProgress | None = None
        self._joined = 0
        self._stopped = False

    async def put(self, request: FitRequest) -> int:
        """Open a request; returns its number.

        Raises:
            ValueError: the one before is still open.
        """
        if self._ticket is not None and self._outcome is None:
            raise ValueError(f"fit {self._ticket.request.fit_id!r} is still running")
        number = 1 if self._ticket is None else self._ticket.number + 1
        async with self._changed:
            self._ticket = Ticket(number=number, request=request, attempt=0)
            self._outcome = self._progress = None
            self._incarnations = []
            self._changed.notify_all()
        return number

    async def join(self, incarnation: str) -> None:
        """A group came to life."""
        async with self._changed:
            self._joined += 1
            self._changed.notify_all()
        logger.info("learner group joined. incarnation=%s", incarnation)

    async def take(self, incarnation: str, done: int, timeout_s: float) -> Ticket | str | None:
        """The open request after number `done`, for one rank.

        Returns:
            The ticket; "stop" when the group is to end; None after `timeout_s` without either.
        """
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while not self._stopped:
                ticket = self._open_ticket(incarnation, done)
                if ticket is not None:
                    return ticket
                try:
                    await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
                except TimeoutError:
                    return None
        return "stop"

    def _open_ticket(self, incarnation: str, done: int) -> Ticket | None:
        """The open ticket for this incarnation; an incarnation too many closes it."""
        if self._ticket is None or self._outcome is not None or self._ticket.number <= done:
            return None
        if incarnation not in self._incarnations:
            if len(self._incarnations) >= self._max_attempts:
                last = self._causes.get(self._incarnations[-1], "a worker process died")
                self._close(
                    Outcome(
                        error=f"fit {self._ticket.request.fit_id!r} failed "
                        f"{self._max_attempts} times; last: {last}"
                    )
                )
                return None
            self._incarnations.append(incarnation)
        attempt = self._incarnations.index(incarnation) + 1
        return replace(self._ticket, attempt=attempt)

    async def report(self, number: int, progress: FitProgress) -> None:
        """Rank 0 says where it stands."""
        async with self._changed:
            if self._ticket is not None and self._ticket.number == number:
                self._progress = progress
                self._changed.notify_all()

    async def finish(self, number: int, outcome: Outcome) -> None:
        """The request is answered; a later answer to the same one is ignored."""
        async with self._changed:
            if self._ticket is not None and self._ticket.number == number:
                self._close(outcome)

    async def note_failure(self, incarnation: str, cause: str) -> None:
        """A rank is about to fail for a reason that may not last."""
        self._causes.setdefault(incarnation, cause)

    async def watch(
        self, number: int, seen: FitProgress | None, timeout_s: float
    ) -> tuple[FitProgress | None, Outcome | None]:
        """Progress and outcome of a request, as soon as either is news, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while self._outcome is None and self._progress == seen:
                try:
                    await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
                except TimeoutError:
                    break
            assert self._ticket is not None and self._ticket.number == number
            return self._progress, self._outcome

    async def joined(self) -> int:
        """How many incarnations of the group came to life."""
        return self._joined

    async def stop(self) -> None:
        """Let the ranks leave their loop once they have nothing open."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _close(self, outcome: Outcome) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._changed.notify_all()


class LearnerGroup:
    """A fixed number of training ranks, kept alive between fits.

        start -> fit, fit, ... -> shutdown

    Not thread-safe: one fit at a time.
    """

    def __init__(
        self,
        settings: ActorConfig,
        storage_path: str | Path,
        *,
        start_timeout_s: float = 300.0,
        stalled_after_s: float = 1800.0,
        why_pending: Callable[[], str] = lambda: "",
        note: Callable[[str], None] = lambda text: None,
        store: RunStore | None = None,
    ) -> None:
        """
        Args:
            settings: how many ranks, and what each reserves.
            storage_path: directory for Ray Train's own files, seen by all machines.
            start_timeout_s: a group not alive by then is an error.
            stalled_after_s: a fit that reports nothing for so long is one, too.
            why_pending: why the ranks find no place, in words; "" if it is not known.
            note: told what a person should know now.
            store: of the run, by its id, which each rank has to find before a fit; None: any.
        """
        self._store = store
        self.num_workers = settings.replicas
        self._resources = settings.learner_bundle()
        self._use_gpu = settings.num_gpus > 0
        self._storage_path = str(Path(storage_path).absolute())
        self._start_timeout_s = start_timeout_s
        self._stalled_after_s = stalled_after_s
        self._why_pending = why_pending
        self._note = note
        self._mailbox: Any = None
        self._thread: threading.Thread | None = None
        self._started_s = 0.0
        self._ended: BaseException | str | None = None

    def start(self) -> None:
        """Start the group in the background; returns at once."""
        if self._mailbox is not None:
            return
        self._mailbox = MailboxActor.remote(MAX_ATTEMPTS)
        self._started_s = time.monotonic()
        self._ended = None
        self._thread = threading.Thread(target=self._run, name="learner-group", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until the ranks are up and have their libraries loaded.

        Raises:
            LearnerError: they are not within `start_timeout_s`.
        """
        explained = False
        began_s = time.monotonic()
        while not ray.get(self._mailbox.joined.remote()):
            self._check_alive()
            waited_s = time.monotonic() - self._started_s
            if waited_s > self._start_timeout_s:
                raise LearnerError(
                    f"learner group of {self.num_workers} x {self._resources} did not start within "
                    f"{self._start_timeout_s:.0f} s: "
                    + (self._why_no_place() or "it has its place, so the machine may be too slow")
                )
            if not explained and time.monotonic() - began_s > PLACEMENT_S:
                explained = True
                if why := self._why_no_place():
                    self._note(f"the learner waits for a place: {why}")
            time.sleep(0.1)

    def _why_no_place(self) -> str:
        """What is asked and what the cluster has; "" if the ranks have their place and start."""
        return self._why_pending() if _group_is_pending() else ""

    def fit(
        self, request: FitRequest, on_progress: Callable[[FitProgress], None] = lambda report: None
    ) -> FitResult:
        """Run one training run on all ranks and wait for it; starts the group if need be.

        Raises:
            LearnerError: the run could not be done; the message holds the cause.
        """
        self.start()
        self.wait_ready()
        number = ray.get(self._mailbox.put.remote(_with_absolute_paths(request)))
        seen: FitProgress | None = None
        moved = time.monotonic()
        while True:
            self._check_alive()
            try:
                progress, outcome = ray.get(
                    self._mailbox.watch.remote(number, seen, _WATCH_TIMEOUT_S)
                )
            except ray.exceptions.RayError as lost:
                raise LearnerError(
                    f"learner group ended during fit {request.fit_id!r}: {lost}"
                ) from lost
            if outcome is not None and outcome.result is None:
                raise LearnerError(outcome.error)
            if progress is not None and progress != seen:
                seen, moved = progress, time.monotonic()
                on_progress(progress)
            if outcome is not None:
                return outcome.result
            if time.monotonic() - moved > self._stalled_after_s:
                error = (
                    f"fit {request.fit_id!r} reported nothing for {self._stalled_after_s:.0f} s "
                    f"(cluster.fit_stalled_after_s); last: {_standing(seen)}"
                )
                ray.get(self._mailbox.finish.remote(number, Outcome(error=error)))
                raise LearnerError(error)

    def shutdown(self, timeout_s: float = 20.0) -> None:
        """End the group; a fit that is under way is given `timeout_s` to finish."""
        if self._mailbox is None:
            return
        ray.get(self._mailbox.stop.remote())
        assert self._thread is not None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("learner group did not end within %.0f s", timeout_s)
        ray.kill(self._mailbox)
        self._mailbox = self._thread = None

    def _check_alive(self) -> None:
        if self._ended is not None:
            raise LearnerError(f"learner group ended: {self._ended}")

    def _run(self) -> None:
        """Body of the background thread: the one Ray Train run."""
        # Imported here because it costs seconds, which the driver has better uses for, and untyped
        # because what the names stand for depends on Ray Train's version switch at run time.
        train: Any = importlib.import_module("ray.train")
        train_torch: Any = importlib.import_module("ray.train.torch")

        class Trainer(train_torch.TorchTrainer):
            def _create_default_callbacks(self) -> list[Any]:
                # The cleaner asks the dashboard every second whether the controller lives, and
                # warns as often where there is no dashboard. What it cleans up, a placement group
                # that outlived its controller, here ends with the driver's job.
                return [
                    callback
                    for callback in super()._create_default_callbacks()
                    if type(callback).__name__ != "PlacementGroupCleanerCallback"
                ]

        # A fit is short and starts over; an actor that looks out for reclaimed nodes is no use.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        try:
            trainer = Trainer(
                _train_loop,
                train_loop_config={"mailbox": self._mailbox, "store": self._store},
                torch_config=train_torch.TorchConfig(timeout_s=COLLECTIVE_S),
                scaling_config=train.ScalingConfig(
                    num_workers=self.num_workers,
                    use_gpu=self._use_gpu,
                    resources_per_worker=self._resources,
                ),
                run_config=train.RunConfig(
                    name=f"learner-{uuid.uuid4().hex[:8]}",
                    storage_path=self._storage_path,
                    failure_config=train.FailureConfig(max_failures=MAX_RESTARTS),
                    logging_config=train.LoggingConfig(log_level="WARNING"),
                    worker_runtime_env={"env_vars": self._environment()},
                ),
            )
            trainer.fit()
            self._ended = "it was shut down"
        except BaseException as error:
            self._ended = error

    def _environment(self) -> dict[str, str]:
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if not self._use_gpu:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return environment


def _train_loop(config: dict[str, Any]) -> None:
    """What every rank does for the life of the group."""
    import ray.train
    import torch.distributed as dist

    from learner.ranks import on_all_ranks, release_memory
    from learner.trainer import run_fit, warm_up

    # DeepSpeed calls functions that newer torch renamed; nothing a user of ours can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    mailbox = config["mailbox"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    warm_up()
    shared = [uuid.uuid4().hex]
    if world_size > 1:
        dist.broadcast_object_list(shared, src=0)
    incarnation = shared[0]
    if rank == 0:
        ray.get(mailbox.join.remote(incarnation))
    done = 0
    while True:
        ticket = ray.get(mailbox.take.remote(incarnation, done, _TAKE_TIMEOUT_S))
        if ticket is None:
            continue
        if ticket == "stop":
            return
        number = done = ticket.number

        def progress(report: FitProgress, number: int = number) -> None:
            mailbox.report.remote(number, report)

        try:
            on_all_ranks(partial(_find_store, config["store"]), ticket.request.fit_id)
            result = run_fit(ticket.request, rank=rank, world_size=world_size, progress=progress)
        except RankError as error:
            ray.get(mailbox.finish.remote(number, Outcome(error=str(error))))
            raise
        except LearnerError as error:
            if rank == 0:
                ray.get(mailbox.finish.remote(number, Outcome(error=str(error))))
        except BaseException as error:
            cause = f"rank {rank}: {type(error).__name__}: {error}"
            ray.get(mailbox.note_failure.remote(incarnation, cause))
            raise
        else:
            if rank == 0:
                ray.get(mailbox.finish.remote(number, Outcome(result=result)))
        release_memory()


def _find_store(store: RunStore | None) -> None:
    """Raises LearnerError if the run's store is not on this rank's machine."""
    try:
        if store is not None:
            store.check_run()
    except StoreError as error:
        raise LearnerError(str(error)) from error


def _standing(progress: FitProgress | None) -> str:
    """Where a fit stood last, in words."""
    if progress is None:
        return "nothing"
    return f"{progress.phase} {progress.step:,} of {progress.num_steps:,}"


def _group_is_pending() -> bool:
    """True if a placement group waits: Ray Train asks for the ranks' places by one."""
    return any(group["state"] == "PENDING" for group in placement_group_table().values())


def _with_absolute_paths(request: FitRequest) -> FitRequest:
    """Ray Train gives each rank a working directory of its own."""
    return replace(
        request,
        base=str(Path(request.base).absolute()),
        data=str(Path(request.data).absolute()),
        checkpoints=str(Path(request.checkpoints).absolute()),
    )


MailboxActor = ray.remote(num_cpus=0)(Mailbox)
