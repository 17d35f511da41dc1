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

_CGROUP = "/sys/fs/cgroup/"


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


def _number_in(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
        return int(text) if text.isdigit() else None
    except OSError:
        return None


def _machine_memory() -> tuple[int, int]:
    """Bytes of memory of this machine, and of those that are available."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    values = {row[0]: int(row[1]) * 1024 for row in rows}
    return values["MemTotal:"], values["MemAvailable:"]


def memory_is_short() -> bool:
    """Less than 5 % (at least 256 MiB) of the machine's or the container's memory is left."""
    total, available = _machine_memory()
    if available < max(256 << 20, total // 20):
        return True
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number_in(_CGROUP + limit_file), _number_in(_CGROUP + used_file)
        if limit and used and limit < total:
            return limit - used < max(128 << 20, limit // 20)
    return False


def live_cap(wanted: int) -> int:
    """Live processes this machine allows: half of the pids, the descriptors, 5 MiB each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    caps = [wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100]
    for path in ("/proc/sys/kernel/pid_max", _CGROUP + "pids.max", _CGROUP + "pids/pids.max"):
        if limit := _number_in(path):
            caps.append(limit // 2)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY and os.geteuid() != 0:
        caps.append(processes // 2)
    caps.append(_machine_memory()[1] // (5 << 20))
    return max(min(caps), 4)


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
