"""A policy behind an OpenAI-compatible completions endpoint: a hosted model, or `vllm serve`.

    generate --> parts of max_n --> slot --> pace, pause --> POST BASE_URL/completions --> reply
                                     ^                             |
                                     +------ back-off <--- 429, 5xx, no connection, time-out

It is how a team without eight big GPUs runs the bootstrap round: `rstar rollout` and the first
round of `rstar evolve` take their policy from the endpoint when the config has one, and start no
policy replicas for it. What is said on the wire is in `completions_api`.

One actor holds the client, on the machine of the driver, and every rollout worker asks it. Then
the limit on requests in flight, the limits per minute, the budget, the pause a server asks for and
the account are each one number, and the key is in one process; a client in each worker would have
a share of everything and know nothing of the others'. The extra hop costs about a millisecond of
a request that takes seconds.

A request that fails in a way that may pass is sent again with exponential back-off and jitter,
until its deadline; it keeps its slot meanwhile, so that a server in trouble gets less, and a
Retry-After holds back all requests. What will not pass (wrong key, address or model, budget used
up) ends the endpoint: every later call fails with the same error, and the driver, which reads
`stats().fatal`, ends the run; what is finished stays. An actor that dies is replaced by one that
goes on with its account, as last heard.

The API key comes from the environment variable that the config names, is handed to the actor by a
call and is never written: not to the config, the run's folder, a log or an error. Texts of the
server are searched for it before they are shown.

Not covered: chat endpoints (see `completions_api`); the price of requests that failed or whose
stream was closed early, which only the provider knows; several endpoints at once.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import math
import random
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray

from cluster.engines.completions_api import (
    BadReplyError,
    CompletionsReply,
    DialectError,
    ErrorKind,
    StreamReader,
    judge_error,
    read_reply,
    request_body,
    retry_after_s,
    room_left,
    split_candidates,
)
from cluster.engines.config import EndpointConfig
from cluster.jobs.admission import EnginePressure
from cluster.telemetry.tracing import Traced
from rollout.engine import Completion, EngineError, FinishReason, GenerationReply, GenerationRequest
from rollout.prompt import RSTAR_TEMPLATE, render_question

logger = logging.getLogger(__name__)

EXCERPT_CHARS = 300
"""Of a server's answer, in an error."""

PACE_BURST_S = 1.0
"""Requests may be early by so much of a limit per minute."""

PROBE_DEADLINE_S = 30.0
"""For the first request, which shows that address, key and model are right."""

_PROBE = GenerationRequest(
    prompt=render_question(
        "There are 12 boxes with 5 pens each. How many pens are there?", RSTAR_TEMPLATE
    ),
    num_candidates=1,
    max_tokens=1,
    temperature=0.0,
)


@dataclass(slots=True, kw_only=True)
class EndpointStats:
    """Counters since the start, and the present load; names as in `ReplicaStats`."""

    name: str
    version: str
    healthy: bool = True
    fatal: str = ""
    """Why no request will be answered any more; "" if they are."""
    requests: int = 0
    """HTTP requests answered."""
    failed: int = 0
    """HTTP requests given up."""
    retries: int = 0
    throttled: int = 0
    """Answers that asked to slow down (429)."""
    prompt_tokens: int = 0
    """Once an HTTP request, however many candidates."""
    cached_tokens: int = 0
    """As far as the server tells."""
    generated_tokens: int = 0
    """All that were received, those behind a stop string included."""
    estimated_requests: int = 0
    """Answers without usage: tokens are counted here, those of the prompt estimated."""
    too_long: int = 0
    """Prompts that did not fit."""
    running_requests: int = 0
    """HTTP requests with a slot, pauses included."""
    running_sequences: int = 0
    waiting_requests: int = 0
    """HTTP requests that wait for a slot."""
    paused_s: float = 0.0
    """Sum over requests of the time they waited for back-off, Retry-After or a rate limit."""


def read_api_key(config: EndpointConfig, environ: Mapping[str, str]) -> str:
    """The API key, "" if the endpoint needs none.

    Raises:
        EngineError: the environment variable is not set, or holds no key.
    """
    if config.api_key_env is None:
        return ""
    key = environ.get(config.api_key_env, "").strip()
    if not key:
        raise EngineError(
            f"the environment variable {config.api_key_env} (endpoint.api_key_env) is not set; "
            f"it must hold the API key of {config.base_url}"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EngineError(
            f"the environment variable {config.api_key_env} (endpoint.api_key_env) holds "
            "characters that no API key has"
        )
    return key


@dataclass(slots=True)
class Pace:
    """Spreads what is started evenly over time: `per_minute` of some unit, with a small burst."""

    per_minute: float
    _free_s: float = field(init=False, default=float("-inf"))
    """When all that was taken so far is paid off."""

    def take(self, amount: float, now_s: float) -> float:
        """Seconds to wait before starting something of this size."""
        wait_s = max(0.0, self._free_s - now_s)
        self.settle(amount, now_s)
        return wait_s

    def settle(self, amount: float, now_s: float) -> None:
        """Book a difference between what was taken and what it came to, without waiting."""
        self._free_s = max(self._free_s, now_s - PACE_BURST_S) + amount * 60.0 / self.per_minute


def backoff_s(attempt: int, *, first_s: float, longest_s: float, rng: random.Random) -> float:
    """Pause after a failed try: doubled each time, times a random factor in [0.5, 1.5).

    Args:
        attempt: tries so far, >= 1.
    """
    return min(longest_s, first_s * 2.0 ** min(attempt - 1, 60)) * rng.uniform(0.5, 1.5)


class _Failure(Exception):
    """One try failed."""

    def __init__(
        self,
        text: str,
        kind: ErrorKind = ErrorKind.RETRY,
        *,
        status: int | None = None,
        pause_s: float | None = None,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.kind = kind
        self.status = status
        self.pause_s = pause_s
        """What the server asks to wait; None: it does not say."""


class EndpointPolicy(Traced):
    """`rollout.engine.PolicyEngine` over an endpoint."""

    def __init__(
        self,
        config: EndpointConfig,
        *,
        name: str = "endpoint",
        before: EndpointStats | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """Nothing is sent before `ready` or the first `generate`.

        Args:
            before: the account of the actor in whose place this one comes; it is gone on with, so
                that a budget is not begun again.
        """
        self.config = config
        self._name = name
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._key = ""
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._request_pace = Pace(config.requests_per_minute or math.inf)
        self._token_pace = Pace(config.tokens_per_minute or math.inf)
        self._resume_s = float("-inf")
        """No request is sent before: a server asked for a pause."""
        # A prompt's tokens are estimated from its length by what usage has told so far.
        self._known_chars, self._known_tokens = 3.5, 1.0
        self._stats = replace(
            before or EndpointStats(name=name, version=config.version),
            healthy=True,
            fatal="",
            running_requests=0,
            running_sequences=0,
            waiting_requests=0,
        )
        self._waiting_sequences = 0

    # ---------------------------------------------------------------- the engine

    async def ready(self, api_key: str = "") -> str:
        """Take the key and ask for one token; returns the policy version.

        Raises:
            EngineError: the endpoint cannot be reached, or refuses the key or the model, or does
                not speak the configured dialect.
        """
        self._key = api_key
        body = request_body(_PROBE, self.config, n=1, max_tokens=_PROBE.max_tokens)
        deadline_s = min(PROBE_DEADLINE_S, self.config.deadline_s)
        try:
            await self._exchange(_PROBE, body, deadline_s=deadline_s)
        except _Failure as failure:
            raise self._error(failure.text) from None
        return self.config.version

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """Sample continuations; see `PolicyEngine`.

        The candidates may come from several HTTP requests, each with a seed of its own; the
        prompt's tokens are counted once for each. Where prompt and `max_tokens` do not fit
        together, as many tokens as there is room for are asked for. A prompt that does not fit by
        itself gets empty completions that say so.

        Raises:
            EngineError: the endpoint could not be used, was busy until the deadline, or its budget
                is used up.
        """
        # Greedy candidates are all alike; some servers refuse to write them more than once.
        wanted = request.num_candidates if request.temperature > 0 else 1
        tasks = [
            asyncio.create_task(self._part(request, before, n))
            for before, n in split_candidates(wanted, self.config.max_n)
        ]
        try:
            replies = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        completions = tuple(c for reply in replies for c in reply.completions)
        if len(completions) < request.num_candidates:
            completions *= request.num_candidates
        return GenerationReply(
            completions=completions,
            prompt_tokens=sum(reply.prompt_tokens or 0 for reply in replies),
            cached_tokens=sum(reply.cached_tokens for reply in replies),
            policy_version=self.config.version,
        )

    async def stats(self) -> EndpointStats:
        """Counters and load."""
        return replace(self._stats)

    async def pressure(self) -> EnginePressure:
        """How full the slots are, as an engine says it of its batch."""
        return EnginePressure(
            running=self._stats.running_sequences,
            waiting=self._waiting_sequences,
            kv_usage=0.0,
            preemptions=0,
        )

    async def shutdown(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # ---------------------------------------------------------------- one HTTP request

    async def _part(self, request: GenerationRequest, before: int, n: int) -> CompletionsReply:
        """`n` candidates of a request, in one HTTP request unless room has to be found."""
        max_tokens = request.max_tokens
        seed = request.seed if self.config.send_seed else None
        while True:
            body = request_body(
                request,
                self.config,
                n=n,
                max_tokens=max_tokens,
                # As vLLM numbers the candidates of one request: the same texts, however split.
                seed=seed + before if seed is not None else None,
                logprobs=self.config.logprobs,
            )
            try:
                return await self._exchange(request, body, deadline_s=self.config.deadline_s)
            except _Failure as failure:
                room = room_left(failure.text, max_tokens)
            if room.max_tokens < 1:
                self._stats.too_long += 1
                empty = Completion(text="", finish=FinishReason.PROMPT_TOO_LONG)
                tokens = room.prompt_tokens or self._estimate(request.prompt)
                return CompletionsReply(completions=(empty,) * n, prompt_tokens=tokens)
            max_tokens = room.max_tokens

    async def _exchange(
        self, request: GenerationRequest, body: dict[str, Any], *, deadline_s: float
    ) -> CompletionsReply:
        """Send one HTTP request, again and again while that may help.

        Raises:
            EngineError: see `generate`.
            _Failure: the request is too long, and nothing else.
        """
        n: int = body["n"]
        async with self._slot(n):
            began_s = self._clock()
            until_s = began_s + deadline_s
            attempt = 0
            while True:
                self._check_usable()
                tokens = self._expected_tokens(request.prompt, n, body["max_tokens"])
                # A limit of our own is no failure of the server.
                until_s += await self._keep_pace(tokens)
                await self._keep_quiet()
                attempt += 1
                try:
                    reply = await self._try(request, body, until_s - self._clock())
                except _Failure as failure:
                    pause_s = self._judge(failure, attempt)
                    if self._clock() + pause_s >= until_s:
                        self._stats.failed += 1
                        raise self._error(
                            f"gave up after {attempt} tries in {self._clock() - began_s:.0f} s, "
                            f"last: {failure.text}"
                        ) from None
                    self._stats.retries += 1
                    logger.info(
                        "A request is sent again in %.1f s: %s endpoint=%s attempt=%d",
                        pause_s,
                        failure.text,
                        self._name,
                        attempt,
                    )
                    await self._pause(pause_s)
                else:
                    return self._account(request, reply, tokens)

    @asynccontextmanager
    async def _slot(self, sequences: int) -> AsyncIterator[None]:
        self._stats.waiting_requests += 1
        self._waiting_sequences += sequences
        try:
            await self._slots.acquire()
        finally:
            self._stats.waiting_requests -= 1
            self._waiting_sequences -= sequences
        self._stats.running_requests += 1
        self._stats.running_sequences += sequences
        try:
            yield
        finally:
            self._stats.running_requests -= 1
            self._stats.running_sequences -= sequences
            self._slots.release()

    def _check_usable(self) -> None:
        budget = self.config.max_total_tokens
        read, written = self._stats.prompt_tokens, self._stats.generated_tokens
        if budget is not None and read + written >= budget and not self._stats.fatal:
            raise self._end(
                f"the budget of {budget:,} tokens (endpoint.max_total_tokens) is used up: "
                f"{read:,} in, {written:,} out; what is finished is kept, and the same command "
                "goes on with a new budget"
            )
        if self._stats.fatal:
            raise EngineError(self._stats.fatal)

    async def _keep_pace(self, tokens: float) -> float:
        """Wait for the rate limits; returns the seconds waited."""
        now_s = self._clock()
        wait_s = max(self._request_pace.take(1.0, now_s), self._token_pace.take(tokens, now_s))
        await self._pause(wait_s)
        return wait_s

    async def _keep_quiet(self) -> None:
        """Wait for the end of the pause that the server asked for, if it did."""
        while (wait_s := self._resume_s - self._clock()) > 0:
            await self._pause(wait_s)

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self._stats.paused_s += seconds
            await self._sleep(seconds)

    def _judge(self, failure: _Failure, attempt: int) -> float:
        """How long to wait before the request is sent again.

        Raises:
            EngineError: that would not help.
            _Failure: the request is too long.
        """
        if failure.kind is ErrorKind.TOO_LONG:
            raise failure
        # A server that never took a request will not take the next one for being another.
        refuses_all = failure.kind is ErrorKind.REFUSED and self._stats.requests == 0
        if failure.kind is ErrorKind.FATAL or refuses_all:
            self._stats.failed += 1
            raise self._end(failure.text) from None
        if failure.kind is ErrorKind.REFUSED:
            self._stats.failed += 1
            raise self._error(failure.text) from None
        own_s = backoff_s(
            attempt,
            first_s=self.config.first_pause_s,
            longest_s=self.config.max_pause_s,
            rng=self._rng,
        )
        if failure.status == 429:
            self._stats.throttled += 1
        if failure.pause_s is None:
            return own_s
        if failure.pause_s >= self.config.deadline_s:
            self._stats.failed += 1
            raise self._end(
                f"the server asks to come back in {failure.pause_s:,.0f} s, later than "
                f"endpoint.deadline_s allows: {failure.text}"
            ) from None
        self._resume_s = max(self._resume_s, self._clock() + failure.pause_s)
        # All that wait for the same moment must not come at the same moment.
        return failure.pause_s + self._rng.uniform(0.0, min(own_s, 1.0))

    async def _try(
        self, request: GenerationRequest, body: dict[str, Any], left_s: float
    ) -> CompletionsReply:
        """Send the request once.

        Raises:
            _Failure: it was not answered; says what can be done.
        """
        limit_s = self.config.request_timeout_s
        try:
            async with asyncio.timeout(min(limit_s, left_s)):
                return await self._post(request, body)
        except TimeoutError:
            when = f"within {limit_s:g} s" if limit_s <= left_s else "before the deadline"
            raise _Failure(f"no answer {when}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failure(self._clean(f"{type(error).__name__}: {error}")) from None
        except DialectError as error:
            raise _Failure(self._clean(str(error)), ErrorKind.FATAL) from None
        except (BadReplyError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _Failure(self._clean(f"no completion came: {error}")) from None

    async def _post(self, request: GenerationRequest, body: dict[str, Any]) -> CompletionsReply:
        asked: dict[str, Any] = {
            "n": body["n"],
            "stop": request.stop,
            "dialect": self.config.dialect,
            "logprobs": self.config.logprobs,
        }
        async with self._answer(body) as response:
            if not body.get("stream"):
                return read_reply(self._parse((await response.read()).decode("utf-8")), **asked)
            reader = StreamReader(**asked)
            async for event in _events(response.content):
                reader.feed(self._parse(event))
                if reader.ended:
                    # Leaving the response unread closes its connection, which ends the generation.
                    response.close()
                    break
            return reader.reply()

    @asynccontextmanager
    async def _answer(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a body that is sent, with status 200.

        Raises:
            _Failure: it has another status.
        """
        url = self.config.url
        async with self._client().post(
            url, json=body, proxy=proxy_for(url), allow_redirects=False
        ) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                raise _Failure(
                    f"HTTP {response.status} {response.reason or ''}: {self._clean(text)}",
                    judge_error(response.status, text),
                    status=response.status,
                    pause_s=retry_after_s(response.headers.get("Retry-After"), time.time()),
                )
            yield response

    def _parse(self, text: str) -> Any:
        """JSON of an answer with status 200.

        Raises:
            _Failure: it reports an error; some servers do so in the middle of a stream.
        """
        data = json.loads(text)
        error = data.get("error") if isinstance(data, dict) else None
        if not error:
            return data
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and code >= 400 else 500
        raise _Failure(f"HTTP 200, then: {self._clean(text)}", judge_error(status, text))

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._session = aiohttp.ClientSession(
                headers=headers,
                # The semaphore is the limit; time-outs are the callers'.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    # ---------------------------------------------------------------- accounts and errors

    def _account(
        self, request: GenerationRequest, reply: CompletionsReply, expected: float
    ) -> CompletionsReply:
        if reply.prompt_tokens is None:
            tokens = self._estimate(request.prompt)
        else:
            tokens = reply.prompt_tokens
            self._known_chars += len(request.prompt)
            self._known_tokens += tokens
        self._stats.requests += 1
        self._stats.prompt_tokens += tokens
        self._stats.cached_tokens += reply.cached_tokens
        self._stats.generated_tokens += reply.generated_tokens
        self._stats.estimated_requests += reply.estimated
        self._token_pace.settle(tokens + reply.generated_tokens - expected, self._clock())
        return replace(reply, prompt_tokens=tokens)

    def _estimate(self, prompt: str) -> int:
        return max(1, round(len(prompt) * self._known_tokens / self._known_chars))

    def _expected_tokens(self, prompt: str, n: int, max_tokens: int) -> float:
        """Tokens a request will come to, by those before it."""
        if self._stats.requests == 0:
            return self._estimate(prompt) + n * max_tokens
        return self._estimate(prompt) + self._stats.generated_tokens / self._stats.requests

    def _error(self, text: str) -> EngineError:
        return EngineError(f"endpoint {self.config.model} at {self.config.base_url}: {text}")

    def _end(self, text: str) -> EngineError:
        """The error of this call and of every later one."""
        error = self._error(text)
        self._stats.fatal, self._stats.healthy = str(error), False
        return error

    def _clean(self, text: str) -> str:
        """An excerpt of a server's text in one line, without the key: servers quote it."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= EXCERPT_CHARS else f"{text[:EXCERPT_CHARS]}..."


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """The data of server-sent events up to [DONE]."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    async for chunk in content.iter_any():
        rest += decoder.decode(chunk)
        *lines, rest = rest.split("\n")
        for line in lines:
            name, _, data = line.partition(":")
            if name.strip() != "data":
                continue
            if data.strip() == "[DONE]":
                return
            yield data


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address.

    aiohttp's own `trust_env` would also look for credentials in ~/.netrc and refuse to send both.
    """
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


EndpointActor = ray.remote(num_cpus=0)(EndpointPolicy)
