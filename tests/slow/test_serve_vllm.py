"""`rstar serve` with real engines and the miniature's pair, asked by the `openai` package."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.search import in_own_process
from learner.checkpoint import checkpoint_directory
from rollout.problem import Level
from rollout.problems.reader import read_problems

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "search.max_step_tokens=64",
    "search.num_candidates=4",
    "policy_engine.max_model_len=512",
    "ppm_engine.max_model_len=512",
    "policy_engine.kv_cache_gib=0.5",
    "ppm_engine.kv_cache_gib=0.5",
    "cluster.num_cpus=2",
    "seed=3",
]
TRAJECTORIES = 8


def command(name: str, models: Path, *more: str) -> list[str]:
    policy = checkpoint_directory(models / "checkpoints" / "round=0" / "policy")
    given = ["--policy", str(policy), "--ppm", str(models / "ppm"), *more]
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "cluster", name, *given, *sets]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def server(models: Path, folder: Path) -> Iterator[str]:
    with subprocess.Popen(
        command("serve", models, "--port", "0", "--set", f"run_dir={folder}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    break
            else:
                raise AssertionError("".join(said))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(180)


def test_server_answers_as_rstar_solve_does_streamed_and_not(tmp_path: Path) -> None:
    in_own_process("cold_start", tmp_path)
    problems, _ = read_problems(tmp_path / "problems" / "train.parquet", default_level=Level.MATH)
    text = problems[0].text
    solving = command("solve", tmp_path, text, "--trajectories", str(TRAJECTORIES), "--json")
    done = subprocess.run(
        solving, capture_output=True, text=True, timeout=800, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    solved = json.loads(done.stdout)
    question: list[Any] = [{"role": "user", "content": text}]
    with server(tmp_path, tmp_path / "serve") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = f"rstar-mcts-{TRAJECTORIES}"
        whole = client.chat.completions.create(model=model, messages=question)
        facts = whole.rstar  # type: ignore[attr-defined]
        assert facts["answer"] == solved["answer"] is not None
        assert [(a["answer"], a["votes"]) for a in facts["answers"]] == [
            (a["answer"], a["votes"]) for a in solved["answers"]
        ]
        assert facts["value"] == pytest.approx(solved["value"], abs=1e-4)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == solved["generated_tokens"]
        assert whole.usage.scored_tokens == solved["scored_tokens"]  # type: ignore[attr-defined]
        chunks = list(client.chat.completions.create(model=model, messages=question, stream=True))
        content = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert content == whole.choices[0].message.content
        assert f"\\boxed{{{facts['answer']}}}" in content and "```output" in content
        thinking = [getattr(c.choices[0].delta, "reasoning_content", None) for c in chunks]
        assert sum(map(bool, thinking)) > 1
        for method in ("greedy", "majority-4", "best-of-n-4", "beam-4"):
            other = client.chat.completions.create(model=f"rstar-{method}", messages=question)
            assert other.usage is not None and other.usage.completion_tokens > 0
