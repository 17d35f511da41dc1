"""The coordinator without Ray: plans, splits, quarantines and rebuilding from the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.coordinator_client import RemoteCoordinator
from cluster.jobs.queue import JobState, Lease, QueueConfig, StagePlan
from rollout.open_trees import OpenTreeStore
from rollout.store import RunStore, StoreError, TrajectoryStore
from rollout.table import trees_to_table
from rollout.tree import Tree
from tests.builders import answered, make_problem, make_tree


class Clock:
    """Time that stands still until told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(tmp_path: Path, clock: Clock) -> Coordinator:
    return start(tmp_path, clock)


def start(root: Path, clock: Clock, *, max_attempts: int = 2) -> Coordinator:
    return Coordinator(str(root), QueueConfig(lease_s=10, max_attempts=max_attempts), clock=clock)


def plan(*problems: str, stage: str = "base", tree_index: int = 0, **other: int) -> StagePlan:
    fields = {"round": 1, "seed": 5, "shard_size": 2, **other}
    return StagePlan(stage=stage, tree_index=tree_index, problem_ids=problems, **fields)


def tree(problem_id: str, index: int = 0, *, solved: bool = True) -> Tree:
    return make_tree(
        answered("7", correct=solved), problem=make_problem(problem_id), round=1, index=index
    )


def work(
    coordinator: Coordinator,
    lease: Lease,
    *,
    only: tuple[str, ...] | None = None,
    failed: dict[str, str] | None = None,
) -> bool:
    """Do what a worker does with a lease: commit, then say so."""
    job = lease.job
    done = job.problem_ids if only is None else only
    rest = [p for p in job.problem_ids if p not in done and p not in (failed or {})]
    store = TrajectoryStore(coordinator.store, job.round)
    trees = [tree(p, job.tree_index) for p in done if p not in (failed or {})]
    store.commit(job.id, trees, failed=failed, remaining=[rest] if rest else [])
    return coordinator.complete(job.id, lease.id)


def grant(coordinator: Coordinator, worker: str = "w1") -> Lease:
    lease = coordinator.grant(worker)
    assert lease is not None
    return lease


def problems(coordinator: Coordinator, stage: str = "base") -> dict[JobState, int]:
    return coordinator.status(1).stages[stage].counts.problems


# -- plans


def test_round_goes_from_plan_to_manifest(coordinator: Coordinator) -> None:
    status = coordinator.plan(plan("a", "b", "c"))
    assert not status.finished
    while lease := coordinator.grant("w1"):
        assert work(coordinator, lease)
    status = coordinator.status(1)
    assert status.finished and status.totals.trees == 3 and status.totals.solved == 3
    manifest = coordinator.seal(1)
    assert manifest.totals.trees == 3 and len(manifest.files) == 2
    assert coordinator.seal(1) == manifest
    assert coordinator.status(1).sealed


def test_committed_shards_are_those_of_done_jobs_parts_included(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b", "c", "d"))
    assert coordinator.committed(1) == []
    first = grant(coordinator)
    work(coordinator, first, only=first.job.problem_ids[:1])
    second = grant(coordinator)
    work(coordinator, second)
    assert coordinator.committed(1) == [first.job.id, second.job.id]
    part = grant(coordinator)
    work(coordinator, part)
    shards = coordinator.committed(1)
    assert shards is not None and part.job.id in shards
    assert sorted(shards) == sorted(TrajectoryStore(coordinator.store, 1).commits())
    coordinator.seal(1)
    assert coordinator.committed(1) is None


def test_unfinished_round_is_not_sealed(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b", "c"))
    work(coordinator, grant(coordinator))
    with pytest.raises(ValueError, match="round 1 cannot be sealed"):
        coordinator.seal(1)


def test_planning_again_changes_nothing(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b", "c"))
    work(coordinator, grant(coordinator))
    status = coordinator.plan(plan("a", "b", "c"))
    assert status.stages["base"].counts.problems[JobState.DONE] == 2


def test_stored_plan_wins_over_another_shard_size(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b", "c"))
    coordinator.plan(plan("a", "b", "c", shard_size=3))
    assert grant(coordinator).job.problem_ids == ("a", "b")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (plan("a", "x"), "problem_ids"),
        (plan("a", "b", seed=6), "seed"),
        (plan("a", "b", tree_index=1), "tree_index"),
    ],
)
def test_planning_a_stage_otherwise_is_refused(
    coordinator: Coordinator, other: StagePlan, field: str
) -> None:
    coordinator.plan(plan("a", "b"))
    with pytest.raises(ValueError, match=f"'base' of round 1 was planned with another {field}"):
        coordinator.plan(other)


def test_two_stages_of_one_tree_index_are_refused(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a"))
    with pytest.raises(ValueError, match="'base' and 'more' of round 1 both have tree index 0"):
        coordinator.plan(plan("b", stage="more"))


def test_stage_without_problems_is_finished(coordinator: Coordinator) -> None:
    assert coordinator.plan(plan()).finished
    assert coordinator.seal(1).files == ()


def test_planning_a_sealed_round_says_so(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.plan(plan("a"))
    work(coordinator, grant(coordinator))
    coordinator.seal(1)
    again = start(tmp_path, Clock())
    assert again.plan(plan("a")).sealed
    assert again.grant("w1") is None


# -- restarts


def test_restarted_coordinator_goes_on_with_what_was_committed(
    coordinator: Coordinator, tmp_path: Path, clock: Clock
) -> None:
    coordinator.plan(plan("a", "b", "c", "d"))
    coordinator.plan(plan("a", stage="escalation-1", tree_index=1, priority=1))
    work(coordinator, grant(coordinator))
    lost = grant(coordinator)
    assert lost.job.stage == "base"
    again = start(tmp_path, clock)
    assert again.epoch != coordinator.epoch
    assert problems(again)[JobState.DONE] == 0
    assert problems(again, "escalation-1")[JobState.DONE] == 1
    assert again.status(1).totals.trees == 1
    granted = [grant(again).job for _ in range(2)]
    assert granted[0] == lost.job and again.grant("w") is None


def test_coordinator_gathers_markers_as_they_come_and_goes_on_from_them(
    coordinator: Coordinator, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.store.GATHERED", 2)
    folder = tmp_path / "trajectories/round=1"
    coordinator.plan(plan(*"abcdefghij"))  # five jobs
    for _ in range(3):
        work(coordinator, grant(coordinator))
    (gathered,) = (folder / "gathered").iterdir()
    restarted = start(tmp_path, clock)
    assert restarted.status(1).totals.trees == 6
    work(restarted, grant(restarted))
    assert len(list((folder / "gathered").iterdir())) == 2 and gathered.exists()
    again = start(tmp_path, clock)
    assert again.status(1).stages["base"].counts.problems[JobState.DONE] == 8
    work(again, grant(again))
    assert again.seal(1).totals.trees == 10


def test_restarted_coordinator_knows_the_parts_of_parts(
    coordinator: Coordinator, tmp_path: Path, clock: Clock
) -> None:
    coordinator.plan(plan("a", "b", "c", "d", shard_size=4))
    work(coordinator, grant(coordinator), only=("a",))
    work(coordinator, grant(coordinator), only=("b",))
    again = start(tmp_path, clock)
    rest = grant(again)
    assert rest.job.problem_ids == ("c", "d")
    work(again, rest)
    again.seal(1)
    assert audit_round(TrajectoryStore(again.store, 1), reported=4).clean


def test_worker_keeps_its_lease_over_a_restart(
    coordinator: Coordinator, tmp_path: Path, clock: Clock
) -> None:
    coordinator.plan(plan("a", "b"))
    lease = grant(coordinator)
    again = start(tmp_path, clock)
    assert again.renew("w1", [(lease.job.id, lease.id)], WorkerProgress(open_trees=2)) == []
    assert again.grant("w2") is None
    assert again.stats().workers["w1"].open_trees == 2
    assert work(again, lease)


def test_restarted_coordinator_grants_nothing_until_workers_have_renewed(
    coordinator: Coordinator, tmp_path: Path, clock: Clock
) -> None:
    coordinator.plan(plan("a", "b", "c"))
    held = grant(coordinator)
    again = Coordinator(str(tmp_path), QueueConfig(lease_s=10, adopt_s=3), clock=clock)
    clock.now_s += 2.9
    assert again.grant("w2") is None
    assert again.renew("w1", [(held.job.id, held.id)], WorkerProgress()) == []
    clock.now_s += 0.1
    assert grant(again, "w2").job.problem_ids == ("c",)


def test_first_coordinator_of_a_run_grants_at_once(tmp_path: Path, clock: Clock) -> None:
    first = Coordinator(str(tmp_path), QueueConfig(adopt_s=3), clock=clock)
    first.plan(plan("a"))
    assert first.grant("w1") is not None


# -- leases that end badly


def test_job_out_of_attempts_is_split_then_its_poison_quarantined(
    coordinator: Coordinator, clock: Clock
) -> None:
    coordinator.plan(plan("good", "poison"))
    for _ in range(40):
        lease = coordinator.grant("w1")
        if lease is None:
            break
        if "poison" in lease.job.problem_ids:
            clock.now_s += 10  # its worker dies and is not heard of again
        else:
            work(coordinator, lease)
    status = coordinator.status(1)
    assert status.finished
    assert list(status.stages["base"].failed) == ["poison"]
    assert "not heard of" in status.stages["base"].failed["poison"]
    coordinator.seal(1)
    audit = audit_round(TrajectoryStore(coordinator.store, 1), reported=1)
    assert audit.clean and audit.committed == 1 and list(audit.quarantined) == ["poison"]


def test_split_survives_a_restart(coordinator: Coordinator, tmp_path: Path, clock: Clock) -> None:
    coordinator.plan(plan("a", "b"))
    for _ in range(2):
        lease = grant(coordinator)
        coordinator.fail(lease.job.id, lease.id, "boom")
    again = start(tmp_path, clock)
    assert [grant(again).job.problem_ids for _ in range(2)] == [("a",), ("b",)]


def test_parts_of_a_split_job_go_on_with_its_open_trees(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b"))
    lease = grant(coordinator)
    kept = OpenTreeStore(coordinator.store, 1)
    kept.save(lease.job.id, trees_to_table([tree("a"), tree("b")]))
    coordinator.fail(lease.job.id, lease.id, "boom")
    lease = grant(coordinator)
    coordinator.fail(lease.job.id, lease.id, "boom")
    first, second = grant(coordinator).job, grant(coordinator).job
    assert [first.problem_ids, second.problem_ids] == [("a",), ("b",)]
    assert [t.problem.id for t in kept.load(first.id)] == ["a"]
    assert [t.problem.id for t in kept.load(second.id)] == ["b"]
    assert kept.load(lease.job.id) == []


def test_zombie_with_the_whole_shard_loses_against_the_split(
    coordinator: Coordinator, clock: Clock
) -> None:
    coordinator.plan(plan("a", "b"))
    zombie = grant(coordinator)
    coordinator.fail(zombie.job.id, zombie.id, "boom")
    second = grant(coordinator)
    coordinator.fail(second.job.id, second.id, "boom")
    assert not work(coordinator, zombie)
    while lease := coordinator.grant("w2"):
        work(coordinator, lease)
    coordinator.seal(1)
    assert audit_round(TrajectoryStore(coordinator.store, 1), reported=2).clean


def test_zombie_that_committed_first_wins_against_the_split(
    coordinator: Coordinator, clock: Clock
) -> None:
    coordinator.plan(plan("a", "b"))
    first = grant(coordinator)
    TrajectoryStore(coordinator.store, 1).commit(first.job.id, [tree("a"), tree("b")])
    for _ in range(2):  # it died before it could say so
        clock.now_s += 10
        coordinator.grant("w2")
    clock.now_s += 10
    status = coordinator.status(1)
    assert status.finished and status.totals.trees == 2


def test_split_the_store_refuses_is_tried_again(
    coordinator: Coordinator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.plan(plan("a"))
    commit = TrajectoryStore.commit

    def refuse(*arguments: object, **named: object) -> bool:
        raise StoreError("disk full")

    monkeypatch.setattr(TrajectoryStore, "commit", refuse)
    for _ in range(2):
        lease = grant(coordinator)
        coordinator.fail(lease.job.id, lease.id, "boom")
    assert not coordinator.status(1).finished
    monkeypatch.setattr(TrajectoryStore, "commit", commit)
    assert not coordinator.status(1).finished
    clock.now_s += 6
    assert coordinator.status(1).finished


def test_late_renewal_shows_that_the_worker_lives(coordinator: Coordinator, clock: Clock) -> None:
    coordinator.plan(plan("a"))
    lease = grant(coordinator)
    clock.now_s += 11
    assert coordinator.renew("w1", [(lease.job.id, lease.id)], WorkerProgress()) == []
    assert coordinator.grant("w2") is None
    assert coordinator.stats().leases.expired == 0


def test_worker_is_told_which_jobs_to_drop(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b", "c"))
    mine, other = grant(coordinator), grant(coordinator, "w2")
    dropped = coordinator.renew(
        "w1", [(mine.job.id, mine.id), (other.job.id, "old"), ("unknown", "x")], WorkerProgress()
    )
    assert dropped == [other.job.id, "unknown"]


def test_forgotten_worker_loses_its_leases(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a"))
    lease = grant(coordinator)
    assert coordinator.forget_worker("w1") == [lease.job.id]
    assert grant(coordinator, "w2").job == lease.job


def test_completion_of_an_unknown_job_is_ignored(coordinator: Coordinator) -> None:
    store = TrajectoryStore(coordinator.store, 9)
    store.commit("alien", [tree("z")])
    assert not coordinator.complete("alien", "x")


def test_completion_without_a_marker_is_not_believed(coordinator: Coordinator) -> None:
    """A worker that lies, or writes to a disk of its own."""
    coordinator.plan(plan("a", "b"))
    lease = grant(coordinator)
    elsewhere = TrajectoryStore(RunStore(f"{coordinator.store.root}-of-another-machine"), 1)
    elsewhere.commit(lease.job.id, [tree("a"), tree("b")])
    with pytest.raises(StoreError, match=f"{lease.job.id} is said .* no marker .* machine .*mount"):
        coordinator.complete(lease.job.id, lease.id)
    assert not coordinator.status(1).finished and coordinator.status(1).totals.trees == 0
    assert work(coordinator, lease)
    assert coordinator.status(1).finished


def test_coordinator_counts_what_the_marker_says(coordinator: Coordinator) -> None:
    coordinator.plan(plan("a", "b"))
    lease = grant(coordinator)
    store = TrajectoryStore(coordinator.store, 1)
    store.commit(lease.job.id, [tree("a")], remaining=[["b"]])
    assert coordinator.complete(lease.job.id, lease.id)
    assert not coordinator.complete(lease.job.id, lease.id)
    assert coordinator.status(1).totals.trees == 1
    assert grant(coordinator).job.problem_ids == ("b",)


def test_coordinator_of_another_run_does_not_start(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "run").identify()
    RunStore(tmp_path / "other").identify()
    with pytest.raises(StoreError, match=f"other is of another run .*{run}"):
        Coordinator(str(tmp_path / "other"), run_id=run)
    with pytest.raises(StoreError, match=r"nowhere is not there"):
        Coordinator(str(tmp_path / "nowhere"), run_id=run)
    assert not (tmp_path / "nowhere").exists()
    assert Coordinator(str(tmp_path / "run"), run_id=run).plan(plan("a")).round == 1


async def test_worker_finds_the_coordinator_that_took_the_place_of_a_dead_one(
    coordinator: Coordinator,
) -> None:
    coordinator.plan(plan("a"))

    class Method:
        def __init__(self, dead: bool) -> None:
            self.dead = dead

        async def remote(self, worker: str) -> Lease | None:
            if self.dead:
                raise ActorDiedError
            return coordinator.grant(worker)

    class Handle:
        def __init__(self, *, dead: bool) -> None:
            self.grant = Method(dead)

    with pytest.raises(ActorDiedError):
        await RemoteCoordinator(Handle(dead=True)).grant("w1")
    found = iter([None, Handle(dead=False)])
    client = RemoteCoordinator(Handle(dead=True), find=lambda: next(found), backoff_s=0.001)
    lease = await client.grant("w1")
    assert lease is not None and lease.job.problem_ids == ("a",)


# -- audit


def test_audit_finds_what_is_lost_doubled_and_unexpected(tmp_path: Path) -> None:
    coordinator = start(tmp_path, Clock())
    coordinator.plan(plan("a", "b", "c", "d"))
    store = TrajectoryStore(coordinator.store, 1)
    first, second = grant(coordinator).job, grant(coordinator).job
    store.commit(first.id, [tree("a"), tree("c"), tree("x")])
    store.commit(second.id, [tree("c")], failed={"d": "error"})
    audit = audit_round(store, reported=3)
    assert audit.expected == 4 and audit.committed == 4
    assert audit.lost == (("b", 0),)
    assert audit.doubled == (("c", 0),)
    assert audit.unexpected == (("x", 0),)
    assert audit.quarantined == {"d": "error"}
    assert not audit.clean


def test_audit_of_an_unplanned_commit_counts_only_planned_shards(tmp_path: Path) -> None:
    coordinator = start(tmp_path, Clock())
    coordinator.plan(plan("a"))
    store = TrajectoryStore(coordinator.store, 1)
    work(coordinator, grant(coordinator))
    store.commit("alien", [tree("a")])
    assert audit_round(store).clean
    coordinator.seal(1)
    assert audit_round(store).clean
    assert [t.problem.id for t in store.trees()] == ["a"]


def test_audit_names_a_damaged_file(tmp_path: Path) -> None:
    coordinator = start(tmp_path, Clock())
    coordinator.plan(plan("a"))
    work(coordinator, grant(coordinator))
    coordinator.seal(1)
    store = TrajectoryStore(RunStore(tmp_path, backoff_s=0), 1)
    manifest = store.manifest()
    assert manifest is not None
    file = tmp_path / manifest.files[0].path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=file.name):
        audit_round(store)
