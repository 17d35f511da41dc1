"""The whole loop on a bucket: the trees of a disk, also when it is killed and goes on elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from cluster.folder.run_folder import RunFolder
from cluster.watch.status import read_status
from learner.checkpoint import CheckpointStore
from rollout.store import RunStore, TrajectoryStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "deploy" / "configs" / "smoke.yaml"
BUCKET = "runs"
SETTINGS = (
    "cluster.policy.replicas=1",
    "evaluation.num_problems=4",
    "evaluation.num_search_problems=2",
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}"
    server.stop()


class Machine:
    """A machine as far as a run can tell: its own temporary folder and copies."""

    def __init__(self, home: Path) -> None:
        (home / "tmp").mkdir(parents=True)
        self.log = home / "log.txt"
        self.environment = {
            **os.environ,
            "TMPDIR": str(home / "tmp"),
            "RAY_TMPDIR": "/tmp",  # sockets have to have short names
            "VLLM_RPC_BASE_PATH": "/tmp",
            "RSTAR_STAGE": str(home / "staged"),
        }
        self.process: psutil.Popen | None = None

    def start(self, run_dir: str) -> None:
        arguments = [p for s in (f"run_dir={run_dir}", *SETTINGS) for p in ("--set", s)]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "cluster", "evolve", str(SMOKE), *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout_s: float = 900.0) -> None:
        assert self.process is not None
        try:
            status = self.process.wait(timeout_s)
        except psutil.TimeoutExpired:
            status = None
        assert status == 0, self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """End the driver and everything it started, at once."""
        assert self.process is not None
        living = [self.process, *self.process.children(recursive=True)]
        for process in living:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(living, timeout=30)


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


@pytest.mark.timeout(2400)
def test_loop_killed_on_a_bucket_goes_on_from_an_empty_disk_and_makes_the_trees_of_a_disk(
    tmp_path: Path, bucket: str
) -> None:
    disk = Machine(tmp_path / "disk")
    disk.start(str(tmp_path / "disk" / "run"))
    disk.wait()

    store = RunStore(f"{bucket}/smoke")
    one = Machine(tmp_path / "one")
    one.start(store.root)
    deadline_s = time.monotonic() + 900
    while not store.exists("datasets/round=1/manifest.json"):
        assert time.monotonic() < deadline_s, one.log.read_text(errors="replace")
        assert one.process is not None and one.process.poll() is None, one.log.read_text()
        time.sleep(1.0)
    one.kill()
    committed = {p: store.read(p) for p in store.files("trajectories/round=1/commits")}

    other = Machine(tmp_path / "other")
    other.start(store.root)
    other.wait()
    assert {p: store.read(p) for p in committed} == committed
    assert len(store.files("drivers")) == 2
    assert trees_of(store) == trees_of(RunStore(tmp_path / "disk" / "run"))
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
