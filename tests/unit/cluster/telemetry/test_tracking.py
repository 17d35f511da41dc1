from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder
from cluster.telemetry.trackers import Point, check_trackers, flatten
from cluster.telemetry.tracking import (
    LONGEST_PAUSE_S,
    LOOK_S,
    TABLE,
    Follower,
    Following,
    links,
    track,
)
from cluster.watch.status import read_status
from cluster.watch.status_view import status_view
from tests.trackers import add_round, add_steps, live, make_run


class Server:
    """What a tracker was told, over all of its clients; it fails as long as `down` says why."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.files: list[str] = []
        self.contents: dict[str, bytes] = {}
        self.opened: list[tuple[str, str, Mapping[str, Any]]] = []
        self.states: list[str] = []
        self.down = ""

    def open(
        self, name: str, folder: RunFolder, run_id: str, title: str, config: Mapping[str, Any]
    ) -> Server:
        self._check()
        self.opened.append((run_id, title, config))
        return self

    link = "http://tracker/1"

    def log(self, points: Sequence[Point]) -> None:
        self._check()
        self.points += points

    def file(self, name: str, data: bytes) -> None:
        self._check()
        self.files.append(name)
        self.contents[name] = data

    def flush(self) -> None:
        self._check()

    def close(self, state: str) -> None:
        self.states.append(state)

    def _check(self) -> None:
        if self.down:
            raise OSError(self.down)

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(p.step, p.values[name]) for p in self.points if name in p.values]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def follower(folder: RunFolder, server: Server, told: list[str] | None = None) -> Follower:
    tell = [].append if told is None else told.append
    return Follower(folder, ["mlflow"], tell, opener=server.open, clock=Clock())


def test_what_a_run_wrote_is_told_once(tmp_path: Path) -> None:
    folder, server, told = make_run(tmp_path / "run"), Server(), []
    follows = follower(folder, server, told)
    assert follows.turn()
    add_steps(folder, "policy", 0, range(1, 4))
    assert follows.turn() and follows.turn()
    add_steps(folder, "policy", 0, range(4, 6), loss=0.5)
    add_round(folder, 1, right=3)
    folder.write_bytes("report.html", b"<p>")
    assert follows.turn() and follows.turn()
    assert server.curve("policy/loss") == [(1, 1), (2, 1), (3, 1), (4, 0.5), (5, 0.5)]
    assert server.curve("rollout/totals/trees") == [(1, 36)]
    assert server.curve("rollout/seconds") == [(1, 12.5)]
    assert server.curve("held_out/greedy/gsm") == [(1, 0.75)]
    assert server.curve("ruler/rankings/ppm/mean") == [(1, 0.6)]
    assert sorted(server.files) == ["config.yaml", "report.html", TABLE]
    (row,) = csv.DictReader(io.StringIO(server.contents[TABLE].decode()))
    assert (row["round"], row["held_out/greedy/all"]) == ("1", "0.75")
    ((run_id, title, config),) = server.opened
    assert (run_id, title) == (folder.store.identify(), "demo (run)")
    assert config["search"]["top_p"] == 0.9
    assert told == ["mlflow: http://tracker/1"]


def test_steps_are_counted_through_the_rounds(tmp_path: Path) -> None:
    folder, server = make_run(tmp_path), Server()
    add_steps(folder, "policy", 0, range(1, 4))
    add_steps(folder, "policy", 2, range(1, 3))
    add_steps(folder, "ppm", 2, range(1, 2))
    assert follower(folder, server).turn()
    assert [step for step, _ in server.curve("policy/loss")] == [1, 2, 3, 4, 5]
    assert server.curve("policy/round") == [(1, 0), (2, 0), (3, 0), (4, 2), (5, 2)]
    assert [step for step, _ in server.curve("ppm/loss")] == [1]


def test_another_start_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    folder, server, told = make_run(tmp_path), Server(), []
    add_steps(folder, "policy", 1, range(1, 4))
    add_round(folder, 1, right=1)
    follower(folder, server).turn()
    add_steps(folder, "policy", 2, range(1, 3))
    again = follower(folder, server, told)
    assert again.turn()
    again.close("finished")
    assert [step for step, _ in server.curve("policy/loss")] == [1, 2, 3, 4, 5]
    assert len(server.curve("held_out/greedy/all")) == 1
    assert server.files.count("config.yaml") == 1
    assert {run_id for run_id, _, _ in server.opened} == {folder.store.identify()}
    assert server.states == ["finished"]
    assert told == [], "its link is known"


def test_a_fit_that_began_again_tells_only_what_is_new(tmp_path: Path) -> None:
    folder, server = make_run(tmp_path), Server()
    add_steps(folder, "ppm", 1, range(1, 9))
    follows = follower(folder, server)
    follows.turn()
    folder.write_bytes("checkpoints/round=1/ppm/metrics.jsonl", b"")
    add_steps(folder, "ppm", 1, range(1, 11), loss=2.0)
    follows.turn()
    assert [step for step, _ in server.curve("ppm/loss")] == list(range(1, 11))


def test_a_line_that_is_cut_off_waits(tmp_path: Path) -> None:
    folder, server = make_run(tmp_path), Server()
    add_steps(folder, "ppm", 1, range(1, 3))
    name = "checkpoints/round=1/ppm/metrics.jsonl"
    whole = folder.read_bytes(name) or b""
    follows = follower(folder, server)
    folder.write_bytes(name, whole[:-5])
    follows.turn()
    assert [step for step, _ in server.curve("ppm/loss")] == [1]
    folder.write_bytes(name, whole)
    follows.turn()
    assert [step for step, _ in server.curve("ppm/loss")] == [1, 2]


def test_a_tracker_that_fails_is_warned_of_once_and_told_later_what_it_missed(
    tmp_path: Path,
) -> None:
    folder, down, up, told = make_run(tmp_path), Server(), Server(), []
    clock = Clock()

    def opener(name: str, *rest: Any) -> Server:
        return (down if name == "mlflow" else up).open(name, *rest)

    follows = Follower(folder, ["mlflow", "wandb"], told.append, opener=opener, clock=clock)
    add_steps(folder, "policy", 1, range(1, 3))
    assert follows.turn()
    down.down = "connection refused\nand a long story"
    add_steps(folder, "policy", 1, range(3, 5))
    for _ in range(40):
        assert not follows.turn()
        clock.now_s += LOOK_S
    warnings = [line for line in told if "not told" in line]
    why = "connection refused; tried again, the run goes on"
    assert warnings == [f"mlflow is not told of the run: {why}"]
    assert [step for step, _ in up.curve("policy/loss")] == [1, 2, 3, 4]
    assert links(folder)["mlflow"] == {"link": "http://tracker/1", "error": "connection refused"}
    down.down = ""
    clock.now_s += LONGEST_PAUSE_S
    assert follows.turn()
    assert [step for step, _ in down.curve("policy/loss")] == [1, 2, 3, 4]
    assert told[-1] == "mlflow: told again, and all that it missed"
    assert links(folder)["mlflow"]["error"] == ""


def test_tries_of_a_tracker_that_fails_become_rare_and_the_last_one_is_not_left_out(
    tmp_path: Path,
) -> None:
    tries: list[float] = []
    clock = Clock()

    def opener(*given: Any) -> Server:
        tries.append(clock.now_s)
        raise OSError("down")

    follows = Follower(make_run(tmp_path), ["mlflow"], [].append, opener=opener, clock=clock)
    while clock.now_s < 2000:
        follows.turn()
        clock.now_s += LOOK_S
    pauses = [b - a for a, b in pairwise(tries)]
    assert pauses == [15, 30, 60, 120, 240, 480, 600]
    follows.turn(last=True)
    assert len(tries) == len(pauses) + 2


def test_status_shows_where_a_run_is_tracked_and_what_went_wrong(tmp_path: Path) -> None:
    folder, server = make_run(tmp_path / "run"), Server()
    follows = follower(folder, server)
    follows.turn()
    server.down = "certificate expired"
    folder.write_bytes("report.html", b"<p>")
    follows.turn()
    status = read_status(folder.root, now_unix_s=time.time())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_view(status))
    shown = console.export_text()
    assert "tracked: http://tracker/1" in shown
    assert "mlflow was not told last: certificate expired" in shown


def test_numbers_of_a_record_are_found_at_any_depth() -> None:
    record = {"a": {"b": 1, "c": "x", "d": [1]}, "e": True, "f": None, "g": float("nan")}
    assert flatten(record, "s") == {"s/a/b": 1.0, "s/e": 1.0}
    assert flatten({"a": {"b": [1]}, "c": None}, numbers=False) == {"a.b": "[1]", "c": "None"}


def test_a_tracker_that_is_not_installed_is_an_error_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else 1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"wandb is not installed here: pip install 'rstar-"):
        Following(make_run(tmp_path), ["wandb"], print).start()
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI=http"):
        check_trackers(["mlflow"])
    with pytest.raises(ConfigError, match="no tracker 'mlfow'; there are tensorboard, mlflow, w"):
        check_trackers(["mlfow"])


def test_a_run_that_goes_on_is_told_by_its_driver_only(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with pytest.raises(ConfigError, match="its config names no tracker; give --to"):
        track(folder, [], print)
    live(folder, "running")
    folder.write("live.json", {**(folder.read("live.json") or {}), "time_unix_s": time.time()})
    with pytest.raises(ConfigError, match="its driver runs"):
        track(folder, ["tensorboard"], print)
