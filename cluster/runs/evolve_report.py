"""What a run of self-evolution showed, round by round, from what its stages committed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import Evaluation, head_room
from cluster.evaluation.shares import shares_by_level
from cluster.folder.lineage import lineage_name
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import RunFolder
from cluster.machines.cost import run_cost
from cluster.runs.config import RunConfig
from rollout.problem import Level
from rollout.store import RunStore, TrajectoryStore

STAGES = ("rollout", "select", "train_policy", "train_ppm", "ruler", "evaluate")
"""Of each round, as they are recorded."""


def evolution_report(
    config: RunConfig,
    folder: RunFolder,
    store: RunStore,
    *,
    levels: Mapping[str, Level],
    num_test: int,
    seconds_total: float,
) -> dict[str, Any]:
    """The content of `report.json`; rounds that are not sealed are left out.

    Args:
        levels: of each training problem, by id.
        num_test: held-out problems.
        seconds_total: of all starts of the run together.
    """
    solved_before: set[str] = set()
    cold = _evaluation(folder, 0)
    rounds = []
    for number in range(1, len(config.rounds) + 1):
        trees = TrajectoryStore(store, number)
        if trees.manifest() is not None:
            rounds.append(_round_entry(folder, trees, levels, solved_before))
    return {
        "name": config.name,
        "cold_start": {"greedy": cold.shares("greedy")} if cold is not None else None,
        "rounds": rounds,
        "seconds_total": round(seconds_total, 1),
        "cost": run_cost(folder, {r["round"]: r["solved"] for r in rounds}, finished=True),
        "evaluation": _evaluation_facts(config.evaluation, num_test),
        "set_aside": {
            number: evaluation.failures
            for number in range(len(config.rounds) + 1)
            if (evaluation := _evaluation(folder, number)) is not None and evaluation.failures
        },
        "config": config.effective(),
        "versions": versions(),
        "hardware": hardware(),
    }


def _round_entry(
    folder: RunFolder,
    trees: TrajectoryStore,
    levels: Mapping[str, Level],
    solved_before: set[str],
) -> dict[str, Any]:
    """One round; adds what it solved to `solved_before`."""
    manifest = trees.manifest()
    assert manifest is not None
    solved = trees.solved()
    solved_before |= solved
    stages = {name: folder.stage(trees.round, name) for name in STAGES}
    rollout, select = stages["rollout"], stages["select"]
    dataset = folder.dataset_manifest(trees.round) or {}
    evaluation = _evaluation(folder, trees.round)
    ruler = folder.read(folder.ruler_name(trees.round)) or {}
    shares = {
        method: evaluation.shares(method) if evaluation is not None else None
        for method in (
            *("greedy", "majority", "best_of_n", "weighted_majority"),
            *("search", "weighted_search", "any_sample", "any_search"),
        )
    }
    return {
        "round": trees.round,
        "coverage": shares_by_level((level.value, i in solved) for i, level in levels.items()),
        "coverage_so_far": shares_by_level(
            (level.value, i in solved_before) for i, level in levels.items()
        ),
        **shares,
        "search_over_samples_tokens": evaluation and evaluation.search_over_samples_tokens,
        "samples_per_problem": evaluation and evaluation.samples_per_problem,
        "ppm_pair_accuracy": stages["train_ppm"].get("metrics", {}).get("pair_accuracy"),
        "ppm_metrics": stages["train_ppm"].get("metrics", {}),
        "ruler": {name: value for name, value in ruler.items() if name != "problems"},
        "steering": (folder.read(lineage_name(trees.round)) or {}).get("steering"),
        "head_room": evaluation and head_room(evaluation),
        "solved": len(solved),
        "trees": manifest.totals.trees,
        "trajectories": select.get("trajectories", 0),
        "correct_trajectories": select.get("correct_trajectories", 0),
        "difficulty": dataset.get("difficulty", {}),
        "origins": dataset.get("origins", {}),
        "newest_round_share": dataset.get("newest_round_share"),
        **_shape(folder, trees.round),
        "generated_tokens": manifest.totals.generated_tokens,
        "generated_tokens_per_s": rollout.get("generated_tokens_per_s", 0.0),
        "sandbox_steps_per_s": rollout.get("sandbox_steps_per_s", 0.0),
        "prefix_hit_rate": rollout.get("prefix_hit_rate", 0.0),
        "lost": rollout.get("lost", 0),
        "doubled": rollout.get("doubled", 0),
        "failed_problems": len(manifest.failed),
        "deaths": rollout.get("deaths", {}),
        "resumed_trees": rollout.get("resumed_trees", 0),
        "seconds": {name: stage.get("seconds") for name, stage in stages.items()},
    }


def _shape(folder: RunFolder, number: int) -> dict[str, Any]:
    """What the round's own trees were like, as its dataset says."""
    shape = (folder.dataset_manifest(number) or {}).get("shape", {})
    return {
        name: shape.get(name, {}).get(str(number), {}) for name in ("step_pairs", "node_visits")
    }


def _evaluation(folder: RunFolder, number: int) -> Evaluation | None:
    record = folder.read(folder.evaluation_name(number))
    return Evaluation.from_record(record) if record is not None else None


def _evaluation_facts(config: EvaluationConfig, num_test: int) -> dict[str, int]:
    total = min(config.num_problems or num_test, num_test)
    return {
        "num_problems": total,
        "num_search_problems": min(config.num_search_problems or total, total),
        "num_rollouts": config.num_rollouts,
    }
