"""Problem + steps <-> text: the only place that writes prompts and reads completions.

One trajectory reads (arXiv 2501.04519 section 3.2; markers as in the released data):

    <code> step <end_of_step> step <end_of_step> ... last step <end_of_code>
    <output>captured stdout<end_of_output>          inserted by the executor, never by the model
    <answer>one sentence with \\boxed{...}<end_of_answer>

Steps are joined by nothing (their own newlines belong to them). The same renderer serves training,
search and PPM scoring, so that the three never differ by a blank line; the released code trains on
one newline before the assistant marker and samples with two.

A model that was never fine-tuned on the markers (round 1) is shown them: `BOOTSTRAP_TEMPLATE` puts
instructions and worked examples before the question, and its completions are put into the grammar
before they are read (`read_completion`). What it finds is trained, and valued by a PPM, under the
template of the fine-tuned policy (`PromptTemplate.trained_as`).

Not covered: chat templates of instruct models, which evaluation of foreign models needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from verifier import extract_answer

CODE = "<code>"
END_OF_STEP = "<end_of_step>"
END_OF_CODE = "<end_of_code>"
OUTPUT = "<output>"
END_OF_OUTPUT = "<end_of_output>"
ANSWER = "<answer>"
END_OF_ANSWER = "<end_of_answer>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"

MARKERS = (
    CODE,
    END_OF_STEP,
    END_OF_CODE,
    OUTPUT,
    END_OF_OUTPUT,
    ANSWER,
    END_OF_ANSWER,
    USER,
    ASSISTANT,
)
"""Special tokens a policy's tokenizer must hold as one token each."""

STOP_STRINGS = (END_OF_STEP, END_OF_CODE, END_OF_ANSWER)
"""A step of a fine-tuned policy ends at one of these."""

MAX_OUTPUT_CHARS = 1024
"""Longer stdout is shown to the model as its first and last halves (released behaviour)."""


class StepKind(StrEnum):
    """What a step is, read from how it ended."""

    CODE = "code"
    """Ended with <end_of_step>: more code follows."""
    LAST_CODE = "last_code"
    """Ended with <end_of_code>: the output block and the answer follow."""
    ANSWER = "answer"
    """Ended with <end_of_answer>."""
    UNFINISHED = "unfinished"
    """Ended without a marker (length or end of sequence): not a step."""


_KIND_OF_END = {
    END_OF_STEP: StepKind.CODE,
    END_OF_CODE: StepKind.LAST_CODE,
    END_OF_ANSWER: StepKind.ANSWER,
}
_END_OF_KIND = {kind: marker for marker, kind in _KIND_OF_END.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One move: a thought and its code, or the final answer sentence."""

    kind: StepKind
    text: str
    """As it stands in the trajectory, end marker included, output block excluded."""
    output: str | None = None
    """Stdout the executor inserts after a LAST_CODE step; None before execution or otherwise."""
    answer: str | None = None
    """What an ANSWER step says; None otherwise or if it cannot be read."""

    @property
    def body(self) -> str:
        """The text without its end marker."""
        return (
            self.text[: -len(_END_OF_KIND[self.kind])] if self.kind in _END_OF_KIND else self.text
        )

    @property
    def code(self) -> str:
        """Python to execute; "" for an answer and for what is no step.

        Read from the text each time, so that an open tree of thousands of steps holds it once.
        """
        if self.kind not in (StepKind.CODE, StepKind.LAST_CODE):
            return ""
        return self.body.replace(CODE, "").strip("\n")

    @property
    def rendered(self) -> str:
        """The step with its output block: what following prompts contain."""
        if self.kind is StepKind.LAST_CODE and self.output is not None:
            return self.text + output_block(self.output)
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """How a question is wrapped; `{question}` is replaced."""

    name: str
    text: str
    stop: tuple[str, ...] = STOP_STRINGS
    """Where a step of its model ends."""
    trained_as: str = ""
    """Name of the template its solutions are trained and valued under; "" means its own."""
    repairs: bool = False
    """True: completions are put into the grammar before they are read."""

    def __post_init__(self) -> None:
        if "{question}" not in self.text:
            raise ValueError(f"prompt template {self.name!r} has no {{question}}")


RSTAR_TEMPLATE = PromptTemplate(
    name="rstar",
    text=f"{USER}:\n{{question}}\n{ASSISTANT}: Let's think step by step and solve the problem "
    "with code.",
)
"""Template of the released SFT data."""

SHORT_TEMPLATE = PromptTemplate(name="short", text=f"{USER}{{question}}{ASSISTANT}")
"""No preamble: for models trained from scratch on few tokens, as the miniature."""

NEXT_QUESTION = "\nQuestion:"
"""What a model that follows the examples too far writes after its answer."""

EXAMPLES = (
    (
        "A bakery bakes 18 trays of 24 rolls each morning. It sells five sixths of the rolls at "
        "$0.75 each and gives the rest away. How many dollars does it take in 3 mornings?",
        """<code>
# Step 1: Count the rolls of one morning.
rolls_per_morning = 18 * 24
<end_of_step>
# Step 2: Five sixths of them are sold.
sold_per_morning = rolls_per_morning * 5 // 6
<end_of_step>
# Step 3: Money of one morning and of 3 mornings.
dollars_per_morning = sold_per_morning * 0.75
dollars = 3 * dollars_per_morning
<end_of_step>
# Now print the final answer
print(dollars)
<end_of_code>
<output>810.0<end_of_output>
<answer>The bakery takes $\\boxed{810}$ dollars in 3 mornings.<end_of_answer>""",
    ),
    (
        "Let $a$ and $b$ be the roots of $2x^2 - 7x + 4 = 0$. Find "
        "$\\frac{a}{b} + \\frac{b}{a}$ as a common fraction.",
        """<code>
# Step 1: Find both roots with sympy.
from sympy import symbols, solve, simplify, Rational

x = symbols("x")
a, b = solve(2 * x**2 - 7 * x + 4, x)
<end_of_step>
# Step 2: Add the two quotients and simplify.
total = simplify(a / b + b / a)
<end_of_step>
# Step 3: Check it with the sum 7/2 and the product 2 of the roots.
check = (Rational(7, 2) ** 2 - 2 * 2) / 2
assert simplify(total - check) == 0
<end_of_step>
# Now print the final answer
print(total)
<end_of_code>
<output>33/8<end_of_output>
<answer>The value is $\\boxed{\\frac{33}{8}}$.<end_of_answer>""",
    ),
)
"""Question and solution: one of the grade-school kind, one of the competition kind with sympy."""

BOOTSTRAP_INSTRUCTIONS = f"""\
You are a careful mathematician who does every calculation in Python. A solution has three parts:
code, output and answer.

1. Code: begin with {CODE}. Write a few short steps. Each step is a comment that says what is done
and why, then the Python that does it, and ends with {END_OF_STEP}. A step may use everything the
steps before it defined. The last step starts with the comment "Now print the final answer", prints
the result and ends with {END_OF_CODE} instead.
2. Output: {OUTPUT}what the code printed{END_OF_OUTPUT}. It is filled in for you; never write it.
3. Answer: {ANSWER}one sentence with the final answer in \\boxed{{}}{END_OF_ANSWER}. Put only the
answer itself into \\boxed{{}}, without units.

All reasoning stands in the comments. You may import math, sympy, scipy and numpy. Define names
before they are used, and mind types and syntax."""


def bootstrap_template(instructions: str, examples: Sequence[tuple[str, str]]) -> PromptTemplate:
    """The template of round 1 with a general base or instruct model: instructions and examples.

    The examples stand in the order given, so that all requests of a round share their prefix. Four
    stop strings: more a completions server may refuse.

    Args:
        examples: question and solution, in the trajectory grammar.
    """
    shown = "".join(f"Question: {question}\n{solution}\n\n" for question, solution in examples)
    return PromptTemplate(
        name="bootstrap",
        text=f"{instructions}\n\nThe following are {len(examples)} demonstration examples.\n\n"
        f"{shown}Now! It's your turn.\n\nQuestion: {{question}}\n",
        stop=(*STOP_STRINGS, NEXT_QUESTION),
        trained_as="rstar",
        repairs=True,
    )


BOOTSTRAP_TEMPLATE = bootstrap_template(BOOTSTRAP_INSTRUCTIONS, EXAMPLES)
"""With the examples that are shipped (the released bootstrap has the same parts)."""

TEMPLATES = {
    template.name: template for template in (RSTAR_TEMPLATE, SHORT_TEMPLATE, BOOTSTRAP_TEMPLATE)
}


def training_template(template: PromptTemplate) -> PromptTemplate:
    """The template under which what `template` found is trained and valued by a PPM."""
    return TEMPLATES[template.trained_as] if template.trained_as else template


def output_block(stdout: str) -> str:
    """The block the executor inserts after the last code step."""
    text = stdout.rstrip("\n")
    if len(text) > MAX_OUTPUT_CHARS:
        half = MAX_OUTPUT_CHARS // 2
        text = f"{text[:half]}...{text[-half:]}"
    for marker in MARKERS:
        text = text.replace(marker, "")
    return f"\n{OUTPUT}{text}{END_OF_OUTPUT}\n"


def render_question(question: str, template: PromptTemplate) -> str:
    """The prompt before any step. Markers inside the question are removed: they are not text."""
    for marker in MARKERS:
        question = question.replace(marker, "")
    return template.text.replace("{question}", question.strip())


def render_prompt(question: str, steps: Sequence[Step], template: PromptTemplate) -> str:
    """Question and the steps so far: what the policy continues and the PPM values."""
    return render_question(question, template) + render_steps(steps)


def render_steps(steps: Iterable[Step]) -> str:
    """What follows the question in a prompt."""
    return "".join(step.rendered for step in steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a rendered trajectory."""

    text: str
    trained: bool
    """True: written by the policy (loss applies); False: question or executor output."""


def render_segments(
    question: str, steps: Sequence[Step], template: PromptTemplate
) -> list[Segment]:
    """A whole trajectory, split by who wrote what; joined, it equals `render_prompt`."""
    segments = [Segment(text=render_question(question, template), trained=False)]
    for step in steps:
        segments.append(Segment(text=step.text, trained=True))
        rest = step.rendered[len(step.text) :]
        if rest:
            segments.append(Segment(text=rest, trained=False))
    return segments


def segments_of(prompt: str, continuation: str) -> tuple[Segment, ...]:
    """As `render_segments`, of what is rendered already: a prompt, and steps that follow it."""
    pieces = _OUTPUT_BLOCK.split(continuation)
    own = [Segment(text=piece, trained=n % 2 == 0) for n, piece in enumerate(pieces) if piece]
    return Segment(text=prompt, trained=False), *own


_OUTPUT_BLOCK = re.compile(f"(\n{OUTPUT}.*?{END_OF_OUTPUT}\n)", re.DOTALL)


def split_question(prompt: str, template: PromptTemplate) -> tuple[str, str]:
    """A rendered question, and what follows it in a prompt under a template.

    Raises:
        ValueError: the prompt was rendered under another template.
    """
    behind = template.text.partition("{question}")[2]
    question, found, rest = prompt.partition(behind)
    if not found:
        raise ValueError(f"no question under template {template.name!r}: {prompt[:60]!r}")
    return question + found, rest


def parse_step(text: str) -> Step:
    """Read a completion (its stop string still at its end) as a step; never raises.

    What names a marker is no answer: the policy has lost its way in the grammar.
    """
    marker = next((m for m in _KIND_OF_END if text.endswith(m)), None)
    if marker is None:
        return Step(kind=StepKind.UNFINISHED, text=text)
    kind = _KIND_OF_END[marker]
    if kind is not StepKind.ANSWER:
        return Step(kind=kind, text=text)
    sentence = text[: -len(marker)].split(ANSWER, 1)[-1]
    answer = extract_answer(sentence)
    if answer is not None and any(marker in answer for marker in MARKERS):
        answer = None
    return Step(kind=kind, text=text, answer=answer)


def read_completion(text: str, template: PromptTemplate, previous: Step | None) -> Step:
    """Read what a model wrote after `previous` (None: after the question) as a step; never raises.

    Under a template that repairs, the step's text may differ from the completion: it is what the
    fine-tuned policy is to learn.
    """
    return parse_step(_repaired(text, previous) if template.repairs else text)


def _repaired(text: str, previous: Step | None) -> str:
    """A completion of a model that only saw examples, put into the grammar where that is safe.

    Cut at the next question and at an output the model made up; closed where an answer is complete
    but for its marker; without Markdown fences; `<code>` where it belongs. What has no end after
    all that stays without one.
    """
    text = _FENCE.sub("", text.split(NEXT_QUESTION, 1)[0])
    made_up = text.find(OUTPUT)
    if made_up >= 0:
        text = _closed(text[:made_up], END_OF_CODE)
    code, answer, sentence = text.partition(ANSWER)
    only_answer_follows = previous is not None and previous.kind is StepKind.LAST_CODE
    if not answer and (only_answer_follows or text.endswith(END_OF_ANSWER)):
        code, answer, sentence = "", ANSWER, text
    if answer and code.replace(CODE, "").strip():
        text = _closed(code, END_OF_CODE)  # the answer is asked for again, after the output
    elif answer and extract_answer(sentence):
        return ANSWER + _closed(sentence, END_OF_ANSWER).lstrip("\n")
    elif answer or not text.strip():
        return text
    body = text.replace(CODE, "").lstrip("\n")
    return f"{CODE}\n{body}" if previous is None else f"\n{body}"


def _closed(text: str, marker: str) -> str:
    """`text` with `marker` at its end."""
    text = text.rstrip()
    for other in _KIND_OF_END:
        text = text.removesuffix(other)
    return text.rstrip() + ("\n" if marker == END_OF_CODE else "") + marker


_FENCE = re.compile(r"^[ \t]*```[A-Za-z0-9]*[ \t]*\n?", re.MULTILINE)


def parse_response(text: str) -> list[Step]:
    """Split a whole written solution (as in demonstrations) into steps, outputs attached.

    Raises:
        ValueError: the text does not follow the trajectory grammar.
    """
    steps: list[Step] = []
    rest = text
    while rest.strip():
        ends = [(rest.find(marker), marker) for marker in _KIND_OF_END if marker in rest]
        if not ends:
            raise ValueError(f"solution ends without a step marker: {rest[-60:]!r}")
        at, marker = min(ends)
        cut = at + len(marker)
        step = parse_step(rest[:cut])
        rest = rest[cut:]
        if step.kind is StepKind.LAST_CODE:
            opening = f"\n{OUTPUT}"
            closing = f"{END_OF_OUTPUT}\n"
            if not rest.startswith(opening) or closing not in rest:
                raise ValueError(f"no output block after {END_OF_CODE}: {rest[:60]!r}")
            stop = rest.index(closing)
            output = rest[len(opening) : stop]
            rest = rest[stop + len(closing) :]
            step = Step(kind=step.kind, text=step.text, output=output)
        steps.append(step)
    if not steps or steps[-1].kind is not StepKind.ANSWER:
        raise ValueError("solution has no final answer step")
    return steps
