"""How many replicas each pool should have: a state machine, told the load and asked what to do.

    observe(pool, load, replicas) -> service rate  (units served per replica-second while busy)
    decide(now)                   -> for each pool: target, how many to start, which to drain
                                  -> for the whole cluster: the bundles to ask Ray for

A replica serves `slots` units at once at full speed. With `work` units at hand (waiting and in
service) and a measured `rate` per replica, a pool needs

    up   = min(work / (rate * target_s),     work / slots)       never more than can be used
    down = min(work / (rate * target_s * h), work / (slots * h)) h = hysteresis < 1, so down > up

replicas, both rounded up and kept within min and max. The target rises to `up`, falls to `down` and
stays in between; before a rate is known `work / slots` counts alone. It falls only to the highest
`down` of the last `down_window_s`, so load that flaps inside the window moves nothing, and after a
change of direction it rests for `cool_down_s`. One decision moves it by a bounded step, the next
one follows after `step_s`.

A lost replica changes no target: the difference to the living ones is started again, whatever the
cool-down. After starts that failed the pool pauses, longer each time.

Draining comes first, the idle timeout of the autoscaler takes the node later: a pool that shrinks
names replicas (those that have not started, then the emptiest), and while one of them drains its
actor keeps its node. Ray is asked for bundles only while replicas are missing: what is asked is a
floor that the autoscaler may meet with any node, so a pool that has all it wants would keep an idle
node for the sake of a bundle whose replica lives on another one. `cluster.machines.nodes` asks. The
learner is no pool: Ray Train asks for its machines while its group is there, and no longer.

It owns no clock (`now_s` is an argument) and no Ray, so a simulation drives it at virtual time.

Not covered: which node a replica runs on; prices; pools that trade places with each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScalerConfig(BaseModel):
    """Bounds and patience of one pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=0, description="kept even without work")
    max_replicas: int = Field(default=1, ge=1, description="never exceeded")
    slots: int = Field(default=64, ge=1, description="units one replica serves at full speed")
    target_s: float = Field(
        default=600.0, gt=0, description="seconds within which the work at hand should be done"
    )
    hysteresis: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="a replica is given up only if the rest needs less than so much of target_s "
        "and slots",
    )
    down_window_s: float = Field(
        default=60.0, ge=0, description="the highest need of so many seconds decides a shrinking"
    )
    cool_down_s: float = Field(
        default=60.0, ge=0, description="rest between growing and shrinking, either way"
    )
    step_up: float = Field(
        default=2.0, gt=1, description="one decision grows to at most so many times the target"
    )
    step_down: float = Field(
        default=0.5, gt=0, lt=1, description="one decision shrinks by at most this share"
    )
    step_s: float = Field(default=10.0, ge=0, description="pause between two steps one way")
    rate_window_s: float = Field(
        default=300.0, gt=0, description="time over which the service rate is averaged"
    )
    start_backoff_s: float = Field(
        default=5.0, ge=0, description="pause after a failed start; doubled each time"
    )
    max_backoff_s: float = Field(default=300.0, ge=0, description="longest such pause")

    @model_validator(mode="after")
    def _bounds(self) -> ScalerConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must be <= max_replicas, got {self.min_replicas} > "
                f"{self.max_replicas}"
            )
        return self


class MemberState(StrEnum):
    """Where a member of a pool is in its life; one that is dead has none."""

    STARTING = "starting"
    """Asked for; its process may not exist yet."""
    SYNCING = "syncing"
    """Running, and on its way to the wanted version."""
    READY = "ready"
    DRAINING = "draining"
    """Given nothing more; ends when it is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """One replica that is not dead."""

    state: MemberState
    load: int = 0
    """Units in its hands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLoad:
    """What a pool has to do and has done."""

    waiting: float
    """Units no replica has been given yet."""
    in_service: float
    """Units given to replicas."""
    served: float
    """Units finished since the start, ever growing; a smaller number is a new start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDecision:
    """What to do with one pool now."""

    target: int
    start: int
    """Replicas to start beside the living ones."""
    drain: tuple[str, ...]
    """Replicas to drain and then end."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """What to do now."""

    pools: Mapping[str, PoolDecision]
    bundles: tuple[Mapping[str, float], ...]
    """All that the cluster should be able to hold, in the order of importance."""


@dataclass(slots=True)
class _Pool:
    config: ScalerConfig
    bundle: Mapping[str, float]
    target: int
    load: PoolLoad = field(default_factory=lambda: PoolLoad(waiting=0, in_service=0, served=0))
    replicas: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    observed_s: float | None = None
    busy: bool = False
    units: float = 0.0
    """Served while busy; decays over `rate_window_s` like `replica_s`."""
    replica_s: float = 0.0
    needs: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, `down`) of the window, `down` falling from left to right."""
    grew_s: float = -math.inf
    shrank_s: float = -math.inf
    num_failed_starts: int = 0
    starts_after_s: float = -math.inf

    @property
    def rate(self) -> float | None:
        return self.units / self.replica_s if self.replica_s > 0 and self.units > 0 else None

    def count(self, state: MemberState) -> int:
        return sum(replica.state is state for replica in self.replicas.values())


class Scaler:
    """Targets of several pools; see the module for the rules."""

    def __init__(
        self,
        pools: Mapping[str, tuple[ScalerConfig, Mapping[str, float]]],
    ) -> None:
        """
        Args:
            pools: config and the resources one replica asks for ({"GPU": 1, "CPU": 2}), by name,
                the most important first.
        """
        self._pools = {
            name: _Pool(config, dict(bundle), config.min_replicas)
            for name, (config, bundle) in pools.items()
        }

    # -- told

    def bound(self, pool: str, config: ScalerConfig) -> None:
        """Give a pool other bounds; a target outside of them moves into them at once."""
        state = self._pools[pool]
        state.config = config
        state.target = min(max(state.target, config.min_replicas), config.max_replicas)
        state.needs.clear()  # bounded by those before

    def observe(
        self, pool: str, now_s: float, load: PoolLoad, replicas: Mapping[str, ReplicaLoad]
    ) -> None:
        """Take note of a pool's work and of all its replicas that are not dead."""
        state = self._pools[pool]
        ready = state.count(MemberState.READY)
        if state.observed_s is not None and state.busy and ready:
            passed_s = now_s - state.observed_s
            served = load.served - state.load.served
            if passed_s > 0 and served >= 0:
                decay = math.exp(-passed_s / state.config.rate_window_s)
                state.units = state.units * decay + served
                state.replica_s = state.replica_s * decay + ready * passed_s
        state.load, state.replicas, state.observed_s = load, dict(replicas), now_s
        # Only a pool that lacks no work shows how fast its replicas are.
        ready = state.count(MemberState.READY)
        full = load.in_service >= ready * state.config.slots * state.config.hysteresis
        state.busy = load.waiting > 0 or full

    def started(self, pool: str) -> None:
        """A replica has become ready: starts work again."""
        self._pools[pool].num_failed_starts = 0
        self._pools[pool].starts_after_s = -math.inf

    def start_failed(self, pool: str, now_s: float) -> None:
        """A replica died before it was ready: pause before the next start, longer each time."""
        state = self._pools[pool]
        pause_s = state.config.start_backoff_s * 2.0 ** min(state.num_failed_starts, 30)
        state.num_failed_starts += 1
        state.starts_after_s = now_s + min(pause_s, state.config.max_backoff_s)

    # -- asked

    def rate(self, pool: str) -> float | None:
        """Units per replica-second while there was enough to do; None before it was measured."""
        return self._pools[pool].rate

    def decide(self, now_s: float) -> ScaleDecision:
        """Move the targets by at most one step each and say what follows from them."""
        decisions: dict[str, PoolDecision] = {}
        bundles: list[Mapping[str, float]] = []
        for name, pool in self._pools.items():
            reason = self._move(pool, now_s)
            living = len(pool.replicas) - pool.count(MemberState.DRAINING)
            start = max(0, pool.target - living)
            if start and now_s < pool.starts_after_s:
                start = 0
                reason += (
                    f"; {pool.num_failed_starts} starts failed, the next is tried in "
                    f"{pool.starts_after_s - now_s:.0f} s"
                )
            decisions[name] = PoolDecision(
                target=pool.target,
                start=start,
                drain=emptiest(pool.replicas, living - pool.target),
                reason=reason,
            )
            if pool.target > pool.count(MemberState.READY):
                # Those that still drain hold their nodes: the missing ones need others.
                bundles += [pool.bundle] * max(pool.target, len(pool.replicas))
        return ScaleDecision(pools=decisions, bundles=tuple(bundles))

    # -- inside

    def _move(self, pool: _Pool, now_s: float) -> str:
        """Move one target; returns why it is where it is."""
        config, before = pool.config, pool.target
        if pool.observed_s is None:
            return f"{before}: nothing observed yet"
        work = pool.load.waiting + pool.load.in_service
        up, down = (
            _need(work, pool.rate, config, 1.0),
            _need(work, pool.rate, config, config.hysteresis),
        )
        while pool.needs and pool.needs[-1][1] <= down:
            pool.needs.pop()
        pool.needs.append((now_s, down))
        while pool.needs[0][0] < now_s - config.down_window_s:
            pool.needs.popleft()
        down = pool.needs[0][1]
        speed = "rate unknown" if pool.rate is None else f"{pool.rate:.3g}/s each"
        facts = f"{work:.0f} units at hand, {speed}"
        if before < up:
            if now_s < pool.shrank_s + config.cool_down_s:
                return f"{before}: rests after shrinking ({facts} would need {up})"
            if now_s < pool.grew_s + config.step_s:
                return f"{before}: grows to {up} step by step"
            # From zero a factor leads nowhere.
            pool.target = min(up, max(before + 1, math.floor(before * config.step_up)))
            pool.grew_s = now_s
            return f"{before} -> {pool.target}: {facts} need {up}"
        if before > down:
            if now_s < pool.grew_s + config.cool_down_s:
                return f"{before}: rests after growing ({facts} would need {down})"
            if now_s < pool.shrank_s + config.step_s:
                return f"{before}: shrinks to {down} step by step"
            pool.target = max(down, min(before - 1, math.ceil(before * (1 - config.step_down))))
            pool.shrank_s = now_s
            return f"{before} -> {pool.target}: {facts} need at most {down}"
        return f"{before}: {facts} need {up} to {down}"


def _need(work: float, rate: float | None, config: ScalerConfig, share: float) -> int:
    """Replicas for `work` if each may use `share` of its slots and of the target time."""
    replicas = work / (config.slots * share)
    if rate is not None:
        replicas = min(replicas, work / (rate * config.target_s * share))
    return min(max(math.ceil(replicas), config.min_replicas), config.max_replicas)


def emptiest(replicas: Mapping[str, ReplicaLoad], count: int) -> tuple[str, ...]:
    """The replicas to give up: those that have not started, then the ones with least to do."""
    if count <= 0:
        return ()
    living = [(n, r) for n, r in replicas.items() if r.state is not MemberState.DRAINING]
    living.sort(key=lambda item: (item[1].state is MemberState.READY, item[1].load, item[0]))
    return tuple(name for name, _ in living[:count])
