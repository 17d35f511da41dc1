from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.telemetry.metrics import CATALOGUE
from tests.prometheus import MISSING, has_prometheus

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "prometheus"
KNOWN = {name: metric for metric in CATALOGUE.values() for name in metric.series_names}

needs_promtool = pytest.mark.skipif(not has_prometheus(), reason=MISSING)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_every_name_in_every_rule_is_in_the_catalogue_or_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        expression = rule["expr"]
        for name in re.findall(r"run:[\w:]+", expression):
            assert name in recorded, name
        plain = re.sub(r"run:[\w:]+", "", expression)
        names = set(re.findall(r"\b(?:ray_)?rstar_\w+", plain))
        assert names <= KNOWN.keys(), names - KNOWN.keys()
        for name, where in re.findall(r"\b((?:ray_)?rstar_\w+)\{(.*?)\}", plain):
            labels = set(re.findall(r"(\w+)=", where))
            assert labels <= set(KNOWN[name].labels), (name, labels)


def test_every_alert_leads_to_a_section_of_the_runbook() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))
        for title in re.findall(r"^## (.+)$", page, re.MULTILINE)
    }
    for name, rule in alerts().items():
        address, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert address == "docs/runbook.md" and anchor in anchors, name
        assert f"`{name}`" in page, name
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_every_alert_is_tested_to_fire_and_to_stay_silent() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    asked = [case for test in tests for case in test.get("alert_rule_test", ())]
    fires = {case["alertname"] for case in asked if case.get("exp_alerts")}
    silent = {case["alertname"] for case in asked if not case.get("exp_alerts")}
    assert fires == silent == set(alerts())


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "config", "prometheus-ray.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("name", sorted(alerts()))
def test_rule_tests_notice_an_alert_that_never_fires(name: str, tmp_path: Path) -> None:
    for file in FOLDER.glob("rules*.yml"):
        shutil.copy(file, tmp_path)
    broken = yaml.safe_load((tmp_path / "rules.yml").read_text(encoding="utf-8"))
    for group in broken["groups"]:
        for rule in group["rules"]:
            if rule.get("alert") == name:
                rule["expr"] = f"({rule['expr']}) and on () vector(0) > 1"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(broken), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yml"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode != 0
