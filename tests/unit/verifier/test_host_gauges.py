"""What the machine and the containers around a process allow, from hand-made files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from verifier import host_gauges
from verifier.eviction import Eviction
from verifier.host_gauges import live_cap, memory_left, usable_cores
from verifier.sandbox import Sandbox, SandboxLimits

GIB = 1 << 30


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a control group (v2) that stands for this process's own."""
    own = tmp_path / "pod" / "box"
    own.mkdir(parents=True)
    monkeypatch.setattr(host_gauges, "_CGROUP", tmp_path)

    def groups(controller: str, v1: bool) -> list[Path]:
        return [] if v1 else [own, own.parent, tmp_path]

    monkeypatch.setattr(host_gauges, "_groups", groups)
    return own


def say(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def test_a_cpu_quota_counts_wherever_it_is_set(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert usable_cores() == 16
    say(group.parent, cpu_max="250000 100000")
    say(group, cpu_max="max 100000")
    assert usable_cores() == 2
    say(group, cpu_max="50000 100000")
    assert usable_cores() == 1


def test_the_tightest_memory_limit_counts_and_files_that_are_only_cached_do_not(
    group: Path,
) -> None:
    say(group, memory_max="max", memory_current=str(3 * GIB))
    say(group.parent, memory_max=str(GIB), memory_current=str(GIB * 9 // 10))
    assert memory_left() == pytest.approx(0.1, abs=0.01)
    say(group.parent, memory_stat=f"anon 5\ninactive_file {GIB // 2}\n")
    assert memory_left() == pytest.approx(min(0.6, machine_left()), abs=0.02)
    assert live_cap(2000) == GIB // (5 << 20)


def machine_left() -> float:
    return min(left / total for total, left in host_gauges._memory()[:1])


def test_own_groups_and_those_around_them_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_gauges, "_CGROUP", tmp_path)
    text = "4:memory:/a/b\n3:cpu,cpuacct:/\n0::/slice/job\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    memory = tmp_path / "memory"
    assert host_gauges._groups("memory", v1=True) == [memory / "a/b", memory / "a", memory]
    assert host_gauges._groups("cpu", v1=True) == [tmp_path / "cpu"]
    unified = [tmp_path / "slice/job", tmp_path / "slice", tmp_path]
    assert host_gauges._groups("memory", v1=False) == unified


def test_a_sandbox_keeps_the_part_of_the_states_that_its_part_of_the_machine_holds() -> None:
    assert live_cap(200, 0.5) == live_cap(200) == 200  # what is wanted is for one sandbox
    whole = live_cap(10**9)
    assert live_cap(10**9, 0.25) == pytest.approx(whole / 4, rel=0.01)
    assert live_cap(1, 0.01) == 4


class Processes:
    """What eviction asks of the processes of a sandbox."""

    def __init__(self, live: int) -> None:
        self.live, self.counts, self.idle = live, {"memory_pressure": 0}, {}


@pytest.mark.parametrize(
    ("left", "live", "evicts"),
    [(0.16, 500, 0), (0.14, 500, 1), (0.14, 16, 0), (0.05, 16, 1)],
    ids=["room", "short", "short, with few states", "last moment"],
)
def test_states_go_while_fifteen_percent_of_the_memory_are_left(
    left: float, live: int, evicts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.eviction.memory_left", lambda: left)
    processes = Processes(live)
    limits = {"live_states": 2000, "live_states_per_tree": 256}
    eviction = Eviction(processes, limits, cores=2, share=1.0)  # type: ignore[arg-type]

    class Tree:
        live = 1

    assert eviction.make_room(Tree()) is True  # type: ignore[arg-type]
    assert processes.counts["memory_pressure"] == evicts


def test_two_sandboxes_that_share_a_machine_take_half_of_it_each() -> None:
    limits = SandboxLimits(live_states=10**6)
    with (
        Sandbox(limits, "best_effort", share=0.5) as one,
        Sandbox(limits, "best_effort", share=0.5) as other,
    ):
        for sandbox in (one, other):
            said = sandbox.capabilities()
            assert said["cores"] == max(1, usable_cores() // 2)
            assert said["live_cap"] == live_cap(10**6, 0.5) < live_cap(10**6)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        Sandbox(share=share)
