"""kill -9 of every kind of process of a run, one after the other, in the middle of its work.

Engines are scripted, so an undisturbed run is known to the last node: it is the same searches in
this process. Only processes that the test has started are ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.fleet.fleet import Fleet
from cluster.fleet.keeper import PoolLostError
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from learner.checkpoint import Checkpoint
from rollout.engine import GenerationReply, GenerationRequest
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import make_problem
from tests.saboteur import (
    KINDS,
    Saboteur,
    check_solves_as_undisturbed,
    shape,
    stopped_at_the_end,
    undisturbed,
    until,
)
from tests.scripted_fleet import scripted_fleet
from tests.scripted_replicas import (
    HELD,
    ScriptedPolicyReplica,
)

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=12, max_depth=5)
SEED = 5
PROBLEMS = [
    make_problem(f"p{n}", text="How many?" if n else HELD, answer="3" if n % 3 else "5")
    for n in range(60)
]


def make_fleet(root: Path | str, monkeypatch: pytest.MonkeyPatch, **cluster: Any) -> Fleet:
    """A fleet of scripted replicas and real sandboxes, watched closely."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # All of them, since the tests kill the first of each kind.
    two = {"replicas": 2, "min_ready": 1}
    usual: dict[str, Any] = {"policy": two, "sandbox": two, "workers": two}
    usual |= {"shard_size": 4, "max_open_trees": 4, "checkpoint_open_trees_s": 1.0}
    return scripted_fleet(root, seed=SEED, **usual | cluster)


async def start(fleet: Fleet, hold: Path | None = None) -> None:
    hold = hold or fleet.folder.root / "hold"
    await fleet.start(hold, version="policy-r0", learner=False)
    await fleet.serve_preference(Checkpoint(kind="ppm", round=0, path="unused", digest="d"))


async def rollout(fleet: Fleet) -> RolloutOutcome:
    return await fleet.rollout(
        1,
        PROBLEMS,
        [RolloutStage(name="base", search=SEARCH)],
        preference=True,
        on_progress=lambda done, total, facts: None,
    )


@pytest.mark.parametrize("place", ["disk", "bucket"])
async def test_run_in_which_one_of_each_kind_is_killed_finds_the_same_trees(
    place: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run" if place == "disk" else request.getfixturevalue("root")
    hold = tmp_path / "hold"
    fleet = make_fleet(run, monkeypatch)
    async with stopped_at_the_end(fleet):
        await start(fleet, hold)
        began_s = time.monotonic()
        saboteur = Saboteur(fleet)
        hold.touch()
        sabotage = asyncio.create_task(saboteur.work())
        sabotage.add_done_callback(lambda _: hold.unlink())
        outcome = await rollout(fleet)
        took_s = time.monotonic() - began_s
        await sabotage
    assert {kind: loss.deaths for kind, loss in outcome.losses.items()} == dict.fromkeys(KINDS, 1)
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}
    expected = await undisturbed(PROBLEMS, SEARCH, SEED, preference=True)
    store = TrajectoryStore(RunStore(run), 1)
    found = {tree.problem.id: tree for tree in store.trees()}
    assert {p for p, tree in found.items() if tree.solved} == {
        p for p, tree in expected.items() if tree.solved
    }
    assert {p: shape(tree) for p, tree in found.items()} == {
        p: shape(tree) for p, tree in expected.items()
    }
    assert store.store.files("trajectories/round=1/open") == []
    with capsys.disabled():
        print(f"\n{outcome.solved} of {len(PROBLEMS)} solved in {took_s:.1f} s;", end=" ")
        print("; ".join(outcome.loss_lines()))


async def kill_policies(fleet: Fleet, until_done: Callable[[], bool]) -> None:
    """Kill every policy replica as soon as it is READY."""
    killed: set[str] = set()
    while not until_done():
        for name, handle in fleet.pools.handles("policy").items():
            if name not in killed:
                killed.add(name)
                os.kill((await handle.ready.remote()).pid, signal.SIGKILL)
        await asyncio.sleep(0.05)


QUICK = {"look_s": 0.1, "backoff_s": 0.01, "max_failures": 1}


async def test_replica_that_keeps_dying_ends_the_run_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(tmp_path / "run", monkeypatch, supervision=QUICK, policy={"replicas": 1})
    async with stopped_at_the_end(fleet):
        await start(fleet)
        work = asyncio.create_task(fleet.attempts("round 1: rollout", lambda: rollout(fleet)))
        killing = asyncio.create_task(kill_policies(fleet, work.done))
        message = (
            r"round 1: rollout failed 3 times \(cluster.stage_attempts\), at last: "
            r"2 deaths of a policy replica .*died.* start the same command again"
        )
        with pytest.raises(PoolLostError, match=message):
            await asyncio.wait_for(work, 300)
        await killing


async def test_rollout_whose_replicas_kept_dying_is_done_again_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(tmp_path / "run", monkeypatch, supervision=QUICK, policy={"replicas": 1})
    notes: list[str] = []
    fleet.note = notes.append
    async with stopped_at_the_end(fleet):
        await start(fleet)
        work = asyncio.create_task(fleet.attempts("round 1: rollout", lambda: rollout(fleet)))
        again = "done again: round 1: rollout, 1 of 3: 2 deaths of a policy replica"
        await kill_policies(fleet, lambda: any(note.startswith(again) for note in notes))
        outcome = await asyncio.wait_for(work, 300)
    assert len(fleet.attempts.reasons) == 1
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}


class HangingPolicyReplica(ScriptedPolicyReplica):
    """The first replica takes requests and never answers one; it says that it is well."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        if self.name != "policy-0":
            return await super().generate(request)
        self.running += 1
        try:
            return await asyncio.Future()
        finally:
            self.running -= 1


async def test_hanging_replica_and_killed_coordinator_are_replaced_and_no_worker_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"look_s": 0.1, "backoff_s": 0.1, "stall_s": 2.0}
    fleet = make_fleet(tmp_path / "run", monkeypatch, supervision=quick, request_timeout_s=1.0)
    fleet._policy_kind.actor = ray.remote(HangingPolicyReplica)
    hold = tmp_path / "run" / "hold"
    async with stopped_at_the_end(fleet):
        await start(fleet)
        hold.touch()
        work = asyncio.create_task(rollout(fleet))
        await until(lambda: "policy-2" in fleet.pools.handles("policy"))
        # A coordinator that Ray does not restart is replaced, and the workers find the new one.
        ray.kill(fleet.pools.handles("coordinator")["coordinator-0"])
        await until(lambda: fleet.pools.losses()["coordinator"].restarts == 1)
        hold.unlink()
        outcome = await work
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}
    deaths = {kind: loss.deaths for kind, loss in outcome.losses.items()}
    assert deaths == {"policy replica": 1, "coordinator": 1}
    assert "finished none" in outcome.losses["policy replica"].last_reason


class SlowPolicyReplica(ScriptedPolicyReplica):
    """The second replica is told to load another version and never gets there."""

    async def load(self, path: str, version: str, *, force: bool = False) -> float:
        if self.name == "policy-1" and version != self.version:
            await asyncio.Future()
        return await super().load(path, version, force=force)


async def test_replica_that_takes_no_weights_is_not_waited_for_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(tmp_path / "run", monkeypatch, policy={"replicas": 3, "min_ready": 0.5})
    fleet._policy_kind.actor = ray.remote(SlowPolicyReplica)
    fleet._policy_kind.take_s = 3.0
    async with stopped_at_the_end(fleet):
        await start(fleet)
        await until(lambda: len(fleet.pools.handles("policy")) == 3)
        weights = Checkpoint(kind="policy", round=1, path=str(tmp_path / "hold"), digest="d")
        await fleet.serve_policy(tmp_path, weights)
        assert "policy-1" not in fleet.pools.handles("policy")
        assert fleet.pools.losses()["policy replica"].deaths == 0
        await until(lambda: "policy-3" in fleet.pools.handles("policy"))
        reply = await fleet.policy.generate(
            GenerationRequest(prompt="x", num_candidates=1, max_tokens=9, temperature=1.0, seed=1)
        )
        assert reply.policy_version == weights.version
        reason = fleet.pools.losses()["policy replica"].last_reason
    assert reason == "policy-1: did not take policy-r1-d within 3 s"


async def test_nobody_dies_while_the_driver_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event loop, for many times the silence that would end an actor."""
    watched = {"look_s": 0.2, "silent_s": 1.5}
    fleet = make_fleet(tmp_path / "run", monkeypatch, supervision=watched)
    async with stopped_at_the_end(fleet):
        await start(fleet)
        work = asyncio.create_task(rollout(fleet))
        await until(lambda: sum(p.finished.trees for p in fleet.progress()) >= 2)
        for _ in range(4):
            await asyncio.sleep(0.3)
            time.sleep(6.0)
        outcome = await work
    assert outcome.losses == {}
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    await check_solves_as_undisturbed(fleet, PROBLEMS, SEARCH, preference=True)
