"""Do a run's actors find their place on the machines of a launch file?

Asked of what the run's config reserves and what the node types offer, all of them there at once;
and whether the config's own settings suit a cluster that is bought machine by machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cluster.fleet.config import ActorConfig, ClusterConfig
from cluster.folder.config_file import ConfigError, find_config, load_config, make_config, read_yaml
from cluster.machines.placement import Ask, NodeResources, explain
from cluster.planning.findings import Finding, error, warning
from cluster.planning.launch_file import PLACEHOLDER, Launch
from cluster.runs.config import RunConfig
from rollout.run_store import address_of

MIN_START_TIMEOUT_S = 600.0
"""A machine is bought, set up and loads weights in about so long."""


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


def actors_fit(launch: Launch, run: RunConfig | ClusterConfig) -> Iterator[Finding]:
    """What of a run has no place, or not the place it should have."""
    cluster = run.cluster if isinstance(run, RunConfig) else run
    asks = actor_asks(run)
    every_ask = [ask for several in asks.values() for ask in several]
    yield from _run_settings(launch, run, cluster)
    for section in asks:
        settings: ActorConfig = getattr(cluster, section)
        if not settings.resources:
            rivals = "any machine with a free GPU" if settings.num_gpus else "any machine"
            own = "sandbox" if section == "workers" else section
            yield warning(
                f"run config: cluster.{section}.resources",
                f"asks for no custom resource, so that its actors may land on {rivals}",
                f"resources: {{{own}: 1}}",
            )
    asked = {name for ask in every_ask for name in ask.bundle}
    for node in launch.types:
        for resource in node.resources:
            if resource not in asked | {"CPU", "GPU", "memory", "head", "object_store_memory"}:
                near = difflib.get_close_matches(resource, asked, n=1)
                every = f"asked for are {', '.join(sorted(asked))}"
                hint = f"did you mean {near[0]!r}?" if near else every
                yield warning(
                    f"{node.where}.resources.{resource}", "no actor of the run asks for it", hint
                )
        takes_learner = any(
            all(node.resources.get(name, 0) >= amount for name, amount in ask.bundle.items())
            for ask in asks["learner"]
        )
        if node.spot and takes_learner and "learner" not in node.resources:
            yield error(
                f"{node.where}.node_config",
                "a spot machine that a learner rank fits on: one that goes ends all ranks",
                "give the learner a custom resource that only machines on demand offer",
            )
    machines = [
        NodeResources(name=node.name, total=node.resources, free=node.resources)
        for node in launch.types
        for _ in range(node.count[1])
    ]
    for sentence in explain(every_ask, machines):
        yield error(
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
            yield warning(
                f"run config: cluster.autoscale.{pool}.max_replicas",
                f"{scaler.max_replicas} do not fit on all machines together",
                "raise max_workers of the type, or lower it",
            )


def _run_settings(
    launch: Launch, run: RunConfig | ClusterConfig, cluster: ClusterConfig
) -> Iterator[Finding]:
    if cluster.address == "local":
        yield error(
            "run config: cluster.address",
            "'local' starts another Ray inside the head and uses no other machine",
            "auto",
        )
    if cluster.spot is None and any(node.spot for node in launch.types):
        yield warning(
            "run config: cluster.spot",
            "nobody watches for spot notices, so that machines go without being drained",
            "spot: {}",
        )
    if cluster.start_timeout_s < MIN_START_TIMEOUT_S:
        yield warning(
            "run config: cluster.start_timeout_s",
            f"{cluster.start_timeout_s:g} s is short where a machine has to be bought first",
            "1800",
        )
    if not isinstance(run, RunConfig):
        return
    if run.sandbox.isolation != "strict":
        yield error(
            "run config: sandbox.isolation",
            f"{run.sandbox.isolation!r} starts sandboxes on machines that cannot lock them down",
            "strict",
        )
    places = (run.run_dir, run.models.base_model, *run.problems.train, run.problems.test)
    names = [address_of(place) or str(place) for place in places if place]
    if placeholders := [name for name in names if PLACEHOLDER in name]:
        yield warning(
            "run config: run_dir, models, problems",
            f"{', '.join(placeholders)}: placeholders",
            "put your own bucket there",
        )
    if not run.run_dir.is_absolute() and address_of(run.run_dir) is None:
        yield warning(
            "run config: run_dir",
            f"{str(run.run_dir)!r} is relative: each machine would have its own",
            "a bucket, or a folder that all machines mount",
        )
