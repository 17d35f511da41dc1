"""Admission over hand-made traces of what engines say, and the slots it steers."""

from __future__ import annotations

import asyncio

import pytest

from cluster.jobs.admission import AdmissionConfig, AdmissionController, EnginePressure, TreeSlots

CONFIG = AdmissionConfig(min_trees=2, start_trees=8, increase=4, decrease=0.5, settle_s=5.0)


def pressure(
    running: int = 10, waiting: int = 0, kv_usage: float = 0.3, preemptions: int = 0
) -> EnginePressure:
    return EnginePressure(
        running=running, waiting=waiting, kv_usage=kv_usage, preemptions=preemptions
    )


def all_say(*said: EnginePressure) -> dict[str, EnginePressure]:
    return {f"policy-{number}": one for number, one in enumerate(said)}


def controller(max_trees: int = 64) -> AdmissionController:
    return AdmissionController(CONFIG, max_trees)


def test_the_limit_starts_where_configured_and_within_its_bounds() -> None:
    assert controller().limit == 8
    assert controller(max_trees=5).limit == 5
    assert AdmissionController(AdmissionConfig(start_trees=1, min_trees=3), 64).limit == 3


def test_an_upper_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_trees must be >= 1, got 0"):
        controller(max_trees=0)


def test_room_raises_the_limit_step_by_step_up_to_the_bound() -> None:
    admission = controller(max_trees=18)
    seen = [admission.observe(float(t), all_say(pressure()), admission.limit) for t in range(5)]
    assert seen == [12, 16, 18, 18, 18]


def test_a_limit_that_is_not_reached_is_not_raised() -> None:
    admission = controller()
    assert admission.observe(0.0, all_say(pressure()), open_trees=7) == 8


def test_a_preemption_cuts_the_limit_by_the_factor_at_once() -> None:
    admission = controller()
    admission.observe(0.0, all_say(pressure(preemptions=3)), 8)
    assert admission.limit == 12  # what came before the first look is no news
    assert admission.observe(1.0, all_say(pressure(preemptions=4)), 12) == 6
    assert "1 preemptions" in admission.reason


def test_after_a_cut_the_limit_settles_before_it_moves_again() -> None:
    admission = controller()
    admission.observe(0.0, all_say(pressure()), 8)
    admission.observe(1.0, all_say(pressure(preemptions=1)), 12)
    held = [admission.observe(t, all_say(pressure(preemptions=9)), 12) for t in (2.0, 4.0, 5.9)]
    assert held == [6, 6, 6]
    assert admission.observe(6.0, all_say(pressure(preemptions=9)), 6) == 10


def test_a_nearly_full_cache_cuts_and_a_fairly_full_one_holds() -> None:
    admission = controller()
    assert admission.observe(0.0, all_say(pressure(kv_usage=0.9)), 8) == 8
    assert admission.observe(1.0, all_say(pressure(kv_usage=0.96)), 8) == 4


def test_one_long_queue_is_forgiven_and_a_lasting_one_lowers_the_limit() -> None:
    admission = controller()
    assert admission.observe(0.0, all_say(pressure(waiting=20)), 8) == 8
    assert admission.observe(1.0, all_say(pressure(waiting=1)), 8) == 8
    assert admission.observe(2.0, all_say(pressure(waiting=20)), 8) == 8
    assert admission.observe(3.0, all_say(pressure(waiting=20)), 8) == 4


def test_a_short_queue_keeps_the_limit_where_it_is() -> None:
    admission, queue = controller(), all_say(pressure(waiting=4))
    assert [admission.observe(float(t), queue, 8) for t in range(9)] == [8] * 9


def test_engines_that_say_nothing_change_nothing() -> None:
    admission = controller()
    assert admission.observe(0.0, {}, 8) == 8


@pytest.mark.parametrize(
    "hot",
    [pressure(kv_usage=1.0), pressure(waiting=99), pressure(preemptions=99)],
    ids=["full", "queue", "preempts"],
)
def test_one_hot_engine_of_36_cuts_nobody_and_most_of_them_do(hot: EnginePressure) -> None:
    calm, looks = pressure(), range(2)
    admission = controller()
    admission.observe(0.0, all_say(*[calm] * 36), 8)
    one = [admission.observe(1.0 + t, all_say(hot, *[calm] * 35), 12 + 4 * t) for t in looks]
    assert one == [16, 20]
    most = [admission.observe(3.0 + t, all_say(*[calm] * 17, *[hot] * 19), 20) for t in looks]
    assert most[-1] < 20


def test_a_replaced_replica_that_counts_from_zero_is_no_preemption() -> None:
    admission = controller()
    admission.observe(0.0, all_say(pressure(preemptions=7)), 8)
    assert admission.observe(1.0, all_say(pressure(preemptions=0)), 12) == 16
    assert admission.observe(2.0, all_say(pressure(preemptions=1)), 16) == 8


def plant(trees: int, *, capacity: int, memory: int) -> EnginePressure:
    """An engine of `capacity` sequences with cache for `memory` trees, 8 sequences a tree."""
    sequences = 8 * trees
    return EnginePressure(
        running=min(sequences, capacity),
        waiting=max(0, sequences - capacity),
        kv_usage=min(1.0, trees / memory),
        preemptions=0,
    )


@pytest.mark.parametrize("start", [2, 30, 60])
@pytest.mark.parametrize(
    ("capacity", "memory", "least", "most"),
    [(256, 10_000, 33, 48), (10_000, 40, 32, 38), (10_000, 10_000, 64, 64)],
    ids=["batch is full", "cache is full", "nothing is full"],
)
def test_the_limit_comes_to_rest_and_does_not_swing(
    start: int, capacity: int, memory: int, least: int, most: int
) -> None:
    config = AdmissionConfig(start_trees=start)
    admission = AdmissionController(config, max_trees=64)
    limits = []
    for second in range(300):
        said = plant(admission.limit, capacity=capacity, memory=memory)
        limits.append(admission.observe(float(second), all_say(said), admission.limit))
    rest = limits[150:]
    assert set(rest) == {rest[0]}
    assert least <= rest[0] <= most


# -- slots


async def enter(slots: TreeSlots, name: str, log: list[str], leave: asyncio.Event) -> None:
    async with slots.slot():
        log.append(name)
        await leave.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_follow_their_limit_up_and_down() -> None:
    slots, log, leave = TreeSlots(1), [], asyncio.Event()
    tasks = [asyncio.create_task(enter(slots, name, log, leave)) for name in "abcd"]
    await settle()
    assert log == ["a"] and slots.open == 1
    slots.limit = 3
    await settle()
    assert log == ["a", "b", "c"]
    slots.limit = 1
    leave.set()
    await asyncio.gather(*tasks)
    assert log == ["a", "b", "c", "d"] and slots.open == 0


async def test_a_smaller_limit_lets_nobody_in_until_enough_have_left() -> None:
    slots, log = TreeSlots(2), []
    ends = [asyncio.Event() for _ in range(3)]
    tasks = [asyncio.create_task(enter(slots, str(n), log, ends[n])) for n in range(3)]
    await settle()
    slots.limit = 1
    ends[0].set()
    await settle()
    assert log == ["0", "1"] and slots.open == 1
    ends[1].set()
    await settle()
    assert log == ["0", "1", "2"]
    ends[2].set()
    await asyncio.gather(*tasks)


async def test_a_cancelled_wait_gives_its_turn_to_the_next() -> None:
    slots, log = TreeSlots(1), []
    ends = [asyncio.Event() for _ in range(3)]
    tasks = [asyncio.create_task(enter(slots, str(n), log, ends[n])) for n in range(3)]
    await settle()
    ends[0].set()
    await asyncio.sleep(0)  # 0 leaves, 1 is given the slot but has not run
    tasks[1].cancel()
    await settle()
    assert log == ["0", "2"] and slots.open == 1
    ends[2].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert slots.open == 0
