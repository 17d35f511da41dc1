"""Making problems: agreement, duplicates, the journal's replay, budgets, failures."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence

import pytest
from pydantic import ValidationError

from rollout.engine import Completion, EngineError, FinishReason, GenerationReply, GenerationRequest
from rollout.problem import Level, Problem
from rollout.problems.synthesis import (
    BudgetConfig,
    PolicyEnded,
    ProposalRecord,
    Record,
    Spending,
    Synthesis,
    SynthesisConfig,
    SynthesisError,
    agreed_answer,
    fingerprint,
    read_proposal,
    record_from_json,
    record_to_json,
    run_synthesis,
)
from tests.builders import make_problem

NOUNS = ("apples", "bricks", "cards", "drums", "eggs", "forks", "gloves", "hats", "inks", "jars")


def seed_problems() -> list[Problem]:
    return [
        make_problem(
            f"s{n}", text=f"Ann has {n} red pens and finds {n + 2} more. How many?", level=level
        )
        for n, level in enumerate([Level.GSM, Level.GSM, Level.MATH, Level.MATH])
    ]


def boxed(*answers: str) -> list[str]:
    return [f"So it is $\\boxed{{{answer}}}$." for answer in answers]


def propose(number: int) -> str:
    noun = NOUNS[number % len(NOUNS)]
    return (
        f"A shop number {number} sells {noun} in boxes of {number + 3}, and a buyer takes "
        f"{2 * number + 5} boxes of {noun} home. What is the count of {noun}?"
    )


class Writer:
    """A model: writes a problem per request, and solves what it wrote; answers are counted."""

    def __init__(
        self,
        write: Callable[[int], str] = propose,
        solve: Callable[[str], list[str]] = lambda text: boxed("7", "7.0", "8", "7"),
    ) -> None:
        self.write = write
        self.solve = solve
        self.prompts: list[str] = []
        self.num_proposed = 0
        self.fail: Callable[[str], EngineError | None] = lambda prompt: None
        self.hold: asyncio.Event | None = None

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        if self.hold is not None and "Solve" in request.prompt:
            await self.hold.wait()
        await asyncio.sleep(0)
        failure = self.fail(request.prompt)
        if failure is not None:
            raise failure
        self.prompts.append(request.prompt)
        if "Solve" in request.prompt:
            texts = self.solve(request.prompt)
        else:
            texts = []
            for _ in range(request.num_candidates):
                texts.append(self.write(self.num_proposed) + "\nEND")
                self.num_proposed += 1
        return GenerationReply(
            completions=tuple(
                Completion(text=t, finish=FinishReason.STOP, num_tokens=10) for t in texts
            ),
            prompt_tokens=50,
        )


class Kept(list[Record]):
    """A journal in memory."""


CONFIG = SynthesisConfig(
    num_problems=3,
    num_solutions=4,
    seeds_per_request=2,
    max_open=2,
    max_problem_tokens=20,
    max_solution_tokens=20,
)


async def run(
    writer: Writer,
    config: SynthesisConfig = CONFIG,
    *,
    journal: Kept | None = None,
    budget: BudgetConfig | None = None,
    max_n: int = 16,
) -> tuple[Synthesis, str]:
    journal = journal if journal is not None else Kept()
    synthesis = Synthesis(config, seed_problems(), list(journal))
    why = await run_synthesis(
        synthesis, policy=writer, journal=journal, budget=budget or BudgetConfig(), max_n=max_n
    )
    return synthesis, why


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (boxed("7", "7.0", "8", "7"), ("7", 3)),
        (boxed("1/2", "0.5", "\\frac{1}{2}", "3"), ("1/2", 3)),
        (boxed("7", "7", "8", "9"), "solutions disagree"),
        (boxed("7", "7", "7", "8", "8", "8"), "two answers have equally many solutions"),
        (["no box", "7", ""], "no solution has an answer"),
    ],
)
def test_answers_agree_when_they_are_equal(texts: list[str], found: object) -> None:
    assert agreed_answer(texts, 3) == found


@pytest.mark.parametrize(
    "written",
    [
        "How many?\nEND",
        "New problem:\nHow many?\nEND of it",
        "Problem: How many?\nSolution: 7",
        "  How many? ",
        "How many? END",
    ],
)
def test_the_problem_is_found_in_what_a_model_writes(written: str) -> None:
    assert read_proposal(written) == "How many?"


async def test_problems_are_kept_with_answer_agreement_and_where_they_come_from() -> None:
    writer = Writer()
    synthesis, why = await run(writer)
    rows = synthesis.table("big-model").to_pylist()
    assert why == "3 problems are kept"
    assert len(rows) == len({row["id"] for row in rows}) == 3
    assert {(r["source"], r["answer"], r["agreement"], r["num_solutions"]) for r in rows} == {
        ("synthetic", "7", 0.75, 4)
    }
    assert {r["model"] for r in rows} == {"big-model"}
    levels = {problem.id: problem.level.value for problem in seed_problems()}
    assert all({levels[i] for i in row["seed_ids"]} == {row["level"]} for row in rows)
    assert all(len(row["seed_ids"]) == 2 for row in rows)
    assert synthesis.spent.requests == len(writer.prompts)


async def test_what_was_seen_before_is_not_kept() -> None:
    texts = [
        seed_problems()[1].text,
        propose(0),
        propose(0).replace("takes", "takes ").upper().lower(),
        propose(1),
        "Prove that there are infinitely many primes.",
        "",
        propose(2),
    ]
    writer = Writer(write=lambda number: texts[number])
    config = CONFIG.model_copy(update={"max_proposals": len(texts), "num_problems": 9})
    synthesis, why = await run(writer, config)
    assert synthesis.rejected == {
        "duplicate": 2,
        "set aside: proof": 1,
        "no problem was written": 1,
    }
    assert len(synthesis.kept) == 3
    assert why == "7 requests for new problems were made"


async def test_problems_without_agreement_are_left_out_with_a_reason() -> None:
    answers = {0: boxed("1", "2", "3", "4"), 1: boxed("7", "7", "7", "1"), 2: ["?"] * 4}

    def solve(prompt: str) -> list[str]:
        found = re.search(r"shop number (\d+)", prompt)
        assert found is not None
        return answers[int(found[1])]

    config = CONFIG.model_copy(update={"max_proposals": 3})
    synthesis, _ = await run(Writer(solve=solve), config)
    assert len(synthesis.kept) == 1
    assert synthesis.rejected == {"solutions disagree": 1, "no solution has an answer": 1}


async def test_nothing_is_asked_twice_and_the_result_is_the_same() -> None:
    journal = Kept()
    first, _ = await run(Writer(), journal=journal)
    silent = Writer()
    again, why = await run(silent, journal=journal)
    assert silent.prompts == [] and why == "3 problems are kept"
    assert again.table("m") == first.table("m")
    assert (again.spent, again.rejected) == (first.spent, first.rejected)


async def test_a_journal_cut_off_anywhere_is_gone_on_with() -> None:
    whole = Kept()
    writer = Writer()
    await run(writer, journal=whole)
    for length in range(len(whole) + 1):
        journal = Kept(whole[:length])
        other = Writer()
        other.num_proposed = sum(isinstance(r, ProposalRecord) for r in journal)
        synthesis, _ = await run(other, journal=journal)
        assert len(synthesis.kept) >= 3
        assert len(other.prompts) == len(journal) - length
        solved = [p for p in other.prompts if "Solve" in p]
        assert len(set(solved)) == len(solved)


def test_records_survive_the_way_through_json() -> None:
    record = ProposalRecord(
        number=3,
        seeds=("a", "b"),
        level="gsm",
        texts=("\ud800 \n x",),
        spent=Spending(requests=1, prompt_tokens=5),
    )
    assert record_from_json(record_to_json(record)) == record
    for line in ('{"kind": "other"}', "[]", '{"kind": "solutions", "number": 1}'):
        with pytest.raises(ValueError, match="no record"):
            record_from_json(line)


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        (BudgetConfig(max_requests=5), "budget.max_requests = 5"),
        (BudgetConfig(max_tokens=1500), "budget.max_tokens = 1,500"),
        (BudgetConfig(max_usd=0.01, usd_per_million_generated_tokens=100), "max_usd = 0.01"),
    ],
)
async def test_a_budget_is_never_passed_and_counts_earlier_starts(
    budget: BudgetConfig, limit: str
) -> None:
    journal = Kept()
    config = CONFIG.model_copy(update={"num_problems": 50, "max_open": 8})
    synthesis, why = await run(Writer(), config, journal=journal, budget=budget)
    assert limit in why
    assert synthesis.spent.requests > 1 and not synthesis.spent.over(budget)
    silent = Writer()
    silent.num_proposed = 50
    again, why = await run(silent, config, journal=journal, budget=budget)
    assert limit in why
    assert not again.spent.over(budget)
    assert len(silent.prompts) <= 1


def test_dollars_need_prices() -> None:
    with pytest.raises(ValidationError, match="usd_per_million"):
        BudgetConfig(max_usd=3)


async def test_a_failed_request_costs_one_problem_and_no_more() -> None:
    writer = Writer()
    failed = []

    def fail(prompt: str) -> EngineError | None:
        if "Solve" in prompt and not failed:
            failed.append(prompt)
            return EngineError("gave up after 5 tries")
        return None

    writer.fail = fail
    journal = Kept()
    synthesis, _ = await run(writer, journal=journal)
    assert len(synthesis.kept) == 3 and synthesis.left_over == 1
    again = Writer()
    more, _ = await run(again, CONFIG.model_copy(update={"num_problems": 4}), journal=journal)
    assert failed[0] in again.prompts
    assert len(more.kept) >= 4


async def test_an_endpoint_that_ended_stops_the_run_and_burns_nothing() -> None:
    writer = Writer()
    writer.fail = lambda prompt: PolicyEnded("HTTP 401: wrong key")
    journal = Kept()
    with pytest.raises(PolicyEnded, match="wrong key"):
        await run(writer, journal=journal)
    assert journal == []


async def test_failures_in_a_row_stop_the_run() -> None:
    writer = Writer()
    writer.fail = lambda prompt: EngineError("no connection")
    with pytest.raises(EngineError, match="10 requests in a row failed, last: no connection"):
        await run(writer)


async def test_a_run_that_is_stopped_keeps_what_was_under_way() -> None:
    writer = Writer()
    writer.hold = asyncio.Event()
    journal = Kept()
    task = asyncio.create_task(run(writer, journal=journal))
    while not any(isinstance(r, ProposalRecord) for r in journal):
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    writer.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert any(not isinstance(record, ProposalRecord) for record in journal)


async def test_what_is_stuck_is_given_up_after_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.problems.synthesis.DRAIN_S", 0.01)
    writer = Writer()
    writer.hold = asyncio.Event()
    task = asyncio.create_task(run(writer))
    for _ in range(50):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_order_of_answers_decides_nothing() -> None:
    def told(order: Sequence[int]) -> list[str]:
        synthesis = Synthesis(CONFIG, seed_problems())
        for number in order:
            text = propose(0) if number in (1, 2) else propose(number + 5)
            record = ProposalRecord(
                number=number, seeds=("s0",), level="gsm", texts=(text,), spent=Spending()
            )
            synthesis.told_proposal(record)
        return [f"{p.number}.{p.index} {p.text}" for p in synthesis.open.values()]

    assert told([0, 1, 2, 3]) == told([3, 1, 2, 0]) == told([2, 3, 1, 0])
    assert len(told([0, 1, 2, 3])) == 3


def test_settings_that_change_what_is_asked_change_the_fingerprint() -> None:
    seeds = seed_problems()
    before = fingerprint(CONFIG, seeds, "m")
    more = CONFIG.model_copy(update={"num_problems": 99, "max_open": 1})
    assert fingerprint(more, seeds, "m") == before
    other = fingerprint(CONFIG.model_copy(update={"temperature": 0.5}), seeds[:2], "n")
    assert {name for name in before if before[name] != other[name]} == {
        "model",
        "seeds",
        "temperature",
    }


def test_seeds_are_needed() -> None:
    with pytest.raises(SynthesisError, match="no seed problems"):
        Synthesis(CONFIG, [])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValidationError, match="min_agreement must not be over num_solutions"):
        SynthesisConfig(num_solutions=2)
    with pytest.raises(ValidationError, match=r"solve_prompt has no \{problem\}"):
        SynthesisConfig(solve_prompt="Solve it")
