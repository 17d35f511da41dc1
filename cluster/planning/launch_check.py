"""Is a cluster launch file fit to be launched? Said offline, before anything is paid for.

    launch file -----+-- Ray's own prepare and validate: the schema -------+
    (`ray up`)       +-- the provider's own description of a machine ------+--> findings
    run config ------+-- this module's rules: commands, ports, token, -----+    price range
    deploy/prices.yaml   spot, resources asked for and offered, sizes -----+

Ray's schema stops at `node_config` and takes any command. What is wrong there shows an hour later
and costs money: a misspelt spot key buys machines on demand, a resource nobody offers leaves actors
pending for ever, a port inside the range of the workers' ports is refused on some nodes only.

A finding is one line: where in the file, what is wrong, what is right. Errors keep the cluster from
working or make it unsafe; warnings are worth a look. Each rule is a generator of findings.

`node_config` is checked against the provider's own library where it is here: AWS's request shape
(botocore, which `ray up` needs too), Azure's machine template (comes with Ray), for GCP a list of
names below, which knows the top level and `scheduling`.

Not covered: whether images, networks, quotas or spot capacity exist (only the cloud knows), what
the setup commands do, prices of disks, traffic and shared file systems.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import functools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from cluster.fleet.config import ActorConfig, ClusterConfig
from cluster.folder.config_file import ConfigError, find_config, load_config, make_config, read_yaml
from cluster.machines.placement import Ask, NodeResources, explain
from cluster.runs.config import RunConfig

PLACEHOLDER = "EDIT"
"""Stands in a launch file where everybody has a value of their own."""

MIN_START_TIMEOUT_S = 600.0
"""A machine is bought, set up and loads weights in about so long."""

MIN_OPEN_FILES = 65536

_WORKER_PORTS = (10002, 19999)
"""Ray's own range of workers' ports where none is given."""


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to look at."""

    level: Level
    where: str
    """Path in the file, as "available_node_types.learner.max_workers"."""
    wrong: str
    right: str

    def __str__(self) -> str:
        return f"{self.level} {self.where}: {self.wrong}; {self.right}"


def _error(where: str, wrong: str, right: str) -> Finding:
    return Finding(level=Level.ERROR, where=where, wrong=wrong, right=right)


def _warning(where: str, wrong: str, right: str) -> Finding:
    return Finding(level=Level.WARNING, where=where, wrong=wrong, right=right)


# --------------------------------------------------------------------------- prices


class Instance(BaseModel):
    """A row of the price table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    on_demand: float = Field(gt=0, description="dollars per hour")
    spot: float | None = Field(None, gt=0, description="dollars per hour; null: not sold as spot")
    cpus: int = Field(ge=1, description="logical CPUs")
    gpus: int = Field(0, ge=0, description="GPUs")

    def price(self, spot: bool) -> float:
        """Dollars per hour; on demand where no spot price is known."""
        return self.spot if spot and self.spot is not None else self.on_demand


class PriceTable(BaseModel):
    """List prices to be checked, by provider and instance type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    as_of: datetime.date = Field(description="when the prices were looked up")
    instances: dict[str, dict[str, Instance]] = Field(description="provider -> type -> row")


def read_prices(path: str | Path) -> PriceTable:
    """The price table.

    Raises:
        ConfigError: it cannot be read, or a row is wrong; the message names it.
    """
    try:
        return PriceTable.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None


# --------------------------------------------------------------------------- the launch file


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
        return _mapping(self.fields.get("node_config"))

    @property
    def resources(self) -> dict[str, float]:
        return {k: v for k, v in _mapping(self.fields.get("resources")).items() if _number(v)}

    @property
    def min_workers(self) -> int:
        return _whole(self.fields.get("min_workers"), 0)

    @property
    def max_workers(self) -> int:
        return _whole(self.fields.get("max_workers"), self.default_max)

    @property
    def count(self) -> tuple[int, int]:
        """Least and most machines of the type; of the head's there is always one."""
        extra = int(self.head)
        return self.min_workers + extra, self.max_workers + extra

    @property
    def instance(self) -> str:
        """What the provider calls the machine; "" if not given."""
        machine = _mapping(self.node_config)
        if self.provider == "azure":
            return str(_mapping(machine.get("azure_arm_parameters")).get("vmSize", ""))
        name = str(machine.get("InstanceType") or machine.get("machineType") or "")
        return name.rsplit("/", 1)[-1]

    @property
    def spot(self) -> bool:
        """Whether the provider may take it back."""
        machine = self.node_config
        if self.provider == "aws":
            return _mapping(machine.get("InstanceMarketOptions")).get("MarketType") == "spot"
        if self.provider == "azure":
            return _mapping(machine.get("azure_arm_parameters")).get("priority") == "Spot"
        scheduling = _merged(machine.get("scheduling"))
        return scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A launch file as the rules see it: as written, before Ray fills in its defaults."""

    data: Mapping[str, Any]
    types: tuple[NodeType, ...]
    provider: str


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
    provider = str(_mapping(data.get("provider")).get("type", ""))
    if not isinstance(rows, dict) or not rows or not provider:
        raise ConfigError(f"{path}: no provider.type or no available_node_types; is it for ray up?")
    head = data.get("head_node_type")
    types = tuple(
        NodeType(
            name=str(name),
            provider=provider,
            head=name == head,
            fields=_mapping(fields),
            default_max=_whole(data.get("max_workers"), 0),
        )
        for name, fields in rows.items()
    )
    return Launch(data=data, types=types, provider=provider)


def check_launch(
    launch: Launch, prices: PriceTable, run: RunConfig | ClusterConfig | None = None
) -> list[Finding]:
    """All findings, errors first.

    Args:
        run: whose actors must find their place; None: that is not checked.
    """
    findings = [
        *accepted_by_ray(launch),
        *_placeholders(launch),
        *_explicit_sections(launch),
        *_numbers_of_workers(launch),
        *_head_takes_no_work(launch),
        *_node_config(launch),
        *_spot(launch),
        *_sizes(launch, prices),
        *_images(launch),
        *_start_commands(launch),
        *_token(launch),
        *_file_mounts(launch),
        *(_actors(launch, run) if run is not None else ()),
    ]
    return sorted(findings, key=lambda finding: finding.level is Level.WARNING)


# --------------------------------------------------------------------------- rules


def accepted_by_ray(launch: Launch) -> Iterator[Finding]:
    """What Ray itself says. The only use of its private launcher code (2.60)."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(dict(launch.data))))
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "top level"
        yield _error(where, f"Ray refuses it: {error.message[:200]}", "see the schema of `ray up`")
    except Exception as error:
        # Its code raises whatever a wrong type leads to.
        yield _error("top level", f"Ray refuses it: {error}", "see the schema of `ray up`")


def _placeholders(launch: Launch) -> Iterator[Finding]:
    seen = set()
    for where, value in _strings(launch.data):
        if re.search(rf"\b{PLACEHOLDER}\b|-{PLACEHOLDER}", value) and value not in seen:
            seen.add(value)
            shown = value if len(value) < 60 else f"...{value[-56:]}"
            yield _warning(where, f"{shown!r} is a placeholder", "put your own value there")


def _explicit_sections(launch: Launch) -> Iterator[Finding]:
    because = {
        "setup_commands": "Ray's default installs a nightly build of Ray",
        "head_start_ray_commands": "Ray's default opens the dashboard to everybody",
        "worker_start_ray_commands": "Ray's default does not fix the metrics port",
        "head_setup_commands": "Ray's default installs packages into another Python",
    }
    for key, reason in because.items():
        if key not in launch.data:
            yield _error(key, f"missing: {reason}", "write the section, be it empty")


def _numbers_of_workers(launch: Launch) -> Iterator[Finding]:
    for node in launch.types:
        if "max_workers" not in node.fields:
            yield _warning(
                f"{node.where}.max_workers",
                f"missing: Ray fills in {node.default_max}",
                "say how many you will pay for",
            )
        if node.min_workers > node.max_workers:
            yield _error(
                f"{node.where}.min_workers",
                f"{node.min_workers} is more than max_workers {node.max_workers}",
                "min_workers <= max_workers",
            )
        if node.head and node.max_workers:
            yield _error(
                f"{node.where}.max_workers",
                f"{node.max_workers} further machines like the head may be started as workers",
                "0",
            )
    together = sum(node.max_workers for node in launch.types)
    limit = _whole(launch.data.get("max_workers"), 0)
    if together > limit:
        yield _warning(
            "max_workers",
            f"{limit} is less than the {together} that the node types may have together",
            "raise it, or lower theirs",
        )


def _head_takes_no_work(launch: Launch) -> Iterator[Finding]:
    for node in launch.types:
        if not node.head:
            continue
        cpus = node.resources.get("CPU")
        if cpus is None or cpus > 0:
            offered = "all of its CPUs" if cpus is None else f"{cpus:g} CPUs"
            yield _error(
                f"{node.where}.resources.CPU",
                f"the head offers {offered}, so that other work starves the coordinator",
                "0",
            )
        if node.spot:
            yield _error(f"{node.where}.node_config", "the head is a spot machine", "on demand")


def _node_config(launch: Launch) -> Iterator[Finding]:
    check = {"aws": _aws_node_config, "gcp": _gcp_node_config, "azure": _azure_node_config}
    if launch.provider not in check:
        yield _warning(
            "provider.type",
            f"node_config of {launch.provider!r} is not checked",
            f"checked are {', '.join(check)}",
        )
        return
    for node in launch.types:
        yield from check[launch.provider](node)


@functools.cache
def _run_instances() -> Any:
    """The shape of AWS's request for machines; reading its description takes a second."""
    from botocore.session import Session

    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _aws_node_config(node: NodeType) -> Iterator[Finding]:
    where = f"{node.where}.node_config"
    try:
        shape = _run_instances()
    except ImportError:
        yield _warning(where, "not checked: botocore is not installed", "pip install boto3")
        return
    # Ray's own key: subnets to try in turn.
    machine = {key: value for key, value in node.node_config.items() if key != "SubnetIds"}
    yield from _fits_shape(machine, shape, where)


def _fits_shape(value: Any, shape: Any, where: str) -> Iterator[Finding]:
    """A value against botocore's description of a request."""
    expected = {
        "structure": dict,
        "map": dict,
        "list": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "long": int,
    }.get(shape.type_name)
    if expected is not None and not isinstance(value, expected):
        yield _error(where, f"{value!r} is no {shape.type_name}", f"a {shape.type_name}")
    elif shape.type_name == "structure":
        for key, inner in value.items():
            if key not in shape.members:
                yield _unknown(f"{where}.{key}", key, shape.members)
            else:
                yield from _fits_shape(inner, shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        for position, inner in enumerate(value):
            yield from _fits_shape(inner, shape.member, f"{where}.{position}")
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield _unknown(where, value, shape.enum)


_GCP_KEYS = (
    "advancedMachineFeatures",
    "canIpForward",
    "confidentialInstanceConfig",
    "deletionProtection",
    "description",
    "disks",
    "displayDevice",
    "guestAccelerators",
    "hostname",
    "instanceEncryptionKey",
    "keyRevocationActionType",
    "labels",
    "machineType",
    "metadata",
    "minCpuPlatform",
    "name",
    "networkInterfaces",
    "networkPerformanceConfig",
    "params",
    "privateIpv6GoogleAccess",
    "reservationAffinity",
    "resourcePolicies",
    "scheduling",
    "serviceAccounts",
    "shieldedInstanceConfig",
    "sourceMachineImage",
    "tags",
)
_GCP_SCHEDULING: Mapping[str, tuple[Any, ...]] = {
    "provisioningModel": ("STANDARD", "SPOT", "FLEX_START", "RESERVATION_BOUND"),
    "instanceTerminationAction": ("DELETE", "STOP"),
    "onHostMaintenance": ("MIGRATE", "TERMINATE"),
    "preemptible": (True, False),
    "automaticRestart": (True, False),
    "maxRunDuration": (),
    "terminationTime": (),
    "locationHint": (),
    "minNodeCpus": (),
    "nodeAffinities": (),
    "availabilityDomain": (),
    "localSsdRecoveryTimeout": (),
    "onInstanceStopAction": (),
    "hostErrorTimeoutSeconds": (),
}


def _gcp_node_config(node: NodeType) -> Iterator[Finding]:
    where = f"{node.where}.node_config"
    yield from _unknown_keys(node.node_config, _GCP_KEYS, where)
    scheduling = _merged(node.node_config.get("scheduling"))
    for key, value in scheduling.items():
        if key not in _GCP_SCHEDULING:
            yield _unknown(f"{where}.scheduling.{key}", key, _GCP_SCHEDULING)
        elif (allowed := _GCP_SCHEDULING[key]) and value not in allowed:
            yield _unknown(f"{where}.scheduling.{key}", value, allowed)
    if node.resources.get("GPU") and scheduling.get("onHostMaintenance") != "TERMINATE":
        yield _error(
            f"{where}.scheduling.onHostMaintenance",
            "machines with GPUs cannot be moved, and are refused without this",
            "TERMINATE",
        )


def _azure_node_config(node: NodeType) -> Iterator[Finding]:
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private" / "_azure"
    template = json.loads((folder / "azure-vm-template.json").read_text(encoding="utf-8"))
    known = {*template["parameters"], "availability_zone"}
    where = f"{node.where}.node_config"
    yield from _unknown_keys(node.node_config, ("azure_arm_parameters",), where)
    where += ".azure_arm_parameters"
    given = _mapping(node.node_config.get("azure_arm_parameters"))
    yield from _unknown_keys(given, known, where)
    choices = {"priority": ("Regular", "Spot"), "evictionPolicy": ("Delete", "Deallocate")}
    for key, allowed in choices.items():
        if key in given and given[key] not in allowed:
            yield _unknown(f"{where}.{key}", given[key], allowed)
    if node.spot and given.get("evictionPolicy", "Delete") != "Delete":
        yield _warning(
            f"{where}.evictionPolicy", "disks of machines taken back go on costing", "Delete"
        )


def _spot(launch: Launch) -> Iterator[Finding]:
    for node in launch.types:
        market = _mapping(node.fields.get("labels")).get("market")
        bought = "spot" if node.spot else "on-demand"
        if market is not None and market != bought:
            yield _error(
                f"{node.where}.labels.market",
                f"says {market!r}, but node_config buys {bought}",
                f"{bought!r}, or correct the spot settings of node_config",
            )
        elif market is None and not node.head:
            yield _warning(f"{node.where}.labels.market", "missing", repr(bought))
        if node.spot and "learner" in node.resources:
            yield _error(
                f"{node.where}.node_config",
                "the learner's ranks would lie on spot machines: one that goes ends all of them",
                "on demand",
            )


def _sizes(launch: Launch, prices: PriceTable) -> Iterator[Finding]:
    table = prices.instances.get(launch.provider, {})
    for node in launch.types:
        size = table.get(node.instance)
        if size is None:
            near = difflib.get_close_matches(node.instance, table, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield _warning(
                f"{node.where}.node_config",
                f"no size and price of {node.instance!r} in the price table",
                f"{hint}add a row",
            )
            continue
        for name, has in (("CPU", size.cpus), ("GPU", size.gpus)):
            offered = node.resources.get(name)
            if offered is not None and offered > has:
                yield _error(
                    f"{node.where}.resources.{name}",
                    f"{offered:g} offered, a {node.instance} has {has}",
                    str(has),
                )
        if size.gpus and node.resources.get("GPU", 0) < size.gpus:
            yield _warning(
                f"{node.where}.resources.GPU",
                f"{node.resources.get('GPU', 0):g} of the {size.gpus} GPUs paid for are offered",
                str(size.gpus),
            )


def _images(launch: Launch) -> Iterator[Finding]:
    docker = _mapping(launch.data.get("docker"))
    keys = ("image", "head_image", "worker_image")
    images = [(f"docker.{key}", docker[key]) for key in keys if key in docker]
    for node in launch.types:
        own = _mapping(node.fields.get("docker")).get("worker_image")
        if own is not None:
            images.append((f"{node.where}.docker.worker_image", own))
    for where, image in images:
        if not pinned(str(image)):
            yield _error(where, f"{image!r} is another image tomorrow", "a version tag or a digest")
    for node in launch.types:
        where = f"{node.where}.node_config"
        if launch.provider == "aws" and not node.node_config.get("ImageId"):
            yield _error(
                f"{where}.ImageId",
                "missing: Ray's default is Ubuntu 18.04",
                "an image of your region",
            )
        if launch.provider == "azure":
            arm = _mapping(node.node_config.get("azure_arm_parameters"))
            if arm.get("imageVersion", "latest") == "latest" and "imageId" not in arm:
                yield _warning(
                    f"{where}.azure_arm_parameters.imageVersion",
                    "'latest' is another image tomorrow",
                    "a version (`az vm image list --all`)",
                )
        if launch.provider == "gcp":
            for disk in node.node_config.get("disks") or []:
                made_from = _mapping(_mapping(disk).get("initializeParams"))
                source = str(made_from.get("sourceImage", ""))
                if "/family/" in source:
                    yield _warning(
                        f"{where}.disks", f"{source!r} is another image tomorrow", "an image name"
                    )


def pinned(image: str) -> bool:
    """Whether a container image's name always means the same build (by tag or digest)."""
    if "@sha256:" in image:
        return True
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return tag not in ("", "latest", "nightly", "main", "master")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """One `ray start` among the commands."""

    where: str
    options: Mapping[str, str]
    line: str

    def number(self, option: str, default: int) -> int:
        text = self.options.get(option, "")
        return int(text) if text.isdigit() else default


def _starts(launch: Launch, key: str) -> list[_Start]:
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
                found.append(_Start(where=f"{key}.{position}", options=options, line=str(line)))
    return found


def _start_commands(launch: Launch) -> Iterator[Finding]:
    heads = _starts(launch, "head_start_ray_commands")
    workers = _starts(launch, "worker_start_ray_commands")
    for key, found in (("head_start_ray_commands", heads), ("worker_start_ray_commands", workers)):
        if key in launch.data and len(found) != 1:
            yield _error(key, f"{len(found)} commands `ray start`", "one")
    for start in (*heads, *workers):
        yield from _start_options(start)
    if len(heads) != 1:
        return
    head = heads[0]
    if "--head" not in head.options:
        yield _error(head.where, "--head is missing", "ray start --head")
    config = "~/ray_bootstrap_config.yaml"
    if head.options.get("--autoscaling-config") != config:
        yield _error(
            head.where,
            f"--autoscaling-config is {head.options.get('--autoscaling-config', 'missing')}: no "
            "node would ever be added",
            f"--autoscaling-config={config}",
        )
    if head.options.get("--dashboard-host", "127.0.0.1") not in ("127.0.0.1", "localhost"):
        yield _warning(
            head.where,
            f"the dashboard listens on {head.options['--dashboard-host']}",
            "--dashboard-host=127.0.0.1 and `ray dashboard FILE`, which forwards it",
        )
    port = head.number("--port", 6379)
    for worker in workers:
        address = f"$RAY_HEAD_IP:{port}"
        if worker.options.get("--address", "").replace("${RAY_HEAD_IP}", "$RAY_HEAD_IP") != address:
            yield _error(
                worker.where,
                f"--address is {worker.options.get('--address', 'missing')}",
                f"--address={address}, the head's --port",
            )
        for option in ("--metrics-export-port", "--min-worker-port", "--max-worker-port"):
            ours, theirs = worker.options.get(option), head.options.get(option)
            if ours != theirs:
                yield _error(
                    worker.where,
                    f"{option} is {ours or 'missing'} here and {theirs or 'missing'} on the head",
                    "the same on all nodes",
                )


def _start_options(start: _Start) -> Iterator[Finding]:
    from ray.scripts.scripts import start as ray_start

    known = {name for option in ray_start.params for name in (*option.opts, *option.secondary_opts)}
    for option in start.options:
        if option not in known:
            yield _unknown(start.where, option, known)
    if "--block" in start.options:
        yield _error(start.where, "--block never returns, and ray up waits for it", "leave it out")
    limit = re.search(r"ulimit\s+-n\s+(\d+)", start.line)
    if limit is None or int(limit[1]) < MIN_OPEN_FILES:
        yield _error(
            start.where,
            f"open files: {limit[1] if limit else 'the default, often 1024'}",
            f"ulimit -n {MIN_OPEN_FILES} before ray start",
        )
    if not start.options.get("--metrics-export-port"):
        yield _error(
            start.where,
            "--metrics-export-port is missing: a random port on every node, which Prometheus and "
            "firewalls cannot know",
            "--metrics-export-port=8090",
        )
    low = start.number("--min-worker-port", _WORKER_PORTS[0])
    high = start.number("--max-worker-port", _WORKER_PORTS[1])
    if low >= high:
        yield _error(start.where, f"workers' ports {low}-{high}", "min below max")
    used: dict[int, str] = {}
    for option, text in start.options.items():
        ranged = option in ("--min-worker-port", "--max-worker-port")
        if ranged or not option.endswith("port") or not text.isdigit():
            continue
        number = int(text)
        if low <= number <= high:
            yield _error(
                start.where,
                f"{option}={number} lies among the workers' ports {low}-{high}",
                "a port outside that range",
            )
        if number in used:
            yield _error(start.where, f"{used[number]} and {option} are both {number}", "two ports")
        used[number] = option


def _token(launch: Launch) -> Iterator[Finding]:
    lines = [(where, text) for where, text in _strings(launch.data) if "RAY_AUTH" in text]
    for where, text in lines:
        if re.search(r"RAY_AUTH_TOKEN=(?!\$|[\"']?\$)\S", text):
            yield _error(where, "the token itself stands in the file", "mount the token's file")
        if re.search(r"RAY_AUTH_MODE=[\"']?disabled", text):
            yield _error(where, "token authentication is off", "RAY_AUTH_MODE=token")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for start in _starts(launch, key):
            if not re.search(r"RAY_AUTH_MODE=[\"']?token", start.line):
                yield _error(
                    start.where,
                    "RAY_AUTH_MODE is not set: who reaches a port of Ray can run code",
                    "RAY_AUTH_MODE=token ray start ...",
                )
    mounts = _mapping(launch.data.get("file_mounts"))
    by_path = any("RAY_AUTH_TOKEN_PATH" in text for _, text in lines)
    if not by_path and not any(str(remote).endswith("/.ray/auth_token") for remote in mounts):
        yield _error(
            "file_mounts",
            "the token reaches no node, so that none can join",
            "~/.ray/auth_token: ~/.ray/auth_token",
        )


def _file_mounts(launch: Launch) -> Iterator[Finding]:
    for remote, local in _mapping(launch.data.get("file_mounts")).items():
        path = Path(str(local)).expanduser()
        if not path.exists():
            hint = "`ray get-auth-token --generate`" if path.name == "auth_token" else "make it"
            yield _warning(f"file_mounts.{remote}", f"{local} is not on this machine", hint)
        if path.is_dir():
            excluded = launch.data.get("rsync_exclude") or []
            heavy = [name for name in (".git", ".venv", "runs") if name not in excluded]
            if heavy:
                yield _warning(
                    "rsync_exclude",
                    f"{', '.join(heavy)} of {local} would be copied to every node",
                    f"rsync_exclude: [{', '.join(heavy)}, ...]",
                )


# --------------------------------------------------------------------------- actors


def read_run(path: str | Path) -> RunConfig | ClusterConfig:
    """A run config, or the cluster section of a config of another kind.

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    try:
        found = find_config(path, kind=RunConfig)
    except ConfigError:
        found = Path(path)
    data = read_yaml(found)
    if "rounds" in data:
        return load_config(found, kind=RunConfig)
    return make_config(data.get("cluster") or {}, kind=ClusterConfig, source=f"{found}: cluster")


def actor_asks(run: RunConfig | ClusterConfig) -> dict[str, list[Ask]]:
    """What the actors of a run reserve, by section of `cluster`.

    A replica spread over several GPUs asks for a bundle per rank; of a cluster section alone it is
    not known, and one rank is assumed.
    """
    cluster = run.cluster if isinstance(run, RunConfig) else run
    ranks = {"policy": 1, "ppm": 1}
    if isinstance(run, RunConfig):
        ranks = {"policy": run.policy_engine.num_ranks, "ppm": run.ppm_engine.num_ranks}
    names = {
        "policy": "policy replica",
        "ppm": "PPM replica",
        "sandbox": "sandbox worker",
        "workers": "rollout worker",
        "learner": "learner rank",
    }
    if isinstance(run, RunConfig) and not any(each.preference for each in run.rounds):
        del names["ppm"]
    asks = {}
    for section, name in names.items():
        settings: ActorConfig = getattr(cluster, section)
        if section == "learner":
            # As a worker group takes at least one CPU for each rank.
            settings = settings.model_copy(update={"num_cpus": settings.num_cpus or 1.0})
        bundles = settings.rank_bundles(ranks.get(section, 1))
        of = "rank of a " if len(bundles) > 1 else ""
        asks[section] = [
            Ask(name=of + name, bundle=bundle, count=settings.replicas) for bundle in bundles
        ]
    return asks


def _actors(launch: Launch, run: RunConfig | ClusterConfig) -> Iterator[Finding]:
    cluster = run.cluster if isinstance(run, RunConfig) else run
    asks = actor_asks(run)
    yield from _run_settings(launch, run, cluster)
    for section in asks:
        settings: ActorConfig = getattr(cluster, section)
        if not settings.resources:
            rivals = "any machine with a free GPU" if settings.num_gpus else "any machine"
            yield _warning(
                f"run config: cluster.{section}.resources",
                f"asks for no custom resource, so that its actors may land on {rivals}",
                f"resources: {{{_resource_of(section)}: 1}}",
            )
    asked = {name for several in asks.values() for ask in several for name in ask.bundle}
    for node in launch.types:
        for resource in node.resources:
            if resource not in asked | {"CPU", "GPU", "memory", "head", "object_store_memory"}:
                near = difflib.get_close_matches(resource, asked, n=1)
                every = f"asked for are {', '.join(sorted(asked))}"
                hint = f"did you mean {near[0]!r}?" if near else every
                yield _warning(
                    f"{node.where}.resources.{resource}", "no actor of the run asks for it", hint
                )
        takes_learner = any(_holds(node, ask.bundle) for ask in asks["learner"])
        if node.spot and takes_learner and "learner" not in node.resources:
            yield _error(
                f"{node.where}.node_config",
                "a spot machine that a learner rank fits on: one that goes ends all ranks",
                "give the learner a custom resource that only machines on demand offer",
            )
    machines = [
        NodeResources(name=node.name, total=node.resources, free=node.resources)
        for node in launch.types
        for _ in range(node.count[1])
    ]
    for sentence in explain([ask for several in asks.values() for ask in several], machines):
        yield _error(
            "available_node_types",
            f"not all actors of the run fit on all machines together: {sentence.rstrip('.')}",
            "raise max_workers or the resources of a type, or lower the replicas",
        )
    for pool, scaler in cluster.autoscale.items():
        if pool not in asks:
            continue
        grown = [replace(ask, count=scaler.max_replicas) for ask in asks[pool]]
        others = [ask for section, several in asks.items() if section != pool for ask in several]
        if explain([*grown, *others], machines):
            yield _warning(
                f"run config: cluster.autoscale.{pool}.max_replicas",
                f"{scaler.max_replicas} do not fit on all machines together",
                "raise max_workers of the type, or lower it",
            )


def _run_settings(
    launch: Launch, run: RunConfig | ClusterConfig, cluster: ClusterConfig
) -> Iterator[Finding]:
    if cluster.address == "local":
        yield _error(
            "run config: cluster.address",
            "'local' starts another Ray inside the head and uses no other machine",
            "auto",
        )
    if cluster.spot is None and any(node.spot for node in launch.types):
        yield _warning(
            "run config: cluster.spot",
            "nobody watches for spot notices, so that machines go without being drained",
            "spot: {}",
        )
    if cluster.start_timeout_s < MIN_START_TIMEOUT_S:
        yield _warning(
            "run config: cluster.start_timeout_s",
            f"{cluster.start_timeout_s:g} s is short where a machine has to be bought first",
            "1800",
        )
    if isinstance(run, RunConfig) and not run.run_dir.is_absolute():
        yield _warning(
            "run config: run_dir",
            f"{str(run.run_dir)!r} is relative: each machine would have its own",
            "a folder that all machines mount",
        )


def _resource_of(section: str) -> str:
    return "sandbox" if section == "workers" else section


def _holds(node: NodeType, bundle: Mapping[str, float]) -> bool:
    return all(node.resources.get(name, 0) >= amount for name, amount in bundle.items())


# --------------------------------------------------------------------------- cost


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeCost:
    """What one node type may cost."""

    node: NodeType
    price: float | None
    """Dollars per hour of one, as it is bought; None: not in the table."""
    on_demand: float | None

    def dollars(self, most: bool) -> float:
        """Per hour, with the least or the most machines of the type."""
        return (self.price or 0.0) * self.node.count[most]


def costs(launch: Launch, prices: PriceTable) -> list[TypeCost]:
    """A row for each node type, in the order of the file."""
    table = prices.instances.get(launch.provider, {})
    rows = []
    for node in launch.types:
        size = table.get(node.instance)
        rows.append(
            TypeCost(
                node=node,
                price=size.price(node.spot) if size is not None else None,
                on_demand=size.on_demand if size is not None else None,
            )
        )
    return rows


def price_range(rows: Sequence[TypeCost], max_workers: int) -> tuple[float, float, float]:
    """Dollars per hour of the fewest machines, of the most, and of the most if none were spot.

    The most are bounded by `max_workers` of the whole file: the dearest then count.
    """
    least = sum(row.dollars(most=False) for row in rows)

    def most(on_demand: bool) -> float:
        def price(row: TypeCost) -> float:
            return (row.on_demand if on_demand else row.price) or 0.0

        heads = sum(price(row) for row in rows if row.node.head)
        workers = [price(row) for row in rows for _ in range(row.node.max_workers)]
        return heads + sum(sorted(workers, reverse=True)[:max_workers])

    return least, most(False), most(True)


# --------------------------------------------------------------------------- the command


def run_check(file: Path, console: Console, *, config: Path | None = None, prices: Path) -> bool:
    """Check a launch file and print what was found; True if there is no error."""
    table = read_prices(prices)
    launch = read_launch(file)
    findings = check_launch(launch, table, read_run(config) if config is not None else None)
    _print_costs(launch, table, console, source=prices)
    for finding in findings:
        style = "red" if finding.level is Level.ERROR else "yellow"
        console.print(str(finding), style=style, markup=False, highlight=False, soft_wrap=True)
    errors = sum(finding.level is Level.ERROR for finding in findings)
    against = f" with {config}" if config is not None else ", without a run config"
    console.print(
        f"{file}{against}: {errors} errors, {len(findings) - errors} warnings",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return errors == 0


def _print_costs(launch: Launch, prices: PriceTable, console: Console, source: Path) -> None:
    rows = costs(launch, prices)
    table = Table()
    columns = ("node type", "machine", "market", "machines", "offers", "$/h each", "$/h in all")
    for column in columns:
        table.add_column(column, justify="right" if "$" in column else "left")
    for row in rows:
        least, most = row.node.count
        offers = ", ".join(f"{amount:g} {name}" for name, amount in row.node.resources.items())
        unknown = row.price is None
        table.add_row(
            row.node.name,
            row.node.instance or "?",
            "spot" if row.node.spot else "on demand",
            f"{least}" if least == most else f"{least} to {most}",
            offers,
            "?" if unknown else f"{row.price:,.2f}",
            "?" if unknown else f"{row.dollars(False):,.2f} to {row.dollars(True):,.2f}",
        )
    console.print(table)
    low, high, without_spot = price_range(rows, _whole(launch.data.get("max_workers"), 0))
    known = "" if all(row.price is not None for row in rows) else " of the known ones"
    console.print(
        f"dollars per hour{known}: {low:,.2f} with the fewest machines, {high:,.2f} with the most "
        f"({without_spot:,.2f} if all were on demand); list prices of {prices.as_of}, "
        f"to be checked: {source}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


# --------------------------------------------------------------------------- plain data


def _unknown(where: str, what: Any, valid: Iterable[Any]) -> Finding:
    names = [str(name) for name in valid]
    near = difflib.get_close_matches(str(what), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(names)[:12])}"
    return _error(where, f"unknown: {what!r}", hint)


def _unknown_keys(given: Iterable[str], known: Iterable[str], where: str) -> Iterator[Finding]:
    valid = list(known)
    for key in given:
        if key not in valid:
            yield _unknown(f"{where}.{key}", key, valid)


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in plain data with its path."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _strings(inner, f"{where}.{position}")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _merged(value: Any) -> dict[str, Any]:
    """A mapping, or a list of them, which Ray's own GCP examples use."""
    if isinstance(value, list):
        return {key: inner for part in value for key, inner in _mapping(part).items()}
    return dict(_mapping(value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
