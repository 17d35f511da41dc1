from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.fleet import session as session_module
from cluster.fleet.session import Session
from cluster.folder.changes import Changes
from cluster.folder.run_folder import RunFolder
from cluster.machines.cost import NodeUse
from cluster.runs.config import RolloutConfig
from cluster.telemetry.live import StoppedError, read_live
from cluster.telemetry.progress import ProgressView


class Run:
    """A run without actors, on one node that costs what the test says."""

    def __init__(self, root: Path, **cost: Any) -> None:
        config = {"run_dir": root, "problems": "p", "policy": "x", "cost": cost}
        self.output = io.StringIO()
        view = ProgressView(Console(file=self.output, width=200))
        self.session = Session(RolloutConfig.model_validate(config), view)
        self.up = {"a": NodeUse(kind="gpu", market="spot")}

        async def uses() -> dict[str, NodeUse]:
            return self.up

        self.session.fleet.uses = uses  # type: ignore[method-assign]

    async def until(self, done: Callable[[], bool]) -> None:
        """The run goes on until something is so."""
        with self.session.held():
            async with self.session.fleet_shown():
                self.session.view.begin("rollout", "rollout", round=1)
                async with asyncio.timeout(20):
                    while not done():
                        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LOOK_S", 0.02)
    monkeypatch.setattr(session_module, "BOOK_S", 0.05)


async def test_what_is_set_is_taken_over_and_said(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", prices={"gpu": {"on_demand": 7200, "spot": 3600}})
    told = iter((True, False))

    def done() -> bool:
        if run.session.view.cost_usd and next(told, False):
            changes = Changes(RunFolder(tmp_path / "run"))
            before = {"cluster.workers.replicas": 1}
            changes.record({"cluster.workers.replicas": 7, "cluster.nothing": 1}, before)
        return run.session.view.change == 2

    await run.until(done)
    assert run.session.fleet.config.cluster.workers.replicas == 7
    assert "cluster.workers.replicas = 7, before 1: set by " in run.output.getvalue()
    live = read_live(run.session.folder.store)
    assert live is not None and live.progress.change == 2
    assert live.progress.cost_usd and live.progress.usd_per_hour == 3600
    again = Run(tmp_path / "run", prices={"gpu": {"on_demand": 7200, "spot": 3600}})
    assert again.session.config.cluster.workers.replicas == 7


async def test_a_spent_budget_is_said_once_or_ends_the_run_until_it_is_raised(
    tmp_path: Path,
) -> None:
    prices = {"gpu": {"on_demand": 36000}}  # ten dollars a second
    warned = Run(tmp_path / "run", prices=prices, budget_usd=0.5)
    await warned.until(lambda: warned.session.account.usd > 2)
    assert warned.output.getvalue().count("its budget is $0.50") == 1

    drained = Run(tmp_path / "run", prices=prices, budget_usd=4, on_budget="drain")
    assert drained.session.changes.effective(drained.session.config).cost.budget_usd == 4
    with pytest.raises(StoppedError, match=r"its budget is \$4\.00; raise it with `rstar set"):
        await drained.until(lambda: False)
    live = read_live(drained.session.folder.store)
    assert live is not None and live.state == "stopped" and "$4.00" in live.error
    assert live.progress.stopping

    early = Run(tmp_path / "run", prices=prices, budget_usd=4, on_budget="drain")
    with pytest.raises(StoppedError):
        await early.until(lambda: True)

    raised = Run(tmp_path / "run", prices=prices, budget_usd=400, on_budget="drain")
    await raised.until(lambda: raised.session.account.usd > 5)
    assert set(raised.session.account.summary()["by_stage"]) >= {"round 1: rollout"}


async def test_a_run_that_is_stopped_otherwise_is_cancelled_as_before(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", budget_usd=1, on_budget="drain")
    work = asyncio.create_task(run.until(lambda: False))
    await asyncio.sleep(0.3)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
