"""kill -9 of the driver of a rollout on a Ray cluster, again and again: its engine starts once.

The engine is a real one of a small model with random weights, on the CPU. `DRIVER_DEATHS=20` kills
as often as that; the default keeps the test short.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.fleet.left_over import left_over, namespace_of
from cluster.telemetry import logs
from rollout.store import RunStore, TrajectoryStore
from tests.models import write_tiny_policy
from tests.scripted_driver import drive, small_cluster

DEATHS = int(os.environ.get("DRIVER_DEATHS", "3"))
NUM_PROBLEMS = 250 * (1 + DEATHS)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 30 * DEATHS)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with small_cluster() as made:
        yield made


def test_a_driver_that_dies_again_and_again_costs_no_start_of_an_engine(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run, said, problems = tmp_path / "run", tmp_path / "said.txt", tmp_path / "problems.jsonl"
    run.mkdir()
    said.touch()
    rows = [
        {"id": f"p{n}", "problem": f"Value of {n}?", "answer": "1"} for n in range(NUM_PROBLEMS)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(run),
        "problems": str(problems),
        "default_level": "gsm",
        "policy": str(write_tiny_policy(tmp_path / "policy")),
        "cluster": {
            "address": cluster.address,
            "min_step_share": 0,
            "max_open_trees": 8,
            "shard_size": 4,
        },
        "policy_engine": {"max_model_len": 512, "kv_cache_gib": 0.1},
        "search": {
            "template": "short",
            "num_candidates": 2,
            "num_rollouts": 3,
            "max_depth": 3,
            "max_step_tokens": 48,
        },
        "metrics": {"enabled": False},
    }
    trees = TrajectoryStore(RunStore(run), 1)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.scripted_driver"])
    living = []

    def start() -> None:
        living.append(processes.Process(target=drive, args=(config, said)))
        living[-1].start()

    def until(condition: Callable[[], bool], limit_s: float = 600.0) -> None:
        give_up_s = time.monotonic() + limit_s
        while not condition():
            assert living[-1].is_alive() and time.monotonic() < give_up_s, said.read_text()
            time.sleep(0.1)

    def times_taken_over() -> int:
        return said.read_text().count("taken over from a driver that is gone")

    try:
        start()
        until(lambda: len(trees.commits()) > 0)
        began_s = time.monotonic()
        for death in range(DEATHS):
            living[-1].kill()
            living[-1].join()
            start()
            until(lambda death=death: times_taken_over() > death)
            time.sleep(0.3 * (death % 5))  # it dies here and there
        seconds, committed = time.monotonic() - began_s, len(trees.commits())
        living[-1].join()
    finally:
        for process in living:
            process.kill()
    served = [line for line in logs.read(RunStore(run)) if line.text.startswith("Replica serves")]
    with capsys.disabled():
        print(
            f"\n{DEATHS} drivers killed in {seconds:.0f} s, {committed} of {NUM_PROBLEMS // 4} "
            f"shards committed by then: {len(served) - 1} engine starts after the first"
        )
    assert living[-1].exitcode == 0, said.read_text()
    assert len(served) == 1
    found = re.findall(
        r"taken over from a driver that is gone, as they run: (.*)", said.read_text()
    )
    assert found == ["1 coordinator, 1 policy, 1 sandbox, 1 worker"] * DEATHS
    report = json.loads((run / "report.json").read_text())
    assert (report["lost"], report["doubled"], report["resumed_trees"]) == (0, 0, 0)
    assert report["searched"] == NUM_PROBLEMS
    # Nothing was handed back: the leases went on, whoever looked after them.
    assert not any(commit.remaining for commit in trees.commits().values())
    ray.init(address=cluster.address, logging_level="ERROR")
    assert left_over(namespace_of(RunStore(run))) == []
