"""kill -9 of a driver on a cluster that lives on: what it left works, is found, and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.fleet.left_over import left_over, namespace_of
from rollout.store import RunStore, TrajectoryStore
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_driver import PROBLEMS, make_fleet, rollout, small_cluster
from tests.scripted_replicas import HELD

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with small_cluster() as made:
        yield made


class Driver:
    """A driver in a process of its own, seen from a second connection to its cluster."""

    def __init__(self, root: Path, cluster: Cluster, *, orphan_s: float) -> None:
        root.mkdir()
        self.hold = root / "hold"
        self.hold.touch()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.scripted_driver", root, cluster.address, str(orphan_s)],
            cwd=ROOT,
        )
        self.trees = TrajectoryStore(RunStore(str(root)), 1)
        self.namespace = namespace_of(RunStore(root))

    def committed(self) -> int:
        return len(self.trees.commits())

    async def kill_at_work(self) -> None:
        await until(lambda: self.committed() >= 1)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Left:
    """What a driver that was killed has left, when all that is not held is committed."""

    driver: Driver
    names: list[str]
    pids: dict[str, int]


async def left_by_a_dead_driver(root: Path, cluster: Cluster) -> Left:
    driver = Driver(root, cluster, orphan_s=600)
    ray.init(address=cluster.address, logging_level="ERROR")
    await driver.kill_at_work()
    # Shards without a held problem: 40 problems in shards of 4, every eighth problem is held.
    free = sum(all(p.text != HELD for p in PROBLEMS[n : n + 4]) for n in range(0, 40, 4))
    await until(lambda: driver.committed() == free)
    names = left_over(driver.namespace)
    kinds = {name.partition("-")[0] for name in names}
    assert kinds == {"coordinator", "policy", "sandbox", "watchman", "worker"}
    pids = pids_of(driver.namespace)
    ray.shutdown()
    return Left(driver, names, pids)


def pids_of(namespace: str) -> dict[str, int]:
    """Of all actors of a run that can be asked, by name."""
    return {
        name: ray.get(
            ray.get_actor(name, namespace=namespace).__ray_call__.remote(lambda self: os.getpid())
        )
        for name in left_over(namespace)
    }


async def test_the_next_driver_takes_over_what_a_dead_one_has_left(
    tmp_path: Path, cluster: Cluster
) -> None:
    left = await left_by_a_dead_driver(tmp_path / "run", cluster)
    # As after `rstar set`: what a worker can be told is no reason to end it.
    fleet = make_fleet(tmp_path / "run", cluster.address, orphan_s=600, max_open_trees=10)
    notes: list[str] = []
    fleet.note = notes.append
    async with stopped_at_the_end(fleet, processes=False):
        with fleet.folder.locked():
            work = asyncio.create_task(rollout(fleet))
            await until(lambda: "worker" in fleet.pools.keepers or work.done())
            await until(lambda: len(fleet.progress()) == 2 or work.done())
            for worker in fleet.pools.handles("worker").values():
                assert await worker.__ray_call__.remote(_most_open_trees) == 10
            assert pids_of(left.driver.namespace) == left.pids  # nothing ended, nothing is new
            left.driver.hold.unlink()
            outcome = await work
            losses = fleet.pools.losses()
    assert (
        "taken over from a driver that is gone, as they run: 1 coordinator, 2 policy, " in notes[0]
    )
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.totals.trees == len(PROBLEMS)
    # No lease was given back, no search begun again: each shard is whole, and of the first workers.
    commits = left.driver.trees.commits().values()
    assert not any(commit.remaining for commit in commits)
    assert outcome.resumed_trees == 0
    assert {c.info["writer"] for c in commits} <= {name.rpartition("-")[0] for name in left.names}
    assert all(loss.deaths == 0 for loss in losses.values())
    ray.init(address=cluster.address, logging_level="ERROR")
    assert left_over(left.driver.namespace) == []


async def test_what_is_not_as_it_should_be_is_drained_and_the_reason_said(
    tmp_path: Path, cluster: Cluster
) -> None:
    left = await left_by_a_dead_driver(tmp_path / "run", cluster)
    replicas = {"replicas": 2, "num_cpus": 0.01}
    fleet = make_fleet(tmp_path / "run", cluster.address, policy=replicas, orphan_s=600)
    notes: list[str] = []
    fleet.note = notes.append
    async with stopped_at_the_end(fleet, processes=False):
        with fleet.folder.locked():
            work = asyncio.create_task(rollout(fleet))
            await until(lambda: any("taken over from" in note for note in notes) or work.done())
            left.driver.hold.unlink()
            outcome = await work
    assert notes[:3] == [
        "2 policy of an earlier start not taken over, but ended: other values of "
        "cluster.policy.num_cpus",
        "2 worker of an earlier start not taken over, but ended: what it works with ends",
        "taken over from a driver that is gone, as they run: 1 coordinator, 1 sandbox",
    ]
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}
    # Problems that were finished beside a held one were committed when the workers were drained.
    finished = len(PROBLEMS) - sum(problem.text == HELD for problem in PROBLEMS)
    assert outcome.manifest.totals.trees == len(PROBLEMS)
    commits = left.driver.trees.commits().values()
    new = [c for c in commits if fleet.pools.home.driver in c.info["writer"]]
    assert sum(c.totals.trees for c in new) == len(PROBLEMS) - finished


async def test_what_a_dead_driver_left_ends_by_itself(tmp_path: Path, cluster: Cluster) -> None:
    driver = Driver(tmp_path / "run", cluster, orphan_s=3)
    ray.init(address=cluster.address, logging_level="ERROR")
    await driver.kill_at_work()
    await until(lambda: left_over(driver.namespace) == [], limit_s=300)
    # What was finished beside an open search was committed before the end, the rest handed back.
    assert any(commit.remaining for commit in driver.trees.commits().values())


async def test_a_driver_that_is_killed_in_its_drain_has_lost_nothing_and_holds_nothing(
    tmp_path: Path, cluster: Cluster
) -> None:
    driver = Driver(tmp_path / "run", cluster, orphan_s=600)
    ray.init(address=cluster.address, logging_level="ERROR")
    await until(lambda: driver.committed() >= 1)
    driver.process.send_signal(signal.SIGTERM)  # as `ray job stop` does, and then:
    with pytest.raises(subprocess.TimeoutExpired):
        driver.process.wait(timeout=3)
    driver.process.kill()
    driver.process.wait()
    await until(lambda: left_over(driver.namespace) == [], limit_s=300)
    # What was finished beside an open search is committed, the rest is handed back.
    assert any(commit.remaining for commit in driver.trees.commits().values())


def _most_open_trees(worker: Any) -> int:
    return worker._admission.max_trees
