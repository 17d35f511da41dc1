from __future__ import annotations

import math

import pytest

from cluster.telemetry import metrics as m
from cluster.telemetry.samples import Key, Samples
from cluster.watch.queries import Mean, Quantile, Rate, Scaled, Value


def key(metric: m.Metric, suffix: str = "", **labels: str) -> Key:
    return metric.exported + suffix, tuple(sorted(labels.items()))


def samples_of(*rows: dict[Key, float], step_s: float = 10.0) -> Samples:
    found = Samples()
    for number, row in enumerate(rows):
        found.add(step_s * number, row)
    return found


def test_promql_names_the_run_and_sums_over_processes() -> None:
    rate = Rate(m.TREES, by=("level",), where={"solved": "true"})
    assert rate.promql("demo", "1m") == (
        'sum by (level) (rate(ray_rstar_trees_total{run="demo",solved="true"}[1m]))'
    )
    assert Value(m.KV_USED, by=("replica",)).promql("demo", "1m") == (
        'max by (replica) (rstar_kv_cache_used_ratio{run="demo"})'
    )
    assert Quantile(0.95, m.POOL_WAIT, by=("pool",)).promql("r", "5m") == (
        "histogram_quantile(0.95, sum by (pool, le) "
        '(rate(ray_rstar_pool_wait_seconds_bucket{run="r"}[5m])))'
    )


def test_division_of_labels_by_one_number_is_told_to_prometheus() -> None:
    by_level, whole = Rate(m.TREES, by=("level",)), Rate(m.TREES)
    assert " / on() group_left() sum(" in (by_level / whole).promql("r", "1m")
    assert " / sum by (level) (" in (by_level / by_level).promql("r", "1m")
    with pytest.raises(ValueError, match="cannot divide"):
        _ = whole / by_level


def test_rate_is_growth_over_the_window() -> None:
    k = key(m.ROLLOUTS)
    samples = samples_of(*({k: 5.0 * n} for n in range(10)))
    assert Rate(m.ROLLOUTS).evaluate(samples, 90, 30) == {(): pytest.approx(0.5)}


def test_series_that_begins_inside_the_window_began_at_nothing() -> None:
    other, late = (
        key(m.TREES, level="gsm", solved="true"),
        key(m.TREES, level="math", solved="true"),
    )
    rows: list[dict[Key, float]] = [{other: 0.0}, {other: 0.0}, {other: 0.0, late: 6.0}]
    rate = Rate(m.TREES, by=("level",)).evaluate(samples_of(*rows), 20, 20)
    assert rate[(("level", "math"),)] == pytest.approx(0.3)
    assert rate[(("level", "gsm"),)] == 0


def test_counter_that_starts_again_goes_on_where_it_was() -> None:
    k = key(m.ROLLOUTS)
    samples = samples_of({k: 0.0}, {k: 50.0}, {k: 10.0}, {k: 20.0})
    assert Rate(m.ROLLOUTS).evaluate(samples, 30, 30) == {(): pytest.approx(70 / 30)}


def test_gauge_that_is_not_told_any_more_has_no_value() -> None:
    k = key(m.OPEN_TREES)
    samples = samples_of({k: 7.0}, {k: 8.0}, {})
    assert Value(m.OPEN_TREES).evaluate(samples, 9, 60) == {(): 7.0}
    assert Value(m.OPEN_TREES).evaluate(samples, 19, 60) == {(): 8.0}
    assert Value(m.OPEN_TREES).evaluate(samples, 20, 60) == {}
    silent = samples_of({k: 7.0}, {k: 8.0})
    assert Value(m.OPEN_TREES).evaluate(silent, 30, 60) == {(): 8.0}
    assert Value(m.OPEN_TREES).evaluate(silent, 40, 60) == {}


def test_gauges_are_summed_or_the_greatest_is_taken_as_the_catalogue_says() -> None:
    samples = samples_of(
        {
            key(m.ENGINE_RUNNING, pool="policy", replica="a"): 3.0,
            key(m.ENGINE_RUNNING, pool="policy", replica="b"): 4.0,
            key(m.KV_USED, replica="a"): 0.2,
            key(m.KV_USED, replica="b"): 0.9,
        }
    )
    assert Value(m.ENGINE_RUNNING, by=("pool",)).evaluate(samples, 0, 60) == {
        (("pool", "policy"),): 7.0
    }
    assert Value(m.KV_USED).evaluate(samples, 0, 60) == {(): 0.9}


def test_quantile_is_interpolated_inside_its_bucket_and_bounded_by_the_last_one() -> None:
    def row(n: float) -> dict[Key, float]:
        # 4 of 10 waits up to 0.1 s, 9 up to 1 s, one longer than the last bucket.
        counts = {"0.1": 4 * n, "1": 9 * n, "+Inf": 10 * n}
        return {key(m.COMMIT_SECONDS, "_bucket", le=le): c for le, c in counts.items()}

    samples = samples_of(row(0), row(1))
    half = Quantile(0.5, m.COMMIT_SECONDS).evaluate(samples, 10, 60)
    assert half == {(): pytest.approx(0.1 + 0.9 * (5 - 4) / 5)}
    assert Quantile(0.99, m.COMMIT_SECONDS).evaluate(samples, 10, 60) == {(): pytest.approx(1.0)}
    nothing = samples_of(row(0), row(0))
    assert Quantile(0.5, m.COMMIT_SECONDS).evaluate(nothing, 10, 60) == {}


def test_mean_and_scaled_and_division_by_nothing() -> None:
    rows: list[dict[Key, float]] = [
        {key(m.TREE_SECONDS, "_sum"): 12.0 * n, key(m.TREE_SECONDS, "_count"): 3.0 * n}
        for n in (0, 1)
    ]
    samples = samples_of(*rows)
    assert Mean(m.TREE_SECONDS).evaluate(samples, 10, 60) == {(): 4.0}
    assert Scaled(Mean(m.TREE_SECONDS), 2.0).evaluate(samples, 10, 60) == {(): 8.0}
    assert (Mean(m.TREE_SECONDS) / Value(m.CLUSTER_GPUS)).evaluate(samples, 10, 60) == {}
    assert math.isfinite(Mean(m.TREE_SECONDS).evaluate(samples, 10, 60)[()])
