"""The shell scripts under deploy/: linted; the Slurm job, with stand-ins for its commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.folder.config_file import load_config
from cluster.runs.config import RunConfig

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "deploy" / "slurm"
SCRIPTS = sorted([*(ROOT / "deploy").glob("*.sh"), *SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])
KINDS = ("policy", "ppm", "sandbox", "learner")


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT)) for path in SCRIPTS])
def test_script_parses_and_passes_shellcheck(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


RAY = """#!/usr/bin/env bash
echo "ray $*" >>"$CALLS"
case "$1" in
health-check) [ -e "$STARTED" ] ;;
start)
    echo "token $RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH" | wc -c)" >>"$CALLS"
    if [[ "$*" == *--head* ]]; then
        [ -n "${BROKEN_HEAD:-}" ] && exit 3
        touch "$STARTED"
    fi
    trap 'echo "drained $*" >>"$CALLS"; exit 1' TERM
    while :; do sleep 0.05; done ;;
esac
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
group=${1#--het-group=}
gpus=(0 4 4 0 8)
export SLURM_GPUS_ON_NODE=${gpus[group]} SLURM_CPUS_PER_TASK=${2#--cpus-per-task=}
shift 3
echo $$ >>"$STARTED.nodes"
exec "$@"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$CALLS"
kill -TERM $(cat "$STARTED.nodes")
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
case "$1 ${2:-}" in
"show hostnames") echo n1 ;;
"show node") printf 'NodeName=n1 Arch=x86_64\n   NodeAddr=head-node NodeHostName=n1\n' ;;
esac
exit 0
"""
RSTAR = """#!/usr/bin/env bash
echo "rstar $*" >>"$CALLS"
trap 'echo committed >>"$CALLS"; exit 130' TERM
while [ "$(grep -c '^token' "$CALLS")" -lt 5 ]; do sleep 0.05; done
[ -n "${QUICK:-}" ] && exit "$QUICK"
echo working >>"$CALLS"
while :; do sleep 0.05; done
"""


class Job:
    """The batch script, with stand-ins for Slurm, Ray and the command."""

    def __init__(self, folder: Path, **extra: str) -> None:
        binaries = folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        stand_ins = {"ray": RAY, "srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}
        for name, text in (stand_ins | {"rstar": RSTAR}).items():
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        (folder / "deploy").symlink_to(ROOT / "deploy")
        self.folder = folder
        self.log = folder / "calls"
        self.process = subprocess.Popen(
            ["bash", "deploy/slurm/cluster.sbatch", "run.yaml", "--set", "seed=1"],
            cwd=folder,
            env={
                "PATH": os.environ["PATH"],
                "CALLS": str(self.log),
                "STARTED": str(folder / "started"),
                "SLURM_SUBMIT_DIR": str(folder),
                "SLURM_JOB_ID": "77",
                "SLURM_JOB_NODELIST": "n[1-9]",
                **{
                    f"SLURM_CPUS_PER_TASK_HET_GROUP_{group}": cpus
                    for group, cpus in enumerate(("8", "44", "44", "32", "96"))
                },
                "RSTAR_LOCKS": str(folder),
                "RSTAR_HEAD_TRIES": "30",
                "RSTAR_POLL_S": "0.1",
                **extra,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for(self, call: str) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if call in self.calls():
                return
            time.sleep(0.05)
        raise AssertionError(f"waited for {call!r}, had {self.calls()}")

    def finish(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=30)
        finally:
            self.kill()
        return self.process.returncode, output

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def test_slurm_job_starts_a_node_of_each_kind_and_the_driver(tmp_path: Path) -> None:
    job = Job(tmp_path, QUICK="0")
    code, output = job.finish()
    calls = job.calls()
    assert code == 0, output
    starts = [call for call in calls if call.startswith("ray start")]
    assert len(starts) == 5
    head = next(call for call in starts if "--head" in call)
    assert "--num-cpus=0" in head and '{"head": 1}' in head and "--port=6379" in head
    for kind, amount in zip(KINDS, (4, 4, 32, 8), strict=True):
        worker = next(call for call in starts if f'{{"{kind}": {amount}}}' in call)
        assert "--address=head-node:6379" in worker
    assert all("--block" in start for start in starts)
    for option in ("--metrics-export-port", "--min-worker-port"):  # all five share this machine
        ports = {re.search(rf"{option}=(\d+)", start)[1] for start in starts}  # type: ignore[index]
        assert len(ports) == 5
    assert "--metrics-export-port=8090" in " ".join(starts)
    driver = next(call for call in calls if call.startswith("rstar"))
    assert driver == (
        "rstar evolve run.yaml --set seed=1 --set cluster.address=head-node:6379 "
        "--set cluster.spot=null"
    )
    assert not any("requeue" in call for call in calls)


def test_slurm_nodes_share_a_token_that_only_the_owner_can_read(tmp_path: Path) -> None:
    job = Job(tmp_path, QUICK="0")
    job.finish()
    token = tmp_path / "runs" / "slurm-77" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert [call for call in job.calls() if call.startswith("token")] == ["token token 64"] * 5


def test_slurm_job_near_its_limit_commits_drains_and_asks_to_run_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for("working")
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish()
    calls = job.calls()
    assert code == 0, output
    assert "the time limit is near" in output
    committed, requeued = calls.index("committed"), calls.index("scontrol requeue 77")
    drained = [i for i, call in enumerate(calls) if call.startswith("drained")]
    assert len(drained) == 5
    assert committed < min(drained) and max(drained) < requeued
    assert "--head" in calls[drained[-1]], "the head goes last"


def test_slurm_job_told_to_end_commits_and_is_not_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for("working")
    job.process.send_signal(signal.SIGTERM)
    code, _ = job.finish()
    assert code == 130
    assert "committed" in job.calls()
    assert not any("requeue" in call for call in job.calls())


def test_slurm_job_passes_on_that_the_run_failed(tmp_path: Path) -> None:
    code, _ = Job(tmp_path, QUICK="1").finish()
    assert code == 1


def test_slurm_job_says_that_its_head_did_not_start(tmp_path: Path) -> None:
    job = Job(tmp_path, BROKEN_HEAD="1")
    code, output = job.finish()
    assert code == 1
    assert "the head of the cluster did not start on head-node:6379" in output
    assert not any(call.startswith(("srun", "rstar")) for call in job.calls())


def test_slurm_node_that_did_not_start_in_time_is_started_again(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/usr/bin/env bash\necho x >>"$CALLS"\n[ "$(wc -l <"$CALLS")" = 2 ]\n')
    ray.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_PER_TASK": "4",
        "RSTAR_HEAD": "head:6379",
        "RSTAR_LOCKS": str(tmp_path),
    }

    def node(calls: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "calls").write_text(calls)
        command = ["bash", str(SLURM / "node.sh"), "sandbox"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    assert node("").returncode == 0 and len((tmp_path / "calls").read_text().split()) == 2
    never = node("x\nx\n")
    assert never.returncode == 1 and len((tmp_path / "calls").read_text().split()) == 5
    assert never.stdout.count("the sandbox node ended with status 1") == 3


def test_slurm_node_without_gpus_refuses_a_kind_that_needs_them(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SLURM / "node.sh"), "policy"],
        env={
            "PATH": os.environ["PATH"],
            "SLURM_JOB_ID": "1",
            "SLURM_GPUS_ON_NODE": "0",
            "RSTAR_LOCKS": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "policy needs GPUs" in done.stderr


def test_slurm_components_offer_what_the_cluster_preset_asks_for() -> None:
    """A component of the job is a node type; the order is that of `kinds` in the script."""
    text = (SLURM / "cluster.sbatch").read_text()
    assert re.search(r"^kinds=\((.*)\)", text, re.M)[1].split() == ["head", *KINDS]  # type: ignore[index]
    rows = re.findall(
        r"#SBATCH --nodes=(\d+).*?--cpus-per-task=(\d+)(?: --gpus-per-node=(\d+))?", text
    )
    assert len(rows) == 1 + len(KINDS)
    cluster = load_config("cluster", kind=RunConfig).cluster
    for kind, (nodes, cpus, gpus) in zip(KINDS, rows[1:], strict=True):
        replicas = getattr(cluster, kind).replicas
        if kind == "sandbox":
            replicas += cluster.workers.replicas
        assert int(nodes) * int(gpus or cpus) >= replicas, kind
