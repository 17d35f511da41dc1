"""`rstar why` asked as a user does, of a fleet on real Ray in which something really is wrong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from rich.console import Console

from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.telemetry.live import LiveFile
from cluster.telemetry.progress import ProgressView
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import make_problem
from tests.saboteur import fill, stopped_at_the_end, until
from tests.scripted_fleet import scripted_fleet

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=10, max_depth=5)
PROBLEMS = [make_problem(f"p{n}", text="How many?", answer="3") for n in range(20_000)]
NODE = {"num_cpus": 4, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Cluster(initialize_head=True, head_node_args={**NODE, "resources": {"head": 10}})
    yield made
    made.shutdown()


@asynccontextmanager
async def at_work(root: Path, cluster: Cluster, **other: Any) -> AsyncIterator[Fleet]:
    """A fleet with more to do than it can, which tells of itself as a run's driver does."""
    usual: dict[str, Any] = {"policy": {"replicas": 2}, "workers": {"replicas": 1}}
    usual |= {"shard_size": 4, "max_open_trees": 4}
    fleet = scripted_fleet(root, address=cluster.address, **usual | other)
    view = ProgressView(Console(file=io.StringIO()))
    fleet.note = view.note
    with LiveFile(fleet.store, view.snapshot, fleet=fleet.pools.account, interval_s=0.5):
        async with stopped_at_the_end(fleet, processes=False):
            await fleet.start(root.parent / "none", version="policy-r0", learner=False)
            stage = RolloutStage(name="base", search=SEARCH)
            work = asyncio.create_task(
                fleet.rollout(1, PROBLEMS, [stage], preference=False, on_progress=view.update)
            )
            trees = TrajectoryStore(RunStore(root), 1)
            await until(lambda: work.done() or len(trees.commits()) >= 2)
            yield fleet
            assert not work.done(), work
            work.cancel()
            await asyncio.wait([work])


async def why(root: Path) -> dict[str, Any]:
    """What `rstar why RUN --json` prints."""
    asked = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from cluster.cli import app; app()", "why", root, "--json"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await asked.communicate()
    return json.loads(printed)


async def until_named(root: Path, kind: str, *names: str) -> dict[str, Any]:
    """Ask until something of a kind is the first culprit; it must be one of those."""
    for _ in range(40):
        told = await why(root)
        first = (told["culprits"] or [{"kind": "", "name": ""}])[0]
        if first["kind"] == kind and first["name"] in names:
            return told
        await asyncio.sleep(1.0)
    raise AssertionError((kind, names, told["culprits"], told["ray"]))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def starved(processes: list[psutil.Process]) -> Iterator[None]:
    """On one core, beside five that take all of it."""
    core = min(os.sched_getaffinity(0))
    for process in processes:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})
            os.setpriority(os.PRIO_PROCESS, thread.id, 19)
    hogs = [
        subprocess.Popen(["taskset", "-c", str(core), "sh", "-c", "while :; do :; done"])
        for _ in range(5)
    ]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


async def test_stopped_replica_starved_sandbox_and_missing_node_are_named(
    tmp_path: Path, cluster: Cluster
) -> None:
    run = tmp_path / "run"
    supervision = {"look_s": 0.2, "silent_s": 600.0, "backoff_s": 0.2}
    spot = cluster.add_node(**{**NODE, "resources": {"spot": 10}})
    sandbox = {"replicas": 1, "resources": {"head": 1}}
    workers = {"replicas": 1, "resources": {"head": 1}}
    policy = {"replicas": 2, "resources": {"spot": 1}}
    async with at_work(
        run, cluster, policy=policy, sandbox=sandbox, workers=workers, supervision=supervision
    ) as fleet:
        # Its sandbox may be short of CPU on a small machine; nothing else is wrong yet.
        assert {culprit["kind"] for culprit in (await why(run))["culprits"]} <= {"starved"}

        members = fleet.pools.handles("policy")
        name = min(members)
        pid = (await members[name].ready.remote()).pid
        with stopped(pid):
            told = await until_named(run, "actor", name)
        text = told["culprits"][0]["text"]
        assert f"{name} (process {pid} on " in text and "is stopped (SIGSTOP)" in text
        assert told["slowest"]["policy"]["name"] == name
        assert any(wait["on"] == name for wait in told["live"]["fleet"]["waits"])

        actors = told["live"]["fleet"]["actors"]
        (box,) = [actor for actor in actors if actor["pool"] == "sandbox"]
        process = psutil.Process(box["pid"])
        with starved([process, *process.children(recursive=True)]):
            told = await until_named(run, "starved", box["name"])
        assert "gets no CPU" in told["culprits"][0]["text"]

        cluster.remove_node(spot, allow_graceful=False)
        told = await until_named(run, "node", spot.node_id)
        assert all(member in told["culprits"][0]["text"] for member in members)


async def test_full_disk_is_named(tmp_path: Path, disk: Path, cluster: Cluster) -> None:
    async with at_work(disk / "run", cluster):
        fill(disk / "filler")
        told = await until_named(disk / "run", "disk", str(disk / "run"))
        assert "is full" in told["culprits"][0]["text"]
        (disk / "filler").unlink()
