"""`node_config` of a launch file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.planning.findings import Finding, error, unknown, warning
from cluster.planning.launch_file import Launch, NodeType, mapping, merged


def node_configs_fit(launch: Launch) -> Iterator[Finding]:
    check = {"aws": _aws_node_config, "gcp": _gcp_node_config, "azure": _azure_node_config}
    if launch.provider not in check:
        yield warning(
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
        yield warning(where, "not checked: botocore is not installed", "pip install boto3")
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
        yield error(where, f"{value!r} is no {shape.type_name}", f"a {shape.type_name}")
    elif shape.type_name == "structure":
        for key, inner in value.items():
            if key not in shape.members:
                yield unknown(f"{where}.{key}", key, shape.members)
            else:
                yield from _fits_shape(inner, shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        for position, inner in enumerate(value):
            yield from _fits_shape(inner, shape.member, f"{where}.{position}")
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield unknown(where, value, shape.enum)


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
    scheduling = merged(node.node_config.get("scheduling"))
    for key, value in scheduling.items():
        if key not in _GCP_SCHEDULING:
            yield unknown(f"{where}.scheduling.{key}", key, _GCP_SCHEDULING)
        elif (allowed := _GCP_SCHEDULING[key]) and value not in allowed:
            yield unknown(f"{where}.scheduling.{key}", value, allowed)
    if node.resources.get("GPU") and scheduling.get("onHostMaintenance") != "TERMINATE":
        yield error(
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
    given = mapping(node.node_config.get("azure_arm_parameters"))
    yield from _unknown_keys(given, known, where)
    choices = {"priority": ("Regular", "Spot"), "evictionPolicy": ("Delete", "Deallocate")}
    for key, allowed in choices.items():
        if key in given and given[key] not in allowed:
            yield unknown(f"{where}.{key}", given[key], allowed)
    if node.spot and given.get("evictionPolicy", "Delete") != "Delete":
        yield warning(
            f"{where}.evictionPolicy", "disks of machines taken back go on costing", "Delete"
        )


def _unknown_keys(given: Iterable[str], known: Iterable[str], where: str) -> Iterator[Finding]:
    valid = list(known)
    for key in given:
        if key not in valid:
            yield unknown(f"{where}.{key}", key, valid)
