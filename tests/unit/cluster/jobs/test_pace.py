"""How long a request may take."""

from __future__ import annotations

import pytest

from cluster.jobs.pace import FIRST_S_PER_TOKEN, MIN_LIMIT_S, Pace, limit_s

L40S_S_PER_TOKEN = 256 / 1500
"""256 sequences of a 7B model at 1,500 tokens/s."""


def test_nothing_is_known_before_the_first_token() -> None:
    pace = Pace()
    pace.observe(tokens=0, seconds=3.0)
    assert pace.s_per_token is None


def test_a_full_length_step_on_a_slow_card_is_waited_for_from_the_start_and_later() -> None:
    step_s = 2048 * L40S_S_PER_TOKEN
    assert step_s > MIN_LIMIT_S
    assert limit_s(2048, FIRST_S_PER_TOKEN) > 2 * step_s
    pace = Pace()
    for _ in range(20):
        pace.observe(tokens=100, seconds=100 * L40S_S_PER_TOKEN)
    assert pace.s_per_token is not None
    assert limit_s(2048, pace.s_per_token) == pytest.approx(4 * step_s)


def test_short_steps_keep_the_least_limit() -> None:
    assert limit_s(64, 0.1) == MIN_LIMIT_S


def test_a_replica_that_became_slower_than_the_margin_is_given_more_each_time() -> None:
    pace = Pace()
    for _ in range(200):
        pace.observe(tokens=100, seconds=100.0)
    tries = 0
    assert pace.s_per_token is not None
    while (limit := limit_s(2048, pace.s_per_token)) < 2048 * 10.0:  # ten times slower now
        pace.observe(tokens=2048, seconds=limit)
        tries += 1
        assert tries < 10
    assert tries > 0


def test_the_pace_follows_the_last_answers() -> None:
    pace = Pace()
    for seconds in (100.0, 10.0):
        for _ in range(200):
            pace.observe(tokens=100, seconds=seconds)
    assert pace.s_per_token == pytest.approx(0.1, rel=0.2)
