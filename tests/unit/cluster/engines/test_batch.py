"""The batching of a pooling engine, over a fake of vLLM's offline engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.engines import batch as batch_engine
from cluster.engines.batch import BatchEngine


class Number:
    """A tensor of one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def squeeze(self) -> float:
        return self.value


class FakeLLM:
    """Values a row by the sum of its tokens; waits while the test holds it."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.salts: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        core = SimpleNamespace(shutdown=lambda: self.told.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=core)
        self.told: list[str] = []

    def encode(self, prompts: list[dict[str, Any]], **_: Any) -> list[Any]:
        self.batches.append([tuple(prompt["prompt_token_ids"]) for prompt in prompts])
        self.salts |= {prompt["cache_salt"] for prompt in prompts}
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [
            SimpleNamespace(
                outputs=SimpleNamespace(data=Number(sum(prompt["prompt_token_ids"]))),
                num_cached_tokens=len(prompt["prompt_token_ids"]) - 1,
            )
            for prompt in prompts
        ]

    def collective_rpc(self, method: str, kwargs: Any) -> str:
        self.told.append(method)
        return "done"

    def reset_prefix_cache(self) -> None:
        self.told.append("reset")


@dataclass
class Setting:
    llm: FakeLLM
    engine: BatchEngine

    async def until_batches(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.llm.batches) < count:
                await asyncio.sleep(0.001)


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    llm = FakeLLM()
    monkeypatch.setattr(batch_engine, "_make_engine", lambda arguments: llm)
    engine = BatchEngine({})
    yield Setting(llm, engine)
    llm.gate.set()
    engine.shutdown()


async def test_rows_of_a_request_are_one_batch_and_keep_their_order(setting: Setting) -> None:
    assert await setting.engine.outputs([[1, 2], [7], [3]], "v1") == ([3.0, 7.0, 3.0], 1)
    assert setting.llm.batches == [[(1, 2), (7,), (3,)]]
    assert setting.llm.salts == {"v1"}


async def test_requests_that_come_during_a_batch_are_the_next_batch(setting: Setting) -> None:
    setting.llm.gate.clear()
    first = asyncio.create_task(setting.engine.outputs([[1]], "s"))
    await setting.until_batches(1)
    late = [asyncio.create_task(setting.engine.outputs([[n], [n + 1]], "s")) for n in (2, 4)]
    await asyncio.sleep(0.01)
    setting.llm.gate.set()
    assert [found for found, _ in await asyncio.gather(first, *late)] == [[1], [2, 3], [4, 5]]
    assert setting.llm.batches == [[(1,)], [(2,), (3,), (4,), (5,)]]


async def test_requests_in_quick_succession_are_gathered(setting: Setting) -> None:
    setting.engine._gather_s = 1.0  # much longer than a busy machine needs for the next request
    for _ in range(20):
        setting.engine._note_arrival(time.monotonic())
    first = asyncio.create_task(setting.engine.outputs([[1]], "s"))
    await asyncio.sleep(0.002)
    await asyncio.gather(first, setting.engine.outputs([[2]], "s"))
    assert setting.llm.batches == [[(1,), (2,)]]


async def test_a_lone_search_is_not_held_up(setting: Setting) -> None:
    for now_s in (0.0, 0.1, 0.2, 0.3):
        setting.engine._note_arrival(now_s)
    assert setting.engine._gap_s > setting.engine._gather_s


async def test_no_rows_need_no_engine(setting: Setting) -> None:
    assert await setting.engine.outputs([], "s") == ([], 0)
    assert setting.llm.batches == []


async def test_a_request_given_up_while_it_waits_is_not_run(setting: Setting) -> None:
    setting.llm.gate.clear()
    first = asyncio.create_task(setting.engine.outputs([[1]], "s"))
    await setting.until_batches(1)
    late = asyncio.create_task(setting.engine.outputs([[2]], "s"))
    await asyncio.sleep(0)
    late.cancel()
    last = asyncio.create_task(setting.engine.outputs([[3]], "s"))
    await asyncio.sleep(0)
    setting.llm.gate.set()
    await asyncio.gather(first, last)
    assert setting.llm.batches == [[(1,)], [(3,)]]


async def test_an_engine_that_failed_answers_nothing_any_more(setting: Setting) -> None:
    assert not setting.engine.errored
    setting.llm.error = ValueError("out of cache")
    with pytest.raises(RuntimeError, match="the engine failed: out of cache"):
        await setting.engine.outputs([[1]], "s")
    assert setting.engine.errored
    setting.llm.error = None
    with pytest.raises(RuntimeError, match="failed before: out of cache"):
        await setting.engine.outputs([[1]], "s")


async def test_other_calls_run_between_batches(setting: Setting) -> None:
    assert await setting.engine.collective_rpc("reload_weights") == "done"
    await setting.engine.reset_prefix_cache()
    assert setting.llm.told == ["reload_weights", "reset"]
