from __future__ import annotations

from typing import Any

import pytest

from cluster.engines.completions_api import (
    BadReplyError,
    DialectError,
    ErrorKind,
    StreamReader,
    judge_error,
    read_reply,
    request_body,
    retry_after_s,
    room_left,
    split_candidates,
    split_tokens,
)
from cluster.engines.config import EndpointConfig
from rollout.engine import FinishReason, GenerationRequest

STOP = ("<end_of_step>", "<end_of_code>", "<end_of_answer>")


def request(**more: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"prompt": "p", "num_candidates": 2, "max_tokens": 9, "stop": STOP, **more}
    )


def body(asked: GenerationRequest, dialect: Any, **more: Any) -> dict[str, Any]:
    config = EndpointConfig(
        base_url="http://server/v1", model="m", dialect=dialect, extra_body=more.pop("extra", {})
    )
    return request_body(asked, config, **{"n": 2, "seed": 7, "max_tokens": 9, **more})


def vllm(*choices: dict[str, Any], usage: Any = None) -> dict[str, Any]:
    return {"choices": [{"index": i, **c} for i, c in enumerate(choices)], "usage": usage}


# ------------------------------------------------------------------ what is sent


def test_vllm_is_sent_all_stop_strings_and_keeps_special_tokens() -> None:
    sent = body(request(temperature=0.7, top_p=0.9), "vllm")
    assert sent["stop"] == list(STOP)
    assert (sent["n"], sent["seed"], sent["temperature"], sent["top_p"]) == (2, 7, 0.7, 0.9)
    assert sent["skip_special_tokens"] is False
    assert sent["stream"] is False
    # Else a model's generation_config.json would sample differently than a replica does.
    assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (0, 0.0, 1.0)


def test_server_that_cannot_say_what_stopped_it_is_sent_no_stop_strings() -> None:
    sent = body(request(stop=tuple("abcdefg")), "openai")
    assert "stop" not in sent
    assert sent["stream"] is True
    assert "skip_special_tokens" not in sent


def test_more_stop_strings_than_vllm_takes_are_looked_for_here() -> None:
    assert body(request(stop=("a", "b", "c", "d")), "vllm")["stop"] == ["a", "b", "c", "d"]
    sent = body(request(stop=("a", "b", "c", "d", "e")), "vllm", logprobs=True)
    assert "stop" not in sent
    assert sent["stream"] is True
    assert sent["skip_special_tokens"] is False
    assert sent["logprobs"] == 0


def test_request_without_stop_strings_is_not_streamed() -> None:
    assert body(request(stop=()), "openai")["stream"] is False


def test_keys_without_a_value_are_not_sent_and_null_removes_one() -> None:
    assert "seed" not in body(request(), "vllm", seed=None)
    assert "logprobs" not in body(request(), "vllm")
    sent = body(request(), "openai", extra={"stream_options": None, "top_k": 5})
    assert "stream_options" not in sent
    assert sent["top_k"] == 5


@pytest.mark.parametrize(
    ("asked", "max_n", "parts"),
    [
        (8, 16, [(0, 8)]),
        (8, 8, [(0, 8)]),
        (8, 3, [(0, 3), (3, 3), (6, 2)]),
        (5, 1, [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]),
    ],
)
def test_candidates_are_spread_over_as_few_requests_as_the_server_takes(
    asked: int, max_n: int, parts: list[tuple[int, int]]
) -> None:
    assert split_candidates(asked, max_n) == parts


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (10, [1, 1], [5, 5]),
        (10, [1, 1, 1], [4, 3, 3]),
        (7, [30, 10, 0], [5, 2, 0]),
        (3, [0, 0], [2, 1]),
        (0, [4, 4], [0, 0]),
    ],
)
def test_tokens_of_a_request_are_split_in_whole_shares_that_sum_to_them(
    total: int, weights: list[int], shares: list[int]
) -> None:
    assert split_tokens(total, weights) == shares


# ------------------------------------------------------------------ answers in one piece


def test_reported_stop_string_stands_at_the_end_again() -> None:
    reply = read_reply(
        vllm(
            {"text": "x = 1\n", "finish_reason": "stop", "stop_reason": "<end_of_code>"},
            {"text": "y = 1\n", "finish_reason": "stop", "stop_reason": "<end_of_step>"},
            {"text": "the end", "finish_reason": "stop", "stop_reason": None},
            {"text": "token", "finish_reason": "stop", "stop_reason": 128009},
            {"text": "cut", "finish_reason": "length", "stop_reason": None},
            usage={
                "prompt_tokens": 20,
                "completion_tokens": 11,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
        ),
        n=5,
        stop=STOP,
        dialect="vllm",
        logprobs=False,
    )
    assert [(c.text, c.stop_string, c.finish) for c in reply.completions] == [
        ("x = 1\n<end_of_code>", "<end_of_code>", FinishReason.STOP),
        ("y = 1\n<end_of_step>", "<end_of_step>", FinishReason.STOP),
        ("the end", None, FinishReason.STOP),
        ("token", None, FinishReason.STOP),
        ("cut", None, FinishReason.LENGTH),
    ]
    assert (reply.prompt_tokens, reply.cached_tokens, reply.generated_tokens) == (20, 16, 11)
    assert sum(c.num_tokens for c in reply.completions) == 11
    assert not reply.estimated


def test_text_that_keeps_its_stop_string_does_not_get_it_twice() -> None:
    choice = {"text": "x<end_of_step>", "finish_reason": "stop", "stop_reason": "<end_of_step>"}
    reply = read_reply(vllm(choice), n=1, stop=STOP, dialect="vllm", logprobs=False)
    assert reply.completions[0].text == "x<end_of_step>"


def test_log_probabilities_count_and_sum_the_tokens() -> None:
    choice = {
        "text": "x",
        "finish_reason": "length",
        "stop_reason": None,
        "logprobs": {"token_logprobs": [-0.5, -0.25, -1.0]},
    }
    reply = read_reply(vllm(choice), n=1, stop=STOP, dialect="vllm", logprobs=True)
    assert reply.completions[0].logprob == -1.75
    assert reply.completions[0].num_tokens == 3


def test_answer_without_usage_says_that_its_counts_are_estimates() -> None:
    choice = {"text": "x" * 35, "finish_reason": "length"}
    reply = read_reply(vllm(choice), n=1, stop=(), dialect="openai", logprobs=False)
    assert reply.estimated
    assert reply.prompt_tokens is None
    assert reply.generated_tokens == 10


def test_server_that_is_no_vllm_is_told_apart() -> None:
    choice = {"text": "x", "finish_reason": "stop"}
    with pytest.raises(DialectError, match=r"no stop_reason.*endpoint\.dialect to openai"):
        read_reply(vllm(choice), n=1, stop=STOP, dialect="vllm", logprobs=False)


def test_server_that_ignores_n_is_told_apart() -> None:
    choice = {"text": "x", "finish_reason": "stop", "stop_reason": None}
    with pytest.raises(DialectError, match=r"asked for n=4 completions, got 1"):
        read_reply(vllm(choice), n=4, stop=STOP, dialect="vllm", logprobs=False)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"choices": None},
        {"choices": [3]},
        vllm({"text": None}),
        vllm({"text": "x", "finish_reason": "abort"}),
        vllm({"text": "x", "finish_reason": None}),
    ],
)
def test_answer_that_is_no_completion_is_an_error(data: Any) -> None:
    with pytest.raises(BadReplyError):
        read_reply(data, n=1, stop=(), dialect="openai", logprobs=False)


# ------------------------------------------------------------------ streams


def event(text: str, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": finish, **more}]}


def test_stream_is_cut_behind_the_first_stop_string_even_if_it_comes_in_pieces() -> None:
    reader = StreamReader(n=1, stop=STOP)
    for piece in ("a<", "b><end_of", "_co", "de"):
        reader.feed(event(piece))
        assert not reader.ended
    reader.feed(event("> and <end_of_step>"))
    assert reader.ended
    completion = reader.reply().completions[0]
    assert completion.text == "a<b><end_of_code>"
    assert completion.stop_string == "<end_of_code>"
    assert completion.num_tokens == 5


def test_stream_goes_on_until_every_candidate_has_ended() -> None:
    reader = StreamReader(n=3, stop=STOP)
    reader.feed(event("one<end_of_step>", 0))
    reader.feed(event("two", 1, "stop"))
    reader.feed(event("run on", 0))
    assert not reader.ended
    reader.feed(event("three", 2, "length"))
    assert reader.ended
    reply = reader.reply()
    assert [(c.text, c.finish) for c in reply.completions] == [
        ("one<end_of_step>", FinishReason.STOP),
        ("two", FinishReason.STOP),
        ("three", FinishReason.LENGTH),
    ]
    assert [c.num_tokens for c in reply.completions] == [1, 1, 1]
    assert reply.generated_tokens == 4  # what ran on is paid for as well
    assert reply.estimated


def test_usage_is_awaited_where_the_server_ended_every_candidate() -> None:
    reader = StreamReader(n=1, stop=STOP)
    reader.feed(event("all", 0, "stop"))
    assert not reader.ended
    reader.feed({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
    assert reader.ended
    reply = reader.reply()
    assert (reply.prompt_tokens, reply.generated_tokens, reply.estimated) == (5, 2, False)


def test_log_probabilities_of_a_stream_are_summed_up_to_the_cut() -> None:
    reader = StreamReader(n=1, stop=STOP, logprobs=True)
    reader.feed(event("a", logprobs={"token_logprobs": [-0.5]}))
    last = {"token_logprobs": [-0.25, -0.25, -7.0], "tokens": ["<end", "_of_step>", "b"]}
    reader.feed(event("<end_of_step>b", logprobs=last))
    reader.feed(event("b", logprobs={"token_logprobs": [-9.0]}))
    reply = reader.reply()
    completion = reply.completions[0]
    assert completion.logprob == -1.0
    assert completion.num_tokens == 3
    assert reply.generated_tokens == 5


def test_log_probabilities_that_cannot_be_cut_are_all_counted() -> None:
    reader = StreamReader(n=1, stop=STOP, logprobs=True)
    halves = {"token_logprobs": [-0.5, -0.25, -1.0], "tokens": ["\ufffd", "\ufffd", "b"]}
    reader.feed(event("é<end_of_step>", logprobs=halves))
    assert reader.reply().completions[0].logprob == -1.75


def test_vllm_counts_tokens_while_it_streams() -> None:
    reader = StreamReader(n=2, stop=STOP, dialect="vllm")

    def counted(text: str, index: int, tokens: int) -> dict[str, Any]:
        usage = {"prompt_tokens": 20, "completion_tokens": tokens}
        return event(text, index) | {"usage": usage}

    reader.feed(counted("several tokens", 0, 6))
    reader.feed(counted("<end_of_step>", 0, 7))
    reader.feed(counted("run on", 0, 9))
    reader.feed(counted("other<end_of_step>", 1, 4))
    assert reader.ended
    reply = reader.reply()
    assert [c.num_tokens for c in reply.completions] == [7, 4]
    assert (reply.prompt_tokens, reply.generated_tokens) == (20, 13)
    assert not reply.estimated


def test_stream_that_breaks_off_is_an_error() -> None:
    reader = StreamReader(n=1, stop=STOP)
    reader.feed(event("half a st"))
    with pytest.raises(BadReplyError, match="ended before its completions did"):
        reader.reply()


def test_stream_with_fewer_candidates_than_asked_for_is_told_apart() -> None:
    reader = StreamReader(n=2, stop=STOP)
    reader.feed(event("a", 0, "stop"))
    with pytest.raises(DialectError, match=r"asked for n=2 completions, got 1"):
        reader.reply()


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (429, "slow down", ErrorKind.RETRY),
        (500, "", ErrorKind.RETRY),
        (503, "loading", ErrorKind.RETRY),
        (408, "", ErrorKind.RETRY),
        (429, '{"code": "insufficient_quota"}', ErrorKind.FATAL),
        (401, "", ErrorKind.FATAL),
        (403, "", ErrorKind.FATAL),
        (404, "no such model", ErrorKind.FATAL),
        (307, "", ErrorKind.FATAL),
        (400, "unknown parameter seed", ErrorKind.REFUSED),
        (422, "content rejected", ErrorKind.REFUSED),
        (400, '{"code": "context_length_exceeded"}', ErrorKind.TOO_LONG),
        (400, "This model's maximum context length is 512 tokens.", ErrorKind.TOO_LONG),
        (400, "max_tokens=600 cannot be greater than max_model_len=512.", ErrorKind.TOO_LONG),
        (500, "maximum context length", ErrorKind.RETRY),
    ],
)
def test_what_a_status_asks_for(status: int, text: str, kind: ErrorKind) -> None:
    assert judge_error(status, text) is kind


@pytest.mark.parametrize(
    ("text", "room", "prompt"),
    [
        # vLLM now, and before it cut max_tokens by itself
        (
            "This model's maximum context length is 512 tokens. However, your prompt contains at "
            "least 513 input tokens, which exceeds this limit even without any output tokens.",
            0,
            513,
        ),
        (
            "The decoder prompt (length 512) plus the number of requested output tokens (at least "
            "1) is longer than the maximum model length of 512.",
            0,
            512,
        ),
        (
            "'max_tokens' is too large: 100. This model's maximum context length is 512 tokens and "
            "your request has 450 input tokens (100 > 512 - 450).",
            62,
            450,
        ),
        # OpenAI
        (
            "This model's maximum context length is 4097 tokens, however you requested 4130 tokens "
            "(4030 in your prompt; 100 for the completion).",
            67,
            4030,
        ),
        # SGLang
        (
            "The input (600 tokens) is longer than the model's context length (512 tokens).",
            0,
            600,
        ),
        # Text Generation Inference
        (
            "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and "
            "100 `max_new_tokens`",
            96,
            4000,
        ),
        # the completion alone is too long: nothing is said of the prompt
        ("max_tokens=100 cannot be greater than max_model_len=64. Request fewer.", 64, None),
        # nothing to read: ask for less
        ("context length exceeded", 25, None),
    ],
)
def test_room_is_read_from_what_servers_say(text: str, room: int, prompt: int | None) -> None:
    assert judge_error(400, text) is ErrorKind.TOO_LONG
    found = room_left(text, max_tokens=100)
    assert (found.max_tokens, found.prompt_tokens) == (room, prompt)


def test_asking_for_less_ends() -> None:
    asked = [2048]
    while asked[-1]:
        asked.append(room_left("context length exceeded", asked[-1]).max_tokens)
    assert asked == [2048, 512, 128, 32, 0]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("2.5", 2.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, now_s=10.0) == seconds
