"""Worked examples of one's own: shown as they stand, and refused by name if they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rollout.prompt import BOOTSTRAP_TEMPLATE, render_question
from rollout.search import SearchConfig
from rollout.worked_examples import ExampleError, WorkedExamples, check_examples
from verifier import SandboxLimits

SOLUTION = """\
<code>
# Step 1: Count the rolls.
rolls = 3 * 4
<end_of_step>
# Now print the final answer
print(rolls)
<end_of_code>
<output>12<end_of_output>
<answer>There are $\\boxed{12}$ rolls.<end_of_answer>"""


def shown(solution: str = SOLUTION, **own: Any) -> WorkedExamples:
    example = {"question": "How many rolls?", "solution": solution, "answer": 12, **own}
    return WorkedExamples.model_validate({"instructions": "Be brief.", "examples": [example]})


def test_a_file_of_ones_own_takes_the_place_of_what_is_shipped(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(shown().model_dump(mode="json")))
    config = SearchConfig.model_validate({"template": "bootstrap", "bootstrap": str(file)})
    file.unlink()  # what it said goes on with the config
    again = SearchConfig.model_validate(config.model_dump(mode="json"))
    text = render_question("And now?", again.prompt_template)
    assert text.startswith("Be brief.\n\nThe following are 1 demonstration examples.")
    assert SOLUTION in text and text.endswith("Question: And now?\n")
    assert again.prompt_template.stop == BOOTSTRAP_TEMPLATE.stop
    assert again.training_template.name == "rstar"
    assert SearchConfig(template="bootstrap").prompt_template is BOOTSTRAP_TEMPLATE


def test_a_file_that_cannot_be_read_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="cannot be read"):
        SearchConfig.model_validate({"bootstrap": str(tmp_path / "absent.yaml")})


def test_right_examples_pass() -> None:
    check_examples(shown(), SandboxLimits())


def test_the_examples_that_are_shipped_are_right() -> None:
    shipped = WorkedExamples()
    check_examples(shipped, SandboxLimits())
    assert shipped.template() == BOOTSTRAP_TEMPLATE


def test_a_whole_prompt_of_ones_own_is_taken_as_it_is() -> None:
    template = WorkedExamples(text="Q: {question} A:").template()
    assert render_question("1 + 1?", template) == "Q: 1 + 1? A:" and template.repairs
    with pytest.raises(ValidationError, match="must contain"):
        WorkedExamples(text="no place")


def test_turns_of_a_conversation_end_with_the_question() -> None:
    turns = shown().turns()
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"] == "Be brief.\n\nQuestion: How many rolls?"
    assert turns[1]["content"] == SOLUTION and turns[2]["content"] == "Question: {question}"


@pytest.mark.parametrize(
    ("solution", "own", "said"),
    [
        (SOLUTION.replace("3 * 4", "3 * 5"), {}, r"example 1: its code prints '15', .* says '12'"),
        (SOLUTION.replace("rolls = ", "rolls == "), {"name": "bakery"}, "example bakery: NameErr"),
        (SOLUTION.replace("boxed{12}", "boxed{13}"), {}, r"boxed answer is '13', its answer '12'"),
        (SOLUTION.replace("<end_of_code>", ""), {}, "example 1: expected <code>, steps"),
        (SOLUTION, {"question": "What is {question}?"}, "must not contain"),
    ],
)
def test_a_wrong_example_is_refused_by_name(solution: str, own: dict[str, Any], said: str) -> None:
    with pytest.raises(ExampleError, match=said):
        check_examples(shown(solution, **own), SandboxLimits())
