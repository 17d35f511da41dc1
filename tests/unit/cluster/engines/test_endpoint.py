"""The client against a server of the test's own, in this process."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from cluster.engines.config import EndpointConfig
from cluster.engines.endpoint import EndpointPolicy, Pace, backoff_s, read_api_key
from cluster.folder.config_file import ConfigError, make_config
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig, RunConfig
from rollout.engine import EngineError, FinishReason, GenerationReply, GenerationRequest
from rollout.prompt import STOP_STRINGS

KEY = "sk-very-secret-0123456789"

Answer = Callable[[dict[str, Any]], web.Response]


def completions(*texts: str, stop_reason: Any = "<end_of_step>", **usage: Any) -> web.Response:
    return web.json_response(
        {
            "choices": [
                {"index": i, "text": t, "finish_reason": "stop", "stop_reason": stop_reason}
                for i, t in enumerate(texts)
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3 * len(texts), **usage},
        }
    )


def answer_all(body: dict[str, Any]) -> web.Response:
    return completions(*(f"text {body.get('seed', 0) + i}" for i in range(body["n"])))


def error(status: int, message: str = "no", **headers: str) -> Answer:
    return lambda body: web.json_response(
        {"error": {"message": message}}, status=status, headers=headers
    )


@dataclass
class Server:
    """Answers with a script; when it is used up, as its last entry says."""

    script: list[Answer]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    hold: asyncio.Event | None = None
    running: int = 0
    most_running: int = 0
    closed_streams: int = 0
    stream: Callable[[dict[str, Any]], list[str]] | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.hold is not None:
                await self.hold.wait()
            if body.get("stream"):
                return await self._stream(request, body)
            script = self.script
            return (script.pop(0) if len(script) > 1 else script[0])(body)
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert self.stream is not None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for line in self.stream(body):
                await response.write(line.encode())
                await asyncio.sleep(0)
        except (ConnectionResetError, asyncio.CancelledError):
            self.closed_streams += 1
            raise
        return response


@asynccontextmanager
async def serving(*script: Answer, **more: Any) -> AsyncIterator[Server]:
    server = Server(script=list(script), **more)
    app = web.Application()
    app.router.add_post("/v1/completions", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}/v1"
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client(url: str, *, key: str = "", **settings: Any) -> AsyncIterator[EndpointPolicy]:
    defaults: dict[str, Any] = {"dialect": "vllm", "first_pause_s": 0.01}
    config = EndpointConfig(base_url=url, model="m", **defaults | settings)
    policy = EndpointPolicy(config, rng=random.Random(0))
    policy._key = key
    try:
        yield policy
    finally:
        await policy.shutdown()


def request(num_candidates: int = 1, **more: Any) -> GenerationRequest:
    return GenerationRequest(
        **{
            "prompt": "question",
            "num_candidates": num_candidates,
            "max_tokens": 100,
            "stop": STOP_STRINGS,
            **more,
        }
    )


def texts(reply: GenerationReply) -> list[str]:
    return [completion.text for completion in reply.completions]


# ------------------------------------------------------------------ what it answers


async def test_candidates_come_with_their_stop_string_and_their_tokens() -> None:
    def answer(body: dict[str, Any]) -> web.Response:
        return completions("a", "bbb", prompt_tokens_details={"cached_tokens": 8})

    async with serving(answer) as server, client(server.url) as policy:
        reply = await policy.generate(request(2, seed=5, temperature=0.7))
        stats = await policy.stats()
    assert texts(reply) == ["a<end_of_step>", "bbb<end_of_step>"]
    assert [c.num_tokens for c in reply.completions] == [2, 4]
    assert (reply.prompt_tokens, reply.cached_tokens) == (10, 8)
    assert reply.policy_version == "endpoint:m"
    assert (stats.requests, stats.prompt_tokens, stats.generated_tokens) == (1, 10, 6)
    assert stats.cached_tokens == 8
    assert server.bodies[0]["model"] == "m"
    assert server.keys == [None]


async def test_split_request_gives_the_texts_of_an_unsplit_one() -> None:
    async with serving(answer_all) as server:
        async with client(server.url) as policy:
            whole = await policy.generate(request(5, seed=100))
        async with client(server.url, max_n=2) as policy:
            parts = await policy.generate(request(5, seed=100))
            stats = await policy.stats()
    assert texts(parts) == texts(whole)
    assert sorted(body["n"] for body in server.bodies) == [1, 2, 2, 5]
    assert parts.prompt_tokens == 30  # the server read it three times
    assert stats.requests == 3


async def test_greedy_candidates_are_written_once() -> None:
    async with serving(answer_all) as server, client(server.url) as policy:
        reply = await policy.generate(request(4, temperature=0.0))
    assert [body["n"] for body in server.bodies] == [1]
    assert len(set(texts(reply))) == 1
    assert len(reply.completions) == 4


async def test_seed_is_kept_back_from_servers_that_do_not_want_it() -> None:
    async with serving(answer_all) as server, client(server.url, send_seed=False) as policy:
        await policy.generate(request(1, seed=100))
    assert "seed" not in server.bodies[0]


def events(*pieces: tuple[int, str, str | None]) -> list[str]:
    lines = [": a comment\n\n"]
    for index, text, finish in pieces:
        choice = {"index": index, "text": text, "finish_reason": finish}
        lines.append(f"data: {json.dumps({'choices': [choice]})}\r\n\r\n")
    return lines


async def test_stream_is_cut_and_closed_when_every_candidate_has_ended() -> None:
    def stream(body: dict[str, Any]) -> list[str]:
        start = events((0, "x = 1 # é<end", None), (1, "done", "stop"), (0, "_of_code>", None))
        return start + events(*[(0, "run on " * 1000, None)] * 2000) + ["data: [DONE]\n\n"]

    async with (
        serving(answer_all, stream=stream) as server,
        client(server.url, dialect="openai") as policy,
    ):
        reply = await policy.generate(request(2))
        stats = await policy.stats()
        async with asyncio.timeout(30):
            while server.running:
                await asyncio.sleep(0.01)
    assert texts(reply) == ["x = 1 # é<end_of_code>", "done"]
    assert [c.stop_string for c in reply.completions] == ["<end_of_code>", None]
    assert server.closed_streams == 1
    assert "stop" not in server.bodies[0]
    assert stats.estimated_requests == 1
    # Nothing told the prompt's tokens: 8 characters at 3.5 a token.
    assert (reply.prompt_tokens, stats.generated_tokens) == (2, 3)


async def test_stream_that_the_server_ends_brings_its_usage() -> None:
    def stream(body: dict[str, Any]) -> list[str]:
        usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}
        end = [f"data: {json.dumps(usage)}\n\n", "data: [DONE]\n\n"]
        return events((0, "a", None), (0, "b", "length")) + end

    async with (
        serving(answer_all, stream=stream) as server,
        client(server.url, dialect="openai") as policy,
    ):
        reply = await policy.generate(request())
        stats = await policy.stats()
    assert reply.completions[0].finish is FinishReason.LENGTH
    assert (reply.prompt_tokens, stats.generated_tokens, stats.estimated_requests) == (7, 4, 0)


async def test_error_in_the_middle_of_a_stream_is_tried_again() -> None:
    streams = [
        [*events((0, "half", None)), 'data: {"error": {"message": "lost", "code": 500}}\n\n'],
        events((0, "whole<end_of_step>", None)),
    ]
    async with (
        serving(answer_all, stream=lambda body: streams.pop(0)) as server,
        client(server.url, dialect="openai") as policy,
    ):
        reply = await policy.generate(request())
        assert (await policy.stats()).retries == 1
    assert texts(reply) == ["whole<end_of_step>"]


# ------------------------------------------------------------------ prompts that are too long


async def test_prompt_that_does_not_fit_is_a_value() -> None:
    message = "This model's maximum context length is 512 tokens. However, your prompt contains at "
    message += "least 513 input tokens, which exceeds this limit even without any output tokens."
    async with serving(error(400, message)) as server, client(server.url) as policy:
        reply = await policy.generate(request(3))
        stats = await policy.stats()
    assert [c.finish for c in reply.completions] == [FinishReason.PROMPT_TOO_LONG] * 3
    assert texts(reply) == ["", "", ""]
    assert reply.prompt_tokens == 513
    assert (stats.too_long, stats.failed, stats.healthy) == (1, 0, True)


async def test_less_is_asked_for_where_prompt_and_completion_do_not_fit_together() -> None:
    message = "This model's maximum context length is 512 tokens, however you requested 540 tokens "
    message += "(440 in your prompt; 100 for the completion)."
    async with serving(error(400, message), answer_all) as server, client(server.url) as policy:
        reply = await policy.generate(request())
    assert texts(reply) == ["text 0<end_of_step>"]
    assert [body["max_tokens"] for body in server.bodies] == [100, 72]


# ------------------------------------------------------------------ what fails


async def test_server_in_trouble_is_asked_again() -> None:
    def garbled(body: dict[str, Any]) -> web.Response:
        return web.Response(text="<html>proxy</html>")

    def empty(body: dict[str, Any]) -> web.Response:
        return web.json_response({"choices": []})

    async with (
        serving(error(500), garbled, error(503), answer_all) as server,
        client(server.url) as policy,
    ):
        reply = await policy.generate(request())
        stats = await policy.stats()
    assert texts(reply) == ["text 0<end_of_step>"]
    assert (stats.retries, stats.failed, stats.requests) == (3, 0, 1)
    assert stats.paused_s > 0


async def test_retry_after_holds_back_every_request() -> None:
    slept: list[float] = []
    now_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        slept.append(seconds)
        now_s += seconds
        await asyncio.sleep(0)

    async with serving(error(429, **{"Retry-After": "40"}), answer_all) as server:
        config = EndpointConfig(base_url=server.url, model="m", dialect="vllm", max_in_flight=1)
        policy = EndpointPolicy(config, clock=lambda: now_s, sleep=sleep, rng=random.Random(0))
        first = asyncio.create_task(policy.generate(request()))
        second = asyncio.create_task(policy.generate(request()))
        await asyncio.gather(first, second)
        stats = await policy.stats()
        await policy.shutdown()
    assert 40.0 <= slept[0] <= 41.0
    assert len(slept) == 1
    assert (stats.throttled, stats.retries, len(server.bodies)) == (1, 1, 3)


async def test_pause_that_is_asked_of_one_request_is_kept_by_another() -> None:
    now_s = 0.0
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        woken.append(now_s)

    config = EndpointConfig(base_url="http://localhost/v1", model="m")
    policy = EndpointPolicy(config, clock=lambda: now_s, sleep=sleep)
    policy._resume_s = 12.0
    await policy._keep_quiet()
    assert woken == [12.0]


async def test_pause_longer_than_the_deadline_ends_the_endpoint() -> None:
    async with (
        serving(error(429, "daily limit", **{"Retry-After": "7200"})) as server,
        client(server.url) as policy,
    ):
        with pytest.raises(EngineError, match=r"come back in 7,200 s.*HTTP 429.*daily limit"):
            await policy.generate(request())
        assert "come back" in (await policy.stats()).fatal


async def test_deadline_ends_the_tries_and_names_what_failed_last() -> None:
    async with (
        serving(error(503, "overloaded")) as server,
        client(server.url, deadline_s=1.0) as policy,
    ):
        with pytest.raises(EngineError) as caught:
            await policy.generate(request())
        stats = await policy.stats()
    assert f"endpoint m at {server.url}: gave up after" in str(caught.value)
    assert "HTTP 503 Service Unavailable" in str(caught.value)
    assert "overloaded" in str(caught.value)
    assert (stats.failed, stats.fatal) == (1, "")
    assert stats.retries >= 2
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), EngineError)


async def test_server_that_does_not_answer_times_out_and_is_asked_again() -> None:
    async with (
        serving(answer_all, hold=asyncio.Event()) as server,
        client(server.url, request_timeout_s=0.05, deadline_s=1.5) as policy,
    ):
        with pytest.raises(EngineError, match=r"gave up after \d+ tries.*no answer"):
            await policy.generate(request())
        assert (await policy.stats()).running_requests == 0
    assert len(server.bodies) >= 2


async def test_refused_connection_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        async with client(url, deadline_s=0.1) as policy:
            with pytest.raises(EngineError, match="ClientConnectorError"):
                await policy.generate(request())


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_wrong_key_or_model_fails_at_once_and_for_good(status: int) -> None:
    async with serving(error(status, "no such thing")) as server, client(server.url) as policy:
        with pytest.raises(EngineError, match=rf"HTTP {status} .*no such thing"):
            await policy.generate(request())
        with pytest.raises(EngineError, match=rf"HTTP {status}"):
            await policy.generate(request())
        stats = await policy.stats()
    assert len(server.bodies) == 1
    assert f"HTTP {status}" in stats.fatal
    assert not stats.healthy


async def test_one_refused_request_does_not_end_an_endpoint_that_serves() -> None:
    script = (answer_all, error(400, "filtered"), answer_all)
    async with serving(*script) as server, client(server.url) as policy:
        await policy.generate(request())
        with pytest.raises(EngineError, match=r"HTTP 400 Bad Request.*filtered"):
            await policy.generate(request())
        await policy.generate(request())
    async with serving(error(400, "unknown key top_k")) as server, client(server.url) as policy:
        with pytest.raises(EngineError, match="unknown key top_k"):
            await policy.generate(request())
        assert (await policy.stats()).fatal


async def test_first_request_shows_that_the_endpoint_can_be_used() -> None:
    async with serving(answer_all) as server, client(server.url) as policy:
        assert await policy.ready(KEY) == "endpoint:m"
        assert server.bodies[0]["max_tokens"] == 1
    wrong = {"choices": [{"text": "x", "finish_reason": "length"}]}
    async with (
        serving(lambda body: web.json_response(wrong)) as server,
        client(server.url) as policy,
    ):
        with pytest.raises(EngineError, match=r"no vLLM.*set endpoint\.dialect to openai"):
            await policy.ready()


# ------------------------------------------------------------------ limits and accounts


async def test_no_more_requests_are_in_flight_than_allowed() -> None:
    hold = asyncio.Event()
    async with (
        serving(answer_all, hold=hold) as server,
        client(server.url, max_in_flight=3, max_n=1) as policy,
    ):
        tasks = [asyncio.create_task(policy.generate(request(2))) for _ in range(5)]
        async with asyncio.timeout(30):
            while server.running < 3:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        stats = await policy.stats()
        pressure = await policy.pressure()
        hold.set()
        await asyncio.gather(*tasks)
    assert server.most_running == 3
    assert (stats.running_requests, stats.waiting_requests) == (3, 7)
    assert (pressure.running, pressure.waiting) == (3, 7)
    assert len(server.bodies) == 10


async def test_budget_ends_the_endpoint_with_a_clear_error() -> None:
    async with serving(answer_all) as server, client(server.url, max_total_tokens=20) as policy:
        await policy.generate(request(2))  # 16 tokens
        await policy.generate(request(2))  # 32
        with pytest.raises(EngineError) as caught:
            await policy.generate(request(2))
        stats = await policy.stats()
    assert "the budget of 20 tokens (endpoint.max_total_tokens) is used up: 20 in, 12 out" in str(
        caught.value
    )
    assert stats.fatal == str(caught.value)
    assert len(server.bodies) == 2


async def test_actor_in_the_place_of_another_goes_on_with_its_account() -> None:
    async with serving(answer_all) as server:
        async with client(server.url) as policy:
            await policy.generate(request(2))
            before = await policy.stats()
        config = policy.config.model_copy(update={"max_total_tokens": 16})
        after = EndpointPolicy(config, before=before)
        with pytest.raises(EngineError, match=r"16 tokens .* is used up: 10 in, 6 out"):
            await after.generate(request(2))
        assert (await after.stats()).requests == before.requests == 1


async def test_cancelled_request_frees_its_slot() -> None:
    hold = asyncio.Event()
    async with (
        serving(answer_all, hold=hold) as server,
        client(server.url, max_in_flight=1) as policy,
    ):
        task = asyncio.create_task(policy.generate(request()))
        async with asyncio.timeout(30):
            while not server.running:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.set()
        assert texts(await policy.generate(request())) == ["text 0<end_of_step>"]


def test_pace_spreads_requests_evenly_after_a_small_burst() -> None:
    pace = Pace(per_minute=120.0)  # one each half second, a burst of one second
    assert [round(pace.take(1.0, now_s=10.0), 3) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    pace.settle(-4.0, now_s=10.0)  # two seconds given back
    assert pace.take(1.0, now_s=10.0) == 0.0
    assert pace.take(1.0, now_s=60.0) == 0.0


async def test_rate_limit_is_waited_for_and_no_failure() -> None:
    now_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    async with serving(answer_all) as server:
        config = EndpointConfig(
            base_url=server.url,
            model="m",
            dialect="vllm",
            requests_per_minute=1.0,
            deadline_s=30.0,
        )
        policy = EndpointPolicy(config, clock=lambda: now_s, sleep=sleep)
        for _ in range(3):
            await policy.generate(request())
        await policy.shutdown()
    assert 118.0 <= now_s <= 120.0


def test_backoff_doubles_up_to_a_limit_with_jitter() -> None:
    class Middle(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return (a + b) / 2

    pauses = [backoff_s(n, first_s=1.0, longest_s=10.0, rng=Middle()) for n in (1, 2, 3, 4, 5, 999)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    rng = random.Random(1)
    drawn = {backoff_s(1, first_s=1.0, longest_s=10.0, rng=rng) for _ in range(100)}
    assert len(drawn) == 100
    assert 0.5 <= min(drawn) < 0.6
    assert 1.4 < max(drawn) < 1.5


# ------------------------------------------------------------------ the key


def quoting(status: int) -> Answer:
    """A server that quotes what it was sent."""
    return lambda body: web.json_response({"error": f"bad key {KEY}"}, status=status)


async def test_key_is_sent_and_appears_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def fail(policy: EndpointPolicy, act: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(EngineError) as caught:
            await act()
        chain: BaseException | None = caught.value
        while chain is not None:
            if not chain.__suppress_context__ or chain.__cause__ is not None:
                seen.append(repr(chain))
            seen.append(f"{chain}")
            chain = chain.__cause__
        seen.extend(map(repr, (await policy.stats(), policy.config, policy)))
        seen.append(pickle.dumps(caught.value).decode("latin-1"))

    async with serving(quoting(401)) as server, client(server.url) as policy:
        await fail(policy, lambda: policy.ready(KEY))
    assert server.keys == [f"Bearer {KEY}"]
    for status in (400, 500):
        async with (
            serving(quoting(status)) as server,
            client(server.url, key=KEY, deadline_s=0.05) as policy,
        ):
            await fail(policy, lambda: policy.generate(request()))

    def quoting_200(body: dict[str, Any]) -> web.Response:
        return web.Response(text=json.dumps({"choices": [KEY]}))

    async with serving(quoting_200) as server, client(server.url, key=KEY, deadline_s=0.05) as p:
        await fail(p, lambda: p.generate(request()))
    text = "\n".join([*seen, caplog.text])
    assert "***" in text
    assert KEY not in text


def test_key_comes_from_the_named_variable() -> None:
    config = EndpointConfig(base_url="https://h/v1", model="m", api_key_env="SOME_KEY")
    assert read_api_key(config, {"SOME_KEY": f" {KEY}\n"}) == KEY
    for environ in ({}, {"SOME_KEY": " "}):
        with pytest.raises(
            EngineError, match=r"variable SOME_KEY \(endpoint\.api_key_env\) is not"
        ):
            read_api_key(config, environ)
    with pytest.raises(EngineError, match="characters that no API key has") as caught:
        read_api_key(config, {"SOME_KEY": f"{KEY}\nX-Header: 1"})
    assert KEY not in str(caught.value)
    assert read_api_key(EndpointConfig(base_url="https://h/v1", model="m"), {}) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key_env": KEY},
        {"api_key_env": "sk_lower_case_secret"},
        {"api_key": KEY},
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"https://host/v1?key={KEY}"},
    ],
)
def test_key_in_a_config_is_refused_and_not_repeated(settings: dict[str, str]) -> None:
    data = {
        "problems": "p.jsonl",
        "run_dir": "x",
        "endpoint": {"base_url": "https://host/v1", "model": "m", **settings},
    }
    with pytest.raises(ConfigError, match=r"endpoint\.(api_key|base_url)") as caught:
        make_config(data, kind=RolloutConfig, source="c.yaml")
    assert not any(value in str(caught.value) for value in settings.values())


def test_config_in_the_run_folder_names_the_variable_only(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    folder = RunFolder(tmp_path)
    folder.keep_config(run_config())
    written = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "api_key_env: SOME_KEY" in written
    assert KEY not in written


# ------------------------------------------------------------------ the config


def run_config(**endpoint: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": "x",
            "problems": {"miniature": {}},
            "rounds": [{"preference": False}],
            "endpoint": {
                "base_url": "https://host/v1",
                "model": "m",
                "api_key_env": "SOME_KEY",
                **endpoint,
            },
        }
    )


def test_run_may_be_continued_at_another_address_but_not_with_another_model(tmp_path: Any) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(run_config())
    folder.keep_config(run_config(base_url="https://other/v1", max_total_tokens=10**9))
    with pytest.raises(ConfigError, match=r"other values of endpoint\.model"):
        folder.keep_config(run_config(model="another"))
    without = run_config().model_copy(update={"endpoint": None})
    with pytest.raises(ConfigError, match="other values of endpoint"):
        folder.keep_config(without)


def test_rollout_has_a_checkpoint_or_an_endpoint() -> None:
    given = {"problems": "p.jsonl", "run_dir": "x"}
    endpoint = {"base_url": "https://host/v1", "model": "m"}
    make_config(given | {"endpoint": endpoint}, kind=RolloutConfig, source="c")
    for wrong in ({}, {"policy": "p", "endpoint": endpoint}):
        with pytest.raises(ConfigError, match="either a policy checkpoint or an endpoint"):
            make_config(given | wrong, kind=RolloutConfig, source="c")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "host/v1"}, "expected an address"),
        ({"base_url": "ftp://host"}, "expected an address"),
        ({"base_url": "http://host:port/v1"}, "expected an address"),
        ({"base_url": "http://host/v1/completions"}, "without /completions"),
        ({"extra_body": {"stop": ["x"], "n": 3}}, "n, stop: set by the search"),
        ({"dialect": "chat"}, "'openai' or 'vllm'"),
    ],
)
def test_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EndpointConfig(**{"base_url": "http://host/v1", "model": "m", **settings})


def test_address_ends_without_a_slash() -> None:
    config = EndpointConfig(base_url="http://host:8000/v1/", model="m")
    assert config.url == "http://host:8000/v1/completions"
