from __future__ import annotations

import asyncio
import json

import pytest

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.held_out import Evaluation, balanced, evaluate
from rollout.engine import Completion, FinishReason, GenerationRequest
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference


def problem(name: str, level: Level, answer: str) -> Problem:
    return Problem(id=name, source="s", level=level, text=f"{name}?", answer=answer)


PROBLEMS = [
    problem("a", Level.GSM, "3"),
    problem("b", Level.MATH, "4"),
    problem("c", Level.GSM, "3"),
]


def answer(value: str) -> str:
    return f"<answer>\\boxed{{{value}}}<end_of_answer>"


def run(policy: ScriptedPolicy, preference: TablePreference | None, **config: object) -> Evaluation:
    return asyncio.run(
        evaluate(
            PROBLEMS,
            config=EvaluationConfig(**config),  # type: ignore[arg-type]
            search=SearchConfig(template="short"),
            round=1,
            seed=0,
            policy=policy,
            preference=preference,
            sandbox=ScriptedSandbox(default="3\n"),
            max_open=2,
        )
    )


def always_three(request: GenerationRequest) -> list[str]:
    if request.prompt.endswith("<end_of_output>\n"):
        return [answer("3")]
    return ["print(3)\n<end_of_code>"]


def test_without_a_ppm_only_greedy_is_measured() -> None:
    evaluation = run(ScriptedPolicy(always_three), None)
    assert evaluation.shares("greedy") == {
        "gsm": 1.0,
        "math": 0.0,
        "olympiad": None,
        "all": pytest.approx(2 / 3),
    }
    assert evaluation.shares("majority") is None


def test_search_stops_at_the_tokens_the_samples_used() -> None:
    policy = ScriptedPolicy(always_three)
    evaluation = run(policy, TablePreference({}, default=0.1), num_samples=4, num_candidates=2)
    for result in evaluation.problems:
        step = max(len("print(3)\n<end_of_code>") // 4, len(answer("3")) // 4)
        assert result.search_tokens <= result.sample_tokens + 20 * 2 * step
        assert result.search == (result.problem_id != "b")


def test_best_of_n_follows_the_ppm_and_majority_the_count() -> None:
    def script(request: GenerationRequest) -> list[str]:
        if request.prompt.endswith("<end_of_output>\n"):
            return [answer("3")] if "print(3)" in request.prompt else [answer("4")]
        # three programs that print 3 and one that prints 4
        return ["print(3)\n<end_of_code>"] * 3 + ["print(4)\n<end_of_code>"]

    likes_four = TablePreference(lambda text: 0.9 if "print(4)" in text else -0.9)
    evaluation = run(ScriptedPolicy(script), likes_four, num_samples=4)
    by_id = {p.problem_id: p for p in evaluation.problems}
    assert (by_id["a"].majority, by_id["a"].best_of_n) == (True, False)
    assert (by_id["b"].majority, by_id["b"].best_of_n) == (False, True)


def test_record_is_plain_data_and_reads_back_equal() -> None:
    evaluation = run(ScriptedPolicy(always_three), TablePreference({}), num_samples=2)
    record = json.loads(json.dumps(evaluation.as_record()))
    assert Evaluation.from_record(record) == evaluation


def test_balanced_choice_takes_levels_in_turn() -> None:
    assert [p.id for p in balanced(PROBLEMS, 2)] == ["a", "b"]
    assert [p.id for p in balanced(PROBLEMS, None)] == ["a", "b", "c"]


def test_problem_that_does_not_fit_the_policy_is_a_wrong_answer_everywhere() -> None:
    too_long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    evaluation = run(ScriptedPolicy({"": [too_long]}), TablePreference({}), num_samples=2)
    for result in evaluation.problems:
        assert (result.greedy, result.majority, result.best_of_n, result.search) == (False,) * 4
        assert (result.any_sample, result.any_search, result.search_tokens) == (False, False, 0)
