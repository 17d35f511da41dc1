"""What actors count in their last seconds, of a run that is over before Ray hands on any count."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.fleet.stages import RolloutStage
from cluster.telemetry import metrics as m
from cluster.telemetry.live import LiveFile
from cluster.telemetry.progress import ProgressView
from cluster.telemetry.samples import Samples
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore
from tests.builders import make_problem
from tests.saboteur import stopped_at_the_end
from tests.scripted_fleet import scripted_fleet

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=2, num_rollouts=3, max_depth=3)
PROBLEMS = [make_problem(f"p{n}", text="How many?", answer="3") for n in range(12)]


async def test_counts_of_an_actors_last_seconds_are_in_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "600000")  # not while it runs
    fleet = scripted_fleet(tmp_path / "run", shard_size=3, max_open_trees=6)
    view = ProgressView(Console(file=io.StringIO()))
    with LiveFile(fleet.store, view.snapshot, fleet=fleet.pools.account):
        async with stopped_at_the_end(fleet):
            await fleet.start(tmp_path / "hold", version="policy-r0", learner=False)
            outcome = await fleet.rollout(
                1,
                PROBLEMS,
                [RolloutStage(name="base", search=SEARCH)],
                preference=False,
                on_progress=view.update,
            )
    assert outcome.lost == 0 and outcome.losses == {}
    samples = Samples.read(RunStore(str(tmp_path / "run")))

    def counted(metric: m.Metric) -> float:
        return sum(series.values[-1] for series in samples.series[metric.exported].values())

    trees = list(TrajectoryStore(RunStore(str(tmp_path / "run")), 1).trees())
    assert counted(m.TREES) == len(trees) == len(PROBLEMS)
    assert counted(m.NODES) == sum(len(tree.nodes) for tree in trees)
    assert counted(m.GENERATED_TOKENS) == outcome.manifest.totals.generated_tokens
    assert counted(m.SANDBOX_STEPS) == outcome.executions
