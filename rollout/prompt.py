"""Problem + steps <-> text: the only place that writes prompts and reads completions.

One trajectory reads (arXiv 2501.04519 section 3.2; markers as in the released data):

    <code> step <end_of_step> step <end_of_step> ... last step <end_of_code>
    <output>captured stdout<end_of_output>          inserted by the executor, never by the model
    <answer>one sentence with \\boxed{...}<end_of_answer>

Steps are joined by nothing (their own newlines belong to them). The same renderer serves training,
search and PPM scoring, so that the three never differ by a blank line; the released code trains on
one newline before the assistant marker and samples with two.

Not covered: chat templates of instruct models, which evaluation of foreign models needs.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One move: a thought and its code, or the final answer sentence."""

    kind: StepKind
    text: str
    """As it stands in the trajectory, end marker included, output block excluded."""
    code: str = ""
    """Python to execute; "" for an answer."""
    output: str | None = None
    """Stdout the executor inserts after a LAST_CODE step; None before execution or otherwise."""
    answer: str | None = None
    """What an ANSWER step says; None otherwise or if it cannot be read."""

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

TEMPLATES = {template.name: template for template in (RSTAR_TEMPLATE, SHORT_TEMPLATE)}


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
    return render_question(question, template) + "".join(step.rendered for step in steps)


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


def parse_step(text: str) -> Step:
    """Read a completion (its stop string still at its end) as a step; never raises."""
    marker = next((m for m in _KIND_OF_END if text.endswith(m)), None)
    if marker is None:
        return Step(kind=StepKind.UNFINISHED, text=text)
    kind = _KIND_OF_END[marker]
    body = text[: -len(marker)]
    if kind is StepKind.ANSWER:
        sentence = body.split(ANSWER, 1)[-1]
        return Step(kind=kind, text=text, answer=extract_answer(sentence))
    return Step(kind=kind, text=text, code=body.replace(CODE, "").strip("\n"))


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
            step = Step(kind=step.kind, text=step.text, code=step.code, output=output)
        steps.append(step)
    if not steps or steps[-1].kind is not StepKind.ANSWER:
        raise ValueError("solution has no final answer step")
    return steps
