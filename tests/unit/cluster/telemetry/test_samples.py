from __future__ import annotations

import json
from pathlib import Path

from cluster.telemetry import metrics as m
from cluster.telemetry.samples import (
    NUM_SEGMENTS,
    SEGMENT_S,
    ActorTotals,
    Samples,
    SampleWriter,
)
from rollout.run_store import RunStore

PAGE = """\
# TYPE ray_rstar_trees_total counter
ray_rstar_trees_total{{WorkerId="{worker}",level="gsm",run="{run}",solved="true"}} {value}
ray_rstar_pool_wait_seconds_bucket{{WorkerId="{worker}",le="0.1",pool="policy",run="{run}"}} {value}
ray_rstar_unknown_total{{WorkerId="{worker}",run="{run}"}} 3.0
ray_tasks{{WorkerId="{worker}"}} 5.0
"""
TREES = (m.TREES.exported, (("level", "gsm"), ("solved", "true")))
WAITS = (f"{m.POOL_WAIT.exported}_bucket", (("le", "0.1"), ("pool", "policy")))


def page(worker: str, value: float, run: str = "demo") -> str:
    return PAGE.format(worker=worker, value=value, run=run)


def test_actors_are_added_up_and_those_that_restart_or_go_take_nothing_away() -> None:
    totals = ActorTotals("demo")
    totals.take(page("a", 5) + page("b", 2))
    totals.take(page("a", 7) + page("b", 2))
    assert totals.totals == {TREES: 9, WAITS: 9}
    totals.take(page("a", 1))  # a counts from 0 again, b is gone
    assert totals.totals[TREES] == 10


def test_other_runs_and_other_metrics_are_left_out() -> None:
    totals = ActorTotals("demo")
    totals.take(page("a", 5, run="another"))
    assert totals.totals == {}


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    writer = SampleWriter(RunStore(tmp_path))
    writer.write(100.0, {TREES: 1.0})
    writer.write(110.0, {TREES: 2.5, ("rstar_open_trees", ()): 7.0})
    writer.write(120.0, {TREES: 4.0})
    writer.close()
    samples = Samples.read(RunStore(tmp_path))
    assert samples.times == [100, 110, 120]
    assert samples.interval_s == 10
    trees = samples.series[TREES[0]][TREES[1]]
    assert (trees.times, trees.values) == ([100, 110, 120], [1.0, 2.5, 4.0])
    assert samples.series["rstar_open_trees"][()].times == [110]


def test_only_an_hour_is_kept(tmp_path: Path) -> None:
    writer = SampleWriter(RunStore(tmp_path))
    for row in range(40):
        writer.write(row * SEGMENT_S / 2, {TREES: float(row)})
    writer.close()
    assert len(list((tmp_path / "metrics").iterdir())) == NUM_SEGMENTS
    samples = Samples.read(RunStore(tmp_path))
    assert samples.times[-1] - samples.times[0] >= 3600
    assert len(samples.times) <= 2 * NUM_SEGMENTS


def test_torn_line_and_rubbish_are_left_out(tmp_path: Path) -> None:
    writer = SampleWriter(RunStore(tmp_path))
    writer.write(100.0, {TREES: 1.0})
    writer.write(110.0, {TREES: 2.0})
    writer.close()
    (path,) = (tmp_path / "metrics").iterdir()
    text = path.read_text(encoding="utf-8")
    path.write_text(text + 'null\n[1]\n{"t": 120.0, "v": [3', encoding="utf-8")
    assert Samples.read(RunStore(tmp_path)).times == [100, 110]
    assert Samples.read(RunStore(tmp_path / "none")).times == []


def test_counter_of_a_run_that_was_started_again_does_not_fall(tmp_path: Path) -> None:
    for start, values in ((0, (1, 5)), (1000, (0, 3))):
        writer = SampleWriter(RunStore(tmp_path))
        for row, value in enumerate(values):
            writer.write(start + 10.0 * row, {TREES: float(value)})
        writer.close()
    trees = Samples.read(RunStore(tmp_path)).series[TREES[0]][TREES[1]]
    assert trees.values == [1, 5, 5, 8]


def test_numbers_are_written_short(tmp_path: Path) -> None:
    writer = SampleWriter(RunStore(tmp_path))
    writer.write(1.0, {TREES: 123456789.0, WAITS: 1 / 3, ("rstar_open_trees", ()): float("nan")})
    writer.close()
    (path,) = (tmp_path / "metrics").iterdir()
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert row["v"] == [123456789, 0.333333, None]
