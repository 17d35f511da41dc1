"""The Kubernetes manifests: schema, the restricted pod standard, the sandbox's network, mutants."""

from __future__ import annotations

import copy
import ipaddress
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from cluster.cli import app
from cluster.folder.config_file import make_config
from cluster.machines.placement import NodeResources, explain
from cluster.planning.actor_fit import actor_asks, read_run
from cluster.planning.launch_check import pinned
from cluster.runs.config import RunConfig
from cluster.runs.submit import STOP_WAIT_S
from cluster.serve.config import ServeConfig
from cluster.telemetry.metrics import CATALOGUE, Source

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMA = yaml.safe_load((ROOT / "tests" / "data" / "kuberay_v1.schema.yaml").read_text())
CORE = kubernetes_validate.latest_version()
DRAIN_S = 90
"""RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S of the manifests."""

Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def templates(document: Document) -> Iterator[Document]:
    spec = document.get("spec", {})
    if document["kind"] == "RayJob":
        yield spec["submitterPodTemplate"]
    if document["kind"] == "RayCluster":
        yield spec["headGroupSpec"]["template"]
        yield from (group["template"] for group in spec["workerGroupSpecs"])


def validate(document: Document) -> None:
    """Raise what the API server would say about fields and types."""
    if document["kind"] not in SCHEMA["$defs"]:
        kubernetes_validate.validate(document, CORE, strict=True)
        return
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(document)
    for template in templates(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
        kubernetes_validate.validate(pod | {"template": template}, CORE, strict=True)


def breaches(template: Document) -> list[str]:
    """Where a pod template asks for more than the "restricted" pod security standard allows."""
    spec = template["spec"]
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += ["hostPath" for volume in spec.get("volumes", []) if "hostPath" in volume]
    of_pod = spec.get("securityContext", {})
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if not (own.get("runAsNonRoot") or of_pod.get("runAsNonRoot")):
            found.append("runAsNonRoot")
        profile = own.get("seccompProfile") or of_pod.get("seccompProfile") or {}
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccompProfile")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            found.append("capabilities")
    return found


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_manifest_is_valid_and_asks_for_no_privilege(file: str) -> None:
    for document in documents(file):
        validate(document)
        for template in templates(document):
            assert breaches(template) == []


def cluster() -> Document:
    return documents("raycluster.yaml")[0]


def groups(document: Document) -> dict[str, Document]:
    return {group["groupName"]: group for group in document["spec"]["workerGroupSpecs"]}


def first(template: Document) -> Document:
    container: Document = template["spec"]["containers"][0]
    return container


def head(document: Document) -> Document:
    spec: Document = document["spec"]["headGroupSpec"]
    return spec


def sandbox(document: Document) -> Document:
    return groups(document)["sandbox"]


MUTANTS: dict[str, Callable[[Document], object]] = {
    "misspelt field of the spec": lambda d: d["spec"].update(enableInTreeAutoscalling=True),
    "misspelt field of a group": lambda d: sandbox(d).update(maxReplica=3),
    "misspelt field of a pod": lambda d: sandbox(d)["template"]["spec"].update(tolerance=[]),
    "misspelt field of a container": lambda d: first(head(d)["template"]).update(volumeMount=[]),
    "number as text": lambda d: sandbox(d).update(maxReplicas="8"),
    "text as number": lambda d: sandbox(d)["rayStartParams"].update({"num-cpus": 30}),
    "unknown autoscaler": lambda d: d["spec"]["autoscalerOptions"].update(version="v3"),
    "unknown upscaling": lambda d: d["spec"]["autoscalerOptions"].update(upscalingMode="Fast"),
    "no template": lambda d: head(d).pop("template"),
    "group without a name": lambda d: sandbox(d).pop("groupName"),
    "old version of the API": lambda d: d.update(apiVersion="ray.io/v1alpha1"),
    "port as text": lambda d: first(head(d)["template"])["ports"][0].update(containerPort="http"),
    "unknown authentication": lambda d: d["spec"]["authOptions"].update(mode="password"),
    "name too long": lambda d: d["metadata"].update(name="r" * 60),
}


REFUSALS = (
    jsonschema.ValidationError,
    kubernetes_validate.ValidationError,
    kubernetes_validate.SchemaNotFoundError,
)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_cluster_is_refused(name: str) -> None:
    document = cluster()
    MUTANTS[name](document)
    with pytest.raises(REFUSALS):
        validate(document)


def test_job_must_have_or_choose_one_cluster() -> None:
    job = documents("rayjob.yaml")[0]
    both = copy.deepcopy(job)
    both["spec"]["rayClusterSpec"] = cluster()["spec"]
    none = copy.deepcopy(job)
    del none["spec"]["clusterSelector"]
    for wrong in (both, none):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster()["metadata"]["name"]}


def test_driver_of_the_job_is_started_again_where_the_operator_cannot() -> None:
    """KubeRay refuses a backoffLimit of the job beside clusterSelector."""
    spec = documents("rayjob.yaml")[0]["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    assert "--restarts" in spec["entrypoint"].split()
    env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert env == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}


PRIVILEGES: dict[str, Callable[[Document], object]] = {
    "runAsNonRoot": lambda t: t["spec"]["securityContext"].pop("runAsNonRoot"),
    "seccompProfile": lambda t: t["spec"]["securityContext"].update(
        seccompProfile={"type": "Unconfined"}
    ),
    "allowPrivilegeEscalation": lambda t: first(t)["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "capabilities": lambda t: first(t)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    "hostNetwork": lambda t: t["spec"].update(hostNetwork=True),
    "hostPath": lambda t: t["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
}


@pytest.mark.parametrize("breach", PRIVILEGES)
def test_privilege_is_noticed(breach: str) -> None:
    template = sandbox(cluster())["template"]
    PRIVILEGES[breach](template)
    assert breaches(template) == [breach]


def test_pods_live_longer_than_their_drain() -> None:
    for template in templates(cluster()):
        env = {entry["name"]: entry.get("value") for entry in first(template)["env"]}
        drain_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain_s == DRAIN_S
        assert template["spec"]["terminationGracePeriodSeconds"] > drain_s


def test_pods_of_workers_hold_no_key_to_the_api_server_and_drain_before_they_end() -> None:
    for group in groups(cluster()).values():
        spec = group["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        stop = first(group["template"])["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert "pkill -TERM" in stop


def test_groups_hold_the_actors_of_the_cluster_preset() -> None:
    run = read_run("cluster")
    assert isinstance(run, RunConfig)
    nodes = []
    for group in groups(cluster()).values():
        params = group["rayStartParams"]
        limits = first(group["template"])["resources"]["limits"]
        total = {
            "CPU": float(params["num-cpus"]),
            "GPU": float(limits.get("nvidia.com/gpu", 0)),
            **json.loads(json.loads(params["resources"])),
        }
        assert total["CPU"] == float(limits["cpu"])
        node = NodeResources(name=group["groupName"], total=total, free=total)
        nodes += [node] * group["maxReplicas"]
    assert explain([ask for asks in actor_asks(run).values() for ask in asks], nodes) == []


def test_head_takes_no_work_and_the_learner_is_not_on_spot() -> None:
    assert head(cluster())["rayStartParams"]["num-cpus"] == "0"
    learner = groups(cluster())["learner"]
    assert learner["labels"]["market"] == "on-demand"
    assert "nodeSelector" not in learner["template"]["spec"]


def test_images_are_pinned_and_ports_agree() -> None:
    for document in (*documents("raycluster.yaml"), *documents("rayjob.yaml")):
        for template in templates(document):
            assert pinned(first(template)["image"])
    params = [head(cluster()), *groups(cluster()).values()]
    assert {each["rayStartParams"]["metrics-export-port"] for each in params} == {"8090"}


def reachable(policies: list[Document], pod: dict[str, str]) -> list[Document]:
    """Egress rules that apply to a pod with these labels."""
    return [
        rule
        for policy in policies
        if "Egress" in policy["spec"]["policyTypes"]
        and policy["spec"]["podSelector"]["matchLabels"].items() <= pod.items()
        for rule in policy["spec"].get("egress", [])
    ]


def test_sandbox_pods_reach_only_ray_names_and_the_bucket() -> None:
    policies = documents("network_policy.yaml")
    labels = {"ray.io/cluster": "rstar", "ray.io/group": "sandbox"}
    rules = reachable(policies, labels)
    assert rules, "no rule: the policy's selector does not match what KubeRay labels its pods with"
    for rule in rules:
        for peer in rule["to"]:
            if "ipBlock" in peer:
                network = ipaddress.ip_network(peer["ipBlock"]["cidr"])
                assert network.is_private and network.prefixlen >= 28 and len(rule["to"]) == 1
                assert not network.is_link_local, "the metadata service"
                assert [port["port"] for port in rule["ports"]] == [443]
                continue
            ray = peer.get("podSelector", {}).get("matchLabels") == {"ray.io/cluster": "rstar"}
            names = {port["port"] for port in rule.get("ports", [])} == {53}
            assert ray != names
    assert sandbox(cluster())["groupName"] == labels["ray.io/group"]
    assert reachable(policies, labels | {"ray.io/group": "policy"}) == []


def test_the_token_is_of_a_secret_and_the_same_everywhere() -> None:
    options = cluster()["spec"]["authOptions"]
    job = documents("rayjob.yaml")[0]["spec"]["submitterPodTemplate"]
    env = {entry["name"]: entry for entry in first(job)["env"]}
    reference = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert options == {"mode": "token", "secretName": reference["name"]}
    assert all("auth_token:" not in path.read_text() for path in FOLDER.glob("*.yaml"))


def test_server_is_reached_where_it_listens_and_its_options_are_known() -> None:
    job, service, policy = documents("serve.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["rstar", "serve"]
    command: Any = typer.main.get_command(app)
    given = command.commands["serve"].make_context("serve", words[2:]).params
    make_config(
        {"run_dir": "/r", "policy": "p"}, given["overrides"], kind=ServeConfig, source="serve.yaml"
    )
    assert given["host"] == "0.0.0.0" and given["keys"] is not None
    assert service["spec"]["ports"][0]["targetPort"] == given["port"]
    assert policy["spec"]["ingress"][0]["ports"][0]["port"] == given["port"]
    head = {"ray.io/cluster": cluster()["metadata"]["name"], "ray.io/node-type": "head"}
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == head
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": head["ray.io/cluster"]}


def pods(document: Document) -> dict[str, tuple[dict[str, str], Document]]:
    """Labels as KubeRay sets them, and container, of each kind of pod."""
    name = document["metadata"]["name"]
    at_head = {"ray.io/cluster": name, "ray.io/node-type": "head", "ray.io/group": "headgroup"}
    found = {"head": (at_head, first(head(document)["template"]))}
    for group, fields in groups(document).items():
        labels = {"ray.io/cluster": name, "ray.io/node-type": "worker", "ray.io/group": group}
        found[group] = (labels, first(fields["template"]))
    return found


def open_to_prometheus(policies: list[Document], pod: dict[str, str]) -> set[int] | None:
    """Ports that pods of the namespace `monitoring` reach; None: no policy, so all."""
    chosen = [
        policy["spec"]
        for policy in policies
        if "Ingress" in policy["spec"]["policyTypes"]
        and policy["spec"]["podSelector"]["matchLabels"].items() <= pod.items()
    ]
    monitoring = {"kubernetes.io/metadata.name": "monitoring"}
    ports = {
        port["port"]
        for spec in chosen
        for rule in spec["ingress"]
        for peer in rule["from"]
        if peer.get("namespaceSelector", {}).get("matchLabels") == monitoring
        for port in rule["ports"]
    }
    return ports if chosen else None


def scraped(monitors: list[Document], pod: tuple[dict[str, str], Document]) -> dict[int, str]:
    """Port of a pod -> the label `source` of what is read there."""
    labels, container = pod
    by_name = {port["name"]: port["containerPort"] for port in container["ports"]}
    return {
        by_name[endpoint["port"]]: endpoint["relabelings"][0]["replacement"]
        for monitor in monitors
        if monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        if endpoint["port"] in by_name
    }


def driver_ports() -> dict[str, int]:
    """Where each driver that the manifests start serves its metrics, if others may reach it."""
    ports = {}
    for file in ("rayjob.yaml", "serve.yaml"):
        words = shlex.split(documents(file)[0]["spec"]["entrypoint"])
        told = dict(word.split("=", 1) for word in words if word.startswith("metrics."))
        assert told["metrics.host"] == "0.0.0.0", f"{file}: the loopback is reached by nobody"
        ports[file] = int(told["metrics.port"])
    return ports


def unreached(document: Document, policies: list[Document], monitors: list[Document]) -> set[str]:
    """Exporters that no monitor reads, or that the network policies keep Prometheus from."""
    missing = set()
    found = pods(document)
    exporters = [(f"agent of {kind}", kind, 8090, "ray") for kind in found]
    exporters += [(f"driver of {file}", "head", p, "head") for file, p in driver_ports().items()]
    for name, kind, port, source in exporters:
        may = open_to_prometheus(policies, found[kind][0])
        if scraped(monitors, found[kind]).get(port) != source or (
            may is not None and port not in may
        ):
            missing.add(name)
    return missing


def test_every_exporter_is_reached_by_the_monitors_through_the_policies() -> None:
    policies, monitors = documents("network_policy.yaml"), documents("monitoring.yaml")
    assert unreached(cluster(), policies, monitors) == set()
    ports = driver_ports()
    assert len(set(ports.values())) == len(ports), "two drivers of one head want one port"
    # Each link of the chain is one that can break.
    drivers = {f"driver of {file}" for file in ports}
    assert unreached(cluster(), policies, monitors[:1]) == drivers
    assert len(unreached(cluster(), policies, monitors[1:])) == 5
    closed = copy.deepcopy(policies)
    closed[1]["spec"]["ingress"][-1]["ports"] = [{"protocol": "TCP", "port": 8090}]
    assert unreached(cluster(), closed, monitors) == drivers
    renamed = cluster()
    first(sandbox(renamed)["template"])["ports"][0]["name"] = "metric"
    assert unreached(renamed, policies, monitors) == {"agent of sandbox"}


def test_every_alert_reads_what_the_monitors_scrape() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())["groups"]
    recorded = {r["record"]: r["expr"] for group in rules for r in group["rules"] if "record" in r}
    sources = {name: m.source for m in CATALOGUE.values() for name in m.series_names}
    monitors = documents("monitoring.yaml")
    told = {
        source for pod in pods(cluster()).values() for source in scraped(monitors, pod).values()
    }
    for rule in (rule for group in rules for rule in group["rules"] if "alert" in rule):
        expression = re.sub(r"run:[\w:]+", lambda name: recorded[name[0]], rule["expr"])
        read = {sources[name] for name in re.findall(r"\b(?:ray_)?rstar_\w+", expression)}
        needed = {{Source.ACTOR: "ray", Source.DRIVER: "head"}[source] for source in read}
        if "up{" in expression:
            needed.add("ray")
        assert needed and needed <= told, rule["alert"]
    labels = {label for metric in CATALOGUE.values() for label in metric.labels} | {"run"}
    own = {"namespace", "pod", "container", "endpoint", "job", "instance", "source"}
    assert labels.isdisjoint(own), "Prometheus would rename them to exported_..."


def test_rules_become_what_the_operator_loads() -> None:
    text = (FOLDER / "monitoring.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^#   (\{ printf .*) \| kubectl apply -f -$", text, re.MULTILINE)
    made = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, check=True).stdout
    resource = yaml.safe_load(made)
    assert resource["kind"] == "PrometheusRule" and resource["metadata"]["namespace"] == "rstar"
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    assert resource["spec"] == rules


def test_sandbox_pods_are_somebody_else_to_the_bucket_and_mount_nothing_shared() -> None:
    accounts = {
        document["metadata"]["name"]: document
        for document in documents("namespace.yaml")
        if document["kind"] == "ServiceAccount"
    }
    used = {"head": head(cluster())["template"]["spec"]["serviceAccountName"]}
    for group, fields in groups(cluster()).items():
        spec = fields["template"]["spec"]
        used[group] = spec["serviceAccountName"]
        assert {kind for v in spec["volumes"] for kind in v if kind != "name"} == {"emptyDir"}
    assert set(used.values()) == accounts.keys()
    assert [group for group, name in used.items() if name == used["sandbox"]] == ["sandbox"]
    roles = accounts[used["sandbox"]]["metadata"]["annotations"]
    for name, account in accounts.items():
        if name != used["sandbox"]:
            assert roles.keys() == account["metadata"]["annotations"].keys()
            assert not set(roles.values()) & set(account["metadata"]["annotations"].values())
        if name != used["head"]:  # the autoscaler in its pod asks the API server
            assert account["automountServiceAccountToken"] is False
    job = documents("rayjob.yaml")[0]["spec"]["entrypoint"]
    assert re.search(r"--set run_dir=(s3|gs|az)://", job)
