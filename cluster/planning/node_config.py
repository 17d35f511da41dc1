"""`node_config` of a launch file against the provider's own description of a machine.

AWS: the request's shape from botocore, which `ray up` needs too. Azure: the template that comes
with Ray. GCP: a list of names, which knows the top level and `scheduling`. All three are walked as
one kind of description, botocore's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.planning.findings import Finding, error, unknown, warning
from cluster.planning.launch_file import Launch, NodeType, merged


def node_configs_fit(launch: Launch) -> Iterator[Finding]:
    """What the provider would refuse, or take for something else."""
    check = {"aws": _aws, "gcp": _gcp, "azure": _azure}
    if launch.provider not in check:
        yield warning(
            "provider.type",
            f"node_config of {launch.provider!r} is not checked",
            f"checked are {', '.join(check)}",
        )
        return
    for node in launch.types:
        yield from check[launch.provider](node, f"{node.where}.node_config")


@dataclass(frozen=True, slots=True)
class _Shape:
    """A description made here, with the fields of botocore's that are looked at."""

    members: Mapping[str, _Shape] = field(default_factory=dict)
    """Keys; none: any."""
    enum: tuple[Any, ...] = ()
    """Values; none: any."""
    type_name: str = "any"


def _keys(names: Iterable[str], **known: _Shape) -> _Shape:
    return _Shape({**dict.fromkeys(names, _Shape()), **known})


def _one_of(*values: Any) -> _Shape:
    return _Shape(enum=values)


_TYPES = {"structure": dict, "list": list, "string": str, "boolean": bool, "integer": int}


def _misfits(value: Any, shape: Any, where: str) -> Iterator[Finding]:
    """What of a value is not as described."""
    expected = _TYPES.get(shape.type_name)
    if expected is not None and not isinstance(value, expected):
        yield error(where, f"{value!r} is no {shape.type_name}", f"a {shape.type_name}")
    elif shape.type_name == "list":
        for position, inner in enumerate(value):
            yield from _misfits(inner, shape.member, f"{where}.{position}")
    elif members := getattr(shape, "members", None):
        for key, inner in value.items():
            if key not in members:
                yield unknown(f"{where}.{key}", key, members)
            else:
                yield from _misfits(inner, members[key], f"{where}.{key}")
    elif (enum := getattr(shape, "enum", None)) and value not in enum:
        yield unknown(where, value, enum)


@functools.cache
def _run_instances() -> Any:
    """The shape of AWS's request for machines; reading its description takes a second."""
    from botocore.session import Session

    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _aws(node: NodeType, where: str) -> Iterator[Finding]:
    try:
        shape = _run_instances()
    except ImportError:
        yield warning(where, "not checked: botocore is not installed", "pip install boto3")
        return
    # Ray's own key: subnets to try in turn.
    machine = {key: value for key, value in node.node_config.items() if key != "SubnetIds"}
    yield from _misfits(machine, shape, where)


_GCP_NAMES = """
advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection description disks
displayDevice guestAccelerators hostname instanceEncryptionKey keyRevocationActionType labels
machineType metadata minCpuPlatform name networkInterfaces networkPerformanceConfig params
privateIpv6GoogleAccess reservationAffinity resourcePolicies serviceAccounts shieldedInstanceConfig
sourceMachineImage tags
"""
_GCP_SCHEDULING_NAMES = """
maxRunDuration terminationTime locationHint minNodeCpus nodeAffinities availabilityDomain
localSsdRecoveryTimeout onInstanceStopAction hostErrorTimeoutSeconds
"""
_GCP = _keys(
    _GCP_NAMES.split(),
    scheduling=_keys(
        _GCP_SCHEDULING_NAMES.split(),
        provisioningModel=_one_of("STANDARD", "SPOT", "FLEX_START", "RESERVATION_BOUND"),
        instanceTerminationAction=_one_of("DELETE", "STOP"),
        onHostMaintenance=_one_of("MIGRATE", "TERMINATE"),
        preemptible=_one_of(True, False),
        automaticRestart=_one_of(True, False),
    ),
)


def _gcp(node: NodeType, where: str) -> Iterator[Finding]:
    scheduling = merged(node.node_config.get("scheduling"))
    yield from _misfits({**node.node_config, "scheduling": scheduling}, _GCP, where)
    if node.resources.get("GPU") and scheduling.get("onHostMaintenance") != "TERMINATE":
        yield error(
            f"{where}.scheduling.onHostMaintenance",
            "machines with GPUs cannot be moved, and are refused without this",
            "TERMINATE",
        )


@functools.cache
def _azure_template() -> _Shape:
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private" / "_azure"
    template = json.loads((folder / "azure-vm-template.json").read_text(encoding="utf-8"))
    parameters = _keys(
        (*template["parameters"], "availability_zone"),
        priority=_one_of("Regular", "Spot"),
        evictionPolicy=_one_of("Delete", "Deallocate"),
    )
    return _keys((), azure_arm_parameters=parameters)


def _azure(node: NodeType, where: str) -> Iterator[Finding]:
    given = {**node.node_config, "azure_arm_parameters": node.machine}
    yield from _misfits(given, _azure_template(), where)
    if node.spot and node.machine.get("evictionPolicy", "Delete") != "Delete":
        yield warning(
            f"{where}.azure_arm_parameters.evictionPolicy",
            "disks of machines taken back go on costing",
            "Delete",
        )
