from __future__ import annotations

import json
import re

import pytest

from cluster.telemetry.metrics import CATALOGUE, Kind
from cluster.watch.panels import DASHBOARDS, Dashboard, places
from tests.made_metrics import metrics_of
from tools.grafana import FOLDER, dashboard_json, files
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
        assert [v["name"] for v in stored["templating"]["list"]] == ["datasource", "run"]
        ids = [panel["id"] for panel in stored["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in stored["panels"]:
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["title"] and panel["description"] and panel["fieldConfig"]
            assert all('run="$run"' in target["expr"] for target in panel["targets"])
            rated = [t["expr"] for t in panel["targets"] if "rate(" in t["expr"]]
            assert all("$__rate_interval" in expression for expression in rated)
