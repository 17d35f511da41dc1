"""Jobs, leases and their queue at virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.jobs.queue import Job, JobQueue, JobState, QueueConfig, StagePlan, plan_jobs

PENDING, LEASED, DONE, FAILED = JobState


def plan(*problems: str, shard_size: int = 2, stage: str = "base", **other: int) -> StagePlan:
    fields = {"round": 1, "tree_index": 0, "seed": 5, **other}
    return StagePlan(stage=stage, problem_ids=problems, shard_size=shard_size, **fields)


def queue_of(
    jobs: list[Job], *, lease_s: float = 10, max_attempts: int = 3, epoch: str = "e"
) -> JobQueue:
    queue = JobQueue(QueueConfig(lease_s=lease_s, max_attempts=max_attempts), epoch=epoch)
    for job in jobs:
        assert queue.add(job)
    return queue


def leases(queue: JobQueue) -> dict[str, int]:
    """Number of jobs each worker holds."""
    return {worker: len(held) for worker, held in queue._held.items() if held}


# -- plans


def test_problems_are_cut_in_order() -> None:
    jobs = plan_jobs(plan("a", "b", "c"))
    assert [job.problem_ids for job in jobs] == [("a", "b"), ("c",)]


def test_job_ids_follow_from_round_stage_problems_and_seed() -> None:
    same = [job.id for job in plan_jobs(plan("a", "b", "c"))]
    assert [job.id for job in plan_jobs(plan("a", "b", "c"))] == same
    for other in (
        plan("b", "a", "c"),
        plan("a", "b", "c", seed=6),
        plan("a", "b", "c", round=2),
        plan("a", "b", "c", stage="escalation-1"),
        plan("a", "b", "c", tree_index=1),
    ):
        assert plan_jobs(other)[0].id != same[0]
    assert plan_jobs(plan("a", "b", "c", priority=9))[0].id == same[0]


def test_a_part_has_an_id_of_its_own_even_if_it_is_everything() -> None:
    job = plan_jobs(plan("a", "b"))[0]
    assert job.child(["a", "b"]).id != job.id
    assert job.child(["a"]) == job.child(["a"])
    assert job.child(["a"]).id != job.child(["b"]).id


def test_a_tree_seed_depends_on_problem_and_index_not_on_the_shard() -> None:
    whole = plan_jobs(plan("a", "b"))[0]
    part = whole.child(["b"])
    assert part.task("b") == whole.task("b")
    assert whole.task("a").seed != whole.task("b").seed
    other = plan_jobs(plan("a", "b", tree_index=1))[0]
    assert other.task("a").seed != whole.task("a").seed


def test_a_plan_survives_json() -> None:
    assert StagePlan.from_json(plan("a", "b").to_json()) == plan("a", "b")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: plan("a", shard_size=0), "shard_size must be >= 1, got 0"),
        (lambda: plan("a", "a"), "names a problem twice"),
        (lambda: plan("a", stage="a/b"), "stage must be letters"),
    ],
)
def test_wrong_plans_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]


# -- leases


def test_a_job_goes_from_pending_to_done() -> None:
    (job,) = plan_jobs(plan("a", "b"))
    queue = queue_of([job])
    assert queue.state(job.id) is PENDING
    lease = queue.grant("w1", 0)
    assert lease is not None and lease.job == job and lease.expires_s == 10
    assert queue.state(job.id) is LEASED
    assert queue.grant("w2", 0) is None
    assert queue.complete(job.id, lease.id)
    assert queue.state(job.id) is DONE
    assert queue.counts(1, "base").finished
    assert queue.counters.completed == 1


def test_expired_lease_returns_job_to_queue() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job], lease_s=10)
    first = queue.grant("w1", 0)
    assert queue.expire(9.9) == []
    assert queue.expire(10) == [job.id]
    second = queue.grant("w2", 11)
    assert first is not None and second is not None
    assert second.job == job and second.id != first.id


def test_renewed_lease_does_not_expire() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job], lease_s=10)
    lease = queue.grant("w1", 0)
    assert lease is not None
    assert queue.renew(job.id, lease.id, "w1", 8)
    assert queue.expire(17) == []
    assert queue.expire(18) == [job.id]


def test_lost_lease_is_not_renewed_while_another_works() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job])
    old = queue.grant("w1", 0)
    queue.expire(10)
    new = queue.grant("w2", 10)
    assert old is not None and new is not None
    assert not queue.renew(job.id, old.id, "w1", 11)
    assert queue.renew(job.id, new.id, "w2", 11)


def test_late_renewal_takes_the_job_back_if_nobody_has_it() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job])
    lease = queue.grant("w1", 0)
    assert lease is not None
    queue.expire(10)
    assert queue.renew(job.id, lease.id, "w1", 11)
    assert queue.grant("w2", 11) is None
    assert queue.counters.adopted == 1


def test_new_queue_takes_over_leases_it_never_granted() -> None:
    (job,) = plan_jobs(plan("a"))
    lease = queue_of([job], epoch="before").grant("w1", 0)
    assert lease is not None
    queue = queue_of([job], epoch="after")
    assert queue.renew(job.id, lease.id, "w1", 0)
    assert queue.grant("w2", 1) is None
    assert queue.complete(job.id, lease.id)


def test_lease_ids_of_two_queues_differ() -> None:
    jobs = plan_jobs(plan("a"))
    one = queue_of(jobs, epoch="before").grant("w1", 0)
    two = queue_of(jobs, epoch="after").grant("w1", 0)
    assert one is not None and two is not None and one.id != two.id


def test_completing_twice_is_harmless() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job])
    lease = queue.grant("w1", 0)
    assert lease is not None
    assert queue.complete(job.id, lease.id)
    assert not queue.complete(job.id, lease.id)
    assert queue.counters.late_completions == 1


def test_zombie_may_complete_a_job_another_holds() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job])
    old = queue.grant("zombie", 0)
    queue.expire(10)
    new = queue.grant("w2", 10)
    assert old is not None and new is not None
    assert queue.complete(job.id, old.id)
    assert queue.state(job.id) is DONE
    assert not queue.renew(job.id, new.id, "w2", 11)
    assert not queue.complete(job.id, new.id)
    assert leases(queue) == {}
    assert queue.counters.superseded == 1


def test_part_handed_back_becomes_a_job() -> None:
    (job,) = plan_jobs(plan("a", "b", "c", shard_size=3))
    queue = queue_of([job])
    lease = queue.grant("w1", 0)
    assert lease is not None
    queue.complete(job.id, lease.id, remaining=[["b", "c"]])
    assert queue.counts(1, "base").problems == {PENDING: 2, LEASED: 0, DONE: 1, FAILED: 0}
    rest = queue.grant("w2", 0)
    assert rest is not None and rest.job == job.child(["b", "c"])
    queue.complete(rest.job.id, rest.id)
    assert queue.counts(1, "base").problems[DONE] == 3


def test_released_job_costs_no_attempt() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job], max_attempts=1)
    for _ in range(5):
        lease = queue.grant("w1", 0)
        assert lease is not None
        assert queue.release(job.id, lease.id)
        assert not queue.release(job.id, lease.id)
    assert queue.state(job.id) is PENDING


def test_job_fails_after_its_attempts() -> None:
    (job,) = plan_jobs(plan("a"))
    queue = queue_of([job], max_attempts=2)
    for number in range(2):
        lease = queue.grant("w1", 0)
        assert lease is not None
        assert queue.fail(job.id, lease.id, f"error {number}")
    assert queue.failed() == [(job, "error 1")]
    assert queue.grant("w1", 0) is None
    assert not queue.counts(1, "base").finished
    queue.complete(job.id, "")
    assert queue.failed() == [] and queue.counts(1, "base").finished


def test_workers_that_are_gone_lose_their_leases_at_once() -> None:
    jobs = plan_jobs(plan("a", "b", "c", shard_size=1))
    queue = queue_of(jobs)
    for worker in ("w1", "w1", "w2"):
        queue.grant(worker, 0)
    assert leases(queue) == {"w1": 2, "w2": 1}
    assert queue.forget_worker("w1") == sorted([jobs[0].id, jobs[1].id])
    assert leases(queue) == {"w2": 1}
    assert queue.forget_worker("w1") == []


# -- order


def test_problem_that_ends_its_worker_takes_no_other_with_it() -> None:
    queue = queue_of(plan_jobs(plan("a", "poison", "b", "c", shard_size=1)), max_attempts=3)
    for worker in ("w1", "w2"):  # each takes all, and is lost by one of them
        while queue.grant(worker, 0):
            pass
        assert leases(queue) == {worker: 4}
        queue.forget_worker(worker)

    # Of the last attempt each worker has one alone, and takes others before them.
    assert queue.add(plan_jobs(plan("d", shard_size=1, tree_index=1))[0])
    found = [queue.grant(f"w{n}", 1) for n in range(3, 7)]
    assert leases(queue) == {"w3": 1, "w4": 1, "w5": 1, "w6": 1}
    assert queue.grant("w3", 1) is None
    other = queue.grant("w7", 1)
    assert other is not None and other.job.problem_ids == ("d",)
    for lease in filter(None, found):
        if lease.job.problem_ids == ("poison",):
            queue.forget_worker(lease.worker)
        else:
            assert queue.complete(lease.job.id, lease.id)
    assert [job.problem_ids for job, _ in queue.failed()] == [("poison",)]

    # A worker that holds something is given what may go beside it, though it came later.
    mixed = queue_of(plan_jobs(plan("a", "b", shard_size=1)), max_attempts=2)
    assert mixed.grant("w1", 0)
    mixed.forget_worker("w1")
    assert mixed.grant("w2", 0).job.problem_ids == ("a",)  # type: ignore[union-attr]
    assert mixed.grant("w2", 0) is None
    mixed.forget_worker("w2")
    assert mixed.grant("w3", 0).job.problem_ids == ("b",)  # type: ignore[union-attr]


def test_higher_priority_first_then_the_order_they_came() -> None:
    base = plan_jobs(plan("a", "b", "c", shard_size=1))
    urgent = plan_jobs(plan("a", shard_size=1, stage="escalation-1", tree_index=1, priority=1))
    queue = queue_of([*base, *urgent])
    granted = [queue.grant("w", 0) for _ in range(4)]
    assert [lease.job for lease in granted if lease] == [*urgent, *base]


def test_returned_job_keeps_its_place() -> None:
    jobs = plan_jobs(plan("a", "b", "c", shard_size=1))
    queue = queue_of(jobs)
    lease = queue.grant("w1", 0)
    assert lease is not None
    queue.release(jobs[0].id, lease.id)
    again = queue.grant("w2", 0)
    assert again is not None and again.job == jobs[0]


def test_part_handed_back_takes_the_place_of_its_job() -> None:
    jobs = plan_jobs(plan("a", "b", "c", "d", shard_size=2))
    queue = queue_of(jobs)
    lease = queue.grant("w1", 0)
    assert lease is not None
    queue.complete(jobs[0].id, lease.id, remaining=[["b"]])
    rest = queue.grant("w2", 0)
    assert rest is not None and rest.job.problem_ids == ("b",)


def test_unknown_jobs_are_no_ones() -> None:
    queue = queue_of([])
    assert queue.state("x") is None
    assert not queue.renew("x", "l", "w", 0)
    assert not queue.release("x", "l") and not queue.fail("x", "l", "")
    assert queue.counts(3, "base").finished
    with pytest.raises(KeyError):
        queue.complete("x", "l")


# -- anything workers may do in any order

action = st.tuples(
    st.sampled_from(
        ["grant", "renew", "complete", "part", "release", "fail", "expire", "forget", "wait"]
    ),
    st.integers(0, 2),
    st.integers(0, 30),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(action, max_size=60))
def test_no_problem_is_lost_or_doubled_whatever_workers_do(actions: list) -> None:
    """The store is played by `committed`: the first commit of a job counts."""
    problems = tuple("abcdefg")
    queue = queue_of(plan_jobs(plan(*problems, shard_size=3)), lease_s=5)
    known: list = []
    committed: dict[str, tuple[tuple[str, ...], list]] = {}
    now = 0.0

    def commit(lease: object, part: bool) -> None:
        job = lease.job  # type: ignore[attr-defined]
        cut = max(1, len(job.problem_ids) // 2) if part else len(job.problem_ids)
        rest = [list(job.problem_ids[cut:])] if job.problem_ids[cut:] else []
        _, rest = committed.setdefault(job.id, (job.problem_ids[:cut], rest))
        queue.complete(job.id, lease.id, rest)  # type: ignore[attr-defined]

    def check() -> None:
        counts = queue.counts(1, "base")
        assert sum(counts.problems.values()) == len(problems)
        done = [p for part, _ in committed.values() for p in part]
        assert len(done) == len(set(done)) == counts.problems[DONE]
        c = queue.counters
        ended = c.completed + c.released + c.failed + c.expired + c.superseded
        assert c.granted + c.adopted == ended + counts.jobs[LEASED]
        assert sum(leases(queue).values()) == counts.jobs[LEASED]

    for kind, worker, number in actions:
        name = f"w{worker}"
        lease = known[number % len(known)] if known else None
        if kind == "grant":
            granted = queue.grant(name, now)
            known += [granted] if granted else []
        elif kind == "wait":
            now += number / 4
        elif kind == "expire":
            queue.expire(now)
        elif kind == "forget":
            queue.forget_worker(name)
        elif lease is not None and kind == "renew":
            queue.renew(lease.job.id, lease.id, lease.worker, now)
        elif lease is not None and kind in ("complete", "part"):
            commit(lease, part=kind == "part")
        elif lease is not None and kind == "release":
            queue.release(lease.job.id, lease.id)
        elif lease is not None:
            queue.fail(lease.job.id, lease.id, "e")
        check()
    # Whatever happened, somebody who works to the end finishes every job.
    now += 100
    queue.expire(now)
    while not queue.counts(1, "base").finished:
        for job, _ in queue.failed():
            committed.setdefault(job.id, (job.problem_ids, []))
            queue.complete(job.id, "", committed[job.id][1])
        granted = queue.grant("last", now)
        if granted:
            commit(granted, part=False)
        check()
    assert sorted(p for part, _ in committed.values() for p in part) == sorted(problems)


def test_jobs_of_a_higher_rank_come_first_parts_included_until_the_ranks_change() -> None:
    jobs = plan_jobs(plan("a1", "a2", "b1", "b2", "c1", "c2"))
    queue = queue_of(jobs)

    def granted() -> str:
        lease = queue.grant("w", 0.0)
        assert lease is not None
        return " ".join(lease.job.problem_ids)

    queue.prioritise({"c1": 1, "c2": 1, "b2": 2})
    assert granted() == "b1 b2"
    queue.complete(jobs[1].id, "", remaining=[["b1"], ["b2"]])
    assert granted() == "b2"
    assert granted() == "c1 c2"
    queue.prioritise({})
    assert granted() == "a1 a2"
    assert granted() == "b1"
    assert queue.grant("w", 0.0) is None
