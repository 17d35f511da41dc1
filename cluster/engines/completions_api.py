"""What is said to an OpenAI-compatible completions endpoint, and how its answers are read: plain
functions over plain data.

    GenerationRequest --request_body--> server --> JSON -----read_reply----> CompletionsReply
                                          +------> events ---StreamReader--> CompletionsReply
                                          +------> an error --judge_error--> ErrorKind

The search needs every completion with the stop string it ended on. The standard API removes that
string and does not say which one it was, nor whether there was one: `finish_reason` is "stop" for
the end of the sequence too. Nothing in the text tells `<end_of_step>` from `<end_of_code>`, so
nothing is guessed. There are two ways to know:

- "vllm": the server reports it in `stop_reason` (a string, or null for the end of the sequence).
  All stop strings are sent, the reported one is put back.
- "openai": a server that does not say is sent *no* stop strings. It streams, the text is cut here
  behind the first stop string, and the stream is closed as soon as every candidate has ended, at
  which a server stops generating. Exact on any server and for any number of stop strings; the
  price is what candidates that have ended run on for until the slowest of the request ends, and
  that closed streams bring no usage (see below). More stop strings than a server takes (4, vLLM
  included) are handled so in either dialect.

Token counts. Where the server reports only the sum over the candidates of a request, which is the
rule, the sum is split by the lengths of their texts; with log-probabilities each is counted. vLLM
counts while it streams. A stream of any other server that was closed early has no usage: its
chunks are counted as if each were one token, which is a lower bound (a busy server puts several
into one), log-probabilities make it exact, and the prompt is estimated by the caller from its
length; the reply says so (`estimated`).

Not covered: chat endpoints. A step is continued in the middle of a text, which a chat template
does not allow; servers that chat have a completions endpoint too, or cannot be used here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from cluster.engines.config import Dialect, EndpointConfig
from rollout.engine import Completion, FinishReason, GenerationRequest, cut_completion

_FINISH = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "eos_token": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    # A text that was cut off is not a step; the search discards it as unfinished.
    "content_filter": FinishReason.LENGTH,
}

MAX_STOP_STRINGS = 4
"""In one request, by the standard API; vLLM 0.32 refuses more as well."""

_VLLM_BODY: dict[str, Any] = {
    # Markers of a fine-tuned policy are special tokens, and are text to the search.
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    # Else the server takes these from the model's generation_config.json.
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class BadReplyError(ValueError):
    """A server answered with something that is no completion; the message says what."""


class DialectError(BadReplyError):
    """A server does not speak the dialect it was configured for: asking again will not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsReply:
    """The answer to one HTTP request."""

    completions: tuple[Completion, ...]
    prompt_tokens: int | None = None
    """None: the server never said."""
    generated_tokens: int = 0
    """All that were generated, those behind the end of a completion included."""
    cached_tokens: int = 0
    estimated: bool = False
    """True: the server told no usage; `generated_tokens` is counted here."""


def request_body(
    request: GenerationRequest,
    config: EndpointConfig,
    *,
    n: int,
    max_tokens: int,
    seed: int | None = None,
    logprobs: bool = False,
) -> dict[str, Any]:
    """The JSON of one HTTP request for `n` of the candidates.

    A further key of the config that is null removes one that would be sent otherwise.
    """
    dialect = config.dialect
    body: dict[str, Any] = {
        "model": config.model,
        "prompt": request.prompt,
        "n": n,
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": seed,
        "stream": False,
    }
    if dialect == "vllm":
        body |= _VLLM_BODY
    if logprobs:
        # Some servers take 0 for "none"; 1 brings the generated token's as well.
        body["logprobs"] = 0 if dialect == "vllm" else 1
    if dialect == "vllm" and len(request.stop) <= MAX_STOP_STRINGS:
        body["stop"] = list(request.stop) or None
    elif request.stop:
        usage = {"include_usage": True}
        if dialect == "vllm":
            usage["continuous_usage_stats"] = True
        body |= {"stream": True, "stream_options": usage}
    body |= config.extra_body
    return {name: value for name, value in body.items() if value is not None}


def split_candidates(num_candidates: int, max_n: int) -> list[tuple[int, int]]:
    """(candidates before it, candidates in it) of each HTTP request, as even as possible."""
    parts = math.ceil(num_candidates / max_n)
    small, larger = divmod(num_candidates, parts)
    sizes = [small + (part < larger) for part in range(parts)]
    return [(sum(sizes[:part]), size) for part, size in enumerate(sizes)]


def split_tokens(total: int, weights: Sequence[int]) -> list[int]:
    """Whole shares of `total`, proportional to `weights`, that sum to it (largest remainder)."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_rest[: total - sum(shares)]:
        shares[i] += 1
    return shares


# --- Answers in one piece ---------------------------------------------------------------------


def read_reply(
    data: Any, *, n: int, stop: Sequence[str], dialect: Dialect, logprobs: bool
) -> CompletionsReply:
    """Read the JSON of an answer in one piece.

    Raises:
        DialectError: fewer choices than asked for, or they do not say which stop string ended them.
        BadReplyError: it is no completion.
    """
    choices = _choices(data)
    if len(choices) != n:
        raise DialectError(_fewer(n, len(choices)))
    usage = _Usage.of(data)
    texts = [_text(choice) for choice in choices]
    sums = [_logprobs(choice) for choice in choices]
    counted = [len(values) for values in sums]
    if not all(counted):
        total = usage.completion if usage else sum(math.ceil(len(text) / 3.5) for text in texts)
        # One more each: the token that ended it left no text.
        counted = split_tokens(total, [len(text) + 1 for text in texts])
    completions = []
    for choice, text, num_tokens, values in zip(choices, texts, counted, sums, strict=True):
        finish = _finish(choice.get("finish_reason"))
        if dialect == "vllm":
            text += _reported_stop(choice, stop)
        completions.append(
            cut_completion(
                text,
                stop=stop,
                stopped=finish is FinishReason.STOP,
                end_of_sequence="",
                num_tokens=num_tokens,
                logprob=_add(0.0, values) if logprobs else None,
            )
        )
    return CompletionsReply(
        completions=tuple(completions),
        prompt_tokens=usage.prompt if usage else None,
        generated_tokens=usage.completion if usage else sum(counted),
        cached_tokens=usage.cached if usage else 0,
        estimated=usage is None,
    )


def _reported_stop(choice: Mapping[str, Any], stop: Sequence[str]) -> str:
    if "stop_reason" not in choice:
        raise DialectError(
            "the server is no vLLM, it does not say which stop string ended a completion (no "
            "stop_reason): set endpoint.dialect to openai"
        )
    # A number is a stop token of the model, null the end of the sequence: neither is text.
    reported = choice["stop_reason"]
    return reported if reported in stop else ""


# --- Answers in a stream ----------------------------------------------------------------------


@dataclass(slots=True)
class _Partial:
    """One candidate so far."""

    text: str = ""
    num_tokens: int = 0
    received: int = 0
    """Tokens, those behind its end included."""
    logprob: float | None = 0.0
    finish: FinishReason | None = None
    stop_string: str | None = None


@dataclass(slots=True)
class StreamReader:
    """Puts the events of a stream together and cuts every candidate at its first stop string."""

    n: int
    stop: Sequence[str]
    logprobs: bool = False
    dialect: Dialect = "openai"
    _partials: list[_Partial] = field(init=False)
    _seen: set[int] = field(init=False, default_factory=set)
    _running: set[int] = field(init=False)
    _usage: _Usage | None = field(init=False, default=None)
    _prompt_tokens: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._partials = [_Partial() for _ in range(self.n)]
        self._running = set(range(self.n))

    @property
    def ended(self) -> bool:
        """Nothing that may still come is needed.

        Every candidate has ended; where the server ended them all by itself, its usage is awaited.
        """
        if any(partial.finish is None for partial in self._partials):
            return False
        return bool(self._running) or self._usage is not None

    def feed(self, event: Any) -> None:
        """Take one event.

        Raises:
            BadReplyError: it is no part of a completion.
        """
        choices = _choices(event)
        usage = _Usage.of(event)
        counted = None
        if usage is not None and choices and self.dialect == "vllm":
            # Of this candidate, so far; the one without a candidate, at the end, is of all.
            counted = usage.completion
            self._prompt_tokens = usage.prompt
        else:
            self._usage = usage or self._usage
        for choice in choices:
            index = choice.get("index", 0)
            if not isinstance(index, int) or not 0 <= index < self.n:
                raise BadReplyError(f"candidate {index!r} of {self.n} in a stream")
            self._seen.add(index)
            self._take(self._partials[index], choice, counted)
            if choice.get("finish_reason") is not None:
                self._running.discard(index)

    def _take(self, partial: _Partial, choice: Mapping[str, Any], counted: int | None) -> None:
        """Add a piece.

        Args:
            counted: tokens of the candidate so far; None: the server does not say.
        """
        text = _text(choice)
        logprobs = _logprobs(choice)
        if counted is None:
            counted = partial.received + (len(logprobs) or bool(text))
        partial.received = counted
        if partial.finish is not None:
            return
        longest = max(map(len, self.stop), default=0)
        before = len(partial.text)
        seen = max(0, before - longest)
        partial.text += text
        ends = [
            (at + len(marker), marker)
            for marker in self.stop
            if (at := partial.text.find(marker, seen)) >= 0
        ]
        if ends:
            end, partial.stop_string = min(ends)
            partial.text = partial.text[:end]
            partial.finish = FinishReason.STOP
            behind = len(logprobs) - _tokens_up_to(choice, text, end - before)
            if behind:
                logprobs = logprobs[:-behind]
                counted -= behind
        elif choice.get("finish_reason") is not None:
            partial.finish = _finish(choice["finish_reason"])
        partial.num_tokens = counted
        if text or logprobs:
            partial.logprob = _add(partial.logprob, logprobs)

    def reply(self) -> CompletionsReply:
        """What was read.

        Raises:
            DialectError: there are fewer candidates than asked for.
            BadReplyError: some candidate has not ended.
        """
        if self._seen and len(self._seen) < self.n:
            raise DialectError(_fewer(self.n, len(self._seen)))
        completions = []
        for partial in self._partials:
            if partial.finish is None:
                raise BadReplyError("the stream ended before its completions did")
            completions.append(
                Completion(
                    text=partial.text,
                    finish=partial.finish,
                    stop_string=partial.stop_string,
                    num_tokens=partial.num_tokens,
                    logprob=partial.logprob if self.logprobs else None,
                )
            )
        usage = self._usage
        received = sum(partial.received for partial in self._partials)
        return CompletionsReply(
            completions=tuple(completions),
            prompt_tokens=usage.prompt if usage else self._prompt_tokens,
            generated_tokens=usage.completion if usage else received,
            cached_tokens=usage.cached if usage else 0,
            estimated=usage is None and self._prompt_tokens is None,
        )


# --- Errors -----------------------------------------------------------------------------------


class ErrorKind(StrEnum):
    """What an answer other than 200 asks for."""

    RETRY = "retry"
    """The server is busy or broken: the same request may pass later."""
    TOO_LONG = "too_long"
    """Prompt and completion do not fit into the model's context."""
    REFUSED = "refused"
    """This request is not taken."""
    FATAL = "fatal"
    """No request will be taken: wrong key, address or model, or nothing left to pay with."""


_TOO_LONG = re.compile(
    r"context.{0,3}length|context window|maximum model length|max_model_len"
    r"|max_new_tokens`? must be|too many tokens|prompt is too long",
    re.IGNORECASE,
)
_LIMIT = re.compile(
    r"(?:maximum context length (?:is|of)|context length \(|max_model_len=|maximum model length of"
    r"|must be <=)\s*(\d+)"
)
_PROMPT = re.compile(
    r"(\d+) (?:in (?:your|the) (?:prompt|messages)|input tokens|tokens from the input"
    r"|`inputs` tokens)|(?:prompt|input) \((?:length )?(\d+)"
)


def judge_error(status: int, text: str) -> ErrorKind:
    """What to do after an answer with an error status and this body."""
    if status in (400, 413, 422) and _TOO_LONG.search(text):
        return ErrorKind.TOO_LONG
    if status in (401, 402, 403, 404, 405, 501) or 300 <= status < 400:
        return ErrorKind.FATAL
    if status == 429 and "insufficient_quota" in text:
        return ErrorKind.FATAL
    if status in (408, 409, 425, 429) or status >= 500:
        return ErrorKind.RETRY
    return ErrorKind.REFUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a server that refused a request for its length says of it."""

    max_tokens: int
    """To ask for next; 0: the prompt alone is too long."""
    prompt_tokens: int | None
    """None: it does not say."""


def room_left(text: str, max_tokens: int) -> Room:
    """How many tokens may be asked for, from the message of a server that refused `max_tokens`.

    Read from the numbers in it; where they do not tell, a quarter of `max_tokens`, and nothing
    below 16.
    """
    limit, prompt = _LIMIT.search(text), _PROMPT.search(text)
    if prompt is not None:
        prompt_tokens = int(prompt.group(1) or prompt.group(2))
        if limit is not None:
            room = int(limit.group(1)) - prompt_tokens
            # Not fewer than before: then something else is too long.
            room = room if 0 < room < max_tokens else 0
            return Room(max_tokens=room, prompt_tokens=prompt_tokens)
        return Room(max_tokens=0, prompt_tokens=prompt_tokens)
    if limit is not None and int(limit.group(1)) < max_tokens:
        return Room(max_tokens=int(limit.group(1)), prompt_tokens=None)
    return Room(max_tokens=max_tokens // 4 if max_tokens >= 64 else 0, prompt_tokens=None)


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Seconds to wait as a Retry-After header says; None: there is none that can be read.

    Args:
        value: seconds, or a date.
        now_s: wall-clock time, seconds since 1970.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now_s
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# --- Pieces of an answer ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usage:
    prompt: int
    completion: int
    cached: int

    @classmethod
    def of(cls, data: Any) -> _Usage | None:
        """The usage an answer reports; None if it does not."""
        usage = data.get("usage") if isinstance(data, dict) else None
        if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
            return None
        details = usage.get("prompt_tokens_details") or {}
        return cls(
            prompt=usage["prompt_tokens"],
            completion=int(usage.get("completion_tokens") or 0),
            cached=int(details.get("cached_tokens") or 0) if isinstance(details, dict) else 0,
        )


def _choices(data: Any) -> list[dict[str, Any]]:
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise BadReplyError(f"no completion: {str(data)[:200]}")
    return sorted(choices, key=lambda choice: choice.get("index") or 0)


def _fewer(asked: int, got: int) -> str:
    return f"asked for n={asked} completions, got {got}: lower endpoint.max_n"


def _text(choice: Mapping[str, Any]) -> str:
    text = choice.get("text")
    if text is None and "finish_reason" in choice:
        return ""
    if not isinstance(text, str):
        raise BadReplyError(f"a choice without text: {str(choice)[:200]}")
    return text


def _finish(reason: Any) -> FinishReason:
    if reason not in _FINISH:
        raise BadReplyError(f"a completion ended by {reason!r}")
    return _FINISH[reason]


def _logprobs(choice: Mapping[str, Any]) -> list[Any]:
    """The log-probability of each token; [] if there are none."""
    found = choice.get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    return values if isinstance(values, list) else []


def _add(total: float | None, values: Sequence[Any]) -> float | None:
    """The sum; None if a number is missing, or no token has one."""
    known = values and all(isinstance(value, (int, float)) for value in values)
    return total + float(sum(values)) if known and total is not None else None


def _tokens_up_to(choice: Mapping[str, Any], text: str, end: int) -> int:
    """How many tokens of a piece of a stream make up its first `end` characters.

    All of them where their texts do not add up to its text, as with halves of a character.
    """
    tokens = (choice.get("logprobs") or {}).get("tokens")
    if not isinstance(tokens, list) or "".join(map(str, tokens)) != text:
        return len(_logprobs(choice))
    length = 0
    for number, token in enumerate(tokens, start=1):
        length += len(token)
        if length >= end:
            return number
    return len(tokens)
