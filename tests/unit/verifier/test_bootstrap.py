from __future__ import annotations

import pytest

from verifier.bootstrap import bootstrap_difference, bootstrap_mean, bootstrap_ratio


def test_interval_of_a_share_is_about_two_standard_errors_wide() -> None:
    results = [1.0] * 60 + [0.0] * 40
    estimate = bootstrap_mean(results, seed=1)
    # Standard error sqrt(0.6 * 0.4 / 100) = 0.049.
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.02)
    assert estimate.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.02)
    assert estimate.num_problems == 100


def test_nothing_solved_still_has_an_interval_with_a_width() -> None:
    estimate = bootstrap_mean([0.0] * 30)
    assert (estimate.mean, estimate.low) == (0.0, 0.0)
    # Wilson: z^2 / (n + z^2) = 3.84 / 33.84
    assert estimate.high == pytest.approx(0.1135, abs=1e-3)
    assert bootstrap_mean([1.0] * 30).low == pytest.approx(1 - 0.1135, abs=1e-3)


def test_same_seed_gives_the_same_interval() -> None:
    results = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_mean(results, seed=3) == bootstrap_mean(results, seed=3)


def test_pairing_finds_a_small_difference_that_two_intervals_would_hide() -> None:
    hard, easy = [0.0] * 100, [1.0] * 100
    first = hard + easy
    second = [1.0] * 12 + hard[12:] + easy
    difference = bootstrap_difference(first, second)
    assert difference.mean == pytest.approx(0.06)
    assert (difference.better, difference.worse) == (12, 0)
    assert not difference.within_noise
    assert difference.p_value < 0.01
    assert bootstrap_mean(second).low < bootstrap_mean(first).mean


def test_equal_systems_are_within_noise_with_p_of_one() -> None:
    results = [1.0, 0.0, 1.0, 0.0]
    difference = bootstrap_difference(results, results)
    assert difference.within_noise
    assert difference.p_value == 1.0


def test_swapping_the_systems_turns_the_sign() -> None:
    first, second = [0.0] * 8 + [1.0] * 8, [1.0] * 5 + [0.0] * 3 + [1.0] * 8
    one, other = bootstrap_difference(first, second), bootstrap_difference(second, first)
    assert one.mean == -other.mean
    assert (one.better, one.worse) == (other.worse, other.better)


def test_unequal_numbers_and_no_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        bootstrap_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([])


def test_share_of_pairs_is_as_sure_as_its_problems_are_many() -> None:
    alone = bootstrap_ratio([1.0] * 60 + [0.0] * 40, [1.0] * 100, seed=1)
    assert alone == bootstrap_mean([1.0] * 60 + [0.0] * 40, seed=1)
    together = bootstrap_ratio([10.0] * 60 + [0.0] * 40, [10.0] * 100, seed=1)
    assert together == alone  # ten times the pairs, and as many problems
    uneven = bootstrap_ratio([90.0, 0.0], [90.0, 10.0])
    assert (uneven.mean, uneven.low, uneven.high) == (0.9, 0.0, 1.0)
    assert bootstrap_ratio([3.0] * 30, [3.0] * 30).low == bootstrap_mean([1.0] * 30).low
    with pytest.raises(ValueError, match="expected a whole for each part, got 1 for 2"):
        bootstrap_ratio([1.0, 1.0], [1.0])
