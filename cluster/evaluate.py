"""Held-out accuracy of a policy and its PPM: greedy, majority vote, best-of-N and search.

Majority, best-of-N and search get the same budget for each problem: search may start rollouts until
it has generated as many tokens as the N samples did. All four use the engines, sandbox and answer
check of the rollouts; a problem that yields no answer counts as wrong.

Not covered: benchmark suites, confidence intervals and curves over budgets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.config import EvaluationConfig
from cluster.report import shares_by_level
from rollout.engine import PolicyEngine, PreferenceEngine
from rollout.problem import Problem
from rollout.sampling import Solution, sample_solutions
from rollout.search import SearchConfig, StepSandbox, TerminalValue, grade_any, run_search
from rollout.seeds import derive_seed
from rollout.tree import Tree
from verifier.accuracy import best_by_value, majority_vote
from verifier.verify import start_symbolic_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemEvaluation:
    """Verdicts on one held-out problem; None: the method was not run on it."""

    problem_id: str
    level: str
    greedy: bool
    majority: bool | None = None
    best_of_n: bool | None = None
    search: bool | None = None
    any_sample: bool | None = None
    """Some sample was right: what a perfect choice among them would reach."""
    any_search: bool | None = None
    greedy_tokens: int = 0
    sample_tokens: int = 0
    search_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One round's held-out results."""

    round: int
    problems: tuple[ProblemEvaluation, ...]

    def shares(self, method: str) -> dict[str, float | None] | None:
        """Share right per level and overall; None if the method was not run."""
        outcomes = [
            (p.level, bool(getattr(p, method)))
            for p in self.problems
            if getattr(p, method) is not None
        ]
        return shares_by_level(outcomes) if outcomes else None

    def as_record(self) -> dict[str, Any]:
        """Plain data; `from_record` is its inverse."""
        return {"round": self.round, "problems": [asdict(p) for p in self.problems]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Evaluation:
        return cls(
            round=record["round"],
            problems=tuple(ProblemEvaluation(**row) for row in record["problems"]),
        )


def balanced(problems: Sequence[Problem], count: int | None) -> list[Problem]:
    """The first `count` problems, taken in turn from each level; all if None."""
    if count is None or count >= len(problems):
        return list(problems)
    queues: dict[str, list[Problem]] = {}
    for problem in problems:
        queues.setdefault(problem.level.value, []).append(problem)
    chosen: list[Problem] = []
    position = 0
    while len(chosen) < count:
        for queue in queues.values():
            if position < len(queue) and len(chosen) < count:
                chosen.append(queue[position])
        position += 1
    return chosen


async def evaluate(
    problems: Sequence[Problem],
    *,
    config: EvaluationConfig,
    search: SearchConfig,
    round: int,
    seed: int,
    policy: PolicyEngine,
    preference: PreferenceEngine | None,
    sandbox: StepSandbox,
    max_open: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate a round's models on held-out problems; greedy alone without a PPM.

    Args:
        search: its template and token limits; rollouts are bounded by the token budget alone.
        max_open: problems in flight.
        on_done: told (finished, total) after each problem.
    Raises:
        EngineError, SearchError: a part of the system failed.
    """
    # A symbolic question that has to wait for its process would end undecided.
    await asyncio.to_thread(start_symbolic_worker)
    chosen = balanced(problems, config.num_problems)
    searched = {p.id for p in balanced(chosen, config.num_search_problems)}
    slots = asyncio.Semaphore(max_open)
    done = 0

    async def one(problem: Problem) -> ProblemEvaluation:
        nonlocal done
        async with slots:
            result = await _evaluate_problem(
                problem,
                config=config,
                search=search,
                round=round,
                seed=derive_seed(seed, "evaluate", round, problem.id),
                policy=policy,
                preference=preference if problem.id in searched else None,
                sandbox=sandbox,
            )
        done += 1
        on_done(done, len(chosen))
        return result

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(problem)) for problem in chosen]
    return Evaluation(round=round, problems=tuple(task.result() for task in tasks))


async def _evaluate_problem(
    problem: Problem,
    *,
    config: EvaluationConfig,
    search: SearchConfig,
    round: int,
    seed: int,
    policy: PolicyEngine,
    preference: PreferenceEngine | None,
    sandbox: StepSandbox,
) -> ProblemEvaluation:
    def sample(count: int, temperature: float, name: str) -> Any:
        return sample_solutions(
            problem,
            num_samples=count,
            temperature=temperature,
            max_tokens=config.max_solution_tokens,
            template=search.prompt_template,
            policy=policy,
            preference=preference if count > 1 else None,
            sandbox=sandbox,
            seed=derive_seed(seed, name),
        )

    (greedy,) = await sample(1, 0.0, "greedy")
    first = ProblemEvaluation(
        problem_id=problem.id,
        level=problem.level.value,
        greedy=await _right(problem, greedy.answer),
        greedy_tokens=greedy.num_tokens,
    )
    if preference is None:
        return first
    samples: list[Solution] = await sample(config.num_samples, search.temperature, "samples")
    answers = [s.answer for s in samples]
    values = [s.value if s.value is not None else -1.0 for s in samples]
    budget = sum(s.num_tokens for s in samples)
    tree = await run_search(
        problem,
        config=search.model_copy(
            update={
                "num_candidates": config.num_candidates,
                "num_rollouts": 10_000,
                "max_generated_tokens": budget,
                "terminal_value": TerminalValue.PREFERENCE,
            }
        ),
        policy=policy,
        preference=preference,
        sandbox=sandbox,
        round=round,
        index=-1,
        seed=derive_seed(seed, "search"),
    )
    return ProblemEvaluation(
        problem_id=first.problem_id,
        level=first.level,
        greedy=first.greedy,
        majority=await _right(problem, majority_vote(answers, seed=seed)),
        best_of_n=await _right(problem, best_by_value(answers, values, seed=seed)),
        search=await _right(problem, chosen_answer(tree, config.vote_top_k, seed)),
        any_sample=any([await _right(problem, answer) for answer in answers]),
        any_search=tree.solved,
        greedy_tokens=first.greedy_tokens,
        sample_tokens=budget,
        search_tokens=tree.generated_tokens,
    )


def chosen_answer(tree: Tree, top_k: int, seed: int) -> str | None:
    """The answer of a test-time search: majority vote of the `top_k` answers by PPM value.

    Source: the released evaluation (top_n 4); ties by value, then seed.
    """
    found = [n for n in tree.answers() if n.visit_count > 0 and n.step is not None]
    return majority_vote(
        [n.step.answer if n.step is not None else None for n in found],
        values=[n.value if n.value is not None else -1.0 for n in found],
        top_k=top_k,
        seed=seed,
    )


async def _right(problem: Problem, answer: str | None) -> bool:
    if answer is None:
        return False
    verdict = await asyncio.to_thread(grade_any, problem, answer)
    return verdict is not None and verdict.equal
