"""`rstar cluster check`: the shipped launch files pass, and each mistake in them is told."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.fleet.config import ClusterConfig
from cluster.machines.prices import PriceTable, read_prices
from cluster.planning.actor_fit import actor_asks, read_run
from cluster.planning.findings import Finding, Severity
from cluster.planning.launch_check import check_launch, pinned, run_check
from cluster.planning.launch_file import Launch, read_launch
from cluster.runs.config import RunConfig

ROOT = Path(__file__).parents[4]
AWS = ROOT / "ray_cluster.yaml"
GCP = ROOT / "deploy" / "gcp_cluster.yaml"
AZURE = ROOT / "deploy" / "azure_cluster.yaml"
FILES = {"aws": AWS, "gcp": GCP, "azure": AZURE}
PRICES = ROOT / "deploy" / "prices.yaml"

Mutation = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def prices() -> PriceTable:
    return read_prices(PRICES)


@pytest.fixture(scope="module")
def run() -> RunConfig | ClusterConfig:
    return read_run("cluster")


_UNTOUCHED: dict[str, list[Finding]] = {}


def untouched(provider: str, prices: PriceTable, run: RunConfig) -> list[Finding]:
    """Findings of a shipped file, made once."""
    if provider not in _UNTOUCHED:
        _UNTOUCHED[provider] = check_launch(read_launch(FILES[provider]), prices, run)
    return _UNTOUCHED[provider]


def written(tmp_path: Path, data: dict[str, Any]) -> Launch:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return read_launch(file)


def node(data: dict[str, Any], name: str) -> dict[str, Any]:
    fields: dict[str, Any] = data["available_node_types"][name]
    return fields


def machine(data: dict[str, Any], name: str) -> dict[str, Any]:
    config: dict[str, Any] = node(data, name)["node_config"]
    return config


def in_starts(old: str, new: str, *which: str) -> Mutation:
    def mutate(data: dict[str, Any]) -> None:
        for key in which or ("head_start_ray_commands", "worker_start_ray_commands"):
            changed = [line.replace(old, new) for line in data[key]]
            assert changed != data[key]
            data[key] = changed

    return mutate


HEAD, WORKER = "head_start_ray_commands", "worker_start_ray_commands"


@pytest.mark.parametrize("provider", FILES)
def test_shipped_file_has_no_error_and_only_placeholders_to_fill_in(
    provider: str, prices: PriceTable, run: RunConfig
) -> None:
    findings = check_launch(read_launch(FILES[provider]), prices, run)
    assert [str(f) for f in findings if f.severity is Severity.ERROR] == []
    others = [f for f in findings if "placeholder" not in f.wrong]
    others = [f for f in others if not f.where.endswith("auth_token")]
    if provider == "azure":
        others = [f for f in others if "one identity" not in f.wrong]
    assert [str(f) for f in others] == []
    assert any("placeholder" in f.wrong for f in findings)


@pytest.mark.parametrize("provider", FILES)
def test_shipped_file_offers_every_resource_that_the_cluster_preset_asks_for(
    provider: str, run: RunConfig
) -> None:
    asked = {name for asks in actor_asks(run).values() for ask in asks for name in ask.bundle}
    offered = {name for kind in read_launch(FILES[provider]).types for name in kind.resources}
    assert asked <= offered
    assert {"policy", "ppm", "sandbox", "learner"} <= asked


def pop(*keys: str) -> Mutation:
    def mutate(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return mutate


def put(value: Any, *keys: str) -> Mutation:
    def mutate(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return mutate


TYPES = "available_node_types"
AWS_MUTANTS: dict[str, tuple[Mutation, Severity, str, str]] = {
    # Ray's own schema
    "unknown key at the top": (put(1, "max_worker"), Severity.ERROR, "top level", "max_worker"),
    "unknown key of a type": (
        put(1, TYPES, "learner", "idle_timeout"),
        Severity.ERROR,
        f"{TYPES}.learner",
        "idle_timeout",
    ),
    "fractional resource": (
        put(0.5, TYPES, "learner", "resources", "learner"),
        Severity.ERROR,
        f"{TYPES}.learner.resources.learner",
        "not of type 'integer'",
    ),
    "unknown head type": (
        put("haed", "head_node_type"),
        Severity.ERROR,
        "top level",
        "head_node_type",
    ),
    "more nodes at once than allowed": (
        put(50, TYPES, "gpu_policy", "min_workers"),
        Severity.ERROR,
        "top level",
        "max_workers",
    ),
    # node_config, where Ray's schema is blind
    "misspelt spot section": (
        lambda d: machine(d, "gpu_policy").update(
            InstanceMarketOption=machine(d, "gpu_policy").pop("InstanceMarketOptions")
        ),
        Severity.ERROR,
        f"{TYPES}.gpu_policy.node_config.InstanceMarketOption",
        "did you mean 'InstanceMarketOptions'",
    ),
    "misspelt market": (
        put({"MarketType": "sport"}, TYPES, "gpu_ppm", "node_config", "InstanceMarketOptions"),
        Severity.ERROR,
        f"{TYPES}.gpu_ppm.node_config.InstanceMarketOptions.MarketType",
        "did you mean 'spot'",
    ),
    "misspelt spot option": (
        put(
            {"MarketType": "spot", "SpotOptions": {"MaxPrize": "1"}},
            *(TYPES, "gpu_ppm", "node_config", "InstanceMarketOptions"),
        ),
        Severity.ERROR,
        f"{TYPES}.gpu_ppm.node_config.InstanceMarketOptions.SpotOptions.MaxPrize",
        "did you mean 'MaxPrice'",
    ),
    "wrong kind of value": (
        put("yes", TYPES, "learner", "node_config", "EbsOptimized"),
        Severity.ERROR,
        f"{TYPES}.learner.node_config.EbsOptimized",
        "no boolean",
    ),
    "no machine image": (
        pop(TYPES, "learner", "node_config", "ImageId"),
        Severity.ERROR,
        f"{TYPES}.learner.node_config.ImageId",
        "Ubuntu 18.04",
    ),
    # spot
    "label says spot, bought on demand": (
        pop(TYPES, "gpu_policy", "node_config", "InstanceMarketOptions"),
        Severity.ERROR,
        f"{TYPES}.gpu_policy.labels.market",
        "buys on-demand",
    ),
    "learner on spot": (
        put({"MarketType": "spot"}, TYPES, "learner", "node_config", "InstanceMarketOptions"),
        Severity.ERROR,
        f"{TYPES}.learner.node_config",
        "ends all of them",
    ),
    "head on spot": (
        put({"MarketType": "spot"}, TYPES, "head", "node_config", "InstanceMarketOptions"),
        Severity.ERROR,
        f"{TYPES}.head.node_config",
        "the head is a spot machine",
    ),
    "a label of another machine": (
        put("g6e.12xlarge", TYPES, "gpu_ppm", "labels", "machine"),
        Severity.ERROR,
        f"{TYPES}.gpu_ppm.labels.machine",
        "says 'g6e.12xlarge'",
    ),
    "no market label": (
        pop(TYPES, "gpu_ppm", "labels"),
        Severity.WARNING,
        f"{TYPES}.gpu_ppm.labels.market",
        "missing",
    ),
    # numbers
    "min above max": (
        put(3, TYPES, "learner", "min_workers"),
        Severity.ERROR,
        f"{TYPES}.learner.min_workers",
        "3 is more than max_workers 1",
    ),
    "no max_workers": (
        pop(TYPES, "learner", "max_workers"),
        Severity.WARNING,
        f"{TYPES}.learner.max_workers",
        "Ray fills in 43",
    ),
    "head type as worker": (
        put(2, TYPES, "head", "max_workers"),
        Severity.ERROR,
        f"{TYPES}.head.max_workers",
        "2 further machines",
    ),
    "types may have more than all": (
        put(20, "max_workers"),
        Severity.WARNING,
        "max_workers",
        "the 43",
    ),
    "head takes work": (
        put(8, TYPES, "head", "resources", "CPU"),
        Severity.ERROR,
        f"{TYPES}.head.resources.CPU",
        "8 CPUs",
    ),
    "head takes all work": (
        pop(TYPES, "head", "resources", "CPU"),
        Severity.ERROR,
        f"{TYPES}.head.resources.CPU",
        "all of its CPUs",
    ),
    # sizes
    "more GPUs than the machine has": (
        put(8, TYPES, "gpu_policy", "resources", "GPU"),
        Severity.ERROR,
        f"{TYPES}.gpu_policy.resources.GPU",
        "a g6e.12xlarge has 4",
    ),
    "GPUs that are paid for and not offered": (
        put(4, TYPES, "learner", "resources", "GPU"),
        Severity.WARNING,
        f"{TYPES}.learner.resources.GPU",
        "4 of the 8 GPUs",
    ),
    "unknown machine": (
        put("g6e.12xlrage", TYPES, "gpu_policy", "node_config", "InstanceType"),
        Severity.WARNING,
        f"{TYPES}.gpu_policy.node_config",
        "price table",
    ),
    # images
    "unpinned container": (
        put({"image": "rstar-cluster:latest", "container_name": "rstar"}, "docker"),
        Severity.ERROR,
        "docker.image",
        "another image tomorrow",
    ),
    # commands
    "no autoscaling config": (
        in_starts("--autoscaling-config=~/ray_bootstrap_config.yaml", "", HEAD),
        Severity.ERROR,
        f"{HEAD}.1",
        "no node would ever be added",
    ),
    "metrics port among the workers' ports": (
        in_starts("--metrics-export-port=8090", "--metrics-export-port=18080"),
        Severity.ERROR,
        f"{HEAD}.1",
        "18080 lies among the workers' ports 10002-19999",
    ),
    "metrics port differs": (
        in_starts("--metrics-export-port=8090", "--metrics-export-port=8091", WORKER),
        Severity.ERROR,
        f"{WORKER}.1",
        "8091 here and 8090 on the head",
    ),
    "no metrics port": (
        in_starts("--metrics-export-port=8090", "", WORKER),
        Severity.ERROR,
        f"{WORKER}.1",
        "--metrics-export-port is missing",
    ),
    "workers join another port": (
        in_starts("$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6380", WORKER),
        Severity.ERROR,
        f"{WORKER}.1",
        "--address=$RAY_HEAD_IP:6379",
    ),
    "two services on one port": (
        in_starts("--port=6379", "--port=8090", HEAD),
        Severity.ERROR,
        f"{HEAD}.1",
        "are both 8090",
    ),
    "misspelt option": (
        in_starts("--dashboard-host", "--dashbord-host", HEAD),
        Severity.ERROR,
        f"{HEAD}.1",
        "did you mean '--dashboard-host'",
    ),
    "command that never returns": (
        in_starts("ray start", "ray start --block", WORKER),
        Severity.ERROR,
        f"{WORKER}.1",
        "--block never returns",
    ),
    "few open files": (
        in_starts("ulimit -n 65536; ", "", WORKER),
        Severity.ERROR,
        f"{WORKER}.1",
        "open files",
    ),
    "open dashboard": (
        in_starts("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", HEAD),
        Severity.WARNING,
        f"{HEAD}.1",
        "listens on 0.0.0.0",
    ),
    "no ray start": (put(["ray stop"], WORKER), Severity.ERROR, WORKER, "0 commands `ray start`"),
    "Ray's own setup commands": (
        pop("setup_commands"),
        Severity.ERROR,
        "setup_commands",
        "nightly",
    ),
    # token
    "token switched off": (
        in_starts("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", WORKER),
        Severity.ERROR,
        f"{WORKER}.1",
        "authentication is off",
    ),
    "token mode not asked for": (
        in_starts("RAY_AUTH_MODE=token ", "", HEAD),
        Severity.ERROR,
        f"{HEAD}.1",
        "RAY_AUTH_MODE is not set",
    ),
    "token in the file": (
        in_starts("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123abcd"),
        Severity.ERROR,
        f"{HEAD}.1",
        "the token itself stands in the file",
    ),
    "token not distributed": (
        pop("file_mounts", "~/.ray/auth_token"),
        Severity.ERROR,
        "file_mounts",
        "reaches no node",
    ),
    "environment copied to every node": (
        lambda d: (put(str(ROOT), "file_mounts", "~/x")(d), put([".venv"], "rsync_exclude")(d)),
        Severity.WARNING,
        "rsync_exclude",
        ".git",
    ),
    "code kept back": (
        lambda d: (put(str(ROOT), "file_mounts", "~/x")(d), put(["runs"], "rsync_exclude")(d)),
        Severity.ERROR,
        "rsync_exclude",
        "cluster/runs",
    ),
    # the run's actors
    "misspelt resource": (
        lambda d: [
            node(d, name)["resources"].update(polcy=node(d, name)["resources"].pop("policy"))
            for name in ("gpu_policy", "gpu_policy_large")
        ],
        Severity.ERROR,
        TYPES,
        "no node has policy",
    ),
    "too few nodes": (
        lambda d: (
            pop(TYPES, "gpu_policy_large")(d),
            put(2, TYPES, "gpu_policy", "max_workers")(d),
        ),
        Severity.ERROR,
        TYPES,
        "policy replica (16 x 1 GPU, 1 policy): only 8 fit",
    ),
    # spot capacity
    "one kind of machine": (
        pop(TYPES, "gpu_ppm_large"),
        Severity.WARNING,
        f"{TYPES}.gpu_ppm.node_config",
        "'ppm' is offered by one kind of spot machine",
    ),
    # what every machine runs
    "no image": (pop("docker"), Severity.WARNING, "docker", "installs what it runs"),
    # what code that left its sandbox would find
    "sandbox machines mount a file system": (
        put(["sudo mount -t nfs4 fs:/ /mnt/shared"], "setup_commands"),
        Severity.ERROR,
        "setup_commands.0",
        "step code that got out could write",
    ),
    "sandbox containers mount a file system": (
        lambda d: d["docker"]["run_options"].append("-v=/mnt/shared:/mnt/shared"),
        Severity.ERROR,
        "docker.run_options.3",
        "step code that got out could write",
    ),
    "sandbox machines without identity": (
        pop(TYPES, "cpu_sandbox", "node_config", "IamInstanceProfile"),
        Severity.ERROR,
        f"{TYPES}.cpu_sandbox.node_config.IamInstanceProfile",
        "workers cannot reach s3://",
    ),
    "sandbox machines with the engines' identity": (
        put({"Name": "rstar-run"}, TYPES, "cpu_sandbox", "node_config", "IamInstanceProfile"),
        Severity.ERROR,
        f"{TYPES}.cpu_sandbox.node_config",
        "'rstar-run' as others are",
    ),
    "no policy": (
        pop("metadata", "sandbox_policy"),
        Severity.WARNING,
        "metadata.sandbox_policy",
        "is not checked",
    ),
    "wide policy": (
        put(str(ROOT / "deploy" / "policies" / "aws_run.json"), "metadata", "sandbox_policy"),
        Severity.ERROR,
        f"metadata.sandbox_policy {ROOT / 'deploy' / 'policies' / 'aws_run.json'}",
        "replace EDIT-bucket/runs/*",
    ),
    "policy that is not there": (
        put("nowhere.json", "metadata", "sandbox_policy"),
        Severity.ERROR,
        "metadata.sandbox_policy",
        "nowhere.json: cannot be read",
    ),
    "resource of no actor": (
        put(1, TYPES, "cpu_sandbox", "resources", "sandbix"),
        Severity.WARNING,
        f"{TYPES}.cpu_sandbox.resources.sandbix",
        "no actor of the run asks for it; did you mean 'sandbox'?",
    ),
}


def assert_found(
    findings: list[Finding], severity: Severity, where: str, message: str, unchanged: list[Finding]
) -> None:
    new = [f for f in findings if f not in unchanged]
    assert any(
        f.severity is severity and f.where == where and message in f"{f.wrong}; {f.right}"
        for f in new
    ), [str(f) for f in new]


@pytest.mark.parametrize("name", AWS_MUTANTS)
def test_each_mistake_in_the_aws_file_is_told_with_its_place(
    name: str, tmp_path: Path, prices: PriceTable, run: RunConfig
) -> None:
    mutate, severity, where, message = AWS_MUTANTS[name]
    unchanged = untouched("aws", prices, run)
    # Aliases of one anchor are one object, which a mutation must not change everywhere.
    data = yaml.safe_load(yaml.dump(copy.deepcopy(dict(read_launch(AWS).data)), Dumper=_NoAliases))
    mutate(data)
    assert_found(
        check_launch(written(tmp_path, data), prices, run), severity, where, message, unchanged
    )


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


GPU_NODE = f"{TYPES}.gpu_policy.node_config"
OTHER_MUTANTS: dict[str, tuple[str, Mutation, Severity, str, str]] = {
    "gcp: misspelt key": (
        "gcp",
        put({}, TYPES, "gpu_policy", "node_config", "schedulling"),
        Severity.ERROR,
        f"{GPU_NODE}.schedulling",
        "did you mean 'scheduling'",
    ),
    "gcp: misspelt spot": (
        "gcp",
        put("SPOTT", TYPES, "gpu_policy", "node_config", "scheduling", "provisioningModel"),
        Severity.ERROR,
        f"{GPU_NODE}.scheduling.provisioningModel",
        "did you mean 'SPOT'",
    ),
    "gcp: misspelt key of scheduling": (
        "gcp",
        put("SPOT", TYPES, "gpu_policy", "node_config", "scheduling", "provisionModel"),
        Severity.ERROR,
        f"{GPU_NODE}.scheduling.provisionModel",
        "did you mean 'provisioningModel'",
    ),
    "gcp: machine with GPUs that is to be moved": (
        "gcp",
        put("MIGRATE", TYPES, "gpu_policy", "node_config", "scheduling", "onHostMaintenance"),
        Severity.ERROR,
        f"{GPU_NODE}.scheduling.onHostMaintenance",
        "TERMINATE",
    ),
    "gcp: image family": (
        "gcp",
        lambda d: machine(d, "head")["disks"][0]["initializeParams"].update(
            sourceImage="projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
        ),
        Severity.WARNING,
        f"{TYPES}.head.node_config.disks",
        "another image tomorrow",
    ),
    "azure: misspelt key": (
        "azure",
        put("Spot", TYPES, "gpu_policy", "node_config", "azure_arm_parameters", "priorty"),
        Severity.ERROR,
        f"{GPU_NODE}.azure_arm_parameters.priorty",
        "did you mean 'priority'",
    ),
    "azure: misspelt spot": (
        "azure",
        put("spot", TYPES, "gpu_policy", "node_config", "azure_arm_parameters", "priority"),
        Severity.ERROR,
        f"{GPU_NODE}.azure_arm_parameters.priority",
        "did you mean 'Spot'",
    ),
    "azure: key beside the parameters": (
        "azure",
        put("Standard_D8s_v5", TYPES, "gpu_policy", "node_config", "vmSize"),
        Severity.ERROR,
        f"{GPU_NODE}.vmSize",
        "azure_arm_parameters",
    ),
    "azure: disks stay": (
        "azure",
        put(
            "Deallocate",
            *(TYPES, "gpu_policy", "node_config", "azure_arm_parameters", "evictionPolicy"),
        ),
        Severity.WARNING,
        f"{GPU_NODE}.azure_arm_parameters.evictionPolicy",
        "go on costing",
    ),
    "azure: newest image": (
        "azure",
        put("latest", *(TYPES, "head", "node_config", "azure_arm_parameters", "imageVersion")),
        Severity.WARNING,
        f"{TYPES}.head.node_config.azure_arm_parameters.imageVersion",
        "another image tomorrow",
    ),
}


@pytest.mark.parametrize("name", OTHER_MUTANTS)
def test_each_mistake_in_the_gcp_and_azure_files_is_told_with_its_place(
    name: str, tmp_path: Path, prices: PriceTable, run: RunConfig
) -> None:
    provider, mutate, severity, where, message = OTHER_MUTANTS[name]
    launch = read_launch(FILES[provider])
    unchanged = untouched(provider, prices, run)
    data = yaml.safe_load(yaml.dump(copy.deepcopy(dict(launch.data)), Dumper=_NoAliases))
    mutate(data)
    assert_found(
        check_launch(written(tmp_path, data), prices, run), severity, where, message, unchanged
    )


RUN_MUTANTS: dict[str, tuple[dict[str, Any], Severity, str, str]] = {
    "embedded Ray": ({"address": "local"}, Severity.ERROR, "cluster.address", "auto"),
    "no spot watcher": ({"spot": None}, Severity.WARNING, "cluster.spot", "without being drained"),
    "little patience": (
        {"start_timeout_s": 60},
        Severity.WARNING,
        "cluster.start_timeout_s",
        "has to be bought first",
    ),
    "actors without a custom resource": (
        {"sandbox": {"replicas": 4}},
        Severity.WARNING,
        "cluster.sandbox.resources",
        "any machine",
    ),
    "growth beyond the nodes": (
        {"autoscale": {"policy": {"max_replicas": 81}}},
        Severity.WARNING,
        "cluster.autoscale.policy.max_replicas",
        "81 do not fit",
    ),
}


@pytest.mark.parametrize("name", RUN_MUTANTS)
def test_run_config_that_does_not_suit_the_cluster_is_told(
    name: str, prices: PriceTable, run: RunConfig
) -> None:
    change, severity, where, message = RUN_MUTANTS[name]
    cluster = ClusterConfig.model_validate(run.cluster.model_dump() | change)
    launch = read_launch(AWS)
    found = check_launch(launch, prices, run.model_copy(update={"cluster": cluster}))
    assert_found(
        found, severity, f"run config: {where}", message, check_launch(launch, prices, run)
    )


def test_sandboxes_that_start_unlocked_on_a_cluster_are_told(
    prices: PriceTable, run: RunConfig
) -> None:
    sandbox = run.sandbox.model_copy(update={"isolation": "best_effort"})
    found = check_launch(read_launch(AWS), prices, run.model_copy(update={"sandbox": sandbox}))
    assert [f.where for f in found if f.severity is Severity.ERROR] == [
        "run config: sandbox.isolation"
    ]
    for preset in ("cluster", "paper"):
        config = read_run(preset)
        assert isinstance(config, RunConfig) and config.sandbox.isolation == "strict"


def test_shared_folder_may_be_mounted(tmp_path: Path, prices: PriceTable, run: RunConfig) -> None:
    data = copy.deepcopy(dict(read_launch(AWS).data))
    data["initialization_commands"].append("sudo mount -t nfs4 fs:/ /mnt/shared")
    del data["metadata"]["sandbox_policy"]
    on_disk = run.model_copy(update={"run_dir": Path("/mnt/shared/runs/x")})
    found = check_launch(written(tmp_path, data), prices, on_disk)
    assert [str(f) for f in found if f.severity is Severity.ERROR] == []


def test_learner_that_any_gpu_suits_must_not_find_one_on_a_spot_machine(
    prices: PriceTable, run: RunConfig
) -> None:
    learner = run.cluster.learner.model_copy(update={"resources": {}})
    cluster = run.cluster.model_copy(update={"learner": learner})
    found = check_launch(read_launch(AWS), prices, run.model_copy(update={"cluster": cluster}))
    places = [f.where for f in found if "a learner rank fits on" in f.wrong]
    gpus = ("gpu_policy", "gpu_policy_large", "gpu_ppm", "gpu_ppm_large")
    assert places == [f"{TYPES}.{name}.node_config" for name in gpus]


@pytest.mark.parametrize(
    ("image", "is_pinned"),
    [
        ("example.org:5000/rstar:0.1.0", True),
        ("rstar@sha256:0123", True),
        ("rstar", False),
        ("example.org:5000/rstar", False),
        ("rstar:latest", False),
    ],
)
def test_only_a_version_or_digest_pins_an_image(image: str, is_pinned: bool) -> None:
    assert pinned(image) is is_pinned


def test_command_ends_with_1_on_errors_and_prints_the_range(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["cluster", "check", str(AWS), "--config", "cluster"])
    assert good.exit_code == 0
    assert "dollars per hour: 0.40 with the fewest machines" in good.output
    data = dict(read_launch(AWS).data) | {"max_worker": 3}
    written(tmp_path, data)
    bad = CliRunner().invoke(app, ["cluster", "check", str(tmp_path / "cluster.yaml")])
    assert bad.exit_code == 1
    assert "error top level: Ray refuses it" in bad.output


def test_errors_come_before_warnings(tmp_path: Path) -> None:
    data = dict(read_launch(AWS).data)
    data[TYPES] = copy.deepcopy(data[TYPES])
    del data[TYPES]["gpu_ppm"]["labels"]
    data[TYPES]["head"]["max_workers"] = 1
    written(tmp_path, data)
    out = io.StringIO()
    assert not run_check(
        tmp_path / "cluster.yaml", Console(file=out, width=200), config=None, prices=PRICES
    )
    levels = [
        line.split()[0] for line in out.getvalue().splitlines() if line[:5] in ("error", "warni")
    ]
    assert levels == sorted(levels)
