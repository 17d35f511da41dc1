"""Whose actors are whose, and when a watchman takes a driver for dead; no Ray."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

from cluster.fleet import left_over as left_over_module
from cluster.fleet.left_over import (
    LEAVING_S,
    Home,
    LeftActor,
    Mark,
    Watchman,
    end_left_over,
    namespace_of,
)
from rollout.run_store import RunStore


def test_namespace_of_a_run_is_its_own_and_stays(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for root in (first, second):
        root.mkdir()
    name = namespace_of(RunStore(first))
    assert namespace_of(RunStore(first)) == name != namespace_of(RunStore(second))


def test_copied_run_and_new_run_in_an_old_place_are_other_runs(tmp_path: Path) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"
    root.mkdir()
    name = namespace_of(RunStore(root))
    shutil.copytree(root, copy)
    assert namespace_of(RunStore(copy)) != name
    shutil.rmtree(root)
    root.mkdir()
    assert namespace_of(RunStore(root)) != name


def test_two_drivers_of_one_run_give_no_name_twice() -> None:
    one, other = Home(namespace="rstar-1"), Home(namespace="rstar-1")
    assert one.options("policy-0")["name"] != other.options("policy-0")["name"]
    assert one.options("policy-0")["namespace"] == "rstar-1"
    assert one.options("policy-0")["lifetime"] == "detached"
    assert one.group("policy-0").startswith("rstar-1/policy-0-")


def test_watchman_ends_what_a_silent_driver_left_and_nothing_before() -> None:
    now = [0.0]
    ended: list[tuple[str, float]] = []
    over = threading.Event()

    def end(namespace: str, drain_s: float) -> None:
        ended.append((namespace, drain_s))
        over.set()

    man = Watchman("rstar-1", 10, drain_s=3, look_s=0.001, clock=lambda: now[0], end=end)
    for second in (9.0, 18.0):
        now[0] = second
        man.seen()
    now[0] = 27.9
    assert not over.wait(0.05)
    now[0] = 28.0
    assert over.wait(5)
    assert ended == [("rstar-1", 3)]


def test_driver_that_was_told_to_stop_and_is_killed_then_is_missed_soon() -> None:
    now = [0.0]
    over = threading.Event()
    end = lambda namespace, drain_s: over.set()  # noqa: E731
    man = Watchman("rstar-1", 300, look_s=0.001, clock=lambda: now[0], end=end)
    man.leaving()
    now[0] = LEAVING_S - 0.1
    assert not over.wait(0.05)
    assert man.seen()  # it still ends its actors itself
    now[0] += LEAVING_S
    assert over.wait(5)
    assert not man.seen(new=True)  # the next one comes too late, and is told


def test_driver_that_comes_after_one_that_was_leaving_has_all_its_time_again() -> None:
    now = [0.0]
    over = threading.Event()
    end = lambda namespace, drain_s: over.set()  # noqa: E731
    man = Watchman("rstar-1", 300, look_s=0.001, clock=lambda: now[0], end=end)
    man.leaving()
    assert man.seen(new=True)
    now[0] = 299.0
    assert not over.wait(0.05)


def test_mark_says_why_an_actor_is_not_what_is_wanted() -> None:
    made = Mark(code="c1", settings={"cluster": {"policy": {"num_gpus": 1}}, "packages": {}})
    assert made.why_not(made) == ""
    other = {"cluster": {"policy": {"num_gpus": 2}}, "packages": {"vllm": "0.33"}}
    assert made.why_not(Mark(code="c1", settings=other)) == (
        "other values of cluster.policy.num_gpus, packages.vllm"
    )
    assert "another version of the code" in made.why_not(Mark(code="c2", settings=other))


def test_left_actor_is_known_by_its_name() -> None:
    name = Home(namespace="rstar-1").options("worker-r1-a1b2c3-0f0f-1")["name"]
    actor = LeftActor(name=name, handle=None, mark=None)
    assert (actor.member, actor.pool) == ("worker-r1-a1b2c3-0f0f-1", "worker")
    assert actor.why_not(Mark(code="", settings={})) == "it does not answer"


def test_only_what_is_named_ends_and_its_leases_with_it(monkeypatch) -> None:
    told: list[str] = []

    def actor(name: str) -> SimpleNamespace:
        def said(what: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *given: told.append(f"{name} {what} {given}"))

        return SimpleNamespace(name=name, drain=said("drain"), forget_worker=said("forget"))

    names = ["coordinator-0-aa", "policy-0-aa", "policy-1-aa", "worker-r1-aa-0f-0-aa"]
    actors = {name: actor(name) for name in names}
    groups = {name: f"group of {name}" for name in names[1:3]}
    monkeypatch.setattr(left_over_module, "left_over", lambda namespace: sorted(actors))
    monkeypatch.setattr(left_over_module, "_find", lambda name, namespace: actors.get(name))
    monkeypatch.setattr(left_over_module, "groups_of", lambda namespace: groups)
    monkeypatch.setattr(left_over_module, "remove_placement_group", told.append)
    monkeypatch.setattr(left_over_module.ray, "wait", lambda asked, **limits: (asked, []))
    monkeypatch.setattr(left_over_module.ray, "kill", lambda handle: actors.pop(handle.name))
    only = {"policy-1-aa", "worker-r1-aa-0f-0-aa"}
    assert end_left_over("rstar-1", 5, only) == sorted(only)
    assert sorted(actors) == ["coordinator-0-aa", "policy-0-aa"]
    assert told == [
        "worker-r1-aa-0f-0-aa drain ()",
        "group of policy-1-aa",
        "coordinator-0-aa forget ('worker-r1-aa-0f-0',)",
    ]
