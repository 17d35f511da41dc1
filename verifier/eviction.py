"""Which kept state goes when there is no room: the least recently used, leaves before others.

A state is a process, and a node whose process has gone comes back by replay, so eviction costs time
and never an answer. States on which a child is being forked stay.
"""

from __future__ import annotations

import time
from typing import Any

from verifier.host_gauges import live_cap, memory_left
from verifier.state_processes import Processes
from verifier.tree_records import Node, Tree

SHORT = 0.15
"""Share of the memory left at which states go: well before Ray kills actors, at 0.05."""

DESPERATE = 0.06
"""Share left at which even the few states go that a sandbox works with."""


class Eviction:
    """Keeps the live processes below the limits of tree, sandbox and machine."""

    def __init__(
        self, processes: Processes, limits: dict[str, Any], *, cores: int, share: float
    ) -> None:
        """
        Args:
            share: part of the machine that this sandbox may use.
        """
        self.processes, self.limits = processes, limits
        self.live_cap = live_cap(limits["live_states"], share)
        self._few = 8 * cores
        """Without these every step would replay its path, and little memory be won."""
        self._next_memory_check = 0.0

    def make_room(self, tree: Tree, spare: Node | None = None) -> bool:
        """Bring tree and pool below their limits of live processes; False if nothing can go."""
        while tree.live >= self.limits["live_states_per_tree"]:
            if not self._evict_one(tree, spare):
                return False
        while self.processes.live >= self.live_cap:
            if not self._evict_one(None, spare):
                return False
        now = time.monotonic()
        if now >= self._next_memory_check:
            self._next_memory_check = now + 0.1
            left = memory_left()
            if left < SHORT and (self.processes.live > self._few or left < DESPERATE):
                self.processes.counts["memory_pressure"] += 1
                self.evict_some(max(4, len(self.processes.idle) // 10), spare)
        return True

    def evict_some(self, count: int, spare: Node | None = None) -> None:
        for _ in range(count):
            if not self._evict_one(None, spare):
                return

    def _evict_one(self, tree: Tree | None, spare: Node | None) -> bool:
        fallback = None
        for node in self.processes.idle.values():
            if node.busy or node is spare or (tree is not None and node.tree is not tree):
                continue
            if node.live_children == 0 and node.parent is not None:
                self.processes.evict(node)
                return True
            fallback = fallback or node
        if fallback is None:
            return False
        self.processes.evict(fallback)
        return True
