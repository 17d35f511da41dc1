"""An evaluation harness pointed at the server as its user would: lm-eval, on 20 problems.

It brings its own versions of many packages, so it stands in an environment of its own:
`python -m venv lm-eval`, `lm-eval/bin/pip install "lm-eval[api]"`, and RSTAR_LM_EVAL names
`lm-eval/bin/lm_eval`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.serve.service import Engines
from rollout.engine import GenerationRequest
from tests.fakes import ScriptedPolicy
from tests.serving import scripted_engines, serve_config, serving

LM_EVAL = os.environ.get("RSTAR_LM_EVAL") or shutil.which("lm_eval")

pytestmark = [
    pytest.mark.skipif(LM_EVAL is None, reason="needs lm_eval (RSTAR_LM_EVAL)"),
    pytest.mark.timeout(300),
]

TASK = """\
task: made_sums
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Q:"], do_sample: false}
num_fewshot: 0
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: 'boxed\\{(\\d+)\\}'}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def adds(request: GenerationRequest) -> list[str]:
    """Right for all sums but those that end in 7."""
    left, right = request.prompt.split("What is ")[1].split("?")[0].split(" + ")
    total = int(left) + int(right)
    if request.prompt.endswith("<end_of_output>\n"):
        said = total + 1 if total % 10 == 7 else total
        return [f"<answer>It is \\boxed{{{said}}}<end_of_answer>"]
    return [f"print({left} + {right})\n<end_of_code>"]


@pytest.mark.parametrize(
    ("model", "options"),
    [("rstar-greedy", ""), ("rstar-mcts-2", "temperature=0.7,max_gen_toks=2000")],
)
async def test_harness_scores_twenty_problems(tmp_path: Path, model: str, options: str) -> None:
    rows = [{"question": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(20)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "made_sums.yaml").write_text(TASK % data)
    engines = scripted_engines()
    own = Engines(
        policy=ScriptedPolicy(adds), preference=engines.preference, sandbox=engines.sandbox
    )
    more = ("--gen_kwargs", options) if options else ()
    async with serving(own, config=serve_config()) as (url, _):
        arguments = f"model={model},base_url={url}/v1/chat/completions,num_concurrent=4"
        process = await asyncio.create_subprocess_exec(
            str(LM_EVAL),
            *("--model", "local-chat-completions", "--model_args", arguments),
            *("--include_path", str(tmp_path), "--tasks", "made_sums", "--apply_chat_template"),
            *("--output_path", str(tmp_path / "out"), *more),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        )
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results: dict[str, Any] = json.loads(report.read_text())["results"]["made_sums"]
    wrong = sum(int(row["answer"]) % 10 == 7 for row in rows)
    assert results["exact_match,boxed"] == pytest.approx(1 - wrong / 20)
