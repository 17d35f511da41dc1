"""Nodes that do not see the run's store: refused by name, and nothing is lost to their disks.

All fake nodes share this machine's disk, so the run's folder is named through /proc/self/cwd: for
the processes of a node it lies where that node was started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.fleet.fleet import Fleet
from rollout.engine import EngineError
from rollout.store import RunStore, TrajectoryStore
from tests.integration.test_nodes import NODE, PROBLEMS, SEARCH, finished, make_fleet, rollout
from tests.saboteur import check_solves_as_undisturbed, stopped_at_the_end, until

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("/proc/self/cwd/run")
"""Of the driver and the nodes that share its store; elsewhere another folder, or none."""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the driver and, unless they are told otherwise, all nodes start."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cluster(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    head = {**NODE, "num_cpus": 0, "resources": {"head": 10}}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    ray.shutdown()
    made.shutdown()


@contextmanager
def nodes_elsewhere(folder: Path) -> Iterator[None]:
    """Nodes added meanwhile have another folder where the run is."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def node(cluster: Cluster, *resources: str) -> Any:
    return cluster.add_node(**NODE | {"resources": dict.fromkeys(resources, 10)})


def make(cluster: Cluster, **other: Any) -> tuple[Fleet, Path]:
    """A fleet whose rollout workers stand on nodes that offer `worker`, and its hold file."""
    one: dict[str, Any] = {"replicas": 1, "resources": {"spot": 1}}
    workers = {"replicas": 1, "resources": {"worker": 1}}
    pools = {"policy": one, "sandbox": one, "workers": workers} | other
    fleet = make_fleet(RUN, cluster, **pools)
    hold = fleet.folder.root / "hold"
    hold.touch()
    return fleet, hold


async def start(fleet: Fleet, hold: Path) -> None:
    await fleet.start(hold, version="policy-r0", learner=False)


@pytest.mark.parametrize("there", ["nothing", "another run"])
async def test_rollout_does_not_start_on_nodes_without_its_store(
    tmp_path: Path, shared: Path, cluster: Cluster, there: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    node(cluster, "spot")
    with nodes_elsewhere(elsewhere):
        node(cluster, "worker")
        if there == "another run":
            RunStore(RUN).identify()
    fleet, hold = make(cluster)
    async with stopped_at_the_end(fleet, processes=False):
        await start(fleet, hold)
        found = {"nothing": "is not there", "another run": "is of another run"}[there]
        with pytest.raises(EngineError, match=f"worker-.* store {RUN} {found} .*on machine .*moun"):
            await rollout(fleet)
    if there == "nothing":
        assert list(elsewhere.iterdir()) == []
    else:
        assert [path.name for path in (elsewhere / "run").iterdir()] == ["run.id"]
    assert TrajectoryStore(RunStore(shared / "run"), 1).commits() == {}


async def test_replicas_that_are_to_read_checkpoints_of_the_run_do_not_start_without_its_store(
    tmp_path: Path, cluster: Cluster
) -> None:
    node(cluster, "spot")
    with nodes_elsewhere(tmp_path / "elsewhere"):
        node(cluster, "gpu")
    fleet, hold = make(cluster, policy={"replicas": 1, "resources": {"gpu": 1}})
    fleet._policy_kind.store = fleet.store  # as of a run that trains
    async with stopped_at_the_end(fleet, processes=False):
        with pytest.raises(EngineError, match=f"policy-0: .*store {RUN} is not there on machine"):
            await start(fleet, hold)


async def test_round_ends_whole_although_a_node_with_the_wrong_store_joined(
    tmp_path: Path, shared: Path, cluster: Cluster
) -> None:
    """The only worker's node goes, and the one that joins in its place mounts nothing."""
    node(cluster, "spot")
    first = node(cluster, "worker")
    fleet, hold = make(cluster)
    async with stopped_at_the_end(fleet, processes=False):
        await start(fleet, hold)
        work = asyncio.create_task(rollout(fleet))
        await until(lambda: finished(fleet) >= 2)
        with nodes_elsewhere(tmp_path / "elsewhere"):
            wrong = node(cluster, "worker")
        cluster.remove_node(first, allow_graceful=False)
        refused = f"store {RUN} is not there on machine"
        await until(lambda: refused in fleet.pools.losses()["rollout worker"].last_reason)
        node(cluster, "worker")
        cluster.remove_node(wrong, allow_graceful=False)
        hold.unlink()
        outcome = await work
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    trees = TrajectoryStore(RunStore(shared / "run"), 1)
    assert sorted(tree.problem.id for tree in trees.trees()) == sorted(p.id for p in PROBLEMS)
    await check_solves_as_undisturbed(fleet, PROBLEMS, SEARCH)
    assert list((tmp_path / "elsewhere").iterdir()) == []
