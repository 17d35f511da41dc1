"""The batch job on a real Slurm of made-up nodes: components, signals, time limit, requeue.

Ray and the command are stand-ins.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from tests.real_slurm import MISSING, NOT_HERE, Slurm, checkout, slurm, wait_for

__all__ = ["slurm"]

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(MISSING), reason=NOT_HERE),
]

RAY = """#!/usr/bin/env bash
if [ "$1" = health-check ]; then
    grep -qs -- --head "$CALLS"
    exit
fi
echo "$SLURMD_NODENAME cpus=${SLURM_CPUS_PER_TASK:-} gpus=${SLURM_GPUS_ON_NODE:-0} $*" >>"$CALLS"
trap 'echo "drained $SLURMD_NODENAME" >>"$CALLS"; exit 0' TERM
while :; do sleep 0.2; done
"""
RSTAR = """#!/usr/bin/env bash
echo "driver $*" >>"$CALLS"
trap 'echo committed >>"$CALLS"; exit 130' TERM
for ((i = 0; i < 600; i++)); do
    [ "$(grep -c ' start ' "$CALLS")" -ge 10 ] && exit 0
    sleep 0.2
done
"""


def played(slurm: Slurm, folder: Path) -> tuple[Path, Path]:
    """A checkout with the stand-ins, and the file in which they write that they were called."""
    root, calls = checkout(folder), folder / "calls"
    calls.touch()
    binaries = root / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, text in {"ray": RAY, "rstar": RSTAR}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    slurm.env |= {"CALLS": str(calls), "RSTAR_POLL_S": "0.2", "RSTAR_LOCKS": str(folder)}
    return root, calls


def test_job_is_queued_again_at_its_time_limit_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    root, calls = played(slurm, tmp_path)
    said = slurm.run("sbatch", "deploy/slurm/cluster.sbatch", "smoke", "--set", "seed=1", cwd=root)
    job = said.split()[-1]
    log = root / f"rstar-{job}.log"

    wait_for(lambda: calls.read_text().count(" start ") == 5, 60, log)
    first = calls.read_text()
    assert len(set(re.findall(r"^(n\d) cpus", first, re.MULTILINE))) == 5
    for kind, cpus, gpus in (
        *(("policy", 44, 4), ("ppm", 44, 4)),
        *(("sandbox", 32, 0), ("learner", 96, 8)),
    ):
        assert re.search(rf'cpus={cpus} gpus={gpus} start .*{{"{kind}": {gpus or cpus}}}', first), (
            first
        )
    for option in ("--metrics-export-port", "--min-worker-port"):  # one machine has them all
        assert len(set(re.findall(rf"{option}=(\d+)", first))) == 5
    assert "driver evolve smoke --set seed=1 --set cluster.address=" in first
    token = root / "runs" / f"slurm-{job}" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600

    slurm.near_limit(job)
    wait_for(lambda: slurm.state(job).get("Restarts") == "1", 90, log)
    assert "stopping: the time limit is near" in log.read_text()
    ended = calls.read_text()
    assert ended.count("drained") == 5
    assert ended.index("committed") < ended.index("drained"), "the driver first"
    slurm.again(job, minutes=60)
    wait_for(lambda: slurm.state(job)["JobState"] == "COMPLETED", 90, log)
    assert calls.read_text().count("driver evolve smoke") == 2


def test_job_that_is_cancelled_commits_and_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    root, calls = played(slurm, tmp_path)
    said = slurm.run("sbatch", "deploy/slurm/cluster.sbatch", "smoke", cwd=root)
    job = said.split()[-1]
    log = root / f"rstar-{job}.log"
    wait_for(lambda: calls.read_text().count(" start ") == 5, 60, log)
    slurm.run("scancel", "--full", job)
    wait_for(lambda: "committed" in calls.read_text(), 60, log)
    wait_for(lambda: slurm.state(job)["JobState"] in ("CANCELLED", "COMPLETED"), 60, log)
    assert slurm.state(job)["Restarts"] == "0"
