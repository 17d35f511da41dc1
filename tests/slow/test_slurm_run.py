"""A whole run under a real Slurm, with real Ray, engines and learner: put into the queue again at
its time limit, it goes on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from cluster.folder.run_folder import RunFolder
from tests.real_slurm import MISSING, NOT_HERE, Slurm, checkout, slurm, wait_for

__all__ = ["slurm"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(MISSING), reason=NOT_HERE),
]


def test_smoke_is_queued_again_at_its_time_limit_and_ends_whole(
    slurm: Slurm, tmp_path: Path
) -> None:
    root = checkout(tmp_path)
    script = root / "deploy" / "slurm" / "cluster.sbatch"
    # Ray starts a process for each CPU of a node, and all nodes are this machine.
    script.write_text(re.sub(r"--cpus-per-task=\d+", "--cpus-per-task=2", script.read_text()))
    (root / ".venv").symlink_to(sys.prefix)
    slurm.env |= {
        "RSTAR_LOCKS": str(tmp_path),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",
    }
    run = RunFolder(root / "runs" / "smoke")
    command = ("sbatch", "deploy/slurm/cluster.sbatch", "smoke", "--set", f"run_dir={run.root}")
    job = slurm.run(*command, cwd=root).split()[-1]
    log = root / f"rstar-{job}.log"

    wait_for(lambda: run.store.files("trajectories/round=1/commits"), 900, log)
    slurm.near_limit(job)
    wait_for(lambda: slurm.state(job).get("Restarts") == "1", 280, log)
    committed = run.store.files("trajectories/round=1/commits")
    assert not run.store.exists("report.json")
    slurm.again(job, minutes=60)
    wait_for(lambda: slurm.state(job)["JobState"] in ("COMPLETED", "FAILED"), 1500, log)

    told = log.read_text()
    assert slurm.state(job)["JobState"] == "COMPLETED", told[-4000:]
    assert "stopping: the time limit is near" in told
    assert set(committed) <= set(run.store.files("trajectories/round=1/commits"))
    report = json.loads((run.root / "report.json").read_text())
    assert [(r["lost"], r["doubled"]) for r in report["rounds"]] == [(0, 0), (0, 0)]
