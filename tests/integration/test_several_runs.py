"""Two runs on one cluster, both in a folder called `a`: each ends, pays and counts its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from cluster.fleet.left_over import Home, end_left_over, left_over, namespace_of
from cluster.folder.run_folder import RunFolder
from cluster.machines import nodes
from cluster.machines.cost import NodeUse

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]


class Engine:
    """Something of a run."""

    def ready(self) -> bool:
        return True


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Home, Home]]:
    """Two runs, on a Ray of one node that is the first one's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folders = [RunFolder(tmp_path / name / "a") for name in ("one", "other")]
    one, other = (Home(namespace=namespace_of(folder.store)) for folder in folders)
    labels = [folder.label for folder in folders]
    assert all(label.startswith("a-") for label in labels)
    assert labels[0] != labels[1]
    ray.init(
        num_cpus=1,
        resources={"engines": 9},
        labels={"machine": "g6e.12xlarge", "market": "spot"},
        namespace=one.namespace,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        logging_level="ERROR",
    )
    yield one, other
    ray.shutdown()


def test_a_run_ends_and_pays_its_own_alone(runs: tuple[Home, Home]) -> None:
    one, other = runs

    def use(home: Home) -> NodeUse:
        (found,) = nodes.uses(home.namespace).values()
        return found

    gpu = NodeUse(kind="g6e.12xlarge", market="spot")
    assert use(one) == replace(gpu, idle=True)

    def start(home: Home, name: str) -> None:
        options = home.options(name) | {"resources": {"engines": 1}, "num_cpus": 0}
        actor = ray.remote(Engine).options(**options).remote()
        assert ray.get(actor.ready.remote(), timeout=300)

    start(one, "policy-0")
    assert use(one) == gpu
    assert use(other) == replace(gpu, share=0.0)
    start(other, "policy-0")
    assert use(one) == use(other) == replace(gpu, share=0.5)
    group = placement_group([{"engines": 1}], name=other.group("ppm-0"), lifetime="detached")
    assert group.wait(300)

    # What waits for a place is seen by runs of a lower priority alone.
    options = one.options("policy-1") | {"resources": {"engines": 8}, "num_cpus": 0}
    waits = ray.remote(Engine).options(**options).remote()
    nodes.say_priority(one.namespace, 2)
    give_up_s = time.monotonic() + 300
    while not (asked := nodes.asked_above(1)) and time.monotonic() < give_up_s:
        time.sleep(0.1)
    assert asked == [{"engines": 8.0}]
    assert nodes.asked_above(2) == []
    del waits

    ended = end_left_over(one.namespace, 1.0)
    assert {name.rpartition("-")[0] for name in ended} == {"policy-0", "policy-1"}
    assert left_over(one.namespace) == []
    assert len(left_over(other.namespace)) == 1
    states = {entry["name"]: entry["state"] for entry in placement_group_table().values()}
    assert states[other.group("ppm-0")] == "CREATED"
    assert use(other) == gpu
