"""docs/metrics.md, made from the catalogue, the dashboards and the rules.

python -m tools.metrics_reference [--check]     (tools.generated)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from cluster.telemetry.metrics import CATALOGUE, Kind, Source
from cluster.watch.panels import DASHBOARDS
from tools.generated import main

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "metrics.md"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"

_HEAD = """\
# Metrics

This page is made by `python -m tools.metrics_reference` from the catalogue
(`cluster/telemetry/metrics.py`), the dashboards (`cluster/watch/panels.py`) and the rules
(`deploy/prometheus/rules.yml`); a test fails when it is out of date.

    rstar why RUN                            # what it hangs on (docs/runbook.md)
    rstar top RUN                            # in the terminal, over ssh; nothing else is needed
    rstar dashboard RUN                      # the dashboards as a page, from the run's own samples
    rstar dashboard RUN --prometheus URL     # the same from a Prometheus
    prometheus --config.file=deploy/prometheus/prometheus.yml     alerts, and more than an hour
    deploy/grafana                             the dashboards for Grafana, with provisioning

- What only grows is counted where it happens and leaves through Ray: Ray's agent of each node
  exports it, with `ray_` before the name. What goes up and down is looked at by the driver, which
  exports it at `metrics.host`:`metrics.port`. `RUN/metrics/targets.json` names all of them for
  Prometheus (`file_sd_configs`), as does `metrics.targets_dir` for many runs.
- Without Prometheus the driver reads the agents itself (of at most 64 nodes) and keeps an hour in
  `RUN/metrics/samples-*.jsonl`.
- Every metric has the label `run`, the name of the run's folder: give runs that one Prometheus sees
  folders of different names. Sum over processes, never look at a single one: a process that is
  replaced counts from 0 again, and Ray keeps the last value of one that is gone.
- Ray hands counts on every 10 seconds (`RAY_metrics_report_interval_ms`). An actor that ends in
  good order hands over what it counted last, and the driver looks once more when all have ended:
  the samples hold everything. What a process that is killed counted in its last seconds is lost.
- Time left has no value until some of the stage is done, or a stage like it was measured; `rstar
  status` and `rstar top` say "unknown" then.
- `rstar train` alone exports what a run exports of a fit (`rstar_learner_*`, `rstar_stage_running`,
  `rstar_eta_seconds`), and `rstar top`, `dashboard` and `why` work on its folder.
- `rstar dashboard` opens on the run's own time, from its first start to its end (as far as there is
  data); in Grafana the link "the run's own time" of each dashboard does that.
- `python -m bench.demo --profile RUN` shows where the time of a run went: seconds by stage and by
  process. `python -m bench.metrics` measures what all this costs.

Ray's discovery over HTTP (`/api/prometheus/sd`) asks for Ray's token; its discovery file on the
head does not, and neither do the agents' and the driver's `/metrics`: keep strangers out by network
rules. `deploy/prometheus/prometheus-ray.yml` is for the head of a standing cluster.
"""


def reference() -> str:
    """The whole page."""
    return _HEAD + "\n" + "\n".join([*_metrics(), *_dashboards(), *_rules()]).rstrip() + "\n"


def _metrics() -> Iterator[str]:
    for source, title in (
        (Source.ACTOR, "Counted by actors"),
        (Source.DRIVER, "Seen by the driver"),
    ):
        yield f"## {title}\n"
        yield "| name | kind | unit | labels | |"
        yield "|---|---|---|---|---|"
        for metric in CATALOGUE.values():
            if metric.source is source:
                labels = ", ".join(f"`{label}`" for label in metric.labels)
                unit = "share" if metric.unit == "1" and "ratio" in metric.name else metric.unit
                text = metric.help.rstrip(".")
                if metric.kind is Kind.HISTOGRAM:
                    low, high = metric.boundaries[0], metric.boundaries[-1]
                    text += f"; buckets {low:g} to {high:g}"
                yield f"| `{metric.exported}` | {metric.kind} | {unit} | {labels} | {text} |"
        yield ""


def _dashboards() -> Iterator[str]:
    yield "## Dashboards\n"
    for dashboard in DASHBOARDS:
        yield f"### {dashboard.title}\n"
        for panel in dashboard.panels:
            yield f"- **{panel.title}** ({panel.unit}): {panel.help}"
        yield ""


def _rules() -> Iterator[str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    yield "## Alerts\n"
    yield "| alert | severity | after | runbook |"
    yield "|---|---|---|---|"
    for rule in rules:
        if "alert" in rule:
            anchor = rule["annotations"]["runbook_url"].removeprefix("docs/")
            severity, after = rule["labels"]["severity"], rule.get("for", "at once")
            yield f"| `{rule['alert']}` | {severity} | {after} | [{anchor}]({anchor}) |"
    yield "\n## Recording rules\n"
    for rule in rules:
        if "record" in rule:
            yield f"- `{rule['record']}`: `{' '.join(rule['expr'].split())}`"


if __name__ == "__main__":
    raise SystemExit(main("metrics_reference", {PATH: reference()}))
