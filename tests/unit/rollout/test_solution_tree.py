from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rollout.engine import Completion, FinishReason, GenerationRequest
from rollout.methods import Method, MethodConfig
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from rollout.solution_tree import answer_tree, of_trajectory, search_of, trajectory_of
from rollout.table import table_to_trees, trees_to_table
from rollout.tree import Discard, Terminal, Tree
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference

PROBLEM = Problem(id="b:p", source="b", level=Level.GSM, text="How many?", answer="3")
RIGHT = "<code>\nprint(3)\n<end_of_code>"
WRONG = "<code>\nprint(4)\n<end_of_code>"
BAD = "<code>\nbad\n<end_of_code>"


def script(request: GenerationRequest) -> Sequence[str | Completion]:
    if request.prompt.endswith("<end_of_output>\n"):
        said = "3" if "print(3)" in request.prompt else "4"
        return [f"<answer>\\boxed{{{said}}}<end_of_answer>"]
    return [RIGHT, WRONG, BAD, "<code>\n# never ends"]


def answered(
    method: Method,
    *,
    count: int = 4,
    policy: ScriptedPolicy | None = None,
    preference: TablePreference | None = None,
    tree: Tree | None = None,
    prompt: str | None = None,
    **settings: int,
) -> Tree:
    config = MethodConfig(name=method, num_trajectories=count, rollouts_per_tree=3)
    search = SearchConfig.model_validate({"template": "short", "num_candidates": 4, **settings})
    (found,) = asyncio.run(
        answer_tree(
            tree or Tree(problem=PROBLEM, round=2, seed=5),
            method=config,
            search=search_of(config, search, guided=preference is not None),
            policy=policy or ScriptedPolicy(script),
            preference=preference,
            sandbox=ScriptedSandbox({"bad": Failure(), "print(3)": "3\n", "print(4)": "4\n"}),
            clock=lambda: 0.0,
            prompt=prompt,
        )
    )
    return found


def test_each_sample_is_a_chain_in_its_order_with_its_verdict_or_reason() -> None:
    tree = answered(Method.MAJORITY)
    ends = {n.rollout: n for n in tree.nodes if not n.children and n.step is not None}
    assert [ends[n].correct for n in range(4)] == [True, False, None, None]
    assert [ends[n].discard for n in range(4)] == [
        None,
        None,
        Discard.CODE_FAILED,
        Discard.UNFINISHED,
    ]
    assert ends[2].execution_error == "ValueError: scripted"
    assert ends[3].step is not None and "never ends" in ends[3].step.text
    assert [tree.nodes[i].rollout for i in tree.root.children] == [0, 1, 2, 3]
    assert tree.solved and tree.num_rollouts == 4
    assert sum(node.num_tokens for node in tree.nodes) == tree.generated_tokens > 0
    assert tree.policy_version == "scripted-policy"


def test_tree_of_chains_survives_the_store() -> None:
    tree = answered(Method.BEST_OF_N, preference=TablePreference({}, default=0.25))
    assert {n.value for n in tree.answers()} == {0.25}
    assert tree.scored_tokens > 0
    assert table_to_trees(trees_to_table([tree])) == [tree]


def test_search_withholds_the_label_and_grades_afterwards() -> None:
    tree = answered(Method.MCTS)
    assert {n.reward for n in tree.answers() if n.visit_count} == {-1.0}
    assert tree.solved


def test_interrupted_search_is_gone_on_with() -> None:
    tree = Tree(problem=PROBLEM, round=2, seed=5)
    failing = ScriptedPolicy(script)
    whole = answered(Method.MCTS)

    def after_two(request: GenerationRequest) -> Sequence[str | Completion]:
        if len(failing.requests) > 2:
            raise RuntimeError("interrupted")
        return script(request)

    failing.script = after_two
    with pytest.raises(RuntimeError, match="interrupted"):
        answered(Method.MCTS, policy=failing, tree=tree)
    requests = tree.num_requests
    assert 0 < requests < whole.num_requests
    assert answered(Method.MCTS, tree=tree) == whole


def test_prompt_that_does_not_fit_is_told_on_the_root() -> None:
    long = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
    tree = answered(Method.GREEDY, policy=ScriptedPolicy({"": [long]}))
    assert tree.root.terminal is Terminal.PROMPT_TOO_LONG
    assert len(tree.nodes) == 1


def test_plain_prompt_asks_once_and_reads_the_box() -> None:
    ended = Completion(text="So \\boxed{3}.", finish=FinishReason.STOP, num_tokens=7)
    cut = Completion(text="So \\boxed{3} and", finish=FinishReason.LENGTH, num_tokens=9)
    policy = ScriptedPolicy({"": [ended, cut]})
    tree = answered(Method.MAJORITY, count=2, policy=policy, prompt="Q: {question} A:")
    (request,) = policy.requests
    assert (request.prompt, request.stop) == ("Q: How many? A:", ())
    assert [(n.correct, n.num_tokens) for n in tree.answers()] == [(True, 7)]
    assert [n.discard for n in tree.nodes[1:]] == [None, Discard.UNFINISHED]


def test_trajectory_ids_come_apart_again() -> None:
    assert trajectory_of(of_trajectory(PROBLEM, 12).id) == ("b:p", 12)
    assert trajectory_of("b:p") == ("b:p", 0)
    assert trajectory_of("C#sharp") == ("C#sharp", 0)
