"""Requests in flight are counted, and held back while weights are loaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.telemetry import metrics


class RequestGate:
    """Counts requests in flight and can hold new ones back until none is left."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._idle_s = 0.0
        self._idle_since_s = time.monotonic()

    def idle_from_now(self) -> None:
        """Start to count the time without a request anew."""
        self._idle_s, self._idle_since_s = 0.0, time.monotonic()

    def idle_s(self) -> float:
        """Seconds without a request in flight."""
        now_s = time.monotonic()
        return self._idle_s + (now_s - self._idle_since_s if not self.running else 0.0)

    @property
    def is_open(self) -> bool:
        """New requests pass."""
        return self._open.is_set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around one request; waits while somebody has the gate for himself."""
        self.waiting += 1
        began_s = time.monotonic()
        try:
            while not self.is_open:
                await self._open.wait()
        finally:
            self.waiting -= 1
        metrics.observe(metrics.ENGINE_WAIT, time.monotonic() - began_s)
        if not self.running:
            self._idle_s += time.monotonic() - self._idle_since_s
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle_since_s = time.monotonic()
                self._idle.set()

    @asynccontextmanager
    async def exclusive(self, timeout_s: float) -> AsyncIterator[None]:
        """Around what must not overlap with requests; for one caller at a time.

        Raises:
            TimeoutError: requests were still in flight after `timeout_s`; the gate is open again.
        """
        self._open.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
            yield
        finally:
            self._open.set()
