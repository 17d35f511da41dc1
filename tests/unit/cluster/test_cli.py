"""The command line: what it prints, and one line for each thing a user can mend."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli

SMALL = ["num_problems=600", "num_replicas=6", "lost_per_hour=0.9", "coordinator_kill_s=600"]


def rstar(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    monkeypatch.setattr(sys, "argv", ["rstar", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_simulation_loses_and_doubles_nothing_while_replicas_and_coordinator_die(
    monkeypatch, capsys
):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    status, out, _ = rstar(monkeypatch, capsys, "simulate", "--json", *settings)
    report = json.loads(out)
    assert status == 0
    assert report["replicas_lost"] > 0
    assert report["coordinator_kills"] > 0
    assert (report["lost"], report["doubled"], report["committed"]) == (0, 0, 600)


def test_plan_needs_half_the_days_with_twice_the_gpus(monkeypatch, capsys):
    days = []
    for gpus in ("64", "128"):
        _, out, _ = rstar(
            monkeypatch, capsys, "plan", "--gpus", gpus, "--gpu-kind", "h100-80gb", "--on-demand"
        )
        days.append(float(out.split("GPUs: ")[1].split(" days")[0]))
    assert days[0] / days[1] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--gpus", "8", "--gpu-kind", "h1"), "no GPU kind 'h1'"),
        (("simulate", "--set", "num_replica=3"), "did you mean 'num_replicas'"),
        (("simulate", "--latency-curve", "nowhere.json"), "nowhere.json"),
        (("evolve", "papr"), "did you mean 'paper'"),
        (("status", "nowhere"), "nowhere"),
        (("tree", "nowhere", "p"), "nowhere"),
        (("report", "nowhere"), "no report"),
    ],
)
def test_what_a_user_can_mend_is_one_line_on_stderr(monkeypatch, capsys, arguments, message):
    status, out, err = rstar(monkeypatch, capsys, *arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("rstar: ") and message in err
    assert err.count("\n") == 1


WAITING = """
import asyncio, sys, typer
from cluster.cli import _run
async def work():
    print("begun", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        open(sys.argv[1], "w").write("drained")
try:
    _run(work(), again="rstar evolve demo")
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""


def waiting_command(place: Path, **streams) -> subprocess.Popen[bytes]:
    """A command that works until it is told to stop, and then says so in a file."""
    root = str(Path(cli.__file__).parents[1])
    heard = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started by
    try:
        return subprocess.Popen([sys.executable, "-c", WAITING, place], cwd=root, **streams)
    finally:
        signal.signal(signal.SIGHUP, heard)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_that_is_told_to_stop_ends_in_good_order(tmp_path: Path, sent):
    place = tmp_path / "said"
    process = waiting_command(place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert place.read_text() == "drained"
    assert process.returncode == 130
    assert b"to go on where it stopped: rstar evolve demo" in err


def test_command_goes_on_without_its_terminal(tmp_path: Path):
    place = tmp_path / "said"
    ours, theirs = pty.openpty()
    process = waiting_command(
        place, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(ours, 8)
    assert said.split() == [b"begun"]
    os.close(ours)  # as when the line is cut
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    assert not place.exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert place.read_text() == "drained"
