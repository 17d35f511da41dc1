"""One start of a run: its folder is held, its account kept, and its fleet ended whatever happens.

with session.held():                     lock, config, store; RUN/live.json until it ends
    async with session.fleet_shown():    progress view; the fleet is stopped last
        await session.fleet.start(...)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from cluster.fleet.config import ServingConfig
from cluster.fleet.fleet import Fleet
from cluster.folder.lineage import record_start
from cluster.folder.run_folder import RunFolder
from cluster.telemetry.live import LiveFile
from cluster.telemetry.progress import ProgressView


class Session:
    """What the commands that search have in common, from their config to their end."""

    def __init__(self, config: ServingConfig, view: ProgressView) -> None:
        self.config = config
        self.view = view
        self.folder = RunFolder(config.run_dir, storage=config.storage.client)
        self.fleet = Fleet(config, self.folder)
        self.store = self.fleet.store
        self.fleet.note = view.note

    @contextmanager
    def held(self) -> Iterator[LiveFile]:
        """Hold the run's folder as its one driver, and tell there what goes on.

        Raises:
            RunFolderError: it cannot be written, its store has no create-only writes, or another
                process holds it.
            ConfigError: the run was started with another config; names the keys that differ.
        """
        with self.folder.locked():
            self.folder.keep_config(self.config)
            with LiveFile(self.folder.store, self.view.snapshot) as live:
                self.view.seconds_before = live.seconds_before
                self.view.usd_per_hour = self.config.cost.usd_per_hour
                yield live

    @asynccontextmanager
    async def fleet_shown(self) -> AsyncIterator[Fleet]:
        """The fleet, not started yet, with the progress view; stopped in good order at the end."""
        try:
            with self.view:
                yield self.fleet
        finally:
            await self.fleet.stop(self.view.note)

    async def record_start(self, inputs: Iterable[Path | None]) -> None:
        """Write down code, packages, machine and the digests of what the run starts from."""
        given = [path for path in inputs if path is not None]
        await asyncio.to_thread(record_start, self.folder, given)
