"""Nodes of the Ray cluster: what they have, which of them are about to go, who runs where.

    spot notice (cluster.machines.spot) --> SpotActor, one per node --+
    `ray drain-node`, SIGTERM of `ray start --block` --------+--> Ray: the node drains
                                                                  --> `draining`, asked by the fleet

Ray places nothing new on a draining node and moves nothing away from it: that is the fleet's part.
What is asked of the autoscaler goes through the actor by which Ray Train asks, too (`NodeRequest`).
All calls of Ray's private interface (2.60) stand here.

Not covered: a node that goes without a notice; its actors are found dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.machines.cost import NodeUse
from cluster.machines.placement import NodeResources
from cluster.machines.spot import SpotConfig, SpotNotice, SpotWatcher

logger = logging.getLogger(__name__)

T = TypeVar("T")

RUNS = "rstar-"
"""Beginning of the Ray namespaces of runs (`cluster.fleet.left_over`)."""

KIND_LABELS = ("machine", "ray.io/node-group", "ray.io/accelerator-type")
MARKET_LABELS = ("market", "ray.io/market-type")
"""Labels of a node that say what machine it is, and how it is bought; the first one counts."""

UNKNOWN_KIND = "machine"
"""Of a node without such a label."""

ADVICE_S = 120.0
"""Time given to a node whose notice names none."""

ANSWER_S = 10.0
"""How long whoever is cancelled waits for an answer of Ray."""


async def asked(question: Callable[..., T], *of: Any) -> T:
    """The answer of a blocking question to Ray; whoever is cancelled meanwhile waits for it first.

    A question that is still open when Ray ends here waits for a GCS that is gone, and after a
    minute Ray ends the process for that.
    """
    answer = asyncio.ensure_future(asyncio.to_thread(question, *of))
    try:
        return await asyncio.shield(answer)
    except asyncio.CancelledError:
        await asyncio.wait([answer], timeout=ANSWER_S)
        raise


def living() -> dict[str, NodeResources]:
    """The living nodes by id."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return {
        node["NodeID"]: NodeResources(
            name=node.get("NodeManagerHostname") or node["NodeID"][:8],
            total=node.get("Resources", {}),
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def table() -> list[dict[str, Any]]:
    """Every node there ever was, as Ray tells it."""
    return ray.nodes()


def starting() -> dict[str, int]:
    """How many nodes of each type the autoscaler is starting; {} without an autoscaler."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    count = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        count[launch.ray_node_type_name] += launch.count
    return dict(count)


def draining() -> dict[str, float]:
    """Nodes that are about to go: id -> Unix time of the end, 0 if none was named."""
    from ray._private.state import state

    return {node: deadline_ms / 1000 for node, deadline_ms in state.get_draining_nodes().items()}


def node_of(handle: Any) -> str:
    """Id of the node an actor runs on; "" if it runs on none."""
    from ray._private.state import actors

    return actors(handle._actor_id.hex()).get("Address", {}).get("NodeID", "")


def uses(namespace: str) -> dict[str, NodeUse]:
    """The living nodes by id, each with its kind, its market and how much of it a run pays."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    record = vars(gcs_pb2)["ActorTableData"]
    table = state._connect_and_get_accessor().get_actor_table(None, "ALIVE")
    runs_on: dict[str, set[str]] = {}
    for entry in table:
        actor = record.FromString(entry)
        if actor.ray_namespace.startswith(RUNS) and actor.class_name != NodeSpotWatcher.__name__:
            runs_on.setdefault(actor.address.node_id.hex(), set()).add(actor.ray_namespace)
    living_runs = {namespace}.union(*runs_on.values())
    found = {}
    for node in ray.nodes():
        if node["Alive"]:
            labels, runs = node.get("Labels") or {}, runs_on.get(node["NodeID"], set())
            payers = runs or living_runs
            found[node["NodeID"]] = NodeUse(
                kind=next(filter(None, map(labels.get, KIND_LABELS)), UNKNOWN_KIND),
                market=next(filter(None, map(labels.get, MARKET_LABELS)), "on-demand"),
                idle=not runs,
                share=1 / len(payers) if namespace in payers else 0.0,
            )
    return found


def say_priority(namespace: str, priority: int) -> None:
    """Tell the other runs of the cluster how much this one counts."""
    _internal_kv_put(f"{RUNS}priority/{namespace}", str(priority), overwrite=True)


def asked_above(priority: int) -> list[dict[str, float]]:
    """What each actor asks that waits for a place, of runs with a higher priority."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    record = vars(gcs_pb2)["ActorTableData"]
    table = state._connect_and_get_accessor().get_actor_table(None, "PENDING_CREATION")
    priorities: dict[str, int] = {}
    waiting = []
    for actor in map(record.FromString, table):
        space = actor.ray_namespace
        if space not in priorities:
            said = _internal_kv_get(f"{RUNS}priority/{space}") if space.startswith(RUNS) else None
            priorities[space] = priority if said is None else int(said)
        if priorities[space] > priority and actor.required_resources:
            waiting.append(dict(actor.required_resources))
    return waiting


def near_driver(*, soft: bool = True) -> dict[str, Any]:
    """Placed on the driver's machine, which is no spot node: as a wish, or nowhere else."""
    return _on(ray.get_runtime_context().get_node_id(), soft=soft)


def _on(node_id: str, *, soft: bool = False) -> dict[str, Any]:
    return {
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node_id, soft=soft),
        # What asks for nothing is placed by any node, and one that has just joined does not know
        # the others yet; what asks for a byte is placed by the driver's own.
        "memory": 1,
    }


def most_by_autoscaler() -> dict[str, float]:
    """Of each resource, how much the cluster has when the autoscaler has started all it may; {}
    without an autoscaler."""
    from ray._private.state import state

    return dict(state.get_max_resources_from_cluster_config() or {})


def groups_made_by(actor: Any) -> dict[str, bool]:
    """Placement groups an actor has made, by id: True while some of it waits for its place."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    made_by, record = actor._actor_id.binary(), vars(gcs_pb2)["PlacementGroupTableData"]
    table = state._connect_and_get_accessor().get_placement_group_table()
    groups = [record.FromString(entry) for entry in table]
    return {
        group.placement_group_id.hex(): group.state != record.CREATED
        for group in groups
        if group.creator_actor_id == made_by and group.state != record.REMOVED
    }


def remove_group(group_id: str) -> None:
    """Remove a placement group; what is in it ends."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


class NodeRequest:
    """What one run wants the cluster to be able to hold, beside what others want.

    `request_resources` is last-call-wins for a whole cluster, and Ray Train calls it every 20 s
    from an actor that adds up what several ask. So we ask that actor, too: neither the learner's
    request nor that of a second run replaces ours. What is asked is a floor, not a reservation,
    and ends by itself if it is not asked again.
    """

    def __init__(self, requester: str, *, expires_s: float) -> None:
        """
        Args:
            requester: tells this run's request from others.
            expires_s: what was not asked again for so long is forgotten.
        """
        self._requester = requester
        self._expires_s = expires_s
        self._client: Any = None

    def ask(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Replace what this run asked before; blocks for seconds the first time."""
        if self._client is None:
            # Imported here: it costs seconds, and most runs have no autoscaler.
            from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

            made = default_autoscaling_coordinator.DefaultAutoscalingCoordinator
            self._client = made(self._requester)
        self._client.request_resources([dict(bundle) for bundle in bundles], self._expires_s)

    def withdraw(self) -> None:
        """Ask for nothing any more."""
        if self._client is not None:
            self._client.cancel_request()


def drain(node_id: str, message: str, left_s: float) -> bool:
    """Have Ray place nothing more on a node; False if it refused."""
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    # The generated module has no types, and the client is an attribute made at run time.
    reasons, client = vars(autoscaler_pb2)["DrainNodeReason"], vars(worker)["global_worker"]
    accepted, reason = client.gcs_client.drain_node(
        node_id,
        reasons.Value("DRAIN_NODE_REASON_PREEMPTION"),
        message,
        int((time.time() + left_s) * 1000),
    )
    if not accepted:
        logger.warning("A node was not drained: %s node=%s", reason, node_id)
    return accepted


class NodeSpotWatcher:
    """Watches the metadata service of the node it runs on and has the node drained."""

    def __init__(self, config: SpotConfig) -> None:
        self._watcher = SpotWatcher(self._on_notice, config)

    async def run(self) -> None:
        """Watch for ever; returns at once where there is no cloud."""
        await self._watcher.run()

    async def _on_notice(self, notice: SpotNotice) -> None:
        left_s = notice.left_s(time.time())
        node = ray.get_runtime_context().get_node_id()
        await asyncio.to_thread(
            drain, node, f"spot notice: {notice.reason}", ADVICE_S if left_s is None else left_s
        )


# One that is restarted is asked again to watch.
SpotActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(NodeSpotWatcher)


def start_spot_watcher(node_id: str, config: SpotConfig) -> Any:
    """A watcher on a node; returns its handle."""
    actor = SpotActor.options(**_on(node_id)).remote(config)
    actor.run.remote()
    return actor
