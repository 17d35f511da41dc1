"""What lives on when the driver of a run dies, for how long, and who ends it.

    driver (rstar evolve) --a look every second--> Watchman (one per run)
        | kill -9                                      | nobody looked for `orphan_s`
        v                                              v
    replicas, sandboxes, workers, coordinator     end_left_over: workers commit what is finished
    go on: jobs are leased, trees committed       and keep what is open; then all is killed,
        |                                         the watchman last
        +--`rstar evolve` again: end_left_over at once, then new actors on the same store

All actors of a run but the learner and the endpoint are detached and stand in the run's own Ray
namespace, which is how they are found. Detached, so that a driver that dies (a lost connection, a
rebooted machine) costs nothing that is paid for: engines and workers carry on without it. Not taken
over by the next driver, because that one may have other code, another config or another round in
hand; the store is the truth, and engines start in minutes. The learner ends with its driver: a fit
that is cut off begins again. The endpoint too: nobody should pay a provider unseen, nor should a
key outlive its user.

A driver whose event loop stands still for `orphan_s` is taken for dead; its keepers then start
everything anew. An embedded Ray ends with its driver, watchman or not, so there it has none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from rollout.store import RunStore

logger = logging.getLogger(__name__)

WATCHMAN = "watchman"
WORKER = "worker"
COORDINATOR = "coordinator"
"""Beginnings of names: of actors that are ended last, drained first, and looked for."""

GONE_S = 15.0
"""How long the end of killed actors is waited for."""


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


def namespace_of(store: RunStore) -> str:
    """The Ray namespace of the run in a store: another one for every folder, and for a new run
    in the place of one that was deleted.

    Raises:
        StoreError: the folder cannot be written.
    """
    identity = (store.identify() + store.root).encode()
    return f"rstar-{hashlib.blake2b(identity, digest_size=8).hexdigest()}"


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


def end_left_over(namespace: str, drain_s: float) -> list[str]:
    """Drain the rollout workers of a namespace, then end all its actors and placement groups.

    Blocks until they are gone, at most about `drain_s` + 20 s.

    Args:
        drain_s: time the workers get to commit what is finished and keep what is open.
    Returns:
        Names of the actors that were there.
    """
    names = left_over(namespace)
    handles = {name: handle for name in names if (handle := _find(name, namespace)) is not None}
    drains = [h.drain.remote() for name, h in handles.items() if name.startswith(WORKER)]
    if drains:
        _, late = ray.wait(drains, num_returns=len(drains), timeout=drain_s)
        if late:
            logger.warning("%d rollout workers did not drain within %.0f s", len(late), drain_s)
    # First, because a watchman that does this ends with the last of the names.
    remove_groups(namespace)
    end_all(handles)
    # A name is free for others only when its actor's end has been heard of.
    give_up_s = time.monotonic() + GONE_S
    while left_over(namespace) and time.monotonic() < give_up_s:
        time.sleep(0.1)
    return names


def end_all(handles: Mapping[str, Any]) -> None:
    """Kill actors; those that are gone are no trouble."""
    for name, handle in handles.items():
        try:
            ray.kill(handle)
        except RayError as error:
            logger.info("An actor could not be killed: %s name=%s", error, name)


def remove_groups(namespace: str) -> None:
    """Remove the placement groups of a namespace; what is in them ends."""
    for entry in placement_group_table().values():
        if entry["name"].startswith(f"{namespace}/") and entry["state"] != "REMOVED":
            key = ray.PlacementGroupID(bytes.fromhex(entry["placement_group_id"]))
            remove_placement_group(PlacementGroup(key))


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
        self._orphan_s = orphan_s
        self._drain_s = drain_s
        self._look_s = look_s
        self._clock = clock
        self._end = end
        # Started anew by Ray it knows nothing of the past: the time begins again.
        self._seen_s = clock()
        self._thread = threading.Thread(target=self._watch, name="watchman", daemon=True)
        self._thread.start()

    def seen(self) -> None:
        """The driver lives."""
        self._seen_s = self._clock()

    def pid(self) -> int:
        """Process id, for logs and tests."""
        return os.getpid()

    def _watch(self) -> None:
        while self._clock() - self._seen_s < self._orphan_s:
            time.sleep(self._look_s)
        logger.warning("The driver is gone; its actors are ended namespace=%s", self._namespace)
        self._end(self._namespace, self._drain_s)


WatchmanActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Watchman)
