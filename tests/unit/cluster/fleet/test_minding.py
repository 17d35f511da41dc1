from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet import minding
from cluster.fleet.minding import Minder, parts
from cluster.machines.scaler import MemberState, ReplicaLoad
from cluster.runs.config import RolloutConfig
from tests.clock import set_clock


def test_autoscaler_is_asked_for_the_ranks_of_a_replica_one_by_one(tmp_path: Path) -> None:
    config = RolloutConfig.model_validate(
        {
            "run_dir": tmp_path,
            "problems": "p.jsonl",
            "policy": "x",
            "policy_engine": {"tensor_parallel_size": 2},
            "cluster": {"policy": {"num_gpus": 2}, "ppm": {"num_gpus": 1}},
        }
    )
    assert parts(config, {"GPU": 2.0}) == [{"GPU": 1.0}, {"GPU": 1.0}]
    assert parts(config, {"GPU": 1.0}) == [{"GPU": 1.0}]
    assert parts(config, {"CPU": 1.0}) == [{"CPU": 1.0}]


class Pool:
    """A keeper whose members go as soon as they are asked to."""

    def __init__(self, size: int) -> None:
        self.names = [f"m{number}" for number in range(size)]
        self.members = SimpleNamespace(size=size, names=lambda state: [])

    @property
    def living(self) -> int:
        return len(self.names)

    def loads(self) -> dict[str, ReplicaLoad]:
        return {name: ReplicaLoad(state=MemberState.READY) for name in self.names}

    def resize(self, size: int) -> None:
        self.members.size = size

    def drain(self, names: tuple[str, ...], limit_s: float) -> None:
        self.names = [name for name in self.names if name not in names]


async def test_a_pool_gives_way_to_a_run_that_counts_more_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[dict[str, float]] = [{"gpu": 1.0}]
    now = [0.0]
    set_clock(monkeypatch, minding, monotonic=lambda: now[0])
    monkeypatch.setattr(minding.nodes, "say_priority", lambda namespace, priority: None)
    monkeypatch.setattr(minding.nodes, "asked_above", lambda priority: list(waiting))
    held = {"replicas": 4, "resources": {"gpu": 1}}
    config = RolloutConfig.model_validate(
        {
            "run_dir": tmp_path,
            "problems": "p.jsonl",
            "policy": "x",
            "cluster": {
                "policy": held,
                "ppm": {**held, "min_ready": 1.0},
                "sandbox": {"replicas": 4, "num_cpus": 1},
            },
        }
    )
    pools: Any = SimpleNamespace(
        home=SimpleNamespace(namespace="rstar-x"),
        keepers={name: Pool(4) for name in ("policy", "ppm", "sandbox", "coordinator")},
    )
    notes: list[str] = []
    minder = Minder(config, pools, learner=False, note=notes.append)
    minder._minding.cancel()

    async def sizes(at_s: float) -> tuple[int, ...]:
        now[0] = at_s
        await minder._give_way()
        return tuple(keeper.members.size for keeper in pools.keepers.values())

    assert await sizes(100) == (3, 4, 4, 4)
    assert await sizes(101) == (3, 4, 4, 4)  # one at a time
    assert await sizes(120) == (2, 4, 4, 4)
    assert await sizes(140) == (2, 4, 4, 4)  # min_ready is half of four
    assert pools.keepers["policy"].names == ["m2", "m3"]
    waiting.clear()
    assert await sizes(190) == (2, 4, 4, 4)
    assert await sizes(201) == (4, 4, 4, 4)
    assert len(notes) == 3
