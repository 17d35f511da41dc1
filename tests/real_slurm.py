"""A Slurm of one's own on this machine: munged, slurmctld and a slurmd for each made-up node.

All its files lie in one folder and nothing in /etc is read, so that several may run side by side.
What the nodes have (CPUs, memory, GPUs) is what the file says, not what the machine has.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
"""Programs of the Debian packages slurm-wlm and munge that are not here."""
if os.geteuid():
    MISSING.append("root, whom slurmd wants to be")
NOT_HERE = f"no {', '.join(MISSING)} (as root: apt-get install slurm-wlm munge)"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port: int = taken.getsockname()[1]
        return port


class Slurm:
    """Started at once; `stop` ends what was started."""

    def __init__(self, folder: Path, nodes: Mapping[str, str]) -> None:
        """
        Args:
            folder: for configuration, state and logs; its path is short, a socket lies in it.
            nodes: what each node has, as slurm.conf writes it: {"n1": "CPUs=2 RealMemory=4000"}.
        """
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        host = socket.gethostname().partition(".")[0]
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        socket_path = folder / "munge.socket"
        rows = [
            f"NodeName={n} NodeHostname={host} Port={free_port()} {has}" for n, has in nodes.items()
        ]
        settings = {
            "ClusterName": "made",
            "SlurmctldHost": host,
            "SlurmctldPort": free_port(),
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={socket_path}",
            "CredType": "cred/munge",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool.%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "slurmd.%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "ReturnToService": 2,
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SlurmdParameters": "config_overrides",
            "GresTypes": "gpu",
            "MailProg": "/bin/true",
            "SchedulerParameters": "bf_interval=5",  # what starts jobs of several components
            "KillWait": 30,
            "OverTimeLimit": 0,
        }
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            "".join(f"{name}={value}\n" for name, value in settings.items())
            + "\n".join(rows)
            + f"\nPartitionName=all Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        )
        gres = "AutoDetect=off\n"
        for node, has in nodes.items():
            count = int(has.partition("Gres=gpu:")[2].partition(" ")[0] or 0)
            for device in range(count):  # a gpu needs a file, which need not be a device
                (folder / f"{node}-gpu{device}").touch()
            if count:
                gres += f"NodeName={node} Name=gpu File={folder}/{node}-gpu[0-{count - 1}]\n"
        (folder / "gres.conf").write_text(gres)
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        paths = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={socket_path}", *paths)
        _until(socket_path.exists, "munged")
        self._start("slurmctld", "-D", "-i")
        for node in nodes:
            self._start("slurmd", "-D", "-N", node)
        _until(lambda: self._idle() == len(nodes), "slurmctld and its nodes")

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            self._started.append(
                subprocess.Popen(
                    command, env=self.env, stdout=out, stderr=out, start_new_session=True
                )
            )

    def _idle(self) -> int:
        done = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False)
        return done.split().count("idle")

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of the first component."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def near_limit(self, job: str) -> None:
        """Less than five minutes are left from now on, so Slurm sends its signal."""
        hours, minutes, _ = self.state(job)["RunTime"].split(":")
        limit = 60 * int(hours) + int(minutes) + 5
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def again(self, job: str, *, minutes: int) -> None:
        """Start a job now that was put into the queue again, for which Slurm waits two minutes."""
        time.sleep(3)  # one that starts in the second it ended counts as killed
        first, _, last = self.state(job)["HetJobIdSet"].partition("-")
        for part in range(int(first), int(last) + 1):
            self.run(
                "scontrol", "update", f"JobId={part}", "StartTime=now", check=False
            )  # or it runs
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        end = time.monotonic() + 20
        while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < end:
            time.sleep(0.5)
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    """Five nodes, all alike: Slurm takes no node for two components of one job."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
    started = Slurm(folder, {f"n{i}": "CPUs=96 RealMemory=400000 Gres=gpu:8" for i in range(5)})
    yield started
    started.stop()
    shutil.rmtree(folder, ignore_errors=True)


def checkout(folder: Path) -> Path:
    """A checkout as far as the job needs it, with one node of each kind."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    script = folder / "deploy" / "slurm" / "cluster.sbatch"
    text = script.read_text(encoding="utf-8")
    script.write_text(re.sub(r"--nodes=\d+", "--nodes=1", text), encoding="utf-8")
    return folder


def wait_for(true: Callable[[], object], timeout_s: float, log: Path) -> None:
    """Until something is so; else fails and shows the end of the job's log."""
    end = time.monotonic() + timeout_s
    while not true():
        text = log.read_text(errors="replace") if log.exists() else "no log"
        assert time.monotonic() < end, f"waited {timeout_s:g} s:\n{text[-4000:]}"
        time.sleep(0.5)


def _until(true: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not start in {timeout_s:g} s")
        time.sleep(0.2)
