"""Whose actors are whose, and when a watchman takes a driver for dead; no Ray."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from cluster.fleet.left_over import Home, Watchman, namespace_of
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
