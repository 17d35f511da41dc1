from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from cluster.telemetry.live import STALE_S, LiveFile, Snapshot, read_live
from rollout.run_store import RunStore


def snapshot() -> Snapshot:
    return Snapshot(stage="rollout", label="round 1: rollout", done=3, total=9)


def test_account_says_who_runs_and_where_it_stands(tmp_path: Path) -> None:
    with LiveFile(RunStore(tmp_path), snapshot):
        live = read_live(RunStore(tmp_path))
    assert live is not None
    assert live.state == "running"
    assert live.progress == snapshot()
    assert live.fresh(time.time())
    assert not live.fresh(time.time() + 2 * STALE_S)


def test_account_is_written_again_and_again(tmp_path: Path) -> None:
    done = [0]
    with LiveFile(RunStore(tmp_path), lambda: Snapshot(done=done[0]), interval_s=0.01):
        done[0] = 5
        deadline_s = time.monotonic() + 10
        while (live := read_live(RunStore(tmp_path))) is None or live.progress.done != 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (None, "finished", ""),
        (ValueError("no such model"), "failed", "no such model"),
        (ExceptionGroup("several", [ValueError("deep")]), "failed", "deep"),
        (asyncio.CancelledError(), "stopped", ""),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_last_account_says_how_it_ended(
    tmp_path: Path, error: BaseException | None, state: str, text: str
) -> None:
    try:
        with LiveFile(RunStore(tmp_path), snapshot):
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    live = read_live(RunStore(tmp_path))
    assert live is not None
    assert (live.state, live.error) == (state, text)


def test_seconds_of_earlier_starts_are_counted_on_even_after_a_kill(tmp_path: Path) -> None:
    now = [100.0]
    killed = LiveFile(RunStore(tmp_path), snapshot, clock=lambda: now[0])
    killed.__enter__()
    now[0] += 50.0
    killed._write()  # the last account before the kill
    killed._ended.set()
    now[0] += 1000.0
    with LiveFile(RunStore(tmp_path), snapshot, clock=lambda: now[0]) as again:
        assert again.seconds_before == 50.0
        now[0] += 7.0
        assert again.seconds_total == 57.0


def test_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with LiveFile(RunStore(tmp_path), snapshot):
        pass
    assert read_live(RunStore(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"}', '{"progress": 3}'])
def test_account_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "live.json").write_text(text, encoding="utf-8")
    assert read_live(RunStore(tmp_path)) is None


def test_account_is_plain_json(tmp_path: Path) -> None:
    with LiveFile(RunStore(tmp_path), snapshot):
        pass
    data = json.loads((tmp_path / "live.json").read_text(encoding="utf-8"))
    assert data["progress"]["label"] == "round 1: rollout"
    assert not list(tmp_path.glob(".live.json*"))
