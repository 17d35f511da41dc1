"""Keepers of actors that live in this process and die when the test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from cluster.engines.model_check import ModelCheckError
from cluster.engines.weight_sync import odd_ones
from cluster.fleet import keeper as keeper_module
from cluster.fleet.keeper import ActorKind, Look, PoolKeeper, PoolLostError
from cluster.fleet.membership import SupervisionConfig
from cluster.machines.scaler import MemberState
from rollout.engine import EngineError

QUICK = SupervisionConfig(look_s=0.002, backoff_s=0.001, stall_s=0.05, silent_s=0.05)


@dataclass
class Thing:
    """One fake actor."""

    name: str
    version: str
    dead: str = ""
    silent: bool = False
    done: int = 0
    open: int = 0
    killed: bool = False
    revived_after_s: float | None = None
    up: asyncio.Event = field(default_factory=asyncio.Event)


class Things(ActorKind):
    """A kind of actors that come up at once, unless `held` or `broken`."""

    kind = "thing"
    prefix = "thing"
    version = "v1"

    def __init__(self) -> None:
        self.made: dict[str, Thing] = {}
        self.held = False
        self.broken = ""
        self.answers_after_s = 0.0
        """Of a look; in a thread, so that they come while the event loop stands still."""
        self.taken: list[str] = []
        self.gone: list[str] = []
        self.slow: set[str] = set()
        """Those that take no version."""
        self.wrong: dict[str, int] = {}
        """Those that have other weights after they took one, and how often."""
        self.refuse: set[str] = set()

    def start(self, name: str) -> Thing:
        thing = self.made[name] = Thing(name, self.version)
        if not self.held:
            thing.up.set()
        return thing

    async def placed(self, handle: Thing) -> None:
        await handle.up.wait()

    async def ready(self, handle: Thing) -> None:
        await handle.up.wait()
        if self.broken:
            raise EngineError(self.broken)

    async def look(self, name: str, handle: Thing) -> Look:
        if self.answers_after_s:
            await asyncio.to_thread(time.sleep, self.answers_after_s)
        if handle.silent:
            await asyncio.Event().wait()
        revived, handle.revived_after_s = handle.revived_after_s, None
        return Look(broken=handle.dead, done=handle.done, open=handle.open, revived_after_s=revived)

    async def take(self, handle: Thing, *, again: bool) -> tuple[float, ...]:
        if handle.name in self.slow:
            await asyncio.Event().wait()
        if handle.name in self.refuse:
            raise ModelCheckError("another architecture")
        if handle.dead:
            raise EngineError(handle.dead)
        self.taken.append(handle.name)
        handle.version = self.version
        if self.wrong.get(handle.name, 0) > 0:
            self.wrong[handle.name] -= 1
            return (99.0,)
        return (float(self.version.removeprefix("v")),)

    def odd_ones(self, said: Mapping[str, tuple[float, ...]]) -> dict[str, str]:
        return odd_ones(said, tolerance=0.1)

    def lost(self, name: str) -> None:
        self.gone.append(name)

    def kill(self, handle: Thing) -> None:
        handle.killed = True


class Setting:
    def __init__(
        self,
        size: int = 2,
        config: SupervisionConfig = QUICK,
        *,
        min_ready: float = 1.0,
        start_timeout_s: float = 5.0,
    ) -> None:
        self.things = Things()
        self.told: list[list[str]] = []
        self.notes: list[str] = []
        self.keeper = PoolKeeper(
            self.things,
            size,
            config,
            start_timeout_s=start_timeout_s,
            min_ready=min_ready,
            note=self.notes.append,
            announce=lambda handles: self.told.append(sorted(handles)),
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)


async def test_dead_member_is_killed_replaced_and_everybody_is_told() -> None:
    at = Setting()
    await at.keeper.start()
    assert sorted(at.keeper.handles) == ["thing-0", "thing-1"]
    at.things.held = True
    at.things.made["thing-0"].dead = "killed"
    await at.until(lambda: at.told[-1] == ["thing-1"])
    assert at.things.made["thing-0"].killed
    await at.until(lambda: "thing-2" in at.things.made)
    assert at.told[-1] == ["thing-1"]
    at.things.made["thing-2"].up.set()
    await at.until(lambda: at.told[-1] == ["thing-1", "thing-2"])
    losses = at.keeper.members.losses(0)
    assert (losses.deaths, losses.restarts, losses.last_reason) == (1, 1, "thing-0: killed")
    await at.keeper.stop()


async def test_actors_of_an_earlier_driver_are_members_and_nobody_is_started_for_them() -> None:
    at = Setting(size=3)
    left = {name: Thing(name, "v1", up=asyncio.Event()) for name in ("thing-1", "thing-7")}
    for thing in left.values():
        thing.up.set()
    await at.keeper.start(left)
    assert sorted(at.keeper.handles) == ["thing-1", "thing-7", "thing-8"]
    assert list(at.things.made) == ["thing-8"]  # the one that was missing
    left["thing-1"].dead = "killed"
    await at.until(lambda: sorted(at.told[-1]) == ["thing-7", "thing-8", "thing-9"])
    assert left["thing-1"].killed
    await at.keeper.stop()


async def test_silent_member_is_replaced() -> None:
    at = Setting(size=1)
    await at.keeper.start()
    at.things.made["thing-0"].silent = True
    await at.until(lambda: sorted(at.keeper.handles) == ["thing-1"])
    assert "said nothing for 0.05 s" in at.keeper.members.losses(0).last_reason
    await at.keeper.stop()


async def test_member_with_work_and_no_progress_is_replaced_an_idle_one_is_not() -> None:
    at = Setting(size=2)
    await at.keeper.start()
    at.things.made["thing-0"].open = 3
    await at.until(lambda: sorted(at.keeper.handles) == ["thing-1", "thing-2"])
    assert "had requests for " in at.keeper.members.losses(0).last_reason
    await at.keeper.stop()


async def test_member_that_its_host_restarted_counts_as_a_death() -> None:
    at = Setting(size=1)
    await at.keeper.start()
    at.things.made["thing-0"].revived_after_s = 0.5
    await at.until(lambda: at.keeper.members.losses(0).deaths == 1)
    assert at.keeper.members.losses(0).away_s == pytest.approx(0.5)
    assert list(at.keeper.handles) == ["thing-0"]
    await at.keeper.stop()


async def test_first_start_that_fails_is_an_error_and_leaves_nothing() -> None:
    at = Setting()
    at.things.broken = "no such checkpoint"
    with pytest.raises(PoolLostError, match=r"thing did not start: thing-.: no such checkpoint"):
        await at.keeper.start()
    assert all(thing.killed for thing in at.things.made.values())
    # What belongs to them, as a placement group does, is to go as well.
    assert set(at.things.gone) == set(at.things.made)


async def test_too_many_deaths_are_told_by_check() -> None:
    at = Setting(size=1, config=QUICK.model_copy(update={"max_failures": 3}))
    await at.keeper.start()
    at.things.broken = "out of memory"
    at.things.made["thing-0"].dead = "killed"
    with pytest.raises(EngineError, match=r"4 deaths of a thing .* last one: .*out of memory"):
        while True:
            at.keeper.check()
            await asyncio.sleep(0.01)
    await at.keeper.stop()


async def test_new_version_is_taken_before_anybody_is_given_work() -> None:
    at = Setting()
    await at.keeper.start()
    at.things.version = "v2"
    at.things.taken.clear()
    await at.keeper.serve()
    assert sorted(at.things.taken) == ["thing-0", "thing-1"]
    assert at.told[-1] == ["thing-0", "thing-1"] and [] in at.told
    assert {thing.version for thing in at.things.made.values()} == {"v2"}
    await at.keeper.stop()


async def test_member_that_dies_while_it_syncs_is_replaced_at_the_new_version() -> None:
    at = Setting()
    await at.keeper.start()
    at.things.version = "v2"
    at.things.made["thing-1"].dead = "killed"
    await at.keeper.serve()
    assert sorted(at.keeper.handles) == ["thing-0", "thing-2"]
    assert at.things.made["thing-2"].version == "v2"
    await at.keeper.stop()


async def test_member_that_starts_during_a_change_of_version_syncs_before_it_serves() -> None:
    at = Setting()
    await at.keeper.start()
    at.things.held = True
    at.things.made["thing-0"].dead = "killed"
    await at.until(lambda: "thing-2" in at.things.made)
    at.things.version = "v2"
    at.things.taken.clear()
    serving = asyncio.create_task(at.keeper.serve())
    await at.until(lambda: at.things.taken == ["thing-1"])
    assert at.keeper.members.state("thing-2") is MemberState.STARTING and not serving.done()
    at.things.taken.clear()
    at.things.made["thing-2"].up.set()
    await serving
    assert at.things.taken == ["thing-2"]
    assert at.things.made["thing-2"].version == "v2"
    await at.keeper.stop()


async def test_requests_that_are_given_up_again_and_again_are_no_progress() -> None:
    """A replica that hangs is idle between the deadline of one request and the next request."""
    at = Setting(size=2)
    await at.keeper.start()

    async def ask() -> None:
        while True:
            at.things.made["thing-0"].open = 0
            await asyncio.sleep(0.006)
            at.things.made["thing-0"].open = 1
            await asyncio.sleep(0.006)

    asking = asyncio.create_task(ask())
    await at.until(lambda: sorted(at.keeper.handles) == ["thing-1", "thing-2"])
    asking.cancel()
    await at.keeper.stop()


async def test_replacement_waits_for_a_place_as_long_as_it_takes() -> None:
    at = Setting(size=1)
    at.keeper._start_timeout_s = 0.05
    await at.keeper.start()
    at.things.held = True
    at.things.made["thing-0"].dead = "killed"
    await at.until(lambda: "thing-1" in at.things.made)
    await asyncio.sleep(0.2)
    assert at.keeper.members.state("thing-1") is MemberState.STARTING
    at.things.made["thing-1"].up.set()
    await at.until(lambda: sorted(at.keeper.handles) == ["thing-1"])
    await at.keeper.stop()


async def test_whoever_scales_a_pool_is_told_how_starts_went() -> None:
    at = Setting(size=1)
    tried: list[bool] = []
    at.keeper._tried = tried.append
    await at.keeper.start()
    at.things.broken = "no memory"
    at.keeper.resize(2)
    await at.until(lambda: len(tried) >= 2)
    at.things.broken = ""
    await at.until(lambda: tried[-1])
    assert tried[:2] == [True, False]
    await at.keeper.stop()


async def test_member_that_has_not_started_is_let_go_at_once() -> None:
    at = Setting(size=1)
    await at.keeper.start()
    at.things.held = True
    at.keeper.resize(2)
    await at.until(lambda: "thing-1" in at.things.made)
    at.keeper.resize(1)
    at.keeper.drain(["thing-1"], limit_s=60)
    assert at.things.made["thing-1"].killed and at.keeper.living == 1
    assert at.keeper.members.losses(0).deaths == 0
    await at.keeper.stop()


# -- part of a pool


async def places(at: Setting, count: int) -> None:
    """Give so many of the members that were asked for a place."""
    at.things.held = True
    await at.until(lambda: len(at.things.made) >= count)
    for thing in list(at.things.made.values())[:count]:
        thing.up.set()


async def test_pool_starts_with_enough_of_its_members_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "PLACEMENT_S", 0.05)
    at = Setting(size=4, min_ready=0.75)
    at.things.held = True
    at.things.why_pending = lambda: "no node has room"  # type: ignore[method-assign]
    starting = asyncio.create_task(at.keeper.start())
    await places(at, 2)
    await asyncio.sleep(0.02)
    assert not starting.done() and at.keeper.handles == {}
    await places(at, 3)
    await starting
    assert sorted(at.keeper.handles) == ["thing-0", "thing-1", "thing-2"]
    said = "3 of 4 things serve; 1 waits for a place"
    await at.until(lambda: f"{said}: no node has room" in at.notes)
    assert at.keeper.short() == said
    await places(at, 4)
    await at.until(lambda: len(at.keeper.handles) == 4)
    await at.until(lambda: at.notes[-1] == "all 4 things serve")
    assert at.keeper.short() == "" and at.keeper.members.losses(0).deaths == 0
    await at.keeper.stop()


async def test_start_without_places_for_enough_fails_in_time_and_says_what_is_missing() -> None:
    at = Setting(size=4, min_ready=0.5, start_timeout_s=0.1)
    at.things.held = True
    starting = asyncio.create_task(at.keeper.start())
    await places(at, 1)
    with pytest.raises(
        PoolLostError,
        match=r"^0 of 4 things serve; 1 waits to take the weights; 3 wait for a place "
        r"\(after 0 s; 2 are needed\)$",
    ):
        await starting
    assert sorted(at.things.gone) == ["thing-0", "thing-1", "thing-2", "thing-3"]


async def test_one_that_fails_at_the_start_is_replaced_while_enough_can_come_up() -> None:
    at = Setting(size=4, min_ready=0.5)
    at.things.held = True
    starting = asyncio.create_task(at.keeper.start())
    await at.until(lambda: len(at.things.made) == 4)
    at.things.broken = "no such file"
    at.things.made["thing-0"].up.set()
    await at.until(lambda: "thing-0" in at.things.gone)
    at.things.broken, at.things.held = "", False
    for thing in at.things.made.values():
        thing.up.set()
    await starting
    await at.until(
        lambda: sorted(at.keeper.handles) == ["thing-1", "thing-2", "thing-3", "thing-4"]
    )
    await at.keeper.stop()


async def test_failures_end_the_start_as_soon_as_too_few_can_come_up() -> None:
    at = Setting(size=4, min_ready=0.5)
    at.things.held, at.things.broken = True, "no such checkpoint"
    starting = asyncio.create_task(at.keeper.start())
    await places(at, 3)  # the fourth finds no place
    with pytest.raises(PoolLostError, match=r"thing did not start: thing-.: no such checkpoint"):
        async with asyncio.timeout(30):
            await starting
    assert all(thing.killed for thing in at.things.made.values())


async def test_new_weights_are_served_without_the_one_that_was_lost_and_has_no_place() -> None:
    at = Setting(size=4, min_ready=0.5)
    await at.keeper.start()
    await at.until(lambda: len(at.keeper.handles) == 4)
    at.things.held = True
    at.things.made["thing-3"].dead = "its node is gone"
    await at.until(lambda: "thing-4" in at.things.made)
    at.things.version = "v2"
    await at.keeper.serve()
    await at.until(lambda: sorted(at.keeper.handles) == ["thing-0", "thing-1", "thing-2"])
    at.things.made["thing-4"].up.set()
    await at.until(lambda: "thing-4" in at.keeper.handles)
    assert {thing.version for thing in at.keeper.handles.values()} == {"v2"}
    await at.keeper.stop()


async def test_member_that_is_slow_to_take_weights_is_not_waited_for_and_replaced() -> None:
    at = Setting(size=4, min_ready=0.5)
    await at.keeper.start()
    await at.until(lambda: len(at.keeper.handles) == 4)
    at.things.take_s = 0.1
    at.things.version, at.things.slow = "v2", {"thing-2"}
    await at.keeper.serve()
    assert at.keeper.members.state("thing-2") is MemberState.SYNCING
    await at.until(lambda: "thing-4" in at.keeper.handles)
    assert at.keeper.members.losses(0).last_reason == "thing-2: did not take v2 within 0.1 s"
    await at.keeper.stop()


async def test_members_that_are_all_slow_are_waited_for() -> None:
    at = Setting(size=2)
    await at.keeper.start()
    at.things.take_s = 0.1
    at.things.version, at.things.slow = "v2", {"thing-0", "thing-1"}
    serving = asyncio.create_task(at.keeper.serve())
    await asyncio.sleep(0.2)
    assert at.things.gone == [] and not serving.done()
    await at.until(lambda: {"thing-0", "thing-1"} <= set(at.things.gone))
    await serving
    assert sorted(at.keeper.handles) == ["thing-2", "thing-3"]
    await at.keeper.stop()


async def test_weights_that_no_member_can_serve_are_an_error_and_not_tried_again() -> None:
    at = Setting(size=4, min_ready=0.5)
    await at.keeper.start()
    await at.until(lambda: len(at.keeper.handles) == 4)
    at.things.version, at.things.refuse = "v2", set(at.things.made)
    with pytest.raises(ModelCheckError, match="another architecture"):
        await at.keeper.serve()
    await at.keeper.stop()


async def test_odd_member_takes_its_weights_again() -> None:
    at = Setting(size=3)
    await at.keeper.start()
    at.things.version, at.things.wrong = "v2", {"thing-1": 1}
    at.things.taken.clear()
    await at.keeper.serve()
    assert sorted(at.things.taken) == ["thing-0", "thing-1", "thing-1", "thing-2"]
    assert at.things.gone == []
    await at.keeper.stop()


async def test_member_that_stays_odd_is_replaced_and_does_not_end_the_run() -> None:
    at = Setting(size=3)
    await at.keeper.start()
    at.things.version, at.things.wrong = "v2", {"thing-1": 9}
    await at.keeper.serve()
    assert sorted(at.keeper.handles) == ["thing-0", "thing-2", "thing-3"]
    assert "its output differs by 97" in at.keeper.members.losses(0).last_reason
    await at.keeper.stop()


async def test_of_two_that_differ_both_take_their_weights_again() -> None:
    """The first was READY by itself when the second came."""
    at = Setting(size=2, min_ready=0.5)
    at.things.held, at.things.wrong = True, {"thing-0": 1}
    starting = asyncio.create_task(at.keeper.start())
    await places(at, 1)
    await starting
    assert sorted(at.keeper.handles) == ["thing-0"]
    at.things.taken.clear()
    at.things.made["thing-1"].up.set()
    await at.until(lambda: len(at.keeper.handles) == 2)
    assert sorted(at.things.taken) == ["thing-0", "thing-1", "thing-1"]
    assert at.things.gone == []
    await at.keeper.stop()


# -- a driver that stands still


async def test_nobody_dies_while_the_event_loop_stands_still() -> None:
    at = Setting(size=8, config=QUICK.model_copy(update={"silent_s": 0.3}))
    at.things.answers_after_s = 0.02
    await at.keeper.start()
    for _ in range(5):
        await asyncio.sleep(0.01)  # looks go out
        time.sleep(0.6)
        await asyncio.sleep(0.05)
    assert at.things.gone == [] and len(at.keeper.handles) == 8
    at.things.made["thing-0"].silent = True
    await at.until(lambda: "thing-0" in at.things.gone)
    await at.keeper.stop()


async def test_start_is_not_given_up_because_the_event_loop_stood_still() -> None:
    at = Setting(size=1, start_timeout_s=0.3)
    at.things.held = True
    starting = asyncio.create_task(at.keeper.start())
    await asyncio.sleep(0.01)
    time.sleep(0.6)
    await asyncio.sleep(0.02)
    await places(at, 1)
    await starting
    await at.keeper.stop()
