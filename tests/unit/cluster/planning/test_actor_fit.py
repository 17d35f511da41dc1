"""What the actors of a run ask for; whether they fit is among the mistakes of test_launch_check."""

from __future__ import annotations

from pathlib import Path

from cluster.planning.actor_fit import actor_asks, read_run
from cluster.runs.config import RunConfig


def test_replica_of_several_ranks_asks_for_a_bundle_each() -> None:
    run = read_run("cluster")
    assert isinstance(run, RunConfig)
    engine = run.policy_engine.model_copy(update={"tensor_parallel_size": 4})
    policy = run.cluster.policy.model_copy(
        update={"num_gpus": 4, "resources": {"policy": 4}, "replicas": 2}
    )
    spread = run.model_copy(
        update={
            "policy_engine": engine,
            "cluster": run.cluster.model_copy(update={"policy": policy}),
        }
    )
    asks = actor_asks(spread)["policy"]
    assert [(ask.bundle, ask.count) for ask in asks] == [({"GPU": 1, "policy": 1}, 2)] * 4


def test_cluster_section_of_another_config_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("cluster: {policy: {replicas: 3, resources: {policy: 1}}}\n", encoding="utf-8")
    asks = actor_asks(read_run(file))
    assert asks["policy"][0].count == 3 and "ppm" in asks
