"""Step beam search: the paths that the PPM values most go on, all others end.

    root --n candidates--> run --> value --> best `width` --n candidates each--> run --> ...
                                                 |
                                              answers are finished and take their place with them

Candidates of all paths are ranked together, answers and open steps alike; the beam is narrowed by
each answer that was kept, so a search ends with at most `width` solutions. Prompts, step parsing
and execution are those of `rollout.search`; a candidate that is no step, or whose code fails, is
dropped. Width 8 and 8 candidates are the released step-beam setting (microsoft/rStar).

Unlike the released code, a finished path cannot be given another path's continuation: candidates
carry their own path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from rollout.engine import (
    EvaluationRequest,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
    values_of,
)
from rollout.problem import Problem
from rollout.prompt import Step, StepKind, read_completion, render_prompt
from rollout.sampling import Solution
from rollout.search import (
    SearchConfig,
    StepSandbox,
    discard_reason,
    only_answer_follows,
    run_codes,
    same_answers,
)
from rollout.seeds import derive_seed
from rollout.tasks import all_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Path:
    """A partial solution whose code ran."""

    steps: tuple[Step, ...] = ()
    state: str | None
    """The interpreter after its steps; None for a finished path."""
    value: float | None = None
    num_tokens: int = 0

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.steps[-1].kind is StepKind.ANSWER


async def search_beam(
    problem: Problem,
    *,
    width: int,
    num_candidates: int,
    config: SearchConfig,
    policy: PolicyEngine,
    preference: PreferenceEngine,
    sandbox: StepSandbox,
    seed: int,
    spent: Callable[[], bool] = lambda: False,
    on_finished: Callable[[Solution], None] = lambda solution: None,
) -> list[Solution]:
    """Search one problem; returns the solutions in the order they were finished.

    Args:
        width: paths kept after each step.
        num_candidates: of each path at each step.
        config: sampling, depth and template; its own numbers of candidates and rollouts do not
            apply, but `num_answer_candidates` does.
        spent: whether the token budget is used up, asked before each step. Then the search ends,
            or, if nothing was finished so far, goes on with its best path alone.
        on_finished: told of each solution as it is finished.
    Raises:
        EngineError, SearchError: a part failed; nothing of the problem is at fault.
    """
    tree_id = f"beam/{problem.id}/{seed}"
    finished: list[Solution] = []
    beam = [_Path(state=await sandbox.open(tree_id))]
    search = _Beam(problem, num_candidates, config, policy, preference, sandbox, seed)
    try:
        for depth in range(config.max_depth):
            if spent():
                beam = [] if finished else beam[:1]
            if not beam:
                break
            grown = await all_of(search.grow(path, depth, n) for n, path in enumerate(beam))
            ranked = sorted((path for paths in grown for path in paths), key=_worst_last)
            kept = ranked[: width - len(finished)]
            for path in kept:
                if path.finished:
                    finished.append(_solution(path, seed))
                    on_finished(finished[-1])
            beam = [path for path in kept if not path.finished]
    finally:
        await sandbox.close(tree_id)
    return finished


def _solution(path: _Path, seed: int) -> Solution:
    return Solution(
        steps=path.steps,
        answer=path.steps[-1].answer,
        value=path.value,
        num_tokens=path.num_tokens,
        status="ok",
        seed=seed,
    )


def _worst_last(path: _Path) -> float:
    return -path.value if path.value is not None else math.inf


@dataclass(frozen=True, slots=True)
class _Beam:
    """What every path of one beam search is grown with."""

    problem: Problem
    num_candidates: int
    config: SearchConfig
    policy: PolicyEngine
    preference: PreferenceEngine
    sandbox: StepSandbox
    seed: int

    async def grow(self, path: _Path, depth: int, place: int) -> list[_Path]:
        """The valid candidates that follow `path`, valued."""
        grown = await self._execute(path, await self._generate(path, depth, place))
        if not grown:
            return []
        template = self.config.training_template
        texts = tuple(render_prompt(self.problem.text, child.steps, template) for child in grown)
        request = EvaluationRequest(texts=texts, routing_key=self.problem.id)
        values = values_of(request, await self.preference.evaluate(request))
        return [replace(child, value=value) for child, value in zip(grown, values, strict=True)]

    async def _generate(self, path: _Path, depth: int, place: int) -> list[_Path]:
        """Candidates that can follow, not executed yet; of answers that say the same the first."""
        config, template = self.config, self.config.prompt_template
        previous = path.steps[-1] if path.steps else None
        answers_only = config.num_answer_candidates if only_answer_follows(previous) else None
        reply = await self.policy.generate(
            GenerationRequest(
                prompt=render_prompt(self.problem.text, path.steps, template),
                num_candidates=answers_only or self.num_candidates,
                max_tokens=config.max_step_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                stop=template.stop,
                seed=derive_seed(self.seed, depth, place),
                routing_key=self.problem.id,
            )
        )
        children: dict[str, _Path] = {}
        for completion in reply.completions:
            step = read_completion(completion.text, template, previous)
            unfit = discard_reason(step, previous, config.max_repeats)
            if step.text not in children and unfit is None:
                children[step.text] = _Path(
                    steps=(*path.steps, step),
                    state=None,
                    num_tokens=path.num_tokens + completion.num_tokens,
                )
        answers = [child for child in children.values() if child.finished]
        groups = await same_answers([path.steps[-1].answer or "" for path in answers])
        repeated = {answers[n].steps[-1].text for _, *others in groups for n in others}
        return [child for text, child in children.items() if text not in repeated]

    async def _execute(self, path: _Path, children: list[_Path]) -> list[_Path]:
        """The children whose code ran to its end, with state and output; answers as they are."""
        codes = [child.steps[-1].code for child in children if not child.finished]
        if not codes:
            return children
        assert path.state is not None
        ran = await run_codes(self.sandbox, path.state, codes, problem_id=self.problem.id)
        results = iter(ran)
        done = []
        for child in children:
            step = child.steps[-1]
            if child.finished:
                done.append(child)
            elif (result := next(results)).status == "ok":
                if step.kind is StepKind.LAST_CODE:
                    step = replace(step, output=result.stdout)
                done.append(replace(child, steps=(*path.steps, step), state=result.state))
        return done
