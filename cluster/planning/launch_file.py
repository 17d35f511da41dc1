"""A launch file of `ray up` as its rules see it: as written, before Ray fills in its defaults.

Nothing here says that anything is wrong: what has another kind than it should counts as absent, and
Ray's own schema tells of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.folder.config_file import ConfigError, read_yaml

PLACEHOLDER = "EDIT"
"""Stands in a launch file where everybody has a value of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """One row of `available_node_types`."""

    name: str
    provider: str
    head: bool
    fields: Mapping[str, Any]
    default_max: int
    """`max_workers` of the whole file, which Ray fills in."""

    @property
    def where(self) -> str:
        return f"available_node_types.{self.name}"

    @property
    def node_config(self) -> Mapping[str, Any]:
        return mapping(self.fields.get("node_config"))

    @property
    def machine(self) -> Mapping[str, Any]:
        """Where the provider's own words for it stand: `node_config`, or a section of it."""
        config = self.node_config
        return mapping(config.get("azure_arm_parameters")) if self.provider == "azure" else config

    @property
    def resources(self) -> dict[str, float]:
        return {k: v for k, v in mapping(self.fields.get("resources")).items() if _number(v)}

    @property
    def min_workers(self) -> int:
        return whole(self.fields.get("min_workers"), 0)

    @property
    def max_workers(self) -> int:
        return whole(self.fields.get("max_workers"), self.default_max)

    @property
    def count(self) -> tuple[int, int]:
        """Least and most machines of the type; of the head's there is always one."""
        extra = int(self.head)
        return self.min_workers + extra, self.max_workers + extra

    @property
    def instance(self) -> str:
        """What the provider calls the machine; "" if not given."""
        machine = self.machine
        if self.provider == "azure":
            return str(machine.get("vmSize", ""))
        name = str(machine.get("InstanceType") or machine.get("machineType") or "")
        return name.rsplit("/", 1)[-1]

    @property
    def identity(self) -> str:
        """Who the machine is to the cloud's services; "" if nobody, or if all machines are one."""
        if self.provider == "aws":
            profile = mapping(self.machine.get("IamInstanceProfile"))
            return str(profile.get("Arn") or profile.get("Name") or "")
        accounts = self.machine.get("serviceAccounts") or []
        return ",".join(str(mapping(account).get("email", "")) for account in accounts)

    @property
    def spot(self) -> bool:
        """Whether the provider may take it back."""
        machine = self.machine
        if self.provider == "aws":
            return mapping(machine.get("InstanceMarketOptions")).get("MarketType") == "spot"
        if self.provider == "azure":
            return machine.get("priority") == "Spot"
        scheduling = merged(machine.get("scheduling"))
        return scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A whole launch file."""

    data: Mapping[str, Any]
    types: tuple[NodeType, ...]
    provider: str
    folder: Path
    """Where the file is: other files are named from there."""


def read_launch(path: str | Path) -> Launch:
    """Read a launch file.

    Raises:
        ConfigError: unreadable, no mapping, or not a launch file at all.
    """
    data = read_yaml(path)
    if "apiVersion" in data:
        raise ConfigError(
            f"{path}: a Kubernetes manifest; this command reads files for `ray up` "
            "(docs/deploy.md says how manifests are checked)"
        )
    rows = data.get("available_node_types")
    provider = str(mapping(data.get("provider")).get("type", ""))
    if not isinstance(rows, dict) or not rows or not provider:
        raise ConfigError(f"{path}: no provider.type or no available_node_types; is it for ray up?")
    head = data.get("head_node_type")
    types = tuple(
        NodeType(
            name=str(name),
            provider=provider,
            head=name == head,
            fields=mapping(fields),
            default_max=whole(data.get("max_workers"), 0),
        )
        for name, fields in rows.items()
    )
    return Launch(data=data, types=types, provider=provider, folder=Path(path).parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayStart:
    """One `ray start` among the commands."""

    where: str
    options: Mapping[str, str]
    """With their dashes; "" for one without a value."""
    line: str
    """The whole command."""

    def number(self, option: str, default: int) -> int:
        """An option's value, or the default where it is none."""
        text = self.options.get(option, "")
        return int(text) if text.isdigit() else default


def ray_starts(launch: Launch, key: str) -> list[RayStart]:
    """Every `ray start` in a section of commands; lines that no shell could read are left out."""
    found = []
    for position, line in enumerate(launch.data.get(key) or []):
        try:
            words = shlex.split(str(line).replace(";", " ; ").replace("&&", " && "))
        except ValueError:
            continue
        for at in range(len(words) - 1):
            if words[at : at + 2] == ["ray", "start"]:
                options: dict[str, str] = {}
                last = ""
                for word in words[at + 2 :]:
                    if word in (";", "&&", "||", "|", "&"):
                        break
                    if word.startswith("-"):
                        last, _, value = word.partition("=")
                        options[last] = value
                    elif last and not options[last]:
                        options[last] = word
                found.append(RayStart(where=f"{key}.{position}", options=options, line=str(line)))
    return found


def strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in plain data with its path."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from strings(inner, f"{where}.{position}")


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping if it is something else."""
    return value if isinstance(value, Mapping) else {}


def merged(value: Any) -> dict[str, Any]:
    """A mapping, or a list of them, which Ray's own GCP examples use."""
    if isinstance(value, list):
        return {key: inner for part in value for key, inner in mapping(part).items()}
    return dict(mapping(value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(value: Any, default: int) -> int:
    """The value, or the default if it is no whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default
