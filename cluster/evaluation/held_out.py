"""Held-out accuracy of a round's policy and PPM: greedy, majority vote, best-of-N and search.

All four are methods of `rollout.methods`, with its accounting. Search makes its rollouts, and then
samples are drawn until they have generated as many tokens: a search cannot end within a rollout, a
sample is small beside it. Majority and best-of-N choose among these samples. How near the tokens of
search and samples came is measured (`Evaluation.search_over_samples_tokens`). A problem that yields
no answer counts as wrong.

This is the evaluation inside a run, after each round, small and in the driver. Benchmarks,
intervals and curves over budgets are `rstar evaluate` (`cluster.evaluation.benchmarks`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.shares import shares_by_level
from rollout.engine import PolicyEngine, PreferenceEngine
from rollout.methods import Method, MethodConfig, Solver, SolveResult, choose
from rollout.problem import Problem
from rollout.search import SearchConfig, StepSandbox, grade_any
from rollout.seeds import derive_seed
from rollout.solution_tree import grade_tree
from verifier.verify import start_symbolic_worker

_NO_SAMPLE_LIMIT = 10_000
"""The token budget ends long before."""


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
    num_samples: int = 0
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

    @property
    def search_over_samples_tokens(self) -> float | None:
        """Generated tokens of search over those of the samples, all problems together.

        None if there were no samples.
        """
        samples = sum(p.sample_tokens for p in self.problems)
        return sum(p.search_tokens for p in self.problems) / samples if samples else None

    @property
    def samples_per_problem(self) -> float | None:
        """Mean over the problems that were sampled; None if none was."""
        counts = [p.num_samples for p in self.problems if p.num_samples]
        return sum(counts) / len(counts) if counts else None

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
        search: its template and token limits; rollouts and candidates are those of `config`.
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
    async def solve(method: Method, count: int, budget: int | None = None) -> SolveResult:
        solver = Solver(
            config=MethodConfig(
                name=method,
                num_trajectories=count,
                max_generated_tokens=budget,
                top_k=config.vote_top_k,
                max_solution_tokens=config.max_solution_tokens,
            ),
            search=search.model_copy(update={"num_candidates": config.num_candidates}),
            policy=policy,
            preference=preference,
            sandbox=sandbox,
            round=round,
        )
        return await solver.solve(problem, seed=seed)

    greedy = await solve(Method.GREEDY, 1)
    first = ProblemEvaluation(
        problem_id=problem.id,
        level=problem.level.value,
        greedy=await _right(problem, greedy.answer),
        greedy_tokens=greedy.generated_tokens,
    )
    if preference is None:
        return first
    searched = await solve(Method.MCTS, config.num_rollouts)
    budget = max(searched.generated_tokens, 1)
    samples = await solve(Method.BEST_OF_N, _NO_SAMPLE_LIMIT, budget)
    # The very samples of best-of-N, chosen among by another rule.
    voted = await asyncio.to_thread(
        choose, samples.solutions, method=Method.MAJORITY, top_k=1, seed=seed
    )
    return replace(
        first,
        majority=await _right(problem, voted[0].answer if voted else None),
        best_of_n=await _right(problem, samples.answer),
        search=await _right(problem, searched.answer),
        any_sample=any([await _right(problem, s.answer) for s in samples.solutions]),
        any_search=any([(await grade_tree(tree)).solved for tree in searched.trees]),
        num_samples=len(samples.solutions),
        sample_tokens=samples.generated_tokens,
        search_tokens=searched.generated_tokens,
    )


async def _right(problem: Problem, answer: str | None) -> bool:
    if answer is None:
        return False
    verdict = await asyncio.to_thread(grade_any, problem, answer)
    return verdict is not None and verdict.equal
