"""The capacity planner: worked by hand, and against the simulation."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.planning.latency import DEFAULT_CURVE
from cluster.planning.planner import (
    PlanConfig,
    PlanError,
    estimate_run,
    make_plan,
    print_estimate,
    print_plan,
    read_gpu_kinds,
)
from cluster.planning.simulate import Simulation
from cluster.planning.simulation_figures import SimulationConfig
from cluster.runs.config import RunConfig

TABLE = Path(__file__).parents[4] / "deploy/gpus.yaml"


def config(**other: float | None) -> PlanConfig:
    fields = {"gpus": 10, "tokens_per_s": 1000, "price_per_hour": 2, "ppm_share": 0, **other}
    return PlanConfig(**fields)


def test_plan_without_losses_is_work_over_speed() -> None:
    """1,000 problems of 2 * 5 * 4 * 25 = 1,000 tokens on 10 GPUs of 1,000 tokens/s: 100 s."""
    plan = make_plan(
        config(
            problems=1000,
            rollouts=2,
            expansions_per_rollout=5,
            candidates=4,
            tokens_per_step=25,
            lost_per_hour=0,
            open_trees=8,
            start_s=50,
            solve_rate=0.5,
        )
    )
    assert plan.tokens_per_tree == 1000 and plan.busy_s == 100 and plan.tree_s == 8
    assert plan.total_s == 50 + 100 + 6
    assert plan.gpu_s_per_problem == pytest.approx(1.56)
    assert plan.dollars == pytest.approx(1560 / 3600 * 2)
    assert plan.dollars_per_solved == pytest.approx(plan.dollars / 500)
    assert plan.expected_losses == 0


@pytest.mark.parametrize("checkpoint_s", [60.0, None])
def test_losses_cost_the_gap_and_the_work_since_a_checkpoint(checkpoint_s: float | None) -> None:
    calm = make_plan(config(lost_per_hour=0, checkpoint_s=checkpoint_s))
    lossy = make_plan(config(lost_per_hour=0.05, checkpoint_s=checkpoint_s))
    losses = calm.busy_s * 10 * 0.0512933 / 3600
    assert calm.tree_s > 60
    lost_s = losses * (225 + (checkpoint_s or calm.tree_s) / 2) / 10
    assert lossy.total_s - calm.total_s == pytest.approx(lost_s, rel=1e-4)


def test_ppm_takes_its_share_of_the_gpus_and_shares_a_single_one() -> None:
    assert make_plan(config(gpus=100, ppm_share=0.15)).policy_gpus == 85
    one = make_plan(config(gpus=1, ppm_share=0.5))
    assert one.policy_gpus == 1
    assert one.busy_s == pytest.approx(2 * make_plan(config(gpus=1)).busy_s)
    with pytest.raises(PlanError, match="no GPU is left for the policy: 2 of 2 serve the PPM"):
        make_plan(config(gpus=2, ppm_share=0.9))


def test_plan_agrees_with_the_simulation() -> None:
    plan = make_plan(
        config(
            gpus=8,
            problems=4000,
            rollouts=1,
            candidates=1,
            expansions_per_rollout=1,
            tokens_per_step=36_000,
            tokens_per_s=DEFAULT_CURVE.tokens_per_s(24 * 5.5),
        )
    )
    report = Simulation(
        SimulationConfig(num_problems=4000, num_replicas=8, straggler_share=0, slow_share=0),
        DEFAULT_CURVE,
    ).run()
    assert report.makespan_s == pytest.approx(plan.total_s, rel=0.05)


def test_shipped_table_is_valid() -> None:
    kinds = read_gpu_kinds(TABLE)
    assert "h100-80gb" in kinds
    assert all(kind.spot_price <= kind.on_demand_price for kind in kinds.values())


def test_wrong_table_is_refused_by_row_and_field(tmp_path: Path) -> None:
    table = tmp_path / "gpus.yaml"
    table.write_text("a100:\n  spot_price: -1\n  on_demand_price: 2\n  tokens_per_s: 5\n")
    with pytest.raises(PlanError, match=r"gpus.yaml: a100\.spot_price: .*greater than or equal"):
        read_gpu_kinds(table)
    table.write_text("[]")
    with pytest.raises(PlanError, match="expected a YAML mapping"):
        read_gpu_kinds(table)
    with pytest.raises(PlanError, match="cannot be read"):
        read_gpu_kinds(tmp_path / "absent.yaml")


@pytest.mark.parametrize("checkpoint_s", [60, None])
def test_printed_plan_names_every_figure_and_assumption(checkpoint_s: float | None) -> None:
    console = Console(file=io.StringIO(), width=160)
    settings = config(checkpoint_s=checkpoint_s)
    print_plan(make_plan(settings), settings, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("total_s", "dollars_per_solved", *PlanConfig.model_fields):
        assert name in printed


def test_papers_round_takes_about_what_it_took() -> None:
    """60 A100-40GB, 16 rollouts x 8 candidates, 747k problems: 3 days."""
    kind = read_gpu_kinds(TABLE)["a100-40gb"]
    plan = make_plan(PlanConfig(gpus=60, tokens_per_s=kind.tokens_per_s, price_per_hour=1))
    assert 2.5 < plan.days < 3.5


def run_config(**cost: object) -> RunConfig:
    """One round of 10 candidates x 10 rollouts with a pass over what stays unsolved."""
    return RunConfig.model_validate(
        {
            "name": "x",
            "run_dir": "runs/x",
            "problems": {"miniature": {}},
            "rounds": [{"preference": False, "escalation": [{"num_rollouts": 20}]}],
            "search": {"num_candidates": 10, "num_rollouts": 10},
            "cluster": {
                "policy": {"replicas": 4},
                "learner": {"replicas": 8},
                "max_open_trees": 1,
                "workers": {"replicas": 4},
            },
            "train_policy": {"num_epochs": 2},
            "train_ppm": {"num_epochs": 1},
            "cost": {
                "expected": {
                    "tokens_per_s": 1000,
                    "train_tokens_per_s": 5000,
                    "expansions_per_rollout": 2,
                    "tokens_per_step": 10,
                    "solve_rate": 0.75,
                    "lost_per_hour": 0,
                    "policy_tokens": 1000,
                    "ppm_tokens": 3000,
                    "start_s": 360,
                    "train_start_s": 60,
                    "other_s": 0,
                    "machines": {
                        "head": {"kind": "small"},
                        "policy": {"kind": "gpu", "market": "spot", "holds": 2},
                        "learner": {"kind": "big", "holds": 8},
                    },
                },
                "prices": {
                    "small": {"on_demand": 1},
                    "gpu": {"on_demand": 10, "spot": 5},
                    "big": {"on_demand": 50},
                },
                **cost,
            },
        }
    )


def test_a_run_is_estimated_with_its_fits_and_the_machines_of_each_stage() -> None:
    """10,000 trees of 2,000 tokens on 4 x 1,000 tokens/s: 5,000 s; 2,500 of twice that: 2,500 s.
    Fits: 7,500 solved x 1,000 tokens x 2 epochs / 5,000 = 3,000 s; 7,500 x 3,000 / 5,000 = 4,500 s.
    """
    estimate = estimate_run(run_config(), 10_000)
    stages = estimate["by_stage"]
    tails_s = 0.75 * (2 + 4)
    assert stages["start"]["usd"] == pytest.approx(0.1 * 11)  # the head and two of the policy's
    assert stages["round 1: rollout"]["hours"] * 3600 == pytest.approx(7500 + tails_s)
    assert stages["round 1: train policy"]["hours"] * 3600 == pytest.approx(3060)
    assert stages["round 1: train policy"]["usd"] == pytest.approx(3060 / 3600 * 61)
    assert stages["round 1: train ppm"]["hours"] * 3600 == pytest.approx(4560)
    assert estimate["usd"] == pytest.approx(sum(stage["usd"] for stage in stages.values()))
    output = io.StringIO()
    print_estimate(estimate, Console(file=output, width=120))
    assert "10,000 problems: 0.18 days" in output.getvalue()


def test_one_price_for_all_machines_is_that_of_every_stage() -> None:
    estimate = estimate_run(run_config(usd_per_hour=36.0), 10_000)
    assert estimate["usd"] == pytest.approx(estimate["hours"] * 36)


def test_without_assumptions_there_is_no_estimate() -> None:
    with pytest.raises(PlanError, match=r"cost\.expected is not set"):
        estimate_run(run_config(expected=None), 10)
    with pytest.raises(ValueError, match="no price of big, gpu, small"):
        run_config(prices={})
