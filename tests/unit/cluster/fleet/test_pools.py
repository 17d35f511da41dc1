"""What pools tell their users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet import pools as pools_module
from cluster.fleet.pools import Pools
from cluster.jobs.admission import EnginePressure
from cluster.runs.config import RolloutConfig
from rollout.engine import EngineError


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


async def test_each_replica_is_asked_once_and_every_worker_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools_module, "PRESSURE_TIMEOUT_S", 0.05)
    config = RolloutConfig.model_validate(
        {"problems": "p.jsonl", "policy": "x", "run_dir": tmp_path}
    )
    pools = Pools(config, tmp_path, note=print, tried=lambda name, ready: None)
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
