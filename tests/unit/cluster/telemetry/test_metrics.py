from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.jobs.pool import PolicyPool
from cluster.telemetry import metrics as m
from cluster.watch.panels import DASHBOARDS
from rollout.engine import GenerationRequest
from tests.builders import answered, make_problem, make_tree
from tests.fakes import ScriptedPolicy
from tests.made_metrics import metrics_of
from verifier import StepResult, StepStatus

ROOT = Path(__file__).resolve().parents[4]


def test_names_and_labels_are_what_prometheus_takes() -> None:
    for metric in m.CATALOGUE.values():
        assert re.fullmatch(r"rstar_[a-z][a-z0-9_]*", metric.name)
        assert not {"job", "instance", "le", "run", "source"} & set(metric.labels), metric.name
        assert metric.help.endswith("."), metric.name
        assert (metric.kind is m.Kind.COUNTER) == metric.name.endswith("_total"), metric.name
        if metric.kind is m.Kind.HISTOGRAM:
            assert metric.name.endswith("_seconds")
            assert list(metric.boundaries) == sorted(set(metric.boundaries))
            assert metric.boundaries[0] > 0


def test_every_metric_is_shown_on_some_dashboard() -> None:
    shown = {
        metric.name
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
        for metric in metrics_of(query.expression)
    }
    assert shown == set(m.CATALOGUE)


def test_process_that_was_not_told_counts_nothing_and_imports_no_ray() -> None:
    code = """
import sys
from cluster.telemetry import metrics as m
m.count(m.GENERATED_TOKENS, 3, replica="r")
m.observe(m.POOL_WAIT, 0.1, pool="policy")
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_process_without_ray_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "_run", "run")
    monkeypatch.setattr(m, "_instruments", {})
    m.count(m.GENERATED_TOKENS, 3, replica="r")
    m.observe(m.POOL_WAIT, 0.1, pool="policy")
    m.flush()
    assert m._instruments == {} and m._pending == {}


def test_counts_are_added_up_before_ray_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, dict[str, str]]] = []

    class Instrument:
        def inc(self, amount: float, tags: dict[str, str]) -> None:
            told.append((amount, tags))

    monkeypatch.setattr(m, "_run", "demo")
    monkeypatch.setattr(m, "_flushing", True)
    monkeypatch.setattr(m, "_instruments", {m.GENERATED_TOKENS.name: Instrument()})
    for amount in (3, 4, 0):
        m.count(m.GENERATED_TOKENS, amount, replica="policy-0")
    m.count(m.GENERATED_TOKENS, 5, replica="policy-1")
    m.flush()
    m.flush()
    assert told == [
        (7, {"run": "demo", "replica": "policy-0"}),
        (5, {"run": "demo", "replica": "policy-1"}),
    ]


def test_switch_reaches_processes_that_are_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(m.VARIABLE, raising=False)
    m.switch_on("demo")
    code = "from cluster.telemetry import metrics; print(metrics._run)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    m.switch_on("")
    assert told.stdout.strip() == "demo"
    assert m.VARIABLE not in os.environ


def test_recorder_refuses_labels_that_are_not_in_the_catalogue() -> None:
    with m.recorded(), pytest.raises(AssertionError):
        m.count(m.GENERATED_TOKENS, 3, pool="policy")


def test_ended_search_is_counted_by_level_and_outcome() -> None:
    tree = make_tree(
        answered("3", correct=True), answered("4", correct=False), problem=make_problem("p")
    )
    visited = [node for node in tree.answers() if node.visit_count]
    with m.recorded() as counted:
        m.count_tree(tree, 2.5)
    level = str(tree.problem.level)
    assert counted.total(m.TREES, level=level, solved="true") == 1
    assert counted.total(m.TREES, solved="false") == 0
    assert counted.total(m.TRAJECTORIES) == len(visited)
    assert counted.total(m.TRAJECTORIES, verified="true") == sum(bool(n.correct) for n in visited)
    assert counted.total(m.NODES) == len(tree.nodes)
    assert counted.total(m.TREE_SECONDS) == 2.5


def test_steps_are_counted_by_status_and_their_queue_is_what_is_left_of_the_call() -> None:
    results = [
        StepResult(status=StepStatus.OK, state="s", wall_s=0.2),
        StepResult(status=StepStatus.OK, state="t", wall_s=0.5, replayed=3),
        StepResult(status=StepStatus.TIMEOUT, state=None, wall_s=0.1),
    ]
    with m.recorded() as counted:
        m.count_steps(results, 0.6)
        m.count_steps([], 1.0)
    assert counted.total(m.SANDBOX_STEPS, status="ok") == 2
    assert counted.total(m.SANDBOX_STEPS, status="timeout") == 1
    assert counted.total(m.SANDBOX_STEP_SECONDS) == 0.5
    assert counted.total(m.SANDBOX_WAIT) == pytest.approx(0.1)
    assert counted.total(m.SANDBOX_REPLAYS) == 3


class _Method:
    def __init__(self, function: object) -> None:
        self.remote = function


class _Handle:
    """An actor handle whose methods run here."""

    def __init__(self, engine: ScriptedPolicy) -> None:
        self.generate = _Method(engine.generate)


async def test_pool_counts_tokens_of_the_replica_that_wrote_them() -> None:
    pool = PolicyPool({"policy-7": _Handle(ScriptedPolicy({"": ["a" * 40]}))})
    with m.recorded() as counted:
        reply = await pool.generate(
            GenerationRequest(prompt="x" * 80, num_candidates=3, max_tokens=9)
        )
    written = sum(completion.num_tokens for completion in reply.completions)
    assert counted.total(m.GENERATED_TOKENS, replica="policy-7") == written == 30
    assert counted.total(m.PROMPT_TOKENS, replica="policy-7") == 20
    assert counted.total(m.REQUESTS, pool="policy", replica="policy-7", outcome="ok") == 1


async def test_pool_counts_calls_that_failed_and_were_sent_elsewhere() -> None:
    engines = {f"policy-{n}": _Handle(ScriptedPolicy({"": ["a"]}, failures=1)) for n in range(2)}
    pool = PolicyPool(engines)
    with m.recorded() as counted:
        await pool.generate(GenerationRequest(prompt="x", num_candidates=1, max_tokens=9))
    assert counted.total(m.REQUESTS, outcome="failed") == 2
    assert counted.total(m.REQUESTS, outcome="ok") == 1
