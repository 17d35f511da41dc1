"""What processes do just now, looked at from outside: state, CPU, stack; and their machine.

    look_at(pids, folders)                     on this machine
    ask_ray(address, {node: pids}, folders)    on theirs: through Ray, a task of no size on each

A stack is py-spy's (it comes with Ray's dashboard), which reads the process without stopping it;
where that is not installed or not permitted, the process's own, on SIGUSR2
(`cluster.telemetry.process`). A process that is stopped has only the first kind.

Ray is asked from a process of its own (`python -m cluster.watch.probe`), because a connection to
one that hangs can neither be bounded in time nor taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.telemetry.process import STACKS
from verifier.host_gauges import memory_left, run_delay_seconds, usable_cores

WATCH_S = 0.5
"""How long CPU is measured."""

STACK_S = 5.0
"""How long a stack is waited for."""

RAY_S = 45.0
"""How long Ray is waited for, from the start of the process that asks it."""

ANSWER_S = 15.0
"""How long a node is."""

MAX_CHILDREN = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLook:
    """One process, with its children."""

    pid: int
    state: str
    """As the kernel calls it: running, sleeping, stopped, ...; gone."""
    stopped: Sequence[str] = ()
    """Names of children that are stopped, with their ids."""
    cpu: float = 0.0
    """Cores it used."""
    delayed: float = 0.0
    """Cores it was ready for and did not get."""
    stack: str = ""
    no_stack: str = ""
    """Why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLook:
    """A machine and some of its processes."""

    host: str
    cores: int
    load: float
    """Processes that ran or were ready, over the last minute."""
    memory_left: float
    """Share."""
    full: Mapping[str, str] = field(default_factory=dict)
    """Folder -> how much is left, of those that are as good as full."""
    hogs: Sequence[str] = ()
    """Other processes that used half a core or more, the most first."""
    processes: Mapping[int, ProcessLook] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MachineLook:
        processes = {int(pid): ProcessLook(**look) for pid, look in data["processes"].items()}
        return cls(**{**data, "processes": processes})


def how_full(folder: str | Path) -> str:
    """What is left of a folder's disk, if that is next to nothing; "" otherwise."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if total and free < min(64 * 2**20, 0.01 * total):
        return f"{free / 2**20:.1f} of {total / 2**20:,.0f} MiB left"
    if disk.f_files and not disk.f_favail:
        return "no inode left"
    return ""


def look_at(pids: Iterable[int], folders: Iterable[str] = ()) -> dict[str, Any]:
    """Look at processes of this machine; what `MachineLook.from_json` takes."""
    families = {pid: _family(pid) for pid in pids}
    ours = {process.pid for family in families.values() for process in family}
    others = [p for p in psutil.process_iter() if p.pid not in ours]
    before = {p.pid: _times(p) for p in (*others, *(p for f in families.values() for p in f))}
    began_s = time.monotonic()
    time.sleep(WATCH_S)
    seconds = time.monotonic() - began_s

    def used(process: psutil.Process) -> tuple[float, float]:
        now, then = _times(process), before[process.pid]
        return max(0.0, now[0] - then[0]) / seconds, max(0.0, now[1] - then[1]) / seconds

    hogs = sorted(((used(p)[0], p) for p in others), key=lambda pair: -pair[0])[:3]
    looks = {}
    for pid, family in families.items():
        uses = [used(process) for process in family]
        states = [_state(process) for process in family]
        stopped = [
            f"{_name(process)} ({process.pid})"
            for process, state in list(zip(family, states, strict=True))[1:]
            if state == psutil.STATUS_STOPPED
        ]
        stack, no_stack = _stack(pid) if family else ("", "the process is gone")
        looks[pid] = ProcessLook(
            pid=pid,
            state=states[0] if states else "gone",
            stopped=stopped,
            cpu=round(sum(cpu for cpu, _ in uses), 3),
            delayed=round(sum(delayed for _, delayed in uses), 3),
            stack=stack,
            no_stack=no_stack,
        )
    machine = MachineLook(
        host=os.uname().nodename,
        cores=usable_cores(),
        load=os.getloadavg()[0],
        memory_left=round(memory_left(), 3),
        full={str(folder): left for folder in folders if (left := how_full(folder))},
        hogs=[f"{_name(p)} ({p.pid}): {cpu:.1f} cores" for cpu, p in hogs if cpu >= 0.5],
        processes=looks,
    )
    return asdict(machine)


def _family(pid: int) -> list[psutil.Process]:
    """A process and its children; none if it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)[:MAX_CHILDREN]]
    except psutil.Error:
        return []


def _times(process: psutil.Process) -> tuple[float, float]:
    """Seconds a process has run, and stood ready without a core."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0, 0.0
    return times.user + times.system, run_delay_seconds(process.pid)


def _state(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.Error:
        return "gone"


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:48].strip() or process.name()
    except psutil.Error:
        return "?"


def _stack(pid: int) -> tuple[str, str]:
    """The stack of every thread, and who told it; or why there is none."""
    stack, refused = _spied(pid)
    if not stack:
        stack, other = _own_stack(pid)
        refused = f"{refused}; {other}"
    return stack, "" if stack else refused


def spy() -> str:
    """The program py-spy; "" if it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    return shutil.which("py-spy") or (str(beside) if beside.exists() else "")


def _spied(pid: int) -> tuple[str, str]:
    program, said = spy(), ""
    if not program:
        return "", "py-spy is not installed"
    for command in ([], ["sudo", "-n"]):
        if command and shutil.which("sudo") is None:
            break
        try:
            done = subprocess.run(
                [*command, program, "dump", "--nonblocking", "--pid", str(pid)],
                capture_output=True,
                text=True,
                timeout=STACK_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if done.returncode == 0:
            return done.stdout.strip(), ""
        said = said or (done.stderr.strip().splitlines() or ["failed"])[0]
    return "", f"py-spy: {said}"


def _own_stack(pid: int) -> tuple[str, str]:
    """What a process writes about itself when it is asked to."""
    proc = Path(f"/proc/{pid}")
    try:
        status = (proc / "status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        found = [fd for fd in (proc / "fd").iterdir() if f"memfd:{STACKS}" in str(fd.readlink())]
    except (OSError, IndexError, ValueError) as error:
        return "", f"its memory cannot be read ({error})"
    # To a process that does not expect it the signal is the end.
    if not found or not caught >> (signal.SIGUSR2 - 1) & 1:
        return "", "it is no process of a run that tells its own"
    if "\nState:\tT" in status:
        return "", "a stopped process tells none itself"
    before = found[0].stat().st_size
    os.kill(pid, signal.SIGUSR2)
    give_up_s = time.monotonic() + STACK_S
    size, last = before, -1
    while time.monotonic() < give_up_s and (size == before or size != last):
        last = size
        time.sleep(0.05)
        size = found[0].stat().st_size
    text = found[0].read_bytes()[before:].decode(errors="replace").strip()
    return text, "" if text else f"it wrote none within {STACK_S:g} s"


# ------------------------------------------------------------------------------- through Ray


@dataclass(frozen=True, slots=True, kw_only=True)
class RayLook:
    """What Ray said."""

    problem: str = ""
    """Why it could not be asked; "" if it could."""
    nodes: Mapping[str, bool] = field(default_factory=dict)
    """Whether each node lives."""
    machines: Mapping[str, MachineLook] = field(default_factory=dict)
    """By node."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Nodes on which nothing could be looked at, and why."""


def ask_ray(
    address: str, pids: Mapping[str, Sequence[int]], folders: Sequence[str] = ()
) -> RayLook:
    """Look at processes on their nodes.

    Args:
        pids: by the id of their node.
    """
    question = json.dumps({"address": address, "pids": pids, "folders": folders})
    # Told by the environment, Ray would connect elsewhere.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.watch.probe"],
            input=question,
            capture_output=True,
            text=True,
            timeout=RAY_S,
            env=environment,
            check=False,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return RayLook(problem=f"it did not answer within {RAY_S:.0f} s")
    except (OSError, ValueError, IndexError):
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        return RayLook(problem=said[-1][:200])
    machines = {node: MachineLook.from_json(m) for node, m in answer.pop("machines").items()}
    return RayLook(machines=machines, **answer)


def _answer(address: str, pids: Mapping[str, list[int]], folders: list[str]) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Of the module by its name, which every node has, and not of this program.
    from cluster.watch.probe import look_at

    ray.init(address=address, namespace="rstar-why", log_to_driver=False, logging_level=40)
    nodes = {node["NodeID"]: bool(node["Alive"]) for node in ray.nodes()}
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look_at)
    asked = {
        node: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        ).remote(found, folders)
        for node, found in pids.items()
        if nodes.get(node)
    }
    machines, silent = {}, {}
    until_s = time.monotonic() + ANSWER_S
    for node, look in asked.items():
        try:
            machines[node] = ray.get(look, timeout=max(0.1, until_s - time.monotonic()))
        except Exception as error:
            silent[node] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return {"nodes": nodes, "machines": machines, "silent": silent}


if __name__ == "__main__":
    said = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        found = _answer(**json.load(sys.stdin))
    said.write(json.dumps(found) + "\n")
    said.flush()
    os._exit(0)  # Ray takes seconds to leave, and nobody needs it any more
