"""Requests in flight, and what must not overlap with them."""

from __future__ import annotations

import asyncio

import pytest

from cluster.engines.gate import RequestGate


async def test_gate_waits_for_running_requests_and_holds_new_ones_back() -> None:
    gate = RequestGate()
    events: list[str] = []
    first_may_end = asyncio.Event()

    async def request(name: str, end: asyncio.Event | None) -> None:
        async with gate.request():
            events.append(f"{name} in")
            if end is not None:
                await end.wait()
            events.append(f"{name} out")

    async def load() -> None:
        async with gate.exclusive(timeout_s=10):
            events.append("load")

    first = asyncio.create_task(request("first", first_may_end))
    await asyncio.sleep(0)
    loading = asyncio.create_task(load())
    await asyncio.sleep(0)
    second = asyncio.create_task(request("second", None))
    await asyncio.sleep(0)
    assert (gate.running, gate.waiting) == (1, 1)
    first_may_end.set()
    await asyncio.gather(first, loading, second)
    assert events == ["first in", "first out", "load", "second in", "second out"]
    assert (gate.running, gate.waiting) == (0, 0)


async def test_gate_opens_again_when_requests_do_not_end_in_time() -> None:
    gate = RequestGate()
    async with gate.request():
        with pytest.raises(TimeoutError):
            async with gate.exclusive(timeout_s=0.01):
                pass
        async with gate.request():
            assert gate.running == 2
