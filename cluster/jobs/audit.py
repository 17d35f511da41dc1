"""Are all trees of a round in the store, once each?

They are counted in the rows themselves, not in what the commit markers say of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.jobs.queue import StagePlan, committed_jobs, plan_jobs
from rollout.store import TrajectoryStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Expected trees of a round against committed rows; nothing is wrong if `clean`."""

    expected: int
    """(problem, tree index) pairs of all planned stages."""
    committed: int
    """Trees found in the files, each time they are found."""
    quarantined: Mapping[str, str]
    lost: tuple[tuple[str, int], ...]
    """Expected, neither committed nor quarantined."""
    doubled: tuple[tuple[str, int], ...]
    """Committed more than once."""
    unexpected: tuple[tuple[str, int], ...]
    """Committed without having been planned."""
    reported: int | None = None
    """Trees that completed leases reported; None: not asked for."""

    @property
    def clean(self) -> bool:
        agree = self.reported is None or self.reported == self.committed
        return agree and not (self.lost or self.doubled or self.unexpected)


def audit_round(trajectories: TrajectoryStore, *, reported: int | None = None) -> Audit:
    """Count the trees in the data files of a round against what its stages planned.

    It reads the rows themselves (with their checksums), not what the markers say of them: the
    files of the manifest if the round is sealed, else those of the committed jobs.

    Args:
        reported: trees that completed leases reported (`RoundStatus.totals.trees`), to compare.
    Raises:
        StoreError: a file is missing, truncated or changed.
    """
    plans = [StagePlan.from_json(data) for data in trajectories.plans().values()]
    commits = trajectories.commits()
    committed = [
        (plan, job, commit)
        for plan in plans
        for job, commit in committed_jobs(plan_jobs(plan), commits)
    ]
    jobs = {job.id: commit for _, job, commit in committed}
    manifest = trajectories.manifest()
    files = list(jobs.values()) if manifest is None else list(manifest.files)
    found: Counter[tuple[str, int]] = Counter()
    for file in files:
        table = trajectories.read_table(file, ["problem_id", "tree", "node"])
        rows = zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
        found.update((problem_id, tree) for problem_id, tree, node in rows if node == 0)
    expected = {(p, plan.tree_index) for plan in plans for p in plan.problem_ids}
    quarantined = {
        (problem_id, plan.tree_index): error
        for plan, _, commit in committed
        for problem_id, error in commit.failed.items()
    }
    return Audit(
        expected=len(expected),
        committed=found.total(),
        quarantined={problem_id: error for (problem_id, _), error in quarantined.items()},
        lost=tuple(sorted(expected - found.keys() - quarantined.keys())),
        doubled=tuple(sorted(key for key, count in found.items() if count > 1)),
        unexpected=tuple(sorted(found.keys() - expected)),
        reported=reported,
    )
