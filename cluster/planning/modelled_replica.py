"""One engine and its worker at virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.jobs.queue import Lease
from cluster.machines.scaler import ReplicaState


@dataclass(slots=True)
class ModelledShard:
    lease: Lease
    todo: int
    """Trees that have not ended."""
    done: list[int] = field(default_factory=list)
    """Problem numbers of the trees that have."""
    committing: bool = False


@dataclass(slots=True)
class ModelledReplica:
    """One engine and its worker."""

    name: str
    asked_s: float
    speed: float
    state: ReplicaState = ReplicaState.STARTING
    ready_s: float = math.inf
    ended_s: float = math.inf
    cut_off: bool = False
    """A zombie: it reaches the store, and not the coordinator."""
    draining: bool = False
    polls: bool = False
    shards: dict[str, ModelledShard] = field(default_factory=dict)
    queue: list[tuple[ModelledShard, int]] = field(default_factory=list)
    """(shard, problem number) that wait for a slot, the next one last."""
    trees: list[tuple[float, int, ModelledShard]] = field(default_factory=list)
    """Heap of (tokens per tree at which it ends, problem number, shard)."""
    per_tree: float = 0.0
    """Tokens each open tree would have had, had it been open all the time."""
    per_tree_s: float = 0.0
    """How fast `per_tree` grows now."""
    updated_s: float = 0.0
    version: int = 0
    """Of the finish event that counts."""
    generated: float = 0.0

    @property
    def dead(self) -> bool:
        return self.ended_s < math.inf
