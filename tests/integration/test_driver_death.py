"""kill -9 of a driver on a cluster that lives on: what it left works, is found, and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.fleet.left_over import left_over, namespace_of
from rollout.store import RunStore, TrajectoryStore
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_driver import PROBLEMS, make_fleet, rollout
from tests.scripted_replicas import HELD

pytestmark = pytest.mark.timeout(200)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
        },
    )
    yield made
    ray.shutdown()
    made.shutdown()


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


async def test_what_a_dead_driver_left_goes_on_until_the_next_one_takes_its_place(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = Driver(tmp_path / "run", cluster, orphan_s=600)
    ray.init(address=cluster.address, logging_level="ERROR")
    await driver.kill_at_work()
    before = driver.committed()
    # Shards without a held problem: 40 problems in shards of 4, every eighth problem is held.
    free = sum(all(p.text != HELD for p in PROBLEMS[n : n + 4]) for n in range(0, 40, 4))
    await until(lambda: driver.committed() == free)
    names = left_over(driver.namespace)
    kinds = {name.partition("-")[0] for name in names}
    assert kinds == {"coordinator", "policy", "sandbox", "watchman", "worker"}
    ray.shutdown()

    fleet = make_fleet(tmp_path / "run", cluster.address)
    notes: list[str] = []
    fleet.note = notes.append
    began_s = time.monotonic()
    async with stopped_at_the_end(fleet, processes=False):
        work = asyncio.create_task(rollout(fleet))
        await until(lambda: any(f"{len(names)} actors of an earlier start" in n for n in notes))
        driver.hold.unlink()
        outcome = await work
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}
    # Problems that were finished beside a held one were committed when the workers were drained.
    finished = len(PROBLEMS) - sum(problem.text == HELD for problem in PROBLEMS)
    assert outcome.manifest.totals.trees == len(PROBLEMS)
    new = [
        c for c in driver.trees.commits().values() if fleet.pools.home.driver in c.info["writer"]
    ]
    assert sum(c.totals.trees for c in new) == len(PROBLEMS) - finished
    ray.init(address=cluster.address, logging_level="ERROR")
    assert left_over(driver.namespace) == []
    with capsys.disabled():
        print(
            f"\n{before} shards when the driver was killed, {free} without a driver; "
            f"the next start took {time.monotonic() - began_s:.1f} s for the rest"
        )


async def test_what_a_dead_driver_left_ends_by_itself(tmp_path: Path, cluster: Cluster) -> None:
    driver = Driver(tmp_path / "run", cluster, orphan_s=3)
    ray.init(address=cluster.address, logging_level="ERROR")
    await driver.kill_at_work()
    await until(lambda: left_over(driver.namespace) == [], limit_s=60)
    # What was finished beside an open search was committed before the end, the rest handed back.
    assert any(commit.remaining for commit in driver.trees.commits().values())
