"""Methods over scripted engines; a token is four characters, so costs are worked by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pytest

from rollout.engine import Completion, EngineError, FinishReason, GenerationRequest
from rollout.methods import (
    Ending,
    Event,
    EventKind,
    Method,
    MethodConfig,
    Solver,
    SolveResult,
    choose,
)
from rollout.problem import Level, Problem
from rollout.sampling import Solution
from rollout.search import SearchConfig, SearchError
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference

PROBLEM = Problem(id="p", source="s", level=Level.GSM, text="How many?", answer="3")
QUESTION = "<|user|>How many?<|assistant|>"


def answer(value: str) -> str:
    return f"<answer>\\boxed{{{value}}}<end_of_answer>"


def program(value: str) -> str:
    return f"print({value})\n<end_of_code>"


def by_printed(values: str) -> Callable[[GenerationRequest], list[str]]:
    """Programs that print these digits; the answer repeats what was printed."""

    def script(request: GenerationRequest) -> list[str]:
        if request.prompt.endswith("<end_of_output>\n"):
            return [answer(request.prompt.split("print(")[-1][0])]
        return [program(value) for value in values]

    return script


def solve(
    method: Method,
    policy: Any,
    preference: TablePreference | None = None,
    *,
    sandbox: ScriptedSandbox | None = None,
    search: SearchConfig | None = None,
    problem: Problem = PROBLEM,
    seed: int = 0,
    on_event: Callable[[Event], None] | None = None,
    clock: Callable[[], float] | None = None,
    **config: Any,
) -> SolveResult:
    solver = Solver(
        config=MethodConfig(name=method, **config),
        search=search or SearchConfig(template="short", num_candidates=2),
        policy=policy if isinstance(policy, ScriptedPolicy) else ScriptedPolicy(policy),
        preference=preference,
        sandbox=sandbox or ScriptedSandbox(default="7\n"),
        clock=clock,
    )
    return asyncio.run(solver.solve(problem, seed=seed, on_event=on_event))


def made(answer: str | None, value: float | None = None) -> Solution:
    return Solution(steps=(), answer=answer, value=value, num_tokens=1, status="ok")


# ---------------------------------------------------------------- choosing


def rule(method: Method, solutions: list[Solution], top_k: int = 3) -> list[tuple[str, int]]:
    ranked = choose(solutions, method=method, top_k=top_k, seed=0)
    return [(answer.answer, answer.votes) for answer in ranked]


def test_each_method_chooses_by_its_own_rule_among_the_same_solutions() -> None:
    solutions = [
        made("1", -0.9),
        made("1", -0.8),
        made("1.0", -0.7),
        made("2", 0.9),
        made("3", 0.8),
        made("3", 0.7),
        made(None, 1.0),
    ]
    assert rule(Method.MAJORITY, solutions) == [("1", 3), ("3", 2), ("2", 1)]
    assert rule(Method.BEST_OF_N, solutions) == [("2", 1), ("3", 0), ("1.0", 0)]
    assert rule(Method.MCTS, solutions) == [("3", 2), ("2", 1), ("1.0", 0)]
    assert rule(Method.BEAM, solutions, top_k=6) == [("1.0", 3), ("3", 2), ("2", 1)]


def test_weighted_majority_adds_up_the_chances_of_equal_answers() -> None:
    # chances .05 + .1 + .15 against .95 and .9 + .85
    solutions = [
        made("1", -0.9),
        made("1", -0.8),
        made("1.0", -0.7),
        made("2", 0.9),
        made("3", 0.8),
        made("3", 0.7),
        made("3", None),
        made(None, 1.0),
    ]
    ranked = choose(solutions, method=Method.WEIGHTED_MAJORITY, top_k=1, seed=0)
    assert [(r.answer, r.votes, round(r.weight, 9)) for r in ranked] == [
        ("3", 3, 1.75),
        ("2", 1, 0.95),
        ("1.0", 3, 0.3),
    ]
    # the samples that nothing valued vote alike
    alike = [replace(solution, value=None) for solution in solutions]
    assert rule(Method.WEIGHTED_MAJORITY, alike) == rule(Method.MAJORITY, alike)


def test_log_probability_is_a_second_opinion_on_valued_samples() -> None:
    def told(value: float, answer: str, logprob: float | None, tokens: int) -> Solution:
        return replace(made(answer, value), logprob=logprob, num_tokens=tokens)

    # means of -2 and -0.5 nats: .9 e^-2 = .122, .4 e^-.5 = .243
    samples = [told(0.8, "1", -20.0, 10), told(-0.2, "2", -10.0, 20)]

    def winner(method: Method, weight: float) -> str:
        return choose(samples, method=method, top_k=1, seed=0, logprob_weight=weight)[0].answer

    for method in (Method.BEST_OF_N, Method.WEIGHTED_MAJORITY):
        # .9 e^-.4 = .603, .4 e^-.1 = .362
        assert [winner(method, weight) for weight in (0.0, 0.2, 1.0)] == ["1", "1", "2"]
    # one whose log-probability nobody knows has no weight
    samples[1] = told(0.9, "2", None, 20)
    assert winner(Method.WEIGHTED_MAJORITY, 0.2) == "1"
    samples[0] = made("1", 0.8)
    with pytest.raises(ValueError, match="no solution has a log-probability"):
        winner(Method.BEST_OF_N, 0.2)
    with pytest.raises(ValueError, match="for best-of-n and weighted-majority only"):
        MethodConfig(name=Method.MCTS, logprob_weight=0.1)


def test_equal_votes_go_to_the_higher_value_and_equal_values_to_the_seed() -> None:
    assert rule(Method.MCTS, [made("1", 0.1), made("2", 0.2)])[0] == ("2", 1)
    tied = [made("1", 0.5), made("2", 0.5)]
    winners = {choose(tied, method=Method.MCTS, top_k=4, seed=s)[0].answer for s in range(20)}
    assert winners == {"1", "2"}
    assert rule(Method.MCTS, tied) == rule(Method.MCTS, tied)


def test_solutions_the_ppm_did_not_value_vote_after_all_others() -> None:
    solutions = [made("1", None), made("1", None), made("2", -1.0)]
    assert rule(Method.MCTS, solutions, top_k=1) == [("2", 1), ("1", 0)]
    assert rule(Method.BEST_OF_N, solutions) == [("2", 1), ("1", 0)]
    # none valued: all vote
    unvalued = [replace(solution, value=None) for solution in solutions]
    assert rule(Method.BEST_OF_N, unvalued) == [("1", 2), ("2", 1)]


# ---------------------------------------------------------------- sampled programs


def test_greedy_is_one_program_at_temperature_zero_without_the_ppm() -> None:
    policy = ScriptedPolicy(by_printed("7"))
    preference = TablePreference({}, default=0.5)
    result = solve(Method.GREEDY, policy, preference, num_trajectories=9)
    assert (result.answer, result.value, len(result.solutions)) == ("7", None, 1)
    assert [(r.num_candidates, r.temperature) for r in policy.requests] == [(1, 0.0), (1, 0.0)]
    assert preference.requests == []


def test_majority_and_best_of_n_judge_the_same_samples_differently() -> None:
    likes_four = TablePreference(lambda text: 0.9 if "print(4)" in text else -0.9)
    voted = solve(Method.MAJORITY, by_printed("334"), likes_four, num_trajectories=3)
    best = solve(Method.BEST_OF_N, by_printed("334"), likes_four, num_trajectories=3)
    assert (voted.answer, voted.value, voted.cost.scored_tokens) == ("3", None, 0)
    assert (best.answer, best.value) == ("4", 0.9)
    assert [(r.answer, r.votes, len(r.members)) for r in best.ranked] == [("4", 1, 1), ("3", 0, 2)]
    assert best.chosen is not None and best.chosen.steps[0].code == "print(4)"
    assert [s.steps for s in voted.solutions] == [s.steps for s in best.solutions]


def test_tokens_are_those_of_programs_and_answers_and_of_the_texts_valued() -> None:
    result = solve(
        Method.BEST_OF_N, by_printed("34"), TablePreference({}, default=0.1), num_trajectories=2
    )
    each = len(program("3")) // 4 + len(answer("3")) // 4
    text = QUESTION + "<code>" + program("3") + "\n<output>7<end_of_output>\n" + answer("3")
    assert result.generated_tokens == 2 * each == sum(s.num_tokens for s in result.solutions)
    assert result.cost.scored_tokens == 2 * (len(text) // 4)
    assert result.cost.num_requests == 3
    prompts = len(QUESTION) // 4 + 2 * ((len(text) - len(answer("3"))) // 4)
    assert result.cost.prompt_tokens == prompts


def test_sampling_under_a_token_budget_asks_for_as_many_as_should_fill_it() -> None:
    each = len(program("3")) // 4 + len(answer("3")) // 4
    policy = ScriptedPolicy(by_printed("3"))
    result = solve(Method.MAJORITY, policy, num_trajectories=99, max_generated_tokens=10 * each)
    programs = [r for r in policy.requests if r.prompt == QUESTION]
    assert [r.num_candidates for r in programs] == [1, 1, 2, 3, 2, 1]
    assert len({r.seed for r in programs}) == 6
    assert (len(result.solutions), result.generated_tokens) == (10, 10 * each)
    assert result.notes == (f"token budget of {10 * each} used up",)


@pytest.mark.parametrize(("tokens_more", "samples"), [(-6, 10), (6, 10), (-7, 9), (7, 11)])
def test_samples_come_nearest_to_their_token_budget(tokens_more: int, samples: int) -> None:
    each = len(program("3")) // 4 + len(answer("3")) // 4
    assert each == 13
    budget = 10 * each + tokens_more
    result = solve(
        Method.MAJORITY, by_printed("3"), num_trajectories=99, max_generated_tokens=budget
    )
    assert len(result.solutions) == samples
    assert result.notes == (f"token budget of {budget} used up",)


def test_seconds_are_read_from_the_clock_that_was_given() -> None:
    ticks = chain([10.0], repeat(12.5))
    assert solve(Method.GREEDY, by_printed("7"), clock=lambda: next(ticks)).cost.seconds == 2.5
    assert solve(Method.GREEDY, by_printed("7")).cost.seconds == 0.0


# ---------------------------------------------------------------- step beam search


BEAM_SCRIPT = {
    "<|assistant|>": ["a\n<end_of_step>", "b\n<end_of_step>", "c\n<end_of_step>"],
    "a\n<end_of_step>": ["d\n<end_of_code>", "e\n<end_of_code>", "bad\n<end_of_code>"],
    "b\n<end_of_step>": ["f\n<end_of_code>", "cut off"],
    "d\n<end_of_code>\n<output>7<end_of_output>\n": [answer("1"), answer("2")],
    "f\n<end_of_code>\n<output>7<end_of_output>\n": [answer("3"), "g\n<end_of_code>"],
}
BEAM_VALUES = {
    "a\n<end_of_step>": 0.5,
    "b\n<end_of_step>": 0.9,
    "c\n<end_of_step>": 0.1,  # third of three: not kept
    "d\n<end_of_code>\n<output>7<end_of_output>\n": 0.4,
    "e\n<end_of_code>\n<output>7<end_of_output>\n": -0.3,  # third of three: not kept
    "f\n<end_of_code>\n<output>7<end_of_output>\n": 0.2,
    answer("1"): -0.5,
    answer("2"): 0.6,
    answer("3"): 0.7,
}


def test_beam_keeps_the_best_valued_paths_of_all_and_runs_their_code_step_by_step() -> None:
    policy = ScriptedPolicy(BEAM_SCRIPT)
    sandbox = ScriptedSandbox({"bad": Failure()}, default="7\n")
    result = solve(
        Method.BEAM,
        policy,
        TablePreference(BEAM_VALUES),
        sandbox=sandbox,
        search=SearchConfig(template="short", num_answer_candidates=3),
        num_trajectories=2,
        beam_candidates=3,
    )
    asked = [r.prompt.removeprefix(QUESTION) for r in policy.requests]
    output = "\n<output>7<end_of_output>\n"
    assert asked == [
        "",
        "<code>b\n<end_of_step>",
        "<code>a\n<end_of_step>",
        "<code>a\n<end_of_step>d\n<end_of_code>" + output,
        "<code>b\n<end_of_step>f\n<end_of_code>" + output,
    ]
    runs = [event[2] for event in sandbox.events if event[0] == "run"]
    assert runs == [("a", "b", "c"), ("f",), ("d", "e", "bad")]
    assert [(s.answer, s.value) for s in result.solutions] == [("3", 0.7), ("2", 0.6)]
    assert result.answer == "3"
    assert [s.code for s in result.solutions[0].steps] == ["b", "f", ""]
    assert sandbox.open_trees == []


def test_an_answer_that_is_kept_narrows_the_beam() -> None:
    script = {
        "<|assistant|>": [answer("1"), "a\n<end_of_step>", "b\n<end_of_step>"],
        "a\n<end_of_step>": [answer("2"), answer("4")],
    }
    values = {answer("1"): 0.5, "a\n<end_of_step>": 0.4, "b\n<end_of_step>": 0.3, answer("2"): 0.2}
    policy = ScriptedPolicy(script)
    result = solve(
        Method.BEAM, policy, TablePreference(values), num_trajectories=2, beam_candidates=3
    )
    assert [s.answer for s in result.solutions] == ["1", "2"]
    assert len(policy.requests) == 2


def test_more_trajectories_than_the_beam_is_wide_are_further_beams_with_other_seeds() -> None:
    policy = ScriptedPolicy({"<|assistant|>": [answer("1"), answer("2"), answer("3")]})
    result = solve(
        Method.BEAM,
        policy,
        TablePreference({}),
        num_trajectories=5,
        beam_width=2,
        beam_candidates=3,
    )
    assert len(policy.requests) == len({r.seed for r in policy.requests}) == 3
    assert [s.answer for s in result.solutions] == ["1", "2", "1", "2", "1"]
    assert len({s.seed for s in result.solutions}) == 3


def test_beam_asks_for_one_candidate_where_only_the_answer_can_follow() -> None:
    policy = ScriptedPolicy(by_printed("3"))
    solve(Method.BEAM, policy, TablePreference({}), num_trajectories=1)
    assert [r.num_candidates for r in policy.requests] == [8, 1]


def test_wordings_of_one_answer_take_one_place_of_a_beam() -> None:
    script = {"": ["<answer>So \\boxed{1.0}<end_of_answer>", answer("1"), answer("2")]}
    result = solve(Method.BEAM, script, TablePreference({}), num_trajectories=2, beam_candidates=3)
    assert [s.answer for s in result.solutions] == ["1.0", "2"]


def test_beam_ends_at_the_depth_limit_without_an_answer() -> None:
    policy = ScriptedPolicy({"": ["a\n<end_of_step>"]})
    search = SearchConfig(template="short", max_depth=3)
    result = solve(Method.BEAM, policy, TablePreference({}), search=search, num_trajectories=4)
    assert len(policy.requests) == 3
    assert (result.answer, result.notes) == (None, ("no solution reached an answer",))


def test_beam_whose_budget_is_spent_ends_or_goes_on_with_its_best_path_alone() -> None:
    script = {
        "<|assistant|>": ["a\n<end_of_step>", "b\n<end_of_step>"],
        "b\n<end_of_step>": [answer("2")],
        "a\n<end_of_step>": [answer("1")],
    }
    policy = ScriptedPolicy(script)
    values = TablePreference({"b\n<end_of_step>": 0.5, "a\n<end_of_step>": 0.1})
    result = solve(
        Method.BEAM, policy, values, num_trajectories=8, beam_candidates=2, max_generated_tokens=1
    )
    assert [r.prompt.removeprefix(QUESTION) for r in policy.requests] == [
        "",
        "<code>b\n<end_of_step>",
    ]
    assert result.answer == "2"
    assert "token budget of 1 used up" in result.notes


def test_beam_ranks_paths_the_ppm_gave_no_value_last() -> None:
    script = {"<|assistant|>": [answer("1"), answer("2"), answer("3")]}
    values = {answer("1"): float("nan"), answer("2"): -0.9, answer("3"): -0.8}
    result = solve(
        Method.BEAM,
        script,
        TablePreference(values),
        num_trajectories=3,
        beam_width=3,
        beam_candidates=3,
    )
    assert [(s.answer, s.value) for s in result.solutions] == [
        ("3", -0.8),
        ("2", -0.9),
        ("1", None),
    ]


# ---------------------------------------------------------------- tree search


def test_mcts_answers_with_the_vote_of_the_best_valued_answers_it_visited() -> None:
    programs = ["a", "b", "b = 0", "d"]
    script = {f"{p}\n<end_of_step>": [answer(a)] for p, a in zip(programs, "1225", strict=True)}
    script |= {"<|assistant|>": [f"{p}\n<end_of_step>" for p in programs]}
    values = {answer("1"): 0.9, answer("2"): 0.8, "b = 0\n<end_of_step>" + answer("2"): 0.7}
    search = SearchConfig(template="short", num_candidates=4)
    result = solve(
        Method.MCTS,
        script,
        TablePreference(values),
        search=search,
        num_trajectories=3,
    )
    assert [s.answer for s in result.solutions] == ["1", "2", "2"]
    assert [(r.answer, r.votes, r.value) for r in result.ranked] == [("2", 2, 0.8), ("1", 1, 0.9)]
    (tree,) = result.trees
    assert (tree.num_rollouts, tree.generated_tokens) == (3, result.generated_tokens)
    assert tree.scored_tokens == result.cost.scored_tokens > 0


@pytest.mark.parametrize("guided", [True, False])
def test_each_distinct_program_of_a_search_has_one_vote(guided: bool) -> None:
    # Three wordings of one program say 1, two programs say 2.
    programs = {"a # one": "1", "a # two": "1", "a": "1", "b": "2", "c": "2"}
    script = {f"{p}\n<end_of_step>": [answer(value)] for p, value in programs.items()}
    script |= {"<|assistant|>": [f"{p}\n<end_of_step>" for p in programs]}
    values = {answer("1"): 0.9, "a # two\n<end_of_step>" + answer("1"): 0.95, answer("2"): 0.1}
    result = solve(
        Method.MCTS,
        script,
        TablePreference(values) if guided else None,
        search=SearchConfig(template="short", num_candidates=5),
        num_trajectories=10,  # an exhausted tree, and once more
    )
    assert len(result.trees) == 2
    assert [(r.answer, r.votes) for r in result.ranked] == [("2", 2), ("1", 1)]
    assert not guided or result.ranked[1].value == 0.95


def test_all_answers_of_a_search_may_vote_by_value_and_by_how_often_the_policy_goes_their_way() -> (
    None
):
    # Six of eight candidates are one program that the PPM finds as likely right as wrong.
    programs = {"a": "1", "b": "2", "c": "2"}
    script = {f"{p}\n<end_of_step>": [answer(value)] for p, value in programs.items()}
    script |= {"<|assistant|>": [f"{p}\n<end_of_step>" for p in 6 * "a" + "bc"]}
    search = SearchConfig(template="short", num_candidates=8)

    def ranked(vote: str) -> list[tuple[str, int, float]]:
        values = TablePreference({answer("1"): 0.0, answer("2"): 0.8})
        result = solve(
            Method.MCTS, script, values, search=search, num_trajectories=3, mcts_vote=vote
        )
        return [(r.answer, r.votes, pytest.approx(r.weight)) for r in result.ranked]

    assert ranked("top_k") == [("2", 2, 2.0), ("1", 1, 1.0)]
    assert ranked("weighted") == [("1", 1, 6 / 8 * 0.5), ("2", 2, 2 / 8 * 0.9)]
    with pytest.raises(ValueError, match="mcts_vote: weighted is for trees that share"):
        MethodConfig(mcts_vote="weighted", rollouts_per_tree=4)


def test_exhausted_tree_is_followed_by_another_until_all_rollouts_are_done() -> None:
    result = solve(
        Method.MCTS, {"": [answer("1"), answer("2")]}, TablePreference({}), num_trajectories=5
    )
    assert [tree.num_rollouts for tree in result.trees] == [2, 2, 1]
    assert len({tree.seed for tree in result.trees}) == 3
    assert result.notes == ("3 trees, 2 of them exhausted",)
    assert result.generated_tokens == sum(tree.generated_tokens for tree in result.trees)


def test_with_rollouts_per_tree_each_trajectory_is_the_best_answer_of_a_tree() -> None:
    values = {answer("1"): 0.1, answer("2"): 0.2}
    result = solve(
        Method.MCTS,
        {"": [answer("1"), answer("2")]},
        TablePreference(values),
        num_trajectories=3,
        rollouts_per_tree=2,
    )
    assert [s.answer for s in result.solutions] == ["2", "2", "2"]
    assert len({tree.seed for tree in result.trees}) == 3


def test_mcts_under_a_token_budget_starts_no_rollout_beyond_it() -> None:
    texts = ["a\n<end_of_step>", "b\n<end_of_step>"]
    script = {"<|assistant|>": texts, "<end_of_step>": [answer("1"), answer("2")]}
    step, sentence = len(texts[0]) // 4, len(answer("1")) // 4
    first_rollout = 2 * step + 2 * sentence
    policy = ScriptedPolicy(script)
    result = solve(
        Method.MCTS,
        policy,
        TablePreference({}),
        num_trajectories=99,
        max_generated_tokens=first_rollout,
    )
    assert result.generated_tokens == first_rollout
    assert result.trees[0].num_rollouts == 1
    assert result.notes == (f"token budget of {first_rollout} used up",)


def test_without_a_ppm_mcts_does_not_see_the_label_and_lets_all_answers_vote() -> None:
    programs = {"a": "3", "b": "4", "c": "4.0"}  # the label is 3
    script = {f"{p}\n<end_of_step>": [answer(value)] for p, value in programs.items()}
    script |= {"<|assistant|>": [f"{p}\n<end_of_step>" for p in programs]}
    search = SearchConfig(template="short", num_candidates=3)
    result = solve(Method.MCTS, script, search=search, num_trajectories=3)
    assert result.answer == "4"
    assert {node.correct for node in result.trees[0].answers()} == {None}
    assert result.notes == ("there is no PPM: majority vote over all 3 solutions",)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("method", list(Method))
def test_nothing_but_garbage_ends_without_an_answer(method: Method) -> None:
    result = solve(method, {"": ["never ends"]}, TablePreference({}), num_trajectories=2)
    assert (result.answer, result.value, result.chosen, result.ranked) == (None, None, None, ())
    assert result.notes[0] == "no solution reached an answer"
    assert result.generated_tokens > 0


@pytest.mark.parametrize("method", list(Method))
def test_problem_that_does_not_fit_the_policy_says_so(method: Method) -> None:
    too_long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    result = solve(method, {"": [too_long]}, TablePreference({}), num_trajectories=50)
    assert result.notes == ("the problem does not fit into the policy's context",)
    assert (result.answer, result.generated_tokens) == (None, 0)


@pytest.mark.parametrize("method", [Method.BEST_OF_N, Method.BEAM, Method.MCTS])
def test_ppm_that_gives_only_nan_leaves_a_majority_vote(method: Method) -> None:
    nan = TablePreference({}, default=float("nan"))
    script = {"<end_of_output>\n": [answer("7")], "<|assistant|>": [program("7"), program("8")]}
    result = solve(method, script, nan, num_trajectories=2)
    assert (result.answer, result.value) == ("7", None)
    assert any("the PPM gave no value: majority vote" in note for note in result.notes)


@pytest.mark.parametrize("method", [Method.BEST_OF_N, Method.BEAM, Method.MCTS])
def test_dead_ppm_is_an_engine_error_and_leaves_no_tree_open(method: Method) -> None:
    sandbox = ScriptedSandbox(default="7\n")
    dead = TablePreference({}, failures=1)
    with pytest.raises(EngineError, match="scripted failure"):
        solve(method, by_printed("34"), dead, sandbox=sandbox, num_trajectories=2)
    assert sandbox.open_trees == []


@pytest.mark.parametrize("method", list(Method))
def test_failing_sandbox_is_a_search_error_and_never_a_wrong_answer(method: Method) -> None:
    sandbox = ScriptedSandbox(default=Failure(status="infra_error"))
    with pytest.raises(SearchError, match="sandbox failed on problem p"):
        solve(method, by_printed("34"), TablePreference({}), sandbox=sandbox, num_trajectories=2)
    assert sandbox.open_trees == []


@pytest.mark.parametrize("method", [Method.BEST_OF_N, Method.BEAM])
def test_methods_that_cannot_do_without_a_ppm_say_so_at_once(method: Method) -> None:
    with pytest.raises(ValueError, match=f"method {method} needs a process preference model"):
        solve(method, by_printed("3"))


@pytest.mark.parametrize("method", list(Method))
def test_same_seed_gives_the_same_result_and_another_seed_other_requests(method: Method) -> None:
    def seeds(seed: int) -> tuple[SolveResult, list[int | None]]:
        policy = ScriptedPolicy(by_printed("34"))
        values = TablePreference(lambda text: 0.5 if "print(3)" in text else 0.4)
        result = solve(method, policy, values, seed=seed, num_trajectories=3)
        return result, [request.seed for request in policy.requests]

    assert seeds(1) == seeds(1)
    assert set(seeds(1)[1]).isdisjoint(seeds(2)[1])


# ---------------------------------------------------------------- models never fine-tuned


@pytest.mark.parametrize("method", list(Method))
def test_model_that_saw_only_examples_is_read_with_repairs_and_valued_as_trained(
    method: Method,
) -> None:
    def script(request: GenerationRequest) -> list[str]:
        if request.prompt.endswith("<end_of_output>\n"):
            return ["So it is \\boxed{7}.\nQuestion:"]
        return ["```python\nprint(7)\n```\n<output>8<end_of_output>"]

    preference = TablePreference({}, default=0.5)
    search = SearchConfig(template="bootstrap", num_candidates=1)
    policy = ScriptedPolicy(script)
    events: list[Event] = []
    result = solve(
        method,
        policy,
        preference,
        search=search,
        on_event=events.append,
        num_trajectories=1,
        beam_candidates=1,
    )
    assert result.answer == "7"
    assert result.chosen is not None
    assert [step.code for step in result.chosen.steps] == ["print(7)", ""]
    for request in preference.requests:
        assert all(text.startswith("<|user|>:\nHow many?\n<|assistant|>") for text in request.texts)
    assert all("Question:" not in event.text for event in events)


# ---------------------------------------------------------------- events


@pytest.mark.parametrize("method", list(Method))
def test_events_tell_what_is_extended_and_found_with_values_and_cost(method: Method) -> None:
    events: list[Event] = []
    preference = TablePreference({answer("3"): 0.25}, default=0.5)
    result = solve(method, by_printed("3"), preference, on_event=events.append, num_trajectories=1)
    solution = "<code>" + program("3") + "\n<output>7<end_of_output>\n"
    told = [(event.kind, event.text) for event in events]
    assert told == [
        (EventKind.EXTENDS, ""),
        (EventKind.EXTENDS, solution),
        (EventKind.ANSWERED, solution + answer("3")),
    ]
    valued_steps = 0.5 if method in (Method.BEAM, Method.MCTS) else None
    valued_answer = 0.25 if method.uses_preference else None
    assert [event.value for event in events] == [None, valued_steps, valued_answer]
    assert events[0].cost.generated_tokens == 0
    assert events[-1].cost.generated_tokens == result.generated_tokens


# ---------------------------------------------------------------- a time limit


class SlowOnce(ScriptedPolicy):
    """Answers `fast` requests, then none any more."""

    def __init__(self, script: Any, fast: int) -> None:
        super().__init__(script)
        self.fast = fast

    async def generate(self, request: GenerationRequest) -> Any:
        if len(self.requests) == self.fast:
            await asyncio.Event().wait()
        return await super().generate(request)


def stopped(method: Method, fast: int, **config: Any) -> tuple[SolveResult, ScriptedSandbox]:
    sandbox = ScriptedSandbox(default="7\n")
    solver = Solver(
        config=MethodConfig(name=method, num_trajectories=8, **config),
        search=SearchConfig(template="short", num_candidates=2),
        policy=SlowOnce(by_printed("12"), fast),
        preference=TablePreference({answer("2"): 0.5}, default=-0.5),
        sandbox=sandbox,
    )
    return asyncio.run(solver.solve(PROBLEM, seed=0, limit_s=0.2)), sandbox


def test_search_that_is_stopped_answers_with_the_best_it_visited() -> None:
    result, sandbox = stopped(Method.MCTS, fast=2)
    assert (result.ended, result.num_rollouts, result.answer) == (Ending.TIME, 1, "1")
    assert result.notes[0] == "stopped after 0.2 s"
    assert sandbox.open_trees == []


def test_beam_that_is_stopped_answers_with_what_it_finished() -> None:
    script = {
        QUESTION: ["print(1)\n<end_of_code>", "x = 1\n<end_of_step>"],
        "<end_of_output>\n": [answer("7")],
        "<end_of_step>": ["print(x)\n<end_of_code>"],
    }
    solver = Solver(
        config=MethodConfig(name=Method.BEAM, num_trajectories=8),
        search=SearchConfig(template="short"),
        policy=SlowOnce(script, 3),
        preference=TablePreference({}),
        sandbox=(sandbox := ScriptedSandbox(default="7\n")),
    )
    result = asyncio.run(solver.solve(PROBLEM, seed=0, limit_s=0.2))
    assert (result.ended, result.answer, sandbox.open_trees) == (Ending.TIME, "7", [])


@pytest.mark.parametrize("method", list(Method))
def test_method_that_is_stopped_before_it_found_anything_says_so(method: Method) -> None:
    result, sandbox = stopped(method, fast=0)
    assert (result.ended, result.answer, result.chosen) == (Ending.TIME, None, None)
    assert result.notes == ("stopped after 0.2 s", "no solution reached an answer")
    assert sandbox.open_trees == []


def test_result_says_what_ended_it() -> None:
    policy, ppm = by_printed("12"), TablePreference({})
    whole = solve(Method.MCTS, policy, ppm, num_trajectories=2)
    assert whole.ended is Ending.TRAJECTORIES
    few = solve(Method.MCTS, policy, ppm, num_trajectories=9, max_generated_tokens=1)
    assert few.ended is Ending.TOKENS
    empty = solve(Method.MCTS, lambda request: ["cut"], ppm, num_trajectories=2)
    assert empty.ended is Ending.TRAJECTORIES
    assert solve(Method.GREEDY, policy).num_rollouts == 1
