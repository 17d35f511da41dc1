"""A driver without models, for tests that kill it: `python -m tests.scripted_driver RUN ADDRESS`.

It searches `PROBLEMS` on scripted replicas of an existing Ray cluster. Problems that ask `HELD`
wait while the file `hold` lies in the run's folder. Told to stop, it drains. `drive` is a driver
with models: `rstar rollout`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from cluster.cli import _run
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from cluster.runs.rollout import RolloutRun
from cluster.telemetry.progress import ProgressView
from rollout.search import SearchConfig
from tests.builders import make_problem
from tests.scripted_replicas import HELD, ScriptedPolicyReplica

SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=10, max_depth=5)
PROBLEMS = [
    make_problem(f"p{n}", text="How many?" if n % 8 else HELD, answer="3") for n in range(40)
]


@contextmanager
def small_cluster() -> Iterator[Cluster]:
    """A head of four CPUs that outlives the drivers on it."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
        },
    )
    yield made
    ray.shutdown()
    made.shutdown()


def make_fleet(root: Path, address: str, **cluster: Any) -> Fleet:
    """A fleet of scripted replicas on a cluster, watched closely."""
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cluster": {
                "address": address,
                "policy": {"replicas": 2},
                "workers": {"replicas": 2},
                "shard_size": 4,
                "max_open_trees": 12,
                "supervision": {"look_s": 0.2, "backoff_s": 0.2},
                **cluster,
            },
        }
    )
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(ScriptedPolicyReplica)
    return fleet


async def rollout(fleet: Fleet) -> RolloutOutcome:
    """The one round of the run, from the start of the engines."""
    await fleet.start(fleet.folder.root / "hold", version="policy-r0", learner=False)
    return await fleet.rollout(
        1,
        PROBLEMS,
        [RolloutStage(name="base", search=SEARCH)],
        preference=False,
        on_progress=lambda done, total, facts: None,
    )


def drive(config: dict[str, Any], said: Path) -> None:
    """Do what `rstar rollout` does, and write what it says into a file, after what stands there."""
    with said.open("a") as file:
        view = ProgressView(Console(file=file))
        _run(RolloutRun(RolloutConfig.model_validate(config), view).run(), again="", view=view)


async def held_rollout(fleet: Fleet) -> RolloutOutcome:
    """The same by the one driver of the run, which ends its actors."""
    with fleet.folder.locked():
        try:
            return await rollout(fleet)
        finally:
            await fleet.stop()


if __name__ == "__main__":
    made = make_fleet(Path(sys.argv[1]), sys.argv[2], orphan_s=float(sys.argv[3]))
    _run(held_rollout(made), again="")
