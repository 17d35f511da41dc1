from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.progress import Eta, ProgressView, duration


def test_stage_seen_before_is_expected_to_take_as_long_again() -> None:
    eta = Eta()
    eta.finished("rollout", 60.0)
    assert eta.expected("rollout") == 60.0


def test_unseen_stage_is_expected_by_its_weight() -> None:
    eta = Eta()
    eta.finished("rollout", 100.0)  # weight 10, so one unit is 10 s
    assert eta.expected("train policy") == pytest.approx(40.0)


def test_nothing_is_promised_before_anything_was_measured() -> None:
    assert Eta().remaining("start", 1.0, 0.0, ["rollout"]) is None


def test_time_left_is_the_rest_of_the_stage_and_the_stages_after_it() -> None:
    eta = Eta()
    eta.finished("rollout", 100.0)
    # a quarter of the stage took 10 s, so 30 s are left, then a rollout
    assert eta.remaining("evaluate", 10.0, 0.25, ["rollout"]) == pytest.approx(130.0)


def test_without_a_terminal_plain_lines_are_printed_now_and_then() -> None:
    output = io.StringIO()
    now = [0.0]
    view = ProgressView(Console(file=output, width=200), clock=lambda: now[0])
    with view:
        view.plan = ["rollout"]
        view.begin("rollout", "round 1: rollout", 10)
        for done in range(1, 11):
            now[0] += 10.0
            view.update(done, 10, {"tokens/s": "5"})
        view.end("10 trees")
    lines = output.getvalue().splitlines()
    assert lines[0] == "[0:00] round 1: rollout"
    assert lines[1] == "[0:20] round 1: rollout 2/10 (tokens/s 5); run ETA 1:20"
    assert lines[-1] == "[1:40] round 1: rollout: 10 trees (100 s)"
    assert len(lines) == 7


def test_durations_read_like_clocks() -> None:
    assert [duration(s) for s in (0, 59.9, 61, 3661)] == ["0:00", "0:59", "1:01", "1:01:01"]
