"""kill -9 of every kind of process of a run with real engines, in the middle of its work.

The policy is a model of 0.1 M parameters that has learned a few solutions by heart, so that it
solves some problems and fails at others; the PPM has random weights. What an undisturbed run finds
is found first, by the same engines.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.engines.replica import PolicyReplica
from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from learner.checkpoint import Checkpoint
from rollout.engine import GenerationReply, GenerationRequest
from rollout.prompt import SHORT_TEMPLATE, render_question, render_steps
from rollout.search import SearchConfig, run_search
from rollout.seeds import derive_seed
from rollout.store import RunStore, TrajectoryStore
from rollout.tasks import all_of
from rollout.tree import Tree
from tests.builders import make_problem
from tests.fakes import ScriptedPolicy, ScriptedSandbox
from tests.models import write_tiny_policy, write_tiny_ppm
from tests.saboteur import KINDS, Saboteur, shape, stopped_at_the_end
from tests.scripted_replicas import HELD

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SEED = 5
SEARCH = SearchConfig(
    template="short", num_candidates=3, num_rollouts=4, max_depth=4, max_step_tokens=48
)
WORDS = {"alpha": 7, "beta": 12, "gamma": 5}
"""What the policy has learned to answer."""
PROBLEMS = [
    make_problem(f"{word}-{n}", text=f"Value of {word}?", answer=str(value if n % 3 else value + 1))
    for word, value in WORDS.items()
    for n in range(10)
] + [make_problem("held", text=HELD, answer="1")]


class HeldPolicyReplica(PolicyReplica):
    """A policy replica that says nothing to `HELD` while the file "hold" lies beside its model."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        while HELD in request.prompt and Path(self._path).with_name("hold").exists():
            await asyncio.sleep(0.05)
        return await super().generate(request)


async def solutions() -> list[str]:
    """Question and solution, as the policy should write them; two ways for each word."""
    texts = []
    for word, value in WORDS.items():
        for first in (f"x = {value}", f"x = {value - 1} + 1"):
            script = {
                "": [f"{first}\n<end_of_step>"],
                "<end_of_step>\n": ["print(x)\n<end_of_code>"],
                "<end_of_step>": ["print(x)\n<end_of_code>"],
                "<end_of_output>\n": [f"<answer>It is \\boxed{{{value}}}<end_of_answer>"],
            }
            tree = await run_search(
                make_problem(text=f"Value of {word}?"),
                config=SEARCH.model_copy(update={"num_candidates": 1, "num_rollouts": 1}),
                policy=ScriptedPolicy(script),
                preference=None,
                sandbox=ScriptedSandbox(default=f"{value}\n"),
                round=0,
                seed=0,
            )
            (leaf,) = tree.answers()
            question = render_question(tree.problem.text, SHORT_TEMPLATE)
            texts.append(question + render_steps(tree.steps(leaf)))
    return texts


def learn_by_heart(path: Path, texts: list[str]) -> None:
    """Train the checkpoint in `path` until it writes these texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    rows = [tokenizer.encode(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(torch.arange(width) >= torch.tensor([[len(r)] for r in rows]), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, loss.item()
    model.save_pretrained(path)


def make_fleet(root: Path, policy: Path) -> Fleet:
    engine = {"dtype": "float32", "max_model_len": 256, "kv_cache_gib": 0.1}
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": policy,
            "seed": SEED,
            "policy_engine": engine | {"in_process": False},
            "ppm_engine": engine,
            "cluster": {
                "num_cpus": 2,
                "object_store_mib": 80,
                "sandbox": {"replicas": 2},
                "shard_size": 4,
                "max_open_trees": 6,
                "checkpoint_open_trees_s": 2.0,
                "supervision": {"look_s": 0.5, "backoff_s": 0.5},
            },
        }
    )
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(HeldPolicyReplica)
    return fleet


async def undisturbed(fleet: Fleet) -> dict[str, Tree]:
    """The searches of the run, without workers, on the fleet's engines."""
    policy, preference, sandbox = fleet.policy, fleet.preference, fleet.sandbox
    slots = asyncio.Semaphore(6)

    async def search(problem: Any) -> Tree:
        async with slots:
            return await run_search(
                problem,
                config=SEARCH,
                policy=policy,
                preference=preference,
                sandbox=sandbox,
                round=1,
                seed=derive_seed(SEED, 1, problem.id, 0),
            )

    trees = await all_of(search(problem) for problem in PROBLEMS)
    return {tree.problem.id: tree for tree in trees}


async def test_run_in_which_one_of_each_kind_is_killed_solves_the_same_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    policy = write_tiny_policy(tmp_path / "policy", max_positions=256)
    learn_by_heart(policy, await solutions())
    ppm = write_tiny_ppm(tmp_path / "ppm", max_positions=256)
    root = tmp_path / "run"
    root.mkdir()
    fleet = make_fleet(root, policy)
    async with stopped_at_the_end(fleet):
        await fleet.start(policy, version="policy-r0", learner=False)
        await fleet.serve_preference(
            Checkpoint(kind="ppm", round=0, path=str(ppm), digest="0" * 16)
        )
        began_s = time.monotonic()
        expected = await undisturbed(fleet)
        undisturbed_s = time.monotonic() - began_s
        saboteur = Saboteur(fleet, (*KINDS, "policy engine"))
        began_s = time.monotonic()
        hold = policy.with_name("hold")
        hold.touch()
        sabotage = asyncio.create_task(saboteur.work())
        sabotage.add_done_callback(lambda _: hold.unlink())
        outcome = await fleet.rollout(
            1,
            PROBLEMS,
            [RolloutStage(name="base", search=SEARCH)],
            preference=True,
            on_progress=lambda done, total, facts: None,
        )
        took_s = time.monotonic() - began_s
        await sabotage
    assert {kind: loss.deaths for kind, loss in outcome.losses.items()} == saboteur.killed
    assert (outcome.expected, outcome.lost, outcome.doubled) == (len(PROBLEMS), 0, 0)
    assert outcome.manifest.failed == {}
    found = {t.problem.id: t for t in TrajectoryStore(RunStore(str(root)), 1).trees()}
    solved = {problem_id for problem_id, tree in expected.items() if tree.solved}
    assert {problem_id for problem_id, tree in found.items() if tree.solved} == solved
    assert solved == {p.id for p in PROBLEMS if int(p.answer) in WORDS.values()}
    same = sum(shape(found[problem_id]) == shape(tree) for problem_id, tree in expected.items())
    with capsys.disabled():
        print(
            f"\n{outcome.solved} of {len(PROBLEMS)} solved, {same} trees equal node by node, "
            f"{took_s:.1f} s with and {undisturbed_s:.1f} s without {saboteur.killed.total()} "
            f"kills; {outcome.resumed_trees} trees resumed"
        )
        print("\n".join(outcome.loss_lines()))
