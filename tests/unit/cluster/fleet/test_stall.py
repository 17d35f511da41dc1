"""The stall detector at virtual time."""

from __future__ import annotations

import pytest

from cluster.fleet.stall import StallDetector


def test_stage_that_moves_never_stalls() -> None:
    detector = StallDetector(30)
    for second in range(0, 300, 20):
        detector.report("policy", second, done=second, open=5)
        assert detector.stalls(second) == []


def test_stage_with_work_and_without_progress_stalls_after_its_time() -> None:
    detector = StallDetector(30)
    detector.report("policy", 0, done=7, open=5)
    detector.report("policy", 20, done=7, open=6)
    assert detector.stalls(29.9) == []
    (stall,) = detector.stalls(30)
    assert (stall.stage, stall.for_s, stall.open, stall.cause) == ("policy", 30, 6, "policy")
    assert str(stall) == "policy: no progress for 30 s, 6 open"


def test_idle_stage_is_not_stalled_and_its_time_begins_with_work() -> None:
    detector = StallDetector(30)
    detector.report("sandbox", 0, done=7, open=0)
    assert detector.stalls(1000) == []
    detector.report("sandbox", 1000, done=7, open=1)
    assert detector.stalls(1029) == []
    assert len(detector.stalls(1030)) == 1


def test_counter_that_starts_again_is_progress() -> None:
    detector = StallDetector(30)
    detector.report("policy", 0, done=100, open=1)
    detector.report("policy", 25, done=3, open=1)
    assert detector.stalls(40) == []


def test_stage_that_waits_on_a_stalled_one_is_its_victim() -> None:
    detector = StallDetector(30)
    detector.report("rollouts", 0, done=1, open=64, waits_on="search")
    detector.report("search", 0, done=9, open=64, waits_on="policy")
    detector.report("policy", 5, done=1e6, open=256, waits_on="GPU")
    detector.report("sandbox", 5, done=40, open=0)
    first, *others = detector.stalls(45)
    assert str(first) == (
        "policy: no progress for 40 s, 256 open, and no report in that time; waits on GPU; "
        "rollouts, search wait for it"
    )
    assert [stall.stage for stall in others] == ["rollouts", "search"]
    assert {stall.cause for stall in others} == {"policy"}
    assert "waits on search, which hangs on policy" in str(others[0])


def test_waiting_on_something_that_moves_is_the_waiters_own_stall() -> None:
    detector = StallDetector(30)
    detector.report("commit", 0, done=1, open=2, waits_on="store")
    detector.report("store", 0, done=1, open=2)
    detector.report("store", 20, done=2, open=2)
    detector.report("commit", 31, done=1, open=2, waits_on="store")
    (stall,) = detector.stalls(31)
    assert str(stall) == "commit: no progress for 31 s, 2 open; waits on store"


def test_stages_that_wait_on_each_other_are_both_named() -> None:
    detector = StallDetector(30)
    detector.report("a", 0, done=0, open=1, waits_on="b")
    detector.report("b", 0, done=0, open=1, waits_on="a")
    assert {(stall.stage, stall.cause) for stall in detector.stalls(60)} == {("a", "b"), ("b", "a")}


def test_time_without_progress_must_be_positive() -> None:
    with pytest.raises(ValueError, match="after_s must be > 0, got 0"):
        StallDetector(0)
