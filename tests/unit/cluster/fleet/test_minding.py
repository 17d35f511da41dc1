from __future__ import annotations

from pathlib import Path

from cluster.fleet.minding import parts
from cluster.runs.config import RolloutConfig


def test_autoscaler_is_asked_for_the_ranks_of_a_replica_one_by_one(tmp_path: Path) -> None:
    config = RolloutConfig.model_validate(
        {
            "run_dir": tmp_path,
            "problems": "p.jsonl",
            "policy": "x",
            "policy_engine": {"tensor_parallel_size": 2},
            "cluster": {"policy": {"num_gpus": 2}, "ppm": {"num_gpus": 1}},
        }
    )
    assert parts(config, {"GPU": 2.0}) == [{"GPU": 1.0}, {"GPU": 1.0}]
    assert parts(config, {"GPU": 1.0}) == [{"GPU": 1.0}]
    assert parts(config, {"CPU": 1.0}) == [{"CPU": 1.0}]
