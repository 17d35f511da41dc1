from __future__ import annotations

import asyncio

from rollout.problem import Level, Problem
from rollout.prompt import SHORT_TEMPLATE
from rollout.sampling import Solution, sample_solutions
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference

PROBLEM = Problem(id="p", source="s", level=Level.GSM, text="How many?", answer="3")
PROGRAM = (
    "<code>\n# Step 1: add\nx = 1 + 2\n<end_of_step>\n# Step 2: print\nprint(x)\n<end_of_code>"
)
ANSWER = "<answer>It is \\boxed{3}<end_of_answer>"


def sample(
    policy: ScriptedPolicy,
    sandbox: ScriptedSandbox,
    preference: TablePreference | None = None,
    count: int = 1,
) -> list[Solution]:
    return asyncio.run(
        sample_solutions(
            PROBLEM,
            num_samples=count,
            temperature=1.0,
            max_tokens=100,
            template=SHORT_TEMPLATE,
            policy=policy,
            preference=preference,
            sandbox=sandbox,
            seed=1,
        )
    )


def test_program_is_run_whole_and_its_output_shown_before_the_answer() -> None:
    policy = ScriptedPolicy({"<|assistant|>": [PROGRAM], "<end_of_output>\n": [ANSWER]})
    sandbox = ScriptedSandbox(default="3\n")
    (solution,) = sample(policy, sandbox)
    runs = [event[2] for event in sandbox.events if event[0] == "run"]
    assert runs == [("# Step 1: add\nx = 1 + 2\n# Step 2: print\nprint(x)",)]
    assert policy.requests[1].prompt.endswith("<output>3<end_of_output>\n")
    assert solution.answer == "3"
    assert "".join(s.rendered for s in solution.steps) == (
        PROGRAM + "\n<output>3<end_of_output>\n" + ANSWER
    )
    assert sandbox.open_trees == []


def test_equal_programs_are_run_once_and_each_is_answered() -> None:
    other = PROGRAM.replace("1 + 2", "2 + 1")
    policy = ScriptedPolicy(
        {"<|assistant|>": [PROGRAM, other, PROGRAM], "<end_of_output>\n": [ANSWER]}
    )
    sandbox = ScriptedSandbox(default="3\n")
    solutions = sample(policy, sandbox, count=3)
    (codes,) = [event[2] for event in sandbox.events if event[0] == "run"]
    assert len(codes) == 2 and len(set(codes)) == 2
    assert [solution.answer for solution in solutions] == ["3"] * 3


def test_failing_unfinished_and_unanswered_programs_have_no_answer() -> None:
    policy = ScriptedPolicy(
        {
            "<|assistant|>": ["bad\n<end_of_code>", "never ends", PROGRAM],
            "<end_of_output>\n": ["no box<end_of_answer>"],
        }
    )
    sandbox = ScriptedSandbox({"bad": Failure()}, default="3\n")
    solutions = sample(policy, sandbox, count=3)
    assert [s.answer for s in solutions] == [None, None, None]
    assert [s.status for s in solutions] == ["error", "", "ok"]


def test_only_answered_solutions_are_valued_and_nan_is_no_value() -> None:
    policy = ScriptedPolicy(
        {"<|assistant|>": [PROGRAM, "never ends"], "<end_of_output>\n": [ANSWER]}
    )
    preference = TablePreference({}, default=0.5)
    solutions = sample(policy, ScriptedSandbox(default="3\n"), preference, count=2)
    assert [s.value for s in solutions] == [0.5, None]
    assert len(preference.requests[0].texts) == 1
    nan = TablePreference({}, default=float("nan"))
    solutions = sample(policy, ScriptedSandbox(default="3\n"), nan, count=1)
    assert solutions[0].value is None


def test_tokens_of_program_and_answer_are_counted() -> None:
    policy = ScriptedPolicy({"<|assistant|>": [PROGRAM], "<end_of_output>\n": [ANSWER]})
    (solution,) = sample(policy, ScriptedSandbox(default="3\n"))
    assert solution.num_tokens == len(PROGRAM) // 4 + len(ANSWER) // 4
