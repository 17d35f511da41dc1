from __future__ import annotations

import json

import pytest

from learner.fit import GateConfig
from learner.signals import LossWatch, MetricsLog, bin_of, calibration, chance_warning, judge
from rollout.run_store import RunStore


def test_loss_spike_is_named_with_its_step():
    watch = LossWatch()
    usual = [1.0 + 0.01 * (n % 5) for n in range(30)]
    assert not any(watch.observe(n + 1, loss) for n, loss in enumerate(usual))
    assert watch.observe(31, 4.0)
    (line,) = watch.warnings()
    assert line == "loss_spike: 4.000 at step 31, 1.020 was usual"


def test_noisy_and_falling_losses_are_no_spike():
    watch = LossWatch()
    losses = [(3.0 if n % 2 else 1.0) * 0.98**n for n in range(200)]
    assert not any(watch.observe(n + 1, loss) for n, loss in enumerate(losses))
    assert watch.warnings() == []


def test_values_fall_into_ten_equal_bins():
    assert [bin_of(value) for value in (-1.0, -0.81, -0.79, 0.0, 0.99, 1.0)] == [0, 0, 1, 5, 9, 9]


def test_calibration_error_is_the_weighted_distance_of_chance_and_outcome():
    # three trajectories of chance 0.8 of which two are right, one of chance 0.1 that is wrong
    counts, chances, correct = [0.0] * 10, [0.0] * 10, [0.0] * 10
    counts[8], chances[8], correct[8] = 3.0, 2.4, 2.0
    counts[1], chances[1], correct[1] = 1.0, 0.1, 0.0
    bins, error = calibration(counts, chances, correct)
    assert bins[8] == pytest.approx((3.0, 0.8, 2 / 3))
    assert error == pytest.approx((3 * (0.8 - 2 / 3) + 0.1) / 4)
    assert calibration([0.0] * 10, [0.0] * 10, [0.0] * 10)[1] is None


def test_accuracy_is_at_chance_within_two_standard_errors():
    assert chance_warning({"pair_accuracy": 0.54, "num_pairs": 400.0})
    assert not chance_warning({"pair_accuracy": 0.56, "num_pairs": 400.0})
    assert not chance_warning({"loss": 1.0, "num_examples": 400.0})


def test_gate_judges_loss_by_its_ratio():
    gate = GateConfig(max_loss_ratio=1.5)
    before = {"loss": 1.0, "num_examples": 50.0}
    assert judge(before | {"loss": 1.49}, before, gate) is None
    assert "loss 1.5100 on 50 held-out" in (judge(before | {"loss": 1.51}, before, gate) or "")
    assert judge(before | {"loss": float("nan")}, before, gate) is not None
    assert judge({"loss": 9.0, "num_examples": 3.0}, before, gate) is None
    assert judge(before, {}, gate) is None


def test_gate_judges_accuracy_by_what_the_pairs_can_tell():
    gate = GateConfig(max_accuracy_drop=0.1)

    def verdict(accuracy: float, pairs: float) -> str | None:
        new = {"pair_accuracy": accuracy, "num_pairs": pairs}
        return judge(new, {"pair_accuracy": 0.8, "num_pairs": pairs}, gate)

    assert verdict(0.71, 400.0) is None
    assert verdict(0.68, 400.0) is not None
    # the same drop on 40 pairs may be luck: two standard errors are 0.19
    assert verdict(0.68, 40.0) is None
    assert verdict(0.5, 40.0) is not None


def test_log_that_is_continued_drops_steps_that_are_done_again(tmp_path):
    log = MetricsLog(RunStore(tmp_path), tmp_path, resumed_from=0)
    for step in range(1, 6):
        log.step(step, {"loss": float(step), "mfu": None})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(RunStore(tmp_path), tmp_path, resumed_from=3)
    log.step(4, {"loss": 40.0})
    log.end(4, {"loss": 0.5}, warnings=[])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line.get("loss") for line in lines] == [1.0, 2.0, 3.0, 40.0, None]
    assert lines[-1] == {"validation": {"loss": 0.5}, "warnings": []}
