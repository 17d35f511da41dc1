"""Solutions without a tree: whole programs sampled at once, run, then answered.

The baselines of search: greedy (one sample at temperature 0), majority vote and best-of-N (several
samples). Same prompts, sandbox, PPM and accounting as `rollout.search`.

A model that was never taught our steps is asked in its own words (`sample_texts`): its whole
completion is one step, and the answer is read out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollout.engine import (
    Completion,
    EvaluationRequest,
    FinishReason,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
    values_of,
)
from rollout.problem import Problem
from rollout.prompt import (
    END_OF_ANSWER,
    END_OF_CODE,
    END_OF_STEP,
    MARKERS,
    PromptTemplate,
    Step,
    StepKind,
    read_completion,
    render_prompt,
    training_template,
)
from rollout.search import StepSandbox, run_codes
from rollout.seeds import derive_seed
from rollout.tasks import all_of
from verifier import extract_answer
from verifier.sandbox import StepResult

MAX_ANSWER_TOKENS = 256
"""Generated tokens of the sentence that states the answer of a program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One finished attempt at a problem: steps, their output and the answer they led to."""

    steps: tuple[Step, ...]
    answer: str | None
    """None: the code failed, or no answer could be read."""
    value: float | None
    """PPM value of the whole solution; None: not scored."""
    num_tokens: int
    """Generated tokens, the answer included."""
    status: str
    """Sandbox status of the program; "" if none was written."""
    seed: int = 0
    """Of the request or search it comes from."""
    finish: FinishReason = FinishReason.STOP
    """Why its program (of `sample_texts`: its text) ended."""
    error: str = ""
    """What the program raised, as "TypeName: message"; "" if it ran."""
    share: float = 1.0
    """What it stands for among all that the policy would write: of a sample 1; of an answer of a
    tree its part of it (`rollout.tree.solution_shares`)."""
    logprob: float | None = None
    """Sum of the log-probabilities of its `num_tokens` tokens under the policy; None: the engine
    was not asked for them."""

    @property
    def mean_logprob(self) -> float | None:
        """Of a token, in nats."""
        return None if self.logprob is None else self.logprob / max(self.num_tokens, 1)


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
    top_p: float = 1.0,
) -> list[Solution]:
    """Sample `num_samples` complete solutions; `temperature` 0 with one sample is greedy.

    Raises:
        EngineError, SearchError: a part of the system failed.
    """
    request = GenerationRequest(
        prompt=render_prompt(problem.text, [], template),
        num_candidates=num_samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=tuple(mark for mark in template.stop if mark != END_OF_STEP),
        seed=derive_seed(seed, "program"),
        routing_key=problem.id,
    )
    completions = (await policy.generate(request)).completions
    programs = [_split_program(completion.text, template) for completion in completions]
    results = await _run_programs(problem, programs, sandbox, seed)

    async def answer(number: int) -> Solution:
        """Let the policy state the answer of one program, if it ran."""
        solution = _unanswered(programs[number], results[number], completions[number], seed)
        if solution.status != "ok":
            return solution
        asked = replace(
            request,
            prompt=render_prompt(problem.text, solution.steps, template),
            num_candidates=1,
            max_tokens=MAX_ANSWER_TOKENS,
            stop=tuple(mark for mark in request.stop if mark != END_OF_CODE),
            seed=derive_seed(seed, "answer", number),
        )
        completion = (await policy.generate(asked)).completions[0]
        step = read_completion(completion.text, template, solution.steps[-1])
        return replace(
            solution,
            steps=(*solution.steps, step),
            answer=step.answer if step.kind is StepKind.ANSWER else None,
            num_tokens=solution.num_tokens + completion.num_tokens,
            logprob=None
            if solution.logprob is None or completion.logprob is None
            else solution.logprob + completion.logprob,
        )

    solutions = await all_of(map(answer, range(len(programs))))
    answered = [s for s in solutions if s.answer]
    if preference is None or not answered:
        return solutions
    valued_as = training_template(template)
    texts = tuple(render_prompt(problem.text, s.steps, valued_as) for s in answered)
    valued = EvaluationRequest(texts=texts, routing_key=problem.id)
    values = iter(values_of(valued, await preference.evaluate(valued)))
    return [replace(s, value=next(values)) if s.answer else s for s in solutions]


async def sample_texts(
    problem: Problem,
    *,
    num_samples: int,
    temperature: float,
    max_tokens: int,
    prompt: str,
    policy: PolicyEngine,
    seed: int,
    top_p: float = 1.0,
) -> list[Solution]:
    """Sample `num_samples` plain chains of thought of a model with a format of its own.

    Each is one answer step: the completion as it is, which must end by itself, and the answer it
    states last (`verifier.extract_answer`).

    Args:
        prompt: what the model is to continue, `{question}` in place of the question.
    Raises:
        EngineError: the engine failed.
    """
    reply = await policy.generate(
        GenerationRequest(
            prompt=prompt.replace("{question}", problem.text.strip()),
            num_candidates=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=derive_seed(seed, "text"),
            routing_key=problem.id,
        )
    )
    return [_read_text(completion, seed) for completion in reply.completions]


def _read_text(completion: Completion, seed: int) -> Solution:
    text = completion.text
    for marker in MARKERS:
        text = text.replace(marker, "")
    answer = extract_answer(text) if completion.finish is FinishReason.STOP else None
    step = Step(kind=StepKind.ANSWER, text=text + END_OF_ANSWER, answer=answer)
    return Solution(
        steps=(step,),
        answer=answer,
        value=None,
        num_tokens=completion.num_tokens,
        status="",
        seed=seed,
        finish=completion.finish,
    )


def _split_program(text: str, template: PromptTemplate) -> list[Step]:
    """Steps of a program generated in one piece; it is whole if the last is LAST_CODE."""
    *first, last = text.split(END_OF_STEP)
    steps: list[Step] = []
    for part in (*(part + END_OF_STEP for part in first), last):
        steps.append(read_completion(part, template, steps[-1] if steps else None))
    return steps


async def _run_programs(
    problem: Problem, programs: Sequence[list[Step]], sandbox: StepSandbox, seed: int
) -> list[StepResult | None]:
    """Run each whole program on a fresh state, equal ones once; None where there is none to run."""
    whole = [steps if steps[-1].kind is StepKind.LAST_CODE else [] for steps in programs]
    codes = ["\n".join(step.code for step in steps) for steps in whole]
    runnable = list(dict.fromkeys(code for code in codes if code.strip()))
    if not runnable:
        return [None] * len(programs)
    tree_id = f"sample/{problem.id}/{seed}"
    root = await sandbox.open(tree_id)
    try:
        results = await run_codes(sandbox, root, runnable, problem_id=problem.id)
    finally:
        await sandbox.close(tree_id)
    found = dict(zip(runnable, results, strict=True))
    return [found.get(code) for code in codes]


def _unanswered(
    steps: Sequence[Step], result: StepResult | None, completion: Completion, seed: int
) -> Solution:
    """A program and what came of running it (None: it was not run)."""
    ok = result is not None and result.status == "ok"
    if result is not None and ok:
        steps = [*steps[:-1], replace(steps[-1], output=result.stdout)]
    return Solution(
        steps=tuple(steps),
        answer=None,
        value=None,
        num_tokens=completion.num_tokens,
        status=result.status if result is not None else "",
        seed=seed,
        finish=completion.finish,
        logprob=completion.logprob,
        error="" if result is None or ok else f"{result.error_type}: {result.error_message}",
    )
