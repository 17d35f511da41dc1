"""Time of processes that look like a driver's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cluster.telemetry.process_times import ProcessTimes

SPIN = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ntime.sleep(60)"
RAYLET = """
(exec -a "ray::box-1:SandboxWorker.run" bash -c '"$0" -c "$1"; true' "$0" "$1") &
(exec -a "ray::IDLE" "$0" -c "$1") &
wait
"""


def test_what_runs_below_an_actor_is_its_own_and_idle_workers_are_rays() -> None:
    times = ProcessTimes()
    times.look()
    before = times.seconds["driver"]
    raylet = subprocess.Popen(
        ["/ray/raylet", "-c", RAYLET, sys.executable, SPIN],
        executable="/bin/bash",
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert raylet.stdout is not None
    try:
        for _ in range(2):
            raylet.stdout.readline()
        times.look()
    finally:
        os.killpg(raylet.pid, signal.SIGKILL)
        raylet.wait()
        raylet.stdout.close()
    assert times.seconds["SandboxWorker"] == pytest.approx(0.4, abs=0.15)
    assert times.seconds["ray"] == pytest.approx(0.4, abs=0.15)
    seen = dict(times.seconds)
    times.look()
    assert {kind: times.seconds[kind] for kind in ("SandboxWorker", "ray")} == {
        kind: seen[kind] for kind in ("SandboxWorker", "ray")
    }
    assert before <= seen["driver"] <= times.seconds["driver"]
