"""Keepers of actors that live in this process and die when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.fleet.keeper import ActorKind, Look, PoolKeeper
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
        self.synced: list[str] = []

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
        if handle.silent:
            await asyncio.Event().wait()
        revived, handle.revived_after_s = handle.revived_after_s, None
        return Look(broken=handle.dead, done=handle.done, open=handle.open, revived_after_s=revived)

    async def sync(self, handle: Thing, siblings: Mapping[str, Any]) -> str:
        if handle.dead:
            raise EngineError(handle.dead)
        self.synced.append(handle.name)
        handle.version = self.version
        return handle.version

    def kill(self, handle: Thing) -> None:
        handle.killed = True


class Setting:
    def __init__(self, size: int = 2, config: SupervisionConfig = QUICK) -> None:
        self.things = Things()
        self.told: list[list[str]] = []
        self.keeper = PoolKeeper(
            self.things,
            size,
            config,
            start_timeout_s=5.0,
            announce=lambda handles: self.told.append(sorted(handles)),
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
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
    with pytest.raises(EngineError, match=r"thing-. did not start: no such checkpoint"):
        await at.keeper.start()
    assert all(thing.killed for thing in at.things.made.values())


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


async def test_new_version_is_synced_before_anybody_is_given_work() -> None:
    at = Setting()
    await at.keeper.start()
    at.things.version = "v2"
    at.things.synced.clear()
    await at.keeper.serve()
    assert sorted(at.things.synced) == ["thing-0", "thing-1"]
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
    at.things.synced.clear()
    serving = asyncio.create_task(at.keeper.serve())
    await at.until(lambda: at.things.synced == ["thing-1"] and at.told[-1] == ["thing-1"])
    assert at.keeper.members.state("thing-2") is MemberState.STARTING
    at.things.synced.clear()
    at.things.made["thing-2"].up.set()
    await serving
    assert at.things.synced == ["thing-2"]
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
