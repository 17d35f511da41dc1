"""Every expression of every panel, asked of a real Prometheus that scrapes a real small run.

Fleet, coordinator, workers, sandboxes and Ray's agents are real, engines are scripted; the progress
of a fit is told by the test.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from rich.console import Console

from cluster.engines.gate import RequestGate
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from cluster.telemetry.live import LiveFile
from cluster.telemetry.metrics import CATALOGUE
from cluster.telemetry.progress import ProgressView
from cluster.telemetry.samples import Samples
from cluster.watch.panels import DASHBOARDS, Query
from learner.checkpoint import Checkpoint
from learner.fit import FitProgress, FitResult
from rollout.engine import GenerationReply, GenerationRequest
from rollout.run_store import RunStore
from rollout.search import SearchConfig
from tests.builders import make_problem
from tests.made_metrics import metrics_of
from tests.prometheus import MISSING, Prometheus, has_prometheus
from tests.rulers import ruler_record
from tests.saboteur import stopped_at_the_end
from tests.scripted_replicas import ScriptedPolicyReplica, ScriptedPreferenceReplica

pytestmark = [
    pytest.mark.skipif(not has_prometheus(), reason=MISSING),
]

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=6, max_depth=4)
PROBLEMS = [
    make_problem(f"p{n}", text="How many?", answer="3" if n % 3 else "5") for n in range(40)
]
WINDOW_S = 15

EMPTY = {
    "rstar_stalled": "nothing stalls in a run that is well",
    "rstar_search_retries_total": "no search fails",
    "rstar_quarantined_problems_total": "no problem fails",
    "rstar_lost_leases_total": "no lease is lost",
    "rstar_resumed_trees_total": "no worker dies",
    "rstar_store_errors_total": "the store works",
    "rstar_sandbox_replayed_steps_total": "no state is evicted",
    **{
        name: "nobody is served (rstar serve alone; tests/unit/cluster/serve)"
        for name in CATALOGUE
        if name.startswith("rstar_serve_")
    },
}
"""Metrics without a value in this run, and why."""

STEADY = {
    "rstar_cluster_cpus",
    "rstar_cost_usd_per_hour",
    "rstar_budget_usd",
    "rstar_replicas_wanted",
    "rstar_learner_loss",
    "rstar_sandbox_live_cap",
}
"""Metrics that do not change in this run."""

NOT_FINITE = {"rstar_cluster_gpus": "there is no GPU to divide by"}


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Futures of actors that were ended complain when they are collected, with a traceback, and
    Python 3.11 parses code for that: not while pytest parses some itself, which it cannot bear."""
    yield
    gc.collect()


class CachingReplica(ScriptedPolicyReplica):
    """Claims that half of every prompt was in its cache, and lets requests through a real gate."""

    gate = RequestGate()

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        async with self.gate.request():
            reply = await super().generate(request)
        return replace(reply, cached_tokens=reply.prompt_tokens // 2)


@asynccontextmanager
async def run_that_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """A fleet that searches round after round until it is left."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cost": {"usd_per_hour": 12.0, "budget_usd": 100.0},
            "metrics": {"sample_s": 1.0},
            "cluster": {
                "num_cpus": 2,
                "object_store_mib": 80,
                "policy": {"replicas": 2},
                "shard_size": 4,
                "max_open_trees": 4,
                "supervision": {"look_s": 0.5},
            },
        }
    )
    root.mkdir()
    view = ProgressView(Console(quiet=True))
    view.usd_per_hour = config.cost.usd_per_hour
    view.plan = ["rollout"]
    began_s = time.monotonic()
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(CachingReplica)
    fleet._preference_kind.actor = ray.remote(ScriptedPreferenceReplica)

    def told(done: int, total: int, facts: Mapping[str, str | float]) -> None:
        view.cost_usd = (time.monotonic() - began_s) / 100  # as a session books it
        view.update(done, total, facts)

    async def search_for_ever() -> None:
        number = 0
        while True:
            number += 1
            view.begin("rollout", "rollout", len(PROBLEMS), round=number)
            await fleet.rollout(
                number,
                PROBLEMS,
                [RolloutStage(name="base", search=SEARCH)],
                preference=True,
                on_progress=told,
            )

    with LiveFile(RunStore(root), view.snapshot, interval_s=0.5):
        async with stopped_at_the_end(fleet):
            await fleet.start(root / "hold", version="policy-r0", learner=False)
            await fleet.serve_preference(Checkpoint(kind="ppm", round=0, path="x", digest="d"))
            tell_fit(fleet)
            work = asyncio.create_task(search_for_ever())
            try:
                yield fleet
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)


def tell_fit(fleet: Fleet) -> None:
    """As a round does: a PPM's fit is over, it was measured, and a policy's is under way."""
    fleet.meter.tell_ruler(ruler_record(1))
    fleet.meter.end_fit(
        FitResult(
            fit_id="round=1/ppm",
            checkpoint=Checkpoint(kind="ppm", round=1, path="", digest=""),
            steps=2,
            examples=2,
            epochs=1.0,
            loss_curve=(),
            final_loss=1.0,
            computed_tokens=2,
            useful_tokens=2,
            loss_tokens=2,
            seconds_setup=0.0,
            seconds_train=1.0,
            seconds_cpu=1.0,
            seconds_save=0.0,
            left_out={},
            metrics={"pair_accuracy": 0.7, "pair_margin": 0.2},
        )
    )
    fleet.meter.tell_fit(
        FitProgress(
            fit_id="round=1/policy",
            step=3,
            num_steps=9,
            loss=1.5,
            tokens_per_s=1000.0,
            grad_norm=0.5,
            mfu=0.4,
        )
    )


def queries() -> list[tuple[str, Query]]:
    return [
        (f"{dashboard.name} / {panel.title}", query)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
    ]


def trouble(prometheus: Prometheus, query: Query, run: str) -> str:
    """Why an expression's result is not what a panel needs; "" if it is."""
    expression = query.expression.promql(run, f"{WINDOW_S}s")
    needed = {metric.name for metric in metrics_of(query.expression)}
    result = prometheus.query(expression)
    if needed & EMPTY.keys():
        return ""
    if not result:
        return f"no data: {expression}"
    values = [float(series["value"][1]) for series in result]
    if not needed & NOT_FINITE.keys() and not all(map(math.isfinite, values)):
        return f"not finite {values}: {expression}"
    return ""


async def test_every_expression_of_every_panel_has_data_in_a_real_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    async with run_that_goes_on(root, monkeypatch):
        prometheus = Prometheus(tmp_path / "prometheus", root / "metrics" / "targets.json", RULES)
        try:
            await asyncio.to_thread(prometheus.wait_ready)
            await until_nothing(lambda server: troubles(server, root), prometheus)
            await until_nothing(missing_records, prometheus)
            await until_nothing(lambda server: differences(server, root), prometheus)
            await check_nothing_is_unknown(prometheus)
            assert not await asyncio.to_thread(prometheus.query, "up == 0")
            alerts = await asyncio.to_thread(prometheus.query, 'ALERTS{alertstate="firing"}')
            assert not alerts, f"a run that is well raises {alerts}"
        finally:
            prometheus.stop()
    assert json.loads((root / "metrics" / "targets.json").read_text()) == []


async def until_nothing(
    ask: Callable[[Prometheus], dict[str, str]], prometheus: Prometheus, limit_s: float = 300
) -> None:
    """Ask again and again until nothing is left to complain about."""
    give_up_s = time.monotonic() + limit_s
    while left := await asyncio.to_thread(ask, prometheus):
        assert time.monotonic() < give_up_s, json.dumps(left, indent=1)
        await asyncio.sleep(1)


def troubles(prometheus: Prometheus, root: Path) -> dict[str, str]:
    label = RunFolder(root).label
    found = {name: trouble(prometheus, query, label) for name, query in queries()}
    return {name: why for name, why in found.items() if why}


def missing_records(prometheus: Prometheus) -> dict[str, str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    records = [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]
    return {name: "no data" for name in records if not prometheus.query(name)}


def differences(prometheus: Prometheus, root: Path) -> dict[str, str]:
    """What Prometheus and the run's own samples tell differently."""
    samples, label = Samples.read(RunStore(root)), RunFolder(root).label
    found = {}
    for name, query in queries():
        needed = {metric.name for metric in metrics_of(query.expression)}
        if needed & (EMPTY.keys() | NOT_FINITE.keys()):
            continue
        own = query.expression.evaluate(samples, samples.times[-1], WINDOW_S)
        told: dict[Any, float] = {
            tuple((label, series["metric"].get(label, "")) for label in query.expression.by): (
                float(series["value"][1])
            )
            for series in prometheus.query(query.expression.promql(label, f"{WINDOW_S}s"))
        }
        same = own == told if needed <= STEADY else own.keys() == told.keys()
        if not own or not same:
            found[name] = f"samples {own}, Prometheus {told}"
    return found


async def check_nothing_is_unknown(prometheus: Prometheus) -> None:
    """Whatever Prometheus holds under our names is in the catalogue."""
    known = {name for metric in CATALOGUE.values() for name in metric.series_names}
    result = await asyncio.to_thread(
        prometheus.query, 'count by (__name__) ({__name__=~"(ray_)?rstar_.*"})'
    )
    names = {series["metric"]["__name__"] for series in result}
    assert names and names <= known, names - known
