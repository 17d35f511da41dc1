"""New problems from our own engine: a real vLLM server of a small model that was trained for it.

The model learns by heart, in a few seconds, which problems follow which seed and what their answers
are; of one problem it gives two answers equally often. Everything else is as it is with any server.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.runs.synthesize import run_synthesize, synthesize_config
from learner.fit import FitRequest, PolicyTrainConfig
from learner.miniature import write_base_model
from learner.plain import write_plain_dataset
from learner.select import DatasetConfig
from learner.trainer import run_fit
from rollout.problems.reader import read_problems
from rollout.problems.synthesis import SynthesisConfig
from tests.vllm_server import serving_model

pytestmark = pytest.mark.slow

SEEDS = ["Ann has 4 apples and finds 3.", "Ben sold 9 books of 12.", "Carl has 6 red cups."]
NEW = {
    SEEDS[0]: {"A hen lays 5 eggs a day for 4 days. How many eggs?": ("20",)},
    SEEDS[1]: {"A train has 7 cars with 8 seats each. How many seats?": ("56",)},
    SEEDS[2]: {"Of 30 hats Olga gave away half. How many are left?": ("15", "60")},
}
CONFIG = SynthesisConfig(
    num_problems=2,
    seeds_per_request=1,
    num_solutions=10,
    max_problem_tokens=40,
    max_solution_tokens=16,
    max_proposals=12,
    max_open=4,
    propose_prompt="Like {problems}New problem:\n",
    solve_prompt="{problem} Solution:\n",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("synthesis")
    rows = []
    for seed, problems in NEW.items():
        shown = CONFIG.proposal_text.replace("{problems}", f"Problem 1:\n{seed}\n\n")
        for text, answers in problems.items():
            rows.append({"prompt": shown, "response": f"{text}\nEND"})
            rows += [
                {
                    "prompt": CONFIG.solution_text.replace("{problem}", text),
                    "response": f"It is \\boxed{{{answer}}}.",
                }
                for answer in answers
            ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 40))
    write_plain_dataset("policy", file, folder / "data", config=DatasetConfig(validation_share=0.0))
    texts = [row[name] for row in rows for name in ("prompt", "response")]
    base = write_base_model(folder / "base", seed=0, texts=texts)
    config = PolicyTrainConfig(
        total_tokens=60_000,
        batch_tokens=512,
        batch_examples=None,
        learning_rate=2e-3,
        betas=(0.9, 0.98),
        zero_stage=0,
    )
    fit = run_fit(
        FitRequest(
            fit_id="round=0/policy",
            kind="policy",
            round=0,
            base=str(base),
            data=str(folder / "data"),
            checkpoints=str(folder / "checkpoints"),
            config=config,
        )
    )
    model = Path(fit.checkpoint.path)
    with serving_model(model, folder / "log", max_model_len=256) as address:
        yield address


async def test_our_own_engine_writes_problems_and_agrees_on_answers(
    url: str, tmp_path: Path
) -> None:
    seeds = tmp_path / "seeds.jsonl"
    rows = [
        {"id": f"s{n}", "problem": text, "answer": "1", "level": "gsm"}
        for n, text in enumerate(SEEDS)
    ]
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"synthesis={json.dumps(CONFIG.model_dump(mode='json'))}",
        "endpoint.chat=false",
        "endpoint.dialect=vllm",
    ]
    config = synthesize_config(
        None,
        overrides,
        seeds=[seeds],
        endpoint=url,
        model="mini",
        out=tmp_path / "new.parquet",
    )
    screen = io.StringIO()
    synthesis = await run_synthesize(config, Console(file=screen, width=100))
    answers = {text: answers for problems in NEW.values() for text, answers in problems.items()}
    problems, _ = read_problems(config.out)
    assert len(problems) >= 2, screen.getvalue()
    for problem in problems:
        assert problem.answer in answers[problem.text]
    kept = synthesis.kept.values()
    assert {k.agreement for k in kept if len(answers[k.problem.text]) == 1} == {1.0}
    spent = synthesis.spent
    assert spent.requests == synthesis.num_proposed + len(synthesis.kept) + sum(
        count for reason, count in synthesis.rejected.items() if "answer" in reason
    )
    assert spent.generated_tokens > 100
    again = await run_synthesize(config, Console(file=screen, width=100))
    assert again.spent == spent
