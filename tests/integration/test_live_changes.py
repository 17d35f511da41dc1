"""`rstar set` on a run that goes on, and a budget that is spent, on a local Ray."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from cluster.fleet.actors import RayKind
from cluster.fleet.keeper import Look
from cluster.fleet.left_over import Home, namespace_of
from cluster.fleet.session import Session
from cluster.runs.change import set_run
from cluster.runs.config import RolloutConfig
from cluster.telemetry.live import StoppedError, read_live
from cluster.telemetry.progress import ProgressView
from cluster.watch.status import read_status
from tests.saboteur import until

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]


class Idle:
    """A member that does nothing."""

    def pid(self) -> int:
        return os.getpid()

    def shutdown(self) -> None:
        return None


class IdleKind(RayKind):
    kind = "sandbox worker"
    prefix = "sandbox"
    actor = ray.remote(num_cpus=0)(Idle)

    async def look(self, name: str, handle: Any) -> Look:
        await handle.pid.remote()
        return Look()


async def set_(root: Path, *assignments: str) -> str:
    """As a person at another shell does; returns what the command says."""
    console = Console(file=io.StringIO(), width=300)
    await asyncio.to_thread(set_run, root, assignments, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


async def test_a_pool_is_resized_while_it_goes_on_and_a_spent_budget_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("cluster.fleet.session.BOOK_S", 1.0)
    root = tmp_path / "run"
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cluster": {"num_cpus": 1, "object_store_mib": 80, "supervision": {"look_s": 0.2}},
            "cost": {"prices": {"machine": {"on_demand": 3600}}},
            "metrics": {"enabled": False},
        }
    )
    session = Session(config, ProgressView(Console(file=io.StringIO())))
    pools = session.fleet.pools
    said = []

    async def go_on() -> None:
        with session.held():
            async with session.fleet_shown() as fleet:
                namespace = namespace_of(session.store)
                pools.home = Home(namespace=namespace)
                fleet._start_ray(namespace)
                kind = IdleKind(config.cluster.sandbox)
                await pools.keep("sandbox", kind, config.cluster.sandbox.replicas)
                session.view.begin("rollout", "rollout", round=1)
                said.append(await set_(root, "cluster.sandbox.replicas=2", "log_level=warning"))
                await until(lambda: len(pools.handles("sandbox")) == 2)
                levels = [
                    await handle.__ray_call__.remote(_level)
                    for handle in pools.handles("sandbox").values()
                ]
                said.append(str(levels))
                said.append(await set_(root, "cluster.sandbox.replicas=1"))
                await until(lambda: len(pools.keepers["sandbox"].all_handles) == 1)
                await set_(root, "cost.budget_usd=0.5", "cost.on_budget=drain")
                await asyncio.Event().wait()

    with pytest.raises(StoppedError, match=r"its budget is \$0\.50; raise it with `rstar set"):
        await go_on()
    print(*said)
    live = read_live(session.store)
    assert live is not None and live.state == "stopped"
    status = read_status(root, now_unix_s=time.time())
    assert "its budget is $0.50" in status.explanation
    assert status.cost["usd"] > 0.5
    assert status.cost["by_stage"]["round 1: rollout"] > 0
    assert [change.number for change in status.changes] == [2, 3, 4]
    assert not ray.is_initialized()

    # Nothing is started while it is spent, and what was set stays.
    again = Session(config, ProgressView(Console(file=io.StringIO())))
    assert again.config.log_level == "warning"
    with pytest.raises(StoppedError), again.held():
        pass
    assert "no driver runs" in await set_(root, "cost.budget_usd=1000")
    with Session(config, ProgressView(Console(file=io.StringIO()))).held():
        pass


def _level(actor: Any) -> int:
    return logging.getLogger("cluster").handlers[0].level
