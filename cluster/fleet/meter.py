"""What the driver looks at, so that it can be seen from outside: pools, jobs, cost, nodes.

    every sample_s:  keepers, replicas, sandboxes, coordinator, Ray's nodes, RUN/live.json
                     --> Exporter --> endpoint, samples
    told at once:    progress of a fit, status of a round, stalls
    all the time:    how late the driver's event loop is

Replicas are asked for their own account with a deadline; one that does not answer has no value this
time, instead of an old one. A look never raises and never holds up the run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.fleet.keeper import PoolKeeper
from cluster.fleet.stall import Stall
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.jobs.coordinator import CoordinatorStats, RoundStatus
from cluster.jobs.queue import JobState
from cluster.machines import nodes
from cluster.machines.scaler import MemberState
from cluster.telemetry import metrics
from cluster.telemetry.exporter import Exporter, ExporterError, MetricsConfig
from cluster.telemetry.live import Live, read_live
from cluster.telemetry.process_times import ProcessTimes
from learner.fit import FitProgress, FitResult
from rollout.engine import EngineError
from rollout.store import Totals

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
"""A replica that has not said how it is by then is left out of this look."""

LAST_S = 2.5
"""After the end of an actor its node's agent has its last counts."""

PULSE_S = 0.1
"""Between two moments at which the event loop is expected to come by."""

STOOD_STILL_S = 10.0
"""A lag of the event loop that is worth a line in the log."""

ENGINES = ("policy", "ppm")
LEASE_EVENTS = (
    *("granted", "adopted"),
    *("completed", "released", "failed", "expired", "superseded"),
)


PRESENT = (metrics.ENGINE_RUNNING, metrics.ENGINE_WAITING, metrics.KV_USED, metrics.ENGINE_MEMORY)
"""What a replica that is gone has no value of any more."""


class Meter:
    """Looks at one fleet and tells an `Exporter`; see the module."""

    def __init__(
        self,
        config: MetricsConfig,
        folder: RunFolder,
        keepers: Mapping[str, PoolKeeper] | None,
        *,
        budget_usd: float | None = None,
        account: Callable[[], Live | None] | None = None,
    ) -> None:
        """
        Args:
            keepers: of the fleet, by pool; looked at again each time. None: nothing of Ray's is.
            account: of the driver; None: that in the run's folder.
        """
        self.config = config
        self.run = folder.name
        self._folder = folder
        self._keepers = {} if keepers is None else keepers  # which are not there yet
        self._asks_ray = keepers is not None
        self._account = account or (lambda: read_live(folder.store))
        self._exporter = Exporter(folder.store, self.run, config)
        self._watching: asyncio.Task[None] | None = None
        self._pulse: asyncio.Task[None] | None = None
        self._lag_s = 0.0
        self._times = ProcessTimes()
        self._status: RoundStatus | None = None
        self._stalls: Sequence[Stall] = ()
        self._open_trees = 0
        self._nodes_seen: set[str] = set()
        self.budget_usd = budget_usd

    # ------------------------------------------------------------------ life

    def prepare(self) -> dict[str, str]:
        """Have this process count, before Ray starts; returns the variables of its actors."""
        if not self.config.enabled:
            return {}
        self.run = self._folder.label  # which it has now
        self._exporter.name(self.run)
        metrics.switch_on(self.run)
        return {metrics.VARIABLE: self.run}

    def start(self) -> None:
        """Open the endpoint and begin to look; a running event loop and Ray are needed.

        Raises:
            EngineError: the endpoint's port is taken.
        """
        if not self.config.enabled or self._watching is not None:
            return
        try:
            self._exporter.start()
        except ExporterError as error:
            raise EngineError(str(error)) from error
        self._watching = asyncio.create_task(self._watch(), name="metrics")
        self._pulse = asyncio.create_task(self._feel_pulse(), name="pulse")

    async def stop(self) -> None:
        """Look a last time, then close the endpoint; harmless if it was never started.

        Actors that have ended by now are in it with all that they counted.
        """
        if self._watching is not None and self._pulse is not None:
            for task in (self._watching, self._pulse):
                task.cancel()
            await asyncio.gather(self._watching, self._pulse, return_exceptions=True)
            self._watching = self._pulse = None
            self._look_at_run()
            await asyncio.to_thread(self._look_at_processes)
            if self._exporter.has_agents:
                await asyncio.sleep(LAST_S)
            await asyncio.to_thread(self._exporter.sample)
            await asyncio.to_thread(self._exporter.stop)
        metrics.switch_on("")

    async def _watch(self) -> None:
        complained = False
        self._look_at_earlier_rounds()
        while True:
            try:
                await self.look()
            except Exception:
                if not complained:
                    complained = True
                    logger.warning("The run could not be looked at", exc_info=True)
            await asyncio.to_thread(self._exporter.sample)
            await asyncio.sleep(self.config.sample_s)

    async def _feel_pulse(self) -> None:
        """Measure for how long the event loop stands still, while nobody is heard."""
        while True:
            slept_s = time.monotonic()
            await asyncio.sleep(PULSE_S)
            lag_s = time.monotonic() - slept_s - PULSE_S
            self._lag_s = max(self._lag_s, lag_s)
            if lag_s > STOOD_STILL_S:
                logger.warning("The driver's event loop stood still for %.0f s", lag_s)

    # ------------------------------------------------------------------ told

    def tell_round(
        self, status: RoundStatus, *, open_trees: int, stalls: Sequence[Stall] = ()
    ) -> None:
        """Where the present round stands."""
        self._status, self._open_trees, self._stalls = status, open_trees, stalls

    def end_round(self) -> None:
        """No search is in hand any more."""
        self._look_at_run()
        self._stalls, self._open_trees = (), 0

    def tell_service(self, *, running: int, waiting: int) -> None:
        """Searches that `rstar serve` has in hand."""
        self._exporter.set(metrics.SERVE_SEARCHES, running, state="running")
        self._exporter.set(metrics.SERVE_SEARCHES, waiting, state="waiting")

    def tell_fit(self, progress: FitProgress) -> None:
        """Where a training run stands; any thread."""
        if progress.phase != "training":
            return
        kind = progress.fit_id.rpartition("/")[2]
        told: dict[metrics.Metric, float | None] = {
            metrics.LEARNER_STEP: progress.step,
            metrics.LEARNER_STEPS: progress.num_steps,
            metrics.LEARNER_LOSS: progress.loss,
            metrics.LEARNER_TOKENS: progress.tokens_per_s,
            metrics.LEARNER_GRAD_NORM: progress.grad_norm,
            metrics.LEARNER_MFU: progress.mfu,
        }
        for metric, value in told.items():
            self._exporter.set(metric, value, kind=kind)

    def end_fit(self, result: FitResult) -> None:
        """A training run is over; any thread."""
        for metric in (metrics.LEARNER_TOKENS, metrics.LEARNER_MFU, metrics.LEARNER_GRAD_NORM):
            self._exporter.clear(metric)
        for metric, name in (
            (metrics.LEARNER_PAIR_ACCURACY, "pair_accuracy"),
            (metrics.LEARNER_PAIR_MARGIN, "pair_margin"),
        ):
            if name in result.metrics:
                self._exporter.set(metric, result.metrics[name])

    def tell_ruler(self, record: Mapping[str, Any]) -> None:
        """What a PPM was measured to rank right (`cluster.evaluation.ruler`)."""
        found = {name: own["mean"] for name, own in record["rankings"].items()}
        if "ppm" in found:
            found["low"] = record["rankings"]["ppm"]["low"]
        self._exporter.clear(metrics.RULER_ACCURACY)
        for name, share in found.items():
            self._exporter.set(metrics.RULER_ACCURACY, share, of=name)
        self._exporter.set(metrics.PPM_STEERS, float(record["passes"]))

    # ------------------------------------------------------------------ looks

    async def look(self) -> None:
        """Look at everything once."""
        self._exporter.set(metrics.LOOP_LAG, self._lag_s)
        self._lag_s = 0.0
        self._look_at_run()
        if not self._asks_ray:
            return
        self._look_at_pools()
        await asyncio.gather(
            self._look_at_engines(),
            self._look_at_sandboxes(),
            self._look_at_coordinator(),
            self._look_at_nodes(),
            asyncio.to_thread(self._look_at_processes),
        )

    def _look_at_earlier_rounds(self) -> None:
        """Rounds that an earlier start has sealed."""
        number = 1
        while True:
            try:
                totals = self._folder.stage(number, "rollout").get("totals")
                ruler = self._folder.read(self._folder.ruler_name(number))
            except RunFolderError:
                totals = ruler = None
            if totals is None:
                return
            if ruler is not None:
                self.tell_ruler(ruler)
            self._set_solved(number, Totals(**totals))
            number += 1

    def _look_at_run(self) -> None:
        out = self._exporter
        live = self._account()
        if live is not None:
            now = live.progress
            out.clear(metrics.STAGE)
            if now.stage:
                out.set(metrics.STAGE, 1, stage=now.stage, round=str(now.round or 0))
            out.set(metrics.PROGRESS, now.done / now.total if now.total else None)
            out.set(metrics.ETA, now.stage_eta_s, of="stage")
            out.set(metrics.ETA, now.run_eta_s, of="run")
            out.set(metrics.RUN_SECONDS, live.seconds_total)
            out.set(metrics.PRICE, now.usd_per_hour)
            out.set(metrics.COST, now.cost_usd)
        out.set(metrics.BUDGET, self.budget_usd)
        out.clear(metrics.STALLED)
        for stall in self._stalls:
            out.set(metrics.STALLED, 1, part=stall.stage, waits_on=stall.waits_on)
        out.set(metrics.OPEN_TREES, self._open_trees)
        status = self._status
        if status is None:
            return
        for state in JobState:
            stages = status.stages.values()
            out.set(metrics.JOBS, sum(s.counts.jobs[state] for s in stages), state=state)
            out.set(metrics.PROBLEMS, sum(s.counts.problems[state] for s in stages), state=state)
        if status.round > 0:  # an evaluation's is none of the run's rounds
            self._set_solved(status.round, status.totals)

    def _set_solved(self, number: int, totals: Totals) -> None:
        for level, trees in {**totals.trees_by_level, "all": totals.trees}.items():
            solved = totals.solved if level == "all" else totals.solved_by_level.get(level, 0)
            labels = {"round": str(number), "level": level}
            self._exporter.set(metrics.COMMITTED, trees, **labels)
            self._exporter.set(metrics.SOLVED_RATIO, solved / trees if trees else None, **labels)

    def _look_at_pools(self) -> None:
        out = self._exporter
        now_s = time.monotonic()
        # A pool may be gone: that of the workers lives for one round.
        out.clear(metrics.REPLICAS)
        out.clear(metrics.REPLICAS_WANTED)
        for pool, keeper in self._keepers.items():
            members = keeper.members
            for state in MemberState:
                out.set(metrics.REPLICAS, len(members.names(state)), pool=pool, state=state)
            out.set(metrics.REPLICAS_WANTED, members.size, pool=pool)
            losses = members.losses(now_s)
            out.set(metrics.DEATHS, losses.deaths, pool=pool)
            out.set(metrics.AWAY, losses.away_s, pool=pool)

    async def _look_at_engines(self) -> None:
        out = self._exporter
        asked = {
            (pool, name): handle
            for pool in ENGINES
            if pool in self._keepers
            for name, handle in self._keepers[pool].handles.items()
        }
        stats, pressures = await asyncio.gather(
            asyncio.gather(*(_ask(handle, "stats") for handle in asked.values())),
            asyncio.gather(*(_ask(handle, "pressure") for handle in asked.values())),
        )
        for metric in PRESENT:
            out.clear(metric)
        for (pool, name), stat, pressure in zip(asked, stats, pressures, strict=True):
            where = {"pool": pool, "replica": name}
            if stat is not None:
                out.set(metrics.ENGINE_RUNNING, stat.running_sequences, **where)
                out.set(metrics.ENGINE_WAITING, stat.waiting_requests, **where)
                out.set(metrics.ENGINE_IDLE, stat.idle_s, **where)
                out.set(metrics.WEIGHT_LOAD_SECONDS, stat.load_s, **where)
                out.set(metrics.ENGINE_MEMORY, stat.rss_bytes, **where)
            if pressure is not None:
                out.set(metrics.ENGINE_RUNNING, pressure.running, **where)
                out.set(metrics.ENGINE_WAITING, pressure.waiting, **where)
                if pool != "ppm":  # it keeps nothing between two batches
                    out.set(metrics.KV_USED, pressure.kv_usage, replica=name)
                    out.set(metrics.PREEMPTIONS, pressure.preemptions, replica=name)

    async def _look_at_sandboxes(self) -> None:
        keeper = self._keepers.get("sandbox")
        if keeper is None:
            return
        found = await asyncio.gather(*(_ask(h, "stats") for h in keeper.handles.values()))
        stats = [each for each in found if each is not None]
        for metric, name in (
            (metrics.SANDBOX_RUNNING, "running"),
            (metrics.SANDBOX_QUEUED, "queued"),
            (metrics.SANDBOX_LIVE, "live_processes"),
            (metrics.SANDBOX_CAP, "live_cap"),
            (metrics.SANDBOX_TREES, "open_trees"),
            (metrics.SANDBOX_EVICTIONS, "evictions"),
            (metrics.SANDBOX_RESTARTS, "restarts"),
        ):
            self._exporter.set(metric, sum(each.get(name, 0) for each in stats) if stats else None)

    async def _look_at_coordinator(self) -> None:
        keeper = self._keepers.get("coordinator")
        for handle in keeper.handles.values() if keeper is not None else ():
            stats: CoordinatorStats | None = await _ask(handle, "stats")
            if stats is not None:
                leases = stats.leases
                for event in LEASE_EVENTS:
                    self._exporter.set(metrics.LEASES, getattr(leases, event), event=event)

    def _look_at_processes(self) -> None:
        self._times.look()
        for kind, seconds in self._times.seconds.items():
            self._exporter.set(metrics.PROCESS_CPU, seconds, process=kind)

    async def _look_at_nodes(self) -> None:
        out = self._exporter
        every = await nodes.asked(ray.nodes)
        draining = await nodes.asked(nodes.draining)
        living = [node for node in every if node["Alive"]]
        ids = {node["NodeID"] for node in living}
        self._nodes_seen |= ids
        out.set(metrics.CLUSTER_NODES, len(ids - draining.keys()), state="alive")
        out.set(metrics.CLUSTER_NODES, len(ids & draining.keys()), state="draining")
        out.set(metrics.NODE_LOSSES, len(self._nodes_seen - ids))
        resources = [node.get("Resources", {}) for node in living]
        out.set(metrics.CLUSTER_CPUS, sum(r.get("CPU", 0) for r in resources))
        out.set(metrics.CLUSTER_GPUS, sum(r.get("GPU", 0) for r in resources))
        out.agents([f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in living])


async def _ask(handle: Any, method: str) -> Any:
    """What an actor says; None if it does not soon, or has nothing to say."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await getattr(handle, method).remote()
    except Exception as error:
        # It may be dead, restarting or busy: its keeper finds out which.
        logger.debug("An actor said nothing: %s", error)
        return None
