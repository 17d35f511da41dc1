"""deploy/grafana/dashboards/*.json, made from `cluster.watch.panels`, so that they agree.

python -m tools.grafana [--check]     (tools.generated)

Grafana finds them through deploy/grafana/provisioning. Every dashboard has the same two variables:
the Prometheus it asks, and the run.

Not covered: Grafana itself runs in no test; the expressions do, against a real Prometheus.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cluster.telemetry.metrics import RUN_SECONDS
from cluster.watch.panels import DASHBOARDS, Dashboard, Panel, places
from tools.generated import main

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards"

SCHEMA_VERSION = 39
"""Of Grafana 10.4 and later."""

_UNITS = {
    "short": "short",
    "steps": "short",
    "/s": "si:/s",
    "/h": "si:/h",
    "tokens/s": "si:tokens/s",
    "s": "s",
    "share": "percentunit",
    "bytes": "bytes",
    "usd": "currencyUSD",
    "usd/h": "currencyUSD",
    "per usd": "short",
}

LONGEST = "60d"
"""What is looked back on for a run's own time."""

_TYPES = {"number": "stat", "lines": "timeseries", "timeline": "state-timeline"}

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana stores it."""
    return {
        "uid": f"rstar-{dashboard.name}",
        "title": f"rstar: {dashboard.title}",
        "tags": ["rstar"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {
                "type": "dashboards",
                "tags": ["rstar"],
                "title": "rstar",
                "asDropdown": False,
                "keepTime": True,
                "includeVars": True,
            },
            {
                "type": "link",
                "title": "the run's own time",
                "url": f"/d/rstar-{dashboard.name}?from=${{began_ms}}&to=${{ended_ms}}",
                "includeVars": True,
            },
        ],
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": [
            _panel(panel, number, x, y)
            for number, (panel, x, y) in enumerate(places(dashboard), start=1)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
        },
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": _SOURCE,
            "query": f"label_values({RUN_SECONDS.exported}, run)",
            "refresh": 2,
            "sort": 1,
        },
        *(_edge(name, of) for name, of in (("began_ms", "min"), ("ended_ms", "max"))),
    ]


def edge_promql(of: str) -> str:
    """When the first (of: "min") or the last sample of a run was, in ms; $run is the run."""
    seen = f'timestamp({RUN_SECONDS.exported}{{run="$run"}})'
    return f"floor(1000 * {of}({of}_over_time({seen}[{LONGEST}:5m])))"


def _edge(name: str, of: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "hide": 2,
        "datasource": _SOURCE,
        "query": f"query_result({edge_promql(of)})",
        "regex": r"/ (\d+) \d+$/",
        "refresh": 2,
    }


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": _UNITS[panel.unit]}
    if panel.unit == "share":
        defaults |= {"min": 0, "max": 1}
    if panel.kind == "lines":
        defaults["custom"] = {"fillOpacity": 8, "lineWidth": 2, "showPoints": "never"}
    if panel.kind == "timeline":
        defaults |= {
            "custom": {"fillOpacity": 80, "lineWidth": 0, "spanNulls": False},
            "color": {"mode": "fixed", "fixedColor": "blue"},
            "mappings": [{"type": "value", "options": {"1": {"text": "running"}}}],
        }
    options: dict[str, dict[str, Any]] = {
        "number": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"},
        "lines": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi"},
        },
        "timeline": {
            "mergeValues": True,
            "showValue": "never",
            "rowHeight": 0.8,
            "legend": {"showLegend": False},
            "tooltip": {"mode": "single"},
        },
    }
    return {
        "id": number,
        "type": _TYPES[panel.kind],
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": _SOURCE,
                "expr": query.expression.promql("$run", "$__rate_interval"),
                "legendFormat": re.sub(r"\{(\w+)\}", r"{{\1}}", query.legend),
            }
            for position, query in enumerate(panel.queries)
        ],
    }


def files() -> dict[Path, str]:
    """Every file and what it should hold."""
    return {
        FOLDER / f"{dashboard.name}.json": json.dumps(dashboard_json(dashboard), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }


if __name__ == "__main__":
    raise SystemExit(main("grafana", files()))
