"""A `Fleet` of scripted replicas, for tests on real Ray.

Apart from the replicas' own module, which every actor's process imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from cluster.fleet.fleet import Fleet
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from tests.scripted_replicas import ScriptedPolicyReplica, ScriptedPreferenceReplica


def scripted_fleet(
    root: Path | str, *, replica: type = ScriptedPolicyReplica, seed: int = 0, **cluster: Any
) -> Fleet:
    """A fleet of scripted replicas and real sandboxes, looked at five times a second.

    Args:
        root: of its run, a folder, which is made, or an address.
        replica: class of the policy's replicas.
        cluster: over what follows; without `address` an embedded Ray.
    """
    embedded = {} if "address" in cluster else {"num_cpus": 2, "object_store_mib": 80}
    watched = {"look_s": 0.2, "backoff_s": 0.2, "max_failures": 20}
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "seed": seed,
            "cluster": {**embedded, "supervision": watched, **cluster},
        }
    )
    if isinstance(root, Path):
        root.mkdir(parents=True, exist_ok=True)
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(replica)
    fleet._preference_kind.actor = ray.remote(ScriptedPreferenceReplica)
    return fleet
