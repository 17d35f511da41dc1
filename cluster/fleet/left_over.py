"""What lives on when the driver of a run dies, who takes it over, and who ends it.

    driver (rstar evolve) --a look every second--> Watchman (one per run)
        | kill -9                                      | nobody looked for `orphan_s`
        v                                              v
    replicas, sandboxes, workers, coordinator     end_left_over: workers commit what is finished
    go on: jobs are leased, trees committed       and keep what is open; then all is killed,
        |                                         the watchman last
        +--`rstar evolve` again: each is asked for its `Mark`
              | made of the same code and settings     | not, or it does not answer
              v                                        v
           a member of the new driver's pool        ended as above, at once; the reason is said

All actors of a run but the learner and the endpoint are detached and stand in the run's own Ray
namespace, which is how they are found, and how none of another run ever is. Detached, so that a
driver that dies (a lost connection, a rebooted machine, an upgrade) costs nothing that is paid for:
engines and workers carry on without it, and the next driver takes them over as they are. A mark
is of one kind of actor: the source it runs (`source_digest`), the packages, and the part of the
config that made it; so a new version of the driver alone, or of pages and plots, keeps everything.
What is not in a mark is not lost either: the store is the truth, and what cannot be taken over
starts anew. The learner ends with its driver: a fit that is cut off begins again. The endpoint too:
nobody should pay a provider unseen, nor should a key outlive its user.

A driver whose event loop stands still for `orphan_s` is taken for dead; its keepers then start
everything anew. One that is told to stop shortens that (`leaving`): if it is killed before it has
ended its actors, the watchman does. An embedded Ray ends with its driver, so there it has none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from cluster.folder.run_folder import differences
from cluster.machines.nodes import RUNS
from rollout.store import RunStore

logger = logging.getLogger(__name__)

WATCHMAN = "watchman"
WORKER = "worker"
COORDINATOR = "coordinator"
"""Beginnings of names: of actors that are ended last, drained first, and looked for."""

GONE_S = 15.0
"""How long the end of killed actors is waited for."""

DRAIN_S = 20.0
"""How long stopped rollout workers may take to commit what is finished."""

SILENT = "it does not answer"

LEAVING_S = 5.0
"""`orphan_s` of a driver that was told to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where the actors of a run stand, and whose they are."""

    namespace: str
    driver: str = field(default_factory=lambda: uuid.uuid4().hex[:6])
    """Part of each name: a driver never takes the actors of another for its own."""

    def options(self, name: str) -> dict[str, str]:
        """What an actor of this name asks of Ray, to outlive its driver and be found."""
        return {
            "name": f"{name}-{self.driver}",
            "namespace": self.namespace,
            "lifetime": "detached",
        }

    def group(self, name: str) -> str:
        """Name of the placement group of an actor; a group has no namespace of its own."""
        return f"{self.namespace}/{name}-{self.driver}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What an actor was made of; kept in its process, told to the next driver."""

    code: str
    """Of the source it runs, see `source_digest`."""
    settings: Mapping[str, Any]
    """By key of the config where there is one; plain data."""

    def why_not(self, wanted: Mark) -> str:
        """Why an actor with this mark is not what is wanted now; "" if it is."""
        if self.code != wanted.code:
            return "it runs another version of the code"
        changed = differences(dict(self.settings), dict(wanted.settings))
        return f"other values of {', '.join(changed[:5])}" if changed else ""


_mark: Mark | None = None
"""Of this process, if it is an actor of a run."""


def _set_mark(actor: Any, mark: Mark) -> None:
    global _mark
    _mark = mark


def _get_mark(actor: Any) -> Mark | None:
    return _mark


def put_mark(handle: Any, mark: Mark) -> None:
    """Have an actor remember what it was made of; returns at once."""
    handle.__ray_call__.remote(_set_mark, mark)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeftActor:
    """One actor that a driver has left."""

    name: str
    """As Ray knows it: `Home.options`."""
    handle: Any
    mark: Mark | None
    """None: it does not say, because it hangs, has no process yet, or was restarted."""

    @property
    def member(self) -> str:
        """As its keeper called it."""
        return self.name.rpartition("-")[0]

    @property
    def pool(self) -> str:
        return self.name.partition("-")[0]

    def why_not(self, wanted: Mark) -> str:
        """Why it cannot be taken over; "" if it can."""
        return self.mark.why_not(wanted) if self.mark is not None else SILENT


def find_left(namespace: str, answer_s: float) -> list[LeftActor]:
    """The actors that a driver has left of a run, each with its mark; blocks, while one is silent.

    None are found if their time is over and they are being ended: that is waited for.

    Args:
        answer_s: one that has not answered by then has no mark.
    """
    handles = {n: h for n in left_over(namespace) if (h := _find(n, namespace)) is not None}
    for name, handle in handles.items():
        if name.startswith(WATCHMAN) and not _answer(handle.seen.remote(new=True), answer_s, False):
            end_left_over(namespace, DRAIN_S)
            return []
    asked = {name: handle.__ray_call__.remote(_get_mark) for name, handle in handles.items()}
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=answer_s)
    return [
        LeftActor(name=name, handle=handles[name], mark=_answer(asked[name], 0.0, None))
        for name in asked
    ]


def _answer(asked: Any, limit_s: float, otherwise: Any) -> Any:
    try:
        return ray.get(asked, timeout=limit_s)
    except RayError:
        return otherwise


def namespace_of(store: RunStore) -> str:
    """The Ray namespace of the run in a store: another one for every folder, and for a new run
    in the place of one that was deleted.

    Raises:
        StoreError: the folder cannot be written.
    """
    identity = (store.identify() + store.root).encode()
    return f"{RUNS}{hashlib.blake2b(identity, digest_size=8).hexdigest()}"


def find_coordinator(namespace: str) -> Any:
    """The present coordinator of a run, from any of its actors; None while there is none."""
    names = [name for name in left_over(namespace) if name.startswith(COORDINATOR)]
    return _find(names[-1], namespace) if names else None


def left_over(namespace: str) -> list[str]:
    """Names of the living actors in a namespace, a watchman last."""
    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == namespace
    ]
    return sorted(names, key=lambda name: (name.startswith(WATCHMAN), name))


def end_left_over(namespace: str, drain_s: float, only: Collection[str] | None = None) -> list[str]:
    """Drain the rollout workers of a namespace, then end its actors and their placement groups.

    Blocks until they are gone, at most about `drain_s` + 20 s.

    Args:
        drain_s: time the workers get to commit what is finished and keep what is open.
        only: names of those that are to end; None: all.
    Returns:
        Names of the actors that were there.
    """
    names = [name for name in left_over(namespace) if only is None or name in only]
    handles = {name: handle for name in names if (handle := _find(name, namespace)) is not None}
    drains = [h.drain.remote() for name, h in handles.items() if name.startswith(WORKER)]
    if drains:
        _, late = ray.wait(drains, num_returns=len(drains), timeout=drain_s)
        if late:
            logger.warning("%d rollout workers did not drain within %.0f s", len(late), drain_s)
    # First, because a watchman that does this ends with the last of the names.
    remove_groups(namespace, only)
    end_all(handles)
    # A name is free for others only when its actor's end has been heard of.
    give_up_s = time.monotonic() + GONE_S
    while {*names}.intersection(left_over(namespace)) and time.monotonic() < give_up_s:
        time.sleep(0.1)
    if drains and (coordinator := find_coordinator(namespace)) is not None:
        for name in names:
            if name.startswith(WORKER):  # what it could not hand back is not waited for
                coordinator.forget_worker.remote(name.rpartition("-")[0])
    return names


def end_all(handles: Mapping[str, Any]) -> None:
    """Kill actors; those that are gone are no trouble."""
    for name, handle in handles.items():
        try:
            ray.kill(handle)
        except RayError as error:
            logger.info("An actor could not be killed: %s name=%s", error, name)


def groups_of(namespace: str) -> dict[str, PlacementGroup]:
    """The placement groups of a namespace, by the names of the actors that stand in them."""
    return {
        entry["name"].removeprefix(f"{namespace}/"): PlacementGroup(
            ray.PlacementGroupID(bytes.fromhex(entry["placement_group_id"]))
        )
        for entry in placement_group_table().values()
        if entry["name"].startswith(f"{namespace}/") and entry["state"] != "REMOVED"
    }


def remove_groups(namespace: str, only: Collection[str] | None = None) -> None:
    """Remove placement groups of a namespace, all or by name; what is in them ends."""
    for name, group in groups_of(namespace).items():
        if only is None or name in only:
            remove_placement_group(group)


def _find(name: str, namespace: str) -> Any:
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


class Watchman:
    """Ends the actors of a run when its driver has not been heard of for long."""

    def __init__(
        self,
        namespace: str,
        orphan_s: float,
        *,
        drain_s: float = 30.0,
        look_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str, float], Any] = end_left_over,
    ) -> None:
        """
        Args:
            orphan_s: the driver is taken for dead when it said nothing for so long.
            drain_s: time the rollout workers get then.
        """
        self._namespace = namespace
        self._orphan_s = self._limit_s = orphan_s
        self._drain_s = drain_s
        self._look_s = look_s
        self._clock = clock
        self._end = end
        # Started anew by Ray it knows nothing of the past: the time begins again.
        self._seen_s = clock()
        self._over = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchman", daemon=True)
        self._thread.start()

    def seen(self, *, new: bool = False) -> bool:
        """The driver lives; False if that comes too late.

        Args:
            new: another driver, which is not `leaving`.
        """
        with self._lock:
            self._seen_s = self._clock()
            if new:
                self._limit_s = self._orphan_s
            return not self._over

    def leaving(self) -> None:
        """The driver is ending; if it is killed before it has, that is to be noticed soon."""
        self._limit_s = min(self._orphan_s, LEAVING_S)

    def pid(self) -> int:
        """Process id, for logs and tests."""
        return os.getpid()

    def _watch(self) -> None:
        while not self._over:
            time.sleep(self._look_s)
            with self._lock:
                self._over = self._clock() - self._seen_s >= self._limit_s
        logger.warning("The driver is gone; its actors are ended namespace=%s", self._namespace)
        self._end(self._namespace, self._drain_s)


WatchmanActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Watchman)
