"""Where the actors that reserve nothing stand; Ray itself puts such a one on any node.

`PLACES` is all of them, ours and those of libraries, by class. `ray.remote(` of the product names
no other class without a reservation (`tests/unit/cluster/test_standing.py`), and on a cluster they
stand where it says (`tests/integration/test_learner_nodes.py`).
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2

DRIVER = "the driver's node"
ITS_NODE = "the node it serves"
POOL = "where its pool reserves; spread over all nodes if that is nothing"

PLACES = {
    "Coordinator": DRIVER,
    "EndpointPolicy": DRIVER,
    "Mailbox": DRIVER,
    "Watchman": DRIVER,
    "NodeSpotWatcher": ITS_NODE,
    "look_at": ITS_NODE,
    "RolloutWorker": POOL,
    "SandboxWorker": POOL,
    "PolicyReplica": POOL,
    "PreferenceReplica": POOL,
}
OF_RAY = {
    "TrainController": DRIVER,
    "SynchronizationActor": DRIVER,
    "_AutoscalingCoordinatorActor": DRIVER,
    "DatasetManager": DRIVER,
}
"""What Ray Train starts beside the learner's ranks; it chooses these places itself."""


def without_reservation() -> dict[str, list[str]]:
    """Nodes of the living actors that reserve nothing, by class."""
    found: dict[str, list[str]] = {}
    alive = gcs_pb2.ActorTableData.ActorState.ALIVE
    for data in actors():
        if data.state == alive and set(data.required_resources) <= {"memory"}:
            found.setdefault(data.class_name, []).append(data.address.node_id.hex())
    return found


def actors() -> list[Any]:
    """The cluster's table of actors."""
    assert ray.is_initialized()
    table = state._connect_and_get_accessor().get_actor_table(None, None)
    return [gcs_pb2.ActorTableData.FromString(entry) for entry in table]
