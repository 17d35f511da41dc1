"""What the machines of the sandboxes may do with a run's bucket, and what of it is too much.

    IAM policy (AWS) ----------+
    bucket's bindings (GCP) ---+--> grants: an action on a place --> findings
    role and condition (Azure)-+

On those machines runs code that a model wrote. They hold a key to the bucket all the same, because
rollout workers commit trees from there: so the key creates trees, which are never replaced, and
reads what a search needs; replaced and forgotten are logs and trees whose search is not over.

Not covered: what other policies of the same identity add, and what the bucket's own one does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cluster.folder.config_file import ConfigError
from cluster.planning.findings import Finding, error

_TREES = ("trajectories", "evaluations", "rulers")
_READ = ("run.id", "problem_blocks", *_TREES)
_TOLD = ("logs", "traces")


class Right(StrEnum):
    """What may be done with an object."""

    READ = "read"
    CREATE = "create"
    REPLACE = "replace"
    DELETE = "delete"
    LIST = "list"
    OTHER = "do more than that with"


@dataclass(frozen=True, slots=True)
class Grant:
    """One right on the objects of one pattern."""

    right: Right
    bucket: str
    place: str
    """Pattern of names in the bucket, `*` for anything."""
    text: str
    """As the policy has it."""


def read_policy(path: Path) -> list[Grant]:
    """What a policy grants; what cannot be read counts as everything.

    Raises:
        ConfigError: no such file, or no policy of AWS, GCP or Azure.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as broken:
        raise ConfigError(f"{path}: cannot be read: {broken}") from broken
    readers = {"Statement": _aws, "bindings": _gcp, "condition": _azure}
    for key, grants in readers.items():
        if isinstance(data, dict) and key in data:
            return list(grants(data))
    raise ConfigError(
        f"{path}: no policy: expected Statement (AWS), bindings (GCP) or role and condition (Azure)"
    )


def too_wide(grants: Sequence[Grant], where: str, run_dir: str | None = None) -> Iterator[Finding]:
    """What sandbox machines should not be allowed, and what they lack.

    Args:
        where: the policy, for findings.
        run_dir: the run's address, as s3://bucket/runs/one; None: not known.
    """
    for grant in grants:
        if not _fitting(grant):
            yield error(
                where,
                f"step code that got out could {grant.right} {grant.bucket}/{grant.place} "
                f"({grant.text})",
                "create trees only: see docs/security.md",
            )
    bucket, _, name = run_dir.partition("://")[2].partition("/") if run_dir else ("", "", "")
    for right, example in (
        (Right.CREATE, "trajectories/round=1/s.json"),
        (Right.REPLACE, "trajectories/round=1/open/j.trees"),
        (Right.READ, "run.id"),
        (Right.READ, "problem_blocks/b"),
        (Right.READ, "trajectories/round=1/s.json"),
    ):
        held = [grant for grant in grants if grant.right is right]
        if run_dir:
            held = [
                g for g in held if g.bucket == bucket and fnmatchcase(f"{name}/{example}", g.place)
            ]
        else:
            held = [
                g for g in held if fnmatchcase(example, g.place.partition("/")[2].partition("/")[2])
            ]
        if not held:
            whose = f"{run_dir}/{example}" if run_dir else f"{example} of a run"
            yield error(where, f"workers cannot {right} {whose}", "see deploy/policies")


def _fitting(grant: Grant) -> bool:
    """Whether sandbox machines need it."""
    parts = grant.place.split("/")
    top = next((i for i, part in enumerate(parts) if part in (*_READ, *_TOLD)), 0)
    if grant.right is Right.LIST:
        return grant.place not in ("", "*")
    if not top:  # a place of all runs and models, or of none
        return False
    kind, is_open = parts[top], "open" in parts[top:] or grant.place.endswith(".trees")
    return {
        Right.READ: kind in _READ or kind in _TOLD,
        Right.CREATE: kind in _TREES or kind in _TOLD,
        Right.REPLACE: kind in _TOLD or (kind in _TREES and is_open),
        Right.DELETE: kind in _TOLD or (kind in _TREES and is_open),
        Right.OTHER: False,
    }[grant.right]


def _several(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(each) for each in value or ()]


def _aws(policy: Mapping[str, Any]) -> Iterator[Grant]:
    rights = {
        "s3:GetObject": Right.READ,
        "s3:DeleteObject": Right.DELETE,
        "s3:AbortMultipartUpload": Right.CREATE,
    }
    statements = policy["Statement"]
    for statement in [statements] if isinstance(statements, dict) else statements:
        if statement.get("Effect") != "Allow":
            continue
        condition = statement.get("Condition", {})
        creates = condition.get("Null", {}).get("s3:if-none-match") == "false"
        is_part = condition.get("Bool", {}).get("s3:ObjectCreationOperation") == "false"
        text = str(statement.get("Sid") or json.dumps(statement)[:80])
        for action in _several(statement.get("Action")) or ["*"]:
            for resource in _several(statement.get("Resource")) or ["*"]:
                bucket, _, place = resource.removeprefix("arn:aws:s3:::").partition("/")
                if action == "s3:ListBucket":
                    prefixes = condition.get("StringLike", {}).get("s3:prefix", "*")
                    for prefix in _several(prefixes):
                        yield Grant(Right.LIST, bucket, prefix, text)
                    continue
                right = rights.get(action, Right.OTHER)
                if action == "s3:PutObject":
                    right = Right.CREATE if creates or is_part else Right.REPLACE
                yield Grant(right, bucket, place or "*", text)


_OBJECTS = r"projects/_/buckets/([^/\"]+)/objects/([^\"]*)"
_GCP_ROLES = {
    "roles/storage.objectCreator": (Right.CREATE,),
    "roles/storage.objectViewer": (Right.READ, Right.LIST),
    "roles/storage.objectUser": (Right.READ, Right.CREATE, Right.REPLACE, Right.DELETE, Right.LIST),
}


def _gcp(policy: Mapping[str, Any]) -> Iterator[Grant]:
    for binding in policy["bindings"]:
        role = str(binding.get("role"))
        text = role.removeprefix("roles/")
        rights = _GCP_ROLES.get(role, (Right.OTHER,))
        expression = str(binding.get("condition", {}).get("expression", ""))
        for one in re.split(r"\s*\|\|\s*", expression):
            one = one.strip(" ()") if one.startswith("(") else one
            listed = re.fullmatch(r'api\.getAttribute\(.*\)\.startsWith\("(.*)"\)', one)
            exact = re.fullmatch(rf'resource\.name == "{_OBJECTS}"', one)
            below = re.match(rf'resource\.name\.startsWith\("{_OBJECTS}"\)', one)
            ending = re.search(r'&& resource\.name\.endsWith\("([^"]+)"', one)
            if listed and Right.LIST in rights:
                yield Grant(Right.LIST, "", f"{listed[1]}*", text)
                continue
            found = exact or below
            place = "*" if found is None else found[2]
            if below:
                place += "*" + (ending[1] if ending else "")
            for right in rights:
                if right is not Right.LIST:  # asked of the bucket, which no object's name matches
                    yield Grant(right, found[1] if found else "*", place, text)


def _azure(policy: Mapping[str, Any]) -> Iterator[Grant]:
    rights = {
        "add/action": Right.CREATE,
        "write": Right.REPLACE,
        "delete": Right.DELETE,
        "read": Right.READ,
    }
    role = policy.get("role", {})
    bucket = str(policy.get("scope", "")).rpartition("/containers/")[2]
    parts = re.split(r"ActionMatches\{'[^']*/blobs/([^']*)'\}", str(policy["condition"]))
    places = {
        action: re.findall(r"StringLike '([^']*)'", rest)
        for action, rest in zip(parts[1::2], parts[2::2], strict=True)
    }
    for action in _several(role.get("Actions")):
        yield Grant(Right.OTHER, bucket, "*", action)
    for action in _several(role.get("DataActions")):
        name = action.rpartition("/blobs/")[2]
        for place in places.get(name) or ["*"]:
            yield Grant(rights.get(name, Right.OTHER), bucket, place, name or action)
