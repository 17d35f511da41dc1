"""Engines and learner that share what only one of them can have, and engines that span nodes.

The machine has no GPU: a custom resource stands for it, booked by real Ray and placement groups.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.engines.lifecycle import ReplicaInfo
from cluster.fleet.fleet import Fleet
from cluster.fleet.minding import why_learner_waits
from cluster.folder.run_folder import RunFolder
from cluster.machines import nodes
from cluster.runs.config import RolloutConfig
from learner.checkpoint import Checkpoint
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_replicas import ScriptedPolicyReplica, ScriptedPreferenceReplica

ROOT = Path(__file__).resolve().parents[2]
NODE = {
    "num_cpus": 2,
    "resources": {"gpu_fake": 1},
    "object_store_memory": 80 * 2**20,
    "include_dashboard": False,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["PYTHONPATH"] = str(ROOT)
    made = Cluster(initialize_head=True, head_node_args=NODE)
    yield made
    made.shutdown()
    del os.environ["PYTHONPATH"]


def make_fleet(root: Path, ray_cluster: Cluster, **settings: Any) -> Fleet:
    root.mkdir()
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            **settings,
            "cluster": {
                "address": ray_cluster.address,
                "start_timeout_s": 30,
                "supervision": {"look_s": 0.2, "backoff_s": 0.2},
                **settings.get("cluster", {}),
            },
        }
    )
    fleet = Fleet(config, RunFolder(root))
    fleet._preference_kind.actor = ray.remote(ScriptedPreferenceReplica)
    fleet._policy_kind.actor = ray.remote(ScriptedPolicyReplica)
    return fleet


def free() -> float:
    return sum(node.free.get("gpu_fake", 0.0) for node in nodes.living().values())


class GpuLearner:
    """In place of the learner's group: a fit is an actor that has the whole GPU."""

    num_workers = 1

    def __init__(self) -> None:
        self.actor: Any = None
        self.fits: list[Any] = []

    def fit(self, request: Any, progress: Any, again: Any) -> Any:
        if self.actor is None:
            holder = ray.remote(ScriptedPolicyReplica)
            options = holder.options(num_cpus=0, resources={"gpu_fake": 1})
            self.actor = options.remote("", version="learner", name="learner")
        ray.get(self.actor.stats.remote(), timeout=30)
        self.fits.append(request)
        return request

    def shutdown(self, timeout_s: float = 0.0) -> None:
        if self.actor is not None:
            ray.kill(self.actor)
            self.actor = None


SHARED = {"policy": {"resources": {"gpu_fake": 0.6}}, "ppm": {"resources": {"gpu_fake": 0.4}}}


async def test_engines_and_learner_take_turns_on_one_gpu(tmp_path: Path, cluster: Cluster) -> None:
    fleet = make_fleet(tmp_path / "run", cluster, cluster={**SHARED, "hand_over": True})
    fleet.meter.end_fit = lambda result: None  # type: ignore[method-assign]
    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(None, learner=False)
        learner = GpuLearner()
        fleet._learner = learner  # type: ignore[assignment]
        policy = [Checkpoint(kind="policy", round=r, path="x", digest=f"{r}") for r in range(2)]
        ppm = Checkpoint(kind="ppm", round=1, path="x", digest="d")
        await fleet.serve_policy(Path("base"), policy[0])
        assert free() == pytest.approx(0.4)
        for request in ("policy", "ppm"):
            assert await fleet.fit(request, lambda p: None) == request  # type: ignore[arg-type,comparison-overlap]
        assert (fleet.pools.handles("policy"), fleet.pools.handles("ppm"), free()) == ({}, {}, 0.0)
        await fleet.serve_policy(Path("base"), policy[1])
        await fleet.serve_preference(ppm)
        (replica,) = fleet.pools.handles("policy").values()
        assert (await replica.stats.remote()).version == policy[1].version
        await until(lambda: free() == pytest.approx(0.0))
        assert learner.fits == ["policy", "ppm"] and learner.actor is None
        assert "take turns" in fleet.describe()


async def test_without_a_hand_over_the_conflict_is_named(tmp_path: Path, cluster: Cluster) -> None:
    wants = {"replicas": 1, "resources": {"gpu_fake": 1}}
    fleet = make_fleet(tmp_path / "run", cluster, cluster={**SHARED, "learner": wants})
    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(tmp_path, version="policy-r0", learner=False)
        await until(lambda: free() < 1)
        assert why_learner_waits(fleet.config.cluster, fleet.pools.keepers) == (
            "learner rank (1 gpu_fake, 1 CPU): 1 of them wait until others give back what they "
            "hold; the cluster has 1 gpu_fake on 1 node, 0.4 of them free and 2 CPU on 1 node, 2 "
            "of them free. 1 x policy replica hold the like; with cluster.hand_over: true they end "
            "before the learner starts."
        )


class SpanningReplica(ScriptedPolicyReplica):
    """Puts a rank into each bundle of its placement group, as vLLM's Ray executor does."""

    async def ready(self) -> ReplicaInfo:
        group = get_current_placement_group()
        assert group is not None
        self.ranks = [
            ray.remote(Rank)
            .options(
                num_cpus=0,
                resources={"gpu_fake": 1},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
            for bundle, asked in enumerate(group.bundle_specs)
            if asked.get("gpu_fake")
        ]
        self.where = [await rank.node.remote() for rank in self.ranks]
        return await super().ready()

    async def nodes(self) -> list[str]:
        return self.where


class Rank:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


async def test_replica_of_two_ranks_spans_two_nodes_and_takes_its_group_with_it(
    tmp_path: Path, cluster: Cluster
) -> None:
    second = cluster.add_node(**NODE)
    fleet = make_fleet(
        tmp_path / "run",
        cluster,
        policy_engine={"tensor_parallel_size": 2},
        cluster={"policy": {"resources": {"gpu_fake": 2}}},
    )
    fleet._policy_kind.actor = ray.remote(SpanningReplica)
    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(tmp_path, version="policy-r0", learner=False)
        (first,) = fleet.pools.handles("policy").values()
        assert len(set(await first.nodes.remote())) == 2
        os.kill((await first.ready.remote()).pid, signal.SIGKILL)
        await until(lambda: fleet.pools.losses()["policy replica"].restarts == 1)
        (other,) = fleet.pools.handles("policy").values()
        assert len(set(await other.nodes.remote())) == 2
        states = [group["state"] for group in placement_group_table().values()]
        assert sorted(states) == ["CREATED", "REMOVED"]
        await fleet._end_engines()
        await until(lambda: free() == 2)
        states = [group["state"] for group in placement_group_table().values()]
        assert states == ["REMOVED", "REMOVED"]
    cluster.remove_node(second)


class SeenPolicyReplica(ScriptedPolicyReplica):
    """Says whether it was made for a tokenizer with the step markers."""

    def __init__(self, path: str, config: Any = None, *, version: str, name: str) -> None:
        super().__init__(path, config, version=version, name=name)
        self.marked = config.step_markers

    async def made_for(self) -> tuple[str, bool, int]:
        return self.path, self.marked, os.getpid()


async def test_replicas_start_anew_for_the_first_policy_that_knows_the_markers(
    tmp_path: Path, cluster: Cluster
) -> None:
    fleet = make_fleet(tmp_path / "run", cluster)
    fleet._policy_kind.actor = ray.remote(SeenPolicyReplica)
    told: list[str] = []
    fleet.note = told.append

    async def made_for() -> tuple[str, bool, int]:
        (replica,) = fleet.pools.handles("policy").values()
        return await replica.made_for.remote()

    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(Path("general"), learner=False, marked=False)
        general = await made_for()
        assert general[:2] == ("general", False)
        await fleet.serve_policy(Path("general"), None, marked=False)
        assert await made_for() == general
        trained = Checkpoint(kind="policy", round=1, path="trained", digest="1")
        await fleet.serve_policy(Path("general"), trained)
        first = await made_for()
        assert first[:2] == ("trained", True) and first[2] != general[2]
        assert any("another tokenizer" in line for line in told)
        later = Checkpoint(kind="policy", round=2, path="later", digest="2")
        await fleet.serve_policy(Path("general"), later)
        assert (await made_for()) == ("later", True, first[2])
