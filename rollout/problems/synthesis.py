"""New problems from a language model, kept where its own solutions agree on the answer.

    seeds --a few, one level--> propose --texts--> new? --yes--> solve x 10 --answers--> agree?
      ^                                             |                                      |
      |                              duplicate of a seed or of an earlier one        >= 3: kept
      +--- drawn anew for each request, by its number

Source: rStar-Math (arXiv 2501.04519) section 3.4.1: GPT-4 writes new problems after MATH and AMC
problems and ten solutions of each; problems on whose answer at least three agree are kept. Answers
agree when the answer check says they are equal, not when their texts are. Where two answers have
equally many solutions, neither is kept.

Everything that was paid for stands in a journal before it is used: a line for each request that was
answered, with all its texts. What is kept follows from the journal alone, so a run that was stopped
or killed goes on from it and asks nothing again but what had not been answered.

A budget counts answered requests, tokens and dollars over all starts of a run. A request is sent
only if the most it may come to still fits beside all that are under way.

Not covered: whether an agreed answer is right. `learner.select` leaves out problems of synthetic
sources that search solves too rarely (`dataset.synthetic_sources`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.engine import (
    Completion,
    EngineError,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    PolicyEngine,
)
from rollout.problem import Level, Problem
from rollout.problems.duplicates import MIN_SIMILARITY
from rollout.problems.rows import columns
from rollout.problems.screening import screen
from rollout.problems.text import (
    Hashes,
    bands,
    numbers_key,
    problem_id,
    problem_key,
    shingle_sets,
    similarity,
    tokenise,
)
from rollout.seeds import derive_seed
from verifier import extract_answer
from verifier.accuracy import answer_groups

SOURCE = "synthetic"
"""The `source` of every problem made here."""

END = "\nEND"
DRAIN_S = 30.0
"""How long a run that is stopped waits for answers that are under way."""

MAX_FAILURES_IN_A_ROW = 10

MIN_TOKEN_CHARS = 2
"""A token of a prompt is taken to be no shorter, where a budget needs the most it may cost."""

PROPOSE_PROMPT = """\
Below are {count} mathematics problems. Each has one final answer that can be checked.

{problems}
Write one new problem of the same kind and of about the same difficulty. It must ask for something \
else than those above, not only have other numbers. It must be complete in itself, without a \
figure, no proof, and have exactly one final answer, a number or a short expression. Write only \
the problem, no solution, and then a line that says END.

New problem:
"""

SOLVE_PROMPT = """\
Solve this problem step by step. End with one sentence that has the final answer in \\boxed{}.

Problem:
{problem}

Solution:
"""

SCHEMA = pa.schema(
    columns(
        "id source level problem answer agreement num_solutions num_agreeing model seed_ids origin",
        agreement=pa.float64(),
        num_solutions=pa.int32(),
        num_agreeing=pa.int32(),
        seed_ids=pa.list_(pa.string()),
    )
)
"""Columns of the table: those a problem file needs, then where each comes from. `agreement` is the
share of the solutions that have the answer."""


class SynthesisError(RuntimeError):
    """Problems cannot be made: the journal, the seeds or the model's answers are of no use."""


class PolicyEnded(EngineError):
    """A model that will answer no request any more: wrong key, nothing left to pay with."""


class SynthesisConfig(BaseModel):
    """What is asked for, and what is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_problems: int = Field(1000, ge=1, description="stop when so many are kept")
    seeds_per_request: int = Field(3, ge=1, description="problems shown, all of one level")
    problems_per_request: int = Field(1, ge=1, description="new problems asked for at once")
    num_solutions: int = Field(10, ge=1, description="of each new problem")
    min_agreement: int = Field(3, ge=1, description="solutions that must have one answer")
    max_proposals: int | None = Field(
        None, ge=1, description="requests for new problems at most; null: 20 x num_problems"
    )
    max_open: int = Field(16, ge=1, description="requests under way at a time")
    temperature: float = Field(1.0, ge=0, description="of new problems")
    solution_temperature: float = Field(0.7, ge=0, description="of solutions")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling mass")
    max_problem_tokens: int = Field(512, ge=1, description="of a new problem")
    max_solution_tokens: int = Field(2048, ge=1, description="of a solution")
    seed: int = Field(0, ge=0, description="which seeds are shown together, and of requests")
    propose_prompt: str | None = Field(
        None, description="with {count} and {problems}; null: the one of rollout/problems/synthesis"
    )
    solve_prompt: str | None = Field(None, description="with {problem}; null: as above")

    @model_validator(mode="after")
    def _check(self) -> SynthesisConfig:
        if self.min_agreement > self.num_solutions:
            raise ValueError("min_agreement must not be over num_solutions")
        for name, text, key in (
            ("propose_prompt", self.proposal_text, "problems"),
            ("solve_prompt", self.solution_text, "problem"),
        ):
            if f"{{{key}}}" not in text:
                raise ValueError(f"{name} has no {{{key}}}")
        return self

    @property
    def proposal_text(self) -> str:
        return PROPOSE_PROMPT if self.propose_prompt is None else self.propose_prompt

    @property
    def solution_text(self) -> str:
        return SOLVE_PROMPT if self.solve_prompt is None else self.solve_prompt

    @property
    def most_proposals(self) -> int:
        return self.max_proposals or 20 * self.num_problems


class BudgetConfig(BaseModel):
    """What may be spent over all starts of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_requests: int | None = Field(None, ge=1, description="answered; null: no limit")
    max_tokens: int | None = Field(None, ge=1, description="in and out; null: no limit")
    max_usd: float | None = Field(None, gt=0, description="by the prices below; null: no limit")
    usd_per_million_prompt_tokens: float = Field(0.0, ge=0, description="price of tokens in")
    usd_per_million_generated_tokens: float = Field(0.0, ge=0, description="price of tokens out")

    @model_validator(mode="after")
    def _has_prices(self) -> BudgetConfig:
        prices = self.usd_per_million_prompt_tokens + self.usd_per_million_generated_tokens
        if self.max_usd is not None and not prices:
            raise ValueError("max_usd needs usd_per_million_prompt_tokens or ..._generated_tokens")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What requests came to, or may come to."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Spending) -> Spending:
        return Spending(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
        )

    def usd(self, prices: BudgetConfig) -> float:
        return (
            self.prompt_tokens * prices.usd_per_million_prompt_tokens
            + self.generated_tokens * prices.usd_per_million_generated_tokens
        ) / 1e6

    def over(self, budget: BudgetConfig) -> str:
        """Which limit this is over, for people; "" if none."""
        tokens = self.prompt_tokens + self.generated_tokens
        if budget.max_requests is not None and self.requests > budget.max_requests:
            return f"budget.max_requests = {budget.max_requests:,}"
        if budget.max_tokens is not None and tokens > budget.max_tokens:
            return f"budget.max_tokens = {budget.max_tokens:,}"
        if budget.max_usd is not None and self.usd(budget) > budget.max_usd:
            return f"budget.max_usd = {budget.max_usd:g}"
        return ""


# -------------------------------------------------------------------- what was paid for


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalRecord:
    """An answered request for new problems."""

    number: int
    seeds: tuple[str, ...]
    level: str
    texts: tuple[str, ...]
    """As the model wrote them; "" where it was cut off."""
    spent: Spending
    error: str = ""
    """Why it was given up; "": it was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolutionsRecord:
    """The answered requests for solutions of one new problem."""

    number: int
    index: int
    texts: tuple[str, ...]
    spent: Spending


Record = ProposalRecord | SolutionsRecord
_KINDS: Mapping[str, type[Record]] = {"proposal": ProposalRecord, "solutions": SolutionsRecord}


def record_to_json(record: Record) -> str:
    """One line."""
    kind = next(name for name, type_ in _KINDS.items() if isinstance(record, type_))
    return json.dumps({"kind": kind, **asdict(record)})


def record_from_json(line: str) -> Record:
    """Raises ValueError if the line is no record."""
    data = json.loads(line)
    try:
        kind = _KINDS[data.pop("kind")]
        data["spent"] = Spending(**data["spent"])
        for name in ("seeds", "texts"):
            if name in data:
                data[name] = tuple(data[name])
        return kind(**data)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no record of a synthesis: {error}") from error


class Journal(Protocol):
    """Where records are kept; a record that `append` returned for survives a kill."""

    def append(self, record: Record) -> None: ...


# -------------------------------------------------------------------- what follows from it


@dataclass(frozen=True, slots=True, kw_only=True)
class NewProblem:
    """A proposed problem that is new, and what its solutions said."""

    number: int
    index: int
    id: str
    level: str
    text: str
    seeds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptProblem:
    """A new problem with an answer its solutions agree on."""

    problem: NewProblem
    answer: str
    num_agreeing: int
    num_solutions: int

    @property
    def agreement(self) -> float:
        return self.num_agreeing / self.num_solutions


def read_proposal(text: str) -> str:
    """The problem in what a model wrote; "" if there is none."""
    text = text.split(END)[0].split("\nSolution:")[0].strip()
    for opening in ("New problem:", "Problem:"):
        text = text.removeprefix(opening).strip()
    return text.removesuffix("END").strip()


Agreement = tuple[str, int] | str
"""An answer and how many solutions have it, or why there is none."""


def agreed_answer(texts: Sequence[str], min_agreement: int) -> Agreement:
    """(answer, how many solutions have it), or why there is none."""
    answers = [extract_answer(text) for text in texts]
    groups = sorted(answer_groups(answers), key=len, reverse=True)
    if not groups:
        return "no solution has an answer"
    first = len(groups[0])
    if first < min_agreement:
        return "solutions disagree"
    if len(groups) > 1 and len(groups[1]) == first:
        return "two answers have equally many solutions"
    return (answers[groups[0][0]] or "").strip(), first


@dataclass(slots=True)
class _Seen:
    """Finds out whether a text says what an earlier one said; rules of `duplicates`."""

    keys: set[int] = field(default_factory=set)
    buckets: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    sets: list[Hashes] = field(default_factory=list)

    def add(self, text: str) -> bool:
        """Take a text; False if it is a duplicate."""
        key = problem_key(text)
        if key in self.keys:
            return False
        batch = tokenise([text])
        own = shingle_sets([text])[0]
        places = list(enumerate(bands(batch, numbers_key(batch))[0].tolist()))
        near = {n for place in places for n in self.buckets.get(place, ())}
        if any(similarity(self.sets[n], own) >= MIN_SIMILARITY for n in near):
            return False
        self.keys.add(key)
        for place in places:
            self.buckets.setdefault(place, []).append(len(self.sets))
        self.sets.append(own)
        return True


class Synthesis:
    """What is known and what is to be asked next; told things, asks nobody itself.

    Proposals are looked at in the order of their numbers, whenever they were answered, so that the
    order of answers decides nothing.
    """

    def __init__(
        self, config: SynthesisConfig, seeds: Sequence[Problem], records: Sequence[Record] = ()
    ) -> None:
        """
        Args:
            records: of earlier starts.
        Raises:
            SynthesisError: there are no seeds.
        """
        if not seeds:
            raise SynthesisError("there are no seed problems to show a model")
        self.config = config
        self._levels: dict[str, list[Problem]] = {}
        for problem in seeds:
            self._levels.setdefault(problem.level.value, []).append(problem)
        self._seen = _Seen()
        for problem in seeds:
            self._seen.add(problem.text)
        self._proposals: dict[int, ProposalRecord] = {}
        self._next_number = 0
        """Of the next proposal to look at; all before are looked at."""
        self._next_request = 0
        self._awaited: set[int] = set()
        """Numbers of proposals under way."""
        self.longest_prompt = len(config.proposal_text) + config.seeds_per_request * (
            20 + max(len(problem.text) for problem in seeds)
        )
        """Characters at most of a request for new problems."""
        self.open: dict[tuple[int, int], NewProblem] = {}
        """New problems whose solutions are not asked for yet."""
        self._asked: dict[tuple[int, int], NewProblem] = {}
        self.kept: dict[tuple[int, int], KeptProblem] = {}
        self.rejected: Counter[str] = Counter()
        self.left_over = 0
        """New problems whose solutions could not be had."""
        self.spent = Spending()
        self._solutions: dict[tuple[int, int], SolutionsRecord] = {}
        for record in records:
            if isinstance(record, SolutionsRecord):
                self._solutions[record.number, record.index] = record
        for record in records:
            if isinstance(record, ProposalRecord):
                self.told_proposal(record)

    @property
    def num_proposed(self) -> int:
        """Requests for new problems that were answered."""
        return len(self._proposals)

    @property
    def num_judged(self) -> int:
        """New texts of which it is known whether they are kept."""
        return len(self.kept) + sum(self.rejected.values())

    @property
    def num_under_way(self) -> int:
        """Texts that were asked for, or wait for their solutions."""
        # Answered before one that was asked earlier, and so not looked at.
        held = len(self._proposals) - self._next_number
        texts = (len(self._awaited) + held) * self.config.problems_per_request
        return texts + len(self.open) + len(self._asked)

    @property
    def num_unsolved(self) -> int:
        """Of these, those whose solutions are not asked for."""
        return self.num_under_way - len(self._asked)

    @property
    def finished(self) -> bool:
        return len(self.kept) >= self.config.num_problems

    def wants_proposal(self) -> bool:
        """Whether another request for new problems is of use, by the share kept so far."""
        while self._next_request in self._proposals:
            self._next_request += 1
        if self.finished or self._next_request >= self.config.most_proposals:
            return False
        share = (len(self.kept) + 1) / (self.num_judged + 1)
        missing = self.config.num_problems - len(self.kept)
        return self.num_under_way < math.ceil(missing / share)

    def next_proposal(self) -> tuple[int, tuple[str, ...], str, GenerationRequest]:
        """(number, ids of the seeds, level, request), after `wants_proposal` said yes."""
        number = self._next_request
        self._next_request += 1
        self._awaited.add(number)
        config = self.config
        rng = random.Random(f"{config.seed}/{number}")
        level = rng.choices(list(self._levels), [len(v) for v in self._levels.values()])[0]
        pool = self._levels[level]
        shown = rng.sample(pool, min(config.seeds_per_request, len(pool)))
        text = "".join(f"Problem {n}:\n{p.text.strip()}\n\n" for n, p in enumerate(shown, start=1))
        request = GenerationRequest(
            prompt=config.proposal_text.replace("{count}", str(len(shown))).replace(
                "{problems}", text
            ),
            num_candidates=config.problems_per_request,
            max_tokens=config.max_problem_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop=(END,),
            seed=derive_seed(config.seed, "propose", number) % 2**31,
        )
        return number, tuple(problem.id for problem in shown), level, request

    def next_solutions(self) -> tuple[NewProblem, GenerationRequest]:
        """The next new problem and the request for its solutions."""
        key = next(iter(self.open))
        problem = self._asked[key] = self.open.pop(key)
        config = self.config
        return problem, GenerationRequest(
            prompt=config.solution_text.replace("{problem}", problem.text),
            num_candidates=config.num_solutions,
            max_tokens=config.max_solution_tokens,
            temperature=config.solution_temperature,
            top_p=config.top_p,
            seed=derive_seed(config.seed, "solve", problem.id) % 2**31,
        )

    def told_proposal(self, record: ProposalRecord) -> None:
        """Take an answer to `next_proposal`."""
        self._awaited.discard(record.number)
        self.spent += record.spent
        self._proposals[record.number] = record
        while self._next_number in self._proposals:
            self._look_at(self._proposals[self._next_number])
            self._next_number += 1

    def told_solutions(self, record: SolutionsRecord, found: Agreement) -> None:
        """Take an answer to `next_solutions`, and what `agreed_answer` says of it."""
        self._judge(self._asked.pop((record.number, record.index)), record, found)

    def gave_up(self, problem: NewProblem) -> None:
        """Leave a problem without solutions for the next start."""
        del self._asked[problem.number, problem.index]
        self.left_over += 1

    def _look_at(self, record: ProposalRecord) -> None:
        for index, written in enumerate(record.texts):
            text = read_proposal(written)
            if not text:
                self.rejected["no problem was written"] += 1
            elif (reason := screen(text, "1")) is not None:
                self.rejected[f"set aside: {reason.value}"] += 1
            elif not self._seen.add(text):
                self.rejected["duplicate"] += 1
            else:
                problem = NewProblem(
                    number=record.number,
                    index=index,
                    id=problem_id(problem_key(text)),
                    level=record.level,
                    text=text,
                    seeds=record.seeds,
                )
                known = self._solutions.pop((record.number, index), None)
                if known is not None:
                    found = agreed_answer(known.texts, self.config.min_agreement)
                    self._judge(problem, known, found)
                else:
                    self.open[record.number, index] = problem

    def _judge(self, problem: NewProblem, record: SolutionsRecord, found: Agreement) -> None:
        self.spent += record.spent
        if isinstance(found, str):
            self.rejected[found] += 1
            return
        answer, agreeing = found
        reason = screen(problem.text, answer)
        if reason is not None:
            self.rejected[f"set aside: {reason.value}"] += 1
            return
        self.kept[problem.number, problem.index] = KeptProblem(
            problem=problem,
            answer=answer,
            num_agreeing=agreeing,
            num_solutions=self.config.num_solutions,
        )

    def table(self, model: str) -> pa.Table:
        """The kept problems in the order they were proposed."""
        return pa.Table.from_pylist(
            [
                {
                    "id": kept.problem.id,
                    "source": SOURCE,
                    "level": Level(kept.problem.level).value,
                    "problem": kept.problem.text,
                    "answer": kept.answer,
                    "agreement": kept.agreement,
                    "num_solutions": kept.num_solutions,
                    "num_agreeing": kept.num_agreeing,
                    "model": model,
                    "seed_ids": list(kept.problem.seeds),
                    "origin": f"{model}:{kept.problem.number}.{kept.problem.index}",
                }
                for _, kept in sorted(self.kept.items())
            ],
            schema=SCHEMA,
        )


def fingerprint(config: SynthesisConfig, seeds: Sequence[Problem], model: str) -> dict[str, str]:
    """What must be the same for a journal to be gone on with; what may differ is left out.

    One entry a part, so that an error can name the one that changed.
    """
    free = {"num_problems", "max_proposals", "max_open", "min_agreement"}
    settings = config.model_dump(mode="json", exclude=free) | {
        "propose_prompt": config.proposal_text,
        "solve_prompt": config.solution_text,
    }
    shown = "\n".join(f"{p.id} {problem_key(p.text):016x} {p.level.value}" for p in seeds)
    return {
        "model": model,
        "seeds": hashlib.sha256(shown.encode()).hexdigest()[:16],
        **{name: json.dumps(value) for name, value in settings.items()},
    }


# -------------------------------------------------------------------- the loop


async def run_synthesis(
    synthesis: Synthesis,
    *,
    policy: PolicyEngine,
    journal: Journal,
    budget: BudgetConfig,
    max_n: int = 16,
) -> str:
    """Ask until enough is kept, nothing more may be asked or the budget ends; returns why it ended.

    Cancelling it lets requests that are under way end, for `DRAIN_S`, since they are paid for.

    Args:
        max_n: candidates the endpoint takes in one HTTP request, of which budgets count each.
    Raises:
        EngineError: the endpoint will not answer any more, or too many requests in a row failed.
    """
    return await _Runner(synthesis, policy, journal, budget, max_n).run()


@dataclass(slots=True)
class _Runner:
    synthesis: Synthesis
    policy: PolicyEngine
    journal: Journal
    budget: BudgetConfig
    max_n: int
    tasks: dict[asyncio.Task[None], Spending] = field(default_factory=dict)
    """What each request under way may come to at most."""
    failures: int = 0
    """In a row."""

    async def run(self) -> str:
        try:
            while True:
                ended = self._start()
                if not self.tasks:
                    return ended
                done, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del self.tasks[task]
                for task in done:
                    task.result()
        finally:
            if self.tasks:
                _, pending = await asyncio.wait(self.tasks, timeout=DRAIN_S)
                for task in pending:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)

    def _start(self) -> str:
        """Start what may be started; returns why nothing more is, for when nothing is under way."""
        synthesis = self.synthesis
        while len(self.tasks) < synthesis.config.max_open:
            solving = bool(synthesis.open) and not synthesis.finished
            if not solving and not synthesis.wants_proposal():
                if synthesis.finished:
                    return f"{len(synthesis.kept):,} problems are kept"
                return f"{synthesis.num_proposed:,} requests for new problems were made"
            most, later = self._most_of_solutions(), Spending()
            if not solving:
                # A problem without solutions is wasted, so theirs must fit too.
                most = self._most_of_proposal()
                count = synthesis.num_unsolved + synthesis.config.problems_per_request
                later = sum([self._most_of_solutions()] * count, Spending())
            reserved = sum(self.tasks.values(), Spending())
            limit = (synthesis.spent + reserved + most + later).over(self.budget)
            if limit:
                return f"the budget is used up ({limit})"
            # What is asked is settled here: the task begins later.
            if solving:
                work = self._solve(*synthesis.next_solutions())
            else:
                work = self._propose(*synthesis.next_proposal())
            self.tasks[asyncio.create_task(work)] = most
        return ""

    def _most_of_proposal(self) -> Spending:
        config = self.synthesis.config
        prompt = math.ceil(self.synthesis.longest_prompt / MIN_TOKEN_CHARS)
        return self._most(config.problems_per_request, prompt, config.max_problem_tokens)

    def _most_of_solutions(self) -> Spending:
        config = self.synthesis.config
        prompt = math.ceil(len(config.solution_text) / MIN_TOKEN_CHARS) + config.max_problem_tokens
        return self._most(config.num_solutions, prompt, config.max_solution_tokens)

    def _most(self, n: int, prompt_tokens: int, max_tokens: int) -> Spending:
        """The most a request for `n` texts may come to."""
        requests = math.ceil(n / self.max_n)
        return Spending(
            requests=requests,
            prompt_tokens=requests * prompt_tokens,
            generated_tokens=n * max_tokens,
        )

    async def _propose(
        self, number: int, seeds: tuple[str, ...], level: str, request: GenerationRequest
    ) -> None:
        texts: tuple[str, ...] = ()
        spent, error = Spending(), ""
        try:
            reply = await self.policy.generate(request)
            texts, spent = tuple(map(_whole, reply.completions)), self._spent(reply)
            self.failures = 0
        except PolicyEnded:
            raise
        except EngineError as failure:
            self._failed(failure)
            error = str(failure)
        record = ProposalRecord(
            number=number, seeds=seeds, level=level, texts=texts, spent=spent, error=error
        )
        self.journal.append(record)
        self.synthesis.told_proposal(record)

    async def _solve(self, problem: NewProblem, request: GenerationRequest) -> None:
        try:
            reply = await self.policy.generate(request)
        except PolicyEnded:
            raise
        except EngineError as failure:
            # Not in the journal: the problem is paid for, and is asked again by the next start.
            self._failed(failure)
            self.synthesis.gave_up(problem)
            return
        self.failures = 0
        record = SolutionsRecord(
            number=problem.number,
            index=problem.index,
            texts=tuple(completion.text for completion in reply.completions),
            spent=self._spent(reply),
        )
        self.journal.append(record)
        # Comparing answers may take a while, so not on the event loop.
        found = await asyncio.to_thread(
            agreed_answer, record.texts, self.synthesis.config.min_agreement
        )
        self.synthesis.told_solutions(record, found)

    def _failed(self, failure: EngineError) -> None:
        """Raises the failure if the endpoint is of no use any more."""
        self.failures += 1
        if self.failures >= MAX_FAILURES_IN_A_ROW:
            raise EngineError(
                f"{self.failures} requests in a row failed, last: {failure}"
            ) from failure

    def _spent(self, reply: GenerationReply) -> Spending:
        return Spending(
            requests=math.ceil(len(reply.completions) / self.max_n),
            prompt_tokens=reply.prompt_tokens,
            generated_tokens=sum(c.num_tokens for c in reply.completions),
        )


def _whole(completion: Completion) -> str:
    """The text; "" if it was cut off."""
    return completion.text if completion.finish is FinishReason.STOP else ""
