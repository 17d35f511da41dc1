"""`rstar serve` over scripted engines: the real HTTP server, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from cluster.serve.app import Server
from cluster.serve.config import ServeConfig
from cluster.serve.keys import Keys
from cluster.serve.service import Engines, Service
from rollout.engine import GenerationRequest
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference, random_steps
from tests.scripted_replicas import hash_value


def serve_config(**given: Any) -> ServeConfig:
    """Small searches under the short template; `serve` and the like may be given."""
    data: dict[str, Any] = {
        "run_dir": Path("/nowhere"),
        "policy": "policy",
        "ppm": "ppm",
        "search": {"template": "short", "num_candidates": 3},
        "method": {"num_trajectories": 4},
    }
    return ServeConfig.model_validate(data | given)


def scripted_engines(**policy: Any) -> Engines:
    """Engines that write, run and value steps for the question "3"."""
    return Engines(
        policy=ScriptedPolicy(random_steps, **policy),
        preference=TablePreference(hash_value),
        sandbox=ScriptedSandbox(default="3\n"),
    )


class Stuck(ScriptedPolicy):
    """Answers so many requests and no more."""

    def __init__(self, requests: int) -> None:
        super().__init__(random_steps)
        self.most = requests

    async def generate(self, request: GenerationRequest) -> Any:
        if len(self.requests) >= self.most:
            await asyncio.Event().wait()
        return await super().generate(request)


@asynccontextmanager
async def serving(
    engines: Engines | None = None,
    *,
    config: ServeConfig | None = None,
    keys: Keys | None = None,
    why_not_ready: Any = lambda: "",
) -> AsyncIterator[tuple[str, Server]]:
    """Address and server, until the block ends."""
    config = config or serve_config()
    service = Service(engines or scripted_engines(), config.serve)
    server = Server(service, config, keys or Keys({}), why_not_ready)
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", server
    finally:
        await runner.cleanup()
