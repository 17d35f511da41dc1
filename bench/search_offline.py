"""The part of the search bench that uses vLLM with no search around it; started by `bench.search`.

    python -m bench.search_offline JOB      reads a pickled `Job`, prints one JSON line

Three things, in one process with one policy engine: the recorded prompts of a search in one offline
`generate` call (the most this engine can do), the engine's latency curve, and the lock-step driver:
the same searches with the same engine, where every tree waits for every other at each stage.

The lock-step driver does as the released code (microsoft/rStar): one blocking generation call for
all trees, then a fresh pool of 12 processes that runs the code of each candidate after all of its
ancestors', then one blocking call that values all candidates; neither engine finds anything in a
prefix cache (but the candidates of one prompt share its prefill). In its favour: only code and
output go to and from the pool, not whole trees; values are one number each; there is no isolation.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.search_engines import Barrier
from cluster.engines.arguments import (
    CPU_MAX_NUM_SEQS,
    decode_continuation,
    engine_arguments,
    engine_environment,
    plan_stops,
    sampling_arguments,
)
from cluster.engines.config import EngineConfig
from cluster.engines.model_check import check_policy_checkpoint, check_preference_checkpoint
from rollout.engine import (
    EvaluationReply,
    EvaluationRequest,
    GenerationReply,
    GenerationRequest,
    cut_completion,
)
from rollout.problem import Problem
from rollout.search import SearchConfig, run_search
from verifier import StepResult, StepStatus

CURVE_POINTS = (1, 8, 16, 32, 64, 128, 192, 256)
CURVE_TOKENS = 48
POOL_WORKERS = 12
"""Of each fresh pool, as in the released code."""

POOL_TIMEOUT_S = 10
"""Of one candidate's code, its ancestors' included."""


@dataclass(frozen=True)
class Job:
    """What to measure."""

    policy: str
    ppm: str
    policy_engine: EngineConfig
    ppm_engine: EngineConfig
    on_cpu: bool
    requests: tuple[GenerationRequest, ...]
    """Of a search, for the raw rate and the curve."""
    problems: tuple[Problem, ...]
    search: SearchConfig
    seeds: tuple[int, ...]
    """Of the lock-step trees, one a problem."""
    lockstep: bool


class OfflinePolicy:
    """vLLM's offline engine with the replica's settings."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        info = check_policy_checkpoint(job.policy)
        arguments = engine_arguments(job.policy_engine, info, runner="generate", on_cpu=job.on_cpu)
        self.llm: Any = LLM(**arguments)
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.special = dict(self.tokenizer.get_added_vocab())

    def run(self, requests: Sequence[GenerationRequest]) -> tuple[list[Any], list[list[int]]]:
        """vLLM's outputs and prompt ids, all requests in one call."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompts = [self.tokenizer.encode(request.prompt) for request in requests]
        parameters = []
        for request, ids in zip(requests, prompts, strict=True):
            stops = plan_stops(request.stop, self.special)
            arguments = sampling_arguments(
                request, stops, room=self.max_model_len - len(ids), logprobs=False
            )
            parameters.append(SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY))
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, parameters, use_tqdm=False), prompts

    def answer(self, requests: Sequence[GenerationRequest]) -> list[GenerationReply]:
        """As a replica answers, all at once."""
        outputs, prompts = self.run(requests)
        replies = []
        for request, output, ids in zip(requests, outputs, prompts, strict=True):
            completions = tuple(
                cut_completion(
                    decode_continuation(self.tokenizer, ids, list(choice.token_ids)),
                    stop=request.stop,
                    stopped=choice.finish_reason == "stop",
                    end_of_sequence=self.tokenizer.decode(
                        choice.token_ids[-1:], skip_special_tokens=False
                    ),
                    num_tokens=len(choice.token_ids),
                    logprob=None,
                )
                for choice in output.outputs
            )
            replies.append(GenerationReply(completions=completions, prompt_tokens=len(ids)))
        return replies

    def reset(self) -> None:
        self.llm.reset_prefix_cache()


class OfflinePreference:
    """vLLM's offline pooling engine without a prefix cache."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        info = check_preference_checkpoint(job.ppm)
        arguments = engine_arguments(job.ppm_engine, info, runner="pooling", on_cpu=job.on_cpu)
        self.llm: Any = LLM(**arguments | {"enable_prefix_caching": False})
        self.tokenizer = self.llm.get_tokenizer()

    def answer(self, requests: Sequence[EvaluationRequest]) -> list[EvaluationReply]:
        from vllm import PoolingParams

        rows = [self.tokenizer.encode(text) for request in requests for text in request.texts]
        outputs = self.llm.encode(
            [{"prompt_token_ids": row} for row in rows],
            pooling_params=PoolingParams(task="classify", use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
        values = iter(math.tanh(float(output.outputs.data.squeeze())) for output in outputs)
        return [
            EvaluationReply(values=tuple(next(values) for _ in request.texts))
            for request in requests
        ]


# --------------------------------------------------------------------------- measurements


def raw_rate(policy: OfflinePolicy, requests: Sequence[GenerationRequest]) -> dict[str, float]:
    """Tokens per second of the recorded requests in one call, from an empty prefix cache."""
    policy.run(requests[:16])
    policy.reset()
    started, cpu = time.monotonic(), time.process_time()
    outputs, _ = policy.run(requests)
    seconds = time.monotonic() - started
    tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_s": time.process_time() - cpu,
        "tokens_per_s": tokens / seconds,
    }


def latency_curve(
    policy: OfflinePolicy, requests: Sequence[GenerationRequest], most: int
) -> list[tuple[int, float]]:
    """Tokens per second at numbers of sequences in flight, prompts in the prefix cache."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=CURVE_TOKENS, ignore_eos=True, temperature=1.0, seed=1, detokenize=False
    )
    prompts = [policy.tokenizer.encode(request.prompt) for request in requests]
    prompts = [ids for ids in prompts if len(ids) + CURVE_TOKENS <= policy.max_model_len]
    curve = []
    for in_flight in CURVE_POINTS:
        if in_flight > most:
            break
        chosen = [{"prompt_token_ids": prompts[i % len(prompts)]} for i in range(in_flight)]
        policy.llm.generate(chosen, parameters, use_tqdm=False)
        started = time.monotonic()
        policy.llm.generate(chosen, parameters, use_tqdm=False)
        curve.append((in_flight, in_flight * CURVE_TOKENS / (time.monotonic() - started)))
    return curve


# --------------------------------------------------------------------------- lock step


def run_codes(path: tuple[str, ...], codes: list[str]) -> list[tuple[bool, str]]:
    """Each candidate of one tree after all of its ancestors' code: whether it ran, its output."""
    signal.signal(signal.SIGALRM, _time_is_up)
    return [_run_code(path, code) for code in codes]


def _run_code(path: tuple[str, ...], code: str) -> tuple[bool, str]:
    signal.alarm(POOL_TIMEOUT_S)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for ancestor in path:
                exec(compile(ancestor, "<path>", "exec"), namespace)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "<candidate>", "exec"), namespace)
    except BaseException as error:
        return False, type(error).__name__
    finally:
        signal.alarm(0)
    return True, printed.getvalue()


def _time_is_up(*_: object) -> None:
    raise TimeoutError


class LockStepTrees:
    """One driver for all trees: policy, PPM and sandbox that wait for each other."""

    def __init__(self, policy: OfflinePolicy, preference: OfflinePreference) -> None:
        self._policy = policy
        self.barrier = Barrier(
            {"execute": self._execute, "evaluate": preference.answer, "generate": self._generate}
        )
        self._paths: dict[str, tuple[str, ...]] = {}

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        return await self.barrier.ask("generate", request)

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        return await self.barrier.ask("evaluate", request)

    async def open(self, tree_id: str) -> str:
        self._paths[tree_id] = ()
        return tree_id

    async def run(self, state: str, codes: Sequence[str]) -> list[StepResult]:
        return await self.barrier.ask("execute", (state, list(codes)))

    async def close(self, tree_id: str) -> None:
        return None

    def _generate(self, requests: list[GenerationRequest]) -> list[GenerationReply]:
        self._policy.reset()
        return self._policy.answer(requests)

    def _execute(self, requests: list[tuple[str, list[str]]]) -> list[list[StepResult]]:
        # Forked from the process that holds the engines, as the released code does.
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(POOL_WORKERS, mp_context=fork) as pool:
            paths = [self._paths[state] for state, _ in requests]
            outcomes = list(pool.map(run_codes, paths, [codes for _, codes in requests]))
        return [
            [self._result(state, code, *outcome) for code, outcome in zip(codes, ran, strict=True)]
            for (state, codes), ran in zip(requests, outcomes, strict=True)
        ]

    def _result(self, state: str, code: str, ran: bool, printed: str) -> StepResult:
        if not ran:
            return StepResult(status=StepStatus.ERROR, state=None, error_type=printed)
        after = f"{state}/{len(self._paths)}"
        self._paths[after] = (*self._paths[state], code)
        return StepResult(status=StepStatus.OK, state=after, stdout=printed)


async def run_lockstep(job: Job, trees: LockStepTrees) -> dict[str, Any]:
    """All searches at once, in lock step."""
    started = time.monotonic()
    searched = await trees.barrier.run(
        [
            run_search(
                problem,
                config=job.search,
                policy=trees,
                preference=trees,
                sandbox=trees,
                round=1,
                seed=seed,
            )
            for problem, seed in zip(job.problems, job.seeds, strict=True)
        ]
    )
    seconds = time.monotonic() - started
    rollouts = sum(tree.num_rollouts for tree in searched)
    return {
        "seconds": seconds,
        "trajectories": rollouts,
        "trajectories_per_s": rollouts / seconds,
        "generated_tokens": sum(tree.generated_tokens for tree in searched),
        "stage_s": trees.barrier.seconds,
    }


def main() -> None:
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    for name, value in engine_environment(job.policy_engine, on_cpu=job.on_cpu).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    policy = OfflinePolicy(job)
    figures: dict[str, Any] = {"raw": raw_rate(policy, job.requests)}
    most = job.policy_engine.max_num_seqs or CPU_MAX_NUM_SEQS
    figures["curve"] = latency_curve(policy, job.requests, most)
    if job.lockstep:
        preference = OfflinePreference(job)
        figures["lockstep"] = asyncio.run(run_lockstep(job, LockStepTrees(policy, preference)))
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
