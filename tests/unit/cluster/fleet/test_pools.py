"""What pools tell their users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet import pools as pools_module
from cluster.fleet.actors import PolicyKind, PreferenceKind, SandboxKind, WorkerKind
from cluster.fleet.config import MembersConfig
from cluster.fleet.keeper import Look
from cluster.fleet.left_over import LeftActor
from cluster.fleet.membership import Membership, SupervisionConfig
from cluster.fleet.pools import Pools
from cluster.fleet.stall import Stall
from cluster.folder.run_folder import RunFolder
from cluster.jobs.admission import EnginePressure
from cluster.jobs.coordinator import WorkerProgress
from cluster.machines.scaler import MemberState, ReplicaLoad
from cluster.runs.config import RolloutConfig
from cluster.telemetry import metrics
from cluster.telemetry.process import Place
from rollout.engine import EngineError
from rollout.store import TrajectoryStore
from tests.clock import set_clock
from verifier import SandboxLimits


class Remote:
    """A method of an actor that is never waited for."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Replica:
    """Says how full it is, fails, or says nothing."""

    def __init__(self, requests: int = 0, error: Exception | None = None) -> None:
        self.requests, self.error = requests, error
        self.asked = 0
        self.pressure = Remote(self._pressure)

    async def _pressure(self) -> EnginePressure | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.requests < 0:
            await asyncio.Event().wait()
        return EnginePressure(
            running=1, waiting=0, kv_usage=0.0, preemptions=0, requests=self.requests
        )


def make_pools(root: Path) -> Pools:
    config = RolloutConfig.model_validate({"problems": "p.jsonl", "policy": "x", "run_dir": root})
    return Pools(config, RunFolder(root), note=print, tried=lambda name, ready: None)


async def test_each_replica_is_asked_once_and_every_worker_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools_module, "PRESSURE_TIMEOUT_S", 0.05)
    pools = make_pools(tmp_path)
    policies = {f"policy-{number}": Replica(number) for number in range(3)}
    policies |= {"broken": Replica(error=EngineError("died")), "silent": Replica(-1)}
    told: dict[str, list[tuple[str, dict[str, EnginePressure]]]] = {}

    def worker(name: str) -> Any:
        log = told.setdefault(name, [])
        return SimpleNamespace(set_pressures=Remote(lambda *said: log.append(said)))

    workers = {f"worker-{number}": worker(f"worker-{number}") for number in range(4)}
    pools.keepers["policy"] = SimpleNamespace(handles=policies)  # type: ignore[assignment]
    pools.keepers["worker"] = SimpleNamespace(all_handles=workers)  # type: ignore[assignment]
    sharing = asyncio.create_task(pools.share_pressures(0.01))
    while not all(told.values()):
        await asyncio.sleep(0.01)
    sharing.cancel()
    assert {replica.asked for replica in policies.values()} <= {1, 2}
    for log in told.values():
        pool, said = log[0]
        assert pool == "policy"
        assert {name: pressure.requests for name, pressure in said.items()} == {
            "policy-0": 0,
            "policy-1": 1,
            "policy-2": 2,
        }


class Kept:
    """A keeper as the account reads it."""

    def __init__(self, kind: Any, *names: str, size: int | None = None) -> None:
        self.kind = kind
        self.members = Membership(kind.kind, size or len(names), SupervisionConfig())
        for name in names:
            self.members.add(name, 0.0)
            self.members.started(name)
            self.members.synced(name, "", 0.0)
        self.looks: dict[str, Look] = {}
        self.lost: list[tuple[str, str, float]] = []

    def short(self) -> str:
        ready = len(self.members.ready())
        return "" if ready == self.members.size else f"{ready} of {self.members.size} serve"


def test_account_says_who_stands_still_who_is_silent_and_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    set_clock(monkeypatch, pools_module, monotonic=lambda: now[0])
    pools = make_pools(tmp_path)
    policy = Kept(SimpleNamespace(kind="policy replica"), "policy-0", "policy-1", size=3)
    workers = WorkerKind(
        MembersConfig(), lambda *made: None, incarnation="r1", forget=lambda name: None, work={}
    )
    worker = Kept(workers, "worker-0")
    pools.keepers |= {"policy": policy, "worker": worker}  # type: ignore[dict-item]
    pools._places["policy-1"] = Place("n2", "host-2", 7)
    waits = {"policy": {"policy-1": (5, 3.0), "": (1, 0.5)}}
    for second in range(41):
        now[0] = 1000.0 + second
        policy.looks["policy-0"] = Look(done=10.0 * second, open=4, seen_s=now[0])
        if second <= 20:  # then it is heard no more
            policy.looks["policy-1"] = Look(done=min(second, 10), open=8, seen_s=now[0])
        workers.progress["worker-0"] = WorkerProgress(open_trees=9, requests=5, waits=waits)
        worker.looks["worker-0"] = Look(seen_s=now[0] - 1.0)
        assert pools.account() is not None
    policy.lost.append(("policy-9", "its actor died", now[0] - 12.0))
    stall = Stall(
        stage="search",
        for_s=8.0,
        silent_s=0.0,
        done=1.0,
        open=9,
        waits_on="policy",
        cause="policy",
        victims=(),
    )
    pools.parts = (now[0] - 0.5, [stall])
    told = pools.account()
    assert told is not None and told.short == "2 of 3 serve"
    still, silent, busy = told.actors
    assert (still.name, still.still_s, still.open) == ("worker-0", 41.0, 9)
    assert (silent.name, silent.still_s, silent.silent_s) == ("policy-1", 30.0, 20.0)
    assert (silent.host, silent.node, silent.pid) == ("host-2", "n2", 7)
    assert (busy.name, busy.still_s, busy.silent_s) == ("policy-0", 0.0, 0.0)
    assert busy.speed == pytest.approx(10.0)
    (first, second_wait) = told.waits
    assert (first.who, first.on, first.count, first.for_s) == ("worker-0", "policy-1", 5, 4.0)
    assert (second_wait.on, second_wait.count) == ("", 1)
    (part,) = told.parts
    assert (part.part, part.waits_on, part.for_s) == ("search", "policy", 8.5)
    (loss,) = told.losses
    assert (loss.name, loss.ago_s, loss.reason) == ("policy-9", 12.0, "its actor died")


async def test_actors_hand_over_what_they_counted_before_they_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs is waited for only so long."""
    monkeypatch.setattr(pools_module, "HAND_OVER_S", 0.05)
    told: list[str] = []

    def member(name: str, hangs: bool = False) -> Any:
        async def call(function: Callable[[Any], None]) -> None:
            if hangs:
                await asyncio.Event().wait()
            with metrics.recorded():
                function(None)
            told.append(f"{name} hands over")

        return SimpleNamespace(__ray_call__=Remote(call))

    flushed: list[str] = []
    monkeypatch.setattr(metrics, "flush", lambda: flushed.append("flush"))
    monkeypatch.setattr(pools_module, "end_all", lambda handles: told.extend(sorted(handles)))
    pools = make_pools(tmp_path)
    await pools.end_counted({"a": member("a"), "b": member("b", hangs=True)})
    assert told == ["a hands over", "a", "b"] and flushed == ["flush"]
    off = {"problems": "p", "policy": "x", "run_dir": tmp_path, "metrics": {"enabled": False}}
    config = RolloutConfig.model_validate(off)
    silent = Pools(config, RunFolder(tmp_path), note=print, tried=lambda *told: None)
    told.clear()
    await silent.end_counted({"a": member("a")})
    assert told == ["a"]


class Left:
    """Pools of a run, and what a driver that is gone has left of it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, turn: int = 2) -> None:
        config = RolloutConfig.model_validate(
            {"problems": "p.jsonl", "policy": "x", "run_dir": root}
        )
        self.notes: list[str] = []
        self.ended: set[str] = set()
        self.actors: list[LeftActor] = []
        self.folder = RunFolder(root)
        monkeypatch.setattr(RunFolder, "turn", turn)
        monkeypatch.setattr(pools_module, "find_left", lambda *given: self.actors)
        monkeypatch.setattr(
            pools_module,
            "end_left_over",
            lambda space, drain_s, names: self.ended.update(names),
        )
        monkeypatch.setattr(pools_module, "versions", lambda: {"vllm": "1", "rstar-cluster": "2"})
        self.pools = Pools(
            config, self.folder, note=self.notes.append, tried=lambda name, ready: None
        )
        self.pools.home = SimpleNamespace(namespace="rstar-1")  # type: ignore[assignment]
        self.kinds = {name: Kind() for name in ("policy", "sandbox")}

    async def add(self, name: str, *, silent: bool = False, **settings: Any) -> None:
        mark = await self.pools._mark(Kind(**settings))  # type: ignore[arg-type]
        handle = f"handle of {name}"
        self.actors.append(LeftActor(name=name, handle=handle, mark=None if silent else mark))

    async def judge(self) -> None:
        await self.pools.find_left()
        await self.pools.judge_left(self.kinds)  # type: ignore[arg-type]

    def kept(self) -> list[str]:
        return sorted(actor.name for left in self.pools.left.values() for actor in left)


class Kind:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings or {"num_gpus": 1}

    def code(self) -> str:
        return "c1"

    def made_of(self) -> dict[str, Any]:
        return self.settings


async def test_what_was_made_alike_is_kept_for_its_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Left(tmp_path, monkeypatch)
    for name in ("policy-0-aa", "policy-12-bb", "policy-2-aa", "sandbox-0-aa"):
        await at.add(name)
    await at.add("worker-r1-aa-0f-0-aa", round=1)
    await at.judge()
    assert at.ended == set()
    assert at.notes == [
        "taken over from a driver that is gone, as they run: 3 policy, 1 sandbox, 1 worker"
    ]
    mark = await at.pools._mark(Kind())  # type: ignore[arg-type]
    assert mark.settings["packages"] == {"vllm": "1"}
    taken = await at.pools._take_left("policy", mark, 2)
    # The pool is smaller than it was: the newest are too many.
    assert taken == {"policy-0": "handle of policy-0-aa", "policy-2": "handle of policy-2-aa"}
    assert at.ended == {"policy-12-bb"}
    assert at.notes[1:] == [
        "1 policy of an earlier start not taken over, but ended: more than there should be"
    ]


async def test_workers_end_with_what_they_work_with_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Left(tmp_path, monkeypatch)
    await at.add("policy-0-aa", num_gpus=2)
    await at.add("sandbox-0-aa")
    await at.add("worker-r1-aa-0f-0-aa", round=1)
    await at.judge()
    assert at.ended == {"policy-0-aa", "worker-r1-aa-0f-0-aa"} and at.kept() == ["sandbox-0-aa"]
    assert at.notes[:2] == [
        "1 policy of an earlier start not taken over, but ended: other values of num_gpus",
        "1 worker of an earlier start not taken over, but ended: what it works with ends",
    ]


async def test_one_replica_that_does_not_answer_ends_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Left(tmp_path, monkeypatch)
    await at.add("policy-0-aa")
    await at.add("policy-1-aa", silent=True)
    await at.add("worker-r1-aa-0f-0-aa", round=1)
    await at.judge()
    assert at.ended == {"policy-1-aa"}
    assert at.kept() == ["policy-0-aa", "worker-r1-aa-0f-0-aa"]


async def test_workers_of_a_round_that_is_over_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Left(tmp_path, monkeypatch)
    await at.add("worker-r1-aa-0f-0-aa", round=1)
    await at.add("worker-r2-aa-0f-0-aa", round=2)
    TrajectoryStore(at.folder.store, 1).seal([])
    await at.judge()
    assert at.ended == {"worker-r1-aa-0f-0-aa"}


async def test_who_does_not_hold_the_run_takes_nothing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Left(tmp_path, monkeypatch, turn=0)
    await at.add("policy-0-aa")
    await at.add("sandbox-0-aa")
    await at.judge()
    assert at.ended == {"policy-0-aa", "sandbox-0-aa"} and at.kept() == []
    assert all("this command does not hold the run" in note for note in at.notes)


async def test_replicas_of_a_later_driver_stand_whatever_an_earlier_one_says_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    worker = SimpleNamespace(set_replicas=Remote(lambda *said: told.append(said[2])))
    for turn, changes in ((1, 5), (2, 1)):
        at = Left(tmp_path, monkeypatch, turn=turn)
        at.pools.keepers["worker"] = SimpleNamespace(all_handles={"w": worker})  # type: ignore[assignment]
        for _ in range(changes):
            at.pools.announce("policy", {})
    assert told == sorted(set(told))


class Sized:
    """A keeper of members that are all at work."""

    def __init__(self, kind: Any, members: int) -> None:
        self.kind = kind
        self.names = [f"{kind.prefix}-{number}" for number in range(members)]
        self.members = SimpleNamespace(size=members)
        self.drained: list[str] = []
        self.called: list[str] = []
        run = Remote(lambda function, *arguments: self.called.append(arguments[0]))
        self.all_handles = {name: SimpleNamespace(__ray_call__=run) for name in self.names}

    @property
    def living(self) -> int:
        return len(self.names) - len(self.drained)

    def loads(self) -> dict[str, ReplicaLoad]:
        return {
            name: ReplicaLoad(state=MemberState.READY, load=place)
            for place, name in enumerate(self.names)
        }

    def resize(self, size: int) -> None:
        self.members.size = size

    def drain(self, names: Iterable[str], limit_s: float) -> None:
        self.drained += names


def test_pools_take_other_sizes_unless_they_scale_and_every_actor_another_level(
    tmp_path: Path,
) -> None:
    given = {"problems": "p.jsonl", "policy": "x", "run_dir": tmp_path}
    before = RolloutConfig.model_validate(given | {"cluster": {"autoscale": {"ppm": {}}}})
    pools = Pools(before, RunFolder(tmp_path), note=print, tried=lambda name, ready: None)
    kept = {
        "policy": Sized(PolicyKind(before.cluster.policy, before.policy_engine), 4),
        "ppm": Sized(PreferenceKind(before.cluster.ppm, before.ppm_engine), 2),
        "sandbox": Sized(SandboxKind(before.cluster.sandbox, SandboxLimits(), "strict", most=1), 1),
        "coordinator": Sized(SimpleNamespace(prefix="coordinator"), 1),
    }
    pools.keepers |= kept  # type: ignore[arg-type]
    sizes = {name: {"replicas": 3} for name in ("policy", "ppm", "sandbox")}
    cluster = before.cluster.model_dump() | sizes
    pools.change(RolloutConfig.model_validate(given | {"cluster": cluster, "log_level": "debug"}))
    assert {name: one.members.size for name, one in kept.items()} == {
        "policy": 3,
        "ppm": 2,
        "sandbox": 3,
        "coordinator": 1,
    }
    assert kept["policy"].drained == ["policy-0"]  # the emptiest
    assert kept["policy"].kind.settings.replicas == 3
    assert sum(len(one.called) for one in kept.values()) == 8
    assert pools.telemetry.level == "debug"
