"""One start of a run: its folder is held, its account kept, and its fleet ended whatever happens.

with session.held():                     lock, config, store; RUN/live.json until it ends
    async with session.fleet_shown():    progress view; the fleet is stopped last
        await session.fleet.start(...)

Meanwhile, every `LOOK_S`: what `rstar set` has written is taken over, and what is up is booked
(`cluster.machines.cost`). A budget that is spent ends the run as Ctrl-C does, where
`cost.on_budget` says so, and no start begins before it is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.fleet.config import ServingConfig
from cluster.fleet.fleet import Fleet
from cluster.folder.changes import Change, Changes, live_values, with_values
from cluster.folder.lineage import record_start
from cluster.folder.run_folder import COST, RunFolder, RunFolderError
from cluster.machines.cost import CostAccount
from cluster.telemetry.live import LiveFile, StoppedError
from cluster.telemetry.progress import ProgressView
from cluster.telemetry.tracking import Following

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Pause between two looks for changes."""

BOOK_S = 10.0
"""Pause between two looks at what is up."""

LAST_BOOK_S = 5.0
"""How long the last one may take."""


class Session:
    """What the commands that search have in common, from their config to their end."""

    def __init__(self, config: ServingConfig, view: ProgressView) -> None:
        self.view = view
        self.folder = RunFolder(config.run_dir, storage=config.storage.client)
        self._given = config
        self.changes = Changes(self.folder)
        self.config = self.changes.effective(config)
        """With what was changed since the first start."""
        cost = self.config.cost
        self.account = CostAccount(cost.prices, usd_per_hour=cost.usd_per_hour)
        self._booked_s = float("-inf")
        self._told_budget: float | None = None
        """Of which it was said that it is spent."""
        self._spent = ""
        """Why the run is being ended; "" if it is not."""
        self.fleet = Fleet(self.config, self.folder)
        self.store = self.fleet.store
        self.fleet.note = view.note

    @contextmanager
    def held(self) -> Iterator[LiveFile]:
        """Hold the run's folder as its one driver, and tell there what goes on.

        Raises:
            RunFolderError: it cannot be written, its store has no create-only writes, or another
                process holds it.
            ConfigError: the run was started with another config; names the keys that differ. Or a
                tracker is not installed.
            StoppedError: its budget is spent, and nothing may be started before it is raised.
        """
        with self.folder.locked():
            self.folder.keep_config(self.config)
            self.changes.record_start(self._given)
            self.view.change = self.changes.last
            if (record := self.folder.read(COST)) is not None:
                self.account.take_up(record)
            if self.config.cost.on_budget == "drain" and (spent := self._is_spent()):
                raise StoppedError(spent)
            with LiveFile(
                self.folder.store, self.view.snapshot, fleet=self.fleet.pools.account
            ) as live:
                self._tell_cost()
                Following(self.folder, self.config.tracking, self.view.note).start()
                yield live

    @asynccontextmanager
    async def fleet_shown(self) -> AsyncIterator[Fleet]:
        """The fleet, not started yet, with the progress view; stopped in good order at the end.

        Raises:
            StoppedError: the budget was spent meanwhile.
        """
        run = asyncio.current_task()
        assert run is not None
        looking = asyncio.create_task(self._look_forever(run), name="changes-and-cost")
        try:
            with self.view:
                yield self.fleet
        except asyncio.CancelledError:
            if not self._spent:
                raise
            run.uncancel()
            raise StoppedError(self._spent) from None
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            try:
                async with asyncio.timeout(LAST_BOOK_S):
                    await self._book()
            except Exception:  # of a Ray that is gone; the actors end all the same
                logger.info("The last seconds were not booked", exc_info=True)
            await self.fleet.stop(self.view.note)

    async def record_start(self, inputs: Iterable[Path | None]) -> None:
        """Write down code, packages, machine and the digests of what the run starts from."""
        given = [path for path in inputs if path is not None]
        await asyncio.to_thread(record_start, self.folder, given)

    # ---------------------------------------------------------------- changes and cost

    async def _look_forever(self, run: asyncio.Task[Any]) -> None:
        complained = False
        while True:
            try:
                newer = await asyncio.to_thread(self.changes.newer)
                for change in newer:
                    self._take(change)
                if newer or time.monotonic() - self._booked_s >= BOOK_S:
                    await self._book()
                    self._mind_budget(run)
            except Exception:
                # A store that is away, Ray that is busy: looked at again.
                if not complained:
                    complained = True
                    logger.warning("Changes and cost could not be looked at", exc_info=True)
            await asyncio.sleep(LOOK_S)

    def _take(self, change: Change) -> None:
        """Go on as somebody has set it."""
        before = live_values(self.config)
        values = {key: value for key, value in change.values.items() if key in before}
        self.view.change = change.number
        try:
            self.config = with_values(self.config, values)
        except ValidationError as error:  # two changes that do not go together
            self.view.note(f"what {change.who} set is not taken over: {error.errors()[0]['msg']}")
            return
        self.fleet.change(self.config)
        cost = self.config.cost
        self.account.prices, self.account.usd_per_hour = cost.prices, cost.usd_per_hour
        for key, value in values.items():
            self.view.note(f"{key} = {value!r}, before {before[key]!r}: set by {change.who}")

    async def _book(self) -> None:
        """Book what is up, and write the account down."""
        self._booked_s = time.monotonic()
        with contextlib.suppress(RunFolderError):  # the next one has it all
            uses = await self.fleet.uses()
            if uses:
                self.account.look(time.time(), uses, self.view.stage_name)
                await asyncio.to_thread(self.folder.write, COST, self.account.record())
        self._tell_cost()

    def _tell_cost(self) -> None:
        if self.account.known:
            self.view.cost_usd, self.view.usd_per_hour = self.account.usd, self.account.rate

    def _is_spent(self) -> str:
        """What to say of a budget that is spent; "" if it is not."""
        budget, usd = self.config.cost.budget_usd, self.account.usd
        if budget is None or usd < budget:
            return ""
        return (
            f"the run has cost ${usd:,.2f}, its budget is ${budget:,.2f}; raise it with "
            f"`rstar set {self.folder.store.root} cost.budget_usd=...`"
        )

    def _mind_budget(self, run: asyncio.Task[Any]) -> None:
        cost, spent = self.config.cost, self._is_spent()
        if not spent or self._spent:
            return
        if cost.on_budget == "drain":
            self._spent = f"{spent}, then start it again: it goes on where it stopped"
            self.view.stop_requested()
            run.cancel()
        elif self._told_budget != cost.budget_usd:
            self._told_budget = cost.budget_usd
            self.view.note(f"{spent} (cost.on_budget: warn, so it goes on)")
