"""The supervisor: budgets, eviction, replay, recovery from lost parts, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verifier import fork_tree
from verifier.sandbox import Sandbox, SandboxError, SandboxLimits


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out waiting"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def small():
    """Four live processes per tree, six in all."""
    limits = SandboxLimits(wall_s=20.0, live_states_per_tree=4, live_states=6)
    with Sandbox(limits=limits) as sandbox:
        yield sandbox


def test_budget_evicts_least_recently_used_leaves_and_replay_brings_them_back(small):
    root = small.open("budget")
    states = [small.run(root, [f"x = {n}\nprint(x)"])[0].state for n in range(8)]
    stats = small.stats()
    assert stats["live_processes"] <= 4
    assert stats["evictions"] >= 5
    newest = small.run(states[7], ["print(x)"])[0]
    oldest = small.run(states[0], ["print(x)"])[0]
    assert (newest.stdout, newest.replayed) == ("7\n", 0)
    assert (oldest.stdout, oldest.replayed) == ("0\n", 1)
    small.close("budget")


def test_deep_path_works_with_fewer_processes_than_steps(small):
    state = small.open("deep")
    for depth in range(12):
        result = small.run(state, [f"d{depth} = {depth}\nprint(sum(range({depth} + 1)))"])[0]
        state = result.state
    names = ", ".join(f"d{depth}" for depth in range(12))
    assert small.run(state, [f"print({names})"])[0].stdout == " ".join(map(str, range(12))) + "\n"
    assert small.stats()["live_processes"] <= 4
    small.close("deep")


def test_pool_budget_holds_over_several_trees(small):
    roots = {name: small.open(name) for name in ("a", "b", "c")}
    for step in range(3):
        for name, root in roots.items():
            printed = small.run(root, [f"y = '{name}{step}'\nprint(y)"])[0].stdout
            assert printed == f"{name}{step}\n"
    assert small.stats()["live_processes"] <= 6
    for name in roots:
        small.close(name)
    assert small.stats()["states"] == 0


def test_wide_call_with_small_budget_answers_every_sibling(small):
    root = small.open("wide")
    results = small.run(root, [f"print({n})" for n in range(30)])
    assert [r.stdout for r in results] == [f"{n}\n" for n in range(30)]
    small.close("wide")


def test_close_answers_steps_in_flight_and_kills_them(small):
    root = small.open("closing")
    pending = small._run(root, ["import time\ntime.sleep(60)"], None)
    _wait_until(lambda: small.stats()["running"] == 1)
    small.close("closing")
    result = pending.result(10)["results"][0]
    assert (result["status"], result["error_type"]) == ("infra_error", "Closed")
    _wait_until(lambda: len(_children(small.stats()["supervisor_pid"])) == 1)


def test_no_step_outlives_a_tree_that_is_closed_while_it_is_forked(small):
    supervisor = small.stats()["supervisor_pid"]
    for number in range(40):
        root = small.open(f"closing-{number}")
        pending = small._run(root, ["import time\ntime.sleep(60)"], None)
        while small.stats()["running"] != 1:  # at once, so that its first word is unread sometimes
            pass
        small.close(f"closing-{number}")
        assert pending.result(10)["results"][0]["error_type"] == "Closed"
    _wait_until(lambda: len(_children(supervisor)) == 1, timeout_s=20.0)


def test_zygote_killed_from_outside_is_replaced(small):
    root = small.open("before")
    state = small.run(root, ["x = 3\nprint(x)"])[0].state
    supervisor = small.stats()["supervisor_pid"]
    zygote = min(_children(supervisor))
    os.kill(zygote, signal.SIGKILL)
    other = small.open("after")
    assert small.run(other, ["print(1)"])[0].stdout == "1\n"
    assert small.run(state, ["print(x)"])[0].stdout == "3\n"
    assert small.stats()["zygote_deaths"] == 1
    small.close("before")
    small.close("after")


def test_supervisor_killed_mid_flight_loses_no_request_and_no_state(small):
    root = small.open("survivor")
    first = small.run(root, ["import random\nrandom.seed(1)\nx = 5\nprint(x)"])[0]
    second = small.run(first.state, ["y = x + random.randint(0, 9)\nprint(y)"])[0]
    supervisor = small.stats()["supervisor_pid"]
    processes = [supervisor, *_children(supervisor)]
    pending = small._run(second.state, ["import time\ntime.sleep(0.5)\nprint(x, y)"], None)
    _wait_until(lambda: small.stats()["running"] == 1)
    os.kill(supervisor, signal.SIGKILL)
    answer = pending.result(60)["results"][0]
    assert (answer["status"], answer["stdout"]) == ("ok", f"5 {second.stdout}")
    assert answer["attempts"] == 2
    assert small.run(first.state, ["print(x)"])[0].stdout == "5\n"
    _wait_until(lambda: not any(_alive(pid) for pid in processes))
    assert small.stats()["restarts"] == 1
    small.close("survivor")


def test_descriptors_and_processes_return_to_their_number(small):
    small.open("warm")
    small.close("warm")
    supervisor = small.stats()["supervisor_pid"]
    _wait_until(lambda: len(_children(supervisor)) == 1)
    before = small.stats()
    for round_number in range(5):
        root = small.open(f"leak-{round_number}")
        codes = [
            "print(1)",
            "1/0",
            "import os\nos._exit(1)",
            "import os\nos.close(63)\nos._exit(2)",
        ]
        state = small.run(root, codes)[0].state
        small.evict(state)
        small.run(state, ["x = 1"])
        small.close(f"leak-{round_number}")
    _wait_until(lambda: len(_children(supervisor)) == 1)
    _wait_until(lambda: small.stats()["descriptors"] <= before["descriptors"])
    after = small.stats()
    assert after["live_processes"] == after["states"] == after["queued"] == 0
    assert not any(not _alive(pid) for pid in _children(supervisor)), "a zombie is left"


@pytest.mark.parametrize("layer", ["landlock", "seccomp", "fork_supervision"])
def test_strict_refuses_to_start_without_a_required_layer(layer):
    with pytest.raises(SandboxError, match=f"missing isolation layers: .*{layer}"):
        Sandbox(isolation="strict", withheld_layers=[layer])


def test_best_effort_starts_without_layers_says_so_and_still_finds_strangers(caplog):
    withheld = ["fork_supervision", "landlock", "namespaces"]
    with Sandbox(SandboxLimits(wall_s=20.0), "best_effort", withheld_layers=withheld) as sandbox:
        capabilities = sandbox.capabilities()
        assert not capabilities["complete"]
        assert capabilities["layers"]["landlock"].startswith("off")
        assert capabilities["layers"]["fork_supervision"].startswith("off")
        assert {"landlock", "fork_supervision"} <= {
            word for record in caplog.records for word in record.getMessage().split("layer=")
        }
        root = sandbox.open("p")
        from verifier import isolation

        stranger = (
            "import ctypes\nlibc = ctypes.CDLL(None)\ncell = ctypes.c_int()\n"
            f"r = libc.syscall(56, {isolation.FORK_FLAGS}, 0, 0, ctypes.addressof(cell), 0)\n"
            "if r == 0:\n    while True: pass\nprint(r)"
        )
        result = sandbox.run(root, [stranger])[0]
        if result.status == "ok":
            _wait_until(lambda: not _alive(int(result.stdout)))
        assert sandbox.run(root, ["import os\nos.fork()"])[0].status == "denied"
        assert sandbox.run(root, ["open('/etc/passwd', 'a')"])[0].status == "denied"
        assert sandbox.run(root, ["print(1)"])[0].stdout == "1\n"


def test_everything_ends_with_its_client_even_when_that_is_killed():
    script = (
        "import sys, time\nfrom verifier.sandbox import Sandbox\n"
        "s = Sandbox()\nr = s.open('p')\ns.run(r, ['x = 1'])\n"
        "print(s.stats()['supervisor_pid'], flush=True)\n"
        "s.run(r, ['import time\\ntime.sleep(9)'])\n"
    )
    repository = Path(fork_tree.__file__).resolve().parent.parent
    client = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=repository
    )
    assert client.stdout is not None
    supervisor = int(client.stdout.readline())
    processes = [supervisor, *_children(supervisor)]
    assert len(processes) >= 4
    client.kill()
    client.wait()
    client.stdout.close()
    try:
        _wait_until(lambda: not any(_alive(pid) for pid in processes))
    except AssertionError:
        for pid in filter(_alive, processes):  # what it is and waits for, with the failure
            print(*(Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "wchan")))
        raise


def test_shutdown_leaves_no_process():
    sandbox = Sandbox()
    root = sandbox.open("p")
    sandbox.run(root, ["x = 1"])
    supervisor = sandbox.stats()["supervisor_pid"]
    processes = [supervisor, *_children(supervisor)]
    sandbox.shutdown()
    assert not any(_alive(pid) for pid in processes)
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(supervisor, os.WNOHANG) == (0, 0)
