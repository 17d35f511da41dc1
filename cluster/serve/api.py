"""What a client asks for, in the form of the OpenAI API, and what is wrong with it.

    JSON body --read_chat / read_completion--> Asked: searches to run, and how to answer
                                     `-------> ApiError: status and the API's own error object

The last user message is the problem. Earlier messages are not read, because the models were trained
on single problems; the answer says so (`Asked.notes`). The method and its budget stand in the
model's name, `rstar-mcts-16`, or in fields of their own (`method`, `trajectories`,
`max_generated_tokens`, `timeout_s`; in the Python client `extra_body`).

A parameter that would change the answer elsewhere and cannot here is refused by name, never
ignored; values that change nothing (a penalty of 0) are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cluster.runs.solve import asked_problem
from cluster.serve.config import ServeConfig
from cluster.serve.service import Ask
from rollout.methods import Method, MethodConfig
from rollout.search import SearchConfig
from rollout.seeds import derive_seed

LISTED = ((Method.MCTS, 16), (Method.MCTS, 64), (Method.BEST_OF_N, 32), (Method.BEAM, 8))
LISTED_WITHOUT_PPM = ((Method.MCTS, 16), (Method.MAJORITY, 8), (Method.MAJORITY, 32))
"""In `/v1/models`, beside the default and greedy; any other number works as well."""

MAX_STOPS = 4

_MODEL = re.compile(rf"rstar-({'|'.join(Method)})(?:-(\d{{1,6}}))?")

_CHANGES_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Parameters of the API that are not supported, with the values that ask for nothing."""

_UNSUPPORTED = (
    *("audio", "modalities", "prediction", "reasoning_effort", "top_logprobs", "verbosity"),
    *("web_search_options", "min_p", "top_k", "repetition_penalty", "guided_json"),
)
"""Known elsewhere and refused with whatever value."""


class ApiError(Exception):
    """A request that is not answered; holds the API's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def outcome(self) -> str:
        """As it is counted, of an error that is the server's."""
        return "refused" if self.status in (429, 503) else "failed"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a truth value")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_no_bool)]


class StreamOptions(BaseModel):
    """How a stream is answered."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class _Request(BaseModel):
    """What both forms have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Count = 1
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_no_bool)] | None = None
    stop: str | list[str] | None = None
    user: Annotated[str, Field(max_length=256)] = ""

    method: str | None = None
    trajectories: Count | None = None
    max_generated_tokens: Count | None = None
    timeout_s: Annotated[Number, Field(gt=0)] | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Count | None = None


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request that can be answered."""

    model: str
    chat: bool
    asks: tuple[Ask, ...]
    """One for each choice."""
    user: str
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    """Texts before which the content of the answer ends."""
    notes: tuple[str, ...]
    """What of the request was not used."""

    @property
    def method(self) -> str:
        return self.asks[0].method.name.value


def read_request(body: bytes, config: ServeConfig, *, chat: bool) -> Asked:
    """Understand the body of a request.

    Args:
        chat: it came to `/v1/chat/completions`, not `/v1/completions`.
    Raises:
        ApiError: it cannot be answered; names the parameter.
    """
    try:
        data = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(data).__name__}")
    data = _without_neutral(data)
    kind: type[_Request] = ChatRequest if chat else CompletionRequest
    limits: tuple[int | None, ...]
    notes: tuple[str, ...]
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _invalid(error) from None
    if isinstance(request, ChatRequest):
        text, notes = _problem_of(request.messages)
        limits = (request.max_tokens, request.max_completion_tokens)
    else:
        assert isinstance(request, CompletionRequest)
        text, notes = _prompt_of(request.prompt), ()
        limits = (request.max_tokens,)
    max_tokens = min((limit for limit in limits if limit is not None), default=None)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if request.n > config.serve.max_choices:
        most = config.serve.max_choices
        raise ApiError(400, f"n must be at most {most}, got {request.n}", param="n")
    return Asked(
        model=request.model,
        chat=chat,
        asks=_asks(request, text, max_tokens, config),
        user=request.user,
        stream=request.stream,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        stop=_stops(request.stop),
        notes=notes,
    )


def model_names(config: ServeConfig) -> list[str]:
    """The models of `/v1/models`, the default first."""
    listed = LISTED if config.ppm is not None else LISTED_WITHOUT_PPM
    most = config.serve.max_trajectories
    found = ["rstar", *(f"rstar-{m}-{n}" for m, n in listed if n <= most)]
    return [*dict.fromkeys([*found, "rstar-majority-32", "rstar-greedy"])]


def read_model(name: str, config: ServeConfig) -> MethodConfig:
    """The method that a model's name means.

    Raises:
        ApiError: there is no such model.
    """
    if name == "rstar":
        return config.method
    match = _MODEL.fullmatch(name)
    if match is None:
        raise ApiError(
            404,
            f"the model {name!r} does not exist; there are rstar-METHOD-N, as "
            f"{', '.join(model_names(config))}",
            param="model",
            code="model_not_found",
        )
    given = _named(Method(match[1]))
    if match[2] is not None:
        given["num_trajectories"] = _trajectories(int(match[2]), config, param="model")
    return config.method.model_copy(update=given)


def _named(method: Method) -> dict[str, Any]:
    """What of a method's config follows from its name."""
    weighed = method in (Method.BEST_OF_N, Method.WEIGHTED_MAJORITY)
    return {"name": method} if weighed else {"name": method, "logprob_weight": 0.0}


def _asks(
    request: _Request, text: str, max_tokens: int | None, config: ServeConfig
) -> tuple[Ask, ...]:
    method = read_model(request.model, config)
    given: dict[str, Any] = {}
    if request.method is not None:
        if request.method not in list(Method):
            raise ApiError(
                400,
                f"method must be one of {', '.join(Method)}, got {request.method!r}",
                param="method",
            )
        given |= _named(Method(request.method))
    if request.trajectories is not None:
        given["num_trajectories"] = _trajectories(request.trajectories, config, "trajectories")
    budgets = [b for b in (request.max_generated_tokens, max_tokens) if b is not None]
    if budgets:
        given["max_generated_tokens"] = min([*budgets, method.max_generated_tokens or budgets[0]])
    search = config.search
    if max_tokens is not None:
        given["max_solution_tokens"] = min(method.max_solution_tokens, max_tokens)
        shorter = min(search.max_step_tokens, max_tokens)
        search = search.model_copy(update={"max_step_tokens": shorter})
    method = method.model_copy(update=given)
    if method.name.needs_preference and config.ppm is None:
        raise ApiError(
            404 if request.method is None else 400,
            f"method {method.name} needs a PPM, and this server has none",
            param="model" if request.method is None else "method",
            code="model_not_found" if request.method is None else None,
        )
    timeout_s = request.timeout_s or config.serve.timeout_s
    if timeout_s > config.serve.max_timeout_s:
        raise ApiError(
            400,
            f"timeout_s must be at most {config.serve.max_timeout_s:g}, got {timeout_s:g}",
            param="timeout_s",
        )
    seed = config.seed if request.seed is None else request.seed
    seeds = [seed, *(derive_seed(seed, "choice", n) for n in range(1, request.n))]
    problem = asked_problem(text, source="request")
    search = _sampled_as_asked(request, method.name, search)
    return tuple(
        Ask(problem=problem, method=method, search=search, seed=each, timeout_s=timeout_s)
        for each in seeds
    )


def _sampled_as_asked(request: _Request, method: Method, search: SearchConfig) -> SearchConfig:
    if method is Method.GREEDY and request.temperature:
        raise ApiError(
            400,
            f"rstar-greedy has temperature 0, got {request.temperature:g}; rstar-majority-1 is one "
            "sample",
            param="temperature",
        )
    if method is not Method.GREEDY and request.temperature == 0:
        raise ApiError(
            400,
            f"at temperature 0 all candidates of {method} are the same; give a temperature above "
            "0, or none, or the model rstar-greedy. Every answer is repeatable by its seed",
            param="temperature",
        )
    asked = {"temperature": request.temperature or None, "top_p": request.top_p}
    given = {name: value for name, value in asked.items() if value is not None}
    return search.model_copy(update=given)


def _trajectories(number: int, config: ServeConfig, param: str) -> int:
    most = config.serve.max_trajectories
    if not 1 <= number <= most:
        raise ApiError(400, f"trajectories must be 1 to {most}, got {number}", param=param)
    return number


def _problem_of(messages: list[Message]) -> tuple[str, tuple[str, ...]]:
    """The last message, and a note about the others."""
    if not messages or messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's problem", param="messages")
    last = len(messages) - 1
    content = messages[-1].content
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                where = f"messages[{last}].content[{number}]"
                raise ApiError(
                    400, f"{where} must be text, got {part.get('type')!r}", param=f"{where}.type"
                )
            texts.append(part["text"])
        content = "\n".join(texts)
    text = _text(content, f"messages[{last}].content")
    if not last:
        return text, ()
    counts = {m.role: sum(o.role == m.role for o in messages[:-1]) for m in messages[:-1]}
    said = ", ".join(f"{count} {role}" for role, count in counts.items())
    return text, (f"not read: earlier messages ({said}); the last user message is the problem",)


def _prompt_of(prompt: str | list[Any]) -> str:
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise ApiError(
                400,
                "prompt must be one text; lists of texts and of tokens are not supported",
                param="prompt",
            )
        prompt = prompt[0]
    return _text(prompt, "prompt")


def _text(content: str | None, param: str) -> str:
    text = (content or "").strip()
    if not text:
        raise ApiError(400, f"{param} is empty; it is the problem to solve", param=param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{param}: not Unicode text: {error}", param=param) from None
    return text


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if len(stops) > MAX_STOPS or not all(stops):
        raise ApiError(
            400, f"stop must be at most {MAX_STOPS} texts, none of them empty", param="stop"
        )
    return tuple(stops)


def _without_neutral(data: dict[str, Any]) -> dict[str, Any]:
    """What of a request asks for something."""
    kept = {}
    for name, value in data.items():
        if value is None or any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in _CHANGES_NOTHING.get(name, ())
        ):
            continue
        if name in _CHANGES_NOTHING or name in _UNSUPPORTED:
            raise ApiError(
                400,
                f"{name} is not supported here, got {json.dumps(value)[:100]}",
                param=name,
                code="unsupported_parameter",
            )
        kept[name] = value
    return kept


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors()[0]
    parts = [p for p in first["loc"] if not (isinstance(p, str) and not p.isidentifier())]
    name = ""
    for part in parts:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in ("str", "int", "float", "list"):
            name += f".{part}" if name else part
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {name!r}", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name!r} is missing", param=name, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message}", param=name, code="invalid_value")
