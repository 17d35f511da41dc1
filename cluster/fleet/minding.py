"""Nodes come and go, pools grow and shrink: what a driver does about it, every two seconds.

    Ray: a node drains --> its members drain (`PoolKeeper.drain`), others are started elsewhere
    a new node         --> a watcher for spot notices, if the config asks for it
    work at hand       --> Scaler --> the size of a pool; what it lacks is asked of the autoscaler
    no learner's node  --> said in time: it is needed only when the round's search is over
    a run that counts more waits for a place --> a pool that holds the like gives one up

Whatever fails here is logged and tried again: a run goes on without, and what dies is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.fleet.config import ClusterConfig, ServingConfig
from cluster.fleet.keeper import PoolKeeper
from cluster.fleet.pools import SETTINGS, Pools
from cluster.machines import nodes
from cluster.machines.placement import Ask, explain
from cluster.machines.scaler import MemberState, Scaler, emptiest

logger = logging.getLogger(__name__)

MIND_S = 2.0
"""Pause between two looks at the nodes."""

GIVE_WAY_S = 10.0
"""Pause between two members that are given up for a run that counts more."""

TAKE_BACK_S = 60.0
"""After so long without anybody to give way to, pools have their size again."""

ABSENT_S = 20.0
"""After so long without a node for the learner a person is told."""


class Minder:
    """Leaves nodes that go, watches new ones, and scales; see the module."""

    def __init__(
        self,
        config: ServingConfig,
        pools: Pools,
        *,
        learner: bool,
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            learner: the nodes will have to hold the learner group, too.
            note: told what a person should know now.
        """
        cluster = config.cluster
        self._config = config
        self._pools = pools
        self._note = note
        self._watchers: dict[str, Any] = {}
        """Of spot notices, by node."""
        self._gave_way_s = self._heard_s = float("-inf")
        """When a member was given up last, and when somebody last waited for one."""
        self._foresees_learner = learner
        self._absent_s: float | None = None
        """Since when the learner's nodes are neither there nor able to come."""
        self._scaler = Scaler(
            {
                name: (scaling, getattr(cluster, name).bundle())
                for name, scaling in cluster.autoscale.items()
            }
        )
        assert pools.home is not None
        # When the driver is dead, for as long as its actors go on.
        self._request = nodes.NodeRequest(pools.home.namespace, expires_s=cluster.orphan_s)
        self._minding = asyncio.create_task(self._mind())

    async def stop(self) -> None:
        """Look no more, and ask the autoscaler for nothing."""
        self._minding.cancel()
        await asyncio.gather(self._minding, return_exceptions=True)
        await asyncio.to_thread(self._request.withdraw)

    def change(self, config: ServingConfig) -> None:
        """Go on with another config: bounds of the pools that scale."""
        self._config = config
        for name, bounds in config.cluster.autoscale.items():
            self._scaler.bound(name, bounds)

    def tried(self, name: str, ready: bool) -> None:
        """A start succeeded or failed: a pool that is scaled pauses after failures."""
        if name not in self._config.cluster.autoscale:
            return
        if ready:
            self._scaler.started(name)
        else:
            self._scaler.start_failed(name, time.monotonic())

    async def _mind(self) -> None:
        while True:
            try:
                await self._watch_new_nodes()
                await self._leave_draining_nodes()
                await self._scale()
                await self._give_way()
                await self._foresee_learner()
            except Exception:
                # Whatever fails here is tried again; what dies meanwhile is replaced anyway.
                logger.exception("The nodes could not be looked at")
            await asyncio.sleep(MIND_S)

    async def _watch_new_nodes(self) -> None:
        spot = self._config.cluster.spot
        if spot is None:
            return
        living = await nodes.asked(nodes.living)
        for node in living.keys() - self._watchers.keys():
            self._watchers[node] = nodes.start_spot_watcher(node, spot)
        for node in self._watchers.keys() - living.keys():
            del self._watchers[node]

    async def _leave_draining_nodes(self) -> None:
        """Drain what runs on nodes that are about to go; it is started anew elsewhere."""
        ends = await nodes.asked(nodes.draining)
        if not ends:
            return
        for name, keeper in list(self._pools.keepers.items()):
            if name in ("coordinator", "watchman"):
                continue  # Ray restarts them elsewhere, and the store has what they need
            for member, handle in keeper.handles.items():
                end_s = ends.get(await nodes.asked(nodes.node_of, handle))
                if end_s is not None:
                    left_s = end_s - time.time() if end_s else nodes.ADVICE_S
                    self._note(f"{member} leaves its node, which goes in {left_s:.0f} s")
                    # What is not empty by then is retried; half the time is for the rest.
                    keeper.drain([member], max(1.0, left_s / 2))

    async def _scale(self) -> None:
        """Give pools that may grow and shrink the size their work asks for."""
        cluster, keepers = self._config.cluster, self._pools.keepers
        now_s = time.monotonic()
        for name in cluster.autoscale:
            if name in keepers:
                self._scaler.observe(name, now_s, self._pools.load, keepers[name].loads())
        decision = self._scaler.decide(now_s)
        for scaled, pool in decision.pools.items():
            keeper = keepers.get(scaled)
            if keeper is None:
                continue
            # While the scaler pauses after failed starts, the keeper must not start anybody either.
            size = min(pool.target, keeper.living + pool.start)
            if size == keeper.members.size:
                continue
            self._note(f"{scaled} replicas: {pool.reason}")
            keeper.resize(size)
            keeper.drain(pool.drain, cluster.request_timeout_s or cluster.supervision.stall_s)
        if cluster.autoscale and cluster.address != "local":
            asked = [part for bundle in decision.bundles for part in parts(self._config, bundle)]
            await nodes.asked(self._request.ask, asked)

    async def _give_way(self) -> None:
        """Have a smaller pool while a run of a higher priority waits for what its members hold.

        Pools that scale follow their work, and replicas of several ranks stay together: neither
        gives way.
        """
        cluster, home = self._config.cluster, self._pools.home
        assert home is not None
        await nodes.asked(nodes.say_priority, home.namespace, cluster.priority)
        now_s = time.monotonic()
        waiting = await nodes.asked(nodes.asked_above, cluster.priority)
        if waiting:
            self._heard_s = now_s
        for name, keeper in list(self._pools.keepers.items()):
            settings = getattr(cluster, SETTINGS.get(name, ""), None)
            if settings is None or name in cluster.autoscale:
                continue
            size, least = keeper.members.size, math.ceil(settings.replicas * settings.min_ready)
            if size < settings.replicas and now_s - self._heard_s > TAKE_BACK_S:
                self._note(f"{name}: {size} -> {settings.replicas}, nobody else waits any more")
                keeper.resize(settings.replicas)
            holds = any(settings.bundle().keys() & ask.keys() for ask in waiting)
            leaving = keeper.members.names(MemberState.DRAINING)
            if holds and size > least and not leaving and now_s - self._gave_way_s > GIVE_WAY_S:
                self._gave_way_s = now_s
                self._note(
                    f"{name}: {size} -> {size - 1}, a run that counts more waits for a place"
                )
                keeper.resize(size - 1)
                limit_s = cluster.request_timeout_s or cluster.supervision.stall_s
                keeper.drain(emptiest(keeper.loads(), keeper.living - (size - 1)), limit_s)

    async def _foresee_learner(self) -> None:
        """Say once, and not only when a fit waits for it, that the learner's nodes are missing."""
        if not self._foresees_learner:
            return
        why = await nodes.asked(why_learner_cannot_come, self._config.cluster)
        now_s = time.monotonic()
        self._absent_s = (self._absent_s or now_s) if why else None
        if self._absent_s is not None and now_s - self._absent_s >= ABSENT_S:
            self._foresees_learner = False
            self._note(f"the learner, which the next fit needs, would find no place: {why}")


def parts(config: ServingConfig, bundle: Mapping[str, float]) -> Sequence[Mapping[str, float]]:
    """What a replica's bundle has to be on one node each: all of it, or what a rank takes."""
    for settings, engine in (
        (config.cluster.policy, config.policy_engine),
        (config.cluster.ppm, config.ppm_engine),
    ):
        if bundle == settings.bundle():
            return settings.rank_bundles(engine.num_ranks) or [bundle]
    return [bundle]


def why_learner_cannot_come(cluster: ClusterConfig) -> str:
    """Why neither the nodes nor what the autoscaler may start hold the learner; "" if they do."""
    ask = _learner_ask(cluster)
    most = nodes.most_by_autoscaler()
    if all(most.get(name, 0.0) >= ask.count * amount for name, amount in ask.bundle.items()):
        return ""
    emptied = [replace(node, free=node.total) for node in nodes.living().values()]
    return " ".join(explain([ask], emptied))


def why_learner_waits(cluster: ClusterConfig, keepers: Mapping[str, PoolKeeper]) -> str:
    """What the learner asks and what the cluster has, in words; "" if it fits."""
    ask = _learner_ask(cluster)
    sentences = explain([ask], list(nodes.living().values()))
    holders = [
        f"{len(keepers[name].all_handles)} x {keepers[name].kind.kind}"
        for name, settings in (("policy", cluster.policy), ("ppm", cluster.ppm))
        if name in keepers and settings.bundle().keys() & ask.bundle.keys()
    ]
    if sentences and holders:
        sentences.append(
            f"{' and '.join(holders)} hold the like; with cluster.hand_over: true they end "
            "before the learner starts."
        )
    return " ".join(sentences)


def _learner_ask(cluster: ClusterConfig) -> Ask:
    settings = cluster.learner
    return Ask(name="learner rank", bundle=settings.learner_bundle(), count=settings.replicas)
