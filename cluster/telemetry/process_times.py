"""CPU time of a driver and of what it has started on its machine, by kind of process.

    driver -- gcs, dashboard, ...             "ray", with the raylet's own and idle workers
           |-- raylet -- ray::PolicyReplica   "PolicyReplica", with all below it
           |          `- ray::SandboxWorker   "SandboxWorker", with every step it has run
           `-- anything else                  "driver"

Not covered: what a process has used since the last look when it ends; an attached cluster, whose
processes are not the driver's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import psutil

DRIVER, RAY = "driver", "ray"

_ACTOR = re.compile(r"ray::(?:[^:]*:)?(\w+)")
_OF_RAY = {"IDLE", "DashboardAgent", "RuntimeEnvAgent"}


class ProcessTimes:
    """Adds up, from look to look."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """By kind; only grows."""
        self._last: dict[tuple[int, float], float] = {}
        """By process id and time of birth."""

    def look(self) -> None:
        """Bring `seconds` up to date; some ten milliseconds."""
        own = psutil.Process()
        below: dict[int, list[psutil.Process]] = defaultdict(list)
        for process in own.children(recursive=True):
            try:
                below[process.ppid()].append(process)
            except psutil.Error:
                continue
        self._add(DRIVER, own, _used([own], reaped=False))
        for child in below[own.pid]:
            title = _title(child)
            if "raylet" not in title and "/ray/" not in title:
                self._add(DRIVER, child, _used(_tree(child, below)))
                continue
            # What has ended below the raylet was counted while it lived.
            self._add(RAY, child, _used([child], reaped=False))
            for actor in below[child.pid]:
                found = _ACTOR.match(_title(actor))
                kind = found[1] if found and found[1] not in _OF_RAY else RAY
                self._add(kind, actor, _used(_tree(actor, below)))

    def _add(self, kind: str, process: psutil.Process, used_s: float) -> None:
        try:
            key = (process.pid, process.create_time())
        except psutil.Error:  # it has just ended
            return
        self.seconds[kind] += max(used_s - self._last.get(key, 0.0), 0.0)
        self._last[key] = max(used_s, self._last.get(key, 0.0))


def _tree(
    process: psutil.Process, below: dict[int, list[psutil.Process]]
) -> Iterable[psutil.Process]:
    yield process
    for child in below[process.pid]:
        yield from _tree(child, below)


def _used(processes: Iterable[psutil.Process], *, reaped: bool = True) -> float:
    """CPU seconds of processes, and of those of their children that have ended."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
        total += (times.children_user + times.children_system) if reaped else 0.0
    return total


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return ""
