"""What the supervisor asks of the kernel: the use of a process, and what this machine allows.

Nothing here is told by a state itself. Only /proc, the limits of the container, and the clocks.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

from verifier import isolation

_CGROUP = Path("/sys/fs/cgroup")


def cpu_seconds(pid: int) -> float:
    """CPU time of another process, by the kernel's clock of that process."""
    return time.clock_gettime((~pid << 3) | 2)


def resident_bytes(pid: int) -> int:
    descriptor = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 200).split()[1]) * resource.getpagesize()
    finally:
        os.close(descriptor)


def run_delay_seconds(pid: int) -> float:
    """Time a process stood ready without getting a core; 0 where the kernel does not count it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
        return int(text) if text.isdigit() else None
    except OSError:
        return None


def _groups(controller: str, v1: bool) -> list[Path]:
    """Folders of the control groups this process is in, its own first; those seen from here."""
    folders = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") if v1 else not controllers:
            base = _CGROUP / controller if v1 else _CGROUP
            own = base / path.strip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return folders


def usable_cores() -> int:
    """Cores this process may use: its affinity, or what the container's CPU quota comes to."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _groups("cpu", v1=False):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, int(quota) / int(period))  # "max": no quota
    for folder in _groups("cpu", v1=True):
        quota_us = _number_in(folder / "cpu.cfs_quota_us")
        period_us = _number_in(folder / "cpu.cfs_period_us")
        if quota_us and period_us:
            cores = min(cores, quota_us / period_us)
    return max(1, int(cores))


def _memory() -> list[tuple[int, int]]:
    """Bytes of memory, and of those that are left: of this machine and of each container around."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    values = {row[0]: int(row[1]) * 1024 for row in rows}
    total = values["MemTotal:"]
    found = [(total, values["MemAvailable:"])]
    for v1, limit_file, used_file, cache_row in (
        (False, "memory.max", "memory.current", "inactive_file"),
        (True, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _groups("memory", v1):
            limit, used = _number_in(folder / limit_file), _number_in(folder / used_file)
            if limit and used and limit < total:
                found.append((limit, limit - used + _row_of(folder / "memory.stat", cache_row)))
    return found


def _row_of(path: Path, name: str) -> int:
    """A number in a file of names and numbers; 0: it is not there."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def memory_left() -> float:
    """Share of the memory that is left, of the machine or of a container: the least of them.

    As Ray counts it, whose memory monitor kills actors at 0.05.
    """
    return min(left / total for total, left in _memory())


def live_cap(wanted: int, share: float = 1.0) -> int:
    """Live processes this machine allows: half of the pids, the descriptors, 5 MiB each.

    Args:
        share: part of the machine's pids and memory that may be used.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    caps = []
    groups = [folder / "pids.max" for v1 in (False, True) for folder in _groups("pids", v1)]
    for path in (Path("/proc/sys/kernel/pid_max"), *groups):
        if limit := _number_in(path):
            caps.append(limit // 2)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY and os.geteuid() != 0:
        caps.append(processes // 2)
    caps.append(min(total for total, _ in _memory()) // (5 << 20))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100
    return max(min(wanted, int(min(caps) * share), descriptors), 4)


def uid_range() -> tuple[int, int]:
    """First of, and how many, user ids for trees; (0, 0) when this process may not switch users."""
    needed = (isolation.CAP_SETUID, isolation.CAP_SETGID, isolation.CAP_KILL)
    capabilities = isolation.effective_capabilities()
    if os.geteuid() != 0 or not all(capabilities >> bit & 1 for bit in needed):
        return 0, 0
    ranges = []
    for name in ("uid_map", "gid_map"):
        lines = Path(f"/proc/self/{name}").read_text().splitlines()
        ranges.append([(int(line.split()[0]), int(line.split()[2])) for line in lines])
    for first, count in ((200_000, 10_000), (60_000, 5_000), (65_534, 1)):
        if all(any(a <= first and first + count <= a + n for a, n in kind) for kind in ranges):
            return first, count
    return 0, 0
