from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.telemetry import metrics as m
from cluster.telemetry.exporter import Exporter, ExporterError, MetricsConfig
from cluster.telemetry.samples import Samples
from rollout.run_store import RunStore

CONFIG = MetricsConfig()
AGENT_PAGE = (
    'ray_rstar_trees_total{WorkerId="w",level="gsm",run="demo",solved="true"} 4.0\nray_tasks 3.0\n'
)


def get(exporter: Exporter) -> str:
    with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=5) as reply:
        return reply.read().decode()


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    made = Exporter(RunStore(tmp_path / "demo"), "demo", CONFIG, clock=lambda: 1000.0)
    made.start()
    yield made
    made.stop()


def test_endpoint_shows_what_has_a_value_and_the_run(exporter: Exporter) -> None:
    exporter.set(m.OPEN_TREES, 7)
    exporter.set(m.DEATHS, 2, pool="policy")
    exporter.set(m.COST, 3.5)
    exporter.set(m.COST, None)
    page = get(exporter)
    assert 'rstar_open_trees{run="demo"} 7.0' in page
    assert (
        '# TYPE rstar_deaths_total counter\nrstar_deaths_total{pool="policy",run="demo"} 2.0'
        in (page.replace('{run="demo",pool="policy"}', '{pool="policy",run="demo"}'))
    )
    assert "rstar_cost_usd" not in page
    exporter.clear(m.DEATHS)
    assert "rstar_deaths_total" not in get(exporter)


def test_targets_name_the_endpoint_and_the_agents_and_are_empty_at_the_end(tmp_path: Path) -> None:
    shared = tmp_path / "targets"
    config = MetricsConfig(targets_dir=shared)
    exporter = Exporter(RunStore(tmp_path / "demo"), "demo", config)
    exporter.start()
    exporter.agents(["10.0.0.2:1", "10.0.0.1:1"])
    path = tmp_path / "demo" / "metrics" / "targets.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told == [
        {"targets": [exporter.address], "labels": {"source": "driver"}},
        {"targets": ["10.0.0.1:1", "10.0.0.2:1"], "labels": {"source": "ray"}},
    ]
    assert json.loads((shared / "demo.json").read_text(encoding="utf-8")) == told
    exporter.stop()
    assert json.loads(path.read_text(encoding="utf-8")) == []
    assert json.loads((shared / "demo.json").read_text(encoding="utf-8")) == []


def test_endpoint_that_listens_everywhere_is_told_with_an_address_others_reach(
    tmp_path: Path,
) -> None:
    exporter = Exporter(RunStore(tmp_path / "demo"), "demo", MetricsConfig(host="0.0.0.0"))
    exporter.start()
    try:
        assert not exporter.address.startswith("0.0.0.0")
        get(exporter)
    finally:
        exporter.stop()


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        exporter = Exporter(RunStore(tmp_path), "demo", MetricsConfig(port=port))
        with pytest.raises(ExporterError, match=f"127.0.0.1:{port}.*choose another metrics.port"):
            exporter.start()


def test_without_a_port_only_samples_are_kept(tmp_path: Path) -> None:
    exporter = Exporter(RunStore(tmp_path), "demo", MetricsConfig(port=None), clock=lambda: 5.0)
    exporter.start()
    exporter.set(m.OPEN_TREES, 7)
    exporter.sample()
    exporter.stop()
    assert exporter.address == ""
    assert Samples.read(RunStore(tmp_path)).series["rstar_open_trees"][()].values == [7]


def test_sample_holds_own_values_and_those_of_living_agents(
    exporter: Exporter, tmp_path: Path
) -> None:
    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(AGENT_PAGE.encode())

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Agent)
    Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        exporter.agents([f"127.0.0.1:{server.server_port}", f"127.0.0.1:{dead.getsockname()[1]}"])
        exporter.set(m.OPEN_TREES, 7)
        exporter.sample()
    server.shutdown()
    series = Samples.read(RunStore(tmp_path / "demo")).series
    assert series["rstar_open_trees"][()].values == [7]
    assert [s.values for s in series[m.TREES.exported].values()] == [[4]]


def test_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    exporter = Exporter(RunStore(tmp_path / "file"), "demo", MetricsConfig(port=None))
    exporter.start()
    exporter.sample()
    exporter.stop()
