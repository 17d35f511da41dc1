"""Nodes come and go, pools grow and shrink: what a driver does about it, every two seconds.

    Ray: a node drains --> its members drain (`PoolKeeper.drain`), others are started elsewhere
    a new node         --> a watcher for spot notices, if the config asks for it
    work at hand       --> Scaler --> the size of a pool; what it lacks is asked of the autoscaler

Whatever fails here is logged and tried again: a run goes on without, and what dies is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.fleet.config import ClusterConfig, ServingConfig
from cluster.fleet.keeper import PoolKeeper
from cluster.fleet.pools import Pools
from cluster.machines import nodes
from cluster.machines.placement import Ask, explain
from cluster.machines.scaler import Scaler, ask_ray

logger = logging.getLogger(__name__)

MIND_S = 2.0
"""Pause between two looks at the nodes."""


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
            learner: the nodes have to hold the learner group, too.
            note: told what a person should know now.
        """
        cluster = config.cluster
        self._config = config
        self._pools = pools
        self._note = note
        self._watchers: dict[str, Any] = {}
        """Of spot notices, by node."""
        learners = [cluster.learner.learner_bundle()] * cluster.learner.replicas
        self._scaler = Scaler(
            {
                name: (scaling, getattr(cluster, name).bundle())
                for name, scaling in cluster.autoscale.items()
            },
            reserved=learners if learner else (),
        )
        self._minding = asyncio.create_task(self._mind())

    async def stop(self) -> None:
        """Look no more, and ask the autoscaler for nothing."""
        self._minding.cancel()
        await asyncio.gather(self._minding, return_exceptions=True)
        if self._asks_ray:
            ask_ray(())

    def tried(self, name: str, ready: bool) -> None:
        """A start succeeded or failed: a pool that is scaled pauses after failures."""
        if name not in self._config.cluster.autoscale:
            return
        if ready:
            self._scaler.started(name)
        else:
            self._scaler.start_failed(name, time.monotonic())

    @property
    def _asks_ray(self) -> bool:
        cluster = self._config.cluster
        return bool(cluster.autoscale) and cluster.address != "local"

    async def _mind(self) -> None:
        while True:
            try:
                await self._watch_new_nodes()
                await self._leave_draining_nodes()
                self._scale()
            except Exception:
                # Whatever fails here is tried again; what dies meanwhile is replaced anyway.
                logger.exception("The nodes could not be looked at")
            await asyncio.sleep(MIND_S)

    async def _watch_new_nodes(self) -> None:
        spot = self._config.cluster.spot
        if spot is None:
            return
        for node in await asyncio.to_thread(nodes.living):
            if node not in self._watchers:
                self._watchers[node] = nodes.start_spot_watcher(node, spot)

    async def _leave_draining_nodes(self) -> None:
        """Drain what runs on nodes that are about to go; it is started anew elsewhere."""
        ends = await asyncio.to_thread(nodes.draining)
        if not ends:
            return
        for name, keeper in list(self._pools.keepers.items()):
            if name in ("coordinator", "watchman"):
                continue  # Ray restarts them elsewhere, and the store has what they need
            for member, handle in keeper.handles.items():
                end_s = ends.get(await asyncio.to_thread(nodes.node_of, handle))
                if end_s is not None:
                    left_s = end_s - time.time() if end_s else nodes.ADVICE_S
                    self._note(f"{member} leaves its node, which goes in {left_s:.0f} s")
                    # What is not empty by then is retried; half the time is for the rest.
                    keeper.drain([member], max(1.0, left_s / 2))

    def _scale(self) -> None:
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
        if self._asks_ray:
            ask_ray([part for bundle in decision.bundles for part in parts(self._config, bundle)])


def parts(config: ServingConfig, bundle: Mapping[str, float]) -> Sequence[Mapping[str, float]]:
    """What a replica's bundle has to be on one node each: all of it, or what a rank takes."""
    for settings, engine in (
        (config.cluster.policy, config.policy_engine),
        (config.cluster.ppm, config.ppm_engine),
    ):
        if bundle == settings.bundle():
            return settings.rank_bundles(engine.num_ranks) or [bundle]
    return [bundle]


def why_learner_waits(cluster: ClusterConfig, keepers: Mapping[str, PoolKeeper]) -> str:
    """What the learner asks and what the cluster has, in words; "" if it fits."""
    bundle = cluster.learner.learner_bundle()
    ask = Ask(name="learner rank", bundle=bundle, count=cluster.learner.replicas)
    sentences = explain([ask], list(nodes.living().values()))
    holders = [
        f"{len(keepers[name].all_handles)} x {keepers[name].kind.kind}"
        for name, settings in (("policy", cluster.policy), ("ppm", cluster.ppm))
        if name in keepers and settings.bundle().keys() & bundle.keys()
    ]
    if sentences and holders:
        sentences.append(
            f"{' and '.join(holders)} hold the like; with cluster.hand_over: true they end "
            "before the learner starts."
        )
    return " ".join(sentences)
