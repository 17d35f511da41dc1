from __future__ import annotations

from pathlib import Path

import pytest

from cluster.fleet.config import ClusterConfig
from cluster.fleet.rollouts import RENEW_S, _TimeLeft, queue_config
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.escalation import StageCost
from cluster.jobs.queue import StagePlan
from rollout.store import Totals


def test_job_in_work_is_not_granted_again_after_a_restart_of_the_coordinator(
    tmp_path: Path,
) -> None:
    """An idle worker asks at once; the one at work renews a moment later."""
    now = [0.0]
    config = queue_config(ClusterConfig())
    first = Coordinator(str(tmp_path), config, clock=lambda: now[0])
    ids = ("a", "b")
    first.plan(
        StagePlan(round=1, stage="base", tree_index=0, problem_ids=ids, shard_size=1, seed=0)
    )
    held = first.grant("at-work")
    assert held is not None
    again = Coordinator(str(tmp_path), config, clock=lambda: now[0])
    granted = []
    for tick in range(50):
        now[0] = tick * RENEW_S / 5
        if tick % 5 == 4:
            assert again.renew("at-work", [(held.job.id, held.id)], WorkerProgress()) == []
        lease = again.grant("idle")
        granted += [lease.job.problem_ids] if lease is not None else []
    assert held.job.problem_ids == ("a",) and granted == [("b",)]
    assert again.stats().leases.adopted == 1


def test_time_left_leaves_out_what_an_earlier_process_did() -> None:
    left = _TimeLeft(0.0, [StageCost(rollouts=4)], num_problems=100)
    assert left.share(60, Totals()) == 0.0
    assert left.share(80, Totals()) == pytest.approx(0.5)
    assert left.share(100, Totals()) == pytest.approx(1.0)
