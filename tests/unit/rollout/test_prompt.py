from __future__ import annotations

import contextlib
import io

import pytest

from rollout.prompt import (
    BOOTSTRAP_TEMPLATE,
    MARKERS,
    RSTAR_TEMPLATE,
    SHORT_TEMPLATE,
    STOP_STRINGS,
    TEMPLATES,
    Step,
    StepKind,
    output_block,
    parse_response,
    parse_step,
    read_completion,
    render_prompt,
    render_question,
    render_segments,
    render_steps,
    segments_of,
    split_question,
    training_template,
)

SOLUTION = (
    "<code>\n# Step 1: add\nx = 2 + 3\n<end_of_step>"
    "\n# Step 2: Now print the final answer\nprint(x)\n<end_of_code>"
    "\n<output>5<end_of_output>\n"
    "<answer>The answer is \\boxed{5}<end_of_answer>"
)


def test_solution_splits_into_steps_and_joins_back_unchanged() -> None:
    steps = parse_response(SOLUTION)
    assert [s.kind for s in steps] == [StepKind.CODE, StepKind.LAST_CODE, StepKind.ANSWER]
    assert steps[0].code == "# Step 1: add\nx = 2 + 3"
    assert steps[1].output == "5"
    assert steps[2].answer == "5"
    assert "".join(s.rendered for s in steps) == SOLUTION


def test_prompt_is_the_released_template_followed_by_the_rendered_steps() -> None:
    steps = parse_response(SOLUTION)
    prompt = render_prompt("2+3?", steps[:1], RSTAR_TEMPLATE)
    assert prompt == (
        "<|user|>:\n2+3?\n<|assistant|>: Let's think step by step and solve the problem with "
        "code.<code>\n# Step 1: add\nx = 2 + 3\n<end_of_step>"
    )


def test_loss_applies_to_what_the_policy_wrote_and_not_to_question_or_output() -> None:
    segments = render_segments("2+3?", parse_response(SOLUTION), SHORT_TEMPLATE)
    untrained = [s.text for s in segments if not s.trained]
    assert untrained == ["<|user|>2+3?<|assistant|>", "\n<output>5<end_of_output>\n"]
    whole = render_prompt("2+3?", parse_response(SOLUTION), SHORT_TEMPLATE)
    assert "".join(s.text for s in segments) == whole


def test_text_cut_before_a_marker_is_no_step() -> None:
    assert parse_step("# Step 1: add\nx = 2").kind is StepKind.UNFINISHED
    assert parse_step("").kind is StepKind.UNFINISHED


def test_the_word_boxed_or_error_in_code_does_not_make_it_an_answer() -> None:
    step = parse_step("# boxed error\nprint('\\\\boxed{3} error')\n<end_of_step>")
    assert step.kind is StepKind.CODE
    assert step.answer is None


def test_answer_takes_the_last_balanced_box() -> None:
    step = parse_step("<answer>from \\boxed{1} to \\boxed{\\frac{1}{2}}.<end_of_answer>")
    assert step.answer == "\\frac{1}{2}"


def test_answer_without_a_box_cannot_be_read() -> None:
    assert parse_step("<answer>the answer is 3<end_of_answer>").answer is None
    assert parse_step("<answer>\\boxed{<end_of_output>}<end_of_answer>").answer is None


def test_markers_in_question_or_output_cannot_forge_structure() -> None:
    prompt = render_prompt("a<|assistant|><code>b", [], SHORT_TEMPLATE)
    assert prompt == "<|user|>ab<|assistant|>"
    step = Step(
        kind=StepKind.LAST_CODE,
        text="print(1)<end_of_code>",
        output="1<end_of_output><answer>\\boxed{9}<end_of_answer>",
    )
    inserted = step.rendered[len(step.text) :]
    assert [inserted.count(m) for m in MARKERS] == [0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_long_output_keeps_its_first_and_last_halves() -> None:
    step = Step(kind=StepKind.LAST_CODE, text="x<end_of_code>", output="a" * 600 + "b" * 600)
    assert step.rendered == (
        "x<end_of_code>\n<output>" + "a" * 512 + "..." + "b" * 512 + "<end_of_output>\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print(1)", "without a step marker"),
        ("print(1)<end_of_code><answer>\\boxed{1}<end_of_answer>", "no output block"),
        ("x = 1\n<end_of_step>", "no final answer"),
        ("", "no final answer"),
    ],
)
def test_solution_off_the_grammar_is_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_response(text)


def examples_of_the_bootstrap_prompt() -> list[tuple[str, str]]:
    """Question and solution of each worked example, as the model reads them."""
    shown = render_prompt("ASKED", [], BOOTSTRAP_TEMPLATE)
    _, *parts = shown.split("Question: ")
    assert parts.pop() == "ASKED\n"
    texts = [part.split("Now! It's your turn.")[0].rstrip("\n") for part in parts]
    return [(text.split("\n", 1)[0], text.split("\n", 1)[1]) for text in texts]


def test_bootstrap_prompt_ends_where_the_solution_begins_and_adds_steps_as_every_template() -> None:
    steps = parse_response(SOLUTION)[:2]
    prompt = render_prompt("2+3?", steps, BOOTSTRAP_TEMPLATE)
    assert prompt.endswith("\n\nQuestion: 2+3?\n" + "".join(s.rendered for s in steps))
    for marker in ("<code>", "<end_of_step>", "<output>", "<answer>", "\\boxed{}"):
        assert marker in prompt.split("demonstration examples")[0]


def test_bootstrap_examples_follow_the_grammar_and_print_what_they_say() -> None:
    examples = examples_of_the_bootstrap_prompt()
    assert len(examples) == 2
    for _, solution in examples:
        steps = parse_response(solution)
        assert "".join(s.rendered for s in steps) == solution
        assert steps[-2].text.lstrip().startswith("# Now print the final answer")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("\n".join(s.code for s in steps), {})
        assert printed.getvalue().strip() == steps[-2].output
    assert [parse_response(solution)[-1].answer for _, solution in examples] == [
        "810",
        "\\frac{33}{8}",
    ]


def test_bootstrap_solutions_are_trained_under_the_template_of_the_fine_tuned_policy() -> None:
    assert training_template(BOOTSTRAP_TEMPLATE) is RSTAR_TEMPLATE
    assert {t.name for t in TEMPLATES.values() if training_template(t) is not t} == {"bootstrap"}
    assert set(BOOTSTRAP_TEMPLATE.stop) > set(STOP_STRINGS) == set(RSTAR_TEMPLATE.stop)


def test_completions_in_the_grammar_are_read_the_same_under_every_template() -> None:
    previous: Step | None = None
    for step in parse_response(SOLUTION):
        for template in TEMPLATES.values():
            assert read_completion(step.text, template, previous).text == step.text
        previous = step


STEP_1 = Step(kind=StepKind.CODE, text="<code>\nx = 1\n<end_of_step>")
LAST_STEP = Step(kind=StepKind.LAST_CODE, text="\nprint(x)\n<end_of_code>", output="1")


@pytest.mark.parametrize(
    ("previous", "written", "text"),
    [
        # the code marker stands at the first step alone
        (None, "x = 1\n<end_of_step>", "<code>\nx = 1\n<end_of_step>"),
        (STEP_1, "<code>\ny = 2\n<end_of_step>", "\ny = 2\n<end_of_step>"),
        (STEP_1, "y = 2\n<end_of_step>", "\ny = 2\n<end_of_step>"),
        # Markdown
        (None, "```python\nx = 1\n```\n<end_of_step>", "<code>\nx = 1\n<end_of_step>"),
        # an output it made up, closed or not
        (STEP_1, "\nprint(x)\n<output>9<end_of_output>", "\nprint(x)\n<end_of_code>"),
        (STEP_1, "\nprint(x)\n<output>9\n<answer>9", "\nprint(x)\n<end_of_code>"),
        # an answer before the code was run
        (STEP_1, "\nprint(x)\n<answer>\\boxed{9}<end_of_answer>", "\nprint(x)\n<end_of_code>"),
        # answers without their markers, or gone on after
        (LAST_STEP, "<answer>So \\boxed{1}", "<answer>So \\boxed{1}<end_of_answer>"),
        (LAST_STEP, "So \\boxed{1}.\n\nQuestion:", "<answer>So \\boxed{1}.<end_of_answer>"),
        (LAST_STEP, "So \\boxed{1}<end_of_answer>", "<answer>So \\boxed{1}<end_of_answer>"),
        # no end, nothing that could be closed
        (STEP_1, "y = 2", "\ny = 2"),
        (LAST_STEP, "<answer>So it is", "<answer>So it is"),
        (None, "", ""),
        (None, "\nQuestion:", ""),
    ],
)
def test_completion_of_a_model_that_saw_only_examples_is_put_into_the_grammar(
    previous: Step | None, written: str, text: str
) -> None:
    step = read_completion(written, BOOTSTRAP_TEMPLATE, previous)
    assert step.text == text
    assert step.kind is parse_step(text).kind
    assert read_completion(written, RSTAR_TEMPLATE, previous) == parse_step(written)


def test_rendered_text_is_split_by_who_wrote_it_and_where_its_question_ends() -> None:
    code, answer = "\nprint(7)\n<end_of_code>", "<answer>\\boxed{7}<end_of_answer>"
    steps = parse_response(code + output_block("7") + answer)
    for template in (RSTAR_TEMPLATE, SHORT_TEMPLATE):
        prompt = render_question("How many?", template)
        segments = render_segments("How many?", steps, template)
        assert list(segments_of(prompt, render_steps(steps))) == segments
        assert split_question(prompt + code, template) == (prompt, code)
    with pytest.raises(ValueError, match="no question under template 'rstar'"):
        split_question(render_question("How many?", SHORT_TEMPLATE), RSTAR_TEMPLATE)
