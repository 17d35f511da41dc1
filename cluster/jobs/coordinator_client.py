"""The coordinator as a worker sees it, and the same over the handle of its actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ray.exceptions import ActorUnavailableError, RayActorError

from cluster.jobs.coordinator import WorkerProgress
from cluster.jobs.queue import Lease


class CoordinatorClient(Protocol):
    """The coordinator as a worker sees it; see `Coordinator` for the contracts."""

    async def grant(self, worker: str) -> Lease | None: ...

    async def renew(
        self, worker: str, leases: Sequence[tuple[str, str]], progress: WorkerProgress
    ) -> list[str]: ...

    async def complete(self, job_id: str, lease_id: str) -> bool: ...

    async def release(self, job_id: str, lease_id: str) -> bool: ...

    async def fail(self, job_id: str, lease_id: str, error: str) -> bool: ...


class RemoteCoordinator:
    """`CoordinatorClient` over an actor handle; waits out a restart or replacement of the actor."""

    def __init__(
        self,
        handle: Any,
        *,
        find: Callable[[], Any] | None = None,
        patience_s: float = 120.0,
        backoff_s: float = 0.2,
    ) -> None:
        """
        Args:
            find: the handle of the actor that has taken the place of one that is gone for good, or
                None if there is none yet; blocks. Without it that is the end.
            patience_s: how long one call keeps trying while the actor is not there.
        """
        self.handle = handle
        self.find = find
        self.patience_s = patience_s
        self.backoff_s = backoff_s

    async def grant(self, worker: str) -> Lease | None:
        return await self._call("grant", worker)

    async def renew(
        self, worker: str, leases: Sequence[tuple[str, str]], progress: WorkerProgress
    ) -> list[str]:
        return await self._call("renew", worker, leases, progress)

    async def complete(self, job_id: str, lease_id: str) -> bool:
        return await self._call("complete", job_id, lease_id)

    async def release(self, job_id: str, lease_id: str) -> bool:
        return await self._call("release", job_id, lease_id)

    async def fail(self, job_id: str, lease_id: str, error: str) -> bool:
        return await self._call("fail", job_id, lease_id, error)

    async def _call(self, method: str, *arguments: Any) -> Any:
        give_up_s = time.monotonic() + self.patience_s
        while True:
            try:
                return await getattr(self.handle, method).remote(*arguments)
            except RayActorError as error:
                permanent = not isinstance(error, ActorUnavailableError)
                if (permanent and self.find is None) or time.monotonic() > give_up_s:
                    raise
                if permanent and self.find is not None:
                    other = await asyncio.to_thread(self.find)
                    self.handle = other if other is not None else self.handle
            await asyncio.sleep(self.backoff_s)
