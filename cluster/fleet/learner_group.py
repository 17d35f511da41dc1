"""The learner's worker group: one Ray Train run that does several fits.

    driver: LearnerGroup.fit --put--> Mailbox <--take-- rank 0..n-1: run_fit (torch, DeepSpeed)
                             <-watch-         <-progress, finish-

Starting a group costs seconds to tens of seconds (controller, placement, processes, imports, the
process group). So the train loop of a single `TorchTrainer.fit` takes one `FitRequest` after the
other from a small mailbox actor and waits there, blocked and without a CPU, in between. The mailbox
stands on the driver's node, as Ray Train's controller does by itself: what they are lost with ends
the driver, too. The machines are asked for, by Ray Train, from `start` to `shutdown`.

Faults:
- an error all ranks saw alike (`LearnerError`) is the answer to that request; the group stays;
- a rank out of memory (`RankError`) is the answer too, but its peers hang in a collective, so the
  group is started anew by Ray Train;
- a rank that dies or raises anything else: Ray Train starts the group anew and the ranks find the
  same request in the mailbox, at most `attempts` times;
- a group that finds no place, says nothing or ends (`LearnerLostError`) is ended for good; the next
  `fit` starts another one.

Each life of a group, from `start` to `shutdown`, has a mailbox, a thread and an end of its own, so
that one which ends late ends nothing but itself. The ranks of one incarnation share an id, by which
the mailbox gives a request to all of them or to none. A fit that was published but not answered
runs again and takes the checkpoint that is there.

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
from ray.exceptions import RayError

from cluster.fleet.config import ActorConfig
from cluster.folder.staging import Stager, staged_request
from cluster.jobs.attempts import GO_ON, LostError
from cluster.machines import nodes
from learner.fit import FitProgress, FitRequest, FitResult, LearnerError, RankError
from rollout.run_store import RunStore, StoreError, absolute

logger = logging.getLogger(__name__)

PLACEMENT_S = 20.0
"""After so long without a place the reason is looked for."""

LOOK_S = 2.0
"""Pause between two looks at whether the ranks have their place."""

MAX_WAITS = 4
"""Time-outs that a group without a place is waited for while nodes are on their way."""

MAX_RESTARTS = 20
"""Incarnations of one life of the group."""

PLACE_TIMEOUT_S = 86_400
"""Ray Train's own; by default it takes its request back, and makes it again, every minute."""

RAY_TRAIN = "ray_train"
"""Ray Train's own files, under the run."""

COLLECTIVE_S = 1800
"""Bound of every torch.distributed operation."""

_TAKE_TIMEOUT_S = 600.0
_WATCH_TIMEOUT_S = 1.0
_DIED = "a worker process died"


class LearnerLostError(LostError, LearnerError):
    """The group was lost or never came, not by a fault of the request; the message says how."""


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
        self._controller: Any = None

    async def controlled_by(self, controller: Any) -> None:
        """Ray Train's controller has started."""
        self._controller = controller

    async def controller(self) -> Any:
        """Handle of Ray Train's controller; None before it has started."""
        return self._controller

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
                last = self._causes.get(self._incarnations[-1], _DIED)
                self._close(
                    Outcome(
                        error=f"fit {self._ticket.request.fit_id!r} failed "
                        f"{self._max_attempts} times, at last: {last}. {GO_ON}"
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
    ) -> tuple[FitProgress | None, Outcome | None, list[str]]:
        """Progress and outcome of a request, as soon as either is news, or after `timeout_s`.

        Also why each incarnation that had it before the present one ended.
        """
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while self._outcome is None and self._progress == seen:
                try:
                    await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
                except TimeoutError:
                    break
            assert self._ticket is not None and self._ticket.number == number
            ended = [self._causes.get(name, _DIED) for name in self._incarnations[:-1]]
            return self._progress, self._outcome, ended

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


class _Life:
    """One Ray Train run: its mailbox, and what is known of its place and of its end."""

    def __init__(self, attempts: int) -> None:
        beside_driver = nodes.near_driver(soft=False)
        self.mailbox: Any = MailboxActor.options(**beside_driver).remote(attempts)
        self.ended: BaseException | str | None = None
        """Why there are no ranks any more; None: it goes on."""
        self.over = threading.Event()
        """Nobody uses it any more."""
        self.pending_s: float | None = None
        """Since when some rank has no place; None: all have theirs, or it was not asked yet."""
        self.coming_s = 0.0
        """When a node was last seen on its way."""
        self.placed_s = 0.0
        """When all ranks were last seen to have got their places."""
        self.threads: list[threading.Thread] = []
        self._controller: Any = None

    def begin(self, work: Callable[[_Life], None], name: str) -> None:
        """Have something done with it in the background."""
        thread = threading.Thread(target=work, args=(self,), name=name, daemon=True)
        self.threads.append(thread)
        thread.start()

    def controller(self) -> Any:
        """Ray Train's; None while there is none."""
        if self._controller is None:
            self._controller = ray.get(self.mailbox.controller.remote())
        return self._controller

    def check(self) -> None:
        """Raises LearnerLostError if it has ended."""
        if self.ended is not None:
            raise LearnerLostError(f"learner group ended: {self.ended}")

    def kill(self) -> None:
        """End Ray Train's processes now, and take back what they asked for."""
        try:
            controller = self.controller()
            if controller is not None:
                ray.kill(controller)  # its ranks go with it, but its placement group stays
                for group in nodes.groups_made_by(controller):
                    nodes.remove_group(group)
        except RayError as error:
            logger.warning("The learner group's controller was not ended: %s", error)


class LearnerGroup:
    """A fixed number of training ranks, kept alive between fits.

        start -> fit, fit, ... -> shutdown

    Not thread-safe: one fit at a time.
    """

    def __init__(
        self,
        settings: ActorConfig,
        store: RunStore,
        *,
        start_timeout_s: float = 300.0,
        stalled_after_s: float = 1800.0,
        attempts: int = 3,
        why_pending: Callable[[], str] = lambda: "",
        coming: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda text: None,
        stage: Path | None = None,
    ) -> None:
        """
        Args:
            stage: as of `cluster.folder.staging.Stager`.
            settings: how many ranks, and what each reserves.
            store: of the run, which all ranks have to see; Ray Train's own files go there too.
            start_timeout_s: how long a fit waits for a place while no node is on its way, and then
                for the ranks to come to life.
            stalled_after_s: a fit that reports nothing for so long is an error.
            attempts: incarnations of the group one fit may cost.
            why_pending: why the ranks find no place, in words; "" if it is not known.
            coming: whether nodes are on their way.
            note: told what a person should know now.
            store: of the run, by its id, which each rank has to find before a fit; None: any.
        """
        self._stage = stage
        self._store = store
        self.num_workers = settings.replicas
        self._resources = settings.learner_bundle()
        self._use_gpu = settings.num_gpus > 0
        self._start_timeout_s = start_timeout_s
        self._stalled_after_s = stalled_after_s
        self._attempts = attempts
        self._why_pending = why_pending
        self._coming = coming
        self._note = note
        self._life: _Life | None = None

    def start(self) -> None:
        """Start the group in the background, and so ask for its machines; returns at once."""
        if self._life is not None and self._life.ended is None:
            return
        self._life = _Life(self._attempts)
        self._life.begin(self._run, "learner-group")
        self._life.begin(self._look, "learner-look")

    def fit(
        self,
        request: FitRequest,
        on_progress: Callable[[FitProgress], None] = lambda report: None,
        on_retry: Callable[[str], None] = lambda reason: None,
    ) -> FitResult:
        """Run one training run on all ranks and wait for it; starts the group if need be.

        Args:
            on_retry: told why ranks failed that are started anew for the same request.
        Raises:
            LearnerLostError: there is no group, or none any more; a further call starts another.
            LearnerError: the run could not be done; the message holds the cause.
        """
        self.start()
        life = self._life
        assert life is not None
        try:
            self._wait_ready(life)
            return self._fit(life, request, on_progress, on_retry)
        except RayError as lost:
            self.shutdown(0.0)
            raise LearnerLostError(
                f"learner group ended during fit {request.fit_id!r}: {lost}"
            ) from lost
        except LearnerLostError:
            self.shutdown(0.0)
            raise

    def _wait_ready(self, life: _Life) -> None:
        """Block until the ranks are up and have their libraries loaded.

        Raises:
            LearnerLostError: they have no place, or do not come to life in it, for too long.
        """
        began_s = time.monotonic()
        while not ray.get(life.mailbox.joined.remote()):
            life.check()
            self._check_place(life, began_s)
            since_s = max(began_s, life.placed_s)
            if life.pending_s is None and time.monotonic() - since_s > self._start_timeout_s:
                raise LearnerLostError(
                    self._did_not("start") + "it has its place, so the machine may be too slow"
                )
            time.sleep(0.1)

    def _check_place(self, life: _Life, began_s: float) -> None:
        """Raises LearnerLostError if ranks have been without a place for too long since a time."""
        pending_s, now_s = life.pending_s, time.monotonic()
        if pending_s is None:
            return
        since_s = max(pending_s, began_s)
        waited_s, alone_s = now_s - since_s, now_s - max(since_s, life.coming_s)
        if alone_s > self._start_timeout_s or waited_s > MAX_WAITS * self._start_timeout_s:
            why = self._why_pending() or "its machines did not come"
            raise LearnerLostError(self._did_not("find a place") + why)

    def _did_not(self, what: str) -> str:
        return (
            f"learner group of {self.num_workers} x {self._resources} did not {what} within "
            f"{self._start_timeout_s:.0f} s (cluster.start_timeout_s): "
        )

    def _fit(
        self,
        life: _Life,
        request: FitRequest,
        on_progress: Callable[[FitProgress], None],
        on_retry: Callable[[str], None],
    ) -> FitResult:
        number = ray.get(life.mailbox.put.remote(_with_absolute_paths(request)))
        seen: FitProgress | None = None
        told = 0
        began_s = moved_s = time.monotonic()
        while True:
            life.check()
            progress, outcome, ended = ray.get(
                life.mailbox.watch.remote(number, seen, _WATCH_TIMEOUT_S)
            )
            for cause in ended[told:]:
                on_retry(f"fit {request.fit_id!r}: {cause}")
            told = max(told, len(ended))
            if outcome is not None and outcome.result is None:
                raise LearnerError(outcome.error)
            if progress is not None and progress != seen:
                seen, moved_s = progress, time.monotonic()
                on_progress(progress)
            if outcome is not None:
                return outcome.result
            if life.pending_s is not None:  # a node was lost: the ranks wait for another one
                self._check_place(life, began_s)
                moved_s = time.monotonic()
            if time.monotonic() - moved_s > self._stalled_after_s:
                raise LearnerLostError(
                    f"fit {request.fit_id!r} reported nothing for {self._stalled_after_s:.0f} s "
                    f"(cluster.fit_stalled_after_s); last: {_standing(seen)}"
                )

    def shutdown(self, timeout_s: float = 20.0) -> None:
        """End the group, and give its machines back.

        Args:
            timeout_s: given to a fit that is under way; what is not over then is killed.
        """
        life, self._life = self._life, None
        if life is None:
            return
        life.over.set()
        try:
            ray.get(life.mailbox.stop.remote())
        except RayError as error:
            logger.warning("The learner group's mailbox is gone: %s", error)
            timeout_s = 0.0
        run, look = life.threads
        run.join(0.0 if life.pending_s is not None else timeout_s)
        if run.is_alive():
            if timeout_s:
                logger.warning("learner group did not end within %.0f s", timeout_s)
            life.kill()
        look.join()
        ray.kill(life.mailbox)

    def _look(self, life: _Life) -> None:
        """Body of a background thread: whether the ranks have their place; says so if not."""
        told = False
        while not life.over.wait(LOOK_S) and life.ended is None:
            try:
                controller = life.controller()
                groups = nodes.groups_made_by(controller) if controller is not None else {}
                now_s = time.monotonic()
                if not any(groups.values()):
                    if life.pending_s is not None:
                        life.placed_s = now_s
                    life.pending_s, told = None, False
                    continue
                if life.pending_s is None:
                    life.pending_s = now_s
                if self._coming():
                    life.coming_s = now_s
                if not told and now_s - life.pending_s > PLACEMENT_S:
                    told = True
                    why = self._why_pending() or "its machines are on their way"
                    self._note(f"the learner waits for a place: {why}")
            except Exception:
                # Ray's head may be away for a moment; whoever waits for a fit has its own bounds.
                logger.exception("The learner group could not be looked at")

    def _run(self, life: _Life) -> None:
        """Body of the background thread: the one Ray Train run."""
        # Imported here because it costs seconds, which the driver has better uses for, and untyped
        # because what the names stand for depends on Ray Train's version switch at run time.
        train: Any = importlib.import_module("ray.train")
        train_torch: Any = importlib.import_module("ray.train.torch")
        callback: Any = importlib.import_module("ray.train.v2._internal.execution.callback")
        mailbox = life.mailbox
        files, storage_path = self._store.below(RAY_TRAIN).for_arrow()

        class TellsMailbox(callback.ControllerCallback):
            def after_controller_start(self, train_run_context: Any) -> None:
                controller = ray.get_runtime_context().current_actor
                ray.get(mailbox.controlled_by.remote(controller))

        class Trainer(train_torch.TorchTrainer):
            def _create_default_callbacks(self) -> list[Any]:
                # The cleaner asks the dashboard every second whether the controller lives, and
                # warns as often where there is no dashboard. What it cleans up, a placement group
                # that outlived its controller, here ends with the driver's job, or by `kill`.
                return [
                    callback
                    for callback in super()._create_default_callbacks()
                    if type(callback).__name__ != "PlacementGroupCleanerCallback"
                ]

        # A fit is short and starts over; an actor that looks out for reclaimed nodes is no use.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(PLACE_TIMEOUT_S))
        try:
            trainer = Trainer(
                _train_loop,
                train_loop_config={
                    "mailbox": mailbox,
                    "store": self._store,
                    "stage": Stager(self._stage),
                },
                torch_config=train_torch.TorchConfig(timeout_s=COLLECTIVE_S),
                scaling_config=train.ScalingConfig(
                    num_workers=self.num_workers,
                    use_gpu=self._use_gpu,
                    resources_per_worker=self._resources,
                ),
                run_config=train.RunConfig(
                    name=f"learner-{uuid.uuid4().hex[:8]}",
                    storage_path=storage_path,
                    storage_filesystem=files,
                    failure_config=train.FailureConfig(max_failures=MAX_RESTARTS),
                    callbacks=[TellsMailbox()],
                    logging_config=train.LoggingConfig(log_level="WARNING"),
                    worker_runtime_env={"env_vars": self._environment()},
                ),
            )
            trainer.fit()
            life.ended = "it was shut down"
        except BaseException as error:
            life.ended = error

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
    stage: Stager = config["stage"]
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
            fit_id = ticket.request.fit_id
            on_all_ranks(partial(_find_store, config["store"]), fit_id)
            request = on_all_ranks(partial(staged_request, ticket.request, stage), fit_id)
            result = run_fit(request, rank=rank, world_size=world_size, progress=progress)
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


def _find_store(store: RunStore) -> None:
    """Raises LearnerError if the run's store is not on this rank's machine."""
    try:
        store.check_run()
    except StoreError as error:
        raise LearnerError(str(error)) from error


def _standing(progress: FitProgress | None) -> str:
    """Where a fit stood last, in words."""
    if progress is None:
        return "nothing"
    return f"{progress.phase} {progress.step:,} of {progress.num_steps:,}"


def _with_absolute_paths(request: FitRequest) -> FitRequest:
    """Ray Train gives each rank a working directory of its own."""
    return replace(
        request,
        base=absolute(request.base),
        data=absolute(request.data),
        checkpoints=absolute(request.checkpoints),
    )


MailboxActor = ray.remote(num_cpus=0)(Mailbox)
