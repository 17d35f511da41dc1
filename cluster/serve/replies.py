"""Answers in the form of the OpenAI API, from what a search found.

    SolveResult(s) --completion--> one object          message: reasoning_content, content
    Event          --Thinking----> text to add         what `rstar solve` prints, step by step
    SolveResult    --chunks------> the end of a stream

The content is one solution: its code, what that printed when it was run, and the answer. `usage`
counts the whole search, not only what is shown; `rstar` says what the API has no word for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.runs.solve import PathLog, printable
from cluster.serve.api import Asked
from rollout.methods import Ending, Event, SolveResult
from rollout.prompt import MARKERS, StepKind
from verifier import extract_answer

CUT_SHORT = (Ending.TIME, Ending.TOKENS, Ending.TOO_LONG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one choice."""

    result: SolveResult
    thinking: str
    """What was told while it went on."""
    tree: str | None
    """Address of the page of its search; None: there is no tree, or none is kept."""


@dataclass(slots=True)
class Thinking:
    """Turns events into text that is only ever added; see `PathLog`."""

    text: str = ""
    _log: PathLog = field(default_factory=PathLog)

    def more(self, event: Event) -> str:
        """What there is to add; "" if nothing."""
        lines = self._log.lines(event)
        added = "".join(f"{line}\n" for line in lines)
        self.text += added
        return added


def content_of(result: SolveResult, stop: Sequence[str] = ()) -> str:
    """The chosen solution as Markdown, its answer in a box.

    Args:
        stop: texts before the first of which it ends.
    """
    if result.chosen is None:
        said = f"No answer was found: {'; '.join(result.notes)}."
        return _until(said, stop)
    parts = []
    code: list[str] = []
    said = ""
    for step in result.chosen.steps:
        if step.kind is StepKind.ANSWER:
            said = step.body
            continue
        code.append(step.code)
        if step.output is not None:
            parts.append(_fenced("python", "\n".join(code)))
            parts.append(_fenced("output", step.output))
            code = []
    if code:
        parts.append(_fenced("python", "\n".join(code)))
    for marker in MARKERS:
        said = said.replace(marker, "")
    said = printable(said.strip())
    if extract_answer(said) != result.answer:
        said = f"{said}\n\n\\boxed{{{printable(result.answer or '')}}}".strip()
    return _until("\n\n".join([*parts, said]), stop)


def _fenced(language: str, text: str) -> str:
    """A code block that nothing in the text can end."""
    text = printable(text).strip("\n")
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _until(text: str, stop: Sequence[str]) -> str:
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(ends)] if ends else text


def finish_reason(result: SolveResult) -> str:
    """length: a limit came before any answer."""
    return "length" if result.chosen is None and result.ended in CUT_SHORT else "stop"


def usage_of(results: Sequence[SolveResult]) -> dict[str, Any]:
    """Tokens of all searches of a request, in the API's form, and those the PPM read."""
    costs = [result.cost for result in results]
    prompt = sum(cost.prompt_tokens for cost in costs)
    generated = sum(cost.generated_tokens for cost in costs)
    shown = sum(result.chosen.num_tokens for result in results if result.chosen is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(cost.cached_tokens for cost in costs)},
        "completion_tokens_details": {"reasoning_tokens": max(generated - shown, 0)},
        "scored_tokens": sum(cost.scored_tokens for cost in costs),
    }


def facts_of(asked: Asked, answer: Answer) -> dict[str, Any]:
    """What the API has no word for."""
    result = answer.result
    return {
        "answer": result.answer,
        "value": result.value,
        "answers": [
            {
                "answer": ranked.answer,
                "votes": ranked.votes,
                "value": result.value_of(ranked),
                "solutions": len(ranked.members),
            }
            for ranked in result.ranked
        ],
        "method": result.method.value,
        "num_rollouts": result.num_rollouts,
        "num_solutions": len(result.solutions),
        "ended": result.ended.value,
        "seconds": round(result.cost.seconds, 3),
        "policy": result.policy_version,
        "ppm": result.preference_version or None,
        "tree": answer.tree,
        "notes": [*asked.notes, *result.notes],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One request's answer, whole or in pieces."""

    asked: Asked
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Everything in one object."""
        choices = []
        for index, answer in enumerate(answers):
            content = content_of(answer.result, self.asked.stop)
            if self.asked.chat:
                message = {
                    "role": "assistant",
                    "content": content,
                    "reasoning_content": answer.thinking,
                    "refusal": None,
                }
                said: dict[str, Any] = {"message": message}
            else:
                said = {"text": content, "reasoning_content": answer.thinking}
            reason = finish_reason(answer.result)
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return self._object(False, answers[0].result) | {
            "choices": choices,
            "usage": usage_of([answer.result for answer in answers]),
            "rstar": facts_of(self.asked, answers[0]),
            **(
                {"rstar_choices": [facts_of(self.asked, answer) for answer in answers]}
                if len(answers) > 1
                else {}
            ),
        }

    def first(self, index: int) -> dict[str, Any]:
        """The chunk a choice begins with."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def thought(self, index: int, text: str) -> dict[str, Any]:
        """A chunk of thinking."""
        return self._chunk(index, {"reasoning_content": text})

    def last(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """The chunks a choice ends with: its content, then why it ended and what was found."""
        content = content_of(answer.result, self.asked.stop)
        end = self._chunk(index, {}, finish_reason(answer.result), answer.result)
        return [
            self._chunk(index, {"content": content}, None, answer.result),
            end | {"rstar": facts_of(self.asked, answer)},
        ]

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk that a stream ends with, if that was asked for."""
        results = [answer.result for answer in answers]
        return self._object(True, results[0]) | {"choices": [], "usage": usage_of(results)}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        result: SolveResult | None = None,
    ) -> dict[str, Any]:
        if self.asked.chat:
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": delta.get("content", "")}
            if "reasoning_content" in delta:
                said["reasoning_content"] = delta["reasoning_content"]
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        return self._object(True, result) | {"choices": [choice]}

    def _object(self, stream: bool, result: SolveResult | None) -> dict[str, Any]:
        name = "text_completion"
        if self.asked.chat:
            name = "chat.completion.chunk" if stream else "chat.completion"
        versions = (result.policy_version, result.preference_version) if result is not None else ()
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": "/".join(filter(None, versions)) or None,
        }
