"""The search against scripted engines: golden trees, rules, failures."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import Completion, FinishReason, GenerationRequest
from rollout.problem import Level, Problem
from rollout.search import SearchConfig, SearchError, run_search
from rollout.tree import Discard, Terminal, Tree
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference

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
            config=SearchConfig(template="short", **config),  # type: ignore[arg-type]
            policy=policy,
            preference=preference,
            sandbox=sandbox or ScriptedSandbox(),
            round=1,
            seed=seed,
        )
    )


def random_script(request: GenerationRequest) -> Sequence[str]:
    """Steps, programs, answers, failures and garbage, drawn from the request's seed alone."""
    rng = random.Random(request.seed)
    depth = request.prompt.count("<end_of_step>")
    if request.prompt.endswith("<end_of_output>\n"):
        choices = [answer("3"), answer("4"), "<answer>none<end_of_answer>"]
    else:
        choices = [step(f"a = {rng.randrange(3)}"), step("bad"), last(f"print({depth})"), "cut"]
    return [rng.choice(choices) for _ in range(request.num_candidates)]


def random_search(seed: int, *, ppm: bool, released: bool = False, rollouts: int = 8) -> Tree:
    config = SearchConfig(template="short", num_candidates=4, num_rollouts=rollouts, max_depth=5)
    return asyncio.run(
        run_search(
            PROBLEM,
            config=config.released() if released else config,
            policy=ScriptedPolicy(random_script),
            preference=TablePreference(lambda t: math.sin(len(t))) if ppm else None,
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


@pytest.mark.parametrize("name", ["terminal_guided", "ppm_augmented", "released"])
def test_seeded_search_reproduces_the_golden_tree_node_by_node(name: str) -> None:
    tree = random_search(7, ppm=name == "ppm_augmented", released=name == "released")
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
    assert tree.nodes[3].multiplicity == 2  # both candidates wrote the same answer
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
    assert states[1].endswith(":1")


@pytest.mark.parametrize(
    ("texts", "discard"),
    [
        (["no marker at all"], Discard.UNFINISHED),
        ([""], Discard.UNFINISHED),
        (["<end_of_step>"], Discard.EMPTY),
        (["<answer>I do not know<end_of_answer>"], Discard.NO_ANSWER),
    ],
)
def test_garbage_ends_in_a_named_dead_end_that_costs_its_path(
    texts: list[str], discard: Discard
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
    policy = ScriptedPolicy(random_script)
    sandbox = ScriptedSandbox(default="3\n")
    tree = search(policy, sandbox=sandbox, num_rollouts=50, max_generated_tokens=60)
    assert tree.note == "token budget"
    assert 60 <= tree.generated_tokens < 400


def test_answer_expansion_may_ask_for_fewer_candidates() -> None:
    policy = ScriptedPolicy({"<|assistant|>": [last("print(3)")], "\n": [answer("3")]})
    search(policy, num_candidates=8, num_answer_candidates=1, num_rollouts=1)
    assert [r.num_candidates for r in policy.requests] == [8, 1]


def test_preference_values_at_terminals_need_a_ppm() -> None:
    with pytest.raises(ValueError, match="needs a process preference model"):
        search(ScriptedPolicy({}), terminal_value="preference")


def test_other_searches_beside_it_do_not_change_a_tree() -> None:
    async def together() -> list[Tree]:
        sandbox = ScriptedSandbox({"bad": Failure()}, default="3\n")
        config = SearchConfig(template="short", num_candidates=4, num_rollouts=8, max_depth=5)
        searches = [
            run_search(
                PROBLEM,
                config=config,
                policy=ScriptedPolicy(random_script),
                preference=None,
                sandbox=sandbox,
                round=1,
                index=index,
                seed=seed,
            )
            for index, seed in enumerate((5, 6, 7))
        ]
        return list(await asyncio.gather(*searches))

    alone = [as_table(random_search(seed, ppm=False)) for seed in (5, 6, 7)]
    assert [as_table(tree) for tree in asyncio.run(together())] == alone


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), ppm=st.booleans(), released=st.booleans())
def test_every_tree_keeps_the_invariants(seed: int, ppm: bool, released: bool) -> None:
    tree = random_search(seed, ppm=ppm, released=released)
    for node in tree.nodes:
        assert -1.0 <= node.q_value <= 1.0
        valid = tree.valid_children(node)
        if node.terminal is not None or node.discard is not None:
            assert valid == []
        if node.discard is not None:
            assert node.visit_count == 0
        if valid and not released:
            # each visit of an inner node went on to exactly one child
            own = 1 if ppm and node.parent >= 0 else 0
            open_once = (None, Terminal.NO_VALID_CHILD)
            starts = sum(1 for c in valid if c.value is not None and c.terminal in open_once)
            assert node.visit_count - own == sum(c.visit_count for c in valid) - starts
    assert tree.root.visit_count == tree.num_rollouts or released
