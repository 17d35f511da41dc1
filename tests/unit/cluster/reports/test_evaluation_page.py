from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.folder.run_folder import RunFolder
from cluster.reports.evaluation_page import (
    benchmark_names,
    long_cells,
    markdown,
    notes,
    page,
    print_evaluation,
    write_evaluation,
)


def summary(benchmark: str, method: str, budget: int, mean: float, **own: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "method": method,
        "budget": budget,
        "accuracy": {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "num_problems": 500},
        "outcomes": {"right": int(500 * mean), "wrong": 500 - int(500 * mean)},
        "generated_tokens": 100.0 * budget,
        "scored_tokens": 0.0,
        "seconds": 1.5,
        "gpu_seconds": None,
        "tokens_over_samples": None,
    } | own


def benchmark(name: str, **own: Any) -> dict[str, Any]:
    return {
        "name": name,
        "file": f"{name}.parquet",
        "num_rows": 500,
        "num_problems": 500,
        "skipped": {},
        "num_repeated": 0,
        "num_sentences": 0,
    } | own


def report() -> dict[str, Any]:
    arm = {
        "problems": 1000,
        "answered_problems": 900,
        "solutions": 4000,
        "failures": {"code failed": 70, "unfinished": 30},
        "undecided": 3,
        "quarantined": {},
        "lost": 0,
        "doubled": 0,
        "seconds": 12.5,
        "reliability": [[0, 0.0, 0.0]] * 9 + [[40, 0.97, 0.5]],
    }
    return {
        "name": "<b>r4</b>",
        "models": {"policy": {"version": "policy-r4", "path": "runs/demo"}},
        "prompt": "steps",
        "vote_top_k": 4,
        "benchmarks": [benchmark("mine", num_sentences=7), benchmark("math500")],
        "warnings": ["5 of 500 problems of mine stand in math500 too"],
        "arms": {"samples": arm},
        "summaries": [
            summary("mine", "greedy", 1, 0.25),
            summary("math500", "greedy", 1, 0.5),
            summary("math500", "majority", 1, 0.45),
            summary("math500", "majority", 8, 0.625, gpu_seconds=2.25),
            summary("math500", "mcts", 8, 0.6, tokens_over_samples=35.128),
        ],
        "config": {"seed": 3},
        "hardware": {"cores": 2, "cpu": "test"},
        "seconds_total": 60.0,
    }


def printed(width: int) -> str:
    output = io.StringIO()
    print_evaluation(report(), Console(file=output, width=width))
    return output.getvalue()


def test_benchmarks_stand_in_the_papers_order_and_its_rows_beside_ours() -> None:
    assert benchmark_names(report()) == ["math500", "mine"]
    text = printed(120)
    greedy = next(line for line in text.splitlines() if line.strip().startswith("greedy"))
    assert greedy.index("50.0") < greedy.index("25.0")
    assert "45.0-55.0" in text
    assert "paper T3: policy of round 4" in text and "78.4" in text


def test_a_narrow_terminal_gets_a_table_for_each_few_benchmarks() -> None:
    assert printed(120).count("</b>: % right") == 1
    assert printed(50).count("</b>: % right") == 2


def test_votes_of_one_are_in_the_long_table_only() -> None:
    short, long = markdown(report()).split("## Every number")
    assert "maj@8" in short and "maj@1" not in short
    assert "| MATH-500 | maj@1 |" in long
    assert "| 2.25 | right 312, wrong 188 |" in long


def test_what_bounds_the_numbers_is_told() -> None:
    lines = "\n".join(notes(report()))
    assert "7 answers are sentences" in lines
    assert "3 answers the grader could not decide" in lines
    assert "code failed 70, unfinished 30" in lines
    assert "stand in math500 too" in lines


def test_page_is_one_file_without_scripts_or_requests(tmp_path: Path) -> None:
    text = page(report())
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")
    assert "&lt;b&gt;r4&lt;/b&gt;" in text and "<b>r4" not in text
    assert text.count("<svg") == 2
    assert "currentColor" in text and "#010203" not in text
    write_evaluation(RunFolder(tmp_path), report())
    written = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert written.keys() == {"evaluation.md", "accuracy.png", "reliability.png", "report.html"}
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_of_a_method_stand_beside_those_of_as_many_samples() -> None:
    assert "35.13" in printed(160)
    header, rows = long_cells(report(), ["math500"])
    at = header.index("over as many samples")
    assert [row[at] for row in rows] == ["", "", "", "35.13"]
