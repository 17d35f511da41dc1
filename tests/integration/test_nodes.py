"""A rollout over several Ray nodes on one machine, some of which go: killed, or with a notice.

The head holds the coordinator and the driver; replicas, sandbox and rollout workers run on the
other nodes, by custom resources.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from aiohttp import web
from aiohttp.test_utils import TestServer
from ray.cluster_utils import Cluster

from cluster.fleet import keeper
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.machines import nodes
from cluster.machines.spot import SpotConfig
from learner.checkpoint import Checkpoint
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import make_problem
from tests.saboteur import check_solves_as_undisturbed, stopped_at_the_end, until
from tests.scripted_fleet import scripted_fleet
from tests.scripted_replicas import HELD
from tests.standing import actors

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=10, max_depth=5)
PROBLEMS = [make_problem(f"p{n}", text="How many?" if n else HELD, answer="3") for n in range(40)]
SHARD = 4
NODE = {
    "num_cpus": 2,
    "resources": {"spot": 10},
    "object_store_memory": 80 * 2**20,
    "include_dashboard": False,
}
FAST_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "resources": {"head": 10},
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "_system_config": FAST_HEALTH_CHECK,
        },
    )
    yield made
    ray.shutdown()
    made.shutdown()


def make_fleet(root: Path, cluster: Cluster, **other: Any) -> Fleet:
    spot = {"resources": {"spot": 1}}
    two = {"replicas": 2, **spot}
    usual: dict[str, Any] = {"policy": two, "sandbox": two, "workers": two}
    usual |= {"shard_size": SHARD, "max_open_trees": 4, "checkpoint_open_trees_s": 1.0}
    return scripted_fleet(root, address=cluster.address, **usual | other)


def finished(fleet: Fleet) -> int:
    return sum(p.finished.trees for p in fleet.progress())


def where(fleet: Fleet, name: str) -> set[str]:
    return {nodes.node_of(handle) for handle in fleet.pools.handles(name).values()}


@asynccontextmanager
async def preempting_cloud(taken: set[int]) -> AsyncIterator[str]:
    """A metadata service like GCP's for all nodes of this machine; its address.

    Args:
        taken: process ids of the raylets whose nodes will be taken.
    """
    asking: dict[int, int] = {}

    def raylet(port: int) -> int:
        """Parent of the process that asks from a port."""
        if port not in asking:
            pids = {c.laddr.port: c.pid for c in psutil.net_connections("tcp")}
            asking[port] = psutil.Process(pids[port]).ppid()
        return asking[port]

    async def answer(request: web.Request) -> web.Response:
        text = ""
        if request.path.endswith("/preempted") and request.transport is not None:
            port = request.transport.get_extra_info("peername")[1]
            text = "TRUE" if raylet(port) in taken else "FALSE"
        known = request.path.startswith("/computeMetadata/")
        return web.Response(
            text=text, status=200 if known else 404, headers={"Metadata-Flavor": "Google"}
        )

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("/")).rstrip("/")


async def rollout(fleet: Fleet, number: int = 1) -> RolloutOutcome:
    return await fleet.rollout(
        number,
        PROBLEMS,
        [RolloutStage(name="base", search=SEARCH)],
        preference=False,
        on_progress=lambda done, total, facts: None,
    )


async def test_run_outlives_a_node_that_is_killed_and_leaves_one_that_drains(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cluster.add_node(**NODE)
    notes: list[str] = []
    taken: set[int] = set()
    async with preempting_cloud(taken) as url:
        spot = {"url": url, "interval_s": 0.2, "timeout_s": 10.0}
        fleet = make_fleet(tmp_path / "run", cluster, spot=spot)
        fleet.note = notes.append
        hold = fleet.folder.root / "hold"
        hold.touch()
        async with stopped_at_the_end(fleet, processes=False):
            await fleet.start(hold, version="policy-r0", learner=False)
            began_s = time.monotonic()
            work = asyncio.create_task(rollout(fleet))
            await until(lambda: finished(fleet) >= 2)

            # a second node joins; the first one dies
            second = cluster.add_node(**NODE)
            cluster.remove_node(first, allow_graceful=False)
            killed_s = time.monotonic()
            await until(lambda: where(fleet, "policy") == {second.node_id})
            back_s = time.monotonic() - killed_s
            # It goes on; by now all may be finished but the shard of the problem that is held.
            some = min(finished(fleet) + 1, len(PROBLEMS) - SHARD)
            await until(lambda: finished(fleet) >= some)

            # a third one joins; the second one is told that it has to go
            third = cluster.add_node(**NODE)
            told_s = time.monotonic()
            taken.add(second.all_processes["raylet"][0].process.pid)
            pools = ("policy", "sandbox", "worker")
            await until(lambda: all(where(fleet, name) == {third.node_id} for name in pools))
            moved_s = time.monotonic() - told_s
            assert set(nodes.draining()) == {second.node_id}
            cluster.remove_node(second, allow_graceful=False)
            hold.unlink()
            outcome = await work
            took_s = time.monotonic() - began_s
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}
    assert outcome.losses["policy replica"].deaths == 2
    assert any("leaves its node" in note for note in notes)
    trees = TrajectoryStore(RunStore(str(tmp_path / "run")), 1).trees()
    assert sorted(tree.problem.id for tree in trees) == sorted(p.id for p in PROBLEMS)
    await check_solves_as_undisturbed(fleet, PROBLEMS, SEARCH)
    with capsys.disabled():
        print(
            f"\n{took_s:.1f} s in all; serving again {back_s:.1f} s after a node's death, away "
            f"from a draining node after {moved_s:.1f} s; {outcome.resumed_trees} trees resumed"
        )


async def test_three_of_four_replicas_are_enough_to_begin_and_to_go_on(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth has no place, joins when a node does, and is lost again between two rounds."""
    monkeypatch.setattr(keeper, "PLACEMENT_S", 1.0)
    cluster.add_node(**{**NODE, "resources": {"spot": 10, "engine": 3}})
    policy = {"replicas": 4, "resources": {"engine": 1}}
    fleet = make_fleet(tmp_path / "run", cluster, policy=policy)
    notes: list[str] = []
    fleet.note = notes.append
    hold = fleet.folder.root / "hold"

    def serving() -> int:
        return len(fleet.pools.handles("policy"))

    def weights(number: int) -> Checkpoint:
        return Checkpoint(kind="policy", round=number, path=str(hold), digest="d")

    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(hold, version="policy-r0", learner=False)
        assert serving() >= 2
        first = await rollout(fleet, 1)
        assert serving() == 3
        short = "3 of 4 policy replicas serve; 1 waits for a place"
        assert any(note.startswith(f"{short}: policy replica (1 engine): ") for note in notes)
        assert fleet.describe().startswith("3 of 4 policy, ")

        # the fourth comes with a node, and takes part
        fourth = cluster.add_node(**{**NODE, "resources": {"engine": 1}})
        await until(lambda: serving() == 4)
        await until(lambda: notes[-1] == "all 4 policy replicas serve")
        await fleet.serve_policy(hold, weights(1))
        await until(lambda: serving() == 4)

        # its node goes while the learner has the word: the next round begins all the same
        cluster.remove_node(fourth, allow_graceful=False)
        await fleet.serve_policy(hold, weights(2))
        second = await rollout(fleet, 2)
        assert serving() == 3
    for outcome in (first, second):
        assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
        assert outcome.manifest.failed == {}
    # Nothing but the missing place kept the fourth from serving.
    assert first.losses == {}
    for number in (1, 2):
        await check_solves_as_undisturbed(fleet, PROBLEMS, SEARCH, round=number)
    trees = TrajectoryStore(RunStore(str(tmp_path / "run")), 2).trees()
    assert {tree.policy_version for tree in trees} == {"policy-r2-d"}


async def test_watcher_that_is_killed_watches_again(cluster: Cluster) -> None:
    node = cluster.add_node(**NODE)
    taken: set[int] = set()
    async with preempting_cloud(taken) as url:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        config = SpotConfig(url=url, interval_s=0.2, timeout_s=10.0)
        watcher = nodes.start_spot_watcher(node.node_id, config)
        await watcher.__ray_ready__.remote()
        (first,) = [a for a in actors() if a.class_name == "NodeSpotWatcher"]
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: [a.num_restarts for a in actors()] == [1])
        taken.add(node.all_processes["raylet"][0].process.pid)
        await until(lambda: set(nodes.draining()) == {node.node_id})


async def test_run_outlives_the_head_forgetting_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The GCS of the head is killed and started again, with its tables on disk."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "resources": {"spot": 10}},
    )
    fleet = make_fleet(tmp_path / "run", cluster)
    hold = fleet.folder.root / "hold"
    hold.touch()
    try:
        async with stopped_at_the_end(fleet, processes=False):
            await fleet.start(hold, version="policy-r0", learner=False)
            began_s = time.monotonic()
            work = asyncio.create_task(rollout(fleet))
            await until(lambda: finished(fleet) >= 2)
            cluster.head_node.kill_gcs_server()
            killed_s = time.monotonic()
            await asyncio.sleep(1.0)
            before = finished(fleet)
            cluster.head_node.start_gcs_server()
            hold.unlink()
            await until(lambda: finished(fleet) > before)
            back_s = time.monotonic() - killed_s
            # What dies now is replaced as before.
            (worker, *_) = fleet.pools.handles("worker").values()
            ray.kill(worker)
            outcome = await work
            took_s = time.monotonic() - began_s
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    with capsys.disabled():
        print(f"\n{took_s:.1f} s in all; trees finished again {back_s:.1f} s after the GCS' death")
