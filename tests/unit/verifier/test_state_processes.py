"""What the supervisor decides about a step, on readings made up here: no process, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from verifier import state_processes
from verifier.event_loop import EventLoop
from verifier.state_processes import Processes, due_seconds
from verifier.tree_records import RUNNING, Forest, Job, Tree

LIMITS = {"wall_s": 3.0, "wall_stretch": 3.0, "cpu_s": 4.0, "memory_mib": 512}


@pytest.mark.parametrize(
    ("age_s", "cpu_s", "waited_s", "due_s"),
    [
        (3.0, 3.0, 0.0, 3.0),  # a busy loop with a core of its own
        (3.0, 0.0, 0.0, 3.0),  # asleep: it never wanted a core
        (3.0, 1.2, 1.8, 3.0),  # two fifths of a core: not starved
        (3.0, 0.6, 2.4, 5.4),  # starved: what it waited is given back
        (5.4, 1.1, 4.3, 7.3),
        (7.3, 1.5, 5.8, 8.8),
        (8.8, 1.8, 7.0, 9.0),  # three times the limit, and no more
        (60.0, 1.8, 58.0, 9.0),
    ],
)
def test_starved_step_gets_its_waiting_time_back_up_to_the_stretch(age_s, cpu_s, waited_s, due_s):
    assert due_seconds(age_s, cpu_s, waited_s, LIMITS) == pytest.approx(due_s)


class Ends:
    """Outcomes that keep what they are told."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def finish(self, job, result, process, digest="") -> None:
        self.results.append(result)

    def retry(self, job, reason) -> None:
        raise AssertionError(f"tried again: {reason}")

    def root_ready(self, process, report) -> None: ...

    def root_lost(self, node, reason) -> None: ...


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.epoll.close()


@pytest.mark.parametrize(
    ("share", "stretch", "status", "error_type", "ended_s"),
    [
        (1.0, 3.0, "timeout", "WallLimit", 3.0),
        (0.5, 3.0, "timeout", "WallLimit", 3.0),
        (2 / 7, 3.0, "infra_error", "Contended", 9.0),  # load 6 on two cores
        (0.01, 3.0, "infra_error", "Contended", 9.0),
        (2 / 7, 10.0, "timeout", "WallLimit", 10.5),  # by then it had its three seconds
        (0.01, 10.0, "infra_error", "Contended", 30.0),
        (2 / 7, 1.0, "infra_error", "Contended", 3.0),
    ],
)
def test_busy_loop_ends_within_the_stretch_whatever_the_machine_gives_it(
    loop, monkeypatch, share, stretch, status, error_type, ended_s
):
    ends = Ends()
    processes = Processes(loop, Counter(), ends)
    tree = Tree("p", "base", 0, None)
    node = Forest().add_new(tree, None, "")
    job = Job(node, "while True: pass", (), {**LIMITS, "wall_stretch": stretch})
    process, theirs = processes.expect(tree, job, 0.0)
    theirs.close()
    process.phase, process.deadline = RUNNING, LIMITS["wall_s"]
    now = 0.0
    monkeypatch.setattr(state_processes, "cpu_seconds", lambda _: share * now)
    monkeypatch.setattr(state_processes, "run_delay_seconds", lambda _: (1 - share) * now)
    monkeypatch.setattr(state_processes, "resident_bytes", lambda _: 0)
    while not ends.results:
        now = process.deadline + 0.0005
        assert now < 100.0
        processes.tick(now)
    (result,) = ends.results
    assert (result["status"], result["error_type"]) == (status, error_type)
    assert result["wall_s"] == pytest.approx(ended_s, abs=0.01)
