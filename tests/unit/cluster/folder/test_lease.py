from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.folder.lease import LeaseHeldError, RunLease
from rollout.run_store import RunStore

FAST = {"renew_s": 0.02, "expires_s": 0.2}


def hold(store: RunStore, number: int = 1, **more: Any) -> dict[str, Any]:
    """Write the lease of a process of another machine."""
    holder = {
        "owner": f"o{number}",
        "host": "elsewhere",
        "machine": "another boot",
        "pid": 7,
        "begun": "1",
        **more,
    }
    store.put(f"drivers/{number:05d}.json", json.dumps(holder).encode())
    return holder


def test_released_lease_is_the_next_drivers_at_once(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for number in (1, 2, 3):
        lease = RunLease(store)
        lease.take()
        assert store.files("drivers")[-1] == f"drivers/{number:05d}.json"
        lease.release()


def test_second_driver_is_told_who_holds_the_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first = RunLease(store)
    first.take()
    own = json.loads(store.read("drivers/00001.json"))
    with pytest.raises(LeaseHeldError, match=f"^process {own['pid']} on {own['host']}$"):
        RunLease(store).take()
    first.release()


def test_killed_driver_of_this_machine_is_known_to_be_gone(tmp_path: Path) -> None:
    code = (
        "import os, sys; from cluster.folder.lease import RunLease; "
        "from rollout.run_store import RunStore; "
        "RunLease(RunStore(sys.argv[1])).take(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    store = RunStore(tmp_path)
    assert json.loads(store.read("drivers/00001.json"))["released"] is False
    lease = RunLease(store, expires_s=1e6)  # not by its age
    lease.take()
    lease.release()


def test_number_of_a_process_that_came_again_is_another_process(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first = RunLease(store)
    first.take()
    own = json.loads(store.read("drivers/00001.json"))
    first.release()
    hold(store, **own | {"begun": "1", "released": False})
    lease = RunLease(store, expires_s=1e6)
    lease.take()
    lease.release()


def test_lease_of_another_machine_is_taken_once_it_stood_still(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    hold(store)
    began_s = time.monotonic()
    lease = RunLease(store, **FAST)
    lease.take()
    assert time.monotonic() - began_s >= 0.2
    lease.release()


def test_lease_that_another_machine_renews_is_held(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    hold(store)
    renewal = threading.Timer(0.05, lambda: hold(store, count=1))
    renewal.start()
    with pytest.raises(LeaseHeldError, match="process 7 on elsewhere"):
        RunLease(store, renew_s=0.02, expires_s=1e6).take()
    renewal.join()


def test_of_two_that_find_it_free_one_gets_it(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    hold(store, released=True)
    barrier = threading.Barrier(8)
    got: list[RunLease] = []

    def take() -> None:
        lease = RunLease(RunStore(tmp_path))
        barrier.wait()
        try:
            lease.take()
        except LeaseHeldError:
            return
        got.append(lease)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_answer_to_the_first_try_that_was_lost_does_not_lose_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = RunStore.create
    monkeypatch.setattr(RunStore, "create", lambda *args: create(*args) and False)
    lease = RunLease(RunStore(tmp_path))
    lease.take()
    lease.release()


def test_holder_whose_lease_was_taken_hears_of_it_and_keeps_it_as_it_is(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    told = threading.Event()
    lease = RunLease(store, lost=told.set, **FAST)
    lease.take()
    hold(store, 2)
    assert told.wait(10)
    lease.release()
    assert lease.taken_by is not None and lease.taken_by.host == "elsewhere"
    assert json.loads(store.read("drivers/00001.json"))["released"] is False
