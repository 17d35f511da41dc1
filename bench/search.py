"""How well the search keeps its engines busy, and what it costs itself.

    python -m bench.search [--run RUN | --policy DIR --ppm DIR --problems FILE] [--json FILE]
                           [--only SECTION ...] [--problems-used N] [--open N] [--no-lockstep]

    bookkeeping   the search alone, over scripted engines that cost nothing; memory of an open tree
    prefix        prompt tokens found in the prefix cache, steps of MATH-like length
    search        searches over Ray actors: policy, PPM, sandbox; idle time, tokens/s, CPU seconds
    ray           what a call of an actor costs, against a step
    offline       the very same prompts in one offline call of vLLM; the engine's latency curve;
                  the lock-step driver on the same problems with the same seeds
    modelled      the same search with an engine that only sleeps, as that curve says

Models: `--run` takes a finished run's last checkpoints and problems. Without any, the miniature is
made and its policy fitted for a few hundred steps (about a minute), the PPM gets a new head. What
was used is printed and in the JSON. Runs on vLLM's CPU build, and on a GPU where there is one,
which the two engines share.

Searches run in this process, over the pools a rollout worker uses; coordinator and store are left
out. Idle time and utilisation are taken while problems were left to open; those over the whole run,
whose end has ever fewer trees, are beside them (`..._whole_run`). Figures are of one run on a
machine that does nothing else. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from bench.search_engines import (
    Answered,
    ModelledPolicy,
    OpensCode,
    RecordedPreference,
    Recorder,
    ScriptedEngines,
    tokens_per_s,
)
from bench.search_offline import Job
from cluster.engines.arguments import CPU_MAX_NUM_SEQS
from cluster.engines.config import EngineConfig
from cluster.engines.replica import PolicyReplica
from cluster.errors import quiet_logging
from cluster.fleet.config import ServingConfig
from cluster.fleet.fleet import Fleet
from cluster.folder.machine import hardware, versions
from cluster.folder.run_folder import RunFolder
from cluster.jobs.worker import GC_THRESHOLD
from learner.checkpoint import (
    Checkpoint,
    CheckpointStore,
    checkpoint_directory,
    directory_digest,
    read_prompt_template,
)
from rollout.engine import PolicyEngine, PreferenceEngine
from rollout.problem import Level, Problem
from rollout.problems.reader import read_problems
from rollout.search import SearchConfig, StepSandbox, run_search
from rollout.seeds import derive_seed
from rollout.tree import Tree
from verifier import Verdict
from verifier.equivalence import Reason
from verifier.verify import start_symbolic_worker, stop_symbolic_worker

SECTIONS = ("bookkeeping", "prefix", "search", "ray", "offline", "modelled")

GOALS = {
    "engine_idle_share": "<= 0.02",
    "engine_utilisation": ">= 0.55 on two cores, 0.90 on a GPU",
    "engine_utilisation_modelled": ">= 0.90",
    "vs_lockstep": ">= 3 on two cores, 5 on a GPU",
    "prefix_hit_rate": ">= 0.85",
    "nodes_per_s_core_10": ">= 20,000",
    "nodes_per_s_core_10k": ">= 20,000",
    "open_tree_mib": "<= 1",
    "ray_call_share": "<= 0.05",
}


@dataclass(frozen=True)
class Models:
    """What is served, and what is searched."""

    policy: Path
    ppm: Path
    problems: list[Problem]
    template: Any
    said: str
    """For people: where they come from."""


# --------------------------------------------------------------------------- the search alone


def accept(gold: str | None, answer: str | None) -> Verdict:
    """A grader that costs nothing."""
    equal = gold == answer
    reason = Reason.EXACT if equal else Reason.DIFFERENT
    return Verdict(equal=equal, reason=reason, path="bench")


def scripted_problems(count: int) -> list[Problem]:
    return [
        Problem(id=f"p{n}", source="bench", level=Level.MATH, text=f"Question {n}?", answer="1")
        for n in range(count)
    ]


async def search_scripted(
    problems: Sequence[Problem], config: SearchConfig, engines: ScriptedEngines
) -> list[Tree]:
    searches = (
        run_search(
            problem,
            config=config,
            policy=engines,
            preference=engines,
            sandbox=engines,
            round=1,
            seed=number,
            grade=accept,
        )
        for number, problem in enumerate(problems)
    )
    return list(await asyncio.gather(*searches))


def bookkeeping() -> dict[str, Any]:
    """Nodes per second of CPU time with 10 and with 10,000 trees open; memory of an open tree."""
    figures: dict[str, Any] = {}
    gc.set_threshold(*GC_THRESHOLD)  # as a rollout worker sets it
    config = SearchConfig(num_candidates=8, num_rollouts=2, template="short")
    for name, open_trees, repeats in (("10", 10, 100), ("10k", 10_000, 1)):
        problems = scripted_problems(open_trees)
        asyncio.run(search_scripted(problems[:10], config, ScriptedEngines(3)))
        nodes, spent = 0, 0.0
        for _ in range(repeats):
            started = time.process_time()
            trees = asyncio.run(search_scripted(problems, config, ScriptedEngines(3)))
            spent += time.process_time() - started
            nodes += sum(len(tree.nodes) for tree in trees)
            del trees
        gc.collect()
        figures[f"nodes_per_s_core_{name}"] = nodes / spent
    for preset, suffix in (("paper", ""), ("released", "_released")):
        mib, nodes = open_tree_memory(SearchConfig(preset=preset, **OPEN_TREE))
        figures |= {f"open_tree_mib{suffix}": mib, f"open_tree_nodes{suffix}": nodes}
    return figures


OPEN_TREE: dict[str, Any] = {"num_candidates": 12, "num_rollouts": 48, "template": "short"}


def open_tree_memory(config: SearchConfig) -> tuple[float, int]:
    """MiB of a tree, its coroutine included, before it is closed; and how many nodes it has."""
    words = "the total cost is the sum of the parts so we add them up here and keep the result "
    engines = ScriptedEngines(5, f"# {words * 2}\nvalue_{{n}} = {{n}} + 1\n")
    ready, end = asyncio.Event(), asyncio.Event()
    waiting = 0

    async def close(tree_id: str) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == count:
            ready.set()
        await end.wait()

    count = 4
    engines.close = close  # type: ignore[method-assign]

    async def hold() -> tuple[float, list[Tree]]:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        searches = asyncio.create_task(search_scripted(scripted_problems(count), config, engines))
        await ready.wait()
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        end.set()
        return taken / count / 2**20, await searches

    mib, trees = asyncio.run(hold())
    return mib, len(trees[0].nodes)


# --------------------------------------------------------------------------- prefix cache

STEP_TOKENS = 64
"""Mean length of a step of the random model, as of a MATH solution in code."""

QUESTIONS = (
    "Let f be quadratic with roots 2 and 5 and leading coefficient 3. Compute f(11) - f(4).",
    "How many positive divisors of 7! are perfect squares or one more than a perfect square?",
    "A regular hexagon has side 6. Two opposite sides are joined to its center. Find the area.",
    "Find the sum of all n with 1 <= n <= 200 such that n^2 + 4n + 3 is divisible by 5 and 7.",
)


SMALL_SHAPE: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PRINTABLE = "".join(map(chr, range(33, 127)))


def write_random_policy(
    path: Path,
    *,
    shape: Mapping[str, Any] = SMALL_SHAPE,
    letters: str = PRINTABLE,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """A policy with random weights that writes some letters and ends a step now and then.

    One dimension of its hidden state is constant, so that a row of the output head shifts a token's
    logit: up for the end of a step (once in `STEP_TOKENS` tokens), far down for all that would not
    come back as the same tokens when the text is read again.

    Args:
        shape: further arguments of a Llama's config; a `vocab_size` of its own is filled up with
            tokens that are never written.
        letters: what it writes, printable; of the digits 1 to 9 every step is Python.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rollout.prompt import END_OF_STEP, MARKERS

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {symbol: n for n, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *MARKERS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": len(fast), **shape},
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        dtype=dtype,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    written = [vocabulary[letter] for letter in letters]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        hidden = model.model(torch.tensor([written], device=model.device)).last_hidden_state
        constant = float(hidden[0, :, 0].mean())
        bias = torch.full((config.vocab_size,), -40.0)
        bias[written] = 0.0
        bias[fast.convert_tokens_to_ids(END_OF_STEP)] = float(
            torch.tensor(len(written) / (STEP_TOKENS - 1)).log()
        )
        model.lm_head.weight[:, 0] = bias / constant
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def in_own_process(function: str, folder: Path) -> str:
    """Call a function of this module with a folder in a fresh process; its last line of output.

    What vLLM and torch want in the environment must not reach the actors of the other sections.
    """
    code = f"import pathlib, sys, bench.search; bench.search.{function}(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{function} failed with status {done.returncode}")
    return done.stdout.strip().rpartition("\n")[2]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def prefix(folder: Path) -> None:
    """Print the figures of the prefix cache as JSON and end this process."""
    print(json.dumps(asyncio.run(search_random(folder))), flush=True)
    os._exit(0)  # vLLM's own clean-up at this point prints a traceback


async def search_random(folder: Path) -> dict[str, Any]:
    """Prompt tokens from the cache in trees of 16 rollouts x 8 candidates, each prompt once."""
    config = SearchConfig(
        num_candidates=8,
        num_rollouts=16,
        max_depth=5,
        max_step_tokens=4 * STEP_TOKENS,
        template="short",
    )
    replica = PolicyReplica(
        str(write_random_policy(folder / "random")),
        EngineConfig(
            dtype="float32" if not on_gpu() else "bfloat16", max_model_len=2048, kv_cache_gib=1.0
        ),
    )
    info = await replica.ready()
    engines = ScriptedEngines(1)
    try:
        before = await replica.stats()
        trees = await asyncio.gather(
            *(
                run_search(
                    Problem(
                        id=f"q{n}", source="bench", level=Level.MATH, text=question, answer="1"
                    ),
                    config=config,
                    policy=OpensCode(replica),
                    preference=None,
                    sandbox=engines,
                    round=1,
                    seed=n,
                    grade=accept,
                )
                for n, question in enumerate(QUESTIONS)
            )
        )
        stats = await replica.stats()
    finally:
        await replica.shutdown()
    expansions = sum(node.expanded for tree in trees for node in tree.nodes)
    prompt = stats.prompt_tokens - before.prompt_tokens
    generated = stats.generated_tokens - before.generated_tokens
    return {
        "prefix_hit_rate": (stats.cached_tokens - before.cached_tokens) / prompt,
        "prefix_device": info.device,
        "prefix_prompt_tokens_mean": prompt / expansions,
        "prefix_step_tokens_mean": generated / expansions / config.num_candidates,
        "prefix_rollouts": sum(tree.num_rollouts for tree in trees),
    }


# --------------------------------------------------------------------------- the search


def cold_start(folder: Path) -> None:
    """Write the miniature's problems, a policy fitted to its demonstrations, and a new PPM."""
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer

    from learner.dataset import read_demonstrations
    from learner.fit import FitRequest, PolicyTrainConfig
    from learner.miniature import write_base_model
    from learner.preference_model import new_preference_model
    from learner.select import DatasetConfig, select_dataset
    from learner.trainer import run_fit
    from rollout.problems.miniature import generate, write_miniature
    from rollout.prompt import TEMPLATES

    miniature = generate(seed=3, num_demonstrations=400, num_train=600, num_test=30)
    files = write_miniature(folder / "problems", miniature)
    table = pq.read_table(files.demonstrations, columns=["problem", "solution"])
    texts = [*table["problem"].to_pylist(), *table["solution"].to_pylist()]
    write_base_model(folder / "base", seed=3, texts=texts)
    select_dataset(
        (),
        folder / "dataset",
        template=TEMPLATES["short"],
        config=DatasetConfig(validation_share=0.1),
        demonstrations=read_demonstrations(files.demonstrations),
    )
    config = PolicyTrainConfig(
        total_tokens=300_000,
        batch_tokens=1024,
        batch_examples=None,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_share=0.05,
        final_share=0.05,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        zero_stage=0,
    )
    run_fit(
        FitRequest(
            fit_id="round=0/policy",
            kind="policy",
            round=0,
            base=str(folder / "base"),
            data=str(folder / "dataset"),
            checkpoints=str(folder / "checkpoints"),
            config=config,
        )
    )
    policy = checkpoint_directory(folder / "checkpoints" / "round=0" / "policy")
    model = new_preference_model(policy, seed=1, dtype=torch.float32)
    model.save_pretrained(folder / "ppm")
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder / "ppm")


def find_models(arguments: argparse.Namespace, folder: Path) -> Models:
    """The models and problems asked for; makes the miniature's where none are."""
    if arguments.run is not None:
        store = CheckpointStore(RunFolder(arguments.run).checkpoints)
        found = {kind: store.latest(kind) for kind in ("policy", "ppm")}
        if found["policy"] is None or found["ppm"] is None:
            sys.exit(
                f"{arguments.run}: no policy and PPM; finish the run with `rstar evolve` first"
            )
        policy, ppm = Path(found["policy"].path), Path(found["ppm"].path)
        problems = RunFolder(arguments.run).problems / "train.parquet"
        said = f"{found['policy'].version} and {found['ppm'].version} of {arguments.run}"
    elif arguments.policy is None:
        seconds = time.monotonic()
        in_own_process("cold_start", folder)
        policy = checkpoint_directory(folder / "checkpoints" / "round=0" / "policy")
        ppm, problems = folder / "ppm", folder / "problems" / "train.parquet"
        seconds = time.monotonic() - seconds
        said = f"miniature, cold start of {seconds:.0f} s; PPM with a new head"
    else:
        policy, ppm = map(checkpoint_directory, (arguments.policy, arguments.ppm))
        problems, said = arguments.problems, f"{arguments.policy}, {arguments.ppm}"
    read, _ = read_problems(problems, default_level=Level.MATH)
    return Models(
        policy=policy,
        ppm=ppm,
        problems=read[: arguments.problems_used],
        template=read_prompt_template(policy) or "short",
        said=said,
    )


def process_seconds() -> dict[int, tuple[str, float]]:
    """CPU seconds so far of this process and all below it, ended children with their parents."""
    import psutil

    found = {}
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            name = "search" if process.pid == own.pid else _role(process)
            ended = (
                0.0 if name in ("search", "ray") else times.children_user + times.children_system
            )
            found[process.pid] = (name, times.user + times.system + ended)
    return found


def _role(process: Any) -> str:
    command = " ".join(process.cmdline())
    for part, role in (
        ("ray::PolicyReplica", "policy actor"),
        ("ray::PreferenceReplica", "ppm actor"),
        ("ray::SandboxWorker", "sandbox actor"),
        ("symbolic_worker", "search"),
        ("ray", "ray"),
    ):
        if part in command:
            return role
    parent = " ".join(process.parent().cmdline())
    for part, role in (
        ("ray::PolicyReplica", "policy engine"),
        ("ray::PreferenceReplica", "ppm engine"),
    ):
        if part in parent:
            return role
    return "sandbox"


def spent_by_role(
    before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]
) -> dict[str, float]:
    """CPU seconds between two looks, summed by what a process does."""
    spent: dict[str, float] = {}
    for pid, (name, seconds) in after.items():
        spent[name] = spent.get(name, 0.0) + seconds - before.get(pid, (name, 0.0))[1]
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


@dataclass(slots=True)
class Window:
    """When a set of searches began, ran out of problems to open, and ended."""

    began_s: float = 0.0
    supplied_s: float = 0.0
    ended_s: float = 0.0


async def search_all(
    problems: Sequence[Problem],
    config: SearchConfig,
    policy: PolicyEngine,
    preference: PreferenceEngine,
    sandbox: StepSandbox,
    max_open: int,
    on_last_opened: Any = None,
) -> tuple[list[Tree], Window]:
    """Search every problem, `max_open` at a time, as a rollout worker does."""
    slots = asyncio.Semaphore(max_open)
    window = Window(began_s=time.monotonic())
    left = len(problems)

    async def one(number: int, problem: Problem) -> Tree:
        nonlocal left
        async with slots:
            left -= 1
            if not left:
                window.supplied_s = time.monotonic()
                if on_last_opened is not None:
                    await on_last_opened()
            return await run_search(
                problem,
                config=config,
                policy=policy,
                preference=preference,
                sandbox=sandbox,
                round=1,
                seed=derive_seed(1, problem.id, number),
            )

    trees = await asyncio.gather(*(one(n, problem) for n, problem in enumerate(problems)))
    window.ended_s = time.monotonic()
    return list(trees), window


class Searches:
    """The sections that need the actors, and what they hand on to each other."""

    def __init__(self, models: Models, arguments: argparse.Namespace, folder: Path) -> None:
        self.models = models
        self.max_open = arguments.open
        self.opens_code = arguments.opens_code
        engine = {"max_model_len": arguments.max_model_len, "kv_cache_gib": 1.0}
        self.search = SearchConfig(
            num_candidates=arguments.candidates,
            num_rollouts=arguments.rollouts,
            max_step_tokens=arguments.max_step_tokens,
            template=models.template,
        )
        # As `one_gpu.yaml` divides a GPU: what Ray books, and what of the memory an engine takes.
        shares = {"policy": (0.6, 0.5), "ppm": (0.4, 0.35)} if on_gpu() else {}
        self.config = ServingConfig.model_validate(
            {
                "run_dir": folder,
                "policy_engine": engine,
                "ppm_engine": engine,
                "search": self.search,
                "cluster": {
                    "sandbox": {"replicas": arguments.sandboxes},
                    **{name: {"num_gpus": booked} for name, (booked, _) in shares.items()},
                },
                **{
                    f"{name}_engine": {**engine, "gpu_memory_utilization": taken}
                    for name, (_, taken) in shares.items()
                },
            }
        )
        self.fleet = Fleet(self.config, RunFolder(folder / "run"))
        self.trees: list[Tree] = []
        self.recorder: Recorder | None = None
        self.device = ""
        self.step_s = 0.0
        self.total_cpu_s = 0.0

    async def start(self) -> None:
        (self.fleet.folder.root).mkdir(parents=True, exist_ok=True)
        policy, ppm = self.models.policy, self.models.ppm
        await self.fleet.start(policy, version="bench", learner=False)
        checkpoint = Checkpoint(kind="ppm", round=0, path=str(ppm), digest=directory_digest(ppm))
        await self.fleet.serve_preference(checkpoint)
        self._policy = self.fleet.policy._replicas["policy-0"].handle
        self.device = (await self._policy.ready.remote()).device

    def opened(self, recorder: Recorder) -> PolicyEngine:
        return OpensCode(recorder) if self.opens_code else recorder

    async def run(self) -> dict[str, Any]:
        """Search the problems; where the time went."""
        await asyncio.to_thread(start_symbolic_worker)
        recorder = self.recorder = Recorder(self.fleet.policy, self.fleet.preference)
        sandbox = self.fleet.sandbox
        alone, _ = await search_all(
            self.models.problems[:2], self.search, self.opened(recorder), recorder, sandbox, 1
        )
        first = recorder.answered[0].at_s
        steps = sum(node.expanded for tree in alone for node in tree.nodes)
        self.step_s = (time.monotonic() - first) / max(1, steps - 1)
        recorder = self.recorder = Recorder(self.fleet.policy, self.fleet.preference)
        supplied: list[Any] = []

        async def note() -> None:
            supplied.append(await self._policy.stats.remote())

        before, cpu_before = await self._policy.stats.remote(), process_seconds()
        self.trees, window = await search_all(
            self.models.problems,
            self.search,
            self.opened(recorder),
            recorder,
            sandbox,
            self.max_open,
            note,
        )
        after, cpu_after = await self._policy.stats.remote(), process_seconds()
        stop_symbolic_worker()
        spent = spent_by_role(cpu_before, cpu_after)
        self.total_cpu_s = sum(spent.values())
        whole_s = window.ended_s - window.began_s
        steady_s = window.supplied_s - window.began_s
        tokens = recorder.tokens(0.0, window.ended_s)
        rollouts = sum(tree.num_rollouts for tree in self.trees)
        nodes = sum(len(tree.nodes) - 1 for tree in self.trees)
        return {
            "device": self.device,
            "problems": len(self.models.problems),
            "open_trees": self.max_open,
            "candidates": self.search.num_candidates,
            "rollouts": self.search.num_rollouts,
            "seconds": whole_s,
            "seconds_supplied": steady_s,
            "trajectories_per_s": rollouts / whole_s,
            "tokens_per_s": recorder.tokens(0.0, window.supplied_s) / steady_s,
            "tokens_per_s_whole_run": tokens / whole_s,
            "engine_idle_share": (supplied[0].idle_s - before.idle_s) / steady_s,
            "engine_idle_share_whole_run": (after.idle_s - before.idle_s) / whole_s,
            "mean_sequences_in_flight": (supplied[0].sequence_s - before.sequence_s) / steady_s,
            "search_prefix_hit_rate": (after.cached_tokens - before.cached_tokens)
            / (after.prompt_tokens - before.prompt_tokens),
            "trees": len(self.trees),
            "nodes": nodes,
            "trajectories": rollouts,
            "generated_tokens": tokens,
            "policy_requests": len(recorder.answered),
            "solved": sum(tree.solved for tree in self.trees),
            "step_alone_s": self.step_s,
            "cpu_s": spent,
            "cores_used": self.total_cpu_s / whole_s,
        }

    def job(self, lockstep: bool) -> Job:
        """What the offline part is asked."""
        assert self.recorder is not None
        return Job(
            policy=str(self.models.policy),
            ppm=str(self.models.ppm),
            policy_engine=self.config.policy_engine,
            ppm_engine=self.config.ppm_engine,
            on_cpu=self.device == "cpu",
            requests=tuple(a.request for a in self.recorder.answered),
            problems=tuple(tree.problem for tree in self.trees),
            search=self.search,
            seeds=tuple(tree.seed for tree in self.trees),
            lockstep=lockstep,
        )

    async def modelled(self, curve: Sequence[tuple[int, float]]) -> dict[str, Any]:
        """The same search over the sandbox actors, with an engine that only sleeps."""
        assert self.recorder is not None
        cap = min(
            self.config.policy_engine.max_num_seqs or CPU_MAX_NUM_SEQS,
            self.max_open * self.search.num_candidates,
        )
        policy = ModelledPolicy(self.recorder.answered, curve, cap)
        loop = asyncio.create_task(policy.run())
        await asyncio.to_thread(start_symbolic_worker)
        trees, window = await search_all(
            self.models.problems,
            self.search,
            policy,
            RecordedPreference(self.recorder.values),
            self.fleet.sandbox,
            self.max_open,
        )
        loop.cancel()
        stop_symbolic_worker()
        same = [len(tree.nodes) for tree in trees] == [len(tree.nodes) for tree in self.trees]
        steady_s = window.supplied_s - window.began_s
        whole_s = window.ended_s - window.began_s
        ideal = tokens_per_s(curve, cap)
        supplied = sum(n for at_s, n in policy.generated if at_s <= window.supplied_s)
        return {
            "engine_utilisation_modelled": supplied / steady_s / ideal,
            "engine_utilisation_modelled_whole_run": sum(n for _, n in policy.generated)
            / whole_s
            / ideal,
            "modelled_tokens_per_s": supplied / steady_s,
            "modelled_ideal_tokens_per_s": ideal,
            "modelled_same_trees": same,
        }


# --------------------------------------------------------------------------- Ray


class Echo:
    """An actor that answers at once with what it was given."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self._replies = replies

    async def call(self, kind: str, request: Any) -> Any:
        return self._replies[kind]

    def cpu_s(self) -> float:
        return time.process_time()


EchoActor = ray.remote(num_cpus=0)(Echo)


async def ray_calls(recorder: Recorder, step_s: float) -> dict[str, Any]:
    """Latency and CPU time of the three calls of a step, records as in the search just run."""
    answered: Answered = recorder.answered[len(recorder.answered) // 2]
    texts = recorder.evaluations[len(recorder.evaluations) // 2]
    from rollout.engine import EvaluationReply
    from verifier import StepResult, StepStatus

    results = [
        StepResult(status=StepStatus.OK, state=f"policy-0/{n}", stdout="12\n") for n in texts.texts
    ]
    requests: dict[str, Any] = {
        "generate": answered.request,
        "evaluate": texts,
        "run": [text[-80:] for text in texts.texts],
    }
    replies = {
        "generate": answered.reply,
        "evaluate": EvaluationReply(values=(0.5,) * len(texts.texts)),
        "run": results,
    }
    actor: Any = EchoActor.remote(replies)
    plain = Echo(replies)

    async def step(through_ray: bool) -> None:
        for kind, request in requests.items():
            if through_ray:
                await actor.call.remote(kind, request)
            else:
                await plain.call(kind, request)

    async def latency(through_ray: bool) -> float:
        started = time.monotonic()
        for _ in range(200):
            await step(through_ray)
        return (time.monotonic() - started) / 200

    await latency(True)
    alone = await latency(True) - await latency(False)
    cpu = time.process_time(), await actor.cpu_s.remote()
    steps = 0
    for _ in range(15):
        await asyncio.gather(*(step(True) for _ in range(64)))
        steps += 64
    own, theirs = time.process_time() - cpu[0], await actor.cpu_s.remote() - cpu[1]
    ray.kill(actor)
    return {
        "ray_call_share": alone / step_s,
        "ray_ms_per_step": alone * 1e3,
        "ray_cpu_ms_per_step": (own + theirs) / steps * 1e3,
    }


# --------------------------------------------------------------------------- all together


def commit() -> str:
    """The commit of this checkout, with a mark if files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_offline(job: Job, folder: Path) -> dict[str, Any]:
    """`bench.search_offline` in a process of its own."""
    path = folder / "job.pickle"
    path.write_bytes(pickle.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "bench.search_offline", str(path)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"bench.search_offline failed with status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


async def with_actors(
    sections: Sequence[str], arguments: argparse.Namespace, folder: Path, figures: dict[str, Any]
) -> None:
    """The sections that need the actors."""
    models = await asyncio.to_thread(find_models, arguments, folder)
    figures["models"] = models.said
    searches = Searches(models, arguments, folder)
    try:
        with timed("start", figures):
            await searches.start()
        with timed("search", figures):
            figures |= await searches.run()
        assert searches.recorder is not None
        if "ray" in sections:
            with timed("ray", figures):
                figures |= await ray_calls(searches.recorder, searches.step_s)
            figures["ray_cpu_share"] = (
                figures["ray_cpu_ms_per_step"] / 1e3 * figures["policy_requests"]
            ) / searches.total_cpu_s
        if "offline" not in sections:
            return
        if "modelled" in sections:
            # Its curve comes first: the engine it stands for must not run beside it.
            await searches.fleet.stop()
            offline = await offline_figures(searches, arguments.lockstep, folder, figures)
            with timed("modelled", figures):
                searches.fleet = Fleet(searches.config, searches.fleet.folder)
                await searches.fleet.start(None, learner=False)
                figures |= await searches.modelled(offline["curve"])
        else:
            await searches.fleet.stop()
            await offline_figures(searches, arguments.lockstep, folder, figures)
    finally:
        await searches.fleet.stop()


async def offline_figures(
    searches: Searches, with_lockstep: bool, folder: Path, figures: dict[str, Any]
) -> dict[str, Any]:
    with timed("offline", figures):
        offline = await asyncio.to_thread(run_offline, searches.job(with_lockstep), folder)
    raw = offline["raw"]
    figures |= {
        "engine_utilisation": figures["tokens_per_s"] / raw["tokens_per_s"],
        "engine_utilisation_whole_run": figures["tokens_per_s_whole_run"] / raw["tokens_per_s"],
        "raw_tokens_per_s": raw["tokens_per_s"],
        "raw_tokens": raw["tokens"],
        "raw_cpu_s": raw["cpu_s"],
        "latency_curve": offline["curve"],
    }
    if not with_lockstep:
        return offline
    lockstep = offline["lockstep"]
    figures |= {
        "vs_lockstep": figures["trajectories_per_s"] / lockstep["trajectories_per_s"],
        "lockstep_trajectories_per_s": lockstep["trajectories_per_s"],
        "lockstep_trajectories": lockstep["trajectories"],
        "lockstep_stage_s": lockstep["stage_s"],
        "lockstep_utilisation": lockstep["generated_tokens"]
        / lockstep["seconds"]
        / raw["tokens_per_s"],
    }
    return offline


@contextlib.contextmanager
def timed(name: str, figures: dict[str, Any]) -> Iterator[None]:
    started = time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield
    figures.setdefault("section_s", {})[name] = round(time.monotonic() - started, 1)


def print_table(figures: dict[str, Any]) -> None:
    """Every single number, goals beside those that have one."""
    for name, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown = f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
            print(f"{name:42s} {shown:>14s}   {GOALS.get(name, '')}")
        elif isinstance(value, str):
            print(f"{name:42s} {value}")
    spent = figures.get("cpu_s", {})
    total = sum(spent.values())
    for name, seconds in spent.items():
        print(f"  CPU of {name:33s} {seconds:14.1f} s  {seconds / total:5.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run, as runs/demo")
    parser.add_argument("--policy", type=Path, help="policy checkpoint")
    parser.add_argument("--ppm", type=Path, help="PPM checkpoint")
    parser.add_argument("--problems", type=Path, help="problem file")
    parser.add_argument("--problems-used", type=int, default=80, help="first so many problems")
    parser.add_argument("--open", type=int, default=40, help="trees open at a time")
    parser.add_argument("--candidates", type=int, default=8, help="of an expansion")
    parser.add_argument("--rollouts", type=int, default=8, help="of a tree")
    parser.add_argument("--max-step-tokens", type=int, default=64, help="of a candidate")
    parser.add_argument("--max-model-len", type=int, default=512, help="of both engines")
    parser.add_argument("--sandboxes", type=int, default=1, help="sandbox actors")
    parser.add_argument(
        "--no-lockstep", dest="lockstep", action="store_false", help="leave that driver out"
    )
    parser.add_argument(
        "--opens-code", action="store_true", help="for a policy that writes anything"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    models = (arguments.policy, arguments.ppm, arguments.problems)
    if any(models) and not all(models):
        parser.error("give --policy, --ppm and --problems together")
    if arguments.run and any(models):
        parser.error("give either --run or --policy, --ppm and --problems")
    quiet_logging(verbose=False)
    figures: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-search-") as temporary:
        folder = Path(temporary)
        if "bookkeeping" in arguments.only:
            with timed("bookkeeping", figures):
                figures |= bookkeeping()
        if "prefix" in arguments.only:
            with timed("prefix", figures):
                figures |= json.loads(in_own_process("prefix", folder))
        if set(arguments.only) & {"search", "ray", "offline", "modelled"}:
            asyncio.run(with_actors(arguments.only, arguments, folder, figures))
    figures |= {
        "seconds_in_all": time.monotonic() - began,
        "load_average": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
