"""Is a cluster launch file fit to be launched? Said offline, before anything is paid for.

    launch_file ---+-- Ray's own prepare and validate: the schema ----------+
    (`ray up`)     +-- node_config: the provider's description of a machine |
                   +-- the rules below: commands, ports, token, spot, sizes +--> findings
    run config ----+-- actor_fit: resources asked for and offered ----------+
    deploy/prices.yaml --- prices ----------------------------------------------> dollars an hour

Ray's schema stops at `node_config` and takes any command. What is wrong there shows an hour later
and costs money: a misspelt spot key buys machines on demand, a resource nobody offers leaves actors
pending for ever, a port inside the range of the workers' ports is refused on some nodes only.

Each rule is a generator of findings.

Not covered: whether images, networks, quotas or spot capacity exist (only the cloud knows), what
the setup commands do.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cluster.fleet.config import ClusterConfig
from cluster.folder.config_file import ConfigError
from cluster.machines.prices import PriceTable, read_prices
from cluster.planning.actor_fit import actors_fit, read_run
from cluster.planning.findings import Finding, Severity, error, unknown, warning
from cluster.planning.launch_file import (
    PLACEHOLDER,
    Launch,
    NodeType,
    RayStart,
    mapping,
    ray_starts,
    read_launch,
    strings,
    whole,
)
from cluster.planning.node_config import node_configs_fit
from cluster.planning.prices import print_costs
from cluster.planning.sandbox_policy import read_policy, too_wide
from cluster.runs.config import RunConfig
from rollout.run_store import address_of

MIN_OPEN_FILES = 65536

_START_SECTIONS = ("head_start_ray_commands", "worker_start_ray_commands")
_WORKER_PORTS = (10002, 19999)
"""Ray's own range of workers' ports where none is given."""
_WORKER_PORT_OPTIONS = ("--min-worker-port", "--max-worker-port")


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
        *node_configs_fit(launch),
        *_spot(launch),
        *_sizes(launch, prices),
        *_images(launch),
        *_sold_out(launch),
        *_sandbox_machines(launch, run),
        *_start_commands(launch),
        *_token(launch),
        *_file_mounts(launch),
        *(actors_fit(launch, run) if run is not None else ()),
    ]
    return sorted(findings, key=lambda finding: finding.severity is Severity.WARNING)


def accepted_by_ray(launch: Launch) -> Iterator[Finding]:
    """What Ray itself says. The only use of its private launcher code (2.60)."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(dict(launch.data))))
    except jsonschema.ValidationError as refused:
        where = ".".join(str(part) for part in refused.absolute_path) or "top level"
        yield error(where, f"Ray refuses it: {refused.message[:200]}", "see the schema of `ray up`")
    except Exception as refused:
        # Its code raises whatever a wrong type leads to.
        yield error("top level", f"Ray refuses it: {refused}", "see the schema of `ray up`")


def _placeholders(launch: Launch) -> Iterator[Finding]:
    seen = set()
    for where, value in strings(launch.data):
        if re.search(rf"\b{PLACEHOLDER}\b|-{PLACEHOLDER}", value) and value not in seen:
            seen.add(value)
            shown = value if len(value) < 60 else f"...{value[-56:]}"
            yield warning(where, f"{shown!r} is a placeholder", "put your own value there")


def _explicit_sections(launch: Launch) -> Iterator[Finding]:
    because = {
        "setup_commands": "Ray's default installs a nightly build of Ray",
        "head_start_ray_commands": "Ray's default opens the dashboard to everybody",
        "worker_start_ray_commands": "Ray's default does not fix the metrics port",
        "head_setup_commands": "Ray's default installs packages into another Python",
    }
    for key, reason in because.items():
        if key not in launch.data:
            yield error(key, f"missing: {reason}", "write the section, be it empty")


def _numbers_of_workers(launch: Launch) -> Iterator[Finding]:
    for node in launch.types:
        if "max_workers" not in node.fields:
            yield warning(
                f"{node.where}.max_workers",
                f"missing: Ray fills in {node.default_max}",
                "say how many you will pay for",
            )
        if node.min_workers > node.max_workers:
            yield error(
                f"{node.where}.min_workers",
                f"{node.min_workers} is more than max_workers {node.max_workers}",
                "min_workers <= max_workers",
            )
        if node.head and node.max_workers:
            yield error(
                f"{node.where}.max_workers",
                f"{node.max_workers} further machines like the head may be started as workers",
                "0",
            )
    together = sum(node.max_workers for node in launch.types)
    limit = whole(launch.data.get("max_workers"), 0)
    if together > limit:
        yield warning(
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
            yield error(
                f"{node.where}.resources.CPU",
                f"the head offers {offered}, so that other work starves the coordinator",
                "0",
            )
        if node.spot:
            yield error(f"{node.where}.node_config", "the head is a spot machine", "on demand")


def _spot(launch: Launch) -> Iterator[Finding]:
    for node in launch.types:
        market = mapping(node.fields.get("labels")).get("market")
        bought = "spot" if node.spot else "on-demand"
        if market is not None and market != bought:
            yield error(
                f"{node.where}.labels.market",
                f"says {market!r}, but node_config buys {bought}",
                f"{bought!r}, or correct the spot settings of node_config",
            )
        elif market is None and not node.head:
            yield warning(f"{node.where}.labels.market", "missing", repr(bought))
        machine = mapping(node.fields.get("labels")).get("machine")
        if machine is not None and machine != node.instance:
            yield error(
                f"{node.where}.labels.machine",
                f"says {machine!r}, which the run's account would price (cost.prices)",
                repr(node.instance),
            )
        if node.spot and "learner" in node.resources:
            yield error(
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
            yield warning(
                f"{node.where}.node_config",
                f"no size and price of {node.instance!r} in the price table",
                f"{hint}add a row",
            )
            continue
        for name, has in (("CPU", size.cpus), ("GPU", size.gpus)):
            offered = node.resources.get(name)
            if offered is not None and offered > has:
                yield error(
                    f"{node.where}.resources.{name}",
                    f"{offered:g} offered, a {node.instance} has {has}",
                    str(has),
                )
        if size.gpus and node.resources.get("GPU", 0) < size.gpus:
            yield warning(
                f"{node.where}.resources.GPU",
                f"{node.resources.get('GPU', 0):g} of the {size.gpus} GPUs paid for are offered",
                str(size.gpus),
            )


def _images(launch: Launch) -> Iterator[Finding]:
    docker = mapping(launch.data.get("docker"))
    if not docker:
        yield warning(
            "docker",
            "missing: each machine installs what it runs, for minutes, and no two alike",
            "the images of deploy/ (docs/deploy.md)",
        )
    keys = ("image", "head_image", "worker_image")
    images = [(f"docker.{key}", docker[key]) for key in keys if key in docker]
    for node in launch.types:
        own = mapping(node.fields.get("docker")).get("worker_image")
        if own is not None:
            images.append((f"{node.where}.docker.worker_image", own))
    for where, image in images:
        if not pinned(str(image)):
            yield error(where, f"{image!r} is another image tomorrow", "a version tag or a digest")
    for node in launch.types:
        where = f"{node.where}.node_config"
        if launch.provider == "aws" and not node.node_config.get("ImageId"):
            yield error(
                f"{where}.ImageId",
                "missing: Ray's default is Ubuntu 18.04",
                "an image of your region",
            )
        if launch.provider == "azure":
            newest = node.machine.get("imageVersion", "latest") == "latest"
            if newest and "imageId" not in node.machine:
                yield warning(
                    f"{where}.azure_arm_parameters.imageVersion",
                    "'latest' is another image tomorrow",
                    "a version (`az vm image list --all`)",
                )
        if launch.provider == "gcp":
            for disk in node.node_config.get("disks") or []:
                made_from = mapping(mapping(disk).get("initializeParams"))
                source = str(made_from.get("sourceImage", ""))
                if "/family/" in source:
                    yield warning(
                        f"{where}.disks", f"{source!r} is another image tomorrow", "an image name"
                    )


def _sold_out(launch: Launch) -> Iterator[Finding]:
    """Spot capacity of one kind of machine runs out; Ray then tries another type that will do."""
    for resource in sorted({name for node in launch.types for name in node.resources}):
        offering = [node for node in launch.types if resource in node.resources]
        one_kind = len({node.instance for node in offering}) == 1
        if one_kind and all(node.spot for node in offering):
            yield warning(
                f"{offering[0].where}.node_config",
                f"{resource!r} is offered by one kind of spot machine, which may be sold out",
                "a second node type with other machines that offers it",
            )


_MOUNT = re.compile(r"\bmount\s+-t|mount\.\w|\b(s3fs|gcsfuse|blobfuse2?|mount-s3)\b")


def _sandbox_machines(launch: Launch, run: RunConfig | ClusterConfig | None) -> Iterator[Finding]:
    """What code that left its sandbox would find: file systems, and a key to the bucket."""
    address = address_of(run.run_dir) if isinstance(run, RunConfig) else None
    policy = mapping(launch.data.get("metadata")).get("sandbox_policy")
    for node in launch.types:
        if "sandbox" not in node.resources or address is None:
            continue
        for where, text in _on_machine(launch, node):
            if _MOUNT.search(text):
                yield error(
                    where,
                    "they mount a file system, which step code that got out could write",
                    "leave it out: run_dir is a bucket",
                )
        others = {other.identity for other in launch.types if "sandbox" not in other.resources}
        if launch.provider == "azure":
            yield warning(
                node.where,
                "Ray gives all machines of Azure one identity, so these hold the head's",
                "AKS, where pods have their own (docs/security.md)",
            )
        elif not node.identity:
            key = "IamInstanceProfile" if launch.provider == "aws" else "serviceAccounts"
            yield error(
                f"{node.where}.node_config.{key}",
                f"missing: workers cannot reach {address}",
                "an identity of its own, with the policy of metadata.sandbox_policy",
            )
        elif node.identity in others:
            yield error(
                f"{node.where}.node_config",
                f"sandbox machines are {node.identity!r} as others are, and may do as much",
                "an identity of its own, with the policy of metadata.sandbox_policy",
            )
    if policy is None:
        if address is not None:
            yield warning(
                "metadata.sandbox_policy",
                "missing: what sandbox machines may do with the bucket is not checked",
                "a policy, as one of deploy/policies",
            )
        return
    try:
        grants = read_policy(launch.folder / str(policy))
    except ConfigError as wrong:
        yield error("metadata.sandbox_policy", str(wrong), "a policy, as one of deploy/policies")
        return
    yield from too_wide(grants, f"metadata.sandbox_policy {policy}", address)


def _on_machine(launch: Launch, node: NodeType) -> Iterator[tuple[str, str]]:
    """Commands and container options of a worker machine with their places."""
    keys = ("initialization_commands", "setup_commands", "worker_setup_commands")
    for fields, where in ((launch.data, ""), (node.fields, f"{node.where}.")):
        for key in (*keys, "worker_start_ray_commands"):
            for place, text in strings(list(fields.get(key) or ()), f"{where}{key}"):
                yield place, text
        docker = mapping(fields.get("docker"))
        for key in ("run_options", "worker_run_options"):
            for place, text in strings(list(docker.get(key) or ()), f"{where}docker.{key}"):
                yield (
                    place,
                    f"mount -t {text}" if re.match(r"(-v|--volume|--mount)\b", text) else text,
                )


def pinned(image: str) -> bool:
    """Whether a container image's name always means the same build (by tag or digest)."""
    if "@sha256:" in image:
        return True
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return tag not in ("", "latest", "nightly", "main", "master")


def _start_commands(launch: Launch) -> Iterator[Finding]:
    heads, workers = (ray_starts(launch, key) for key in _START_SECTIONS)
    for key, found in zip(_START_SECTIONS, (heads, workers), strict=True):
        if key in launch.data and len(found) != 1:
            yield error(key, f"{len(found)} commands `ray start`", "one")
    for start in (*heads, *workers):
        yield from _start_options(start)
    if len(heads) != 1:
        return
    head = heads[0]
    if "--head" not in head.options:
        yield error(head.where, "--head is missing", "ray start --head")
    config = "~/ray_bootstrap_config.yaml"
    if head.options.get("--autoscaling-config") != config:
        yield error(
            head.where,
            f"--autoscaling-config is {head.options.get('--autoscaling-config', 'missing')}: no "
            "node would ever be added",
            f"--autoscaling-config={config}",
        )
    if head.options.get("--dashboard-host", "127.0.0.1") not in ("127.0.0.1", "localhost"):
        yield warning(
            head.where,
            f"the dashboard listens on {head.options['--dashboard-host']}",
            "--dashboard-host=127.0.0.1 and `ray dashboard FILE`, which forwards it",
        )
    port = head.number("--port", 6379)
    for worker in workers:
        address = f"$RAY_HEAD_IP:{port}"
        if worker.options.get("--address", "").replace("${RAY_HEAD_IP}", "$RAY_HEAD_IP") != address:
            yield error(
                worker.where,
                f"--address is {worker.options.get('--address', 'missing')}",
                f"--address={address}, the head's --port",
            )
        for option in ("--metrics-export-port", *_WORKER_PORT_OPTIONS):
            ours, theirs = worker.options.get(option), head.options.get(option)
            if ours != theirs:
                yield error(
                    worker.where,
                    f"{option} is {ours or 'missing'} here and {theirs or 'missing'} on the head",
                    "the same on all nodes",
                )


def _start_options(start: RayStart) -> Iterator[Finding]:
    from ray.scripts.scripts import start as ray_start

    known = {name for option in ray_start.params for name in (*option.opts, *option.secondary_opts)}
    for option in start.options:
        if option not in known:
            yield unknown(start.where, option, known)
    if "--block" in start.options:
        yield error(start.where, "--block never returns, and ray up waits for it", "leave it out")
    limit = re.search(r"ulimit\s+-n\s+(\d+)", start.line)
    if limit is None or int(limit[1]) < MIN_OPEN_FILES:
        yield error(
            start.where,
            f"open files: {limit[1] if limit else 'the default, often 1024'}",
            f"ulimit -n {MIN_OPEN_FILES} before ray start",
        )
    if not start.options.get("--metrics-export-port"):
        yield error(
            start.where,
            "--metrics-export-port is missing: a random port on every node, which Prometheus and "
            "firewalls cannot know",
            "--metrics-export-port=8090",
        )
    low, high = map(start.number, _WORKER_PORT_OPTIONS, _WORKER_PORTS)
    if low >= high:
        yield error(start.where, f"workers' ports {low}-{high}", "min below max")
    used: dict[int, str] = {}
    for option, text in start.options.items():
        if option in _WORKER_PORT_OPTIONS or not option.endswith("port") or not text.isdigit():
            continue
        number = int(text)
        if low <= number <= high:
            yield error(
                start.where,
                f"{option}={number} lies among the workers' ports {low}-{high}",
                "a port outside that range",
            )
        if number in used:
            yield error(start.where, f"{used[number]} and {option} are both {number}", "two ports")
        used[number] = option


def _token(launch: Launch) -> Iterator[Finding]:
    lines = [(where, text) for where, text in strings(launch.data) if "RAY_AUTH" in text]
    for where, text in lines:
        if re.search(r"RAY_AUTH_TOKEN=(?!\$|[\"']?\$)\S", text):
            yield error(where, "the token itself stands in the file", "mount the token's file")
        if re.search(r"RAY_AUTH_MODE=[\"']?disabled", text):
            yield error(where, "token authentication is off", "RAY_AUTH_MODE=token")
    for key in _START_SECTIONS:
        for start in ray_starts(launch, key):
            if not re.search(r"RAY_AUTH_MODE=[\"']?token", start.line):
                yield error(
                    start.where,
                    "RAY_AUTH_MODE is not set: who reaches a port of Ray can run code",
                    "RAY_AUTH_MODE=token ray start ...",
                )
    mounts = mapping(launch.data.get("file_mounts"))
    by_path = any("RAY_AUTH_TOKEN_PATH" in text for _, text in lines)
    if not by_path and not any(str(remote).endswith("/.ray/auth_token") for remote in mounts):
        yield error(
            "file_mounts",
            "the token reaches no node, so that none can join",
            "~/.ray/auth_token: ~/.ray/auth_token",
        )


def _file_mounts(launch: Launch) -> Iterator[Finding]:
    for remote, local in mapping(launch.data.get("file_mounts")).items():
        path = Path(str(local)).expanduser()
        if not path.exists():
            hint = "`ray get-auth-token --generate`" if path.name == "auth_token" else "make it"
            yield warning(f"file_mounts.{remote}", f"{local} is not on this machine", hint)
        if path.is_dir():
            excluded = launch.data.get("rsync_exclude") or []
            if "runs" in excluded:
                yield error(
                    "rsync_exclude", "runs also keeps cluster/runs back, which is code", "/runs"
                )
                continue
            there = [n for n in (".git", ".venv", "/runs") if (path / n.lstrip("/")).exists()]
            heavy = [name for name in there if name not in excluded]
            if heavy:
                yield warning(
                    "rsync_exclude",
                    f"{', '.join(heavy)} of {local} would be copied to every node",
                    f"rsync_exclude: [{', '.join(heavy)}, ...]",
                )


def run_check(file: Path, console: Console, *, config: Path | None = None, prices: Path) -> bool:
    """Check a launch file and print what was found; True if there is no error."""
    table = read_prices(prices)
    launch = read_launch(file)
    findings = check_launch(launch, table, read_run(config) if config is not None else None)
    print_costs(launch, table, console, source=prices)
    for finding in findings:
        style = "red" if finding.severity is Severity.ERROR else "yellow"
        console.out(finding, style=style, highlight=False)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    against = f" with {config}" if config is not None else ", without a run config"
    console.out(
        f"{file}{against}: {errors} errors, {len(findings) - errors} warnings", highlight=False
    )
    return errors == 0


# --------------------------------------------------------------------------- plain data
