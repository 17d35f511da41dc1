"""Replicas without a model: actors as in `cluster.engines.replica`, a script in place of an engine.

They take the same arguments and have the same methods, so that a `Fleet` can be run on them. What
they say is a function of the request alone, which is what makes runs comparable.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

from cluster.engines.lifecycle import ReplicaInfo, ReplicaStats
from cluster.jobs.admission import EnginePressure
from rollout.engine import (
    EvaluationReply,
    EvaluationRequest,
    GenerationReply,
    GenerationRequest,
    LogprobReply,
    LogprobRequest,
)
from tests.fakes import ScriptedPolicy, TablePreference, random_steps

HELD = "How many are left?"
"""The question of problems that a test can hold back, with the checkpoint's path as hold file."""


class ScriptedReplica:
    """What both kinds share; a version is all there is to load."""

    delay_s = 0.01
    """Of each request: not too fast to be killed at work."""

    def __init__(
        self, path: str, config: Any = None, *, version: str, name: str, stage: Any = None
    ) -> None:
        self.path, self.version, self.name = path, version, name
        self.requests = 0
        self.running = 0

    async def ready(self) -> ReplicaInfo:
        return ReplicaInfo(
            name=self.name,
            version=self.version,
            path=self.path,
            device="cpu",
            pid=os.getpid(),
        )

    async def load(self, path: str, version: str, *, force: bool = False) -> float:
        self.path, self.version = path, version
        return 0.0

    async def fingerprint(self) -> tuple[float, ...]:
        return tuple(map(float, self.version.encode()))

    async def stats(self) -> ReplicaStats:
        return ReplicaStats(
            name=self.name,
            version=self.version,
            healthy=True,
            requests=self.requests,
            running_requests=self.running,
            running_sequences=self.running,
        )

    async def pressure(self) -> EnginePressure:
        return EnginePressure(
            running=self.running, waiting=0, kv_usage=0.0, preemptions=0, requests=self.running
        )

    async def shutdown(self) -> None:
        return None

    async def _work(self) -> None:
        self.running += 1
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.running -= 1
        self.requests += 1


class ScriptedPolicyReplica(ScriptedReplica):
    """Writes steps drawn from the request's seed; says nothing to `HELD` while `path` exists."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        while HELD in request.prompt and Path(self.path).exists():
            await asyncio.sleep(0.05)
        await self._work()
        return await ScriptedPolicy(random_steps, version=self.version).generate(request)

    async def logprobs(self, request: LogprobRequest) -> LogprobReply:
        await self._work()
        return await ScriptedPolicy(random_steps, version=self.version).logprobs(request)


class ScriptedPreferenceReplica(ScriptedReplica):
    """Values a text by its hash."""

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        await self._work()
        return await TablePreference(hash_value, version=self.version).evaluate(request)


def hash_value(text: str) -> float:
    """A number in [-1, 1) that depends on all of the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**31 - 1
