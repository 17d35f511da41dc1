"""The forms of the step sandbox behind one blocking interface, for the conformance suite."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from verifier import AsyncSandbox, Sandbox, SandboxLimits, StepResult


class Backend(Protocol):
    """What the conformance suite calls; `verifier.Sandbox` says what each does."""

    def open(self, problem_id: str, *, flavour: str = "base", seed: int = 0) -> str: ...

    def run(
        self, state: str, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]: ...

    def evict(self, state: str) -> None: ...

    def close(self, problem_id: str) -> None: ...

    def stats(self) -> dict[str, Any]: ...

    def capabilities(self) -> Any: ...

    def shutdown(self) -> None: ...


class AwaitingBackend:
    """`AsyncSandbox` on an event loop of its own thread."""

    def __init__(self, limits: SandboxLimits, isolation: Any) -> None:
        self._sandbox = AsyncSandbox(limits, isolation)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = self._sandbox._client
        self.limits = limits

    def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def open(self, problem_id: str, *, flavour: str = "base", seed: int = 0) -> str:
        return self._wait(self._sandbox.open(problem_id, flavour=flavour, seed=seed))

    def run(
        self, state: str, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        return self._wait(self._sandbox.run(state, codes, limits))

    def evict(self, state: str) -> None:
        self._wait(self._sandbox.evict(state))

    def close(self, problem_id: str) -> None:
        self._wait(self._sandbox.close(problem_id))

    def stats(self) -> dict[str, Any]:
        return self._wait(self._sandbox.stats())

    def capabilities(self) -> Any:
        return self._sandbox.capabilities()

    def shutdown(self) -> None:
        self._sandbox.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class ActorBackend:
    """The Ray actor of the pool."""

    def __init__(self, limits: SandboxLimits, isolation: Any) -> None:
        import ray

        from cluster.jobs.sandbox_worker import SandboxWorker

        class Whole(SandboxWorker):
            """With what only the suite asks for."""

            async def evict(self, state: str) -> None:
                await self._sandbox.evict(state)

            def capabilities(self) -> dict[str, Any]:
                return dict(self._sandbox.capabilities())

        ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        self._ray = ray
        self._actor = ray.remote(num_cpus=1)(Whole).remote(limits, isolation)

    def _call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        try:
            return self._ray.get(getattr(self._actor, method).remote(*arguments, **settings))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def open(self, problem_id: str, *, flavour: str = "base", seed: int = 0) -> str:
        return self._call("open", problem_id, flavour=flavour, seed=seed)

    def run(
        self, state: str, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        return self._call("run", state, codes, limits)

    def evict(self, state: str) -> None:
        self._call("evict", state)

    def close(self, problem_id: str) -> None:
        self._call("close", problem_id)

    def stats(self) -> dict[str, Any]:
        return self._call("stats")

    def capabilities(self) -> Any:
        return self._call("capabilities")

    def shutdown(self) -> None:
        self._call("shutdown")
        self._ray.shutdown()


BACKENDS: dict[str, type[Any]] = {
    "blocking": Sandbox,
    "awaiting": AwaitingBackend,
    "actor": ActorBackend,
}


def start_backend(name: str, limits: SandboxLimits, isolation: str) -> Backend:
    """A running sandbox of that form.

    Raises:
        ValueError: no such form.
    """
    if name not in BACKENDS:
        raise ValueError(f"RSTAR_SANDBOX_BACKEND must be one of {', '.join(BACKENDS)}: {name!r}")
    return BACKENDS[name](limits, isolation)
