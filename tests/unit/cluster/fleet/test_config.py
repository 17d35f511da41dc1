from __future__ import annotations

from pathlib import Path

import pytest

from cluster.fleet.config import ActorConfig
from cluster.folder.config_file import ConfigError, make_config
from cluster.runs.config import RolloutConfig
from rollout.run_store import address_of


def test_actors_ask_ray_for_what_their_config_says() -> None:
    gpu = ActorConfig(num_gpus=0.5, resources={"policy": 1})
    assert gpu.ray_options() == {"num_cpus": 0, "num_gpus": 0.5, "resources": {"policy": 1}}
    assert gpu.bundle() == {"GPU": 0.5, "policy": 1}
    assert ActorConfig(replicas=2).learner_bundle() == {"CPU": 1.0}
    assert ActorConfig(num_gpus=1, num_cpus=4).learner_bundle() == {"CPU": 4, "GPU": 1}


def test_ranks_of_a_replica_have_a_bundle_each() -> None:
    large = ActorConfig(num_gpus=4, num_cpus=2, resources={"policy": 4})
    rank = {"GPU": 1.0, "policy": 1.0}
    assert large.rank_bundles(4) == [{"CPU": 2, **rank}, rank, rank, rank]
    assert ActorConfig(num_gpus=1).rank_bundles(1) == [{"GPU": 1}]
    assert ActorConfig().rank_bundles(2) == []


def test_run_dir_of_several_machines_is_no_relative_path() -> None:
    data = {"run_dir": "runs/a", "problems": "p.jsonl", "policy": "x"}
    assert make_config(data, kind=RolloutConfig, source="test").run_dir == Path("runs/a")
    with pytest.raises(
        ConfigError, match=r"run_dir must be absolute unless cluster.address .*mount"
    ):
        make_config(data, ["cluster.address=auto"], kind=RolloutConfig, source="test")
    overrides = ["cluster.address=auto", "run_dir=/mnt/shared/a"]
    make_config(data, overrides, kind=RolloutConfig, source="test")


def test_run_dir_may_be_an_address_and_is_stored_as_one() -> None:
    data = {"run_dir": "s3://bucket/runs/a", "problems": "p.jsonl", "policy": "gs://b/model"}
    made = make_config(data, ["cluster.address=auto"], kind=RolloutConfig, source="test")
    assert address_of(made.run_dir) == "s3://bucket/runs/a"
    stored = made.effective()
    assert (stored["run_dir"], stored["policy"]) == ("s3://bucket/runs/a", "gs://b/model")
    again = make_config(stored, kind=RolloutConfig, source="test")
    assert (again.run_dir, again.storage.client) == (made.run_dir, {})


@pytest.mark.parametrize(
    "storage",
    [
        {"options": {"key": "AKIA123"}},
        {"options": {"secret": "hush"}},
        {"options": {"account_key": "hush"}},
        {"options": {"connection_string": "hush"}},
        {"endpoint_url": "http://me:hush@minio:9000"},
    ],
)
def test_secrets_are_refused_in_a_config_and_not_shown(storage: dict[str, object]) -> None:
    data = {"run_dir": "s3://b/r", "problems": "p.jsonl", "policy": "x", "storage": storage}
    with pytest.raises(ConfigError, match=r"'storage': .*secrets stay out") as caught:
        make_config(data, kind=RolloutConfig, source="test")
    assert "hush" not in str(caught.value) and "AKIA" not in str(caught.value)
    fine = {"endpoint_url": "http://minio:9000", "options": {"anon": False}}
    made = make_config(data | {"storage": fine}, kind=RolloutConfig, source="test")
    assert made.storage.client == {"anon": False, "endpoint_url": "http://minio:9000"}


def test_gpus_of_a_replica_must_be_those_of_its_engine(tmp_path: Path) -> None:
    data = {
        "run_dir": tmp_path,
        "problems": "p.jsonl",
        "policy": "x",
        "policy_engine": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2},
        "cluster": {"policy": {"num_gpus": 8}},
    }
    with pytest.raises(ConfigError, match=r"cluster.policy.num_gpus must be 16, .*; got 8"):
        make_config(data, kind=RolloutConfig, source="test")
    made = make_config(data, ["cluster.policy.num_gpus=16"], kind=RolloutConfig, source="test")
    assert made.policy_engine.num_ranks == 16


def test_weights_are_staged_only_where_every_node_has_the_folder(tmp_path: Path) -> None:
    given = {"run_dir": tmp_path, "problems": "p.jsonl", "policy": "x"}
    for folder in ("weights", "s3://bucket/weights"):
        with pytest.raises(ConfigError, match="expected an absolute folder"):
            make_config(
                given | {"cluster": {"stage_weights": folder}}, kind=RolloutConfig, source="test"
            )
