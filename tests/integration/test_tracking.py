"""Real trackers: MLflow's own server, W&B offline, TensorBoard's own reader; and one that hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.folder.run_folder import RunFolder
from cluster.telemetry import tracking
from cluster.telemetry.tracking import Following, links
from tests.trackers import ROOT, add_round, add_steps, live, make_run, packages

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the trackers' packages are, which processes started from now on find."""
    where = packages()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(where), str(ROOT)]))
    monkeypatch.syspath_prepend(str(where))  # for the look whether they are installed
    monkeypatch.setattr(tracking, "LAST_WORDS_S", 150.0)
    return where


def until(what: Callable[[], Any], within_s: float = 600) -> None:
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def python(code: str, *arguments: str) -> Any:
    """What a program prints last, as JSON: the trackers' packages stay out of this process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def follow(folder: RunFolder, *names: str) -> tuple[Following, list[str]]:
    told: list[str] = []
    following = Following(folder, names, told.append)
    following.start()
    return following, told


READ_BOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
board = EventAccumulator(sys.argv[1], size_guidance={"tensors": 0, "scalars": 0}).Reload()
tags = board.Tags()
def text(tag):
    return board.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
print(json.dumps({
    "scalars": {t: [(e.step, e.value) for e in board.Scalars(t)] for t in tags["scalars"]},
    "texts": {t.removesuffix("/text_summary"): text(t) for t in tags["tensors"]},
}))
"""


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_event_files_hold_the_run_and_its_next_start(
    where: str, trackers: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = make_run(request.getfixturevalue("root") if where == "bucket" else tmp_path / "run")
    add_steps(folder, "policy", 1, range(1, 4))
    following, told = follow(folder, "tensorboard")
    until(lambda: links(folder))
    add_round(folder, 1, right=2)
    following.end()
    add_steps(folder, "policy", 2, range(1, 3), loss=0.5)
    follow(folder, "tensorboard")[0].end()
    assert told == [f"tensorboard: tensorboard --logdir {folder.at('tensorboard')}"]
    board = tmp_path / "read"
    board.mkdir()
    for path in folder.store.files("tensorboard"):
        (board / path.rpartition("/")[2]).write_bytes(folder.store.read(path))
    found = python(READ_BOARD, str(board))
    assert found["scalars"]["policy/loss"] == [[1, 1], [2, 1], [3, 1], [4, 0.5], [5, 0.5]]
    assert found["scalars"]["held_out/greedy/all"] == [[1, 0.5]]
    assert "    name: demo" in found["texts"]["config.yaml"]
    assert "held_out/greedy/all" in found["texts"]["rounds.csv"]


READ_WANDB = """
import glob, json, sys
from wandb.proto import wandb_internal_pb2
def records(data):
    # LevelDB's log: after a header, blocks of 32 KiB of (crc 4, length 2, kind 1, bytes).
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""
found = {"ids": [], "rows": [], "artifacts": [], "exits": []}
for path in sorted(glob.glob(sys.argv[1] + "/wandb/offline-run-*/run-*.wandb")):
    for data in records(open(path, "rb").read()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["ids"].append(record.run.run_id)
        elif kind == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            found["rows"].append(row)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact.name)
        elif kind == "request" and record.request.HasField("log_artifact"):
            found["artifacts"].append(record.request.log_artifact.artifact.name)
        elif kind == "exit":
            found["exits"].append(record.exit.exit_code)
print(json.dumps(found))
"""


def test_offline_runs_of_wandb_are_one_run(
    trackers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = make_run(tmp_path / "run")
    add_steps(folder, "ppm", 1, range(1, 4))
    add_round(folder, 1, right=1)
    live(folder, "stopped")
    follow(folder, "wandb")[0].end()
    add_steps(folder, "ppm", 2, range(1, 3))
    folder.write_bytes("report.html", b"<p>what it showed</p>")
    live(folder, "finished")
    following, told = follow(folder, "wandb")
    following.end()
    found = python(READ_WANDB, str(folder.root))
    run_id = folder.store.identify()
    assert set(found["ids"]) == {run_id}
    steps = [row["ppm/step"] for row in found["rows"] if "ppm/step" in row]
    assert steps == [1, 2, 3, 4, 5]
    (row,) = [row for row in found["rows"] if "held_out/greedy/all" in row]
    assert (row["round"], row["held_out/greedy/all"]) == (1, 0.25)
    assert {f"{run_id}-{n}" for n in ("config.yaml", "rounds.csv", "report.html")} <= set(
        found["artifacts"]
    )
    assert found["exits"] == [1, 0]
    assert told[0].startswith("wandb: wandb sync ") and run_id in told[0]


@pytest.fixture
def port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture
def serve(trackers: Path, tmp_path: Path, port: int) -> Iterator[Callable[[], None]]:
    """Starts MLflow's server, and waits until it answers."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        ]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (tmp_path / "server.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
                )
            )
        until(lambda: _answers(port))

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


READ_MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
(experiment,) = [e for e in client.search_experiments() if e.name == "rstar"]
(run,) = client.search_runs([experiment.experiment_id])
def curve(name):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
def text(name):
    return open(client.download_artifacts(run.info.run_id, name)).read()
print(json.dumps({
    "experiment": experiment.experiment_id, "run": run.info.run_id, "status": run.info.status,
    "name": run.info.run_name, "params": run.data.params, "tags": run.data.tags,
    "curves": {name: curve(name) for name in run.data.metrics},
    "artifacts": [a.path for a in client.list_artifacts(run.info.run_id)],
    "page": text("report.html"), "table": text("rounds.csv"),
}))
"""


def test_a_server_of_mlflow_that_comes_late_has_all_of_a_run_and_of_its_next_start(
    serve: Callable[[], None],
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    folder = make_run(tmp_path / "run")
    add_steps(folder, "policy", 1, range(1, 4))
    following, told = follow(folder, "mlflow")
    until(lambda: told)
    assert "mlflow is not told of the run" in told[0] and "the run goes on" in told[0]
    serve()
    add_round(folder, 1, right=2)
    live(folder, "stopped")
    following.end()
    assert sum("not told" in line for line in told) == 1, told
    add_steps(folder, "policy", 2, range(1, 3), loss=0.5)
    folder.write_bytes("report.html", b"<p>what it showed</p>")
    live(folder, "finished")
    following, told = follow(folder, "mlflow")
    following.end()
    assert told == []
    found = python(READ_MLFLOW, server)
    link = f"{server}/#/experiments/{found['experiment']}/runs/{found['run']}"
    assert links(folder) == {"mlflow": {"link": link, "error": ""}}
    assert (found["name"], found["status"]) == ("demo (run)", "FINISHED")
    assert found["params"]["search.top_p"] == "0.9"
    assert found["tags"]["rstar.run_dir"] == str(folder.root)
    assert found["curves"]["policy/loss"] == [[1, 1], [2, 1], [3, 1], [4, 0.5], [5, 0.5]]
    assert found["curves"]["held_out/greedy/all"] == [[1, 0.5]]
    assert found["curves"]["rollout/totals/trees"] == [[1, 36]]
    assert {"config.yaml", "report.html", "rounds.csv"} <= set(found["artifacts"])
    assert found["page"] == "<p>what it showed</p>"
    assert "held_out/greedy/all" in found["table"]


def test_a_server_that_never_answers_holds_up_no_run(
    trackers: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LAST_WORDS_S", 3.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", port))
        deaf.listen()
        following, told = follow(make_run(tmp_path / "run"), "mlflow")
        asked, _ = deaf.accept()
        began_s = time.monotonic()
        following.end()
        assert time.monotonic() - began_s < 30
        asked.close()
    assert told == [
        f"trackers were not told everything within 3 s; the rest: rstar track {tmp_path / 'run'}"
    ]


def test_a_follower_that_is_killed_is_told_of_and_nothing_else_happens(
    trackers: Path, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    following, told = follow(folder, "tensorboard")
    assert following._process is not None
    until(lambda: told)
    following._process.kill()
    until(lambda: len(told) == 2)
    assert told[1].startswith("the process that tells the trackers ended (signal 9)")
    following.end()


def test_a_follower_ends_with_its_driver(trackers: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from cluster.folder.run_folder import RunFolder\n"
        "from cluster.telemetry.tracking import Following\n"
        "following = Following(RunFolder(sys.argv[1]), ['tensorboard'], print)\n"
        "following.start()\n"
        "print(following._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    folder = make_run(tmp_path / "run")
    driver = subprocess.Popen(
        [sys.executable, "-c", code, folder.root], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert driver.stdout is not None
    follower = int(driver.stdout.readline())
    until(lambda: links(folder))
    add_steps(folder, "policy", 1, range(1, 4))
    driver.kill()
    driver.wait()
    until(lambda: not Path(f"/proc/{follower}").exists())
    told = json.loads(folder.read_bytes("tracking.json") or b"")
    assert told["tensorboard"]["steps"]["policy"] == {"1": 3}
