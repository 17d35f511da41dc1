from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import SAME_S
from cluster.runs.restarts import VARIABLE, run_again

ROOT = Path(__file__).resolve().parents[4]


def run(code: str, **options: float) -> tuple[int, list[str]]:
    told: list[str] = []
    options = {"restarts": 2, "first_pause_s": 0.01, **options}
    status = run_again([sys.executable, "-c", code], tell=told.append, **options)  # type: ignore[arg-type]
    return status, told


def starts(tmp_path: Path, ends: list[str]) -> str:
    """A driver whose n-th start ends in the n-th way, and tells of it in a file."""
    return (
        "import os, signal, sys\n"
        f"n = int(os.environ['{VARIABLE}'])\n"
        f"open('{tmp_path}/' + str(n), 'w')\n"
        f"exec({ends!r}[n - 1])"
    )


DIES = "os.kill(os.getpid(), signal.SIGKILL)"
FAILS = "sys.exit(1)"
DONE = "sys.exit(0)"


def test_a_driver_that_dies_is_started_again_until_it_ends_well(tmp_path: Path) -> None:
    status, told = run(starts(tmp_path, [DIES, FAILS, DONE]))
    assert status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]
    assert "(signal 9); started again in 0 s (1 of 2 in a row)" in told[0]
    assert "(exit status 1); started again in 0 s (2 of 2 in a row)" in told[1]


def test_a_driver_that_fails_too_often_in_a_row_is_given_up(tmp_path: Path) -> None:
    status, told = run(starts(tmp_path, [FAILS] * 9))
    assert status == 1
    assert len(list(tmp_path.iterdir())) == 3
    assert "given up after 3 in a row (--restarts 2)" in told[-1]


def test_failures_after_good_work_do_not_add_up(tmp_path: Path) -> None:
    status, _ = run(starts(tmp_path, [FAILS] * 5 + [DONE]), good_s=0.0, restarts=1)
    assert status == 0


@pytest.mark.parametrize("end, status", [("sys.exit(130)", 130), ("sys.exit(2)", 2)])
def test_who_was_stopped_or_is_wrong_is_not_started_again(
    tmp_path: Path, end: str, status: int
) -> None:
    assert run(starts(tmp_path, [end, DONE])) == (status, [])


def test_pauses_grow(tmp_path: Path) -> None:
    _, told = run(starts(tmp_path, [FAILS] * 9), restarts=3, first_pause_s=0.3)
    assert [line.partition("again in ")[2][:3] for line in told[:-1]] == ["0 s", "1 s", "1 s"]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Of a driver that works, in a process group of their own."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.job_driver", tmp_path], cwd=ROOT, start_new_session=True
    )
    while not (tmp_path / "1").exists():
        assert started.poll() is None
        time.sleep(0.05)
    yield started
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def ended_in_good_order(parent: subprocess.Popen[bytes], folder: Path) -> None:
    assert parent.wait() == 130
    assert (folder / "drained").exists(), "it was told twice, and ended at once"
    assert not (folder / "2").exists()


@pytest.mark.parametrize("to", ["parent", "group"])
def test_a_stop_reaches_the_driver_once_by_either_way(tmp_path: Path, parent, to: str) -> None:
    (os.kill if to == "parent" else os.killpg)(parent.pid, signal.SIGTERM)
    ended_in_good_order(parent, tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_is_passed_on_late_ends_no_drain(tmp_path: Path, parent, sent) -> None:
    os.kill(parent.pid, signal.SIGSTOP)  # as where it gets no core for a while
    os.killpg(parent.pid, sent)
    time.sleep(2 * SAME_S)
    os.kill(parent.pid, signal.SIGCONT)
    ended_in_good_order(parent, tmp_path)
