"""Tracing: one trace per problem, in whatever process it is worked on."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.telemetry import tracing
from cluster.telemetry.tracing import Traced, Tracing, TracingConfig
from cluster.watch.log_view import read_spans, show_logs
from rollout.store import RunStore, TrajectoryStore


@pytest.fixture(autouse=True)
def _tracing_ends() -> Iterator[None]:
    yield
    tracing.begin(None)


def _begin(run: Path, process: str, sample: float = 1.0) -> None:
    tracing.begin(Tracing(TracingConfig(sample=sample), store=RunStore(run), process=process))


def _spans(run: Path) -> dict[str, dict[str, Any]]:
    tracing.begin(None)  # writes out what waits
    lines = [
        json.loads(line)
        for path in sorted((run / tracing.FOLDER).glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {line["name"]: line for line in lines}


def test_spans_of_several_processes_make_one_trace(tmp_path: Path) -> None:
    _begin(tmp_path, "coordinator-0")
    tracing.note(3, ["p1"], 0, "coordinator.grant", worker="worker-0")
    _begin(tmp_path, "worker-0")
    with (
        tracing.problem_span(3, "p1", 0, {"job": "j1"}),
        tracing.span("policy.generate", replica="policy-0"),
    ):
        parent = tracing.traceparent()
    _begin(tmp_path, "policy-0")
    with tracing.remote_span("policy.generate", parent):
        pass

    spans = _spans(tmp_path)
    root = spans["problem r3/p1/0"]

    assert len({span["trace"] for span in spans.values()}) == 1
    assert root["parent"] == ""
    assert root["attributes"] == {"problem": "p1", "round": 3, "index": 0, "job": "j1"}
    assert spans["coordinator.grant"]["parent"] == root["span"]
    assert spans["policy.generate"]["parent"] == root["span"]
    assert spans["policy.generate at policy-0"]["parent"] == spans["policy.generate"]["span"]
    assert spans["policy.generate at policy-0"]["process"] == "policy-0"


def test_a_search_that_is_gone_on_with_elsewhere_stays_in_its_trace(tmp_path: Path) -> None:
    ids = []
    for process in ("worker-0", "worker-1"):
        _begin(tmp_path, process)
        with tracing.problem_span(1, "p1", 0, {}):
            ids.append(tracing.traceparent())

    assert ids[0] == ids[1]


def test_different_trees_of_a_problem_are_different_traces(tmp_path: Path) -> None:
    tracer = Tracing(TracingConfig(sample=1.0), store=RunStore(tmp_path), process="x")
    tracing.begin(tracer)
    firsts = [tracer.first(1, "p1", 0), tracer.first(1, "p1", 1), tracer.first(2, "p1", 0)]

    assert len({first.trace_id for first in firsts if first is not None}) == 3


def test_a_share_of_the_problems_is_sampled_and_every_process_takes_the_same(
    tmp_path: Path,
) -> None:
    some = [
        Tracing(TracingConfig(sample=0.25), store=RunStore(tmp_path), process=name)
        for name in ("a", "b")
    ]
    taken = [{p for p in range(2000) if tracer.first(1, str(p), 0) is not None} for tracer in some]
    for tracer in some:
        tracer.shutdown()

    assert taken[0] == taken[1]
    assert 400 < len(taken[0]) < 600


def test_without_tracing_nothing_is_made_and_nothing_carried(tmp_path: Path) -> None:
    with tracing.problem_span(1, "p1", 0, {}), tracing.span("x") as span:
        assert span is None
        assert tracing.traceparent() == ""
    tracing.note(1, ["p1"], 0, "x")

    assert not (tmp_path / tracing.FOLDER).exists()


def test_a_search_that_is_not_sampled_leaves_no_span(tmp_path: Path) -> None:
    _begin(tmp_path, "worker-0", sample=0.0)
    with tracing.problem_span(1, "p1", 0, {}), tracing.span("x"):
        assert tracing.traceparent() == ""

    assert _spans(tmp_path) == {}


async def test_searches_that_run_at_a_time_do_not_mix(tmp_path: Path) -> None:
    _begin(tmp_path, "worker-0")
    both_inside = asyncio.Barrier(2)

    async def search(problem: str) -> None:
        with tracing.problem_span(1, problem, 0, {}):
            await both_inside.wait()
            with tracing.span(f"generate {problem}"):
                await asyncio.sleep(0)

    await asyncio.gather(search("a"), search("b"))

    spans = _spans(tmp_path)
    for problem in ("a", "b"):
        root = spans[f"problem r1/{problem}/0"]
        assert spans[f"generate {problem}"]["trace"] == root["trace"]


def test_a_failure_is_told_by_its_span(tmp_path: Path) -> None:
    _begin(tmp_path, "worker-0")
    with pytest.raises(RuntimeError), tracing.problem_span(1, "p1", 0, {}):
        raise RuntimeError("engine died")

    assert _spans(tmp_path)["problem r1/p1/0"]["error"] == "RuntimeError: engine died"


async def test_an_actor_answers_inside_a_span_of_the_callers_trace(tmp_path: Path) -> None:
    class Engine(Traced):
        async def generate(self, text: str) -> str:
            with tracing.span("inside"):
                return text.upper()

    _begin(tmp_path, "policy-0")
    with tracing.problem_span(1, "p1", 0, {}):
        answer = await Engine().traced(tracing.traceparent(), "policy.generate", "generate", "a")

    spans = _spans(tmp_path)
    assert answer == "A"
    assert spans["inside"]["parent"] == spans["policy.generate at policy-0"]["span"]


def test_logs_of_a_problem_show_its_spans(tmp_path: Path) -> None:
    from cluster.jobs.queue import StagePlan

    plan = StagePlan(round=1, stage="base", tree_index=0, problem_ids=("p1",), shard_size=1, seed=0)
    TrajectoryStore(RunStore(str(tmp_path)), 1).create_plan("base", plan.to_json())
    _begin(tmp_path, "worker-0")
    with tracing.problem_span(1, "p1", 0, {}), tracing.span("sandbox.run", replica="sandbox-0"):
        pass
    tracing.begin(None)
    console = Console(width=200, record=True, file=io.StringIO())
    show_logs(tmp_path, console, problem="p1")
    text = console.export_text()

    assert "  problem r1/p1/0" in text
    assert "    sandbox.run" in text and "replica=sandbox-0" in text
    assert [span["name"] for span in read_spans(RunStore(tmp_path), "p1")] == [
        "problem r1/p1/0",
        "sandbox.run",
    ]


def test_a_collector_gets_the_spans(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    got: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    config = TracingConfig(sample=1.0, otlp_endpoint=endpoint)
    tracing.begin(Tracing(config, store=RunStore(tmp_path), process="worker-0"))
    with tracing.problem_span(1, "p1", 0, {}):
        pass
    tracing.begin(None)
    server.shutdown()
    server.server_close()

    assert b"problem r1/p1/0" in b"".join(got)
