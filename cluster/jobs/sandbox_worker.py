"""The CPU actor around the step sandbox: the same calls, plus care for trees nobody closes.

One actor holds one sandbox (one supervisor, the cores it is given) and any number of trees. A
search may be run twice at a time (a worker that lost its lease lives on for a while), so a tree
belongs to an *owner*: the first opener of a tree id gets the sandbox's tree of that name, and
another owner a twin of it, with the same random state. An owner that opens its tree again gets a
fresh one. A tree not used for `tree_idle_s` is closed: its worker is gone.

Sandbox workers share a node: each uses the part of it that it reserved (of the resource of which
that is the largest part), and one that reserves nothing an equal part with all its siblings, any of
which may stand beside it. A worker without siblings has the whole machine.

Whatever fails here and is not the fault of the code, an unknown state included, is a
`SandboxError`: never a label.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.telemetry import metrics
from cluster.telemetry.tracing import Traced
from verifier import AsyncSandbox, SandboxError, SandboxLimits, StepResult
from verifier.sandbox import Isolation
from verifier.sandbox_wire import TWIN


@dataclass(slots=True)
class _OpenTree:
    name: str
    """Of the tree inside the sandbox."""
    used_s: float
    running: int = 0
    closed: bool = False
    states: set[str] = field(default_factory=set)


class SandboxWorker(Traced):
    """Opens, runs and closes trees in one sandbox; see the module."""

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        isolation: Isolation = "strict",
        siblings: int = 1,
        *,
        cores: int | None = None,
        tree_idle_s: float = 1800.0,
        sandbox: AsyncSandbox | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            limits, isolation, cores: as `verifier.AsyncSandbox` takes them.
            siblings: sandbox workers there may be in the run, this one included.
            tree_idle_s: a tree not used for so long is closed when another is opened.
            sandbox: used instead of a new one.
        Raises:
            SandboxError: the sandbox cannot start here.
        """
        self._sandbox = sandbox or AsyncSandbox(
            limits, isolation, cores=cores, share=_share_of_node(siblings)
        )
        self._tree_idle_s = tree_idle_s
        self._clock = clock
        self._trees: dict[tuple[str, str], _OpenTree] = {}
        self._names: set[str] = set()
        self._tree_of: dict[str, _OpenTree] = {}
        self._idle_closed = 0

    async def open(
        self, tree_id: str, owner: str = "", *, flavour: str = "base", seed: int = 0
    ) -> str:
        """Start a tree for an owner; returns the id of its root state.

        Args:
            flavour, seed: as `verifier.AsyncSandbox.open` takes them.
        Raises:
            SandboxError: no root could be made.
        """
        await self.close(tree_id, owner)
        await self._close_idle()
        name = tree_id if tree_id not in self._names else f"{tree_id}{TWIN}{owner}"
        tree = self._trees[tree_id, owner] = _OpenTree(name, self._clock())
        self._names.add(name)
        try:
            state = await self._sandbox.open(name, flavour=flavour, seed=seed)
        except BaseException as error:
            await self.close(tree_id, owner)
            if isinstance(error, ValueError):
                raise SandboxError(f"tree {name} could not be opened: {error}") from error
            raise
        self._keep(tree, state)
        return state

    async def run(
        self, state: str, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        """Run sibling codes, each on its own copy of `state`; order kept.

        Args:
            limits: for these steps only; None: the sandbox's.
        Raises:
            SandboxError: the state is not one of an open tree, or the sandbox failed.
        """
        tree = self._tree_of.get(state)
        if tree is None:
            raise SandboxError(f"state {state} is not one of an open tree")
        tree.running += 1
        began_s = time.monotonic()
        try:
            results = await self._sandbox.run(state, codes, limits)
        except ValueError as error:
            raise SandboxError(f"state {state} is lost: {error}") from error
        finally:
            tree.running -= 1
            tree.used_s = self._clock()
        metrics.count_steps(results, time.monotonic() - began_s)
        for result in results:
            if result.state is not None:
                self._keep(tree, result.state)
        return results

    async def close(self, tree_id: str, owner: str = "") -> None:
        """Free every state of an owner's tree; harmless if it is not open."""
        tree = self._trees.pop((tree_id, owner), None)
        if tree is None:
            return
        tree.closed = True
        for state in tree.states:
            del self._tree_of[state]
        tree.states.clear()
        try:
            with contextlib.suppress(ValueError):  # its opening had failed
                await self._sandbox.close(tree.name)
        finally:
            self._names.discard(tree.name)

    async def stats(self) -> dict[str, Any]:
        """The sandbox's own counters, open trees, and trees closed because nobody used them."""
        stats = await self._sandbox.stats()
        return {**stats, "open_trees": len(self._trees), "idle_closed": self._idle_closed}

    def pid(self) -> int:
        """Process id, for logs and tests."""
        return os.getpid()

    def shutdown(self) -> None:
        """End the sandbox and all its processes."""
        self._sandbox.shutdown()

    def _keep(self, tree: _OpenTree, state: str) -> None:
        if not tree.closed:
            tree.states.add(state)
            self._tree_of[state] = tree

    async def _close_idle(self) -> None:
        now_s = self._clock()
        idle = [
            key
            for key, tree in self._trees.items()
            if not tree.running and now_s - tree.used_s > self._tree_idle_s
        ]
        for tree_id, owner in idle:
            self._idle_closed += 1
            await self.close(tree_id, owner)


def _share_of_node(siblings: int) -> float:
    """Part of this node that this actor may use; see the module."""
    if siblings == 1:
        return 1.0
    here = ray.get_runtime_context()
    offers = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == here.get_node_id())
    reserved = here.get_assigned_resources()
    parts = [amount / offers[name] for name, amount in reserved.items() if offers.get(name)]
    return max(parts, default=0.0) or 1 / siblings


SandboxWorkerActor = ray.remote(SandboxWorker)
