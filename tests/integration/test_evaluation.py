"""`rstar evaluate` on a real cluster with scripted engines: nothing lost, nothing counted twice.

The checkpoints are real directories, because they are checked; who answers is a script.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from cluster.evaluation.asked import evaluate_config
from cluster.evaluation.benchmarks import EvaluationRun
from cluster.evaluation.compare import compare
from cluster.evaluation.results import Arm
from cluster.fleet.actors import PolicyKind, PreferenceKind
from cluster.folder.run_folder import RunFolder
from cluster.reports.evaluation_page import write_evaluation
from cluster.telemetry.progress import ProgressView
from tests.models import write_tiny_policy, write_tiny_ppm
from tests.scripted_replicas import ScriptedPolicyReplica, ScriptedPreferenceReplica

ROOT = Path(__file__).resolve().parents[2]
NUM_PROBLEMS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_policy(folder / "policy"), write_tiny_ppm(folder / "ppm")


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(PolicyKind, "actor", ray.remote(ScriptedPolicyReplica))
    monkeypatch.setattr(PreferenceKind, "actor", ray.remote(ScriptedPreferenceReplica))


def evaluation(folder: Path, models: tuple[Path, Path], **own: Any) -> EvaluationRun:
    problems = folder / "made.jsonl"
    rows = [
        {"id": n, "problem": f"How many in box {n}?", "answer": "3" if n % 3 else "5"}
        for n in range(NUM_PROBLEMS)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = {
        "seed": 4,
        "prompt": "steps",
        "rollouts_per_tree": 2,
        "beam_width": 2,
        "beam_candidates": 2,
        "search.template": "short",
        "search.num_candidates": 2,
        "search.max_depth": 4,
        "cluster.num_cpus": 2,
        "cluster.object_store_mib": 80,
        "cluster.shard_size": 2,
        **own,
    }
    config = evaluate_config(
        policy=models[0],
        ppm=models[1],
        benchmarks=str(problems),
        methods="greedy,majority,best-of-n,beam,mcts",
        trajectories="1,2,4",
        out=folder / "out",
        overrides=[f"{name}={value}" for name, value in overrides.items()],
    )
    return EvaluationRun(config, ProgressView(Console(quiet=True)))


def audit(root: Path) -> None:
    """Every problem once, in every arm, method and budget."""
    answers = pq.read_table(root / "answers.parquet").to_pylist()
    solutions: dict[str, list[tuple[str, int]]] = {}
    for row in answers:
        solutions.setdefault(row["arm"], []).append((row["problem_id"], row["trajectory"]))
    assert len(solutions["greedy"]) == len(set(solutions["greedy"])) == NUM_PROBLEMS
    assert len(solutions["samples"]) == len(set(solutions["samples"])) == 4 * NUM_PROBLEMS
    assert len(solutions["mcts"]) == len(set(solutions["mcts"])) == 4 * NUM_PROBLEMS
    assert len({problem for problem, _ in solutions["beam"]}) == NUM_PROBLEMS
    results = pq.read_table(root / "results.parquet").to_pylist()
    keys = [(row["method"], row["budget"], row["problem_id"]) for row in results]
    assert len(keys) == len(set(keys))
    rows = {(method, budget) for method, budget, _ in keys}
    assert len(keys) == len(rows) * NUM_PROBLEMS
    assert rows == {
        ("greedy", 1),
        ("pass@1", 1),
        *((m, k) for m in ("majority", "best-of-n", "top-k-vote", "mcts") for k in (1, 2, 4)),
        *((m, k) for m in ("weighted-majority", "mcts pass@k") for k in (1, 2, 4)),
        *((m, k) for m in ("pass@k", "beam") for k in (2, 4)),
    }


async def test_stopped_evaluation_goes_on_to_what_an_undisturbed_one_finds(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    running = asyncio.create_task(evaluation(cut, models).run())
    commits = cut / "out" / "trajectories" / f"round={Arm.SAMPLES.round}" / "commits"
    give_up_s = time.monotonic() + 300
    while not (commits.is_dir() and any(commits.iterdir())):
        assert time.monotonic() < give_up_s and not running.done()
        await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not ray.is_initialized()
    found = await evaluation(cut, models).run()
    audit(cut / "out")
    for arm in Arm:
        facts = found["arms"][arm.value]
        assert (facts["lost"], facts["doubled"], facts["quarantined"]) == (0, 0, {})
        assert facts["generated_tokens"] > 0

    expected = await evaluation(whole, models).run()
    accuracies = [[s["accuracy"] for s in report["summaries"]] for report in (found, expected)]
    assert accuracies[0] == accuracies[1]
    assert {row.difference.mean for row in compare(cut / "out", whole / "out")} == {0.0}

    files = {p: p.stat().st_mtime_ns for p in (whole / "out/trajectories").rglob("*.parquet")}
    again = await evaluation(whole, models).run()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert again["summaries"] == expected["summaries"]
    write_evaluation(RunFolder(whole / "out"), again)
    assert (whole / "out" / "report.html").stat().st_size > 10_000
