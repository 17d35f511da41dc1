"""The rollout worker on a local coordinator and store, with searches the test controls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.admission import AdmissionConfig, EnginePressure
from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.queue import JobState, Lease, QueueConfig, SearchTask, StagePlan
from cluster.jobs.worker import RolloutWorker, WorkerConfig
from learner.candidates import Recipe, table_from_bytes
from learner.select import DatasetConfig, recipe_of
from rollout.engine import EngineError
from rollout.open_trees import OpenTreeStore
from rollout.problem import Problem
from rollout.prompt import SHORT_TEMPLATE
from rollout.search import SearchError
from rollout.store import StoreError, TrajectoryStore
from rollout.tree import Tree
from tests.builders import answered, make_problem, make_tree

FAST = WorkerConfig(
    max_open_trees=4,
    renew_s=0.02,
    poll_s=0.005,
    engine_backoff_s=0.001,
    outage_pause_s=0.02,
)


class LocalCoordinator:
    """A coordinator in this process behind the client's interface; counts renewals."""

    def __init__(self, inner: Coordinator) -> None:
        self.inner = inner
        self.renewals = 0
        self.asked = 0
        self.grants: list[str] = []

    async def grant(self, worker: str) -> Lease | None:
        self.asked += 1
        lease = self.inner.grant(worker)
        if lease is not None:
            self.grants.append(lease.job.id)
        return lease

    async def renew(
        self, worker: str, leases: Sequence[tuple[str, str]], progress: WorkerProgress
    ) -> list[str]:
        self.renewals += 1
        return self.inner.renew(worker, leases, progress)

    async def complete(self, job_id: str, lease_id: str) -> bool:
        return self.inner.complete(job_id, lease_id)

    async def release(self, job_id: str, lease_id: str) -> bool:
        return self.inner.release(job_id, lease_id)

    async def fail(self, job_id: str, lease_id: str, error: str) -> bool:
        return self.inner.fail(job_id, lease_id, error)


class Searches:
    """Searches that end at once, unless a problem is held, broken or without engines."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.open: set[str] = set()
        self.max_open = 0
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, list[Exception]] = {}
        self.tasks: dict[str, SearchTask] = {}
        self.more: tuple[int, ...] = ()
        """Further trees of each problem, by index."""

    def hold(self, *problem_ids: str) -> None:
        for problem_id in problem_ids:
            self.gates[problem_id] = asyncio.Event()

    def let_go(self, *problem_ids: str) -> None:
        for problem_id in problem_ids:
            self.gates[problem_id].set()

    async def __call__(self, problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        self.started.append(problem.id)
        self.tasks[problem.id] = task
        self.open.add(problem.id)
        self.max_open = max(self.max_open, len(self.open))
        try:
            await asyncio.sleep(0)
            if problem.id in self.gates:
                await self.gates[problem.id].wait()
            if self.errors.get(problem.id):
                raise self.errors[problem.id].pop()
            return [
                make_tree(
                    answered("7", correct=True), problem=problem, round=task.round, index=index
                )
                for index in (task.index, *self.more)
            ]
        finally:
            self.open.discard(problem.id)


async def die(worker: RolloutWorker) -> None:
    """End a worker at once; to stop waiting for its `run` does not end it."""
    if worker._run is not None:
        worker._run.cancel()
        await asyncio.gather(worker._run, return_exceptions=True)


class Setting:
    """One coordinator, one store, any number of workers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inner = Coordinator(str(root), QueueConfig(lease_s=60, max_attempts=2))
        self.coordinator = LocalCoordinator(self.inner)
        self.searches = Searches()
        self.store = TrajectoryStore(self.inner.store, 1)
        self.problem_ids: tuple[str, ...] = ()

    def plan(self, *problem_ids: str, shard_size: int = 4) -> None:
        self.problem_ids = problem_ids
        self.inner.plan(
            StagePlan(
                round=1,
                stage="base",
                tree_index=0,
                problem_ids=problem_ids,
                shard_size=shard_size,
                seed=5,
            )
        )

    def worker(
        self,
        name: str = "w1",
        *,
        config: WorkerConfig = FAST,
        search: Callable[[Problem, SearchTask, Tree], Awaitable[Tree]] | None = None,
        unknown: Sequence[str] = (),
        follows_engines: bool = False,
        recipe: Recipe | None = None,
        run_id: str | None = None,
    ) -> RolloutWorker:
        problems = {p: make_problem(p) for p in self.problem_ids if p not in unknown}
        return RolloutWorker(
            name,
            self.coordinator,
            str(self.root),
            problems,
            search or self.searches,
            config,
            info={"versions": {"rstar": "1"}},
            follows_engines=follows_engines,
            recipe=recipe,
            run_id=run_id,
        )

    @asynccontextmanager
    async def running(self, worker: RolloutWorker) -> AsyncIterator[asyncio.Task]:
        task = asyncio.create_task(worker.run())
        try:
            yield task
            await worker.drain()
            await task
        finally:
            await die(worker)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.002)

    async def finish(self) -> None:
        await self.until(lambda: self.inner.status(1).finished)

    def check(self, *, quarantined: Sequence[str] = ()) -> None:
        """Every problem once: in the sealed round, or quarantined."""
        self.inner.seal(1)
        audit = audit_round(self.store, reported=self.inner.status(1).totals.trees)
        assert audit.clean and sorted(audit.quarantined) == sorted(quarantined)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


async def test_worker_searches_and_commits_everything_once(setting: Setting) -> None:
    setting.plan(*"abcdefghij")
    async with setting.running(setting.worker()):
        await setting.finish()
    assert sorted(setting.searches.started) == list("abcdefghij")
    setting.check()
    assert [t.problem.id for t in setting.store.trees()] != []
    commit = next(iter(setting.store.commits().values()))
    assert commit.info["writer"] == "w1" and commit.info["stage"] == "base"
    assert commit.info["versions"] == {"rstar": "1"}


async def test_idle_worker_asks_less_and_less_often_and_still_finds_new_work(
    setting: Setting,
) -> None:
    setting.problem_ids = ("a", "b")
    config = FAST.model_copy(update={"poll_s": 0.001, "max_poll_s": 0.064, "renew_s": 5.0})
    async with setting.running(setting.worker(config=config)):
        await setting.until(lambda: setting.coordinator.asked >= 7)
        # 1 + 2 + ... + 32 ms are over: from here on it asks every 48 to 64 ms.
        before = setting.coordinator.asked
        await asyncio.sleep(0.2)
        assert setting.coordinator.asked - before <= 5
        setting.plan(*"ab")
        await setting.finish()
    assert sorted(setting.searches.started) == ["a", "b"]


async def test_search_is_told_round_stage_index_and_seed(setting: Setting) -> None:
    setting.plan("a", "b")
    async with setting.running(setting.worker()):
        await setting.finish()
    task = setting.searches.tasks["a"]
    assert (task.round, task.stage, task.index) == (1, "base", 0)
    assert task.seed != setting.searches.tasks["b"].seed


async def test_open_searches_are_bounded_over_shards(setting: Setting) -> None:
    setting.plan(*"abcdefghij", shard_size=3)
    setting.searches.hold(*"abcdefghij")
    async with setting.running(setting.worker()):
        await setting.until(lambda: len(setting.searches.open) == 4)
        renewals = setting.coordinator.renewals
        await setting.until(lambda: setting.coordinator.renewals >= renewals + 2)
        assert len(setting.coordinator.grants) == 2
        setting.searches.let_go(*"abcdefghij")
        await setting.finish()
    assert setting.searches.max_open == 4


async def test_open_searches_follow_the_engines(setting: Setting) -> None:
    admission = AdmissionConfig(min_trees=1, start_trees=2, increase=1, settle_s=0)
    config = FAST.model_copy(update={"admission": admission})
    setting.plan(*"abcdefghij", shard_size=3)
    setting.searches.hold(*"abcdefghij")
    worker = setting.worker(config=config, follows_engines=True)

    def told(waiting: int) -> None:
        said = EnginePressure(running=1, waiting=waiting, kv_usage=0.0, preemptions=0)
        worker.set_pressures("ppm", {"ppm-0": said})  # not what the trees follow
        worker.set_pressures("policy", {"policy-0": said})

    async with setting.running(worker):
        await setting.until(lambda: len(setting.searches.open) == 2)
        for _ in range(2):
            told(waiting=10)
        assert worker._slots.limit == 1
        assert setting.searches.max_open <= 2
        setting.searches.let_go(*setting.searches.open)

        def full() -> bool:
            told(waiting=0)
            return len(setting.searches.open) == FAST.max_open_trees

        await setting.until(full)
        assert worker._slots.limit == FAST.max_open_trees
        setting.searches.let_go(*"abcdefghij")
        await setting.finish()
    setting.check()


async def test_slow_problem_holds_up_no_other_shard(setting: Setting) -> None:
    setting.plan(*"abcdefgh", shard_size=2)
    setting.searches.hold("a")
    async with setting.running(setting.worker()):
        await setting.until(
            lambda: setting.inner.status(1).stages["base"].counts.problems[JobState.DONE] == 6
        )
        assert setting.searches.open == {"a"}
        setting.searches.let_go("a")
        await setting.finish()
    setting.check()


async def test_broken_problem_is_retried_then_quarantined_without_its_shard(
    setting: Setting,
) -> None:
    setting.plan(*"abcd")
    setting.searches.errors = {"b": [ValueError("bad")] * 9, "c": [ValueError("once")]}
    async with setting.running(setting.worker()):
        await setting.finish()
    assert setting.searches.started.count("b") == 2
    assert setting.searches.started.count("c") == 2
    assert setting.inner.status(1).stages["base"].failed == {"b": "ValueError: bad"}
    setting.check(quarantined=["b"])


async def test_problem_nobody_has_read_is_quarantined(setting: Setting) -> None:
    setting.plan(*"ab")
    async with setting.running(setting.worker(unknown=["b"])):
        await setting.finish()
    setting.check(quarantined=["b"])


async def test_search_that_returns_another_tree_is_quarantined(setting: Setting) -> None:
    setting.plan("a")

    async def wrong(problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        return [make_tree(problem=problem, index=task.index + 1)]

    async with setting.running(setting.worker(search=wrong)):
        await setting.finish()
    setting.check(quarantined=["a"])


async def test_engine_failure_is_retried_and_never_quarantines(setting: Setting) -> None:
    setting.plan(*"abcd")
    setting.searches.errors = {"b": [EngineError("died")] * 4}
    worker = setting.worker()
    async with setting.running(worker):
        await setting.finish()
    assert worker.progress().retried_searches == 4
    setting.check()


async def test_outage_hands_jobs_back_until_it_is_over(setting: Setting) -> None:
    setting.plan(*"abcdefgh")
    errors = {p: [EngineError("no policy replica is left")] * 200 for p in "abcdefgh"}
    setting.searches.errors = errors
    async with setting.running(setting.worker()):
        await setting.until(lambda: setting.inner.stats().leases.released >= 4)
        assert setting.inner.stats().leases.failed == 0
        for error in errors.values():
            error.clear()
        await setting.finish()
    setting.check()


async def test_problem_that_breaks_engines_is_set_apart_then_quarantined(
    setting: Setting,
) -> None:
    setting.plan(*"abcdefgh")
    setting.searches.errors = {"b": [EngineError("crashed")] * 999}
    config = FAST.model_copy(update={"outage_limit_s": 0.1})
    async with setting.running(setting.worker(config=config)):
        await setting.finish()
    groups = [group for c in setting.store.commits().values() for group in c.remaining]
    assert ("b",) in groups
    failed = setting.inner.status(1).stages["base"].failed
    assert failed == {"b": "problem b: EngineError: crashed"}
    setting.check(quarantined=["b"])


async def test_drain_commits_what_is_finished_and_hands_back_the_rest(setting: Setting) -> None:
    setting.plan(*"abcd")
    setting.searches.hold("b", "c")
    async with setting.running(setting.worker()):
        await setting.until(lambda: setting.searches.open == {"b", "c"})
    (commit,) = setting.store.commits().values()
    assert [t.problem_id for t in commit.trees] == ["a", "d"]
    assert commit.remaining == (("b", "c"),)
    assert not any(setting.inner._queue._held.values())
    setting.searches.let_go("b", "c")
    async with setting.running(setting.worker("w2")):
        await setting.finish()
    setting.check()


async def test_drain_with_nothing_finished_hands_the_job_back_untried(setting: Setting) -> None:
    setting.plan(*"ab")
    setting.searches.hold("a", "b")
    async with setting.running(setting.worker()):
        await setting.until(lambda: setting.searches.open == {"a", "b"})
    assert setting.store.commits() == {}
    assert setting.inner.stats().leases.released == 1


async def test_lease_that_comes_while_draining_is_handed_back(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.plan(*"ab")
    setting.searches.hold("a", "b")
    asked, answer = asyncio.Event(), asyncio.Event()
    grant = setting.coordinator.grant

    async def slow_grant(worker: str) -> Lease | None:
        asked.set()
        await answer.wait()
        return await grant(worker)

    monkeypatch.setattr(setting.coordinator, "grant", slow_grant)
    worker = setting.worker()
    run = asyncio.create_task(worker.run())
    await asked.wait()
    await worker.drain()
    answer.set()
    async with asyncio.timeout(30):
        await run
    assert setting.searches.started == []
    assert setting.inner.stats().leases.released == 1


async def test_drain_gives_open_searches_their_time(setting: Setting) -> None:
    setting.plan(*"abcd")
    setting.searches.hold("b")
    worker = setting.worker()
    run = asyncio.create_task(worker.run())
    await setting.until(lambda: setting.searches.open == {"b"})
    drain = asyncio.create_task(worker.drain(timeout_s=10))
    await asyncio.sleep(0.01)
    setting.searches.let_go("b")
    progress = await drain
    await run
    assert progress.committed.trees == 4
    setting.check()


class GrowingSearch:
    """A search of `steps` steps that may be held, or failed by an engine, before any of them."""

    def __init__(self, steps: int = 4) -> None:
        self.steps = steps
        self.asked: list[tuple[str, int]] = []
        self.hold_at: dict[str, int] = {}
        self.held: set[str] = set()
        self.errors: dict[tuple[str, int], Exception] = {}

    async def __call__(self, problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        while tree.num_requests < self.steps:
            step = tree.num_requests
            if self.hold_at.get(problem.id) == step:
                self.held.add(problem.id)
                await asyncio.Event().wait()
            if (problem.id, step) in self.errors:
                raise self.errors.pop((problem.id, step))
            self.asked.append((problem.id, step))
            await asyncio.sleep(0)
            tree.num_requests += 1
            tree.generated_tokens += 10
        return [tree]


def open_files(setting: Setting) -> list[str]:
    return setting.inner.store.files("trajectories/round=1/open")


async def test_search_goes_on_with_its_tree_after_an_engine_failure(setting: Setting) -> None:
    setting.plan("a")
    search = GrowingSearch(steps=30)
    search.errors = {("a", step): EngineError("died") for step in range(30)}
    async with setting.running(setting.worker(search=search)):
        await setting.finish()
    # More failures than tries of a search that does not move, and no step asked for twice.
    assert search.asked == [("a", step) for step in range(30)]
    setting.check()


async def test_search_begins_anew_after_a_failure_of_the_search(setting: Setting) -> None:
    setting.plan("a")
    search = GrowingSearch()
    search.errors = {("a", 2): SearchError("printed something else")}
    async with setting.running(setting.worker(search=search)):
        await setting.finish()
    assert [step for _, step in search.asked] == [0, 1, 0, 1, 2, 3]
    setting.check()


async def test_drained_searches_are_gone_on_with_by_the_next_holder(setting: Setting) -> None:
    setting.plan(*"abcd")
    first = GrowingSearch()
    first.hold_at = {"b": 3, "c": 2}
    async with setting.running(setting.worker(search=first)):
        await setting.until(lambda: first.held == {"b", "c"} and len(first.asked) == 13)
    assert len(open_files(setting)) == 1
    second = GrowingSearch()
    worker = setting.worker("w2", search=second)
    async with setting.running(worker):
        await setting.finish()
    assert sorted(second.asked) == [("b", 3), ("c", 2), ("c", 3)]
    assert worker.progress().resumed_trees == 2
    assert open_files(setting) == []
    setting.check()
    tokens = {tree.problem.id: tree.generated_tokens for tree in setting.store.trees()}
    assert tokens == dict.fromkeys("abcd", 40)


async def test_drain_keeps_open_trees_before_it_gives_them_time(setting: Setting) -> None:
    setting.plan("a")
    first, second = GrowingSearch(), GrowingSearch()
    first.hold_at = {"a": 3}
    worker = setting.worker(search=first)
    run = asyncio.create_task(worker.run())
    await setting.until(lambda: first.held == {"a"})
    drain = asyncio.create_task(worker.drain(timeout_s=600))
    await setting.until(lambda: len(open_files(setting)) == 1)
    assert not drain.done()  # killed now, with whoever asked for the drain, it has lost nothing
    drain.cancel()
    await die(worker)
    await asyncio.gather(drain, run, return_exceptions=True)
    setting.inner.forget_worker("w1")
    async with setting.running(setting.worker("w2", search=second)):
        await setting.finish()
    assert second.asked == [("a", 3)]
    setting.check()


async def test_worker_that_is_taken_over_goes_on_and_reports_from_then_on(setting: Setting) -> None:
    setting.plan(*"abcd", shard_size=1)
    setting.searches.hold("b")
    worker = setting.worker()
    first = asyncio.create_task(worker.run())
    await setting.until(lambda: worker.progress().committed.trees == 3)
    second = asyncio.create_task(worker.run())
    await setting.until(lambda: worker.progress().searches == 0)
    assert worker.progress().open_trees == 1
    setting.searches.let_go("b")
    await setting.finish()
    await worker.drain()
    assert await second == await first
    assert worker.progress().committed.trees == 1
    assert setting.searches.started.count("b") == 1
    setting.check()


async def test_job_handed_back_whole_keeps_its_open_trees(setting: Setting) -> None:
    setting.plan("a")
    first, second = GrowingSearch(), GrowingSearch()
    first.hold_at = {"a": 3}
    async with setting.running(setting.worker(search=first)):
        await setting.until(lambda: first.held == {"a"})
    assert setting.inner.stats().leases.released == 1
    async with setting.running(setting.worker("w2", search=second)):
        await setting.finish()
    assert second.asked == [("a", 3)]
    setting.check()


@pytest.mark.parametrize("damage", [b"", b"not a tree", None])
async def test_damaged_open_trees_are_ignored(setting: Setting, damage: bytes | None) -> None:
    setting.plan("a")
    first, second = GrowingSearch(), GrowingSearch()
    first.hold_at = {"a": 3}
    async with setting.running(setting.worker(search=first)):
        await setting.until(lambda: first.held == {"a"})
    (path,) = open_files(setting)
    content = setting.inner.store.read(path)
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    setting.inner.store.put(path, flipped if damage is None else damage)
    async with setting.running(setting.worker("w2", search=second)):
        await setting.finish()
    assert [step for _, step in second.asked] == [0, 1, 2, 3]
    setting.check()


async def test_open_tree_the_search_refuses_costs_no_attempt(setting: Setting) -> None:
    setting.plan("a")
    first = GrowingSearch()
    first.hold_at = {"a": 3}
    async with setting.running(setting.worker(search=first)):
        await setting.until(lambda: first.held == {"a"})
    started: list[int] = []

    async def refuse(problem: Problem, task: SearchTask, tree: Tree) -> list[Tree]:
        started.append(tree.num_requests)
        if tree.num_requests:
            raise ValueError("searched with other settings")
        return [tree]

    config = FAST.model_copy(update={"search_attempts": 1})
    async with setting.running(setting.worker("w2", search=refuse, config=config)):
        await setting.finish()
    assert started == [3, 0]
    setting.check()


async def test_open_trees_are_kept_now_and_then_for_the_next_holder_of_a_dead_workers_job(
    setting: Setting,
) -> None:
    setting.plan(*"ab")
    first, second = GrowingSearch(), GrowingSearch()
    first.hold_at = {"a": 3}
    config = FAST.model_copy(update={"checkpoint_open_trees_s": 0.01})
    worker = setting.worker(search=first, config=config)
    run = asyncio.create_task(worker.run())
    await setting.until(lambda: first.held == {"a"} and len(first.asked) == 7)
    (job,) = setting.inner._queue.jobs(1)
    kept = OpenTreeStore(setting.inner.store, 1)
    await setting.until(lambda: sum(tree.num_requests for tree in kept.load(job.id)) == 7)
    await die(worker)
    await asyncio.gather(run, return_exceptions=True)
    setting.inner.forget_worker("w1")
    async with setting.running(setting.worker("w2", search=second)):
        await setting.finish()
    assert second.asked == [("a", 3)]
    assert open_files(setting) == []
    setting.check()


async def test_lost_lease_stops_the_shard(setting: Setting) -> None:
    setting.plan(*"ab")
    setting.searches.hold("a", "b")
    worker = setting.worker()
    async with setting.running(worker):
        await setting.until(lambda: setting.searches.open == {"a", "b"})
        # Another worker, to whom the lease was given meanwhile, is faster.
        (job,) = setting.inner._queue.jobs(1)
        trees = [make_tree(problem=make_problem(p), round=1) for p in "ab"]
        setting.store.commit(job.id, trees)
        setting.inner.complete(job.id, "")
        await setting.until(lambda: not setting.searches.open)
    assert worker.progress().lost_leases == 1
    setting.check()


async def test_zombie_that_commits_too_late_reports_the_others_commit(setting: Setting) -> None:
    """The other one had handed a part back: the zombie must not hide that."""
    setting.plan(*"abc")
    setting.searches.hold("a")
    async with setting.running(setting.worker(config=FAST.model_copy(update={"renew_s": 60}))):
        await setting.until(lambda: setting.searches.open == {"a"})
        (job,) = setting.inner._queue.jobs(1)
        setting.store.commit(
            job.id, [make_tree(problem=make_problem("a"), round=1)], remaining=[["b", "c"]]
        )
        setting.searches.let_go("a")
        await setting.finish()
    assert len(setting.inner._queue.jobs(1)) == 2
    setting.check()


async def test_shard_committed_by_a_dead_worker_is_not_searched_again(setting: Setting) -> None:
    setting.plan(*"ab")
    (job,) = setting.inner._queue.jobs(1)
    setting.store.commit(job.id, [make_tree(problem=make_problem(p), round=1) for p in "ab"])
    async with setting.running(setting.worker()):
        await setting.finish()
    assert setting.searches.started == []
    setting.check()


async def test_failing_store_is_waited_out_while_the_lease_is_renewed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem_ids = [f"p{n:02}" for n in range(40)]
    setting.plan(*problem_ids)
    commit = TrajectoryStore.commit
    failing = [True]
    tried: list[str] = []

    def flaky(self: TrajectoryStore, shard_id: str, *arguments: object, **named: object) -> bool:
        tried.append(shard_id)
        if failing:
            raise StoreError("disk full")
        return commit(self, shard_id, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(TrajectoryStore, "commit", flaky)
    worker = setting.worker()
    async with setting.running(worker):
        await setting.until(lambda: bool(tried))
        renewals = setting.coordinator.renewals
        await setting.until(lambda: setting.coordinator.renewals >= renewals + 5)
        # Of ten jobs: no new lease is taken while finished trees cannot be written.
        assert len(setting.coordinator.grants) <= 3
        assert "disk full" in worker.progress().error
        failing.clear()
        await setting.finish()
    assert sorted(setting.searches.started) == problem_ids
    setting.check()


async def test_marker_whose_creation_was_unclear_is_the_workers_own(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of a job is handed back as the store answers nothing any more: all was written."""
    setting.plan(*"ab")
    search = GrowingSearch()
    search.hold_at = {"b": 3}
    commit = TrajectoryStore.commit
    unclear = [True]

    def answer_is_lost(self: TrajectoryStore, *given: Any, **named: Any) -> bool:
        written = commit(self, *given, **named)
        if unclear:
            unclear.clear()
            raise StoreError("no answer")
        return written

    monkeypatch.setattr(TrajectoryStore, "commit", answer_is_lost)
    config = FAST.model_copy(update={"engine_attempts": 1})
    worker = setting.worker(search=search, config=config)
    async with setting.running(worker):
        await setting.until(lambda: search.held == {"b"} and worker.progress().finished.trees == 1)
        (shard,) = worker._shards.values()
        shard.error = "the engines fail"
        shard.stop.set()
        # What was handed back is gone on with, by whoever gets it.
        search.hold_at = {}
        await setting.finish()
        assert worker.progress().committed.trees == 2
        assert worker.progress().resumed_trees == 1
    assert len(setting.inner.store.files(f"{setting.store.prefix}/data")) == 2
    setting.check()


async def test_worker_waits_for_a_mount_that_is_gone(tmp_path: Path) -> None:
    """The mount of the worker's machine is gone for a while: nothing is written into its place."""
    setting = Setting(tmp_path / "run")
    setting.plan(*"abcdefgh")
    run = Path(setting.inner.store.root)
    worker = setting.worker(run_id=setting.inner.store.identify())
    gone = run.with_name("gone")
    setting.searches.hold("a")
    async with setting.running(worker):
        await setting.until(lambda: "a" in setting.searches.open)
        run.rename(gone)
        setting.searches.let_go("a")
        # A commit that the rename met in the middle says something else; its next try says this.
        await setting.until(lambda: "is not there on machine" in worker.progress().error)
        assert worker.progress().waiting_commits > 0
        assert not run.exists()
        gone.rename(run)
        await setting.finish()
    assert sorted(setting.searches.started) == list("abcdefgh")
    setting.check()


async def test_worker_of_another_run_does_not_start(setting: Setting) -> None:
    setting.inner.store.identify()
    with pytest.raises(StoreError, match="is of another run"):
        setting.worker(run_id="wanted")


async def test_problems_of_a_store_that_is_away_are_waited_for(setting: Setting) -> None:
    """An outage of reading must quarantine nothing."""
    setting.plan(*"abcdefgh")
    failing = [True]

    class Problems(dict[str, Problem]):
        def get(self, problem_id: str, default: Any = None) -> Any:
            if failing:
                raise StoreError("the store is away")
            return super().get(problem_id, default)

    worker = setting.worker()
    worker._problems = Problems({p: make_problem(p) for p in "abcdefgh"})
    async with setting.running(worker):
        await setting.until(lambda: worker.progress().waiting_commits > 0)
        assert "away" in worker.progress().error and setting.searches.started == []
        failing.clear()
        await setting.finish()
    setting.check()


async def test_progress_reaches_the_coordinator(setting: Setting) -> None:
    setting.plan(*"abcde", shard_size=1)
    setting.searches.hold("e")
    async with setting.running(setting.worker()):
        await setting.until(
            lambda: (
                "w1" in setting.inner.stats().workers
                and setting.inner.stats().workers["w1"].committed.trees == 4
            )
        )
        progress = setting.inner.stats().workers["w1"]
        assert progress.open_trees == 1
        assert progress.finished.solved == 4
        assert progress.candidates >= 4
        assert progress.unfinished == 0 and progress.unfinished_text == ""
        setting.searches.let_go("e")
        await setting.finish()


async def test_all_trees_of_a_search_are_committed_and_count_as_one_search(
    setting: Setting,
) -> None:
    setting.plan(*"abc", shard_size=2)
    setting.searches.more = (1, 5)
    worker = setting.worker()
    async with setting.running(worker):
        await setting.finish()
    setting.inner.seal(1)
    trees = sorted((tree.problem.id, tree.index) for tree in setting.store.trees())
    assert trees == [(name, index) for name in "abc" for index in (0, 1, 5)]
    progress = worker.progress()
    assert (progress.searches, progress.finished.trees) == (3, 9)


RECIPE = recipe_of(DatasetConfig(), SHORT_TEMPLATE)


async def test_candidates_stand_beside_a_shard_as_it_is_committed(setting):
    setting.plan("p1", "p2", shard_size=2)
    async with setting.running(setting.worker(recipe=RECIPE)):
        await setting.finish()
    (commit,) = setting.store.commits().values()
    data = setting.store.read_derived(commit, RECIPE.name)
    found = table_from_bytes(data, ["problem_id", "correct"]).to_pylist()
    assert found == [{"problem_id": p, "correct": 1} for p in ("p1", "p2")]


async def test_trees_whose_candidates_cannot_be_made_are_committed_all_the_same(
    setting, monkeypatch
):
    def broken(trees, recipe):
        raise ZeroDivisionError

    monkeypatch.setattr("cluster.jobs.worker.candidates_file", broken)
    setting.plan("p1")
    async with setting.running(setting.worker(recipe=RECIPE)):
        await setting.finish()
    (commit,) = setting.store.commits().values()
    assert commit.totals.trees == 1
    assert setting.store.read_derived(commit, RECIPE.name) is None
