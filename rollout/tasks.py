"""Several awaits at once that fail as one: for code that is itself a part of something larger."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


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
