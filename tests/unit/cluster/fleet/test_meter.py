from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet import meter as meter_module
from cluster.fleet.membership import Membership, SupervisionConfig
from cluster.fleet.meter import Meter
from cluster.fleet.stall import Stall
from cluster.folder.run_folder import RunFolder
from cluster.jobs.admission import EnginePressure
from cluster.jobs.coordinator import RoundStatus, StageStatus
from cluster.jobs.queue import JobState, StageCounts
from cluster.telemetry import exporter
from cluster.telemetry import metrics as m
from cluster.telemetry.exporter import MetricsConfig
from cluster.telemetry.samples import Samples
from learner.fit import FitProgress
from rollout.run_store import RunStore
from rollout.store import Totals
from tests.made_metrics import write_made_run


class _Method:
    def __init__(self, function: Any) -> None:
        self.remote = function


def handle(**answers: Any) -> Any:
    """An actor handle that answers at once, raises, or (None) never answers."""

    def method(answer: Any) -> _Method:
        async def call() -> Any:
            if answer is None:
                await asyncio.Event().wait()
            if isinstance(answer, Exception):
                raise answer
            return answer

        return _Method(call)

    return SimpleNamespace(**{name: method(answer) for name, answer in answers.items()})


def keeper(handles: dict[str, Any], size: int) -> Any:
    members = Membership("replica", size, SupervisionConfig())
    for name in handles:
        members.add(name, 0.0)
        members.started(name)
        members.synced(name, "", 0.0)
    return SimpleNamespace(handles=handles, members=members)


def stats(**values: Any) -> Any:
    plain = {"running_sequences": 3, "waiting_requests": 1, "idle_s": 9.0, "load_s": 2.0}
    return SimpleNamespace(**{**plain, "rss_bytes": 100, **values})


def meter(root: Path, keepers: dict[str, Any], **other: Any) -> Meter:
    return Meter(MetricsConfig(port=None), RunFolder(root), keepers, **other)


def value(meter: Meter, metric: m.Metric, /, **labels: str) -> float | None:
    key = tuple(labels[name] for name in metric.labels)
    return meter._exporter._values.get(metric.name, {}).get(key)


def test_run_is_told_from_its_own_account_and_the_round(tmp_path: Path) -> None:
    write_made_run(tmp_path / "demo", time.time())
    made = meter(tmp_path / "demo", {}, budget_usd=50.0)
    counts = StageCounts()
    counts.jobs |= {JobState.DONE: 3, JobState.PENDING: 5}
    totals = Totals(
        trees=10, solved=4, trees_by_level={"gsm": 6, "math": 4}, solved_by_level={"gsm": 4}
    )
    stage = StageStatus(stage="base", counts=counts, totals=totals, failed={})
    stall = Stall(
        stage="search",
        for_s=200,
        silent_s=0,
        done=1,
        open=2,
        waits_on="policy",
        cause="policy",
        victims=(),
    )
    status = RoundStatus(round=2, sealed=False, stages={"base": stage})
    made.tell_round(status, open_trees=7, stalls=[stall])
    made._look_at_run()
    assert value(made, m.STAGE, stage="rollout", round="2") == 1
    assert value(made, m.COST) == pytest.approx(6.0)
    assert value(made, m.BUDGET) == 50
    assert value(made, m.ETA, of="run") == 5400
    assert value(made, m.OPEN_TREES) == 7
    assert value(made, m.JOBS, state="pending") == 5
    assert value(made, m.SOLVED_RATIO, round="2", level="gsm") == pytest.approx(4 / 6)
    assert value(made, m.SOLVED_RATIO, round="2", level="all") == pytest.approx(0.4)
    assert value(made, m.STALLED, part="search", waits_on="policy") == 1
    made.end_round()
    made._look_at_run()
    assert value(made, m.OPEN_TREES) == 0
    assert value(made, m.STALLED, part="search", waits_on="policy") is None


def test_searches_of_a_server_are_told_by_state(tmp_path: Path) -> None:
    made = meter(tmp_path, {})
    made.tell_service(running=3, waiting=8)
    made.tell_service(running=4, waiting=0)
    assert value(made, m.SERVE_SEARCHES, state="running") == 4
    assert value(made, m.SERVE_SEARCHES, state="waiting") == 0


async def test_replica_that_is_gone_or_silent_has_no_value_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fleet.meter.ANSWER_S", 0.05)
    pressure = EnginePressure(running=12, waiting=4, kv_usage=0.5, preemptions=1)
    keepers = {"policy": keeper({"policy-0": handle(stats=stats(), pressure=pressure)}, 2)}
    made = meter(tmp_path, keepers)
    await made._look_at_engines()
    made._look_at_pools()
    where = {"pool": "policy", "replica": "policy-0"}
    assert value(made, m.ENGINE_RUNNING, **where) == 12
    assert value(made, m.KV_USED, replica="policy-0") == 0.5
    assert value(made, m.REPLICAS, pool="policy", state="ready") == 1
    assert value(made, m.REPLICAS_WANTED, pool="policy") == 2
    keepers["worker"] = keeper({}, 1)
    made._look_at_pools()
    assert value(made, m.REPLICAS_WANTED, pool="worker") == 1
    del keepers["worker"]
    made._look_at_pools()
    assert value(made, m.REPLICAS_WANTED, pool="worker") is None
    silent = handle(stats=None, pressure=RuntimeError("dead"))
    keepers["policy"] = keeper({"policy-0": silent}, 2)
    await made._look_at_engines()
    assert value(made, m.ENGINE_RUNNING, **where) is None
    assert value(made, m.KV_USED, replica="policy-0") is None


async def test_sandboxes_are_added_up(tmp_path: Path) -> None:
    answers = {"running": 2, "queued": 5, "live_processes": 9, "live_cap": 20, "open_trees": 3}
    both = {f"sandbox-{n}": handle(stats=answers) for n in range(2)}
    made = meter(tmp_path, {"sandbox": keeper(both, 2)})
    await made._look_at_sandboxes()
    assert value(made, m.SANDBOX_QUEUED) == 10
    assert value(made, m.SANDBOX_CAP) == 40
    assert value(made, m.SANDBOX_EVICTIONS) == 0


async def test_lag_of_the_event_loop_is_told_and_a_long_one_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.fleet.meter.STOOD_STILL_S", 0.3)
    made = meter(tmp_path, {})
    monkeypatch.setattr(made, "_look_at_nodes", lambda: asyncio.sleep(0))
    pulse = asyncio.create_task(made._feel_pulse())
    await asyncio.sleep(0)
    time.sleep(0.5)
    await asyncio.sleep(0.05)
    pulse.cancel()
    await made.look()
    assert (value(made, m.LOOP_LAG) or 0.0) >= 0.35
    assert "The driver's event loop stood still for" in caplog.text
    await made.look()
    assert value(made, m.LOOP_LAG) == 0.0


def test_fit_is_told_by_kind(tmp_path: Path) -> None:
    made = meter(tmp_path, {})
    progress = FitProgress(
        fit_id="round=2/ppm", step=3, num_steps=9, loss=0.6, tokens_per_s=100.0, mfu=None
    )
    made.tell_fit(progress)
    assert value(made, m.LEARNER_LOSS, kind="ppm") == 0.6
    assert value(made, m.LEARNER_MFU, kind="ppm") is None


async def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    made = Meter(MetricsConfig(enabled=False), RunFolder(tmp_path / "run"), {})
    assert made.prepare() == {}
    made.start()
    await made.stop()
    assert not (tmp_path / "run").exists()


async def test_last_look_comes_when_the_agents_have_the_last_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = ["5"]

    def page(address: str) -> str:
        value = pages[0]
        return f'ray_rstar_nodes_total{{run="demo",WorkerId="w"}} {value}\n'

    monkeypatch.setattr(exporter, "_page", page)
    monkeypatch.setattr(meter_module, "LAST_S", 0.3)
    (tmp_path / "demo").mkdir()
    made = meter(tmp_path / "demo", None)  # type: ignore[arg-type]
    made.start()
    made._exporter.agents(["node:1"])
    asyncio.get_running_loop().call_later(0.1, lambda: pages.__setitem__(0, "42"))
    await made.stop()
    (series,) = Samples.read(RunStore(tmp_path / "demo")).series["ray_rstar_nodes_total"].values()
    assert series.values[-1] == 42
