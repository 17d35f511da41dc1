from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from cluster.telemetry.progress import (
    ERROR_FACT,
    LEVELS_FACT,
    SHARE_FACT,
    Eta,
    ProgressView,
    duration,
    fact_text,
    solved_by_level,
)
from rollout.store import Totals


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


def test_stage_of_which_nothing_is_done_has_no_time_left_yet() -> None:
    eta = Eta()
    eta.finished("start", 30.0)
    for elapsed_s in (1.0, 99.0, 600.0):  # by its weight a rollout would take 100 s
        assert eta.of_stage("rollout", elapsed_s, 0.0) is None
        assert eta.remaining("rollout", elapsed_s, 0.0, ["select"]) is None
    assert eta.of_stage("rollout", 600.0, 0.01) == pytest.approx(59_400.0)


def test_stage_like_an_earlier_one_lasts_as_long_until_it_took_longer() -> None:
    eta = Eta()
    eta.finished("rollout", 100.0)
    assert eta.of_stage("rollout", 40.0, 0.0) == pytest.approx(60.0)
    assert eta.of_stage("rollout", 100.0, 0.0) is None
    assert eta.of_stage("rollout", 120.0, 0.04) == pytest.approx(2880.0)


def test_before_its_first_tree_a_stage_is_shown_with_an_unknown_time_left() -> None:
    view, now, output = logged()
    view.plan = ["start", "rollout"]
    view.begin("start", "engines")
    now[0] = 30.0
    view.end()
    view.begin("rollout", "round 1: rollout", 10)
    now[0] = 330.0
    view.update(0, 10, {"open": 4})
    assert (view.snapshot().stage_eta_s, view.snapshot().run_eta_s) == (None, None)
    assert "stage 5:00, ETA unknown; run 5:30, ETA unknown" in output.getvalue()


def logged(width: int = 200) -> tuple[ProgressView, list[float], io.StringIO]:
    """A view without a terminal, its clock, and what it prints."""
    output = io.StringIO()
    now = [0.0]
    console = Console(file=output, width=width)
    view = ProgressView(console, clock=lambda: now[0], wall_clock=lambda: 1_795_276_800 + now[0])
    return view, now, output


def test_without_a_terminal_plain_lines_with_the_time_are_printed_now_and_then() -> None:
    view, now, output = logged()
    with view:
        view.plan = ["rollout"]
        view.begin("rollout", "round 1: rollout", 10)
        for done in range(1, 11):
            now[0] += 10.0
            view.update(done, 10, {"tokens/s": 1234.5, "stage": "base"})
        view.end("10 trees")
    stamps, lines = zip(*[(t[:19], t[20:]) for t in output.getvalue().splitlines()], strict=True)
    assert lines[0] == "round 1: rollout"
    assert lines[1] == (
        "round 1: rollout 2/10 (1,234 tokens/s, stage base); stage 0:20, ETA 1:20; "
        "run 0:20, ETA 1:20"
    )
    assert lines[-1] == "round 1: rollout: 10 trees (100 s)"
    assert len(lines) == 7
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp) for stamp in stamps)
    assert len(set(stamps)) == 6  # the last two are of one moment


def test_cost_is_that_of_all_starts_and_of_what_is_left() -> None:
    view, now, output = logged()
    view.usd_per_hour, view.cost_usd = 36.0, 1.3
    with view:
        view.plan = ["rollout"]
        view.begin("rollout", "rollout", 4)
        now[0] = 30.0
        view.update(1, 4)  # 30 s for a quarter: 90 s left
    assert "$1.30 so far, about $2.20 in all" in output.getvalue()


def drawn(view_width: int = 100) -> tuple[ProgressView, list[float], Console]:
    """A view in a terminal that is recorded."""
    now = [0.0]
    console = Console(
        file=io.StringIO(), width=view_width, force_terminal=True, record=True, color_system=None
    )
    return ProgressView(console, clock=lambda: now[0]), now, console


def test_terminal_shows_round_stage_rates_levels_times_and_cost() -> None:
    view, now, console = drawn()
    view.num_rounds, view.usd_per_hour, view.cost_usd = 4, 2.5, 0.04
    view.plan = ["rollout", "select"]
    view.eta.finished("select", 10.0)
    view.begin("rollout", "round 2: rollout", 600, round=2)
    now[0] = 60.0
    view.update(
        300,
        600,
        {"tokens/s": 3472.1, "open": 64, LEVELS_FACT: "gsm 92/200", ERROR_FACT: "engine gone"},
    )
    console.print(view._render())
    shown = console.export_text()
    for text in (
        "round 2: rollout",
        "300/600  50 %",
        "round 2 of 4:  rollout > select > train policy > train ppm > ruler > evaluate",
        "solved by level: gsm 92/200",
        "3,472 tokens/s   open 64",
        "last error: engine gone",
        "stage 1:00   stage ETA 1:00   run 1:00   run ETA 1:10",
        "$0.04 so far, about $0.09 in all",
    ):
        assert text in shown, shown


def test_last_error_stays_when_the_facts_go_on() -> None:
    view, _, _ = logged()
    view.begin("rollout", "rollout", 2)
    view.update(1, 2, {ERROR_FACT: "engine gone"})
    view.update(2, 2, {"open": 1})
    assert view.snapshot().last_error == "engine gone"


def test_time_left_follows_the_share_of_the_work_where_that_is_told() -> None:
    view, now, _ = logged()
    view.begin("rollout", "rollout", 100)
    now[0] = 60.0
    view.update(100, 100, {SHARE_FACT: 0.25})
    assert view.snapshot().stage_eta_s == pytest.approx(180.0)
    assert view.snapshot().facts == {}
    view.update(50, 100, {"open": 1})
    assert view.snapshot().stage_eta_s == pytest.approx(60.0)


def test_stop_request_says_what_is_done_about_it() -> None:
    view, _, output = logged()
    view.begin("rollout", "rollout", 2)
    view.stop_requested()
    assert "finished trees are committed" in output.getvalue()
    assert view.snapshot().stopping


def test_stages_done_by_an_earlier_start_tell_the_time_left() -> None:
    view, now, _ = logged()
    view.plan = ["rollout", "select", "rollout"]
    view.skip("rollout", 100.0)
    view.skip("select")
    view.begin("rollout", "round 2: rollout", 10)
    now[0] = 40.0
    assert view.snapshot().run_eta_s == pytest.approx(60.0)


def test_solved_trees_are_told_by_level() -> None:
    totals = Totals(
        trees_by_level={"olympiad": 3, "gsm": 1200}, solved_by_level={"gsm": 1100, "olympiad": 1}
    )
    assert solved_by_level(totals) == "gsm 1,100/1,200, olympiad 1/3"


def test_facts_read_like_prose() -> None:
    assert fact_text("tokens/s", 3472.07) == "3,472 tokens/s"
    assert fact_text("loss", 0.318) == "loss 0.318"
    assert fact_text("open", 64) == "open 64"
    assert fact_text("solved", "12 of 40 trees") == "solved 12 of 40 trees"


def test_durations_read_like_clocks() -> None:
    assert [duration(s) for s in (0, 59.9, 61, 3661)] == ["0:00", "0:59", "1:01", "1:01:01"]
    assert duration(14 * 86400 + 3600) == "14 d 1:00:00"
