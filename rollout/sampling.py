"""Solutions without a tree: whole programs sampled at once, run, then answered.

The baselines of search: greedy (one sample at temperature 0), majority vote and best-of-N (several
samples). Same prompts, sandbox, PPM and accounting as `rollout.search`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollout.engine import (
    EvaluationRequest,
    GenerationReply,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
)
from rollout.problem import Problem
from rollout.prompt import (
    END_OF_ANSWER,
    END_OF_CODE,
    END_OF_STEP,
    PromptTemplate,
    Step,
    StepKind,
    parse_step,
    render_prompt,
)
from rollout.search import SearchError, StepSandbox
from rollout.seeds import derive_seed
from verifier.sandbox import INFRASTRUCTURE_STATUSES, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One sampled program, its output and the answer it led to."""

    steps: tuple[Step, ...]
    answer: str | None
    """None: the code failed, or no answer could be read."""
    value: float | None
    """PPM value of the whole solution; None: not scored."""
    num_tokens: int
    """Generated tokens, the answer included."""
    status: str
    """Sandbox status of the program; "" if none was written."""


async def sample_solutions(
    problem: Problem,
    *,
    num_samples: int,
    temperature: float,
    max_tokens: int,
    template: PromptTemplate,
    policy: PolicyEngine,
    preference: PreferenceEngine | None,
    sandbox: StepSandbox,
    seed: int,
) -> list[Solution]:
    """Sample `num_samples` complete solutions; `temperature` 0 with one sample is greedy.

    Raises:
        EngineError, SearchError: a part of the system failed.
    """
    prompt = render_prompt(problem.text, [], template)
    reply = await policy.generate(
        GenerationRequest(
            prompt=prompt,
            num_candidates=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            stop=(END_OF_CODE, END_OF_ANSWER),
            seed=derive_seed(seed, "program"),
            routing_key=problem.id,
        )
    )
    programs = [_split_program(completion.text) for completion in reply.completions]
    results = await _run_programs(problem, programs, sandbox, seed)
    solutions = await asyncio.gather(
        *(
            _finish(problem, steps, result, tokens, temperature, template, policy, seed, number)
            for number, (steps, result, tokens) in enumerate(
                zip(programs, results, _token_counts(reply), strict=True)
            )
        )
    )
    if preference is None:
        return list(solutions)
    answered = [s for s in solutions if s.answer is not None]
    if not answered:
        return list(solutions)
    values = await preference.evaluate(
        EvaluationRequest(
            texts=tuple(render_prompt(problem.text, s.steps, template) for s in answered),
            routing_key=problem.id,
        )
    )
    valued = {id(s): v for s, v in zip(answered, values.values, strict=True) if math.isfinite(v)}
    return [replace(s, value=valued.get(id(s))) for s in solutions]


def _token_counts(reply: GenerationReply) -> list[int]:
    return [completion.num_tokens for completion in reply.completions]


def _split_program(text: str) -> list[Step]:
    """Steps of a program generated in one piece; [] if it does not end with <end_of_code>."""
    if not text.endswith(END_OF_CODE):
        return []
    parts = text.split(END_OF_STEP)
    return [parse_step(part + END_OF_STEP) for part in parts[:-1]] + [parse_step(parts[-1])]


async def _run_programs(
    problem: Problem, programs: Sequence[list[Step]], sandbox: StepSandbox, seed: int
) -> list[StepResult | None]:
    """Run each whole program on a fresh state; None where there is none to run."""
    codes = ["\n".join(step.code for step in steps) for steps in programs]
    runnable = [code for code in codes if code.strip()]
    if not runnable:
        return [None] * len(programs)
    tree_id = f"sample/{problem.id}/{seed}"
    root = await sandbox.open(tree_id)
    try:
        results = iter(await sandbox.run(root, runnable))
    finally:
        await sandbox.close(tree_id)
    ordered = [next(results) if code.strip() else None for code in codes]
    for result in ordered:
        if result is not None and result.status in INFRASTRUCTURE_STATUSES:
            raise SearchError(f"sandbox failed on problem {problem.id}: {result.error_message}")
    return ordered


async def _finish(
    problem: Problem,
    steps: list[Step],
    result: StepResult | None,
    num_tokens: int,
    temperature: float,
    template: PromptTemplate,
    policy: PolicyEngine,
    seed: int,
    number: int,
) -> Solution:
    """Let the policy state the answer of one program that ran."""
    status = result.status if result is not None else ""
    if result is None or status != "ok":
        return Solution(
            steps=tuple(steps), answer=None, value=None, num_tokens=num_tokens, status=status
        )
    steps = [*steps[:-1], replace(steps[-1], output=result.stdout)]
    reply = await policy.generate(
        GenerationRequest(
            prompt=render_prompt(problem.text, steps, template),
            num_candidates=1,
            max_tokens=256,
            temperature=temperature,
            stop=(END_OF_ANSWER,),
            seed=derive_seed(seed, "answer", number),
            routing_key=problem.id,
        )
    )
    completion = reply.completions[0]
    answer_step = parse_step(completion.text)
    answer = answer_step.answer if answer_step.kind is StepKind.ANSWER else None
    return Solution(
        steps=(*steps, answer_step),
        answer=answer,
        value=None,
        num_tokens=num_tokens + completion.num_tokens,
        status=status,
    )
