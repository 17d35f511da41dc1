"""Held-out accuracy of a round's policy and PPM: greedy, votes, best-of-N and search.

    held-out problems --leased--> workers: `evaluate_problem` --> trees of each problem
                                      --> RUN/evaluations/round=R/
    trees of the problems, what was set aside --read--> `Evaluation`

All are methods of `rollout.methods`, with its accounting. Search makes its rollouts, and then
samples are drawn until they have generated as many tokens: a search cannot end within a rollout, a
sample is small beside it. Majority, weighted majority and best-of-N choose among these samples. How
near the tokens of search and samples came is measured (`Evaluation.search_over_samples_tokens`). A
problem that yields no answer counts as wrong.

An evaluation is a round of its own (`rollout.store.evaluation_of`), with the leases, retries and
exactly-once commits of any other: what dies costs a retry, what is committed is not done again, and
a problem that fails again and again is set aside and counts as wrong, with its reason. One that was
begun with other models (`--force` promoted a checkpoint meanwhile) is not gone on with.

This is the evaluation inside a run, after each round, and small. Benchmarks, intervals and curves
over budgets are `rstar evaluate` (`cluster.evaluation.benchmarks`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.shares import shares_by_level
from cluster.fleet.fleet import Fleet
from cluster.fleet.rollouts import Progress
from cluster.fleet.stages import RolloutOutcome, RolloutStage
from cluster.folder.run_folder import RunFolderError
from rollout.engine import PolicyEngine, PreferenceEngine
from rollout.methods import Method, MethodConfig, Solver, SolveResult, choose, search_solutions
from rollout.problem import Problem
from rollout.sampling import Solution
from rollout.search import SearchConfig, SearchError, StepSandbox
from rollout.seeds import derive_seed
from rollout.solution_tree import chain_solutions, fill_tree, grade_tree
from rollout.store import TrajectoryStore, evaluation_of, folder_of
from rollout.tree import Tree
from verifier.bootstrap import bootstrap_difference

_SHARD_SIZE = 4
"""Problems per job, few, as each is several searches; alone in its file, one takes seven times the
CPU to commit and to read."""

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
    weighted_majority: bool | None = None
    search: bool | None = None
    weighted_search: bool | None = None
    """The same trees, of which all answers vote, each by value and share."""
    any_sample: bool | None = None
    """Some sample was right: what a perfect choice among them would reach."""
    any_search: bool | None = None
    num_samples: int = 0
    greedy_tokens: int = 0
    sample_tokens: int = 0
    search_tokens: int = 0
    failure: str = ""
    """Why the problem was set aside, and counts as wrong; "" if it was not."""


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
    def failures(self) -> dict[str, str]:
        """Why problems were set aside, by id."""
        return {p.problem_id: p.failure for p in self.problems if p.failure}

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


def head_room(evaluation: Evaluation) -> dict[str, float] | None:
    """How much more of the sampled problems any sample has right than majority vote: what no choice
    among the samples can exceed. Mean, low and high of a paired bootstrap; None without samples."""
    rows = [p for p in evaluation.problems if p.majority is not None]
    if not rows:
        return None
    found = bootstrap_difference(
        [float(bool(p.majority)) for p in rows], [float(bool(p.any_sample)) for p in rows]
    )
    return {"mean": found.mean, "low": found.low, "high": found.high}


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
    fleet: Fleet,
    problems: Sequence[Problem],
    *,
    config: EvaluationConfig,
    search: SearchConfig,
    round: int,
    seed: int,
    preference: bool,
    on_progress: Progress,
) -> tuple[Evaluation, RolloutOutcome]:
    """Evaluate the models that a fleet serves on held-out problems; greedy alone without a PPM.

    Goes on from what an earlier start has committed. Cancelling drains, as a rollout does.

    Args:
        search: its template and limits; rollouts, candidates and temperature are those of `config`.
        round: of the models.
    Raises:
        EngineError: members of a pool died too often.
        RunFolderError: what was committed is of other models; says what to do.
        SearchError: no problem at all could be evaluated; says why, and what to do.
    """
    chosen = balanced(problems, config.num_problems)
    few = balanced(chosen, config.num_search_problems) if preference else []
    searched = frozenset(problem.id for problem in few)
    stage = RolloutStage(
        name="evaluate",
        search=config.searched(search),
        answers=partial(evaluate_problem, config=config, round=round, seed=seed, searched=searched),
        shard_size=_SHARD_SIZE,
    )
    number = evaluation_of(round)
    folder = fleet.folder.at(folder_of(number))
    trees = TrajectoryStore(fleet.store, number)
    models = {kind: fleet.versions[kind] for kind in ("policy", "ppm")[: 1 + preference]}
    await asyncio.to_thread(_check_models, trees, models, folder)
    # What takes longest begins first.
    ordered = sorted(chosen, key=lambda problem: problem.id not in searched)
    outcome = await fleet.rollout(
        number, ordered, [stage], preference=preference, on_progress=on_progress
    )
    failed = outcome.manifest.failed
    if len(failed) == len(chosen):
        name, why = next(iter(failed.items()))
        raise SearchError(
            f"none of {len(chosen)} problems could be evaluated, {name} for: {why}; "
            f"when that is mended, remove {folder} and start again"
        )
    found = await asyncio.to_thread(judge, trees.trees(), top_k=config.vote_top_k)
    for problem in chosen:
        if problem.id in failed:
            found[problem.id] = _set_aside(
                problem, failed[problem.id], searched=problem.id in searched
            )
    return Evaluation(round=round, problems=tuple(found[p.id] for p in chosen)), outcome


def _check_models(trees: TrajectoryStore, models: Mapping[str, str], folder: str) -> None:
    """Raises RunFolderError if trees of other models are committed: no figure may mix them."""
    for commit in trees.each_commit(trees=False):
        made_by = {kind: commit.info.get(kind, "") for kind in models}
        if made_by != models:
            raise RunFolderError(
                f"{folder}: this evaluation was begun with {_names(made_by)}, and "
                f"{_names(models)} serve now; remove that folder to begin it again with these"
            )


def _names(models: Mapping[str, str]) -> str:
    return " and ".join(f"{kind} {version}" for kind, version in models.items())


async def evaluate_problem(
    tree: Tree,
    *,
    config: EvaluationConfig,
    round: int,
    seed: int,
    searched: Container[str],
    search: SearchConfig,
    policy: PolicyEngine,
    preference: PreferenceEngine | None,
    sandbox: StepSandbox,
    clock: Callable[[], float],
) -> list[Tree]:
    """Answer the problem of a tree by each method; `judge` says what the trees show.

    Args:
        tree: only says which problem.
        round, seed: of the evaluation.
        searched: ids of the problems that are sampled and searched too; needs a PPM.
        search: of every method.
    Returns:
        The greedy solution; where searched, the samples, and the trees of the search.
    Raises:
        EngineError, SearchError: a part of the system failed.
    """
    problem = tree.problem
    seed = derive_seed(seed, "evaluate", round, problem.id)

    async def solve(method: Method, count: int, budget: int | None = None) -> SolveResult:
        solver = Solver(
            config=MethodConfig(
                name=method,
                num_trajectories=count,
                max_generated_tokens=budget,
                top_k=config.vote_top_k,
                max_solution_tokens=config.max_solution_tokens,
            ),
            search=search,
            policy=policy,
            preference=preference,
            sandbox=sandbox,
            clock=clock,
            round=round,
        )
        return await solver.solve(problem, seed=seed)

    def chains(result: SolveResult) -> Tree:
        made = Tree(problem=problem, round=round, seed=seed)
        made.search_config = search.model_dump_json()
        fill_tree(made, result)
        return made

    trees = [chains(await solve(Method.GREEDY, 1))]
    if problem.id in searched:
        found = await solve(Method.MCTS, config.num_rollouts)
        budget = max(found.generated_tokens, 1)
        samples = await solve(Method.BEST_OF_N, _NO_SAMPLE_LIMIT, budget)
        trees += [chains(samples), *found.trees]
    for index, made in enumerate(trees):
        made.index = index
        await grade_tree(made)
    return trees


def judge(trees: Iterable[Tree], *, top_k: int) -> dict[str, ProblemEvaluation]:
    """Verdicts on problems by id, from what `evaluate_problem` made of them, one after the other.

    Args:
        top_k: solutions that vote in MCTS.
    """
    by_problem = groupby(trees, key=lambda tree: tree.problem.id)
    return {name: _judge_problem(list(own), top_k) for name, own in by_problem}


def _judge_problem(trees: Sequence[Tree], top_k: int) -> ProblemEvaluation:
    greedy, *others = trees
    first = ProblemEvaluation(
        problem_id=greedy.problem.id,
        level=greedy.problem.level.value,
        greedy=greedy.solved,
        greedy_tokens=greedy.generated_tokens,
    )
    if not others:
        return first
    samples, *searches = others
    drawn, reached = chain_solutions(samples), search_solutions(searches)
    right = {node.step.answer for t in others for node in t.answers() if node.correct and node.step}

    def chosen(solutions: Sequence[Solution], method: Method, weighted: bool = False) -> bool:
        ranked = choose(solutions, method=method, top_k=top_k, weighted=weighted, seed=greedy.seed)
        return bool(ranked) and solutions[ranked[0].members[0]].answer in right

    return replace(
        first,
        majority=chosen(drawn, Method.MAJORITY),
        best_of_n=chosen(drawn, Method.BEST_OF_N),
        weighted_majority=chosen(drawn, Method.WEIGHTED_MAJORITY),
        search=chosen(reached, Method.MCTS),
        weighted_search=chosen(reached, Method.MCTS, weighted=True),
        any_sample=samples.solved,
        any_search=any(tree.solved for tree in searches),
        num_samples=len(drawn),
        sample_tokens=samples.generated_tokens,
        search_tokens=sum(tree.generated_tokens for tree in searches),
    )


def _set_aside(problem: Problem, why: str, *, searched: bool) -> ProblemEvaluation:
    """Wrong by every method that was to answer it."""
    wrong = False if searched else None
    return ProblemEvaluation(
        problem_id=problem.id,
        level=problem.level.value,
        greedy=False,
        majority=wrong,
        best_of_n=wrong,
        weighted_majority=wrong,
        search=wrong,
        weighted_search=wrong,
        any_sample=wrong,
        any_search=wrong,
        failure=why,
    )
