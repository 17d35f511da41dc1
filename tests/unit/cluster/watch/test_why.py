"""What a run hangs on, judged from made accounts; and the look at real processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.telemetry.live import (
    LIVE_FILE,
    ActorAccount,
    FleetAccount,
    Live,
    LossAccount,
    NodeAccount,
    PartAccount,
    Snapshot,
    WaitAccount,
    read_live,
)
from cluster.telemetry.logs import LogLine
from cluster.watch import probe
from cluster.watch.probe import MachineLook, ProcessLook, how_full, look_at
from cluster.watch.why import Why, culprits, read_why, show_why, why_view
from rollout.run_store import RunStore

NOW_S = 1_800_000_000.0


def actor(name: str, node: str = "n1", **other: Any) -> ActorAccount:
    pool, _, number = name.partition("-")
    return ActorAccount(
        name=name,
        pool=pool,
        state="ready",
        host=f"host-{node}",
        node=node,
        pid=100 + int(number),
        **other,
    )


FLEET = FleetAccount(
    address="10.0.0.1:6379",
    num_actors=3,
    num_nodes=2,
    actors=(
        actor("policy-1", "n2", open=8, silent_s=0.4),
        actor("policy-2", open=8, silent_s=0.3),
        actor("sandbox-3", open=4, silent_s=0.2),
    ),
    waits=(WaitAccount(who="worker-0", pool="policy", on="policy-1", count=5, for_s=42.0),),
)
COMMIT = PartAccount(part="commit", waits_on="the store", open=3, for_s=9.0)


def live(fleet: FleetAccount | None = FLEET, **other: Any) -> Live:
    usual: dict[str, Any] = {"state": "running", "time_unix_s": NOW_S - 2}
    now = Snapshot(stage="rollout", label="round 1: rollout", done=8, total=40, stage_still_s=44)
    return Live(
        **usual | {"progress": now} | other,
        started_unix_s=NOW_S - 100,
        seconds_total=100,
        host="driver-host",
        pid=77,
        command="rstar evolve demo",
        cwd="/",
        fleet=fleet,
    )


def judged(
    told: Live | None = None,
    *looks: ProcessLook,
    alive: bool = True,
    nodes: dict[str, bool] | None = None,
    full: dict[str, str] | None = None,
    errors: list[LogLine] | None = None,
    hogs: tuple[str, ...] = (),
) -> list[tuple[str, str, str]]:
    machine = MachineLook(
        host="host-n1",
        cores=2,
        load=9.0,
        memory_left=0.5,
        hogs=hogs,
        processes={look.pid: look for look in looks},
    )
    found = culprits(
        told or live(), alive, NOW_S, {"n1": machine}, nodes or {}, full or {}, errors or []
    )
    return [(c.kind, c.name, c.text) for c in found]


def test_run_that_moves_has_no_culprit() -> None:
    assert judged() == []


def test_stopped_replica_is_named_with_place_and_those_that_wait() -> None:
    ((kind, name, text),) = judged(None, ProcessLook(pid=101, state="stopped"))
    assert (kind, name) == ("actor", "policy-1")
    assert text.startswith("policy-1 (process 101 on host-n2) is stopped (SIGSTOP)")
    assert "5 requests wait for it, the oldest 0:44" in text and "kill -CONT 101" in text


def test_silent_actor_is_named_where_nobody_can_look_at_it() -> None:
    silent = replace(FLEET, actors=[actor("policy-1", "n2", silent_s=30.0), *FLEET.actors[1:]])
    ((kind, name, text),) = judged(live(silent))
    assert (kind, name) == ("actor", "policy-1")
    assert "says nothing for 0:32; 5 requests wait for it" in text


def test_sandbox_whose_supervisor_is_stopped_hangs_on_it() -> None:
    look = ProcessLook(pid=103, state="sleeping", stopped=["sandbox supervisor (9)"])
    ((kind, name, text),) = judged(None, look)
    assert (kind, name) == ("actor", "sandbox-3")
    assert "hangs on sandbox supervisor (9), stopped (SIGSTOP)" in text


def test_starved_sandbox_is_named_with_who_takes_its_cores() -> None:
    look = ProcessLook(pid=103, state="running", cpu=0.05, delayed=1.9)
    ((kind, name, text),) = judged(None, look, hogs=("burner (5): 1.9 cores",))
    assert (kind, name) == ("starved", "sandbox-3")
    assert "used 0.05 cores and was ready for 1.95" in text
    assert "load 9 on 2 cores, taken by burner (5): 1.9 cores" in text
    # On a busy machine the one that gets least comes first.
    others = [ProcessLook(pid=pid, state="running", cpu=0.3, delayed=1.5) for pid in (101, 102)]
    assert judged(None, *others, look)[0][1] == "sandbox-3"
    # One that has a core, or nothing to do, is not starved.
    assert judged(None, replace(look, cpu=1.0)) == []
    idle = replace(FLEET, actors=[actor("sandbox-3", open=0)])
    assert judged(live(idle), look) == []


def test_actor_that_has_work_and_finishes_nothing_is_slow() -> None:
    slow = replace(FLEET, actors=[actor("policy-2", open=8, still_s=60.0)])
    assert [found[:2] for found in judged(live(slow))] == [("slow", "policy-2")]
    # A worker stands still because it waits for others.
    waiting = replace(FLEET, actors=[actor("worker-4", open=8, still_s=60.0)])
    assert judged(live(waiting)) == []


def test_node_that_went_is_named_with_what_was_on_it() -> None:
    short = "1 of 2 policy replicas serve; 1 waits for a place"
    lost = LossAccount(
        name="policy-0", pool="policy", host="host-n9", node="n9", reason="died", ago_s=30.0
    )
    gone = NodeAccount(node="n9", host="host-n9", state="gone", for_s=28.0, reason="no heartbeat")
    fleet = replace(FLEET, losses=[lost], nodes=[gone], short=short)
    ((kind, name, text),) = judged(live(fleet))
    assert (kind, name) == ("node", "n9")
    assert text == (
        f"node host-n9 (n9) is gone since 0:30 (no heartbeat); policy-0 were on it; {short}"
    )
    # Everybody who was on it is replaced: it is not missed.
    assert judged(live(replace(fleet, short=""))) == []


def test_node_on_which_nobody_answers_is_blamed_and_not_its_actors() -> None:
    two = [actor("policy-1", "n2", silent_s=9.0), actor("sandbox-4", "n2", silent_s=8.0)]
    fleet = replace(FLEET, actors=[*two, actor("policy-2", silent_s=0.3)])
    ((kind, name, text),) = judged(live(fleet))
    assert (kind, name) == ("node", "n2")
    assert "does not answer since 0:10; policy-1, sandbox-4 are on it" in text
    assert [found[:2] for found in judged(live(), nodes={"n1": True, "n2": False})] == [
        ("node", "n2")
    ]


def test_full_disk_is_named_before_all_that_waits_for_it() -> None:
    stuck = replace(
        FLEET, parts=[PartAccount(part="commit", waits_on="the store", open=3, for_s=9)]
    )
    found = judged(live(stuck), full={"/mnt/run": "0.0 of 4 MiB left"})
    assert [each[:2] for each in found] == [("disk", "/mnt/run")]
    told = LogLine(
        unix_s=NOW_S - 9,
        level="WARNING",
        process="worker-0",
        logger="x",
        text="commit: [Errno 28] No space left on device",
    )
    ((kind, _, text),) = judged(live(), errors=[told])
    assert kind == "disk" and "not as seen from here: worker-0: commit" in text


def test_store_that_takes_no_commit_is_named_with_its_error() -> None:
    stuck = replace(
        FLEET, parts=[PartAccount(part="commit", waits_on="the store", open=3, for_s=9)]
    )
    progress = replace(live().progress, last_error="AccessDenied")
    ((kind, _, text),) = judged(live(stuck, progress=progress))
    assert kind == "store" and "3 finished shards wait" in text and "AccessDenied" in text


@pytest.mark.parametrize(
    ("look", "text"),
    [
        (None, "cannot be looked at from here"),
        (ProcessLook(pid=77, state="gone"), "is dead, last heard of 1:40 ago; start its command"),
        (ProcessLook(pid=77, state="stopped"), "is stopped (SIGSTOP)"),
        (ProcessLook(pid=77, state="sleeping"), "lives (sleeping), but told nothing for 1:40"),
    ],
)
def test_driver_that_tells_nothing_is_the_culprit(look: ProcessLook | None, text: str) -> None:
    told = live(time_unix_s=NOW_S - 100)
    ((kind, _, said),) = judged(told, *([look] if look else []), alive=False)
    assert kind == "driver" and text in said


def test_driver_whose_event_loop_stands_still_is_named_before_those_it_does_not_hear() -> None:
    deaf = replace(FLEET, loop_still_s=30.0, actors=[actor("policy-2", silent_s=31.0)])
    found = judged(live(deaf), ProcessLook(pid=77, state="running"))
    assert [each[:2] for each in found] == [("driver", "driver"), ("actor", "policy-2")]
    assert "its event loop stands still for 0:30" in found[0][2]


def test_driver_that_could_not_write_is_not_called_dead() -> None:
    look = ProcessLook(pid=77, state="sleeping")
    told = live(time_unix_s=NOW_S - 100)
    found = judged(told, look, alive=False, full={"/r": "0.0 of 4 MiB left"})
    assert [each[0] for each in found] == ["disk", "driver"]
    assert "lives (sleeping), but could not write its account for 1:40" in found[1][2]


def test_stage_that_stands_still_is_told_even_without_a_fleet() -> None:
    fit = Snapshot(stage="train ppm", label="train ppm", done=3, total=9, stage_still_s=118.0)
    assert judged(live(None, progress=fit)) == []
    ((kind, name, text),) = judged(live(None, progress=replace(fit, stage_still_s=600.0)))
    assert (kind, name) == ("stage", "driver")
    assert text.startswith("train ppm has not moved for 10:02")


def test_run_that_ended_says_how() -> None:
    failed = live(state="failed", error="no such model", time_unix_s=NOW_S - 60)
    assert judged(failed, alive=False)[0][2] == "the run failed 1:00 ago: no such model"


# ------------------------------------------------------------------------------- the look


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process of a run that sleeps in a function of its own."""
    code = (
        "import sys, time\n"
        "from cluster.telemetry.process import tell_stacks\n"
        "def here_it_hangs():\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
        "tell_stacks()\n"
        "here_it_hangs()\n"
    )
    root = Path(__file__).parents[4]
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert started.stdout is not None and started.stdout.readline() == "up\n"
    yield started
    started.kill()
    started.wait()


def test_stack_is_its_own_where_py_spy_is_not_there(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_spied", lambda pid: ("", "py-spy is not installed"))
    for _ in range(2):  # the second is not the first again
        look = MachineLook.from_json(look_at([child.pid])).processes[child.pid]
        assert look.state == "sleeping" and look.no_stack == ""
        assert look.stack.count("here_it_hangs") == 1
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(0.1)
    look = MachineLook.from_json(look_at([child.pid])).processes[child.pid]
    assert (look.state, look.stack) == ("stopped", "")
    assert look.no_stack == "py-spy is not installed; a stopped process tells none itself"


@pytest.mark.skipif(not probe.spy(), reason="py-spy is not installed")
def test_py_spy_shows_the_stack_even_of_a_stopped_process(child: subprocess.Popen[str]) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(0.1)
    look = MachineLook.from_json(look_at([child.pid])).processes[child.pid]
    assert look.state == "stopped" and "here_it_hangs" in look.stack
    assert Path(f"/proc/{child.pid}/status").read_text().count("T (stopped)") == 1


def test_process_that_is_none_of_a_run_is_sent_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_spied", lambda pid: ("", "py-spy is not installed"))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        time.sleep(0.3)
        look = MachineLook.from_json(look_at([other.pid])).processes[other.pid]
        assert "no process of a run" in look.no_stack and other.poll() is None
    finally:
        other.kill()
        other.wait()
    gone = MachineLook.from_json(look_at([other.pid])).processes[other.pid]
    assert (gone.state, gone.no_stack) == ("gone", "the process is gone")


def test_stopped_children_and_lack_of_cpu_are_seen() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        look = MachineLook.from_json(look_at([parent.pid])).processes[parent.pid]
        assert look.cpu + look.delayed > 0.5 and look.stopped == []
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        look = MachineLook.from_json(look_at([parent.pid])).processes[parent.pid]
        assert look.cpu < 0.1 and len(look.stopped) == 1 and str(pid) in look.stopped[0]
    finally:
        os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.wait()


def test_disk_with_room_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert how_full(tmp_path) == ""
    assert "cannot be looked at" in how_full(tmp_path / "none")
    real = os.statvfs(tmp_path)
    fields = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    monkeypatch.setattr(os, "statvfs", lambda _: type("Disk", (), {**fields, "f_bavail": 0}))
    assert how_full(tmp_path).startswith("0.0 of ")


# ------------------------------------------------------------------------------- the screen


def write_run(root: Path, told: Live) -> None:
    root.mkdir()
    (root / "config.yaml").write_text("name: demo\n", encoding="utf-8")
    (root / LIVE_FILE).write_text(json.dumps(asdict(told)), encoding="utf-8")


def shown(why: Why) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(why_view(why))
    return console.export_text()


def test_account_is_read_back_as_it_was(tmp_path: Path) -> None:
    write_run(tmp_path / "run", live())
    assert read_live(RunStore(tmp_path / "run")) == live()
    old = {k: v for k, v in asdict(live()).items() if k != "fleet"}
    (tmp_path / "run" / LIVE_FILE).write_text(json.dumps(old), encoding="utf-8")
    told = read_live(RunStore(tmp_path / "run"))
    assert told is not None and told.fleet is None


def test_screen_says_who_waits_for_whom_and_since_when_without_ray(tmp_path: Path) -> None:
    stuck = [actor("policy-1", "n2", open=8, still_s=40, silent_s=41), *FLEET.actors[1:]]
    part = PartAccount(part="search", waits_on="policy", open=12, for_s=40.0)
    now_s = time.time()
    told = live(replace(FLEET, actors=stuck, parts=[part]), time_unix_s=now_s)
    write_run(tmp_path / "run", told)
    why = read_why(tmp_path / "run", now_s=now_s, offline=True)
    text = shown(why)
    lines = [line.strip() for line in text.splitlines()]
    assert "running, round 1: rollout, 8/40" in " ".join(text.split())
    assert "round 1: rollout: 8 of 40, last change 0:44 ago" in lines
    assert any(line.startswith("why: policy-1 (process 101 on host-n2) says") for line in lines)
    assert "search (12 open) has stood still for 0:40, waits on policy" in lines
    assert "5 requests of worker-0 on policy-1, the oldest for 0:42" in lines
    row = next(line for line in lines if line.startswith("policy replica"))
    assert row.split()[2:9] == ["policy-1", "host-n2", "101", "8", "0:40", "0:41", "ready"]
    assert "Ray at 10.0.0.1:6379: not asked" in lines[-1]


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    now_s = time.time()
    write_run(tmp_path / "run", live(time_unix_s=now_s))
    out = io.StringIO()
    show_why(tmp_path / "run", Console(file=out), as_json=True, offline=True)
    data = json.loads(out.getvalue())
    assert data["culprits"] == [] and data["live"]["fleet"]["waits"][0]["on"] == "policy-1"
    assert data["slowest"].keys() == {"policy", "sandbox"}


def test_replica_that_told_of_no_work_before_it_stopped_is_in_the_table(tmp_path: Path) -> None:
    now_s = time.time()
    idle = replace(FLEET, actors=[actor("policy-1", "n2", still_s=40), actor("policy-2")])
    write_run(tmp_path / "run", live(idle, time_unix_s=now_s))
    slowest = read_why(tmp_path / "run", now_s=now_s, offline=True).slowest
    assert {pool: member.name for pool, member in slowest.items()} == {"policy": "policy-1"}


def test_run_without_an_account_and_one_that_cannot_reach_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("name: demo\n")
    assert "it never started" in shown(read_why(tmp_path / "new", now_s=time.time()))
    monkeypatch.setattr(probe, "RAY_S", 0.2)
    write_run(tmp_path / "run", live(time_unix_s=time.time()))
    why = read_why(tmp_path / "run", now_s=time.time())
    assert why.ray.startswith("Ray at 10.0.0.1:6379: it did not answer within 0 s; the account")
    assert why.culprits == []
