"""A child process that was given an `EndsWithOwner` does not outlive its parent."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.engines import process as engine_process
from cluster.engines.process import EndsWithOwner

ROOT = Path(__file__).parents[4]

PARENT = """
import multiprocessing, sys, time
from cluster.engines.process import EndsWithOwner

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    arguments = (60, EndsWithOwner()) if sys.argv[1] == "bound" else (60,)
    child = context.Process(target=WORK, args=arguments)
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""

CHILD = """
import time


def work(seconds, *bound):
    print("works", flush=True)
    time.sleep(seconds)
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def start(folder: Path, kind: str) -> tuple[subprocess.Popen[str], int]:
    (folder / "child.py").write_text(CHILD)
    (folder / "parent.py").write_text(
        PARENT.replace("WORK", "work").replace(
            "import multi", "from child import work\nimport multi"
        )
    )
    parent = subprocess.Popen(
        [sys.executable, str(folder / "parent.py"), kind],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "works\n"
    return parent, pid


def test_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent, child = start(tmp_path, "bound")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not lives(child)


def test_child_that_is_not_bound_survives(tmp_path: Path) -> None:
    parent, child = start(tmp_path, "free")
    parent.kill()
    parent.wait()
    time.sleep(0.3)
    assert lives(child)
    os.kill(child, signal.SIGKILL)


def test_it_is_a_constant_string_to_everybody_else() -> None:
    assert json.dumps({"lifetime": EndsWithOwner()}) == '{"lifetime": "ends with its owner"}'
    assert copy.deepcopy(EndsWithOwner()) == EndsWithOwner()


def test_on_another_machine_it_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the process id is of nobody, or of somebody else."""
    watched: list[int] = []
    monkeypatch.setattr(engine_process, "_watch", lambda pid, start_time: watched.append(pid))
    arrive, (pid, start_time, space) = EndsWithOwner().__reduce__()
    arrive(pid + 1, start_time, "another boot pid:[1]")
    assert watched == []
    assert arrive(pid + 1, start_time, space) == EndsWithOwner()
    assert watched == [pid + 1]
