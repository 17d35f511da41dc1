"""What a search makes of bad input: each has one named outcome, and none ends in a wrong label."""

from __future__ import annotations

import asyncio
import math

import pytest

from rollout.engine import (
    Completion,
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
)
from rollout.problem import Level, Problem
from rollout.search import SearchConfig, run_search
from rollout.tree import Discard, Outcome, Terminal, Tree
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference

STEP = "a = 1\n<end_of_step>"
LAST = "print(3)\n<end_of_code>"
ANSWER = "<answer>It is \\boxed{3}<end_of_answer>"


def problem(text: str = "How many?", answer: str = "3") -> Problem:
    return Problem(id="p", source="s", level=Level.GSM, text=text, answer=answer)


def search(
    policy: ScriptedPolicy,
    *,
    asked: Problem | None = None,
    preference: TablePreference | None = None,
    tree: Tree | None = None,
    **config: object,
) -> Tree:
    settings = {"template": "short", "num_candidates": 2, "num_rollouts": 4, **config}
    return asyncio.run(
        run_search(
            asked or problem(),
            config=SearchConfig.model_validate(settings),
            policy=policy,
            preference=preference,
            sandbox=ScriptedSandbox(default="3\n"),
            round=1,
            seed=0,
            resume=tree,
        )
    )


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_problem_is_refused_before_any_search(text: str) -> None:
    with pytest.raises(ValueError, match=r"Problem\.text is empty \(id='p'\)"):
        problem(text)


def test_problem_of_a_hundred_thousand_characters_is_searched_if_the_model_takes_it() -> None:
    policy = ScriptedPolicy({"": [ANSWER]})
    tree = search(policy, asked=problem("What is 1 + 2? " * 6_667))
    assert tree.outcome is Outcome.SOLVED
    assert len(policy.requests[0].prompt) > 100_000


def test_problem_too_long_for_the_model_is_a_tree_that_says_so() -> None:
    too_long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    tree = search(ScriptedPolicy({"": [too_long]}), asked=problem("What is 1 + 2? " * 6_667))
    assert tree.root.terminal is Terminal.PROMPT_TOO_LONG
    assert (tree.note, tree.outcome) == ("prompt too long", Outcome.NO_ANSWER)
    assert (tree.num_requests, tree.num_rollouts, tree.root.q_value) == (1, 1, -1.0)


def test_problem_without_an_accepted_answer_is_searched_and_stays_unlabelled() -> None:
    tree = search(ScriptedPolicy({"": [ANSWER]}), asked=problem(answer=""))
    assert (tree.nodes[1].correct, tree.outcome) == (None, Outcome.UNLABELLED)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no stop string, cut by the token limit", Discard.UNFINISHED),
        ("", Discard.UNFINISHED),
        ("\x00\ufffd\ud800", Discard.UNFINISHED),
        ("# again\n" * 400, Discard.REPETITIVE),
        ("x = 1 + (2 + (" * 400 + "<end_of_step>", Discard.REPETITIVE),
        ("<end_of_step>", Discard.EMPTY),
        ("<answer>no box<end_of_answer>", Discard.NO_ANSWER),
    ],
)
def test_model_that_writes_only_garbage_leaves_every_candidate_with_its_reason(
    text: str, reason: Discard
) -> None:
    tree = search(ScriptedPolicy({"": [text]}), num_candidates=5)
    assert [(n.discard, n.multiplicity) for n in tree.nodes[1:]] == [(reason, 5)]
    assert tree.root.terminal is Terminal.NO_VALID_CHILD
    assert (tree.note, tree.outcome) == ("exhausted", Outcome.NO_ANSWER)


def test_repetition_may_be_kept() -> None:
    text = "x = 1 + (2 + (" * 400 + "<end_of_step>"
    tree = search(ScriptedPolicy({"<|assistant|>": [text], "": [ANSWER]}), max_repeats=None)
    assert tree.nodes[1].discard is None


def test_long_data_in_code_is_no_repetition() -> None:
    text = f"a = [{'0, ' * 400}0]\n<end_of_step>"
    tree = search(ScriptedPolicy({"<|assistant|>": [text], "": [ANSWER]}))
    assert tree.nodes[1].discard is None


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_logprob_that_is_no_number_is_recorded_as_none(logprob: float) -> None:
    completion = Completion(text=ANSWER, finish=FinishReason.STOP, logprob=logprob)
    tree = search(ScriptedPolicy({"": [completion]}))
    assert (tree.nodes[1].logprob, tree.outcome) == (None, Outcome.SOLVED)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ppm_value_that_is_no_number_leaves_the_candidate_unscored(value: float) -> None:
    policy = ScriptedPolicy({"<|assistant|>": [STEP], "": [ANSWER]})
    tree = search(policy, preference=TablePreference({}, default=value), num_rollouts=1)
    assert [n.value for n in tree.nodes[1:]] == [None, None]
    assert [n.q_value for n in tree.nodes[1:]] == [1.0, 1.0]


def test_unscored_answer_at_test_time_counts_as_the_worst() -> None:
    tree = search(
        ScriptedPolicy({"": [ANSWER]}),
        preference=TablePreference({}, default=math.nan),
        terminal_value="preference",
    )
    assert tree.nodes[1].reward == -1.0


def test_ppm_value_outside_its_range_is_cut_to_it() -> None:
    policy = ScriptedPolicy({"": [STEP]})
    tree = search(policy, preference=TablePreference({}, default=7.5), max_depth=2, num_rollouts=1)
    assert tree.nodes[1].value == 1.0


@pytest.mark.parametrize("given", [0, 3])
def test_ppm_that_returns_the_wrong_number_of_values_is_an_engine_failure(given: int) -> None:
    class Miscounting(TablePreference):
        async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
            return EvaluationReply(values=(0.0,) * given)

    tree = Tree(problem=problem(), round=1)
    with pytest.raises(EngineError, match=f"returned {given} values for 1 texts, problem p"):
        search(ScriptedPolicy({"": [STEP]}), preference=Miscounting({}), tree=tree)
    assert (len(tree.nodes), tree.num_requests) == (1, 0)


def test_policy_that_returns_nothing_is_an_engine_failure() -> None:
    class Silent(ScriptedPolicy):
        async def generate(self, request: GenerationRequest) -> GenerationReply:
            return GenerationReply(completions=())

    with pytest.raises(EngineError, match="no completion of 2 asked for, problem p"):
        search(Silent({}))


@pytest.mark.parametrize("dying", ["policy", "preference"])
def test_engine_that_dies_mid_request_ends_the_search_with_its_tree_as_it_was(dying: str) -> None:
    script = {"<|assistant|>": [STEP, LAST], "<end_of_step>": [LAST], "": [ANSWER]}
    policy, preference = ScriptedPolicy(script), TablePreference({}, default=0.5)
    whole = search(policy, preference=preference)
    tree = Tree(problem=problem(), round=1)
    policy, preference = ScriptedPolicy(script), TablePreference({}, default=0.5)
    search(policy, preference=preference, tree=tree, num_rollouts=1)
    before = len(tree.nodes)
    {"policy": policy, "preference": preference}[dying].failures = 1
    with pytest.raises(EngineError, match="scripted failure"):
        search(policy, preference=preference, tree=tree)
    assert len(tree.nodes) == before
    assert search(policy, preference=preference, tree=tree) == whole


def test_prompt_that_outgrows_the_model_ends_its_branch_alone() -> None:
    too_long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    policy = ScriptedPolicy(
        {"<|assistant|>": [STEP, LAST], "<end_of_step>": [too_long], "": [ANSWER]}
    )
    tree = search(policy)
    assert [n.terminal for n in tree.nodes] == [
        None,
        Terminal.PROMPT_TOO_LONG,
        None,
        Terminal.ANSWER,
    ]
    assert (tree.num_rollouts, tree.outcome) == (2, Outcome.SOLVED)


def test_repetition_found_by_the_engine_is_a_named_discard() -> None:
    looped = Completion(text="x = 1", finish=FinishReason.REPETITION)
    tree = search(ScriptedPolicy({"": [looped]}), num_candidates=2)
    assert [(n.discard, n.multiplicity) for n in tree.nodes[1:]] == [(Discard.REPETITIVE, 2)]
