"""`rstar evaluate` of a model that knows nothing of our steps: its chat template, real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.models import write_tiny_policy

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_any_causal_model_is_evaluated_by_its_chat_template(tmp_path: Path) -> None:
    model = write_tiny_policy(tmp_path / "model", markers=())
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    problems = tmp_path / "made.jsonl"
    rows = [{"id": n, "problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(5)]
    rows.append({"id": 5, "problem": "a " * 600, "answer": "1"})  # does not fit
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cluster", "evaluate", str(model)]
    command += ["--benchmarks", str(problems), "--method", "greedy,majority"]
    command += ["--trajectories", "1,3", "--out", str(out)]
    command += ["--set", "max_solution_tokens=24", "--set", "cluster.num_cpus=2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=800,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "evaluation.json").read_text())
    assert report["prompt"] == "chat"
    assert 0 < report["arms"]["samples"]["generated_tokens"] <= 5 * 3 * 24
    answers = pq.read_table(out / "answers.parquet").to_pylist()
    assert len(answers) == 6 + 5 * 3 + 1
    long = [row["failure"] for row in answers if row["problem_id"] == "made:5"]
    assert long == ["prompt too long", "prompt too long"]
    assert {s["accuracy"]["num_problems"] for s in report["summaries"]} == {6}
    assert (report["arms"]["samples"]["lost"], report["arms"]["samples"]["doubled"]) == (0, 0)
