"""Jobs on a real head with its job server: sent over http, started again, drained, sent again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(1200)

SEND = """
import sys
from pathlib import Path
from cluster.runs.submit import STOP_WAIT_S, send
address, folder, uploaded = sys.argv[1:]
send(
    "rstar-test",
    f"python -m tests.job_driver {folder}",
    Path(uploaded),
    address=address,
    env={"COLOUR": "blue", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
    metadata={"run_dir": folder},
)
"""


def rstar(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 450
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the job server of a head that only this test has."""
    # Not below pytest's own folder: the names of Ray's sockets would be too long.
    folder = Path("/tmp") / f"r{os.getpid()}"
    port, dashboard = free_port(), free_port()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["PYTHONPATH"] = str(ROOT)
    head = subprocess.Popen(
        [
            *(Path(sys.executable).parent / "ray", "start", "--head", "--block"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"),
            *("--dashboard-host=127.0.0.1", "--num-cpus=1", f"--temp-dir={folder}"),
            *("--object-store-memory=80000000", "--disable-usage-stats"),
            *(
                f"--dashboard-agent-listen-port={free_port()}",
                f"--metrics-export-port={free_port()}",
            ),
        ],
        env=env,
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        until(lambda: rstar("job", "list", "--address", url).returncode == 0)
        yield url
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_is_started_again_after_its_drivers_death_and_drains_when_it_is_stopped(
    address: str, tmp_path: Path
) -> None:
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    (uploaded / "run.yaml").write_text("name: x\n")
    folder = tmp_path / "run"
    folder.mkdir()

    def submit() -> subprocess.CompletedProcess[str]:
        # Not in this process, whose Ray keeps how it logged into the cluster of another test.
        command = [sys.executable, "-c", SEND, address, str(folder), str(uploaded)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)

    sent = submit()
    assert sent.returncode == 0, sent.stderr
    until(lambda: (folder / "1").exists() and (folder / "1").read_text() != "")
    told = (folder / "1").read_text()
    assert "'COLOUR': 'blue'" in told and "run.yaml" in told
    assert "job rstar-test is RUNNING already; stop it first" in submit().stderr

    os.kill(int(told.split()[0]), signal.SIGKILL)
    until(lambda: (folder / "2").exists())
    logs = rstar("job", "logs", "rstar-test", "--address", address).stdout
    assert "(signal 9); started again in 0 s (1 of 3 in a row)" in logs

    stopped = rstar("job", "stop", "rstar-test", "--address", address)
    assert stopped.stdout.splitlines()[-1] == "rstar-test: STOPPED", stopped
    assert (folder / "drained").exists(), "the driver was killed before it had drained"
    assert not (folder / "3").exists()
    status = rstar("job", "status", "rstar-test", "--address", address).stdout
    assert f"run: {folder}" in status and "rstar-test: STOPPED, submitted" in status

    for name in ("1", "2", "drained"):
        (folder / name).unlink()
    assert submit().returncode == 0  # the same id again
    until(lambda: (folder / "1").exists())
    assert "RUNNING" in rstar("job", "list", "--address", address).stdout
    assert rstar("job", "stop", "rstar-test", "--address", address).returncode == 0
    missing = rstar("job", "status", "rstar-none", "--address", address)
    assert missing.returncode == 1
    assert f"{address} has no job rstar-none; rstar job list shows all" in missing.stderr
