"""Awaiting within a time that counts only while the event loop runs."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from rollout.tasks import done_within, within


async def test_what_is_done_in_time_is_returned_and_what_it_raises_is_raised() -> None:
    assert await within(1.0, asyncio.sleep(0, "done")) == "done"

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await within(1.0, fail())


async def test_what_is_not_done_in_time_is_cancelled() -> None:
    task = asyncio.ensure_future(asyncio.Event().wait())
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done within 0.1 s"):
        await within(0.1, task)
    assert task.cancelled() and time.monotonic() - began_s >= 0.1


async def test_what_is_waited_for_with_the_caller_ends_with_it() -> None:
    task = asyncio.ensure_future(asyncio.Event().wait())
    caller = asyncio.create_task(within(60.0, task))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert task.cancelled()


async def test_an_answer_that_came_while_the_loop_stood_still_is_in_time() -> None:
    loop = asyncio.get_running_loop()
    for _ in range(5):
        answer = loop.create_future()
        # As Ray's do, from another thread; the loop sees it after its own timers.
        timer = threading.Timer(0.05, loop.call_soon_threadsafe, (answer.set_result, "here"))
        timer.start()
        waiting = asyncio.create_task(within(0.2, answer))
        await asyncio.sleep(0.01)
        time.sleep(0.5)
        assert await waiting == "here"


async def test_a_task_goes_on_that_was_not_done_in_time() -> None:
    late = asyncio.Event()
    task = asyncio.ensure_future(late.wait())
    assert not await done_within(task, 0.01)
    late.set()
    assert await done_within(task, 60.0)
