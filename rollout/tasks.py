"""Awaiting: several things that fail as one, and things that may take only so long.

A time that somebody may stay silent for is counted while this process listens: whoever is asked by
an event loop that then stands still (a long computation, a hung disk, SIGSTOP) has perhaps answered
long ago, and the loop had no chance to see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

SLICES = 20
"""Parts of a time; one in which the event loop stands still counts as no more than its length."""


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines side by side; results in order.

    The first failure cancels the others, waits for them to end and is raised as itself, so that
    callers catch `EngineError` and not a group of one. (`asyncio.gather` would leave the others
    running on states that are being closed.)
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


async def done_within(task: asyncio.Future[Any], limit_s: float) -> bool:
    """Wait for something, at most so many seconds in which the event loop ran; True if it is done.

    It goes on if it is not.
    """
    for _ in range(SLICES):
        done, _ = await asyncio.wait({task}, timeout=limit_s / SLICES)
        if done:
            return True
    return False


async def within(limit_s: float, work: Awaitable[T]) -> T:
    """What `work` returns, if it is done before the event loop has run for so many seconds.

    Raises:
        TimeoutError: it was not, and is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        if not await done_within(task, limit_s):
            raise TimeoutError(f"not done within {limit_s:g} s")
        return await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
