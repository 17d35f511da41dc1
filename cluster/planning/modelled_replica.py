"""One engine with its rollout worker, as the simulation models them; told the time, it keeps none.

Its open trees share its speed equally, so one number says how far all of them are: `per_tree`, the
tokens that a tree would have had, had it been open all the time. A tree ends when `per_tree` has
grown by the tokens it needs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.jobs.queue import Lease
from cluster.machines.scaler import MemberState


@dataclass(slots=True)
class ModelledShard:
    """A job in its hands."""

    lease: Lease
    done: list[int] = field(default_factory=list)
    """Problem numbers of the trees that have ended."""
    committing: bool = False


@dataclass(slots=True)
class ModelledReplica:
    """One engine and its worker."""

    name: str
    speed: float
    state: MemberState = MemberState.STARTING
    zone: int | None = None
    """Where it has its place; None: it waits for one, or another may have it."""
    placed_s: float = math.inf
    ready_s: float = math.inf
    ended_s: float = math.inf
    idle_s: float = 0.0
    """Its node is paid for so long after its end."""
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
    per_tree_s: float = 0.0
    """How fast `per_tree` grows now."""
    updated_s: float = 0.0
    version: int = 0
    """Of the finish event that counts."""
    generated: float = 0.0

    @property
    def dead(self) -> bool:
        return self.ended_s < math.inf

    @property
    def in_hand(self) -> int:
        """Trees, open ones and waiting ones."""
        return len(self.trees) + len(self.queue)

    def advance(self, now_s: float) -> None:
        """Bring the trees up to now."""
        passed_s = now_s - self.updated_s
        if passed_s > 0:
            grown = self.per_tree_s * passed_s
            self.per_tree += grown
            self.generated += grown * len(self.trees)
        self.updated_s = now_s

    def take(self, lease: Lease, numbers: Sequence[int]) -> None:
        """Have the trees of a job wait for their slots, after those that wait already."""
        shard = self.shards[lease.job.id] = ModelledShard(lease)
        self.queue[:0] = [(shard, number) for number in reversed(numbers)]

    def fill(self, speeds: Sequence[float], todo: Callable[[int], float]) -> float | None:
        """Give free slots to waiting trees.

        Args:
            speeds: tokens per second of one tree by the number of open ones, from 0 to the slots.
            todo: tokens that the tree of a problem number still needs.
        Returns:
            Seconds until the next tree ends; None: none is open.
        """
        while self.queue and len(self.trees) + 1 < len(speeds):
            shard, number = self.queue.pop()
            heapq.heappush(self.trees, (self.per_tree + todo(number), number, shard))
        self.per_tree_s = speeds[len(self.trees)] * self.speed
        self.version += 1
        if not self.trees:
            return None
        return max(0.0, self.trees[0][0] - self.per_tree) / self.per_tree_s

    def end_trees(self) -> list[ModelledShard]:
        """End the next tree and those that end with it; the shards that are to be committed now."""
        complete = []
        # Rounding must not leave the tree behind that is due.
        self.per_tree = max(self.per_tree, self.trees[0][0])
        while self.trees and self.trees[0][0] <= self.per_tree:
            _, number, shard = heapq.heappop(self.trees)
            shard.done.append(number)
            if len(shard.done) == len(shard.lease.job.problem_ids):
                shard.committing = True
                complete.append(shard)
        return complete

    def drop(self, shard: ModelledShard) -> None:
        """Forget a shard and its trees."""
        self.trees = [tree for tree in self.trees if tree[2] is not shard]
        heapq.heapify(self.trees)
        self.queue = [entry for entry in self.queue if entry[0] is not shard]
        del self.shards[shard.lease.job.id]
