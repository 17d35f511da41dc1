"""The two models as the search sees them: records, Protocols and how their output is read.

    search --GenerationRequest--> PolicyEngine.generate      --GenerationReply--> n completions
    search --EvaluationRequest--> PreferenceEngine.evaluate  --EvaluationReply--> one value each

One generation request carries all candidates of an expansion (they share the prefill), one
evaluation request all texts of an expansion. `routing_key` is equal for all requests of one tree,
so that a pool can send them to the replica that holds their prefix in its cache: it is the
problem's id.

An engine raises `EngineError` when the *engine* failed (the caller may retry elsewhere). What the
model did, including a prompt that does not fit, is a value in the reply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from rollout.prompt import Segment


class EngineError(RuntimeError):
    """An engine could not answer a request: it died, timed out or refused."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """A stop string or the end-of-sequence token was generated."""
    LENGTH = "length"
    """`max_tokens` or the model's context was reached."""
    REPETITION = "repetition"
    """The engine saw it repeat itself and ended it."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The prompt left no room to generate; the completion is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Ask a policy for `num_candidates` continuations of one prompt."""

    prompt: str
    num_candidates: int
    max_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """None: the engine draws its own."""
    routing_key: str = ""

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates must be >= 1, got {self.num_candidates}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One continuation, with the stop string it ended on still at its end."""

    text: str
    finish: FinishReason
    stop_string: str | None = None
    """The matched stop string; None for end-of-sequence or length."""
    num_tokens: int = 0
    logprob: float | None = None
    """Sum of the log-probabilities of the generated tokens; None: not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReply:
    """`num_candidates` completions in the engine's order."""

    completions: tuple[Completion, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens served from the prefix cache."""
    policy_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """Ask the process preference model for the value of each partial solution text."""

    texts: tuple[str, ...]
    routing_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReply:
    """One value in [-1, 1] for each text, same order; NaN where the model gave none."""

    values: tuple[float, ...]
    num_tokens: int = 0
    preference_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRequest:
    """Ask a policy how likely it is to write what is `trained` in each text."""

    texts: tuple[tuple[Segment, ...], ...]
    """The segments of each, in order."""
    routing_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobReply:
    """Of each text, same order, the sum of the log-probabilities of the tokens that are `trained`;
    NaN where it is longer than the model's context."""

    values: tuple[float, ...]
    policy_version: str = ""


def cut_completion(
    text: str,
    *,
    stop: Sequence[str],
    stopped: bool,
    end_of_sequence: str,
    num_tokens: int,
    logprob: float | None,
) -> Completion:
    """A completion from what an engine produced, cut behind the earliest stop string in it.

    Args:
        text: special tokens and stop strings included.
        stopped: the engine ended it at a stop or the end of the sequence, not at its length.
        end_of_sequence: text of the last token, removed where it, and no stop string, ended the
            completion.
    """
    ends = [
        (text.find(stop_string) + len(stop_string), stop_string)
        for stop_string in stop
        if stop_string in text
    ]
    marker = None
    if ends:
        end, marker = min(ends)
        text, stopped = text[:end], True
    elif stopped:
        text = text.removesuffix(end_of_sequence)
    return Completion(
        text=text,
        finish=FinishReason.STOP if stopped else FinishReason.LENGTH,
        stop_string=marker,
        num_tokens=num_tokens,
        logprob=logprob,
    )


def values_of(request: EvaluationRequest, reply: EvaluationReply) -> list[float | None]:
    """The value of each text of a request, within [-1, 1]; None where the model gave none.

    Raises:
        EngineError: the reply has fewer or more values than there were texts.
    """
    if len(reply.values) != len(request.texts):
        raise EngineError(
            f"the preference model returned {len(reply.values)} values for {len(request.texts)} "
            f"texts, problem {request.routing_key}"
        )
    return [min(1.0, max(-1.0, v)) if math.isfinite(v) else None for v in reply.values]


class PolicyEngine(Protocol):
    """A policy, wherever it runs."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """Sample continuations of `request.prompt`.

        Raises:
            EngineError: the engine failed; the same request may be sent to another one.
        """
        ...


class PreferenceEngine(Protocol):
    """A process preference model, wherever it runs."""

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        """Value each text.

        Raises:
            EngineError: the engine failed; the same request may be sent to another one.
        """
        ...
