"""Ray's own AWS launcher takes the shipped file: network, keys, machines; AWS is an imitation.

The imitation (moto) starts one machine where Ray asks for several, so numbers are not compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml

ROOT = Path(__file__).parents[2]
REGION = "us-east-1"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    # Ray writes a private key there.
    monkeypatch.setenv("HOME", str(tmp_path))
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield


def prepared() -> dict[str, Any]:
    """The shipped file with an image that the imitation knows, and the roles it names."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text(encoding="utf-8"))
    image = boto3.client("ec2", region_name=REGION).describe_images()["Images"][0]["ImageId"]
    iam = boto3.client("iam")
    for name in ("rstar-head", "rstar-run", "rstar-sandbox"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    data = copy.deepcopy(data)
    for kind in data["available_node_types"].values():
        kind["node_config"] = {**kind["node_config"], "ImageId": image}
    data["file_mounts"] = {}
    return data


def test_launcher_buys_spot_and_on_demand_as_written_and_opens_only_ssh(aws: None) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.commands import _bootstrap_config

    config = _bootstrap_config(prepared(), no_config_cache=True)
    types = config["available_node_types"]
    assert {"head", "gpu_policy", "gpu_ppm", "cpu_sandbox", "learner"} <= set(types)
    for kind in types.values():
        assert kind["node_config"]["SubnetIds"] and kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["KeyName"]
    # What the file says about resources stands beside what Ray finds out about the machine.
    policy = types["gpu_policy"]["resources"]
    assert (policy["CPU"], policy["GPU"], policy["policy"]) == (48, 4, 4)
    assert types["head"]["resources"]["CPU"] == 0

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    market = {}
    for name in ("gpu_policy", "cpu_sandbox", "learner"):
        tags = {"ray-node-type": "worker", "ray-user-node-type": name}
        provider.create_node(types[name]["node_config"], tags, 1)
        (node,) = provider.non_terminated_nodes({"ray-user-node-type": name})
        machine = boto3.resource("ec2", region_name=REGION).Instance(node)
        market[name] = machine.instance_lifecycle
        assert machine.instance_type == types[name]["node_config"]["InstanceType"]
        provider.terminate_node(node)
    assert market == {"gpu_policy": "spot", "cpu_sandbox": "spot", "learner": None}
    assert provider.non_terminated_nodes({}) == []

    # Ports other than that of ssh, the metrics port among them, are open among the machines alone.
    group = types["head"]["node_config"]["SecurityGroupIds"]
    rules = boto3.client("ec2", region_name=REGION).describe_security_groups(GroupIds=group)
    world = [
        (rule.get("FromPort"), rule.get("ToPort"))
        for found in rules["SecurityGroups"]
        for rule in found["IpPermissions"]
        if any(r["CidrIp"] == "0.0.0.0/0" for r in rule["IpRanges"])
    ]
    assert world == [(22, 22)]
