from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from cluster.evaluation.reliability import reliability_bins
from cluster.evaluation.results import (
    Arm,
    Failure,
    ProblemAttempts,
    Result,
    Scoring,
    method_label,
    read_attempts,
    score_problem,
    summarise,
)
from cluster.evaluation.tables import answer_rows, result_rows
from rollout.engine import Completion, FinishReason, GenerationRequest
from rollout.methods import Method, MethodConfig
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from rollout.solution_tree import answer_tree, chain_solutions, of_trajectory, search_of
from rollout.table import trees_to_table
from rollout.tree import Tree
from tests.fakes import Failure as CodeFailure
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference, completion

PROBLEM = Problem(id="b:p", source="b", level=Level.GSM, text="How many?", answer="3")


def program(number: int) -> str:
    return f"<code>\nprint({number})\n<end_of_code>"


def says(*programs: str) -> Callable[[GenerationRequest], list[str]]:
    """A policy that samples these programs and repeats what they print."""

    def script(request: GenerationRequest) -> list[str]:
        if request.prompt.endswith("<end_of_output>\n"):
            shown = request.prompt.split("<output>")[-1].split("<end_of_output>")[0]
            return [f"<answer>\\boxed{{{shown}}}<end_of_answer>"]
        return list(programs)

    return script


def tree_of(
    method: Method,
    script: Any,
    *,
    problem: Problem = PROBLEM,
    count: int = 1,
    values: Callable[[str], float] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Tree:
    config = MethodConfig(name=method, num_trajectories=count, rollouts_per_tree=2)
    search = SearchConfig.model_validate({"template": "short", "num_candidates": 2})
    outputs = {f"print({n})": f"{n}\n" for n in range(10)} | dict(outputs or {})
    (found,) = asyncio.run(
        answer_tree(
            Tree(problem=problem, round=1, seed=1),
            method=config,
            search=search_of(config, search, guided=values is not None),
            policy=ScriptedPolicy(script),
            preference=TablePreference(values) if values is not None else None,
            sandbox=ScriptedSandbox({**outputs, "bad": CodeFailure()}),
            clock=lambda: 0.0,
        )
    )
    return found


def attempts_of(arm: Arm, trees: Sequence[Tree], **settings: int) -> ProblemAttempts:
    found = read_attempts([trees_to_table(trees)], arm, **settings)
    assert list(found) == [PROBLEM.id]
    return found[PROBLEM.id]


def scoring(arm: Arm, *, made: int, methods: Sequence[Method] = (), **own: Any) -> Scoring:
    defaults: dict[str, Any] = {"budgets": (1, 2, 4), "top_k": 2}
    return Scoring(arm=arm, num_made=made, methods=tuple(methods), **(defaults | own))


def scores(results: Sequence[Result]) -> dict[tuple[str, int], float]:
    return {(r.method, r.budget): r.score for r in results}


def four_samples(values: Callable[[str], float] | None = None) -> ProblemAttempts:
    method = Method.BEST_OF_N if values is not None else Method.MAJORITY
    script = says(program(4), program(3), program(3), "<code>\nbad\n<end_of_code>")
    return attempts_of(Arm.SAMPLES, [tree_of(method, script, count=4, values=values)])


def test_budgets_choose_among_the_first_samples_and_pass_at_k_among_all() -> None:
    found = four_samples()
    asked = scoring(Arm.SAMPLES, made=4, methods=[Method.MAJORITY], budgets=(1, 2, 3, 4))
    told = scores(score_problem(PROBLEM, found, asked))
    del told["majority", 2]  # a tie
    assert told == {
        ("pass@1", 1): pytest.approx(2 / 4),
        ("pass@k", 2): pytest.approx(1 - 1 / 6),  # both wrong: 1 of 6 pairs
        ("pass@k", 3): 1.0,
        ("pass@k", 4): 1.0,
        ("majority", 1): 0.0,  # the first says 4
        ("majority", 3): 1.0,
        ("majority", 4): 1.0,
    }


def test_values_decide_best_of_n_and_who_votes() -> None:
    found = four_samples(lambda text: 0.9 if "print(4)" in text else 0.1)
    asked = scoring(Arm.SAMPLES, made=4, methods=[Method.MAJORITY, Method.BEST_OF_N])
    told = scores(score_problem(PROBLEM, found, asked))
    assert told["majority", 4] == 1.0
    assert told["best-of-n", 4] == 0.0
    assert told["top-k-vote", 4] == 0.0  # of two voters the better valued one wins the tie
    wide = scoring(Arm.SAMPLES, made=4, methods=[Method.BEST_OF_N], top_k=3)
    assert scores(score_problem(PROBLEM, found, wide))["top-k-vote", 4] == 1.0


def test_weighted_majority_stands_beside_best_of_n_at_the_same_cost() -> None:
    found = four_samples(lambda text: 0.9 if "print(4)" in text else 0.1)
    asked = scoring(Arm.SAMPLES, made=4, methods=[Method.BEST_OF_N])
    rows = {(r.method, r.budget): r for r in score_problem(PROBLEM, found, asked)}
    # .95 for 4 against .55 + .55 for 3
    assert [rows["weighted-majority", k].score for k in (1, 2, 4)] == [0.0, 0.0, 1.0]
    assert rows["weighted-majority", 4].generated_tokens == rows["best-of-n", 4].generated_tokens
    assert rows["weighted-majority", 4].scored_tokens == rows["best-of-n", 4].scored_tokens
    alone = scoring(Arm.SAMPLES, made=4, methods=[Method.WEIGHTED_MAJORITY])
    told = scores(score_problem(PROBLEM, found, alone))
    assert told["weighted-majority", 4] == 1.0 and ("best-of-n", 4) not in told


def test_log_probabilities_of_samples_are_read_back_and_judge_them_too() -> None:
    def script(request: GenerationRequest) -> list[Completion]:
        if request.prompt.endswith("<end_of_output>\n"):
            digit = request.prompt.split("print(")[-1][0]
            said = f"<answer>\\boxed{{{digit}}}<end_of_answer>"
            return [completion(said, request.stop, logprob=-1.0)]
        # the policy hardly believes what the PPM prefers
        return [
            completion(program(4), request.stop, logprob=-200.0),
            completion(program(3), request.stop, logprob=-1.0),
        ]

    values = {4: 0.9, 3: 0.1}
    tree = tree_of(
        Method.BEST_OF_N,
        script,
        count=2,
        values=lambda text: values[4 if "print(4)" in text else 3],
    )
    found = attempts_of(Arm.SAMPLES, [tree])
    by_answer = {a.answer: a for a in found.attempts}
    solutions = {s.answer: s for s in chain_solutions(tree)}
    assert solutions["4"].logprob == -201.0
    assert by_answer["4"].mean_logprob == solutions["4"].mean_logprob
    asked = scoring(Arm.SAMPLES, made=2, methods=[Method.BEST_OF_N], logprob_weight=1.0)
    told = scores(score_problem(PROBLEM, found, asked))
    for method in ("best-of-n", "weighted-majority"):
        assert (told[method, 2], told[f"{method} + logprob", 2]) == (0.0, 1.0)


def test_a_budget_costs_what_its_own_samples_cost() -> None:
    found = four_samples(lambda text: 0.0)
    asked = scoring(
        Arm.SAMPLES, made=4, methods=[Method.BEST_OF_N], gpu_seconds_per_token=0.5, top_k=4
    )
    by_key = {(r.method, r.budget): r for r in score_problem(PROBLEM, found, asked)}
    tokens = [a.generated_tokens for a in found.attempts]
    assert by_key["best-of-n", 1].generated_tokens == tokens[0]
    assert by_key["best-of-n", 2].generated_tokens == tokens[0] + tokens[1]
    assert by_key["best-of-n", 4].gpu_seconds == sum(tokens) * 0.5
    assert by_key["pass@1", 1].generated_tokens == pytest.approx(sum(tokens) / 4)
    assert by_key["pass@k", 4].scored_tokens == 0.0
    whole = by_key["best-of-n", 4].scored_tokens
    assert by_key["best-of-n", 2].scored_tokens == pytest.approx(whole * 2 / 3)  # one failed


def test_a_trajectory_of_mcts_is_its_best_valued_answer() -> None:
    script = says(program(4), program(3))

    def likes_three(text: str) -> float:
        return 0.8 if "print(3)" in text else -0.8

    trees = [
        tree_of(Method.MCTS, script, problem=of_trajectory(PROBLEM, n), values=likes_three)
        for n in range(2)
    ]
    found = attempts_of(Arm.MCTS, trees)
    assert [(a.trajectory, a.answer, a.correct) for a in found.attempts] == [
        (0, "3", True),
        (1, "3", True),
    ]
    told = scores(score_problem(PROBLEM, found, scoring(Arm.MCTS, made=2)))
    assert told == {
        ("mcts pass@k", 1): 1.0,
        ("mcts pass@k", 2): 1.0,
        ("mcts", 1): 1.0,
        ("mcts", 2): 1.0,
    }


def test_without_values_every_distinct_program_of_a_tree_is_an_attempt() -> None:
    script = says(program(4), "<code>\n# so\nprint(4)\n<end_of_code>")
    outputs = {"print(4)": "4\n", "# so\nprint(4)": "4\n"}
    tree = tree_of(Method.MCTS, script, problem=of_trajectory(PROBLEM, 0), outputs=outputs)
    assert len([n for n in tree.answers() if n.visit_count]) == 2
    assert [a.answer for a in attempts_of(Arm.MCTS, [tree]).attempts] == ["4"]


def test_beam_has_budgets_of_whole_beams_only() -> None:
    asked = scoring(Arm.BEAM, made=4, width=2)
    assert asked.own_budgets == (2, 4)
    assert scoring(Arm.GREEDY, made=1).own_budgets == (1,)


def test_problem_without_an_answer_is_wrong_with_its_reason() -> None:
    long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    reasons = {
        Failure.CODE_FAILED: ["<code>\nbad\n<end_of_code>"],
        Failure.UNFINISHED: ["<code>\n# no end"],
        Failure.PROMPT_TOO_LONG: [long],
    }
    for reason, completions in reasons.items():
        tree = tree_of(Method.GREEDY, lambda request, said=completions: said)
        found = attempts_of(Arm.GREEDY, [tree])
        (result,) = score_problem(PROBLEM, found, scoring(Arm.GREEDY, made=1))
        assert (result.score, result.answer, result.outcome) == (0.0, None, reason)
    (failed,) = score_problem(PROBLEM, None, scoring(Arm.GREEDY, made=1))
    assert (failed.score, failed.outcome) == (0.0, Failure.SEARCH_FAILED)
    (row,) = answer_rows([PROBLEM], Arm.GREEDY, {})
    assert (row["failure"], row["correct"]) == ("search failed", False)


def test_ids_with_a_hash_are_ids_where_jobs_are_problems() -> None:
    problem = Problem(id="b:p#7", source="b", level=Level.GSM, text="How many?", answer="3")
    tree = tree_of(Method.GREEDY, says(program(3)), problem=problem)
    assert list(read_attempts([trees_to_table([tree])], Arm.GREEDY)) == ["b:p#7"]


def test_summary_counts_every_problem_and_adds_up() -> None:
    found = attempts_of(Arm.GREEDY, [tree_of(Method.GREEDY, says(program(3)))])
    asked = scoring(Arm.GREEDY, made=1)
    results = [*score_problem(PROBLEM, found, asked), *score_problem(PROBLEM, None, asked)]
    (summary,) = summarise(results)
    assert summary.accuracy.mean == 0.5
    assert summary.outcomes == {"right": 1, "search failed": 1}
    assert summary.gpu_seconds is None
    assert [row["score"] for row in result_rows(results)] == [1.0, 0.0]


def test_tokens_of_search_are_set_against_those_of_as_many_samples() -> None:
    script = says(program(4), program(3))
    found = attempts_of(Arm.SAMPLES, [tree_of(Method.MAJORITY, script, count=2)])
    asked = scoring(Arm.SAMPLES, made=2, methods=[Method.MAJORITY], budgets=(1, 2))
    results = score_problem(PROBLEM, found, asked)
    trees = [
        tree_of(Method.MCTS, script, problem=of_trajectory(PROBLEM, n), values=lambda text: 0.0)
        for n in range(2)
    ]
    searched = attempts_of(Arm.MCTS, trees)
    results += score_problem(PROBLEM, searched, scoring(Arm.MCTS, made=2, budgets=(1, 2)))
    ratios = {(s.method, s.budget): s.tokens_over_samples for s in summarise(results)}
    of_samples = sum(a.generated_tokens for a in found.attempts)
    of_trees = sum(tree.generated_tokens for tree in trees)
    assert ratios["majority", 2] == 1.0
    assert ratios["mcts", 2] == pytest.approx(of_trees / of_samples)
    assert ratios["mcts", 1] == pytest.approx(of_trees / of_samples)


def test_reliability_counts_valued_answers_by_what_the_ppm_said() -> None:
    found = four_samples(lambda text: 0.9 if "print(4)" in text else -0.9)
    bins = reliability_bins([found])
    assert [count for count, _, _ in bins] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert bins[0][1:] == (pytest.approx(0.05), 1.0)
    assert bins[9][1:] == (pytest.approx(0.95), 0.0)


def test_labels_name_the_budget() -> None:
    assert method_label("majority", 8, 4) == "maj@8"
    assert method_label("top-k-vote", 8, 4) == "top-4 vote of 8"
    assert method_label("mcts", 64, 4) == "mcts, 64 traj."
    assert method_label("weighted-majority", 8, 4) == "weighted maj@8"
    assert method_label("best-of-n + logprob", 8, 4) == "best-of-8 + logprob"
