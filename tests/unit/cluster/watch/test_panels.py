from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.telemetry.metrics import CATALOGUE, Kind
from cluster.watch.panels import DASHBOARDS, Dashboard, places
from tests.made_metrics import metrics_of
from tests.prometheus import MISSING, has_prometheus
from tools.grafana import FOLDER, dashboard_json, edge_promql, files
from tools.metrics_reference import PATH, reference

KNOWN = {name: metric for metric in CATALOGUE.values() for name in metric.series_names}


def each(name: str) -> Dashboard:
    return next(dashboard for dashboard in DASHBOARDS if dashboard.name == name)


def test_committed_dashboards_and_page_are_up_to_date() -> None:
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, "run python -m tools.grafana"
    assert {p.name for p in FOLDER.iterdir()} == {p.name for p in files()}
    message = "run python -m tools.metrics_reference"
    assert PATH.read_text(encoding="utf-8") == reference(), message


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_every_name_in_every_committed_expression_is_in_the_catalogue(dashboard: Dashboard) -> None:
    stored = json.loads((FOLDER / f"{dashboard.name}.json").read_text(encoding="utf-8"))
    for panel in stored["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            names = set(re.findall(r"\b(?:ray_)?rstar_\w+", target["expr"]))
            assert names and names <= KNOWN.keys(), (panel["title"], names - KNOWN.keys())
            for name in names:
                is_gauge = KNOWN[name].kind is Kind.GAUGE
                rated = re.search(rf"rate\({name}\{{", target["expr"]) is not None
                counted = KNOWN[name].kind is Kind.COUNTER and name.startswith("rstar_")
                assert rated != is_gauge or counted, f"{panel['title']}: {target['expr']}"
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {label for name in names for label in KNOWN[name].labels}
            assert labels <= kept, (panel["title"], labels)


def test_legends_use_only_labels_that_their_expression_keeps() -> None:
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            for query in panel.queries:
                used = set(re.findall(r"\{(\w+)\}", query.legend))
                assert used == set(query.expression.by), (dashboard.name, panel.title)
                for metric in metrics_of(query.expression):
                    where = set(query.expression.by)
                    assert where <= set(metric.labels) or not metric.labels, panel.title


def test_panels_have_titles_of_their_own_and_do_not_overlap() -> None:
    for dashboard in DASHBOARDS:
        titles = [panel.title for panel in dashboard.panels]
        assert len(set(titles)) == len(titles)
        taken: set[tuple[int, int]] = set()
        for panel, x, y in places(dashboard):
            cells = {(x + i, y + j) for i in range(panel.width) for j in range(panel.height)}
            assert not cells & taken and x + panel.width <= 24
            taken |= cells


def test_dashboards_are_what_grafana_needs() -> None:
    made = [dashboard_json(dashboard) for dashboard in DASHBOARDS]
    assert len({each["uid"] for each in made}) == len(made)
    for stored in made:
        names = [v["name"] for v in stored["templating"]["list"]]
        assert names == ["datasource", "run", "began_ms", "ended_ms"]
        ids = [panel["id"] for panel in stored["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in stored["panels"]:
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["title"] and panel["description"] and panel["fieldConfig"]
            assert all('run="$run"' in target["expr"] for target in panel["targets"])
            rated = [t["expr"] for t in panel["targets"] if "rate(" in t["expr"]]
            assert all("$__rate_interval" in expression for expression in rated)


def test_stages_are_bars_on_a_line_of_time() -> None:
    stored = json.loads((FOLDER / "overview.json").read_text(encoding="utf-8"))
    (panel,) = [panel for panel in stored["panels"] if panel["title"] == "Stage"]
    assert panel["type"] == "state-timeline" and panel["options"]["mergeValues"]
    (target,) = panel["targets"]
    assert target["legendFormat"] == "round {{round}} {{stage}}"
    assert {p["type"] for p in stored["panels"]} == {"stat", "timeseries", "state-timeline"}


@pytest.mark.skipif(not has_prometheus(), reason=MISSING)
def test_link_to_the_runs_own_time_finds_its_first_and_last_sample(tmp_path: Path) -> None:
    """A run of 20 minutes, one hour after the beginning, seen a day later."""
    samples = {"series": 'rstar_run_seconds{run="demo"}', "values": "_x60 0+60x20 _x2000"}
    other = {"series": 'rstar_run_seconds{run="other"}', "values": "0+60x2000"}
    asked = [
        {
            "expr": edge_promql(of).replace("$run", "demo"),
            "eval_time": "26h",
            "exp_samples": [{"labels": "{}", "value": 1000 * seconds}],
        }
        # The last one is looked up every five minutes, and counts for five.
        for of, seconds in (("min", 3600), ("max", 4800))
    ]
    test = {
        "tests": [{"interval": "1m", "input_series": [samples, other], "promql_expr_test": asked}]
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    link = dashboard_json(each("engines"))["links"][1]
    assert link["url"] == "/d/rstar-engines?from=${began_ms}&to=${ended_ms}"
    for variable in dashboard_json(each("engines"))["templating"]["list"][2:]:
        found = re.search(variable["regex"].strip("/"), "{} 1795276800000 1795276923000")
        assert found is not None and found[1] == "1795276800000"
