"""The policies for sandbox machines: what is shipped is enough, each widening is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.folder.config_file import ConfigError
from cluster.planning.sandbox_policy import read_policy, too_wide

POLICIES = Path(__file__).parents[4] / "deploy" / "policies"
SHIPPED = ("aws_sandbox.json", "gcp_sandbox.json", "azure_sandbox.json")
RUN = "s3://EDIT-bucket/runs/cluster"


def found(path: Path, run_dir: str | None = RUN) -> list[str]:
    return [str(finding) for finding in too_wide(read_policy(path), "policy", run_dir)]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("run_dir", [RUN, None])
def test_shipped_policy_is_enough_and_no_more(name: str, run_dir: str | None) -> None:
    assert found(POLICIES / name, run_dir) == []


def test_policy_of_the_run_itself_is_too_wide_for_sandboxes() -> None:
    said = found(POLICIES / "aws_run.json")
    assert any("replace EDIT-bucket/runs/*" in each for each in said)
    assert any("read EDIT-bucket/models/*" in each for each in said)
    assert any("list EDIT-bucket/*" in each for each in said)


@pytest.mark.parametrize("name", SHIPPED)
def test_policy_of_another_bucket_or_run_lets_nobody_commit(name: str) -> None:
    for other in ("s3://another/runs/cluster", "s3://EDIT-bucket/elsewhere/cluster"):
        said = found(POLICIES / name, other)
        assert any(f"workers cannot create {other}/trajectories" in each for each in said)


def statement(number: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def widen(policy: dict[str, Any]) -> None:
        policy["Statement"][number].update(fields)

    return widen


def unconditional(policy: dict[str, Any]) -> None:
    del policy["Statement"][0]["Condition"]


def everywhere(policy: dict[str, Any]) -> None:
    del policy["bindings"][0]["condition"]


def stretched(policy: dict[str, Any]) -> None:
    text = policy["bindings"][1]["condition"]["expression"]
    policy["bindings"][1]["condition"]["expression"] = text.replace("/traces/", "/")


def unbound(policy: dict[str, Any]) -> None:
    policy["condition"] = policy["condition"].replace("blobs/write", "blobs/tags/write")


ANY = "arn:aws:s3:::EDIT-bucket/runs/*"
WIDENED: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "any action": ("aws", statement(4, Action="s3:*"), "do more than that with"),
    "any resource": ("aws", statement(4, Resource="*"), "read */*"),
    "whole run": ("aws", statement(2, Resource=ANY), "replace EDIT-bucket/runs/*"),
    "committed trees replaced": ("aws", unconditional, "replace EDIT-bucket/runs/*/trajectories"),
    "committed trees deleted": (
        "aws",
        statement(3, Resource=f"{ANY}/trajectories/*"),
        "delete EDIT-bucket/runs/*/trajectories/*",
    ),
    "checkpoints": ("aws", statement(4, Resource=f"{ANY}/checkpoints/*"), "read EDIT-bucket"),
    "all names": ("aws", statement(5, Condition={}), "list EDIT-bucket/*"),
    "gcp: no condition": ("gcp", everywhere, "create */*"),
    "gcp: whole run": ("gcp", stretched, "delete EDIT-bucket/runs/cluster/*"),
    "gcp: a wider role": (
        "gcp",
        lambda policy: policy["bindings"][0].update(role="roles/storage.admin"),
        "do more than that with",
    ),
    "azure: no condition on writes": ("azure", unbound, "replace EDIT-bucket/*"),
    "azure: control of the account": (
        "azure",
        lambda policy: policy["role"].update(Actions=["*"]),
        "do more than that with",
    ),
}


@pytest.mark.parametrize("name", WIDENED)
def test_each_widening_is_told(name: str, tmp_path: Path) -> None:
    provider, widen, said = WIDENED[name]
    policy = json.loads((POLICIES / f"{provider}_sandbox.json").read_text())
    widen(policy)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(policy))
    assert any(said in each for each in found(file)), found(file)


def test_file_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    for text in ("{}", "[1]", "{"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"policy\.json"):
            read_policy(file)
