"""A short soak; the long one is `python -m bench.sandbox --soak 100000`."""

from __future__ import annotations

import pytest

from bench.sandbox import soak


@pytest.mark.slow
def test_many_steps_with_attacks_are_each_answered_once_and_leave_nothing():
    figures = soak("strict", 1200)
    assert sum(figures["soak_answers"].values()) == figures["soak_steps"] >= 1200
    assert figures["soak_wrong_honest_answers"] == 0, figures
    assert figures["soak_leftover_processes"] == 0
    assert figures["soak_descriptor_growth"] <= 0
    assert figures["soak_supervisor_mib_growth"] < 20
    assert figures["soak_restarts"] == 0
