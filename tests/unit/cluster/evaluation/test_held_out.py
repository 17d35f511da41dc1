from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import Evaluation, balanced, evaluate, evaluate_problem, judge
from cluster.folder.run_folder import RunFolderError
from rollout.engine import Completion, FinishReason, GenerationReply, GenerationRequest
from rollout.problem import Level, Problem
from rollout.search import SearchConfig, SearchError
from rollout.store import RunStore, TrajectoryStore, evaluation_of, ruler_of, stored_rounds
from rollout.table import table_to_trees, trees_to_table
from rollout.tree import Tree
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference, random_steps
from tests.local_fleet import LocalFleet
from tests.scripted_replicas import hash_value


def problem(name: str, level: Level, answer: str) -> Problem:
    return Problem(id=name, source="s", level=level, text=f"{name}?", answer=answer)


PROBLEMS = [
    problem("a", Level.GSM, "3"),
    problem("b", Level.MATH, "4"),
    problem("c", Level.GSM, "3"),
]


def answer(value: str) -> str:
    return f"<answer>\\boxed{{{value}}}<end_of_answer>"


TOKENS = ("search_tokens", "sample_tokens")


def run(
    policy: ScriptedPolicy,
    preference: TablePreference | None,
    *,
    problems: Sequence[Problem] = PROBLEMS,
    max_depth: int = 16,
    round: int = 1,
    seed: int = 0,
    **config: object,
) -> Evaluation:
    """As `evaluate` does it with a fleet, its workers and its store."""
    made = EvaluationConfig(**config)  # type: ignore[arg-type]
    searched = balanced(problems, made.num_search_problems) if preference is not None else []
    search = SearchConfig(template="short", max_depth=max_depth)

    async def one(problem: Problem) -> list[Tree]:
        return await evaluate_problem(
            Tree(problem=problem, round=-2),
            config=made,
            round=round,
            seed=seed,
            searched=[p.id for p in searched],
            search=made.searched(search),
            policy=policy,
            preference=preference,
            sandbox=ScriptedSandbox({"bad": Failure()}, default="3\n"),
            clock=lambda: 0.0,
        )

    trees = [tree for problem in problems for tree in asyncio.run(one(problem))]
    found = judge(table_to_trees(trees_to_table(trees)), top_k=made.vote_top_k)
    return Evaluation(round=round, problems=tuple(found.values()))


def always_three(request: GenerationRequest) -> list[str]:
    if request.prompt.endswith("<end_of_output>\n"):
        return [answer("3")]
    return ["print(3)\n<end_of_code>"]


def test_all_but_greedy_sample_at_the_temperature_of_the_evaluation() -> None:
    policy = ScriptedPolicy(always_three)
    run(policy, TablePreference({}), num_rollouts=2, temperature=0.5)
    assert {request.temperature for request in policy.requests} == {0.0, 0.5}


def test_without_a_ppm_only_greedy_is_measured() -> None:
    evaluation = run(ScriptedPolicy(always_three), None)
    assert evaluation.shares("greedy") == {
        "gsm": 1.0,
        "math": 0.0,
        "olympiad": None,
        "all": pytest.approx(2 / 3),
    }
    assert evaluation.shares("majority") is None
    assert evaluation.search_over_samples_tokens is None


def test_samples_are_drawn_until_they_took_the_tokens_of_search() -> None:
    policy = ScriptedPolicy(always_three)
    evaluation = run(policy, TablePreference({}, default=0.1), num_rollouts=3, num_candidates=2)
    sample = len("print(3)\n<end_of_code>") // 4 + len(answer("3")) // 4
    for result in evaluation.problems:
        assert result.sample_tokens == result.num_samples * sample
        assert abs(result.search_tokens - result.sample_tokens) <= sample / 2
        assert result.search == result.weighted_search == (result.problem_id != "b")
    tokens = [sum(getattr(p, n) for p in evaluation.problems) for n in TOKENS]
    assert evaluation.search_over_samples_tokens == pytest.approx(tokens[0] / tokens[1])
    assert evaluation.samples_per_problem == evaluation.problems[0].num_samples


@pytest.mark.parametrize(("num_candidates", "num_rollouts"), [(4, 1), (4, 2), (8, 8), (32, 12)])
def test_search_and_samples_of_uneven_length_have_the_same_tokens_within_five_percent(
    num_candidates: int, num_rollouts: int
) -> None:
    def script(request: GenerationRequest) -> list[str]:
        """Steps and programs whose lengths differ tenfold."""
        rng = random.Random(request.seed)
        if request.prompt.endswith("<end_of_output>\n"):
            return [answer("3")]
        whole = "<end_of_step>" not in request.stop
        end = "<end_of_code>" if whole or rng.random() < 0.4 else "<end_of_step>"
        return [
            f"x = '{'y' * int(rng.lognormvariate(5, 0.5) * (3 if whole else 1))}{n}'\n{end}"
            for n in range(request.num_candidates)
        ]

    problems = [problem(f"p{n}", Level.GSM, "3") for n in range(40)]
    evaluation = run(
        ScriptedPolicy(script),
        TablePreference(lambda text: math.sin(len(text))),
        problems=problems,
        num_rollouts=num_rollouts,
        num_candidates=num_candidates,
    )
    ratio = evaluation.search_over_samples_tokens
    assert ratio is not None and 0.95 <= ratio <= 1.05, ratio


def test_best_of_n_follows_the_ppm_and_majority_the_count() -> None:
    drawn: Counter[str] = Counter()

    def script(request: GenerationRequest) -> list[str]:
        if request.prompt.endswith("<end_of_output>\n"):
            return [answer("3")] if "print(3)" in request.prompt else [answer("4")]
        # of each four programs one prints 4
        first = drawn[request.prompt]
        drawn[request.prompt] += request.num_candidates
        numbers = [4 if (first + n) % 4 == 3 else 3 for n in range(request.num_candidates)]
        return [f"print({number})\n<end_of_code>" for number in numbers]

    likes_four = TablePreference(lambda text: 0.9 if "print(4)" in text else -0.9)
    evaluation = run(ScriptedPolicy(script), likes_four, num_rollouts=4)
    by_id = {p.problem_id: p for p in evaluation.problems}
    assert by_id["a"].num_samples >= 4
    assert (by_id["a"].majority, by_id["a"].best_of_n) == (True, False)
    assert (by_id["b"].majority, by_id["b"].best_of_n) == (False, True)
    # three chances of .05 against one of .95
    assert [by_id[name].weighted_majority for name in "ab"] == [False, True]


def test_record_is_plain_data_and_reads_back_equal() -> None:
    evaluation = run(ScriptedPolicy(always_three), TablePreference({}), num_rollouts=2)
    record = json.loads(json.dumps(evaluation.as_record()))
    assert Evaluation.from_record(record) == evaluation
    # of a run that began before these were measured
    for problem in record["problems"]:
        del problem["weighted_majority"], problem["weighted_search"]
    old = Evaluation.from_record(record)
    assert old.shares("weighted_majority") is None and old.shares("weighted_search") is None


def test_balanced_choice_takes_levels_in_turn() -> None:
    assert [p.id for p in balanced(PROBLEMS, 2)] == ["a", "b"]
    assert [p.id for p in balanced(PROBLEMS, None)] == ["a", "b", "c"]


def test_problem_that_does_not_fit_the_policy_is_a_wrong_answer_everywhere() -> None:
    too_long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    evaluation = run(ScriptedPolicy({"": [too_long]}), TablePreference({}), num_rollouts=2)
    for result in evaluation.problems:
        assert (result.greedy, result.majority, result.best_of_n, result.search) == (False,) * 4
        assert (result.any_sample, result.any_search, result.search_tokens) == (False, False, 0)
        assert result.weighted_search is False


KNOWN = """
     greedy  majority  best_of_n  search  any_sample  any_search  num_samples  tokens of the three
p0   1       1         1          1       1           1           9            14   53   56
p1   0       0         0          0       0           0           9            4    54   53
p2   0       0         1          1       1           1           14           4    81   77
p3   0       0         1          0       1           0           8            14   54   51
p4   0       1         1          0       1           0           6            4    61   57
p5   0       0         0          0       0           0           11           4    56   55
p6   0       0         1          1       1           1           10           1    71   66
p7   0       1         0          1       1           1           7            14   62   57
p8   0       None      None       None    None        None        0            1    0    0
p9   0       None      None       None    None        None        0            4    0    0
"""


def test_seeded_evaluation_is_what_it_always_was() -> None:
    """Values are few, so that votes and draws decide; some searches need a second tree."""
    problems = [
        Problem(
            id=f"p{n}",
            source="s",
            level=list(Level)[n % 3],
            text=f"How many in {n}?",
            answer="3" if n % 3 else "4",
        )
        for n in range(10)
    ]
    evaluation = run(
        ScriptedPolicy(random_steps),
        TablePreference(lambda text: round(hash_value(text)) / 2),
        problems=problems,
        max_depth=4,
        round=2,
        seed=7,
        num_rollouts=3,
        num_candidates=3,
        num_search_problems=8,
    )
    names = ("greedy", "majority", "best_of_n", "search", "any_sample", "any_search")
    counts = ("num_samples", "greedy_tokens", "sample_tokens", "search_tokens")
    found = [
        [p.problem_id, *(v if (v := getattr(p, n)) is None else int(v) for n in (*names, *counts))]
        for p in evaluation.problems
    ]
    rows = [line.split() for line in KNOWN.strip().splitlines()[1:]]
    assert [[str(value) for value in row] for row in found] == rows


@pytest.fixture(autouse=True)
def whole_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer here needs the symbolic stage, whose process takes seconds to start."""
    monkeypatch.setattr("cluster.fleet.stages.start_symbolic_worker", lambda: True)


class EvaluatingFleet(LocalFleet):
    async def evaluate(self, problems: Sequence[Problem]) -> Evaluation:
        found, _ = await evaluate(
            self,  # type: ignore[arg-type]
            problems,
            config=EvaluationConfig(num_rollouts=3, num_candidates=3, num_search_problems=8),
            search=SearchConfig(template="short", max_depth=4),
            round=2,
            seed=7,
            preference=True,
            on_progress=lambda done, total, facts: None,
        )
        return found

    @property
    def asked(self) -> set[str]:
        """The problems that the policy was asked about."""
        return {request.routing_key for request in self.policy.requests}

    @property
    def committed(self) -> set[str]:
        store = TrajectoryStore(RunStore(str(self.folder.root)), evaluation_of(2))
        return {key.problem_id for c in store.commits().values() for key in c.trees}


TWELVE = [
    Problem(id=f"q{n}", source="s", level=Level.GSM, text=f"How many in {n}?", answer="3")
    for n in range(12)
]


def local(root: Path, script: Any = random_steps, *, failures: int = 0) -> EvaluatingFleet:
    policy = ScriptedPolicy(script, failures=failures)
    return EvaluatingFleet(root, policy, TablePreference(hash_value, failures=failures))


async def test_engines_that_fail_cost_retries_and_change_nothing(tmp_path: Path) -> None:
    expected = await local(tmp_path / "whole").evaluate(TWELVE)
    assert await local(tmp_path / "failing", failures=5).evaluate(TWELVE) == expected
    assert [p.problem_id for p in expected.problems] == [p.id for p in TWELVE]
    assert sum(p.search is not None for p in expected.problems) == 8


class StuckPolicy(ScriptedPolicy):
    """Answers about so many problems, and never about another one."""

    def __init__(self, script: Any, *, after: int) -> None:
        super().__init__(script)
        self.after = after
        self.known: set[str] = set()

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        if len(self.known) < self.after:
            self.known.add(request.routing_key)
        if request.routing_key not in self.known:
            await asyncio.Event().wait()
        return await super().generate(request)


async def test_what_is_committed_is_not_evaluated_again(tmp_path: Path) -> None:
    first = local(tmp_path / "cut")
    first.policy = StuckPolicy(random_steps, after=7)
    work = asyncio.create_task(first.evaluate(TWELVE))
    while not first.committed:
        await asyncio.sleep(0.005)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    done = first.committed
    assert 0 < len(done) < len(TWELVE)

    second = local(tmp_path / "cut")
    found = await second.evaluate(TWELVE)
    assert second.asked == {p.id for p in TWELVE} - done
    assert found == await local(tmp_path / "whole").evaluate(TWELVE)
    third = local(tmp_path / "cut")
    assert await third.evaluate(TWELVE) == found and not third.asked


@pytest.mark.parametrize("changed", ["policy", "ppm"])
async def test_evaluation_begun_with_other_models_is_refused(tmp_path: Path, changed: str) -> None:
    first = local(tmp_path)
    first.policy = StuckPolicy(random_steps, after=7)
    work = asyncio.create_task(first.evaluate(TWELVE))
    while not first.committed:
        await asyncio.sleep(0.005)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    forced = local(tmp_path)
    forced.versions = {**first.versions, changed: "promoted"}
    wanted = rf"round=2: .* begun with policy policy-r2-a .* {changed} promoted.* remove"
    with pytest.raises(RunFolderError, match=wanted):
        await forced.evaluate(TWELVE)
    assert not forced.asked
    shutil.rmtree(tmp_path / "evaluations/round=2")
    assert await forced.evaluate(TWELVE) == await local(tmp_path / "whole").evaluate(TWELVE)


def breaking(request: GenerationRequest) -> list[str]:
    if "in 5?" in request.prompt:
        raise OverflowError("five")
    return random_steps(request)


async def test_problem_that_keeps_failing_is_set_aside_and_wrong(tmp_path: Path) -> None:
    expected = await local(tmp_path / "whole").evaluate(TWELVE)
    found = await local(tmp_path / "run", breaking).evaluate(TWELVE)
    assert found.failures == {"q5": "OverflowError: five"}
    others = [p for p in expected.problems if p.problem_id != "q5"]
    assert [p for p in found.problems if p.problem_id != "q5"] == others
    wrong = found.problems[5]
    assert (wrong.greedy, wrong.majority, wrong.search, wrong.any_sample) == (False,) * 4
    assert Evaluation.from_record(json.loads(json.dumps(found.as_record()))) == found


async def test_evaluation_of_nothing_but_failures_says_what_to_do(tmp_path: Path) -> None:
    wanted = r"none of 1 problems .* q5 for: OverflowError: five; .* remove .*evaluations/round=2"
    with pytest.raises(SearchError, match=wanted):
        await local(tmp_path / "run", breaking).evaluate(TWELVE[5:6])


def test_evaluations_are_not_among_the_rounds_of_a_run(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    for number in (1, evaluation_of(0), evaluation_of(1), ruler_of(1)):
        TrajectoryStore(store, number).create_plan("base", b"{}")
    assert stored_rounds(store) == [1]
    assert stored_rounds(store, evaluations=True) == [ruler_of(1), -2, -1, 1]
    assert (tmp_path / "evaluations/round=0/plans/base.json").is_file()
    assert (tmp_path / "rulers/round=1/plans/base.json").is_file()
    assert evaluation_of(evaluation_of(3)) == ruler_of(ruler_of(3)) == 3
