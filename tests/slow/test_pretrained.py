"""A model that nobody here made, from its first search to a fine-tuned policy."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from learner.batch import tokenise_pairs, tokenise_texts
from learner.dataset import read_demonstrations
from learner.fit import FitRequest, PolicyTrainConfig
from learner.markers import with_markers
from learner.pairs import PairConfig, tree_pairs
from learner.select import DatasetConfig, select_dataset
from learner.trainer import run_fit
from rollout.engine import GenerationRequest
from rollout.problem import Level, Problem
from rollout.problems.miniature import generate, write_miniature
from rollout.prompt import END_OF_OUTPUT, END_OF_STEP, TEMPLATES, render_segments
from rollout.search import SearchConfig, run_search
from rollout.store import RunStore, TrajectoryStore
from rollout.trajectory import trajectories
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference
from tests.pretrained import smollm2

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENGINE = {
    "policy_engine.dtype": "bfloat16",
    "policy_engine.max_model_len": 2048,
    "policy_engine.kv_cache_gib": 0.5,
    "cluster.start_timeout_s": 600,
    "cluster.min_step_share": 0,
}


@pytest.fixture(scope="module")
def base() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def marked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_markers(base, tmp_path_factory.mktemp("marked") / "base")


def rollout(run_dir: Path, problems: Path, policy: Path, **settings: Any) -> dict[str, Any]:
    """The report of `rstar rollout`."""
    options = {**ENGINE, **settings, "run_dir": run_dir}
    command = [sys.executable, "-m", "cluster", "rollout"]
    command += ["--problems", str(problems), "--policy", str(policy)]
    command += chain.from_iterable(("--set", f"{key}={value}") for key, value in options.items())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((run_dir / "report.json").read_text())


def test_from_worked_examples_to_a_policy_of_its_own(
    base: Path, marked: Path, tmp_path: Path
) -> None:
    world = generate(seed=0, num_demonstrations=8, num_train=2, num_test=1)
    files = write_miniature(tmp_path / "problems", world)
    search = {"search.num_candidates": 2, "search.num_rollouts": 1, "search.max_step_tokens": 64}
    asked = rollout(
        tmp_path / "asked",
        files.train,
        base,
        **search,
        **{"search.template": "bootstrap", "search.max_depth": 4},
    )
    assert asked["trees"] == 2 and asked["generated_tokens"] > 0
    trees = list(TrajectoryStore(RunStore(str(tmp_path / "asked")), 1).trees())
    steps = [node.step for tree in trees for node in tree.nodes[1:]]
    assert any(step is not None and step.text.startswith("<code>\n") for step in steps)
    manifest = select_dataset(
        trees,
        tmp_path / "dataset",
        template=TEMPLATES["short"],
        config=DatasetConfig(),
        demonstrations=read_demonstrations(files.demonstrations),
    )
    assert manifest["counts"]["all"]["demonstrations"] == 8
    config = PolicyTrainConfig(
        total_tokens=600, batch_tokens=512, batch_examples=None, precision="bfloat16", zero_stage=0
    )
    fit = run_fit(
        FitRequest(
            fit_id="first",
            kind="policy",
            round=1,
            base=str(marked),
            data=str(tmp_path / "dataset"),
            checkpoints=str(tmp_path / "checkpoints"),
            config=config,
            seed=0,
        )
    )
    assert fit.steps == 2
    own = rollout(
        tmp_path / "own",
        files.train,
        Path(fit.checkpoint.path),
        **search,
        **{"search.template": "short", "search.max_depth": 2, "limit": 1},
    )
    assert own["trees"] == 1 and own["generated_tokens"] > 0


# ---------------------------------------------------------------- what tokenizers do to trees

PIECES = [
    "x",
    " = ",
    "1",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "# ",
    "é",
    "数",
    "'s",
    "...",
    "=",
    "<",
    "_",
    "0.5",
]


def step_of(rng: random.Random, prompt: str) -> str:
    """A step of odd white space and letters, as a model may write it."""
    body = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9)))
    if prompt.endswith(END_OF_OUTPUT + "\n"):
        return f"<answer>{body}\\boxed{{{rng.choice('345')}}}{body}<end_of_answer>"
    opening = "" if prompt.endswith(END_OF_STEP) else "<code>"
    return opening + body + rng.choice(("<end_of_step>", "<end_of_code>"))


def random_trees(count: int) -> Iterator[Any]:
    def script(request: GenerationRequest) -> list[str]:
        rng = random.Random(request.seed)
        return [step_of(rng, request.prompt) for _ in range(request.num_candidates)]

    for seed in range(count):
        problem = Problem(
            id=f"p{seed}", source="s", level=Level.GSM, text="How many\n éggs?  ", answer="3"
        )
        yield asyncio.run(
            run_search(
                problem,
                config=SearchConfig(template="short", num_candidates=4, num_rollouts=8),
                policy=ScriptedPolicy(script),
                preference=TablePreference({"": 0.1}),
                sandbox=ScriptedSandbox({}, default=" 3\n"),
                round=3,
                seed=seed,
            )
        )


@pytest.mark.parametrize("pre_tokenizer", ["own", "qwen2"])
def test_no_tree_a_search_accepts_makes_a_fit_impossible(marked: Path, pre_tokenizer: str) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = AutoTokenizer.from_pretrained(marked)
    if pre_tokenizer == "qwen2":
        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, own])
    template = TEMPLATES["short"]
    num_texts = num_groups = 0
    for tree in random_trees(60):
        found = [t for t in trajectories(tree) if t.correct]
        segments = [render_segments(tree.problem.text, t.steps, template) for t in found]
        if not segments:
            continue
        for pieces, text in zip(segments, tokenise_texts(tokenizer, segments), strict=True):
            num_texts += 1
            assert tokenizer.decode(text.ids[:-1]) == "".join(piece.text for piece in pieces)
            trained = tokenizer.decode(text.ids[text.trained][:-1])
            assert trained == "".join(piece.text for piece in pieces if piece.trained)
        pairs = tree_pairs(tree, template=template, config=PairConfig())
        for group in tokenise_pairs(tokenizer, pairs):
            num_groups += 1
            assert all(text.length > group.num_shared for text in group.texts)
    assert num_texts > 20 and num_groups > 20
