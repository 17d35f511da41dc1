"""The simulation: what it must never do, and what it must show."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from cluster.fleet.config import ClusterConfig
from cluster.folder.config_file import read_yaml
from cluster.machines.prices import read_prices
from cluster.planning.latency import DEFAULT_CURVE, CurveError, LatencyCurve
from cluster.planning.planner import PlanConfig
from cluster.planning.simulate import Simulation
from cluster.planning.simulated_store import DictFileSystem, RacingStore
from cluster.planning.simulation_figures import (
    SimulationConfig,
    SimulationReport,
    print_simulation,
)
from rollout.store import RunStore, TrajectoryStore
from tests.builders import answered, make_problem, make_tree

ROOT = Path(__file__).parents[4]
FLAT = LatencyCurve(((1, 100),))
"""100 tokens per second, however many requests there are."""


def simulate(curve: LatencyCurve = DEFAULT_CURVE, **settings: object) -> SimulationReport:
    return Simulation(SimulationConfig(**settings), curve).run()


def even(**other: object) -> dict[str, object]:
    """Equal trees, equal replicas, no losses, everything at once; a rollout and nothing else."""
    return {
        "level_factors": (1.0,),
        "tokens_sigma": 0,
        "straggler_share": 0,
        "slow_share": 0,
        "lost_per_hour": 0,
        "coordinator_kill_s": 0,
        "commit_s": 0,
        "node_start_s": 0,
        "engine_start_s": 0,
        "tokens_per_problem": 1000,
        "idle_timeout_s": 0,
        "evaluation_share": 0,
        "select_ms_per_tree": 0,
        "policy_fit_tokens": 0,
        "ppm_fit_tokens": 0,
        **other,
    }


def heavy(**other: object) -> dict[str, object]:
    """Every second replica is lost within an hour, and the coordinator every ten minutes."""
    return {
        "num_problems": 1000,
        "num_replicas": 8,
        "shard_size": 8,
        "lost_per_hour": 0.9,
        "zombie_share": 0.8,
        "coordinator_kill_s": 600,
        "seed": 4,
        **other,
    }


# -- worked by hand


def test_equal_trees_take_exactly_their_work() -> None:
    """2 replicas share 8 trees of 1,000 tokens at 100 tokens/s: 40 s."""
    report = simulate(
        FLAT, num_problems=8, num_replicas=2, shard_size=2, max_open_trees=2, **even()
    )
    assert report.makespan_s == pytest.approx(40)
    assert report.scaling_efficiency == pytest.approx(1)
    assert report.efficiency_of_constant == pytest.approx(1)
    assert report.utilisation == pytest.approx(1)
    assert report.replica_hours == pytest.approx(2 * 40 / 3600)


def test_idle_replica_costs_efficiency() -> None:
    """3 trees on 2 replicas: 20 s, of which one replica works half."""
    report = simulate(
        FLAT, num_problems=3, num_replicas=2, shard_size=1, max_open_trees=1, **even()
    )
    assert report.makespan_s == pytest.approx(20, abs=5)
    assert report.scaling_efficiency == pytest.approx(0.75, abs=0.1)


def test_start_up_counts_against_the_constant_but_not_as_available() -> None:
    started = even(node_start_s=30, engine_start_s=10)
    report = simulate(
        FLAT, num_problems=8, num_replicas=2, max_open_trees=4, shard_size=4, **started
    )
    assert report.scaling_efficiency > 0.9
    assert report.efficiency_of_constant < 0.6


def test_engine_is_faster_with_more_requests_in_flight() -> None:
    curve = LatencyCurve(((1, 100), (4, 300)))
    settings = even(requests_per_tree=1, num_problems=8, num_replicas=1)
    alone = simulate(curve, max_open_trees=1, shard_size=1, **settings)
    four = simulate(curve, max_open_trees=4, shard_size=4, **settings)
    assert alone.makespan_s == pytest.approx(80)
    assert four.makespan_s == pytest.approx(8000 / 300)


def test_slow_replicas_do_less() -> None:
    settings = even(num_problems=40, num_replicas=1, max_open_trees=2, shard_size=2)
    slow = simulate(FLAT, **settings | {"slow_share": 1, "slow_factor": 0.5})
    assert slow.makespan_s == pytest.approx(2 * simulate(FLAT, **settings).makespan_s)
    assert slow.scaling_efficiency == pytest.approx(1)


# -- what must never happen


@pytest.mark.parametrize("checkpoint_s", [None, 60.0])
def test_nothing_is_lost_or_doubled_whatever_dies(checkpoint_s: float | None) -> None:
    report = simulate(**heavy(checkpoint_s=checkpoint_s))
    assert report.replicas_lost > 10 and report.coordinator_kills >= 2
    assert report.zombie_commits > 0 and report.commits_refused > 0
    assert (report.lost, report.doubled, report.unexpected) == (0, 0, 0)
    assert report.committed + report.quarantined == 1000
    assert 0 < report.lost_work < 0.5


def test_zombie_that_commits_between_data_and_marker_does_no_harm() -> None:
    report = simulate(**heavy(zombie_s=3600, notice_share=0, seed=1))
    assert report.races > 0
    assert (report.lost, report.doubled, report.unexpected) == (0, 0, 0)


def test_all_problems_are_done_even_if_most_replicas_die_within_minutes() -> None:
    report = simulate(num_problems=200, num_replicas=4, lost_per_hour=0.999, seed=2)
    assert report.committed + report.quarantined == 200
    assert report.lost == report.doubled == 0


# -- what it must show


def test_same_seed_gives_the_same_figures() -> None:
    settings = heavy(num_problems=300, num_replicas=4)
    first, second = simulate(**settings), simulate(**settings)
    assert first.model_dump(exclude={"wall_s"}) == second.model_dump(exclude={"wall_s"})
    assert simulate(**settings | {"seed": 5}).makespan_s != first.makespan_s


def test_losses_cost_time_and_work() -> None:
    settings = {"num_problems": 400, "num_replicas": 4, "checkpoint_s": None}
    calm = simulate(lost_per_hour=0, **settings)
    lossy = simulate(lost_per_hour=0.8, **settings)
    assert lossy.makespan_s > calm.makespan_s
    assert calm.lost_work == pytest.approx(0, abs=1e-6)
    assert lossy.lost_work > 0.01


def test_plan_simulation_and_run_keep_open_trees_equally_often() -> None:
    pause_s = ClusterConfig().checkpoint_open_trees_s
    assert SimulationConfig().checkpoint_s == pause_s
    assert PlanConfig.model_fields["checkpoint_s"].default == pause_s


def test_checkpoints_save_work() -> None:
    settings = heavy(num_problems=800, num_replicas=8, zombie_share=0)
    with_them = simulate(checkpoint_s=30.0, **settings)
    without = simulate(checkpoint_s=None, **settings)
    assert with_them.lost_work < without.lost_work / 2


def test_hard_problems_first_shortens_the_round() -> None:
    settings = {"num_problems": 400, "num_replicas": 4, "lost_per_hour": 0, "straggler_share": 0}
    first = simulate(hardest_first=True, **settings)
    assert first.makespan_s < simulate(hardest_first=False, **settings).makespan_s


def test_scaler_gives_idle_replicas_back() -> None:
    settings = {"num_problems": 300, "num_replicas": 8, "lost_per_hour": 0}
    constant = simulate(**settings)
    elastic = simulate(min_replicas=1, **settings)
    assert elastic.replica_hours < constant.replica_hours
    assert elastic.lost == elastic.doubled == 0


def test_cost_follows_price_and_solved_problems() -> None:
    report = simulate(
        FLAT, num_problems=36, num_replicas=1, price_per_hour=10, solve_rate=1, **even()
    )
    assert report.replica_hours == pytest.approx(0.1)
    assert report.engine_dollars == pytest.approx(1) and report.learner_dollars == 0
    assert report.solved == 36
    assert report.dollars_per_solved == pytest.approx(1 / 36)


# -- machines that are not there


def test_three_of_four_are_enough_to_begin_and_the_last_joins() -> None:
    """100 trees of 30 s; the fourth replica comes after 500 of 875 s."""
    settings = even(
        num_problems=100,
        tokens_per_problem=3000,
        num_replicas=4,
        max_open_trees=1,
        shard_size=1,
        short_replicas=1,
    )
    begun = simulate(FLAT, **settings, short_s=500)
    assert begun.wait_s == 0
    assert begun.makespan_s == pytest.approx(875, abs=30)
    waited = simulate(FLAT, **settings, short_s=500, min_ready=1)
    assert waited.wait_s == pytest.approx(500, abs=10)
    assert waited.makespan_s == pytest.approx(500 + 750, abs=30)
    assert waited.scaling_efficiency < 0.7 and begun.scaling_efficiency > 0.95


def test_a_zone_that_goes_takes_its_replicas_until_it_is_back() -> None:
    """6 replicas, a third of them away from 100 to 400 s: 600 of the 6,000 replica-seconds."""
    settings = even(
        num_problems=150,
        tokens_per_problem=4000,
        num_replicas=6,
        max_open_trees=1,
        shard_size=1,
        detect_s=0,
        zombie_share=0,
    )
    calm = simulate(FLAT, **settings)
    hit = simulate(FLAT, **settings, zone_outage_at_s=100, zone_outage_s=300)
    assert calm.makespan_s == pytest.approx(1000)
    assert hit.replicas_lost == 2 and hit.replicas_started == 8
    assert hit.makespan_s == pytest.approx(1100, abs=50)
    assert (hit.lost, hit.doubled, hit.committed) == (0, 0, 150)


def test_a_zone_that_goes_with_zombies_loses_and_doubles_nothing() -> None:
    report = simulate(**heavy(zone_outage_at_s=1200, zombie_share=1, notice_share=0))
    assert report.zombie_commits > 0
    assert (report.lost, report.doubled, report.unexpected) == (0, 0, 0)


# -- a whole round


def whole(**other: object) -> dict[str, object]:
    """Rollout of 1,000 s, selection of 100 s, fits of 400 and 600 s, evaluation of 10 s."""
    return (
        even(
            num_problems=100,
            num_replicas=1,
            max_open_trees=1,
            shard_size=10,
            tokens_per_problem=1000,
            select_ms_per_tree=1000,
            solve_rate=1,
            policy_fit_tokens=400,
            ppm_fit_tokens=600,
            learner_tokens_per_s=100,
            evaluation_share=0.01,
            learner_node_start_s=60,
            learner_start_s=70,
            learner_idle_timeout_s=50,
            weights_s=0,
            engines_held=False,
            price_per_hour=3.6,
            learner_price_per_hour=36,
        )
        | other
    )


def test_learner_is_paid_for_from_selection_to_the_last_fit() -> None:
    """Asked for at 1,000 s, it runs at 1,060, fits from 1,130 to 2,130, goes at 2,180."""
    report = simulate(FLAT, **whole())
    assert report.makespan_s == pytest.approx(1000, abs=10)
    # Replicas are asked for every 10 s.
    assert report.round_s == pytest.approx(report.makespan_s + 130 + 1000 + 15, abs=6)
    assert report.learner_hours * 3600 == pytest.approx(70 + 1000 + 50)
    assert report.learner_idle_share == pytest.approx(120 / 1120)
    assert report.learner_machines == 1
    assert report.learner_dollars == pytest.approx(11.20)


def test_what_is_held_is_paid_for_through_the_round() -> None:
    report = simulate(FLAT, **whole(learner_held=True, engines_held=True, min_ready=1))
    # The learner was there before the dataset.
    assert report.round_s == pytest.approx(report.makespan_s + 100 + 1000 + 10, abs=10)
    assert report.learner_hours * 3600 == pytest.approx(report.round_s - 60)
    assert report.learner_idle_share == pytest.approx(1 - 1000 / (report.round_s - 60))
    assert report.replica_hours * 3600 == pytest.approx(report.round_s)
    returned = simulate(FLAT, **whole(idle_timeout_s=100))
    assert returned.replica_hours * 3600 == pytest.approx(1000 + 100 + 10, abs=15)
    both = report.engine_dollars + report.learner_dollars
    assert report.dollars_per_solved == pytest.approx(both / 100)
    assert returned.dollars_per_solved < report.dollars_per_solved


def test_a_fit_goes_on_from_its_checkpoint_on_another_machine() -> None:
    calm = simulate(FLAT, **whole())
    lossy = whole(learner_lost_per_hour=0.95, fit_checkpoint_s=100, seed=3)
    report = simulate(FLAT, **lossy)
    lost = report.learner_machines - 1
    assert lost > 0
    assert 0 < report.round_s - calm.round_s - 130 * lost <= 100 * lost
    fits_s = report.learner_hours * 3600 * (1 - report.learner_idle_share)
    assert 1000 < fits_s <= 1000 + 100 * lost


@pytest.mark.parametrize(("learner_tokens_per_s", "pays"), [(500, True), (50_000, False)])
def test_engines_are_given_back_for_fits_longer_than_idle_time_out_and_start(
    learner_tokens_per_s: float, pays: bool
) -> None:
    settings = heavy(num_problems=100, num_replicas=4, evaluation_share=0.1) | {
        "learner_tokens_per_s": learner_tokens_per_s
    }
    returned, kept = simulate(**settings, engines_held=False), simulate(**settings)
    assert (returned.replica_hours < kept.replica_hours) == pays
    assert returned.makespan_s == kept.makespan_s < returned.round_s
    assert returned.committed + returned.quarantined == 100


def test_prices_are_those_of_the_shipped_table_and_cluster() -> None:
    prices = read_prices(ROOT / "deploy/prices.yaml").instances["aws"]
    pools = read_yaml(ROOT / "deploy/configs/cluster.yaml")["cluster"]
    policy, ppm, sandbox, workers = (
        pools[name]["replicas"] for name in ("policy", "ppm", "sandbox", "workers")
    )
    gpus, one_gpu, cpus = (prices[name] for name in ("g6e.12xlarge", "g6e.4xlarge", "c7i.8xlarge"))
    hourly = policy / gpus.gpus * gpus.spot + ppm * one_gpu.spot
    hourly += math.ceil((sandbox + workers) / cpus.cpus) * cpus.spot
    config = SimulationConfig()
    assert config.price_per_hour == pytest.approx(hourly / policy, abs=0.01)
    assert config.learner_price_per_hour == prices["p5.48xlarge"].on_demand


def test_every_figure_is_defined_and_every_assumption_printed() -> None:
    assert all(info.description for info in SimulationReport.model_fields.values())
    config = SimulationConfig(num_problems=10, num_replicas=1)
    console = Console(file=io.StringIO(), width=200)
    print_simulation(Simulation(config, DEFAULT_CURVE).run(), config, console, curve=DEFAULT_CURVE)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for name in (*SimulationReport.model_fields, *SimulationConfig.model_fields, "curve"):
        assert name in printed


def test_memory_is_given_back() -> None:
    before = len(DictFileSystem.folders)
    simulate(num_problems=50, num_replicas=1)
    assert len(DictFileSystem.folders) == before


def test_wrong_bounds_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_replicas must be <= num_replicas, got 3 > 2"):
        SimulationConfig(num_replicas=2, min_replicas=3)
    with pytest.raises(ValidationError, match="short_replicas must be < num_replicas, got 2 >= 2"):
        SimulationConfig(num_replicas=2, short_replicas=2)


# -- latency curves


def test_curve_is_straight_between_points_through_zero_and_level_at_the_end() -> None:
    curve = LatencyCurve.of([[4, 300], [2, 200]])
    speeds = [curve.tokens_per_s(load) for load in (0, 1, 2, 3, 4, 100)]
    assert speeds == [0, 100, 200, 250, 300, 300]


def test_curve_is_read_from_the_file_of_the_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    file.write_text(json.dumps({"latency_curve": [[1, 50.0], [8, 300.0]], "other": 1}))
    assert LatencyCurve.read(file).points == ((1, 50), (8, 300))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no 'latency_curve'"),
        ("no json", "cannot be read"),
        ('{"latency_curve": []}', "at least one point"),
        ('{"latency_curve": [[1]]}', "expected pairs"),
        ('{"latency_curve": [[1, 5], [1, 6]]}', "must rise"),
        ('{"latency_curve": [[1, 0]]}', "must be above 0"),
    ],
)
def test_wrong_curves_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "search.json"
    file.write_text(text)
    with pytest.raises(CurveError, match=message) as refused:
        LatencyCurve.read(file)
    assert "search.json" in str(refused.value)


# -- the store


def test_store_in_memory_keeps_the_rules_of_a_store() -> None:
    store = RunStore("simulated://rules")
    store.self_check()
    assert store.create("a/b/c.json", b"1") and not store.create("a/b/c.json", b"2")
    store.put("a/d", b"3")
    assert store.read("a/b/c.json") == b"1" and store.exists("a/b") and store.exists("a/d")
    assert store.files("a") == ["a/d"] and store.folders("a") == ["b"]
    assert store.read_many(["a/d", "a/b/c.json"]) == {"a/d": b"3", "a/b/c.json": b"1"}
    store.delete("a/d")
    store.delete("a/d")
    assert store.files("a") == [] and store.files("nowhere") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/d")
    DictFileSystem().forget("simulated://rules")
    assert not store.exists("a/b/c.json")


def test_rival_between_data_and_marker_wins_and_the_other_leaves_nothing() -> None:
    store = RacingStore("simulated://race")
    trees = [make_tree(answered("7", correct=True), problem=make_problem("a"))]
    mine, rival = TrajectoryStore(store, 1), TrajectoryStore(RunStore("simulated://race"), 1)
    won = []
    store.on_put = lambda: won.append(rival.commit("s", trees, info={"who": "rival"}))
    assert not mine.commit("s", trees, info={"who": "me"})
    assert won == [True] and mine.read_commit("s").info == {"who": "rival"}
    assert len(store.files("trajectories/round=1/data")) == 1
    DictFileSystem().forget("simulated://race")
