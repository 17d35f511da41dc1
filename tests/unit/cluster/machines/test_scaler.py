"""The scaler at virtual time, with traces made by hand."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.machines.scaler import (
    MemberState,
    PoolDecision,
    PoolLoad,
    ReplicaLoad,
    Scaler,
    ScalerConfig,
)

STARTING, _, READY, DRAINING = MemberState
GPU = {"GPU": 1.0}


def config(**other: float) -> ScalerConfig:
    """Ten units a replica, five times as many replicas allowed as one needs, no patience."""
    fields = {
        "min_replicas": 1,
        "max_replicas": 8,
        "slots": 10,
        "target_s": 100,
        "hysteresis": 0.5,
        "down_window_s": 0,
        "cool_down_s": 0,
        "step_s": 0,
        "step_up": 100,
        "step_down": 0.99,
        **other,
    }
    return ScalerConfig(**fields)


class Pool:
    """A pool whose starts and drains succeed at once, told one load after the other."""

    def __init__(self, **settings: float) -> None:
        self.scaler = Scaler({"policy": (config(**settings), GPU)})
        self.replicas: dict[str, ReplicaLoad] = {}
        self.served = 0.0
        self.born = 0

    def step(
        self, now_s: float, waiting: float, in_service: float = 0, *, served: float = 0
    ) -> PoolDecision:
        """Observe, decide and do what was decided."""
        self.served += served
        load = PoolLoad(waiting=waiting, in_service=in_service, served=self.served)
        self.scaler.observe("policy", now_s, load, self.replicas)
        decision = self.scaler.decide(now_s).pools["policy"]
        for name in decision.drain:
            del self.replicas[name]
        for _ in range(decision.start):
            self.replicas[f"r{self.born}"] = ReplicaLoad(state=READY)
            self.born += 1
        return decision

    def targets(self, *trace: tuple[float, float]) -> list[int]:
        """The target after each (time, waiting)."""
        return [self.step(now_s, waiting).target for now_s, waiting in trace]


# -- how many


def test_pool_starts_with_its_minimum() -> None:
    assert Pool(min_replicas=3).step(0, waiting=0).start == 3


def test_burst_grows_to_what_it_can_use_and_drain_shrinks_to_the_minimum() -> None:
    pool = Pool()
    assert pool.targets((0, 0), (1, 35), (2, 35), (3, 0)) == [1, 4, 4, 1]


def test_targets_stay_within_minimum_and_maximum() -> None:
    pool = Pool(min_replicas=2, max_replicas=5)
    assert pool.targets((0, 0), (1, 1000), (2, 0)) == [2, 5, 2]


def test_pool_without_minimum_goes_to_zero_and_comes_back() -> None:
    pool = Pool(min_replicas=0)
    assert pool.targets((0, 0), (1, 15), (2, 15), (3, 0), (4, 0), (5, 1)) == [0, 1, 2, 1, 0, 1]


def test_load_between_the_two_needs_moves_nothing() -> None:
    """Four replicas serve 40 units; with half their slots they would still be used by 20."""
    pool = Pool()
    assert pool.targets((0, 40), (1, 31), (2, 21), (3, 16), (4, 10)) == [4, 4, 4, 4, 2]


def test_measured_rate_asks_for_fewer_replicas_than_the_work_could_use() -> None:
    """One replica serves 0.5/s: 80 units at hand are done within 100 s by 2, though 8 have use."""
    pool = Pool()
    pool.step(0, waiting=9)
    pool.step(1, waiting=9)
    assert pool.step(11, waiting=80, served=5).target == 2
    assert pool.scaler.rate("policy") == pytest.approx(0.5)


def test_unmeasured_rate_lets_the_work_decide_alone() -> None:
    pool = Pool()
    assert pool.scaler.rate("policy") is None
    assert pool.step(0, waiting=80).target == 8


def test_rate_is_not_measured_while_replicas_lack_work() -> None:
    pool = Pool()
    pool.step(0, waiting=0, in_service=1)
    pool.step(100, waiting=0, in_service=1, served=1)
    assert pool.scaler.rate("policy") is None


def test_rate_is_per_replica() -> None:
    pool = Pool(min_replicas=4, max_replicas=4)
    pool.step(0, waiting=100)
    pool.step(1, waiting=100)
    pool.step(11, waiting=100, served=20)
    assert pool.scaler.rate("policy") == pytest.approx(0.5)


def test_rate_follows_a_change_within_its_window() -> None:
    pool = Pool(min_replicas=1, max_replicas=1, rate_window_s=50)
    for second in range(0, 100, 10):
        pool.step(second, waiting=100, served=10)
    for second in range(100, 400, 10):
        pool.step(second, waiting=100, served=20)
    rate = pool.scaler.rate("policy")
    assert rate == pytest.approx(2.0, rel=0.01)


def test_served_count_that_starts_again_is_not_a_negative_rate() -> None:
    pool = Pool(max_replicas=1)
    pool.step(0, waiting=100, served=50)
    pool.step(10, waiting=100, served=10)
    pool.step(20, waiting=100, served=10)
    pool.step(30, waiting=100, served=-65)
    assert pool.scaler.rate("policy") == pytest.approx(1.0)


# -- how fast


def test_growth_is_limited_by_step() -> None:
    pool = Pool(step_up=2, step_s=10)
    trace = [(0, 0), (1, 80), (2, 80), (11, 80), (20, 80), (21, 80)]
    assert pool.targets(*trace) == [1, 2, 2, 4, 4, 8]


def test_shrinking_is_limited_by_step() -> None:
    pool = Pool(step_down=0.5)
    assert pool.targets((0, 80), (1, 0), (2, 0), (3, 0), (4, 0)) == [8, 4, 2, 1, 1]


def test_small_steps_still_move_by_one() -> None:
    pool = Pool(step_up=1.1, step_down=0.1)
    assert pool.targets((0, 30), (1, 30), (2, 0), (3, 0)) == [2, 3, 2, 1]


def test_flapping_load_inside_the_window_moves_nothing() -> None:
    pool = Pool(down_window_s=30)
    pool.step(0, waiting=60)
    targets = pool.targets(*[(t, 60 if t % 20 == 0 else 0) for t in range(10, 200, 10)])
    assert set(targets) == {6}


def test_load_that_stays_low_shrinks_after_the_window() -> None:
    pool = Pool(down_window_s=30)
    assert pool.targets((0, 60), (10, 0), (30, 0), (31, 0)) == [6, 6, 6, 1]


def test_growing_after_shrinking_waits_for_the_cool_down() -> None:
    pool = Pool(cool_down_s=60)
    assert pool.targets((0, 80), (60, 0), (61, 80), (119, 80), (120, 80)) == [8, 1, 1, 1, 8]


def test_shrinking_after_growing_waits_for_the_cool_down() -> None:
    pool = Pool(cool_down_s=60)
    assert pool.targets((0, 0), (10, 80), (11, 0), (69, 0), (70, 0)) == [1, 8, 8, 8, 1]


def test_growing_again_needs_no_cool_down() -> None:
    pool = Pool(cool_down_s=60)
    assert pool.targets((0, 20), (1, 40), (2, 80)) == [2, 4, 8]


# -- which


def test_lost_replica_is_replaced_at_once_and_is_no_change_of_target() -> None:
    pool = Pool(cool_down_s=1000)
    pool.step(0, waiting=80)
    pool.step(1, waiting=80)
    for name in ("r0", "r3", "r5"):
        del pool.replicas[name]
    decision = pool.step(2, waiting=80)
    assert decision.target == 8 and decision.start == 3 and decision.drain == ()


def test_replica_that_drains_on_a_notice_is_replaced() -> None:
    pool = Pool(min_replicas=2)
    pool.step(0, waiting=20)
    pool.replicas["r0"] = ReplicaLoad(state=DRAINING, load=5)
    assert pool.step(1, waiting=20).start == 1


def test_starting_replicas_are_not_started_twice() -> None:
    pool = Pool(min_replicas=2)
    pool.replicas = {"a": ReplicaLoad(state=STARTING), "b": ReplicaLoad(state=STARTING)}
    assert pool.step(0, waiting=20).start == 0


def test_shrinking_drains_what_has_not_started_then_the_emptiest() -> None:
    pool = Pool()
    pool.step(0, waiting=50)
    pool.replicas = {
        "busy": ReplicaLoad(state=READY, load=9),
        "idle": ReplicaLoad(state=READY, load=0),
        "half": ReplicaLoad(state=READY, load=4),
        "late": ReplicaLoad(state=STARTING),
        "leaving": ReplicaLoad(state=DRAINING, load=1),
    }
    decision = pool.step(1, waiting=0, in_service=5)
    assert decision.target == 1
    assert decision.drain == ("late", "idle", "half")


def test_failed_starts_pause_longer_each_time_until_one_succeeds() -> None:
    pool = Pool(start_backoff_s=10, max_backoff_s=25)

    def starts_at(now_s: float) -> int:
        pool.replicas = {}
        return pool.step(now_s, waiting=1).start

    pauses = []
    now_s = 0.0
    for _ in range(4):
        pool.scaler.start_failed("policy", now_s)
        pause_s = next(s for s in range(100) if starts_at(now_s + s))
        pauses.append(pause_s)
        now_s += pause_s
    assert pauses == [10, 20, 25, 25]
    pool.scaler.start_failed("policy", now_s)
    assert "starts failed" in pool.step(now_s, waiting=1).reason or pool.replicas
    pool.scaler.started("policy")
    assert starts_at(now_s) == 1


# -- what is asked of Ray


def test_bundles_are_those_of_the_pools_in_their_order() -> None:
    scaler = Scaler(
        {
            "policy": (config(min_replicas=2), {"GPU": 1.0}),
            "sandbox": (config(min_replicas=1), {"CPU": 4.0}),
        }
    )
    assert scaler.decide(0).bundles == ({"GPU": 1}, {"GPU": 1}, {"CPU": 4})


def test_nodes_are_asked_for_only_while_replicas_are_missing() -> None:
    pool = Pool()
    busy = PoolLoad(waiting=30, in_service=0, served=0)

    def bundles(now_s: float, load: PoolLoad, *states: MemberState) -> int:
        replicas = {f"r{n}": ReplicaLoad(state=state, load=1) for n, state in enumerate(states)}
        pool.scaler.observe("policy", now_s, load, replicas)
        return len(pool.scaler.decide(now_s).bundles)

    assert bundles(0, busy) == 3
    assert bundles(1, busy, READY, STARTING, STARTING) == 3
    assert bundles(2, busy, READY, READY, READY) == 0
    # One leaves with its node: another place is needed while it is still there.
    assert bundles(3, busy, READY, READY, DRAINING, STARTING) == 4
    idle = PoolLoad(waiting=0, in_service=0, served=0)
    assert bundles(4, idle, READY, DRAINING, DRAINING) == 0


def test_pools_do_not_touch_each_other() -> None:
    scaler = Scaler({"a": (config(), GPU), "b": (config(), GPU)})
    scaler.observe("a", 0, PoolLoad(waiting=80, in_service=0, served=0), {})
    scaler.observe("b", 0, PoolLoad(waiting=0, in_service=0, served=0), {})
    decision = scaler.decide(0)
    assert (decision.pools["a"].target, decision.pools["b"].target) == (8, 1)
    assert decision.pools["a"].reason.startswith("1 -> 8: 80 units at hand")


def test_wrong_bounds_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_replicas must be <= max_replicas, got 9 > 8"):
        config(min_replicas=9)


def test_other_bounds_count_at_once() -> None:
    pool = Pool(down_window_s=60, cool_down_s=60)
    assert pool.step(0, waiting=80).target == 8
    pool.scaler.bound("policy", config(max_replicas=3, down_window_s=60, cool_down_s=60))
    assert pool.step(1, waiting=80).target == 3
    assert len(pool.replicas) == 3
    pool.scaler.bound("policy", config(min_replicas=5, down_window_s=60, cool_down_s=60))
    assert pool.step(2, waiting=0).target == 5
