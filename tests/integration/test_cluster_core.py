"""Coordinator, workers, pools and store on a local Ray: things are killed, nothing is lost.

Searches are held by files: a search waits while its hold file exists. Only processes that a test
has started are ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import CoordinatorActor, RoundStatus
from cluster.jobs.coordinator_client import RemoteCoordinator
from cluster.jobs.pool import PolicyPool, PoolConfig, PreferencePool, SandboxPool
from cluster.jobs.queue import JobState, QueueConfig, SearchTask, StagePlan
from cluster.jobs.ray_errors import describe
from cluster.jobs.sandbox_worker import SandboxWorkerActor
from cluster.jobs.worker import RolloutWorkerActor, WorkerConfig
from rollout.engine import EngineError, GenerationReply, GenerationRequest
from rollout.problem import Problem
from rollout.search import SearchConfig, run_search
from rollout.store import RunStore, StoreError, TrajectoryStore
from rollout.tree import Tree
from tests.builders import answered, make_problem, make_tree
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference
from verifier import SandboxLimits
from verifier.host_gauges import live_cap, usable_cores

ROOT = Path(__file__).resolve().parents[2]
FAST = WorkerConfig(max_open_trees=4, renew_s=0.2, poll_s=0.05, engine_backoff_s=0.05)
QUEUE = QueueConfig(lease_s=3, max_attempts=3)

SCRIPT = {
    "": ["<code>\nx = 6 * 7\n<end_of_step>", "<code>\nx = 6 + 7\n<end_of_step>"],
    "x = 6 * 7\n<end_of_step>": ["print(x)\n<end_of_code>"],
    "x = 6 + 7\n<end_of_step>": ["print(x)\n<end_of_code>"],
    "42<end_of_output>\n": ["<answer>It is \\boxed{42}<end_of_answer>"],
    "13<end_of_output>\n": ["<answer>It is \\boxed{13}<end_of_answer>"],
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        namespace=uuid.uuid4().hex,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


class HeldSearch:
    """Makes a tree without engines, once its hold file is gone; notes each start in a file."""

    def __init__(self, folder: Path, hold: Path) -> None:
        self.folder = folder
        self.hold = hold

    async def __call__(self, problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{problem.id}.{uuid.uuid4().hex}").touch()
        while self.hold.exists():
            await asyncio.sleep(0.01)
        made = make_tree(
            answered("7", correct=True), problem=problem, round=task.round, index=task.index
        )
        return [made]


class EngineSearch:
    """The real search over pools of scripted engines."""

    def __init__(
        self, policy: PolicyPool, preference: PreferencePool, sandbox: SandboxPool
    ) -> None:
        self.engines: dict[str, Any] = {
            "policy": policy,
            "preference": preference,
            "sandbox": sandbox,
        }

    async def __call__(self, problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        config = SearchConfig(num_candidates=2, num_rollouts=4, template="short")
        found = await run_search(
            problem,
            config=config,
            round=task.round,
            index=task.index,
            seed=task.seed,
            resume=tree,
            **self.engines,
        )
        return [found]


class Run:
    """A store, a coordinator actor and the workers a test starts."""

    def __init__(self, root: Path, num_problems: int, *, shard_size: int = 4) -> None:
        self.root = root
        self.problems = {f"p{n}": make_problem(f"p{n}", answer="42") for n in range(num_problems)}
        self.coordinator = CoordinatorActor.remote(str(root), QUEUE)
        self.workers: list[Any] = []
        self.started = root.parent / "started"
        ray.get(
            self.coordinator.plan.remote(
                StagePlan(
                    round=1,
                    stage="base",
                    tree_index=0,
                    problem_ids=tuple(self.problems),
                    shard_size=shard_size,
                    seed=1,
                )
            )
        )

    def worker(self, name: str, search: object, config: WorkerConfig = FAST) -> Any:
        worker = RolloutWorkerActor.remote(
            name, RemoteCoordinator(self.coordinator), str(self.root), self.problems, search, config
        )
        worker.run.remote()
        self.workers.append(worker)
        return worker

    def status(self) -> RoundStatus:
        return ray.get(self.coordinator.status.remote(1))

    def searches_started(self) -> list[str]:
        return [path.name.split(".")[0] for path in self.started.glob("*")]

    def done(self) -> int:
        return self.status().stages["base"].counts.problems[JobState.DONE]

    def finish(self) -> TrajectoryStore:
        """Wait for the round, seal it, and count every problem exactly once."""
        until(lambda: self.status().finished)
        status = self.status()
        ray.get(self.coordinator.seal.remote(1))
        store = TrajectoryStore(RunStore(self.root), 1)
        audit = audit_round(store, reported=status.totals.trees)
        assert audit.clean and audit.committed == len(self.problems) and not audit.quarantined
        assert sorted(t.problem.id for t in store.trees()) == sorted(self.problems)
        return store

    def close(self) -> None:
        for actor in [*self.workers, self.coordinator]:
            ray.kill(actor)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_run(num_problems: int, **other: int) -> Run:
        runs.append(Run(tmp_path / "run", num_problems, **other))
        return runs[-1]

    yield start_run
    for run in runs:
        run.close()


def until(condition: Callable[[], bool], *, limit_s: float = 300) -> None:
    give_up_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up_s, "the condition did not come true in time"
        time.sleep(0.03)


def kill(actor: Any) -> int:
    """kill -9 of an actor's process; returns its id."""
    pid = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    return pid


def hold(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"hold-{name}"
    path.touch()
    return path


@ray.remote(num_cpus=0)
class Liar:
    """Leases everything and says that it is committed."""

    def __init__(self, coordinator: RemoteCoordinator) -> None:
        self.coordinator = coordinator

    async def lie(self) -> list[str]:
        """What it was answered."""
        answers = []
        while (lease := await self.coordinator.grant("liar")) is not None:
            try:
                answers.append(str(await self.coordinator.complete(lease.job.id, lease.id)))
            except StoreError as error:
                answers.append(describe(error))
        return answers


def test_worker_that_commits_nothing_is_not_believed(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(8)
    liar = Liar.remote(RemoteCoordinator(run.coordinator))
    run.workers.append(liar)
    answers = ray.get(liar.lie.remote())
    assert len(answers) == 2 and all("has no marker of it on machine" in a for a in answers)
    assert run.done() == 0 and not run.status().finished
    ray.get(run.coordinator.forget_worker.remote("liar"))
    run.worker("w1", HeldSearch(run.started, tmp_path / "no-hold"))
    run.finish()


@ray.remote(num_cpus=0)
class PolicyActor(ScriptedPolicy):
    """A scripted policy in a process of its own, not too fast to be killed at work."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        await asyncio.sleep(0.02)
        return await super().generate(request)

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class HeldPolicyActor(ScriptedPolicy):
    """A scripted policy that notes each request in a folder and waits while a hold file exists."""

    async def hold(self, folder: Path, hold: Path) -> None:
        self.folder, self.held = folder, hold

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        (self.folder / f"{os.getpid()}.{uuid.uuid4().hex}").touch()
        while self.held.exists():
            await asyncio.sleep(0.01)
        return await super().generate(request)

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class PreferenceActor(TablePreference):
    """A scripted preference model in a process of its own."""


def test_search_runs_through_pools_of_actors_one_of_which_is_killed(
    start: Callable[..., Run],
) -> None:
    run = start(12)
    policies = {f"policy-{n}": PolicyActor.remote(SCRIPT) for n in range(2)}
    preference = PreferenceActor.remote({"42}<end_of_answer>": 0.9})
    sandboxes = {
        "sandbox-0": SandboxWorkerActor.options(num_cpus=0).remote(
            sandbox=ScriptedSandbox({"print(x)": "42\n"})
        )
    }
    search = EngineSearch(
        PolicyPool(policies, PoolConfig(rest_s=0.1)),
        PreferencePool({"ppm-0": preference}),
        SandboxPool(sandboxes),
    )
    run.worker("w1", search)
    until(lambda: run.done() >= 4)
    kill(policies["policy-1"])
    store = run.finish()
    trees = list(store.trees())
    assert all(tree.solved for tree in trees)
    assert {tree.policy_version for tree in trees} == {"scripted-policy"}
    assert {n.value for tree in trees for n in tree.answers()} == {0.9}
    assert ray.get(sandboxes["sandbox-0"].stats.remote())["open_trees"] == 0
    for actor in [*policies.values(), preference, *sandboxes.values()]:
        ray.kill(actor)


async def test_a_tree_goes_on_when_a_replica_dies_with_its_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is answered by the other replica; the search is not started again."""
    asked, gate = tmp_path / "asked", hold(tmp_path, "policy")
    asked.mkdir()
    policies = {f"policy-{n}": HeldPolicyActor.remote(SCRIPT) for n in range(2)}
    for actor in policies.values():
        await actor.hold.remote(asked, gate)
    pids = {await actor.pid.remote(): actor for actor in policies.values()}
    pool = PolicyPool(policies, PoolConfig(rest_s=0.1))
    sandbox = ScriptedSandbox({"print(x)": "42\n"})
    search = asyncio.create_task(
        run_search(
            make_problem("p0", answer="42"),
            config=SearchConfig(num_candidates=2, num_rollouts=2, template="short"),
            policy=pool,
            preference=None,
            sandbox=sandbox,
            round=1,
            seed=1,
        )
    )
    async with asyncio.timeout(300):
        while not (first := list(asked.iterdir())):
            await asyncio.sleep(0.01)
        dying = int(first[0].name.partition(".")[0])
        os.kill(dying, signal.SIGKILL)
        while len(list(asked.iterdir())) < 2:
            await asyncio.sleep(0.01)
        gate.unlink()
        tree = await search
    assert tree.solved and caplog.text.count("A call is tried again") == 1
    assert len(pool._replicas) == 1
    assert {int(note.name.partition(".")[0]) for note in asked.iterdir()} == set(pids)
    ray.kill(next(actor for pid, actor in pids.items() if pid != dying))


def test_killed_worker_loses_no_problem(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(12)
    held = hold(tmp_path, "w1")
    first = run.worker("w1", HeldSearch(run.started, held))
    until(lambda: len(run.searches_started()) == 4)
    kill(first)
    run.worker("w2", HeldSearch(run.started, tmp_path / "none"))
    run.finish()
    assert len(run.searches_started()) >= 12 + 4
    assert ray.get(run.coordinator.stats.remote()).leases.expired >= 1


def test_killed_coordinator_comes_back_and_a_worker_keeps_its_lease(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(8)
    held = hold(tmp_path, "w1")
    run.worker("w1", HeldSearch(run.started, held))
    until(lambda: len(run.searches_started()) == 4)
    quick = run.worker("w2", HeldSearch(run.started, tmp_path / "none"))
    until(lambda: run.done() == 4)
    assert ray.get(quick.drain.remote()).committed.trees == 4
    before = ray.get(run.coordinator.stats.remote())
    kill(run.coordinator)
    until(lambda: ray.get(run.coordinator.stats.remote()).leases.adopted == 1)
    assert ray.get(run.coordinator.stats.remote()).epoch != before.epoch
    assert run.done() == 4
    held.unlink()
    run.finish()
    assert sorted(run.searches_started()) == sorted(run.problems)


def test_zombie_that_commits_late_changes_nothing(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(4)
    held = hold(tmp_path, "zombie")
    never_renews = FAST.model_copy(update={"renew_s": 3600})
    zombie = run.worker("zombie", HeldSearch(run.started, held), never_renews)
    until(lambda: len(run.searches_started()) == 4)
    run.worker("w2", HeldSearch(run.started, tmp_path / "none"))
    store = run.finish()
    held.unlink()
    until(lambda: ray.get(zombie.progress.remote()).open_trees == 0)
    until(lambda: ray.get(run.coordinator.stats.remote()).leases.late_completions == 1)
    assert ray.get(zombie.progress.remote()).committed.trees == 0
    assert audit_round(store, reported=4).clean
    (commit,) = store.commits().values()
    assert commit.info["writer"] == "w2"
    assert store.store.files("trajectories/round=1/data") == [commit.path]


def test_second_coordinator_on_the_same_store_continues_the_run(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    """What `kill -9` of everything and a second start amount to."""
    first = start(12)
    held = hold(tmp_path, "w1")
    quick = first.worker("w1", HeldSearch(first.started, tmp_path / "none"))
    until(lambda: first.done() >= 4)
    kill(quick)
    first.close()
    held.unlink()
    second = start(12)
    done = second.done()
    assert done >= 4
    second.worker("w2", HeldSearch(second.started, tmp_path / "none"))
    second.finish()


@pytest.mark.parametrize("num_cpus", [1, 0], ids=["a CPU each", "nothing reserved"])
def test_two_sandbox_workers_on_one_node_take_half_of_it_each(num_cpus: int) -> None:
    """Half of two CPUs reserved, or an equal part with the sibling."""
    limits = SandboxLimits(live_states=10**6)
    actors = [
        SandboxWorkerActor.options(num_cpus=num_cpus).remote(limits, "best_effort", 2)
        for _ in range(2)
    ]
    try:
        found = ray.get([actor.stats.remote() for actor in actors], timeout=800)
    finally:
        for actor in actors:
            ray.kill(actor)
    assert [stats["cores"] for stats in found] == [max(1, usable_cores() // 2)] * 2
    assert [stats["live_cap"] for stats in found] == [live_cap(10**6, 0.5)] * 2


def test_real_sandbox_dies_with_its_actor(tmp_path: Path) -> None:
    actor = SandboxWorkerActor.options(num_cpus=0).remote(None, "best_effort", cores=1)
    pool = SandboxPool({"s": actor}, PoolConfig(attempts=1, rest_s=0))

    async def use() -> None:
        root = await pool.open("t")
        results = await pool.run(root, ["x = 6 * 7\nprint(x)", "1/0"])
        assert [str(r.status) for r in results] == ["ok", "error"]
        assert results[0].stdout == "42\n"
        deeper = await pool.run(results[0].state or "", ["print(x + 1)"])
        assert deeper[0].stdout == "43\n"
        pid = await actor.pid.remote()
        processes = descendants(pid)
        assert processes
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await pool.run(root, ["print(x)"])
        await pool.close("t")
        until(lambda: not any(Path(f"/proc/{p}").exists() for p in processes), limit_s=60)

    asyncio.run(use())


def descendants(pid: int) -> Sequence[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
