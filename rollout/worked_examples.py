"""Instructions and worked examples of one's own for the bootstrap round.

    instructions: |            # optional; what is shipped stays otherwise
      You solve school problems with short Python steps ...
    examples:
      - name: bakery           # optional, for messages
        question: A bakery bakes ...
        solution: |            # in the trajectory grammar, output block and boxed answer included
          <code>
          ...
        answer: 810

A model imitates its examples, mistakes and all, so each is run and graded before it is shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rollout.prompt import (
    ANSWER,
    BOOTSTRAP_INSTRUCTIONS,
    CODE,
    END_OF_CODE,
    END_OF_STEP,
    EXAMPLES,
    PromptTemplate,
    StepKind,
    bootstrap_template,
    output_block,
    parse_response,
)
from verifier import Sandbox, SandboxLimits, verify_answer
from verifier.sandbox import Isolation


class ExampleError(ValueError):
    """A worked example is wrong; the message names it and says what is wrong."""


class WorkedExample(BaseModel):
    """A question and a solution that a model is to imitate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("", description="for messages; by default its number")
    question: str = Field(min_length=1, description="as a problem's text")
    solution: str = Field(
        min_length=1, description="code steps, output block and answer, in the trajectory grammar"
    )
    answer: str = Field(min_length=1, description="what the boxed answer is graded against")

    @field_validator("answer", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value


SHIPPED = tuple(
    WorkedExample(question=question, solution=solution, answer=answer)
    for (question, solution), answer in zip(EXAMPLES, ("810", "33/8"), strict=True)
)
"""One of the grade-school kind, one of the competition kind with sympy."""


class WorkedExamples(BaseModel):
    """What a model that was never fine-tuned is shown before the question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instructions: str | None = Field(
        None, description="before the examples; null: those that are shipped"
    )
    examples: tuple[WorkedExample, ...] | None = Field(
        None, min_length=1, description="in the order shown; null: those that are shipped"
    )
    chat: bool = Field(
        False,
        description="for instruct models: the same as turns of a conversation, by the chat "
        "template of the policy's tokenizer; solutions go on inside the assistant's turn",
    )
    text: str | None = Field(
        None,
        description="the whole prompt instead, with {question} in it; null: made of the above",
    )

    @field_validator("text")
    @classmethod
    def _asks(cls, value: str | None) -> str | None:
        if value is not None and "{question}" not in value:
            raise ValueError("must contain {question}")
        return value

    def template(self) -> PromptTemplate:
        """The prompt template that shows them."""
        shown = [(each.question.strip(), each.solution.strip()) for each in self.shown]
        made = bootstrap_template(self._instructions, shown)
        return made if self.text is None else replace(made, text=self.text)

    def turns(self) -> list[dict[str, str]]:
        """The same as a conversation whose next turn is the solution of {question}."""
        turns = []
        for each in self.shown:
            turns.append({"role": "user", "content": f"Question: {each.question.strip()}"})
            turns.append({"role": "assistant", "content": each.solution.strip()})
        turns.append({"role": "user", "content": "Question: {question}"})
        # Not every chat template has a place for a system's turn.
        turns[0]["content"] = f"{self._instructions}\n\n{turns[0]['content']}"
        return turns

    @property
    def shown(self) -> tuple[WorkedExample, ...]:
        """The examples."""
        return self.examples or SHIPPED

    @property
    def _instructions(self) -> str:
        return (self.instructions or BOOTSTRAP_INSTRUCTIONS).strip()


def check_examples(
    shown: WorkedExamples, limits: SandboxLimits, isolation: Isolation = "best_effort"
) -> None:
    """Run the steps of every example and grade its answer.

    Raises:
        ExampleError: one is not in the grammar, fails, prints something else than its output block
            says, or comes to another answer.
        SandboxError: nothing can be run here.
    """
    texts = [text for each in shown.shown for text in (each.question, each.solution)]
    if any("{question}" in text for text in (shown.instructions or "", *texts)):
        raise ExampleError("instructions and examples must not contain {question}")
    with Sandbox(limits, isolation) as sandbox:
        for number, example in enumerate(shown.shown, start=1):
            where = f"example {example.name or number}"
            try:
                steps = parse_response(example.solution.strip())
            except ValueError as error:
                raise ExampleError(f"{where}: {error}") from error
            kinds = [step.kind for step in steps]
            wanted = [*[StepKind.CODE] * (len(steps) - 2), StepKind.LAST_CODE, StepKind.ANSWER]
            opens = steps[0].text.startswith(CODE) and steps[-1].text.startswith(ANSWER)
            if kinds != wanted or not opens:
                raise ExampleError(
                    f"{where}: expected {CODE}, steps that end in {END_OF_STEP}, the last in "
                    f"{END_OF_CODE}, its output block, then {ANSWER}"
                )
            state = sandbox.open(where)
            for step in steps[:-1]:
                (result,) = sandbox.run(state, [step.code])
                if not result.ok:
                    raise ExampleError(
                        f"{where}: {result.error_type}: {result.error_message} in {step.code!r}"
                    )
                written = output_block(step.output) if step.output is not None else ""
                if step.kind is StepKind.LAST_CODE and output_block(result.stdout) != written:
                    raise ExampleError(
                        f"{where}: its code prints {result.stdout.strip()!r}, its output block "
                        f"says {(step.output or '').strip()!r}"
                    )
                if result.state is not None:
                    state = result.state
            sandbox.close(where)
            said = steps[-1].answer or ""
            if not verify_answer(example.answer, said).equal:
                raise ExampleError(
                    f"{where}: its boxed answer is {said!r}, its answer {example.answer!r}"
                )
