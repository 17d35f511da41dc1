from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.evaluation.compare import compare, show_comparison, verdict
from cluster.evaluation.tables import RESULT_SCHEMA, read_evaluation
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError


def write_results(root: Path, scores: dict[tuple[str, str, int], list[float]]) -> Path:
    """An evaluation with these scores of problems 0, 1, 2, ... by benchmark, method, budget."""
    root.mkdir()
    rows = [
        {
            "benchmark": benchmark,
            "problem_id": f"{benchmark}:{n}",
            "level": "math",
            "method": method,
            "budget": budget,
            "answer": None,
            "score": score,
            "outcome": "right" if score else "wrong",
            "generated_tokens": 1.0,
            "scored_tokens": 0.0,
            "seconds": 0.1,
            "gpu_seconds": None,
        }
        for (benchmark, method, budget), column in scores.items()
        for n, score in enumerate(column)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA), root / "results.parquet")
    (root / "evaluation.json").write_text(json.dumps({"vote_top_k": 4}))
    return root


def test_only_what_both_measured_on_common_problems_is_compared(tmp_path: Path) -> None:
    first = write_results(
        tmp_path / "a", {("m", "greedy", 1): [0.0] * 20, ("m", "mcts", 8): [1.0] * 20}
    )
    second = write_results(
        tmp_path / "b", {("m", "greedy", 1): [1.0] * 15, ("n", "greedy", 1): [1.0]}
    )
    (only,) = compare(first, second)
    assert (only.benchmark, only.method, only.budget) == ("m", "greedy", 1)
    assert (only.first, only.second, only.only_one) == (0.0, 1.0, 5)
    assert only.difference.num_problems == 15
    assert verdict(only.difference) == "B better"


def test_small_difference_is_said_to_be_within_noise(tmp_path: Path) -> None:
    first = write_results(tmp_path / "a", {("m", "greedy", 1): [1.0, 0.0] * 10})
    second = write_results(tmp_path / "b", {("m", "greedy", 1): [0.0, 1.0, *([1.0, 0.0] * 9)]})
    output = io.StringIO()
    show_comparison(first, second, Console(file=output, width=150))
    assert "within noise" in output.getvalue()
    assert "1 comparisons, 0 beyond noise" in output.getvalue()


def test_nothing_in_common_and_unfinished_evaluations_are_named(tmp_path: Path) -> None:
    first = write_results(tmp_path / "a", {("m", "greedy", 1): [1.0]})
    second = write_results(tmp_path / "b", {("n", "greedy", 1): [1.0]})
    with pytest.raises(ConfigError, match="nothing in common: one has m with greedy 1"):
        compare(first, second)
    with pytest.raises(RunFolderError, match=r"nowhere.*folder of a finished"):
        compare(first, tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="folder of a finished"):
        read_evaluation(RunFolder(tmp_path))
