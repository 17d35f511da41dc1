"""The endpoint client against a real vLLM server on the CPU, with a small random model.

The same seeded request must give the same completions in both dialects: in one the server matches
the stop strings, in the other this side does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.engines.config import EndpointConfig
from cluster.engines.endpoint import EndpointPolicy
from rollout.engine import EngineError, FinishReason, GenerationRequest
from rollout.prompt import END_OF_STEP, SHORT_TEMPLATE, render_question
from tests.vllm_server import serving_model

pytestmark = pytest.mark.slow

MAX_MODEL_LEN = 256
# A server that hides special tokens would hide the markers.
SHOW_MARKERS = {"skip_special_tokens": False, "spaces_between_special_tokens": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server and what its random model may write."""

    url: str
    allowed: list[int]
    """Tokens that are whole characters: halves are put together differently in a stream."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from transformers import AutoTokenizer

    from learner.miniature import write_base_model
    from rollout.problems.miniature import generate

    folder = tmp_path_factory.mktemp("server")
    world = generate(seed=0, num_demonstrations=60, num_train=60, num_test=6)
    texts = [p.text for p in (*world.demonstrations, *world.train)]
    texts += [p.solution for p in world.demonstrations]
    model = write_base_model(folder / "model", seed=0, texts=texts)
    tokenizer = AutoTokenizer.from_pretrained(model)
    allowed = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isascii()]
    with serving_model(model, folder / "log", max_model_len=MAX_MODEL_LEN) as url:
        yield Server(url=url, allowed=allowed)


@asynccontextmanager
async def policy(server: Server, dialect: str, **more: Any) -> AsyncIterator[EndpointPolicy]:
    extra = SHOW_MARKERS if dialect == "openai" else {}
    settings: dict[str, Any] = {
        "base_url": server.url,
        "model": "mini",
        "dialect": dialect,
        "extra_body": {**extra, "allowed_token_ids": server.allowed},
    }
    client = EndpointPolicy(EndpointConfig.model_validate(settings | more))
    try:
        yield client
    finally:
        await client.shutdown()


def request(question: str = "There are 12 boxes.", **more: Any) -> GenerationRequest:
    return GenerationRequest(
        **{
            "prompt": render_question(question, SHORT_TEMPLATE),
            "num_candidates": 6,
            "max_tokens": 48,
            "seed": 11,
            # Of a model that writes noise, some completions end in each of these ways.
            "stop": (END_OF_STEP, "0", "th", "s "),
            **more,
        }
    )


async def test_both_dialects_give_the_same_completions(server: Server) -> None:
    questions = ("There are 12 boxes.", "Ann reads 4 pages a day.", "Solve 3*x + 4 = 19 for x.")
    found = {}
    for dialect in ("vllm", "openai"):
        async with policy(server, dialect, logprobs=True) as client:
            await client.ready()
            replies = [await client.generate(request(question)) for question in questions]
            found[dialect] = [completion for reply in replies for completion in reply.completions]
    theirs, ours = found["vllm"], found["openai"]
    assert [(c.text, c.finish, c.stop_string) for c in theirs] == [
        (c.text, c.finish, c.stop_string) for c in ours
    ]
    assert {c.finish for c in ours} >= {FinishReason.STOP}
    assert len({c.stop_string for c in ours}) >= 2
    assert all(c.stop_string is None or c.text.endswith(c.stop_string) for c in ours)
    assert [c.logprob for c in theirs] == pytest.approx([c.logprob for c in ours], abs=1e-3)
    assert [c.num_tokens for c in theirs] == [c.num_tokens for c in ours]


async def test_more_stop_strings_than_the_server_takes_are_no_error(server: Server) -> None:
    stop = ("0", "th", "s ", "x", "q", "1")
    async with policy(server, "vllm") as client, policy(server, "openai") as other:
        ours = (await client.generate(request(stop=stop))).completions
        theirs = (await other.generate(request(stop=stop))).completions
        stats = await client.stats()
    assert [(c.text, c.stop_string) for c in ours] == [(c.text, c.stop_string) for c in theirs]
    assert {c.stop_string for c in ours} & set(stop)
    assert stats.estimated_requests == 0
    assert stats.generated_tokens >= sum(c.num_tokens for c in ours) > 6


async def test_server_counts_tokens_and_what_came_from_its_cache(server: Server) -> None:
    asked = request("A question that is asked twice. " * 4, stop=(), max_tokens=4)
    async with policy(server, "vllm") as client:
        first = await client.generate(asked)
        again = await client.generate(asked)
        stats = await client.stats()
    assert again.cached_tokens >= 32
    assert again.prompt_tokens == first.prompt_tokens > 32
    assert sum(c.num_tokens for c in again.completions) == 24
    assert (stats.requests, stats.generated_tokens, stats.estimated_requests) == (2, 48, 0)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
async def test_room_in_the_context_is_found(server: Server, dialect: str) -> None:
    async with policy(server, dialect) as client:
        long = await client.generate(request("word " * 1000, num_candidates=2))
        reply = await client.generate(request(max_tokens=4096, num_candidates=1, stop=()))
        stats = await client.stats()
    assert [c.finish for c in long.completions] == [FinishReason.PROMPT_TOO_LONG] * 2
    assert reply.prompt_tokens + reply.completions[0].num_tokens <= MAX_MODEL_LEN
    assert reply.completions[0].num_tokens > MAX_MODEL_LEN // 2 or (
        reply.completions[0].finish is FinishReason.STOP
    )
    assert (stats.too_long, stats.fatal) == (1, "")


async def test_unknown_model_is_named(server: Server) -> None:
    async with policy(server, "vllm", model="no-such-model") as client:
        with pytest.raises(EngineError, match=r"HTTP 404 .*no-such-model"):
            await client.ready()
