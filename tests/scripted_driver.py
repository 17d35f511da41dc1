"""A driver without models, for tests that kill it: `python -m tests.scripted_driver RUN ADDRESS`.

It searches `PROBLEMS` on scripted replicas of an existing Ray cluster. Problems that ask `HELD`
wait while the file `hold` lies in the run's folder.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import ray

from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from rollout.search import SearchConfig
from tests.builders import make_problem
from tests.scripted_replicas import HELD, ScriptedPolicyReplica

SEARCH = SearchConfig(template="short", num_candidates=3, num_rollouts=10, max_depth=5)
PROBLEMS = [
    make_problem(f"p{n}", text="How many?" if n % 8 else HELD, answer="3") for n in range(40)
]


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


if __name__ == "__main__":
    orphan_s = float(sys.argv[3])
    asyncio.run(rollout(make_fleet(Path(sys.argv[1]), sys.argv[2], orphan_s=orphan_s)))
