"""Test-time methods behind one interface: MCTS, step beam search, best-of-N, majority, greedy.

    problem --> method --> solutions --> choose --> answer, runners-up
                  |  ^
                  v  |  every request passes the `Meter`: it counts tokens and tells what goes on
               policy, PPM, sandbox

    method      solutions come from                           the answer is
    greedy      one program at temperature 0                  its answer
    majority    N sampled programs                            the vote of all
    best-of-n   the same N programs, valued by the PPM        the best-valued one
    weighted-majority           the same valued programs      the vote of all, weighed by value
    beam        step beam searches (`rollout.beam`)           the vote of the top K by PPM value
    mcts        tree search (`rollout.search`)                the vote of the top K by PPM value,
                                                              or of all, weighed (`mcts_vote`)

`num_trajectories` is the number of solutions a method may finish: samples, beam slots (searches of
`beam_width` each), or trajectories of MCTS. What one of those is, `rollouts_per_tree` decides:

    null      a rollout; all share one tree, and another one if that is exhausted
    a number  an independent tree of so many rollouts; its best-valued answer is its solution (the
              released evaluation: 64 trees are 64 trajectories)

All methods are charged alike: generated tokens, texts valued by the PPM in tokens, seconds. Under
`max_generated_tokens` nothing new is started once so many were generated: no step of a beam, no
rollout; what was started ends, so a search goes over its budget by a part of a rollout. Samples are
drawn up to the budget, to the nearest sample: two methods that are to have the same tokens are a
search first and then samples with its tokens as their budget.

A weighed vote counts (1 + value) / 2, the chance of being right that the PPM gives; of an answer
of a tree times the share of the policy's solutions that it stands for, since a tree holds equal
steps once and goes where values are high (`rollout.tree.solution_shares`). With `logprob_weight`
the chance is multiplied by exp(logprob_weight * mean log-probability of a token by the policy),
and best-of-n ranks by the product: a second opinion at test time, off by default, which no training
sees.

Votes group equivalent answers (`verifier.accuracy`); ties go to the higher PPM value, then to the
seed. Where no solution has a PPM value, all of them vote, and the result says so. Of one search (a
beam, a tree, or trees that share their rollouts) each distinct program has one vote
(`rollout.programs`); samples, beams and independent trees are drawn anew, so all of theirs count.

MCTS without a PPM has nothing to be guided by at test time: every answer backs up the same reward
(the label is withheld from the search), and all answers of the tree vote.

A time limit ends whatever goes on, and the answer is chosen from what was finished by then: of
trees also answers that no rollout has tried, where there are no others. Samples are drawn together,
so a wave that is not back yet is lost.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.beam import search_beam
from rollout.engine import (
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
    values_of,
)
from rollout.problem import Problem
from rollout.programs import one_per_program, program_of
from rollout.prompt import END_OF_ANSWER, render_question
from rollout.sampling import Solution, sample_solutions, sample_texts
from rollout.search import SearchConfig, StepSandbox, run_search
from rollout.seeds import derive_seed
from rollout.tasks import all_of
from rollout.tree import Tree, own_tokens, solution_shares
from verifier.accuracy import RankedAnswer, rank_answers

T = TypeVar("T")


class Candidate(Protocol):
    """What an answer is chosen by: a `Solution`, or what an evaluation reads back of one."""

    @property
    def answer(self) -> str | None: ...

    @property
    def value(self) -> float | None: ...

    @property
    def share(self) -> float: ...

    @property
    def mean_logprob(self) -> float | None: ...


class Method(StrEnum):
    """How answers are found and chosen at test time."""

    GREEDY = "greedy"
    MAJORITY = "majority"
    BEST_OF_N = "best-of-n"
    WEIGHTED_MAJORITY = "weighted-majority"
    BEAM = "beam"
    MCTS = "mcts"

    @property
    def needs_preference(self) -> bool:
        """True if the method cannot do without a PPM."""
        return self in (Method.BEST_OF_N, Method.WEIGHTED_MAJORITY, Method.BEAM)

    @property
    def uses_preference(self) -> bool:
        """True if the method makes use of a PPM where there is one."""
        return self.needs_preference or self is Method.MCTS


_OF_VALUED_SAMPLES = (Method.BEST_OF_N, Method.WEIGHTED_MAJORITY)


class MethodConfig(BaseModel):
    """One method and its budget; sampling and step limits are those of `SearchConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Method = Field(
        Method.MCTS,
        description="greedy | majority | best-of-n | weighted-majority | beam | mcts",
    )
    num_trajectories: int = Field(
        64,
        ge=1,
        description="solutions a method may finish: samples, beam slots; mcts: rollouts in shared "
        "trees, or whole trees if rollouts_per_tree is set",
    )
    max_generated_tokens: int | None = Field(
        None,
        ge=1,
        description="nothing new starts beyond this many tokens, samples come nearest to it; "
        "null: no budget",
    )
    top_k: int = Field(
        4, ge=1, description="solutions that vote, best PPM value first (released evaluation: 4)"
    )
    mcts_vote: Literal["top_k", "weighted"] = Field(
        "top_k",
        description="who votes in trees that share their rollouts. top_k: the top_k answers by PPM "
        "value; weighted: all, each by value and by how often the policy goes its way",
    )
    logprob_weight: float = Field(
        0.0,
        ge=0.0,
        description="best-of-n, weighted-majority: how much the policy's mean log-probability of a "
        "token counts beside the PPM's; needs policy_engine.logprobs",
    )
    max_solution_tokens: int = Field(
        2048,
        ge=1,
        description="generated tokens per sampled program (greedy, majority, best-of-n, "
        "weighted-majority)",
    )
    beam_width: int = Field(8, ge=1, description="paths kept after each step of a beam")
    beam_candidates: int = Field(8, ge=1, description="candidates per path and step of a beam")
    rollouts_per_tree: int | None = Field(
        None,
        ge=1,
        description="mcts: each trajectory is a tree of so many rollouts; null: each is a rollout, "
        "and they share trees",
    )

    @model_validator(mode="after")
    def _settings_are_used(self) -> MethodConfig:
        if self.mcts_vote == "weighted" and self.rollouts_per_tree is not None:
            raise ValueError(
                "mcts_vote: weighted is for trees that share their rollouts; of the independent "
                "ones of rollouts_per_tree one answer each votes"
            )
        if self.logprob_weight and self.name not in _OF_VALUED_SAMPLES:
            raise ValueError(f"logprob_weight is for {' and '.join(_OF_VALUED_SAMPLES)} only")
        return self

    @property
    def rollouts_of_a_tree(self) -> int:
        """MCTS: rollouts of the first tree, or of each of the independent ones."""
        return self.rollouts_per_tree or self.num_trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a method has used so far."""

    generated_tokens: int = 0
    prompt_tokens: int = 0
    """Of a request once, however many candidates it asks for."""
    cached_tokens: int = 0
    """Prompt tokens served from the prefix cache."""
    scored_tokens: int = 0
    """Tokens of the texts the PPM valued."""
    num_requests: int = 0
    """To the policy."""
    seconds: float = 0.0


class EventKind(StrEnum):
    """What an event tells."""

    EXTENDS = "extends"
    """The method has chosen a partial solution and asks for what follows it."""
    ANSWERED = "answered"
    """A complete solution was found (and valued, where there is a PPM)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something a method did, as it happens."""

    kind: EventKind
    text: str
    """The steps so far as rendered in prompts, question left out; "" at the start."""
    value: float | None
    """PPM value of that text; None: not scored."""
    cost: Cost


OnEvent = Callable[[Event], None]


class Ending(StrEnum):
    """What ended a method."""

    TRAJECTORIES = "trajectories"
    """It finished as many as it may."""
    EXHAUSTED = "exhausted"
    """Nothing was left to try."""
    TOKENS = "token_budget"
    TIME = "time_limit"
    TOO_LONG = "problem_too_long"
    """The problem does not fit into the policy's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """What a method made of one problem."""

    method: Method
    problem_id: str
    solutions: tuple[Solution, ...]
    """Everything that was finished, with or without an answer, in the order of its seeds."""
    ranked: tuple[RankedAnswer, ...]
    """Distinct answers, the chosen one first; their members index `solutions`."""
    cost: Cost
    trees: tuple[Tree, ...] = ()
    """Of MCTS, their answers not graded; other methods keep none."""
    ended: Ending = Ending.TRAJECTORIES
    notes: tuple[str, ...] = ()
    """What is worth knowing about how the result came about, for people."""
    policy_version: str = ""
    """As the last reply named it; "" if nothing was asked."""
    preference_version: str = ""

    @property
    def chosen(self) -> Solution | None:
        """The solution that speaks for the answer; None if no solution has one."""
        return self.solutions[self.ranked[0].members[0]] if self.ranked else None

    @property
    def answer(self) -> str | None:
        return self.ranked[0].answer if self.ranked else None

    @property
    def value(self) -> float | None:
        """Best PPM value of the answer; None: no answer, or a method without a PPM."""
        return self.value_of(self.ranked[0]) if self.ranked else None

    def value_of(self, answer: RankedAnswer) -> float | None:
        """Best PPM value of one of the answers, whatever they were ranked by."""
        values = [self.solutions[number].value for number in answer.members]
        return max((value for value in values if value is not None), default=None)

    @property
    def generated_tokens(self) -> int:
        return self.cost.generated_tokens

    @property
    def num_rollouts(self) -> int:
        """Descents of MCTS; of other methods the solutions they finished."""
        return sum(tree.num_rollouts for tree in self.trees) or len(self.solutions)


def vote_weight(
    value: float | None, mean_logprob: float | None = None, logprob_weight: float = 0.0
) -> float:
    """What the vote of a solution counts: (1 + value) / 2 * exp(logprob_weight * mean_logprob).

    In [0, 1]; 0 without a value, or without the log-probability that is asked for.

    Args:
        value: of the PPM, in [-1, 1].
        mean_logprob: per token, in nats.
    """
    if value is None:
        return 0.0
    if not logprob_weight:
        return (1.0 + value) / 2.0
    if mean_logprob is None:
        return 0.0
    return (1.0 + value) / 2.0 * math.exp(logprob_weight * mean_logprob)


def choose(
    solutions: Sequence[Candidate],
    *,
    method: Method,
    top_k: int,
    seed: int,
    weighted: bool = False,
    logprob_weight: float = 0.0,
) -> tuple[RankedAnswer, ...]:
    """Rank the answers of finished solutions by the rule of a method, the chosen one first.

    Args:
        weighted: MCTS: all vote, weighed by value and share, in place of the top K.
        top_k: solutions that vote in MCTS and beam search; the other methods have their own number.
        seed: settles what votes and values leave tied.
        logprob_weight: as of `MethodConfig`; above 0, answers have no PPM value but a weight.
    """
    answers = [solution.answer for solution in solutions]
    values = [solution.value for solution in solutions]
    if not method.uses_preference or not _valued(solutions):
        return tuple(rank_answers(answers, seed=seed))
    if method not in _OF_VALUED_SAMPLES and not weighted:
        return tuple(rank_answers(answers, values=values, top_k=top_k, seed=seed))
    weights = [s.share * vote_weight(s.value, s.mean_logprob, logprob_weight) for s in solutions]
    if logprob_weight:
        if all(s.mean_logprob is None for s in solutions if s.answer is not None):
            raise ValueError(
                f"logprob_weight {logprob_weight}, but no solution has a log-probability"
            )
        values = [None if v is None else w for v, w in zip(values, weights, strict=True)]
    if method is Method.BEST_OF_N:
        return tuple(rank_answers(answers, values=values, top_k=1, seed=seed))
    return tuple(rank_answers(answers, values=values, weights=weights, seed=seed))


def tree_solutions(tree: Tree, *, visited: bool = True) -> list[Solution]:
    """The answers a search has visited, or not visited, in creation order."""
    found = [n for n in tree.answers() if (n.visit_count > 0) is visited]
    shares = solution_shares(tree, found)
    return [
        Solution(
            steps=tuple(tree.steps(node)),
            answer=node.step.answer,
            value=node.value,
            num_tokens=own_tokens(tree.path(node)),
            status="ok",
            seed=tree.seed,
            share=shares[node.id],
        )
        for node in found
        if node.step is not None
    ]


def search_solutions(trees: Iterable[Tree]) -> list[Solution]:
    """The answers that trees which share their rollouts have found: one of each program."""
    return _one_per_program([s for tree in trees for s in tree_solutions(tree)])


def _one_per_program(solutions: Sequence[Solution]) -> list[Solution]:
    """The best-valued solution of each distinct program, in their order, with the share of all of
    it."""
    programs = [program_of(solution.steps) for solution in solutions]
    best_first = sorted(range(len(solutions)), key=lambda n: -_known(solutions[n]))
    kept = one_per_program(best_first, lambda n: programs[n])
    shares: defaultdict[str, float] = defaultdict(float)
    for program, solution in zip(programs, solutions, strict=True):
        shares[program] += solution.share
    return [
        replace(solutions[n], share=shares[programs[n]]) if programs[n] else solutions[n]
        for n in sorted(kept)
    ]


@dataclass
class Meter:
    """Both engines of one problem, as a method sees them: passes on, counts, tells.

    Cost and events are taken here, at the engines, so that they mean the same for every method.
    """

    questions: tuple[str, ...]
    """Prompts before any step, of the policy and of the PPM where they differ; left out of the
    texts of events."""
    policy: PolicyEngine
    preference: PreferenceEngine | None
    on_event: OnEvent | None
    clock: Callable[[], float] | None
    """In seconds; None: the seconds of a cost stay 0."""
    num_too_long: int = 0
    """Requests whose prompt left no room to generate."""
    policy_version: str = ""
    preference_version: str = ""

    def __post_init__(self) -> None:
        self._began_s = self.clock() if self.clock is not None else 0.0
        self._cost = Cost()
        self._values: dict[str, float] = {}

    @property
    def cost(self) -> Cost:
        if self.clock is None:
            return self._cost
        return replace(self._cost, seconds=self.clock() - self._began_s)

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """As `PolicyEngine`."""
        self._tell(EventKind.EXTENDS, request.prompt)
        reply = await self.policy.generate(request)
        self.policy_version = reply.policy_version
        tokens = sum(completion.num_tokens for completion in reply.completions)
        self._cost = replace(
            self._cost,
            generated_tokens=self._cost.generated_tokens + tokens,
            prompt_tokens=self._cost.prompt_tokens + reply.prompt_tokens,
            cached_tokens=self._cost.cached_tokens + reply.cached_tokens,
            num_requests=self._cost.num_requests + 1,
        )
        if all(c.finish is FinishReason.PROMPT_TOO_LONG for c in reply.completions):
            self.num_too_long += 1
        if self.preference is None:
            for text in dict.fromkeys(completion.text for completion in reply.completions):
                if text.endswith(END_OF_ANSWER):
                    self._tell(EventKind.ANSWERED, request.prompt + text)
        return reply

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        """As `PreferenceEngine`."""
        assert self.preference is not None
        reply = await self.preference.evaluate(request)
        self.preference_version = reply.preference_version
        self._cost = replace(self._cost, scored_tokens=self._cost.scored_tokens + reply.num_tokens)
        if self.on_event is not None:
            for text, value in zip(request.texts, values_of(request, reply), strict=True):
                if value is not None:
                    self._values[self._solution(text)] = value
                if text.endswith(END_OF_ANSWER):
                    self._tell(EventKind.ANSWERED, text)
        return reply

    def _tell(self, kind: EventKind, text: str) -> None:
        if self.on_event is not None:
            solution = self._solution(text)
            value = self._values.get(solution)
            self.on_event(Event(kind=kind, text=solution, value=value, cost=self.cost))

    def _solution(self, text: str) -> str:
        question = next((q for q in self.questions if text.startswith(q)), "")
        return text[len(question) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """One method with everything it needs; may solve many problems at a time."""

    config: MethodConfig
    search: SearchConfig
    """Sampling, template and step limits of all methods; candidates and switches of MCTS."""
    policy: PolicyEngine
    preference: PreferenceEngine | None
    """The PPM; None: there is none. Greedy and majority do not use it."""
    sandbox: StepSandbox
    clock: Callable[[], float] | None = None
    """In seconds; None: no seconds are counted."""
    round: int = 0
    """Recorded in trees."""
    prompt: str | None = None
    """With `{question}` in it: asks for a plain chain of thought (greedy and majority only); None:
    for code steps, under the template of `search`."""

    def __post_init__(self) -> None:
        if self.config.name.needs_preference and self.preference is None:
            raise ValueError(f"method {self.config.name} needs a process preference model")
        if self.prompt is not None and self.config.name.uses_preference:
            raise ValueError(f"method {self.config.name} needs code steps, not a plain prompt")

    async def solve(
        self,
        problem: Problem,
        *,
        seed: int,
        on_event: OnEvent | None = None,
        limit_s: float | None = None,
    ) -> SolveResult:
        """Find and choose an answer.

        Args:
            seed: the same seed and deterministic engines give the same result. Majority and
                best-of-N draw the same samples from the same seed.
            on_event: told what is being extended and found, while it happens.
            limit_s: seconds after which what was found so far is chosen from; None: no limit.
        Raises:
            EngineError, SearchError, SandboxError: a part of the system failed.
        """
        method = self.config.name
        preference = self.preference if method.uses_preference else None
        templates = (self.search.prompt_template, self.search.training_template)
        meter = Meter(
            tuple(render_question(problem.text, template) for template in templates),
            self.policy,
            preference,
            on_event,
            self.clock,
        )
        job = _Job(solver=self, problem=problem, meter=meter, seed=seed)
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                solutions = await _RUNS[method](job)
        except TimeoutError:
            if not limit.expired():
                raise
            solutions = job.found_so_far()
        # Comparing answers may take a while, so not on the event loop.
        ranked = await asyncio.to_thread(
            choose,
            solutions,
            method=method,
            top_k=self.config.top_k,
            seed=seed,
            weighted=self.config.mcts_vote == "weighted" and method is Method.MCTS,
            logprob_weight=self.config.logprob_weight,
        )
        return SolveResult(
            method=method,
            problem_id=problem.id,
            solutions=tuple(solutions),
            ranked=ranked,
            cost=meter.cost,
            trees=tuple(job.trees),
            ended=_ending(job, late=limit.expired()),
            notes=tuple(_notes(job, solutions, ranked, limit_s if limit.expired() else None)),
            policy_version=meter.policy_version,
            preference_version=meter.preference_version,
        )


@dataclass(slots=True, kw_only=True)
class _Job:
    """One problem under way with one method."""

    solver: Solver
    problem: Problem
    meter: Meter
    seed: int
    trees: list[Tree] = field(default_factory=list)
    """They grow while they are searched."""
    finished: list[Solution] = field(default_factory=list)
    """Of methods without trees, as they come; in no certain order."""

    @property
    def config(self) -> MethodConfig:
        return self.solver.config

    @property
    def search(self) -> SearchConfig:
        return self.solver.search

    @property
    def preference(self) -> Meter | None:
        """The PPM; None: there is none, or the method does not use it."""
        return self.meter if self.meter.preference is not None else None

    @property
    def tokens_left(self) -> float:
        budget = self.config.max_generated_tokens
        return math.inf if budget is None else budget - self.meter.cost.generated_tokens

    def spent(self) -> bool:
        return self.tokens_left <= 0

    def found_so_far(self) -> list[Solution]:
        """What there is to choose from before the method has ended."""
        visited = search_solutions(self.trees)
        generated = [s for tree in self.trees for s in tree_solutions(tree, visited=False)]
        return visited or _one_per_program(generated or self.finished)

    async def repeat(self, count: int, one: Callable[[int], Coroutine[Any, Any, T]]) -> list[T]:
        """Independent searches: side by side, or under a budget in turn until it is used up."""
        if self.config.max_generated_tokens is None:
            return await all_of(one(number) for number in range(count))
        found: list[T] = []
        while len(found) < count and not self.spent():
            found.append(await one(len(found)))
        return found


async def _greedy(job: _Job) -> list[Solution]:
    return await _sample(job, 1, temperature=0.0, seed=derive_seed(job.seed, "greedy"))


async def _samples(job: _Job) -> list[Solution]:
    """Sampled programs: in one request, or under a budget in waves until it is filled.

    A wave is half of what should fill the rest, and no more than was drawn before, as few samples
    tell little of the mean. The last sample is the one that comes nearest to
    the budget on average: of samples x drawn until their sum passes a line, the sum is beyond it by
    E[x^2] / 2 E[x] (renewal theory), so the line is so far below the budget.
    """
    wanted = job.config.num_trajectories
    solutions: list[Solution] = []
    wave = 0
    size = wanted if job.config.max_generated_tokens is None else 1
    while size > 0:
        names = ("samples", wave) if wave else ("samples",)
        solutions += await _sample(
            job, size, temperature=job.search.temperature, seed=derive_seed(job.seed, *names)
        )
        wave += 1
        lengths = [solution.num_tokens for solution in solutions]
        spent = sum(lengths)
        if len(solutions) == wanted or not spent:
            break
        left = job.tokens_left - sum(length**2 for length in lengths) / (2 * spent)
        fitting = math.ceil(left * len(solutions) / spent)
        size = min((fitting + 1) // 2, len(solutions), wanted - len(solutions))
    return solutions


async def _sample(job: _Job, count: int, *, temperature: float, seed: int) -> list[Solution]:
    solutions = await _sample_once(job, count, temperature=temperature, seed=seed)
    job.finished += solutions
    return solutions


async def _sample_once(job: _Job, count: int, *, temperature: float, seed: int) -> list[Solution]:
    if job.solver.prompt is not None:
        return await sample_texts(
            job.problem,
            num_samples=count,
            temperature=temperature,
            top_p=job.search.top_p,
            max_tokens=job.config.max_solution_tokens,
            prompt=job.solver.prompt,
            policy=job.meter,
            seed=seed,
        )
    return await sample_solutions(
        job.problem,
        num_samples=count,
        temperature=temperature,
        top_p=job.search.top_p,
        max_tokens=job.config.max_solution_tokens,
        template=job.search.prompt_template,
        policy=job.meter,
        preference=job.preference,
        sandbox=job.solver.sandbox,
        seed=seed,
    )


async def _beam(job: _Job) -> list[Solution]:
    config = job.config
    width = min(config.beam_width, config.num_trajectories)

    async def one(number: int) -> list[Solution]:
        finished = await search_beam(
            job.problem,
            width=min(width, config.num_trajectories - number * width),
            num_candidates=config.beam_candidates,
            config=job.search,
            policy=job.meter,
            preference=job.meter,
            sandbox=job.solver.sandbox,
            seed=derive_seed(job.seed, "beam", number),
            spent=job.spent,
            on_finished=job.finished.append,
        )
        return _one_per_program(finished)

    found = await job.repeat(math.ceil(config.num_trajectories / width), one)
    return [solution for solutions in found for solution in solutions]


async def _mcts(job: _Job) -> list[Solution]:
    config = job.config
    if config.rollouts_per_tree is not None:
        trees = await job.repeat(
            config.num_trajectories,
            lambda number: _search_tree(job, number, config.rollouts_of_a_tree),
        )
        return [best for tree in trees for best in _best(tree_solutions(tree))]
    left = config.num_trajectories
    while left > 0 and not job.spent():
        tree = await _search_tree(job, len(job.trees), left)
        left -= tree.num_rollouts
        if not tree.root.exhausted or not tree.generated_tokens:
            break
    return search_solutions(job.trees)


async def _search_tree(job: _Job, number: int, num_rollouts: int) -> Tree:
    search = job.search.at_test_time(num_rollouts, guided=job.preference is not None)
    if job.config.max_generated_tokens is not None:
        search = search.model_copy(update={"max_generated_tokens": int(job.tokens_left)})
    names = ("search", number) if number else ("search",)
    tree = Tree(
        problem=job.problem,
        round=job.solver.round,
        index=-1 - number,
        seed=derive_seed(job.seed, *names),
    )
    job.trees.append(tree)
    return await run_search(
        job.problem,
        config=search,
        policy=job.meter,
        preference=job.preference,
        sandbox=job.solver.sandbox,
        round=tree.round,
        index=tree.index,
        seed=tree.seed,
        grade=None,
        clock=job.solver.clock,
        resume=tree,
    )


_RUNS: Mapping[Method, Callable[[_Job], Awaitable[list[Solution]]]] = {
    Method.GREEDY: _greedy,
    Method.MAJORITY: _samples,
    Method.BEST_OF_N: _samples,
    Method.WEIGHTED_MAJORITY: _samples,
    Method.BEAM: _beam,
    Method.MCTS: _mcts,
}


def _best(solutions: Sequence[Solution]) -> list[Solution]:
    """The best-valued solution of a tree; one of each program where none has a value."""
    if not _valued(solutions):
        return _one_per_program(solutions)
    return [max(solutions, key=_known)]


def _known(solution: Solution) -> float:
    """PPM value, below all others where there is none."""
    return solution.value if solution.value is not None else -math.inf


def _valued(solutions: Sequence[Candidate]) -> bool:
    """True if the PPM told some solution from the others."""
    return any(s.value is not None and s.answer is not None for s in solutions)


def _ending(job: _Job, *, late: bool) -> Ending:
    requests = job.meter.cost.num_requests
    if late:
        return Ending.TIME
    if requests and job.meter.num_too_long == requests:
        return Ending.TOO_LONG
    if job.spent():
        return Ending.TOKENS
    short = sum(tree.num_rollouts for tree in job.trees) < job.config.num_trajectories
    if job.trees and job.config.rollouts_per_tree is None and short:
        return Ending.EXHAUSTED
    return Ending.TRAJECTORIES


def _notes(
    job: _Job,
    solutions: Sequence[Solution],
    ranked: Sequence[RankedAnswer],
    limit_s: float | None,
) -> list[str]:
    """What people should know.

    Args:
        limit_s: that was reached; None: none was.
    """
    notes = [] if limit_s is None else [f"stopped after {limit_s:.3g} s"]
    if job.config.name.uses_preference and ranked and not _valued(solutions):
        why = "the PPM gave no value" if job.preference else "there is no PPM"
        notes.append(f"{why}: majority vote over all {len(solutions)} solutions")
    if not ranked:
        if _ending(job, late=False) is Ending.TOO_LONG:
            notes.append("the problem does not fit into the policy's context")
        else:
            notes.append("no solution reached an answer")
    sampled = _RUNS[job.solver.config.name] is _samples
    cut_short = sampled and len(solutions) < job.config.num_trajectories
    if job.spent() or (cut_short and job.meter.cost.generated_tokens):
        notes.append(f"token budget of {job.config.max_generated_tokens:,} used up")
    if len(job.trees) > 1 and job.config.rollouts_per_tree is None:
        notes.append(f"{len(job.trees)} trees, {len(job.trees) - 1} of them exhausted")
    return notes
