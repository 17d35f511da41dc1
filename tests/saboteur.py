"""Kills processes of a running fleet, one of each kind, and waits until each is replaced; fills its
disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.fleet.fleet import Fleet
from rollout.problem import Problem
from rollout.search import SearchConfig, run_search
from rollout.seeds import derive_seed
from rollout.store import TrajectoryStore
from rollout.tasks import all_of
from rollout.tree import Tree
from tests.fakes import ScriptedPolicy, TablePreference, random_steps
from tests.scripted_replicas import hash_value
from verifier import AsyncSandbox

KINDS = (
    "coordinator",
    "rollout worker",
    "sandbox supervisor",
    "sandbox worker",
    "PPM replica",
    "policy replica",
)
"""Last what a run cannot end without, so that it does not end before the last one is replaced."""


class Saboteur:
    """kill -9 in the middle of a rollout."""

    def __init__(self, fleet: Fleet, kinds: Sequence[str] = KINDS) -> None:
        self.fleet = fleet
        self.kinds = kinds
        self.killed: Counter[str] = Counter()
        """As `RolloutOutcome.losses` counts them."""

    async def work(self) -> None:
        for kind in self.kinds:
            await self._some_progress()
            pid = await _VICTIMS[kind](self)
            counted = {"policy engine": "policy replica"}.get(kind, kind)
            self.killed[counted] += 1
            os.kill(pid, signal.SIGKILL)
            await until(lambda counted=counted: self._restarts(counted) >= self.killed[counted])

    def _restarts(self, kind: str) -> int:
        return self.fleet.pools.losses()[kind].restarts

    async def _some_progress(self) -> None:
        """Wait until trees were finished, or only held ones are left."""
        before, give_up_s = self._tokens(), time.monotonic() + 5.0
        await until(lambda: self._tokens() > before or time.monotonic() > give_up_s)

    def _tokens(self) -> int:
        return sum(p.finished.generated_tokens for p in self.fleet.progress())

    def _first(self, name: str) -> Any:
        return next(iter(self.fleet.pools.handles(name).values()))

    async def _replica(self, name: str) -> int:
        return (await self._first(name).ready.remote()).pid

    async def _engine(self) -> int:
        owner = psutil.Process(await self._replica("policy"))
        return max(owner.children(), key=lambda process: process.memory_info().rss).pid

    async def _supervisor(self) -> int:
        return (await self._first("sandbox").stats.remote())["supervisor_pid"]

    async def _pid(self, name: str) -> int:
        return await self._first(name).pid.remote()


_VICTIMS: dict[str, Callable[[Saboteur], Awaitable[int]]] = {
    "rollout worker": lambda at: at._pid("worker"),
    "policy replica": lambda at: at._replica("policy"),
    "policy engine": lambda at: at._engine(),
    "PPM replica": lambda at: at._replica("ppm"),
    "sandbox supervisor": lambda at: at._supervisor(),
    "sandbox worker": lambda at: at._pid("sandbox"),
    "coordinator": lambda at: at._pid("coordinator"),
}
"""How the process id of one of each kind is found."""


async def until(condition: Callable[[], bool], limit_s: float = 600) -> None:
    """Wait for something to come true."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)


def can_mount() -> bool:
    """Whether `small_disk` works here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[None]:
    """A real file system in a folder, that is soon full."""
    what = ["-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    subprocess.run(["mount", *what], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


@asynccontextmanager
async def stopped_at_the_end(fleet: Fleet, *, processes: bool = True) -> AsyncIterator[None]:
    """Around start and use of a fleet; fails if a process of it is left over.

    Args:
        processes: False if Ray runs on after it.
    """
    before = set(psutil.Process().children(recursive=True))  # as the answer check's own
    try:
        yield
    finally:
        children = psutil.Process().children(recursive=True) if processes else []
        started = [child for child in children if child not in before]
        await fleet.stop()
        _, alive = psutil.wait_procs(started, timeout=60)
        assert [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def shape(tree: Tree) -> list[tuple[Any, ...]]:
    """All that a search decided."""
    return [(n.parent, n.step, n.stdout, n.visit_count, n.value_sum) for n in tree.nodes]


async def undisturbed(
    problems: Sequence[Problem],
    search: SearchConfig,
    seed: int,
    *,
    round: int = 1,
    preference: bool,
) -> dict[str, Tree]:
    """The trees of a round of a run on scripted replicas that nothing happens to."""
    sandbox = AsyncSandbox(isolation="best_effort", cores=1)

    async def searched(problem: Problem) -> Tree:
        return await run_search(
            problem,
            config=search,
            policy=ScriptedPolicy(random_steps),
            preference=TablePreference(hash_value) if preference else None,
            sandbox=sandbox,
            round=round,
            seed=derive_seed(seed, round, problem.id, 0),
        )

    try:
        trees = await all_of(searched(problem) for problem in problems)
        return {tree.problem.id: tree for tree in trees}
    finally:
        sandbox.shutdown()


async def check_solves_as_undisturbed(
    fleet: Fleet,
    problems: Sequence[Problem],
    search: SearchConfig,
    *,
    round: int = 1,
    preference: bool = False,
) -> None:
    """What a disturbed round of a fleet has solved is what it would have solved anyway."""
    seed = fleet.config.seed
    expected = await undisturbed(problems, search, seed, round=round, preference=preference)
    assert TrajectoryStore(fleet.store, round).solved() == {
        problem for problem, tree in expected.items() if tree.solved
    }
