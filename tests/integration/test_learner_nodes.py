"""The learner on a cluster: its machine comes late, nodes around it go, a group of it ends late.

Real Ray, Ray Train, ranks and fits of a tiny policy; scripted engines. The head holds the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.fleet import learner_group, minding
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.machines import nodes
from cluster.runs.config import RolloutConfig
from learner.fit import FitProgress, FitRequest, FitResult, PolicyTrainConfig
from learner.select import DatasetConfig, select_dataset
from rollout.prompt import SHORT_TEMPLATE
from rollout.search import SearchConfig
from tests.builders import answered, code, make_problem, make_tree
from tests.models import write_tiny_policy
from tests.saboteur import check_solves_as_undisturbed, stopped_at_the_end, until
from tests.scripted_replicas import HELD, ScriptedPolicyReplica
from tests.standing import DRIVER, ITS_NODE, OF_RAY, PLACES, without_reservation

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=2, num_rollouts=4, max_depth=4)
PROBLEMS = [make_problem(f"p{n}", text=HELD, answer="3") for n in range(4)]
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
SPOT = {"num_cpus": 2, "resources": {"spot": 10}, **SMALL}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(minding, "ABSENT_S", 1.0)
    monkeypatch.setattr(learner_group, "PLACEMENT_S", 1.0)
    head = {"num_cpus": 0, **SMALL}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    ray.shutdown()
    made.shutdown()


def make_fleet(root: Path, cluster: Cluster) -> Fleet:
    spot = {"resources": {"spot": 1}}
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cluster": {
                "address": cluster.address,
                "policy": spot,
                "sandbox": spot,
                "workers": spot,
                "learner": {"replicas": 1, "num_cpus": 1, "resources": {"learner": 1}},
                "shard_size": 4,
                "supervision": {"look_s": 0.2, "backoff_s": 0.2, "max_failures": 20},
                # Nothing answers there, for a minute: the watchers are there, and see no cloud.
                "spot": {"url": "http://127.0.0.1:9", "interval_s": 60.0},
            },
        }
    )
    root.mkdir(parents=True)
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(ScriptedPolicyReplica)
    return fleet


class Fits:
    """Small fits on the fleet's learner."""

    def __init__(self, fleet: Fleet, root: Path) -> None:
        self.fleet = fleet
        self.policy = write_tiny_policy(root / "policy", hidden=32, layers=1)
        trees = [
            make_tree(
                code(f"good = {n}", answered("7", correct=True)),
                code(f"bad = {n}", answered("8", correct=False)),
                problem=make_problem(f"p{n}", text=f"{n}?"),
            )
            for n in range(24)
        ]
        self.root = root
        settings = DatasetConfig(validation_share=0.3)
        select_dataset(trees, root / "data", template=SHORT_TEMPLATE, config=settings)

    async def fit(self, round: int, progress: Any = lambda report: None) -> FitResult:
        request = FitRequest(
            fit_id=f"round={round}/policy",
            kind="policy",
            round=round,
            base=str(self.policy),
            data=str(self.root / "data"),
            checkpoints=str(self.root / "checkpoints"),
            config=PolicyTrainConfig(num_epochs=2, batch_examples=8, learning_rate=5e-3),
        )
        return await self.fleet.fit(request, progress)


async def test_learner_that_comes_late_outlives_the_nodes_around_it(
    tmp_path: Path, cluster: Cluster
) -> None:
    first, second = cluster.add_node(**SPOT), cluster.add_node(**SPOT)
    fleet = make_fleet(tmp_path / "run", cluster)
    notes: list[str] = []
    fleet.note = notes.append

    def said(text: str) -> bool:
        return any(text in note for note in notes)

    hold = fleet.folder.root / "hold"
    hold.touch()
    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(hold, version="policy-r0")
        head = ray.get_runtime_context().get_node_id()
        stage = RolloutStage(name="base", search=SEARCH)
        work = asyncio.create_task(
            fleet.rollout(1, PROBLEMS, [stage], preference=False, on_progress=lambda *_: None)
        )
        # No node of the cluster has what the learner asks: said while the engines are still busy.
        await until(lambda: said("the learner, which the next fit needs, would find no place"))
        assert said("no node has learner") and not work.done()
        hold.unlink()
        assert (await work).lost == 0
        await check_solves_as_undisturbed(fleet, PROBLEMS, SEARCH)
        assert "Mailbox" not in without_reservation(), "it is asked for before it is needed"

        # `select` begins
        fits = Fits(fleet, tmp_path / "fits")
        fleet.want_learner()
        await until(lambda: said("the learner waits for a place"))
        steps: list[FitProgress] = []
        fitting = asyncio.create_task(fits.fit(1, steps.append))
        await asyncio.sleep(1.0)
        machine = cluster.add_node(num_cpus=1, resources={"learner": 1}, **SMALL)
        await until(lambda: bool(steps), limit_s=300)

        watched = sorted([head, *(node.node_id for node in (first, second, machine))])
        await until(lambda: sorted(without_reservation()["NodeSpotWatcher"]) == watched)
        stand, places = without_reservation(), PLACES | OF_RAY
        assert {"Mailbox", "Coordinator", "Watchman", "TrainController"} <= stand.keys()
        assert {actor: set(nodes) for actor, nodes in stand.items() if places[actor] == DRIVER} == {
            actor: {head} for actor in stand if places[actor] == DRIVER
        }
        assert {places[actor] for actor in stand} == {DRIVER, ITS_NODE}

        # A mailbox that Ray had placed would have stood on one of these two.
        for node in (first, second):
            cluster.remove_node(node, allow_graceful=False)
        assert (await fitting).steps > 0

        # the last fit of the round is done: its machine is free
        await fleet.leave_learner()
        await until(lambda: nodes.living()[machine.node_id].free.get("learner") == 1)
        assert "Mailbox" not in without_reservation()
        assert {g["state"] for g in placement_group_table().values()} == {"REMOVED"}


async def test_group_that_is_killed_late_leaves_the_next_one_alone(
    tmp_path: Path, cluster: Cluster
) -> None:
    cluster.add_node(num_cpus=1, resources={"learner": 1, "spot": 10}, **SMALL)
    fleet = make_fleet(tmp_path / "run", cluster)
    async with stopped_at_the_end(fleet, processes=False):
        await fleet.start(None)
        fits = Fits(fleet, tmp_path / "fits")
        group = fleet._learner
        assert group is not None
        fleet.want_learner()
        old = group._life
        assert old is not None
        await until(lambda: ray.get(old.mailbox.controller.remote()) is not None)
        # Its ranks are not up, so they do not hear that it is over: it is killed.
        await asyncio.to_thread(group.shutdown, 0.0)
        result = await fits.fit(1)
        assert result.steps > 0
        assert old.ended is not None
        assert group._life is not None and group._life.ended is None
        # Two of a kind were made; what the first one asked for is not held any more.
        await fleet.leave_learner()
        await until(lambda: {g["state"] for g in placement_group_table().values()} == {"REMOVED"})
