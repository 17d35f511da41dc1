"""A rollout on a cluster whose nodes the autoscaler adds and takes away, by what our scaler asks.

Real Ray, autoscaler, coordinator, workers and sandboxes on one machine; scripted engines, one on
each node. The head has no place for an engine, so every one of them needs a node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.fleet.config import ActorConfig
from cluster.fleet.fleet import Fleet
from cluster.fleet.learner_group import LearnerGroup
from cluster.fleet.stages import RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.machines import nodes
from cluster.machines.scaler import MemberState
from cluster.runs.config import RolloutConfig
from rollout.engine import GenerationReply, GenerationRequest
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import make_problem
from tests.fake_provider import ROOT, AutoscaledCluster
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_replicas import ScriptedPolicyReplica

SEARCH = SearchConfig(template="short", num_candidates=2, num_rollouts=4, max_depth=4)
IDLE_S = 3.0
HELD = ("hold-1", "hold-2", "hold-3", "hold-4", "hold-5")
PROBLEMS = [
    make_problem(f"p{number:02}", text=f"How many? {hold}", answer="3")
    for number, hold in enumerate([*["hold-rest"] * 25, *HELD])
]


class HoldingReplica(ScriptedPolicyReplica):
    """Says nothing to a prompt that names a file of the folder it serves; writes its name there."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        self.running += 1
        try:
            for hold in Path(self.path).iterdir():
                if hold.name in request.prompt:
                    hold.write_text(self.name)
                    while hold.exists():
                        await asyncio.sleep(0.05)
        finally:
            self.running -= 1
        return await super().generate(request)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[AutoscaledCluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = AutoscaledCluster(
        {"gpu": ({"CPU": 1, "policy": 1}, 3), "learner": ({"CPU": 1, "learner": 1}, 1)},
        head={"head": 10},
        idle_s=IDLE_S,
    )
    yield made
    ray.shutdown()
    made.shutdown()


def make_fleet(root: Path, cluster: AutoscaledCluster) -> Fleet:
    head = {"resources": {"head": 1}}
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cluster": {
                "address": cluster.address,
                "policy": {"resources": {"policy": 1}},
                "sandbox": head,
                "workers": head,
                "shard_size": 1,
                "max_open_trees": 6,
                "supervision": {"look_s": 0.2},
                "autoscale": {
                    "policy": {
                        "min_replicas": 1,
                        "max_replicas": 3,
                        "slots": 10,
                        "step_s": 0.1,
                        "cool_down_s": 0.5,
                        "down_window_s": 0.5,
                    }
                },
            },
        }
    )
    root.mkdir(parents=True)
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(HoldingReplica)
    return fleet


class Watch:
    """When each node was seen first, and when its replica served first."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.joined_s: dict[str, float] = {}
        self.served_s: dict[str, float] = {}

    def policy_nodes(self) -> set[str]:
        return {node for node, has in nodes.living().items() if has.total.get("policy")}

    async def look(self) -> None:
        while True:
            for node in self.policy_nodes():
                self.joined_s.setdefault(node, time.monotonic())
            for handle in self.fleet.pools.handles("policy").values():
                self.served_s.setdefault(nodes.node_of(handle), time.monotonic())
            await asyncio.sleep(0.1)


async def test_nodes_come_with_the_work_of_a_run_and_go_when_their_replicas_are_drained(
    tmp_path: Path, cluster: AutoscaledCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    holds = tmp_path / "holds"
    holds.mkdir()
    for name in ("hold-rest", *HELD):
        (holds / name).touch()
    fleet = make_fleet(tmp_path / "run", cluster)
    notes: list[str] = []
    fleet.note = notes.append
    async with stopped_at_the_end(fleet, processes=False):
        asked_s = time.monotonic()
        await fleet.start(holds, version="policy-r0", learner=False)
        first_s = time.monotonic() - asked_s
        watch = Watch(fleet)
        looking = asyncio.create_task(watch.look())
        had = watch.policy_nodes()
        assert len(had) == 1
        began_s = time.monotonic()
        work = asyncio.create_task(
            fleet.rollout(
                1,
                PROBLEMS,
                [RolloutStage(name="base", search=SEARCH)],
                preference=False,
                on_progress=lambda done, total, facts: None,
            )
        )

        # 1 -> 3: the trees that wait could use more than one replica
        await until(lambda: len(fleet.pools.handles("policy")) == 3)
        grown_s = time.monotonic() - began_s
        await until(lambda: len(watch.served_s) == 3)
        joins_s = [
            served_s - watch.joined_s[node]
            for node, served_s in watch.served_s.items()
            if node not in had
        ]
        assert len(joins_s) == 2

        # 3 -> 1: five trees are left; a replica that is asked something keeps its node
        (holds / "hold-rest").unlink()
        keeper = fleet.pools.keepers["policy"]
        await until(lambda: len(fleet.pools.handles("policy")) == 1)
        shrinks_s = time.monotonic()
        draining = keeper.members.names(MemberState.DRAINING)
        kept = {nodes.node_of(keeper.all_handles[name]) for name in draining}
        await asyncio.sleep(IDLE_S + 2.0)
        busy = keeper.members.names(MemberState.DRAINING)
        assert busy, "no replica was busy when the pool shrank"
        assert {nodes.node_of(keeper.all_handles[name]) for name in busy} <= watch.policy_nodes()
        for hold in list(holds.iterdir()):
            if hold.read_text() in busy:
                hold.unlink()
        released_s = time.monotonic()
        await until(lambda: len(watch.policy_nodes()) == 1)
        gone_s = time.monotonic() - released_s
        assert not work.done()
        for hold in list(holds.iterdir()):
            hold.unlink()
        outcome = await work
        looking.cancel()

    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {} and outcome.losses == {}
    trees = TrajectoryStore(RunStore(str(tmp_path / "run")), 1).trees()
    assert sorted(tree.problem.id for tree in trees) == sorted(p.id for p in PROBLEMS)
    with capsys.disabled():
        print(
            f"\nfirst node and replica {first_s:.1f} s; 1 -> 3 in {grown_s:.1f} s, serving "
            f"{', '.join(f'{s:.1f}' for s in joins_s)} s after the nodes joined; {len(busy)} of "
            f"{len(kept)} kept their nodes for {released_s - shrinks_s:.1f} s while they drained; "
            f"3 -> 1 in {gone_s:.1f} s after that ({IDLE_S:.0f} s idle time included)"
        )


async def test_learners_machine_is_there_while_its_group_is_whatever_others_ask(
    tmp_path: Path, cluster: AutoscaledCluster
) -> None:
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    one, other = (nodes.NodeRequest(name, expires_s=600.0) for name in ("one run", "another run"))

    def has(resource: str) -> float:
        return sum(node.total.get(resource, 0.0) for node in nodes.living().values())

    one.ask([{"policy": 1.0}])
    other.ask([{"policy": 1.0}])  # neither replaces the other: two nodes are wanted
    await until(lambda: has("policy") == 2)
    assert has("learner") == 0
    group = LearnerGroup(
        ActorConfig(resources={"learner": 1}),
        RunStore(tmp_path),
        coming=lambda: bool(nodes.starting()),
    )
    group.start()
    life = group._life
    assert life is not None
    await until(lambda: has("learner") == 1)
    await until(lambda: ray.get(life.mailbox.joined.remote()) == 1)
    one.withdraw()
    await until(lambda: has("policy") == 1)
    group.shutdown()
    await until(lambda: has("learner") == 0)
    assert has("policy") == 1
    other.withdraw()
    await until(lambda: has("policy") == 0)
