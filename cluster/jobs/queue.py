"""Which problems are searched by whom: jobs, leases and their queue, as plain data.

    PENDING --grant--> LEASED --complete--> DONE
       ^                 |
       +-----------------+  release; fail or expire, while attempts are left
                         +--> FAILED --complete--> DONE

- `complete` may hand a part of the problems back: each group becomes a new PENDING job.
- `renew` of a job nobody holds leases it to the asking worker, whoever had granted it.
- A FAILED job is out of attempts. The coordinator completes it by splitting it (several problems)
  or by quarantining it (one problem).
- A worker that is lost charges all jobs it held, though one alone may have ended it. So a job of
  one problem whose last attempt is left after a loss is granted to a worker that holds nothing
  else: what was lost beside others comes through, and what ends workers is found.

The queue is told things and asked things. It owns no clock (`now_s` is an argument, any monotonic
seconds), no randomness and no I/O, so a simulation can drive it at virtual time.

Its truth is elsewhere: the store decides who has committed a shard. The queue may forget
everything (a restart) or grant a job twice (an expired lease whose worker still lives), and the
result is the same. Therefore every transition a worker can ask for is idempotent and accepted from
a worker that has lost its lease.

Job ids are a hash of what is searched (`plan_jobs`), so the same plan gives the same shards in
every process and after every restart; a part that is handed back hashes its parent's id as well.

Not covered: running a straggler's job a second time while its lease is still renewed.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from rollout.seeds import derive_seed
from rollout.store import Commit


class QueueConfig(BaseModel):
    """How long a worker may hold a job without a sign of life, and how often a job is tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_s: float = Field(
        default=60.0, gt=0, description="a lease that is not renewed for so long ends"
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="leases of a job that may end badly before it is split or quarantined",
    )
    adopt_s: float = Field(
        default=0.0,
        ge=0,
        description="after a restart nothing is leased for so long, while workers renew what they "
        "hold; longer than the pause between renewals, or jobs in work are leased again",
    )


class JobState(StrEnum):
    """Where a job stands."""

    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"
    """Its shard is committed (or was split: an empty shard is)."""
    FAILED = "failed"
    """Out of attempts, and not yet split or quarantined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A shard of problems to search in one stage of a round."""

    id: str
    round: int
    stage: str
    """Which kind of search: "base", "escalation-1", ..."""
    tree_index: int
    """Number of the trees this stage adds among the trees of a problem; one per stage."""
    problem_ids: tuple[str, ...]
    seed: int
    """Of the run."""
    priority: int = 0
    """Higher is granted first."""

    def task(self, problem_id: str) -> SearchTask:
        """What the search of one problem of this job is told."""
        return SearchTask(
            round=self.round,
            stage=self.stage,
            index=self.tree_index,
            seed=derive_seed(self.seed, self.round, problem_id, self.tree_index),
        )

    def child(self, problem_ids: Sequence[str]) -> Job:
        """The job of a part of this one's problems; the same part gives the same id."""
        problems = tuple(problem_ids)
        return replace(self, id=_hash("part", self.id, problems), problem_ids=problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTask:
    """What the search of one problem is told besides the problem."""

    round: int
    stage: str
    index: int
    """`Tree.index`."""
    seed: int
    """Of this tree: from the run's seed, round, problem and index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What a stage of a round is to search; stored, so that a restart finds it again."""

    round: int
    stage: str
    tree_index: int
    problem_ids: tuple[str, ...]
    shard_size: int
    """Problems per job."""
    seed: int
    priority: int = 0

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be >= 1, got {self.shard_size}")
        if not self.stage or not all(c.isalnum() or c in "-_" for c in self.stage):
            raise ValueError(f"stage must be letters, digits, - and _, got {self.stage!r}")
        if len(set(self.problem_ids)) != len(self.problem_ids):
            raise ValueError(f"stage {self.stage!r} of round {self.round} names a problem twice")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> StagePlan:
        parsed = json.loads(data)
        return cls(**{**parsed, "problem_ids": tuple(parsed["problem_ids"])})


def plan_jobs(plan: StagePlan) -> list[Job]:
    """Cut a stage's problems, in their order, into jobs with ids that depend on nothing else."""
    jobs = []
    for start in range(0, len(plan.problem_ids), plan.shard_size):
        problem_ids = plan.problem_ids[start : start + plan.shard_size]
        jobs.append(
            Job(
                id=_hash(plan.round, plan.stage, plan.tree_index, list(problem_ids), plan.seed),
                round=plan.round,
                stage=plan.stage,
                tree_index=plan.tree_index,
                problem_ids=problem_ids,
                seed=plan.seed,
                priority=plan.priority,
            )
        )
    return jobs


def committed_jobs(
    jobs: Sequence[Job], commits: Mapping[str, Commit]
) -> Iterable[tuple[Job, Commit]]:
    """Each committed job of a stage with its marker, parents before the parts they handed back."""
    waiting = list(reversed(jobs))
    while waiting:
        job = waiting.pop()
        commit = commits.get(job.id)
        if commit is None:
            continue
        yield job, commit
        waiting.extend(job.child(group) for group in commit.remaining if group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A worker's right to a job until it expires."""

    id: str
    job: Job
    worker: str
    expires_s: float


@dataclass(slots=True, kw_only=True)
class LeaseCounters:
    """What became of all leases.

    granted + adopted = completed + released + failed + expired + superseded + still open.
    """

    granted: int = 0
    adopted: int = 0
    """Renewed by a worker that held them before this queue existed."""
    completed: int = 0
    """Ended by the completion of their job."""
    released: int = 0
    failed: int = 0
    expired: int = 0
    superseded: int = 0
    """Ended because somebody else completed the job."""
    late_completions: int = 0
    """Completions by a worker that did not hold the lease any more, or repeated ones."""


@dataclass(slots=True)
class _Entry:
    job: Job
    order: tuple[int, ...]
    """Place in the queue: the number of its coming, behind it that among its parent's parts."""
    state: JobState = JobState.PENDING
    attempts: int = 0
    """Leases that ended badly."""
    error: str = ""
    alone: bool = False
    """It may be what its workers were lost by, and has one attempt left."""
    lease_id: str = ""
    worker: str = ""
    expires_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class StageCounts:
    """Jobs and problems of one stage by state."""

    jobs: dict[JobState, int] = field(default_factory=lambda: dict.fromkeys(JobState, 0))
    problems: dict[JobState, int] = field(default_factory=lambda: dict.fromkeys(JobState, 0))

    @property
    def finished(self) -> bool:
        """True if every job is done."""
        return self.jobs[JobState.DONE] == sum(self.jobs.values())


class JobQueue:
    """Jobs by rank (`prioritise`) and priority, then as they came, parts in their parent's place.

    See the module for the transitions.
    """

    def __init__(self, config: QueueConfig, *, epoch: str = "0") -> None:
        """
        Args:
            epoch: part of every lease id, different for each queue of a run, so that a lease of
                an earlier queue is never taken for one of this queue's.
        """
        self.config = config
        self.epoch = epoch
        self.counters = LeaseCounters()
        self._entries: dict[str, _Entry] = {}
        self._pending: list[tuple[int, int, tuple[int, ...], str]] = []
        self._expiries: list[tuple[float, str, str]] = []
        self._held: dict[str, set[str]] = {}
        self._counts: dict[tuple[int, str], StageCounts] = {}
        self._failed: dict[str, None] = {}
        self._num_leases = 0
        self._ranks: Mapping[str, int] = {}

    # -- told by the coordinator

    def prioritise(self, ranks: Mapping[str, int]) -> None:
        """Have jobs of problems of a higher rank granted first, those pending now included.

        Args:
            ranks: by problem; 0 of those not named. A job has the highest of its problems'.
        """
        self._ranks = ranks
        self._pending.clear()
        for entry in self._entries.values():
            if entry.state is JobState.PENDING:
                self._push(entry)

    def add(self, job: Job) -> bool:
        """Queue a job; False if it is known already."""
        return self._add(job, (len(self._entries),))

    def _add(self, job: Job, order: tuple[int, ...]) -> bool:
        if job.id in self._entries:
            return False
        entry = _Entry(job, order)
        self._entries[job.id] = entry
        counts = self._counts.setdefault((job.round, job.stage), StageCounts())
        counts.jobs[JobState.PENDING] += 1
        counts.problems[JobState.PENDING] += len(job.problem_ids)
        self._push(entry)
        return True

    def expire(self, now_s: float) -> list[str]:
        """End overdue leases; returns the ids of their jobs."""
        ended = []
        while self._expiries and self._expiries[0][0] <= now_s:
            _, job_id, lease_id = heapq.heappop(self._expiries)
            entry = self._entries[job_id]
            if entry.lease_id != lease_id:
                continue
            if entry.expires_s > now_s:  # renewed since it was pushed
                heapq.heappush(self._expiries, (entry.expires_s, job_id, lease_id))
                continue
            self.counters.expired += 1
            worker = entry.worker
            self._charge(
                entry, f"worker {worker} was not heard of before its lease ended", lost=True
            )
            ended.append(job_id)
        return ended

    def forget_worker(self, worker: str) -> list[str]:
        """End all leases of a worker that is known to be gone; returns the ids of their jobs."""
        ended = sorted(self._held.get(worker, ()))
        for job_id in ended:
            self.counters.expired += 1
            self._charge(self._entries[job_id], f"worker {worker} is gone", lost=True)
        return ended

    def failed(self) -> list[tuple[Job, str]]:
        """Jobs that are out of attempts, with their last error."""
        entries = (self._entries[job_id] for job_id in self._failed)
        return [(entry.job, entry.error) for entry in entries]

    # -- asked for by a worker

    def grant(self, worker: str, now_s: float) -> Lease | None:
        """Lease the next job to a worker; None if there is none pending that it may have."""
        held = self._held.get(worker, ())
        if any(self._entries[job_id].alone for job_id in held):
            return None
        passed_over: list[_Entry] = []
        found: Lease | None = None
        while self._pending and found is None:
            *_, job_id = heapq.heappop(self._pending)
            entry = self._entries[job_id]
            if entry.state is not JobState.PENDING:
                continue
            if entry.alone and held:
                passed_over.append(entry)
                continue
            self._num_leases += 1
            self.counters.granted += 1
            found = self._lease(entry, f"{job_id}.{self.epoch}.{self._num_leases}", worker, now_s)
        for entry in passed_over:
            self._push(entry)
        return found

    def renew(self, job_id: str, lease_id: str, worker: str, now_s: float) -> bool:
        """Extend a lease; False if the worker should drop the job: another has it, or it is done.

        A job that nobody holds is leased to the asking worker, whoever granted it the lease: after
        a restart of the queue's owner workers go on with what they have.
        """
        entry = self._entries.get(job_id)
        if entry is None:
            return False
        if entry.state is JobState.LEASED and entry.lease_id == lease_id:
            entry.expires_s = now_s + self.config.lease_s
            return True
        if entry.state is JobState.PENDING:
            self.counters.adopted += 1
            self._lease(entry, lease_id, worker, now_s)
            return True
        return False

    def complete(self, job_id: str, lease_id: str, remaining: Iterable[Sequence[str]] = ()) -> bool:
        """Record that a job's shard is committed, by whomever; False if that was known.

        Args:
            remaining: groups of its problems that the committed shard hands back.
        Raises:
            KeyError: the job was never added.
        """
        entry = self._entries[job_id]
        if entry.state is JobState.DONE:
            self.counters.late_completions += 1
            return False
        if entry.state is JobState.LEASED and entry.lease_id == lease_id:
            self.counters.completed += 1
        else:
            self.counters.late_completions += bool(lease_id)
            self.counters.superseded += entry.state is JobState.LEASED
        groups = [tuple(group) for group in remaining if group]
        counts = self._counts[(entry.job.round, entry.job.stage)]
        self._move(entry, JobState.DONE)
        handed_back = sum(map(len, groups))
        counts.problems[JobState.DONE] -= handed_back
        for number, group in enumerate(groups):
            # What is handed back is what takes long: at the end of the queue it would end last.
            self._add(entry.job.child(group), (*entry.order, number))
        return True

    def release(self, job_id: str, lease_id: str) -> bool:
        """Hand a job back untried: no attempt is charged. False if the lease is not the job's."""
        entry = self._entries.get(job_id)
        if entry is None or entry.state is not JobState.LEASED or entry.lease_id != lease_id:
            return False
        self.counters.released += 1
        self._move(entry, JobState.PENDING)
        self._push(entry)
        return True

    def fail(self, job_id: str, lease_id: str, error: str) -> bool:
        """Hand a job back with an error: an attempt is charged. False as for `release`."""
        entry = self._entries.get(job_id)
        if entry is None or entry.state is not JobState.LEASED or entry.lease_id != lease_id:
            return False
        self.counters.failed += 1
        self._charge(entry, error)
        return True

    # -- asked by anybody

    def state(self, job_id: str) -> JobState | None:
        """Where a job stands; None if it is not known."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.state

    def job(self, job_id: str) -> Job:
        """A job by id; KeyError if it is not known."""
        return self._entries[job_id].job

    def counts(self, round: int, stage: str) -> StageCounts:
        """Jobs and problems of a stage by state."""
        return self._counts.get((round, stage), StageCounts())

    def jobs(self, round: int, *, done: bool = False) -> list[Job]:
        """All jobs of a round, in the order they came.

        Args:
            done: only those that are.
        """
        own = (e for e in self._entries.values() if e.job.round == round)
        return [e.job for e in own if not done or e.state is JobState.DONE]

    # -- transitions

    def _lease(self, entry: _Entry, lease_id: str, worker: str, now_s: float) -> Lease:
        self._move(entry, JobState.LEASED)
        entry.lease_id, entry.worker = lease_id, worker
        entry.expires_s = now_s + self.config.lease_s
        self._held.setdefault(worker, set()).add(entry.job.id)
        heapq.heappush(self._expiries, (entry.expires_s, entry.job.id, lease_id))
        return Lease(id=lease_id, job=entry.job, worker=worker, expires_s=entry.expires_s)

    def _charge(self, entry: _Entry, error: str, *, lost: bool = False) -> None:
        """
        Args:
            lost: with its worker, by whatever that held.
        """
        entry.attempts += 1
        entry.error = error
        last = entry.attempts == self.config.max_attempts - 1
        entry.alone = lost and last and len(entry.job.problem_ids) == 1
        if entry.attempts >= self.config.max_attempts:
            self._move(entry, JobState.FAILED)
            return
        self._move(entry, JobState.PENDING)
        self._push(entry)

    def _move(self, entry: _Entry, state: JobState) -> None:
        counts = self._counts[(entry.job.round, entry.job.stage)]
        size = len(entry.job.problem_ids)
        if entry.state is JobState.LEASED:
            self._held[entry.worker].discard(entry.job.id)
            entry.lease_id = entry.worker = ""
        if entry.state is JobState.FAILED:
            del self._failed[entry.job.id]
        if state is JobState.FAILED:
            self._failed[entry.job.id] = None
        counts.jobs[entry.state] -= 1
        counts.problems[entry.state] -= size
        counts.jobs[state] += 1
        counts.problems[state] += size
        entry.state = state

    def _push(self, entry: _Entry) -> None:
        rank = max((self._ranks.get(i, 0) for i in entry.job.problem_ids), default=0)
        heapq.heappush(self._pending, (-rank, -entry.job.priority, entry.order, entry.job.id))


def _hash(*parts: object) -> str:
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
