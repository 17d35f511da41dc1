"""A trained PPM has one value for a text: in the trainer's packed row, transformers and vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from learner.batch import pack_preference, tokenise_pairs
from learner.dataset import read_pairs
from learner.fit import FitRequest, PreferenceTrainConfig
from learner.objectives import PreferenceObjective
from learner.preference_model import load_preference_model
from learner.select import DatasetConfig, select_dataset
from learner.trainer import run_fit
from rollout.prompt import SHORT_TEMPLATE
from tests.builders import answered, code, make_problem, make_tree
from tests.models import write_tiny_policy

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4

# In a process of its own: the engine sets up torch.distributed for itself, and for good.
SERVE = """
import asyncio, json, sys
from cluster.engines.replica import PreferenceReplica
from cluster.engines.config import EngineConfig
from rollout.engine import EvaluationRequest

async def main():
    replica = PreferenceReplica(sys.argv[1], EngineConfig(max_model_len=256, kv_cache_gib=0.1))
    await replica.ready()
    reply = await replica.evaluate(EvaluationRequest(texts=tuple(json.load(sys.stdin))))
    await replica.shutdown()
    print("VALUES", json.dumps(reply.values))

asyncio.run(main())
"""


def served_values(path: str, texts: list[str]) -> list[float]:
    """The values of a PPM replica on vLLM."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE, path],
        input=json.dumps(texts),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("VALUES ")]
    return json.loads(line.removeprefix("VALUES "))


def test_trainer_transformers_and_vllm_agree_within_1e_4(tmp_path: Path) -> None:
    trees = [
        make_tree(
            code(f"good = {n}", answered("7", correct=True)),
            code(f"bad = {n}", answered("8", correct=False)),
            problem=make_problem(f"p{n}", text=f"{n}?"),
        )
        for n in range(12)
    ]
    select_dataset(trees, tmp_path / "data", template=SHORT_TEMPLATE, config=DatasetConfig())
    config = PreferenceTrainConfig(num_epochs=4, batch_examples=8, learning_rate=1e-3, zero_stage=0)
    result = run_fit(
        FitRequest(
            fit_id="ppm",
            kind="ppm",
            round=1,
            base=str(write_tiny_policy(tmp_path / "policy")),
            data=str(tmp_path / "data"),
            checkpoints=str(tmp_path / "checkpoints"),
            config=config,
        )
    )
    path = result.checkpoint.path
    tokenizer = AutoTokenizer.from_pretrained(path)
    groups = list(tokenise_pairs(tokenizer, read_pairs(tmp_path / "data", "train")))[:8]
    texts = [tokenizer.decode(text.ids) for group in groups for text in group.texts]

    with torch.no_grad():
        packed = PreferenceObjective(load_preference_model(path), config).eval()
        trainer = packed(pack_preference(groups)).tolist()
        plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
        transformers = [
            torch.tanh(plain(**tokenizer(text, return_tensors="pt")).logits).item()
            for text in texts
        ]
    vllm = served_values(path, texts)

    assert max(trainer) - min(trainer) > 0.05
    assert trainer == pytest.approx(transformers, abs=TOLERANCE)
    assert vllm == pytest.approx(transformers, abs=TOLERANCE)
