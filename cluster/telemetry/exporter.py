"""The driver's side of the metrics: an endpoint, the list of what to scrape, and the samples.

    Meter (fleet.meter) --set--> Exporter --+-- http://HOST:PORT/metrics     (prometheus-client)
    Ray's agents, a node --GET /metrics-----+-- RUN/metrics/targets.json     (file_sd)
                                            +-- RUN/metrics/samples-*.jsonl  (telemetry.samples)

`targets.json` names the endpoint and Ray's agent of every node, so that Prometheus needs nothing
but the run's folder: no token (Ray's own discovery over HTTP asks for one), no fixed ports. It is
rewritten when nodes come or go. Prometheus takes a wildcard for a file's name only, so that one for
many runs wants a folder for their files (`metrics.targets_dir`).

Metrics are for people: whatever fails here is logged once and tried again, and never stops a run.

Not covered: samples of clusters of more than `MAX_AGENTS` nodes, whose pages would keep the driver
busy; use Prometheus there. The endpoint has no token: it listens on the loopback unless
`metrics.host` says otherwise, and then the network has to keep strangers out.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from pydantic import Field

from cluster.folder.config_file import Config
from cluster.telemetry.metrics import CATALOGUE, SAMPLE_SECONDS, Kind, Metric
from cluster.telemetry.samples import FOLDER, ActorTotals, Key, SampleWriter
from rollout.files import atomic_write
from rollout.run_store import RunStore, StoreError

logger = logging.getLogger(__name__)

MAX_AGENTS = 64
"""Ray agents that the driver itself reads; Prometheus reads any number."""

AGENT_TIMEOUT_S = 3.0


class MetricsConfig(Config):
    """What is measured while a run goes on, and where it can be read."""

    enabled: bool = Field(default=True, description="count and export; false: nothing is counted")
    host: str = Field(
        default="127.0.0.1", description="address the driver's metrics endpoint listens on"
    )
    port: int | None = Field(
        default=0,
        ge=0,
        le=65535,
        description="its port; 0: any free one, told in RUN/metrics/targets.json; null: none",
    )
    targets_dir: Path | None = Field(
        default=None,
        description="folder for a further targets file of this run, named after it, while it goes "
        "on; one Prometheus finds all runs there; null: only RUN/metrics/targets.json",
    )
    sample_s: float = Field(
        default=10.0,
        gt=0,
        description="pause between two looks at the run, kept for an hour in RUN/metrics",
    )


class ExporterError(RuntimeError):
    """The endpoint cannot be opened; the message says why."""


class Exporter:
    """Values of a run and everybody who may read them; see the module."""

    def __init__(
        self,
        store: RunStore,
        run: str,
        config: MetricsConfig,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            store: of the run.
            run: value of the label `run`.
        """
        self.config = config
        self._store = store
        self._run = run
        self._clock = clock
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._lock = threading.Lock()
        self._agents: tuple[str, ...] = ()
        self._actors = ActorTotals(run)
        self._writer = SampleWriter(store)
        self._server: Any = None
        self._told: str = ""
        self._complained = False

    # -- told

    def name(self, run: str) -> None:
        """Change the value of the label `run`, before anything is exported."""
        self._run, self._actors = run, ActorTotals(run)

    def set(self, metric: Metric, value: float | None, **labels: str) -> None:
        """What a driver's metric is now; None: it has no value."""
        key = tuple(labels[name] for name in metric.labels)
        with self._lock:
            values = self._values.setdefault(metric.name, {})
            if value is None:
                values.pop(key, None)
            else:
                values[key] = float(value)

    def clear(self, metric: Metric) -> None:
        """A metric has no value under any label now."""
        with self._lock:
            self._values.pop(metric.name, None)

    def agents(self, addresses: Sequence[str]) -> None:
        """Which agents of Ray there are now, as host:port."""
        self._agents = tuple(sorted(addresses))
        self._tell_targets()

    @property
    def has_agents(self) -> bool:
        """True if nodes of Ray are known."""
        return bool(self._agents)

    # -- life

    def start(self) -> None:
        """Open the endpoint.

        Raises:
            ExporterError: its port is taken, or its address is none of this machine's.
        """
        port = self.config.port
        if port is not None:
            registry = CollectorRegistry()
            registry.register(self)
            try:
                self._server, _ = start_http_server(port, self.config.host, registry)
            except OSError as error:
                raise ExporterError(
                    f"the metrics endpoint cannot listen on {self.config.host}:{port}: "
                    f"{error.strerror or error}; choose another metrics.port, 0 for any free one, "
                    "or null for none"
                ) from error
        self._tell_targets()

    @property
    def address(self) -> str:
        """Of the endpoint, as host:port; "" if there is none."""
        if self._server is None:
            return ""
        host = self.config.host
        return f"{own_address() if host == '0.0.0.0' else host}:{self._server.server_port}"

    def stop(self) -> None:
        """Close the endpoint; nothing is left to scrape."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self._agents = ()
        self._tell_targets()
        self._writer.close()

    # -- asked

    def collect(self) -> Iterator[Family]:
        """For prometheus-client: every driver's metric that has a value."""
        with self._lock:
            values = {name: dict(found) for name, found in self._values.items()}
        for name, found in values.items():
            if not found:
                continue
            metric = CATALOGUE[name]
            make: Any = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            family = make(metric.name, metric.help, labels=("run", *metric.labels))
            for key, value in found.items():
                family.add_metric((self._run, *key), value)
            yield family

    def describe(self) -> list[Family]:
        """For prometheus-client, which would collect at registration otherwise."""
        return []

    def sample(self) -> None:
        """Read the agents and keep one row; bounded in time, never raises."""
        began_s = time.monotonic()
        try:
            addresses = self._agents[:MAX_AGENTS]
            if addresses:
                with ThreadPoolExecutor(min(8, len(addresses))) as threads:
                    for page in threads.map(_page, addresses):
                        self._actors.take(page)
            self._writer.write(self._clock(), self._row())
        except Exception:
            if not self._complained:
                self._complained = True
                logger.warning("The run's metrics could not be kept", exc_info=True)
        self.set(SAMPLE_SECONDS, time.monotonic() - began_s)

    def _row(self) -> dict[Key, float]:
        row = dict(self._actors.totals)
        with self._lock:
            for name, found in self._values.items():
                names = CATALOGUE[name].labels
                for key, value in found.items():
                    row[name, tuple(sorted(zip(names, key, strict=True)))] = value
        return row

    def _tell_targets(self) -> None:
        sources = {"driver": [self.address] if self.address else [], "ray": list(self._agents)}
        groups = [
            {"targets": targets, "labels": {"source": source}}
            for source, targets in sources.items()
            if targets
        ]
        text = json.dumps(groups, indent=1) + "\n"
        if text == self._told:
            return
        self._told = text
        try:
            self._store.put(f"{FOLDER}/targets.json", text.encode(), durable=False)
            if self.config.targets_dir is not None:
                atomic_write(self.config.targets_dir / f"{self._run}.json", text)
        except (StoreError, OSError) as error:
            logger.warning("Prometheus is not told of this run: %s", error)


def own_address() -> str:
    """Where others reach this machine, or its name where no line leads out of it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return socket.gethostname()
        address: str = probe.getsockname()[0]
        return address


def _page(address: str) -> str:
    """What an agent exports; "" if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=AGENT_TIMEOUT_S) as reply:
            return reply.read().decode("utf-8", "replace")
    except OSError:
        return ""
