"""The search against scripted engines: golden trees, rules, failures."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from rollout.engine import Completion, FinishReason
from rollout.problem import Level, Problem
from rollout.search import SearchConfig, SearchError, run_search
from rollout.tree import Discard, Terminal, Tree
from tests.fakes import (
    Failure,
    ScriptedPolicy,
    ScriptedSandbox,
    TablePreference,
    completion,
    random_steps,
)
from verifier import Verdict, verify_answer

PROBLEM = Problem(id="p", source="s", level=Level.GSM, text="How many?", answer="3")
GOLDEN = Path(__file__).parents[2] / "data" / "golden_trees.json"


def step(text: str) -> str:
    return f"{text}\n<end_of_step>"


def last(text: str) -> str:
    return f"{text}\n<end_of_code>"


def answer(value: str) -> str:
    return f"<answer>It is \\boxed{{{value}}}<end_of_answer>"


def search(
    policy: ScriptedPolicy,
    *,
    sandbox: ScriptedSandbox | None = None,
    preference: TablePreference | None = None,
    seed: int = 0,
    **config: object,
) -> Tree:
    return asyncio.run(
        run_search(
            PROBLEM,
            config=SearchConfig(**{"template": "short", **config}),
            policy=policy,
            preference=preference,
            sandbox=sandbox or ScriptedSandbox(),
            round=1,
            seed=seed,
        )
    )


def value_of(text: str) -> float:
    return math.sin(len(text.replace("<code>", "")))


def random_search(seed: int, *, ppm: bool, rollouts: int = 8, **config: object) -> Tree:
    return asyncio.run(
        run_search(
            PROBLEM,
            config=SearchConfig(
                template="short",
                num_candidates=4,
                num_rollouts=rollouts,
                max_depth=5,
                **{"num_answer_candidates": None, **config},
            ),
            policy=ScriptedPolicy(random_steps),
            preference=TablePreference(lambda t: math.sin(len(t.replace("<code>", ""))))
            if ppm
            else None,
            sandbox=ScriptedSandbox({"bad": Failure()}, default="3\n"),
            round=3 if ppm else 1,
            seed=seed,
        )
    )


def as_table(tree: Tree) -> list[list[object]]:
    """One row a node: id, parent, discard or terminal, N, q."""
    return [
        [n.id, n.parent, n.discard or n.terminal or "", n.visit_count, round(n.value_sum, 6)]
        for n in tree.nodes
    ]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("terminal_guided", {}),
        ("ppm_augmented", {"ppm": True}),
        ("every_child_first", {"unvisited": "infinite"}),
        ("every_child_first_ppm", {"unvisited": "infinite", "ppm": True}),
        ("released", {"preset": "released"}),
        ("released_ppm", {"preset": "released", "ppm": True}),
        ("three_rollouts_at_a_time", {"parallel_rollouts": 3}),
        ("three_at_a_time_with_ppm", {"parallel_rollouts": 3, "ppm": True}),
    ],
)
def test_seeded_search_reproduces_the_golden_tree_node_by_node(
    name: str, config: dict[str, Any]
) -> None:
    tree = random_search(7, **{"ppm": False, **config})
    assert as_table(tree) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


def test_two_candidates_two_rollouts_worked_by_hand() -> None:
    policy = ScriptedPolicy(
        {
            "<|assistant|>": [last("print(3)"), last("print(4)")],
            "<output>3<end_of_output>\n": [answer("3")],
            "<output>4<end_of_output>\n": [answer("4")],
        }
    )
    sandbox = ScriptedSandbox({"print(3)": "3\n", "print(4)": "4\n"})
    tree = search(policy, sandbox=sandbox, num_candidates=2, num_rollouts=2)
    # rollout 1: root -> 1 -> 3 (+1); rollout 2 takes the unvisited sibling: root -> 2 -> 4 (-1)
    assert as_table(tree) == [
        [0, -1, "", 2, 0.0],
        [1, 0, "", 1, 1.0],
        [2, 0, "", 1, -1.0],
        [3, 1, "answer", 1, 1.0],
        [4, 2, "answer", 1, -1.0],
    ]
    assert tree.solved
    assert sandbox.open_trees == []


def test_ppm_values_steer_the_first_descent_and_start_the_q_values() -> None:
    policy = ScriptedPolicy(
        {
            "<|assistant|>": [last("print(3)"), last("print(4)")],
            "<output>3<end_of_output>\n": [answer("3")],
            "<output>4<end_of_output>\n": [answer("4")],
        }
    )
    sandbox = ScriptedSandbox({"print(3)": "3\n", "print(4)": "4\n"})
    values = {"3<end_of_output>\n": 0.2, "4<end_of_output>\n": 0.6}
    tree = search(
        policy,
        sandbox=sandbox,
        preference=TablePreference(values),
        num_candidates=2,
        num_rollouts=1,
    )
    # Eq. 3: q = PPM + reward, N = 1 + 1 on the visited child
    assert as_table(tree) == [
        [0, -1, "", 1, -1.0],
        [1, 0, "", 1, 0.2],
        [2, 0, "", 2, -0.4],
        [3, 2, "answer", 1, -1.0],
    ]


def test_at_test_time_an_answer_is_worth_its_ppm_value_whatever_its_label() -> None:
    policy = ScriptedPolicy({"<|assistant|>": [answer("3")]})
    tree = search(
        policy,
        preference=TablePreference({}, default=-0.25),
        num_candidates=1,
        num_rollouts=1,
        terminal_value="preference",
    )
    assert tree.nodes[1].correct
    assert (tree.nodes[1].reward, tree.root.q_value) == (-0.25, -0.25)


def test_identical_candidates_run_once_and_keep_their_number() -> None:
    sandbox = ScriptedSandbox(default="3\n")
    policy = ScriptedPolicy({"<|assistant|>": [last("print(3)")], "\n": [answer("3")]})
    tree = search(policy, sandbox=sandbox, num_candidates=8, num_rollouts=1)
    runs = [event for event in sandbox.events if event[0] == "run"]
    assert [event[2] for event in runs] == [("print(3)",)]
    assert tree.nodes[1].multiplicity == 8
    assert tree.num_executions == 1


def test_failing_code_is_discarded_with_its_status_and_never_selected() -> None:
    sandbox = ScriptedSandbox({"bad": Failure(status="timeout", error_type="Timeout")})
    policy = ScriptedPolicy({"<|assistant|>": [step("bad"), answer("3")]})
    tree = search(policy, sandbox=sandbox, num_candidates=2, num_rollouts=4)
    bad = tree.nodes[1]
    assert (bad.discard, bad.execution_status, bad.visit_count) == (
        Discard.CODE_FAILED,
        "timeout",
        0,
    )
    assert bad.execution_error == "Timeout: scripted"
    assert tree.note == "exhausted"


def test_child_code_runs_on_the_state_its_parent_left() -> None:
    sandbox = ScriptedSandbox(default="3\n")
    policy = ScriptedPolicy(
        {
            "<|assistant|>": [step("a = 1")],
            "<end_of_step>": [last("print(a)")],
            "<end_of_output>\n": [answer("3")],
        }
    )
    search(policy, sandbox=sandbox, num_candidates=1, num_rollouts=1)
    states = [event[1] for event in sandbox.events if event[0] == "run"]
    assert len(set(states)) == 2
    assert str(states[1]).endswith(":1")


@pytest.mark.parametrize(
    ("texts", "discard"),
    [
        (["no marker at all"], Discard.UNFINISHED),
        ([""], Discard.UNFINISHED),
        (["<end_of_step>"], Discard.EMPTY),
        (["<answer>I do not know<end_of_answer>"], Discard.NO_ANSWER),
        (["<answer>It is \\boxed{<end_of_output>}.<end_of_answer>"], Discard.NO_ANSWER),
        (["It is \\boxed{3}<end_of_answer>"], Discard.OUT_OF_PLACE),
        ([completion("x = 3\n<end_of_step>", ["<end_of_step>"])], Discard.OUT_OF_PLACE),
        ([completion("print(3)\n<end_of_code>", ["<end_of_code>"])], Discard.OUT_OF_PLACE),
    ],
)
def test_garbage_ends_in_a_named_dead_end_that_costs_its_path(
    texts: list[str | Completion], discard: Discard
) -> None:
    tree = search(ScriptedPolicy({"": texts}), num_candidates=2, num_rollouts=4)
    assert {n.discard for n in tree.nodes[1:]} == {discard}
    assert tree.root.terminal is Terminal.NO_VALID_CHILD
    assert tree.root.q_value == -1.0
    assert tree.note == "exhausted"


def test_over_long_prompt_ends_its_branch_with_a_reason() -> None:
    too_long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    policy = ScriptedPolicy({"<|assistant|>": [step("a = 1")], "<end_of_step>": [too_long]})
    tree = search(policy, num_candidates=1, num_rollouts=2)
    assert tree.nodes[1].terminal is Terminal.PROMPT_TOO_LONG
    assert tree.nodes[1].q_value == -1.0


def test_path_of_sixteen_steps_without_answer_is_too_deep() -> None:
    policy = ScriptedPolicy(lambda r: [step(f"a = {len(r.prompt)}")])
    tree = search(policy, num_candidates=1, num_rollouts=1)
    assert tree.nodes[-1].depth == 16
    assert tree.nodes[-1].terminal is Terminal.TOO_DEEP
    assert tree.nodes[1].q_value == -1.0


def test_nan_from_the_ppm_leaves_a_candidate_unscored_and_the_search_alive() -> None:
    policy = ScriptedPolicy({"<|assistant|>": [answer("3")]})
    preference = TablePreference({}, default=float("nan"))
    tree = search(policy, preference=preference, num_candidates=1, num_rollouts=1)
    assert tree.nodes[1].value is None
    assert tree.nodes[1].q_value == 1.0


def test_sandbox_that_fails_itself_stops_the_search_and_labels_nothing() -> None:
    sandbox = ScriptedSandbox({"a = 1": Failure(status="infra_error")})
    policy = ScriptedPolicy({"": [step("a = 1")]})
    with pytest.raises(SearchError, match="problem p: infra_error"):
        search(policy, sandbox=sandbox, num_candidates=1, num_rollouts=1)
    assert sandbox.open_trees == []


def test_no_rollout_starts_beyond_the_token_budget() -> None:
    policy = ScriptedPolicy(random_steps)
    sandbox = ScriptedSandbox(default="3\n")
    tree = search(policy, sandbox=sandbox, num_rollouts=50, max_generated_tokens=60)
    assert tree.note == "token budget"
    assert 60 <= tree.generated_tokens < 400


@pytest.mark.parametrize(
    ("config", "asked"),
    [({}, [8, 1]), ({"num_answer_candidates": 2}, [8, 2]), ({"preset": "released"}, [8, 8])],
)
def test_one_answer_is_asked_for_after_an_output_unless_more_are_wanted(
    config: dict[str, Any], asked: list[int]
) -> None:
    policy = ScriptedPolicy({"<|assistant|>": [last("print(3)")], "\n": [answer("3")]})
    search(policy, num_candidates=8, num_rollouts=1, **config)
    assert [r.num_candidates for r in policy.requests] == asked


def test_answers_of_an_expansion_that_say_the_same_are_one_node() -> None:
    wordings = [
        "<answer>\\boxed{1/2}<end_of_answer>",
        "<answer>So \\boxed{2}<end_of_answer>",
        "<answer>Half: \\boxed{0.5}<end_of_answer>",
        "<answer>\\boxed{\\frac{1}{2}}<end_of_answer>",
        "<answer>\\boxed{1/2}<end_of_answer>",
    ]
    tree = search(ScriptedPolicy({"": wordings}), num_candidates=5, num_rollouts=8)
    half, two = tree.nodes[1:]
    assert half.step is not None and half.step.answer == "1/2"
    assert (half.multiplicity, two.multiplicity) == (4, 1)
    assert half.num_tokens + two.num_tokens == tree.generated_tokens
    # no rollout is spent on a further wording
    assert (tree.num_rollouts, tree.note) == (2, "exhausted")


def test_released_rule_keeps_the_first_answer_with_all_its_wordings() -> None:
    script = {"": [answer("4"), answer("3"), answer("4.0")]}
    tree = search(ScriptedPolicy(script), num_candidates=3, num_rollouts=1, preset="released")
    assert [(n.discard, n.multiplicity) for n in tree.nodes[1:]] == [
        (None, 2),
        (Discard.NOT_KEPT, 1),
    ]


def test_preference_values_at_terminals_need_a_ppm() -> None:
    with pytest.raises(ValueError, match="needs a process preference model"):
        search(ScriptedPolicy({}), terminal_value="preference")


def test_released_rule_keeps_failing_code_as_a_leaf_its_ancestors_never_hear_of() -> None:
    sandbox = ScriptedSandbox({"bad": Failure()}, default="3\n")
    policy = ScriptedPolicy(
        {
            "<|assistant|>": [step("bad"), last("print(3)")],
            "<end_of_output>\n": [answer("4"), answer("3")],
        }
    )
    tree = search(policy, sandbox=sandbox, num_candidates=2, num_rollouts=3, preset="released")
    # the first of the two answers alone is kept, so one rollout exhausts the tree
    assert as_table(tree) == [
        [0, -1, "", 1, -1.0],
        [1, 0, "code_error", 1, -1.0],
        [2, 0, "", 1, -1.0],
        [3, 2, "answer", 1, -1.0],
        [4, 2, "not_kept", 0, 0.0],
    ]
    assert tree.nodes[1].execution_error == "ValueError: scripted"
    assert (tree.num_rollouts, tree.note) == (1, "exhausted")


def test_released_rollout_that_meets_only_failures_ends_without_a_reward() -> None:
    sandbox = ScriptedSandbox({"bad": Failure()})
    policy = ScriptedPolicy(
        {"<|assistant|>": [step("a = 1"), step("a = 2")], "<end_of_step>": [step("bad")]}
    )
    tree = search(policy, sandbox=sandbox, num_candidates=2, num_rollouts=8, preset="released")
    # rollout 1 expands the root and node 1, rollout 2 node 2; then nothing is left
    assert as_table(tree) == [
        [0, -1, "", 0, 0.0],
        [1, 0, "", 0, 0.0],
        [2, 0, "", 0, 0.0],
        [3, 1, "code_error", 1, -1.0],
        [4, 2, "code_error", 1, -1.0],
    ]
    assert (tree.num_rollouts, tree.note, tree.outcome) == (2, "exhausted", "no_answer")


def test_first_answer_of_an_expansion_stops_its_siblings_before_they_run() -> None:
    sandbox = ScriptedSandbox(default="3\n")
    policy = ScriptedPolicy({"": [step("a = 1"), answer("3"), answer("4"), "cut"]})
    tree = search(
        policy, sandbox=sandbox, num_candidates=4, num_rollouts=1, answer_candidates="first"
    )
    assert [n.discard for n in tree.nodes[1:]] == [
        Discard.NOT_KEPT,
        None,
        Discard.NOT_KEPT,
        Discard.UNFINISHED,
    ]
    assert not [event for event in sandbox.events if event[0] == "run"]


@pytest.mark.parametrize(
    ("unvisited", "visits"),
    [
        # after two failures the root has N = 2, so a failed child is worth -1 + 2 sqrt(ln 2) = 0.67
        ("zero", [2, 1, 0]),
        ("first_play", [2, 1, 0]),
        ("infinite", [1, 1, 1]),
    ],
)
def test_unvisited_child_worth_zero_waits_behind_one_that_failed_once(
    unvisited: str, visits: list[int]
) -> None:
    policy = ScriptedPolicy(
        {
            "<|assistant|>": [step("a = 1"), step("a = 2"), step("a = 3")],
            "<end_of_step>": [answer("4"), answer("5")],
        }
    )
    tree = search(policy, num_candidates=3, num_rollouts=3, unvisited=unvisited)
    assert [n.visit_count for n in tree.nodes[1:4]] == visits


def test_preset_sets_the_rules_that_are_not_given_themselves() -> None:
    released = SearchConfig(preset="released")
    assert (released.unvisited, released.invalid_candidates) == ("zero", "leaf")
    assert (released.answer_candidates, released.failure_backup) == ("first", "leaf")
    mixed = SearchConfig(preset="released", unvisited="infinite")
    assert (mixed.unvisited, mixed.failure_backup) == ("infinite", "leaf")
    assert SearchConfig.model_validate(mixed.model_dump(mode="json")) == mixed
    with pytest.raises(ValueError, match="preset"):
        SearchConfig(preset="other")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"invalid_candidates": "leaf"}, "needs failure_backup: leaf"),
        ({"preset": "released", "failure_backup": "path"}, "needs failure_backup: leaf"),
        ({"answer_candidates": "first", "num_answer_candidates": 2}, "keeps one of"),
        ({"temperature": 0}, "num_candidates: 8 the same"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**rules)


def test_three_rollouts_at_a_time_spread_over_the_children() -> None:
    policy = ScriptedPolicy(
        {
            "<|assistant|>": [last("print(1)"), last("print(2)"), last("print(3)")],
            "<end_of_output>\n": [answer("3"), answer("4")],
        }
    )
    sandbox = ScriptedSandbox(default="3\n")
    tree = search(
        policy,
        sandbox=sandbox,
        num_candidates=3,
        num_rollouts=3,
        parallel_rollouts=3,
        unvisited="infinite",
    )
    # one request for the root that all three wait at, then each child has one rollout of its own
    assert [n.visit_count for n in tree.nodes[:4]] == [3, 1, 1, 1]
    assert (tree.num_requests, tree.num_rollouts) == (4, 3)


def test_rollouts_at_a_time_await_the_engines_together() -> None:
    policy = ScriptedPolicy(random_steps)
    sandbox = ScriptedSandbox({"bad": Failure()}, default="3\n")
    search(policy, sandbox=sandbox, num_rollouts=12, parallel_rollouts=4)
    assert policy.max_in_flight > 1


def test_rollouts_that_find_every_leaf_taken_end_without_a_reward() -> None:
    policy = ScriptedPolicy({"": [answer("3")]})
    tree = search(policy, num_candidates=8, num_rollouts=4, parallel_rollouts=4)
    assert as_table(tree) == [[0, -1, "", 1, 1.0], [1, 0, "answer", 1, 1.0]]
    assert tree.num_rollouts == 4


def test_tree_says_what_it_was_searched_with_and_what_each_stage_took() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    config = SearchConfig(template="short", num_candidates=2, num_rollouts=1)
    tree = asyncio.run(
        run_search(
            PROBLEM,
            config=config,
            policy=ScriptedPolicy(
                {"<|assistant|>": [last("print(3)")], "<end_of_output>\n": [answer("3")]}
            ),
            preference=TablePreference({}),
            sandbox=ScriptedSandbox(default="3\n"),
            round=3,
            seed=0,
            clock=clock,
        )
    )
    assert SearchConfig.model_validate_json(tree.search_config) == config
    assert tree.num_requests == 2
    # each stage takes one tick; nothing is run in the second expansion
    assert (tree.generate_s, tree.execute_s, tree.grade_s, tree.evaluate_s) == (2, 1, 2, 2)
    assert tree.seconds == now - 1.0
    assert tree.outcome == "solved"


def test_without_a_clock_no_time_is_recorded() -> None:
    tree = random_search(7, ppm=True)
    assert (tree.seconds, tree.generate_s, tree.evaluate_s) == (0.0, 0.0, 0.0)


def test_bootstrap_search_shows_examples_and_scores_under_the_trained_template() -> None:
    policy = ScriptedPolicy(
        {
            "Question: How many?\n": ["```python\nprint(3)\n<output>3<end_of_output>"],
            "<end_of_output>\n": ["The answer is \\boxed{3}.\n\nQuestion:"],
        }
    )
    preference = TablePreference({}, default=0.5)
    tree = search(
        policy,
        sandbox=ScriptedSandbox({"print(3)": "3\n"}),
        preference=preference,
        num_candidates=1,
        num_rollouts=1,
        template="bootstrap",
    )
    assert policy.requests[0].prompt.startswith("You are a careful mathematician")
    assert "\nQuestion:" in policy.requests[0].stop
    rendered = (
        "<|user|>:\nHow many?\n<|assistant|>: Let's think step by step and solve the problem with "
        "code.<code>\nprint(3)\n<end_of_code>\n<output>3<end_of_output>\n"
    )
    assert [request.texts for request in preference.requests] == [
        (rendered,),
        (rendered + "<answer>The answer is \\boxed{3}.<end_of_answer>",),
    ]
    assert tree.solved


def test_plain_numbers_are_graded_at_once_and_other_answers_off_the_event_loop() -> None:
    threads: dict[str, bool] = {}

    def grade(gold: str, candidate: str) -> Verdict:
        threads[candidate] = threading.current_thread() is threading.main_thread()
        return verify_answer(gold, candidate)

    asyncio.run(
        run_search(
            PROBLEM,
            config=SearchConfig(template="short", num_candidates=4, num_rollouts=4),
            policy=ScriptedPolicy({"": [answer("3"), answer("7/2"), answer("\\sqrt{2}")]}),
            preference=None,
            sandbox=ScriptedSandbox(),
            round=1,
            seed=0,
            grade=grade,
        )
    )
    assert threads == {"3": True, "7/2": True, "\\sqrt{2}": False}


def test_an_answer_is_graded_once_in_a_tree() -> None:
    asked: list[str] = []

    def grade(gold: str, candidate: str) -> Verdict:
        asked.append(candidate)
        return verify_answer(gold, candidate)

    tree = asyncio.run(
        run_search(
            PROBLEM,
            config=SearchConfig(
                template="short", num_candidates=3, num_answer_candidates=2, num_rollouts=9
            ),
            policy=ScriptedPolicy(
                {
                    "<|assistant|>": [last("print(1)"), last("print(2)"), last("print(3)")],
                    "": [answer("3"), answer("4")],
                }
            ),
            preference=None,
            sandbox=ScriptedSandbox(default="3\n"),
            round=1,
            seed=0,
            grade=grade,
        )
    )
    assert sorted(asked) == ["3", "4"]
    assert [n.correct for n in tree.answers()] == [True, False] * 3
