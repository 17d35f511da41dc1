"""One rollout: problems through the stages of a round on rollout workers, until it is sealed.

    plan a stage --> coordinator --leases--> rollout workers --> store
        status, progress, stalls --every POLL_S--> the view, the meter, the scaler's load
    next stage: all problems again, or those that escalation searches on, asked anew before each
                tree; then seal and audit

A continued round keeps the plans it had. Cancelled, or failed, it drains: what is finished is
committed, what is open is kept for whoever comes next, and the workers end. Killed, it leaves
workers that go on; those of the same rollout are taken over by the next driver (`_work`).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.engines.endpoint import EndpointStats
from cluster.fleet.actors import WorkerKind
from cluster.fleet.config import ClusterConfig, ServingConfig
from cluster.fleet.left_over import DRAIN_S, WORKER, end_all, find_coordinator
from cluster.fleet.membership import Losses
from cluster.fleet.meter import Meter
from cluster.fleet.pools import NO_LOAD, Pools
from cluster.fleet.stages import (
    RolloutOutcome,
    RolloutStage,
    StageSearch,
    hardest_first,
    in_sets,
)
from cluster.fleet.stall import Stall, StallDetector
from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import RoundStatus, WorkerProgress
from cluster.jobs.coordinator_client import RemoteCoordinator
from cluster.jobs.escalation import EscalationPlan, StageCost, plan_escalation, rollout_share
from cluster.jobs.queue import JobState, QueueConfig, StagePlan
from cluster.jobs.ray_errors import cause
from cluster.jobs.worker import RolloutWorkerActor, WorkerConfig
from cluster.machines.scaler import PoolLoad
from cluster.telemetry.progress import LEVELS_FACT, SHARE_FACT, solved_by_level
from learner.candidates import Recipe
from rollout.engine import EngineError
from rollout.open_trees import OpenTreeStore
from rollout.problem import Problem
from rollout.search import SearchError
from rollout.store import Totals, TrajectoryStore
from rollout.stored_problems import StoredProblems, remove_blocks
from verifier import GRADER_VERSION

logger = logging.getLogger(__name__)

POLL_S = 0.5

QUIET_S = 5.0
"""A part that did not move for so long is told in the driver's account."""

FIRST_CANDIDATES = 200
"""Of a round, that tell whether its policy writes steps at all."""

RENEW_S = 1.0
"""Pause between two renewals of a rollout worker's leases."""

Progress = Callable[[int, int, Mapping[str, str | float]], None]


@dataclass(slots=True, kw_only=True)
class Rollout:
    """A rollout and its workers; see the module."""

    config: ServingConfig
    pools: Pools
    meter: Meter
    trees: TrajectoryStore
    """Of the round."""
    problems: Mapping[str, Problem]
    """By id."""
    stages: Sequence[RolloutStage]
    preference: bool
    """Whether the PPM takes part."""
    versions: Mapping[str, str]
    """Of the models, for the record of each tree."""
    on_progress: Progress
    recipe: Recipe | None = None
    """By which trees are made into candidates for training; None: they are not."""
    _workers: WorkerKind | None = None
    """Their kind, while there are any."""
    _endpoint_ended: bool = False
    _ranked: tuple[str, Mapping[str, int]] = ("", {})
    """Which coordinator (`epoch`) was told which priorities of problem sets."""
    _steps_seen: bool = False
    """Whether the first candidates were looked at."""
    _began_s: float = field(default_factory=time.monotonic)

    async def run(self) -> RolloutOutcome:
        """Search the problems through all stages and seal the round.

        Raises:
            EngineError: members of a pool died too often, or the endpoint will answer no more.
            SearchError: the policy writes no steps.
        """
        pools, round = self.pools, self.trees.round
        losses_before = pools.losses()
        search = StageSearch(
            stages={name: stage for stage in self.stages for name in stage.tree_stages},
            policy=pools.policy,
            preference=pools.preference if self.preference else None,
            sandbox=pools.sandbox,
        )
        await self._start_workers(search)
        telling = asyncio.create_task(
            pools.share_pressures(self.config.cluster.admission.look_s), name="share-pressures"
        )
        try:
            await self._run_stages()
            # An evaluation is not searched on.
            searched_on = self.stages[0].answers is None
            left = await self._escalation() if searched_on else EscalationPlan()
            endpoint = await self._endpoint_stats()
            finished: RoundStatus = await self._ask("status", round)
            manifest = await self._ask("seal", round)
        except asyncio.CancelledError:
            pools.leaving()  # the drain may be cut off
            raise
        finally:
            telling.cancel()
            losses = pools.losses()
            # Without its engines no open search comes to its end.
            crippled = self._endpoint_ended or any(k.hopeless for k in pools.keepers.values())
            progress = await self._stop_workers(0.0 if crippled else DRAIN_S)
            pools.load, pools.parts = NO_LOAD, (0.0, ())
            self.meter.end_round()
        # The round is sealed, its workers are gone: nobody needs what they worked with.
        await asyncio.to_thread(OpenTreeStore(self.trees.store, round).remove_all)
        await asyncio.to_thread(remove_blocks, self.trees.store)
        audit = await asyncio.to_thread(
            audit_round,
            self.trees,
            reported=finished.totals.trees if not finished.sealed else None,
        )
        mine = Totals.sum(p.finished for p in progress)
        lost = {
            kind: loss.since(losses_before.get(kind, Losses())) for kind, loss in losses.items()
        }
        return RolloutOutcome(
            manifest=manifest,
            solved=len(await asyncio.to_thread(self.trees.solved)),
            expected=audit.expected,
            lost=len(audit.lost),
            doubled=len(audit.doubled),
            seconds=time.monotonic() - self._began_s,
            generated_tokens=mine.generated_tokens,
            executions=mine.executions,
            prefix_hit_rate=mine.cached_tokens / mine.prompt_tokens if mine.prompt_tokens else 0.0,
            endpoint=endpoint,
            suspects=tuple(left.suspects),
            losses={kind: loss for kind, loss in lost.items() if loss.deaths},
            resumed_trees=sum(p.resumed_trees for p in progress),
        )

    def change(self, config: ServingConfig) -> None:
        """Go on with another config: open trees of a worker, priorities of problem sets."""
        before, self.config = self.config, config
        if config.cluster.max_open_trees != before.cluster.max_open_trees:
            self._bound_workers()

    def _bound_workers(self) -> None:
        """Tell all workers how many trees they may hold open."""
        if WORKER in self.pools.keepers:
            for worker in self.pools.keepers[WORKER].all_handles.values():
                worker.set_max_open_trees.remote(self.config.cluster.max_open_trees)

    async def _rank(self, epoch: str) -> None:
        """Tell the coordinator which problem sets come first, if it does not know."""
        priorities = self.config.cluster.priorities
        if self._ranked == (epoch, priorities):
            return
        ranks = {
            problem.id: priorities[problem.source]
            for problem in self.problems.values()
            if priorities.get(problem.source)
        }
        await self._ask("prioritise", ranks)
        self._ranked = (epoch, priorities)

    def progress(self, *, living: bool = False) -> list[WorkerProgress]:
        """Last reports of the workers, of dead ones too unless `living`; none after the end."""
        if self._workers is None:
            return []
        reports, runs = self._workers.progress, self._workers.runs
        return [reports[name] for name in (runs if living else reports) if name in reports]

    # ---------------------------------------------------------------- stages

    async def _run_stages(self) -> None:
        """All stages, one after the other, each of several trees as often."""
        planned = {
            name: StagePlan.from_json(data)
            for name, data in (await asyncio.to_thread(self.trees.plans)).items()
        }
        costs = [
            StageCost(
                rollouts=stage.search.num_rollouts * stage.search.num_candidates,
                unsolved_only=stage.unsolved_only,
            )
            for stage in self.stages
            for _ in stage.tree_stages
        ]
        behind = 0.0
        index = 0
        for stage in self.stages:
            for name in stage.tree_stages:
                size = stage.shard_size or self.config.cluster.shard_size
                wanted = in_sets(self.problems.values(), size)
                if name in planned:  # a continued round: what was planned stands
                    wanted = list(planned[name].problem_ids)
                elif stage.unsolved_only:
                    unsolved = (await self._escalation()).search
                    wanted = in_sets((self.problems[i] for i in unsolved), size)
                if wanted:
                    plan = StagePlan(
                        round=self.trees.round,
                        stage=name,
                        tree_index=index,
                        problem_ids=tuple(wanted),
                        shard_size=size,
                        seed=self.config.seed,
                        priority=index,
                    )
                    await self._run_stage(plan, _TimeLeft(behind, costs[index:], len(wanted)))
                behind += len(wanted) * costs[index].rollouts
                index += 1

    async def _escalation(self) -> EscalationPlan:
        settings = self.config.hard_problems
        shards: list[str] | None = await self._ask("committed", self.trees.round)
        return await asyncio.to_thread(
            plan_escalation,
            self.trees,
            self.problems,
            suspect=settings.suspect,
            leave_suspects=settings.leave_suspects,
            max_generated_tokens=settings.max_generated_tokens,
            shards=shards,
        )

    async def _run_stage(self, plan: StagePlan, time_left: _TimeLeft) -> None:
        """Search one stage to its end."""
        status: RoundStatus = await self._ask("plan", plan)
        others = [stage for name, stage in status.stages.items() if name != plan.stage]
        before = sum(stage.counts.problems[JobState.DONE] for stage in others)
        detector = StallDetector(self.config.cluster.stalled_after_s)
        while not status.finished:
            await self._rank(status.epoch)
            await asyncio.sleep(POLL_S)
            self.pools.check()
            status = await self._ask("status", self.trees.round)
            if not status.finished:
                await self._check_endpoint()
            everyone, living = self.progress(), self.progress(living=True)
            mine = Totals.sum(p.finished for p in everyone)
            searches = sum(p.searches for p in everyone)
            open_trees = sum(p.open_trees for p in living)
            own = status.stages[plan.stage]
            done = own.counts.problems[JobState.DONE]
            unfinished = sum(own.counts.problems.values()) - done
            self.pools.load = PoolLoad(
                waiting=max(0, unfinished - open_trees), in_service=open_trees, served=searches
            )
            self._check_candidates(everyone)
            stalls = self._stalls(detector)
            self.meter.tell_round(status, open_trees=open_trees, stalls=stalls)
            elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
            facts: dict[str, str | float] = {
                "stage": plan.stage,
                LEVELS_FACT: solved_by_level(mine),
                "solved": f"{mine.solved} of {mine.trees} trees",
                "open": str(open_trees),
                "tokens/s": mine.generated_tokens / elapsed_s,
                "steps/s": mine.executions / elapsed_s,
            }
            if stalls:
                facts["stalled"] = str(stalls[0])
            if deaths := sum(loss.deaths for loss in self.pools.losses().values()):
                facts["replaced"] = f"{deaths} dead actors"
            if short := self.pools.short():
                facts["short"] = short
            if own.failed:
                facts["quarantined"] = str(len(own.failed))
            if waiting := sum(p.waiting_commits for p in living):
                facts["wait for the store"] = f"{waiting} finished shards"
            if errors := {p.error for p in everyone if p.error}:
                facts["last error"] = min(errors)[:80]
            # A worker's count runs ahead of what it has committed, and lacks what others had.
            shown = min(max(searches - before, done), len(plan.problem_ids))
            facts[SHARE_FACT] = time_left.share(shown, own.totals)
            self.on_progress(shown, len(plan.problem_ids), facts)

    def _check_candidates(self, progress: Sequence[WorkerProgress]) -> None:
        """Once, after the first candidates: a policy that writes no steps finds nothing all night.

        Raises:
            SearchError: too few of them ended in a step marker; shows what the policy writes.
        """
        candidates = sum(p.candidates for p in progress)
        if self._steps_seen or candidates < FIRST_CANDIDATES:
            return
        self._steps_seen = True
        ended = candidates - sum(p.unfinished for p in progress)
        wanted = self.config.cluster.min_step_share
        if self.stages[0].answers is None and ended < wanted * candidates:
            text = next((p.unfinished_text for p in progress if p.unfinished_text), "")
            raise SearchError(
                f"{ended} of {candidates} candidates ended in a step marker; the policy writes, "
                f"e.g., {text[-200:]!r}. A model that was never fine-tuned on the markers is asked "
                "with worked examples (search.template=bootstrap); longer steps need "
                "search.max_step_tokens; cluster.min_step_share=0 goes on all the same"
            )

    def _stalls(self, detector: StallDetector) -> list[Stall]:
        """Parts that have work and do not move, the causes first."""
        now_s = time.monotonic()
        everyone, living = self.progress(), self.progress(living=True)
        open_trees = sum(p.open_trees for p in living)
        waits_on = "policy" if "policy" in self.pools.keepers else ""
        for name in StageSearch.POOLS:
            keeper = self.pools.keepers.get(name)
            if keeper is None:
                continue
            if keeper.members.ready():
                looks = keeper.looks.values()
                done, open_ = sum(look.done for look in looks), sum(look.open for look in looks)
                detector.report(name, now_s, done=done, open=open_)
            else:
                waits_on = name
                missing = f"a new {keeper.kind.kind}"
                detector.report(name, now_s, done=0, open=open_trees, waits_on=missing)
        waiting = sum(p.waiting_commits for p in living)
        committed = sum(p.committed.trees for p in everyone)
        detector.report("commit", now_s, done=committed, open=waiting, waits_on="the store")
        requests = sum(p.requests + p.finished.trees for p in everyone)
        detector.report("search", now_s, done=requests, open=open_trees, waits_on=waits_on)
        self.pools.parts = (now_s, detector.stalls(now_s, QUIET_S))
        return detector.stalls(now_s)

    async def _endpoint_stats(self) -> EndpointStats | None:
        """What the endpoint has done, as of now if it answers; None: it is not the policy."""
        endpoint = self.pools.endpoint
        if endpoint is None:
            return None
        for handle in self.pools.handles("endpoint").values():
            try:
                endpoint.stats = await handle.stats.remote()
            except RayActorError as error:
                logger.info("The endpoint's actor is being replaced: %s", cause(error))
        return endpoint.stats

    async def _check_endpoint(self) -> None:
        """An endpoint that will answer no more (wrong key, budget used up) ends the round."""
        stats = await self._endpoint_stats()
        if stats is not None and stats.fatal:
            self._endpoint_ended = True
            raise EngineError(stats.fatal)

    # ---------------------------------------------------------------- coordinator, workers

    def _coordinator(self) -> Any:
        """The coordinator's handle.

        Raises:
            EngineError: there is none now.
        """
        for handle in self.pools.handles("coordinator").values():
            return handle
        raise EngineError("the coordinator is being replaced")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the coordinator, which may be replaced meanwhile.

        Raises:
            EngineError: it died too often.
        """
        while True:
            self.pools.check()
            try:
                return await getattr(self._coordinator(), method).remote(*arguments)
            except (EngineError, RayActorError) as error:
                if isinstance(error, RayTaskError):
                    raise
                logger.info("The coordinator is asked again: %s", error)
            await asyncio.sleep(POLL_S)

    def _forget_worker(self, name: str) -> None:
        """End the leases of a worker that is gone; if that is not heard they expire."""
        for handle in self.pools.handles("coordinator").values():
            handle.forget_worker.remote(name)

    async def _start_workers(self, search: StageSearch) -> None:
        cluster, home = self.config.cluster, self.pools.home
        assert home is not None
        ordered = (
            self.problems[problem_id] for problem_id in hardest_first(self.problems.values())
        )
        stored = await asyncio.to_thread(StoredProblems.write, self.trees.store, ordered)
        shared = ray.put(stored)
        find = partial(find_coordinator, home.namespace)

        def worker_config() -> WorkerConfig:
            return WorkerConfig(
                max_open_trees=self.config.cluster.max_open_trees,
                admission=cluster.admission,
                renew_s=RENEW_S,
                checkpoint_open_trees_s=cluster.checkpoint_open_trees_s,
            )

        def make(name: str, options: Mapping[str, Any]) -> Any:
            # Pickled now, the pools hold the replicas of now; later ones are announced.
            return RolloutWorkerActor.options(**options).remote(
                name,
                RemoteCoordinator(self._coordinator(), find=find),
                self.trees.store.root,
                shared,
                search,
                worker_config(),
                follows_engines=self.pools.endpoint is None,
                info={**self.versions, "grader": GRADER_VERSION},
                recipe=self.recipe,
                run_id=self.trees.store.run_id,
            )

        self._workers = WorkerKind(
            cluster.workers,
            make,
            # Those of an attempt before may not have ended yet.
            incarnation=f"r{self.trees.round}-{home.driver}-{uuid.uuid4().hex[:4]}",
            forget=self._forget_worker,
            work=self._work(stored, worker_config()),
        )
        await self.pools.keep(WORKER, self._workers, cluster.workers.replicas)
        self._bound_workers()  # those of an earlier driver may hold what was asked then

    def _work(self, stored: StoredProblems, config: WorkerConfig) -> dict[str, Any]:
        """All that decides what a worker of this rollout does, as plain data."""
        return {
            "round": self.trees.round,
            "problems": stored.digest,
            "stages": {
                # How an evaluation answers is a function, which cannot be compared.
                stage.name: uuid.uuid4().hex
                if stage.answers is not None
                else {
                    "search": stage.search.model_dump(mode="json"),
                    "trees": stage.trees,
                    "unsolved_only": stage.unsolved_only,
                }
                for stage in self.stages
            },
            "preference": self.preference,
            "models": dict(self.versions),
            "grader": GRADER_VERSION,
            "recipe": self.recipe.name if self.recipe is not None else None,
            # What a worker can be told as it works is no reason to end it.
            "worker": config.model_dump(mode="json", exclude={"max_open_trees"}),
            "endpoint": self.pools.endpoint is not None,
            "request_timeout_s": self.config.cluster.request_timeout_s,
            "start_timeout_s": self.config.cluster.start_timeout_s,
        }

    async def _stop_workers(self, drain_s: float) -> list[WorkerProgress]:
        """Drain the workers and end them; returns what each there ever was reported last."""
        keeper, kind = self.pools.keepers.pop(WORKER, None), self._workers
        if keeper is None or kind is None:
            return []
        everyone = keeper.all_handles
        try:
            handles = await keeper.stop()
            if self.pools.folder.is_taken:
                handles = {}
            if not await kind.finish(handles, drain_s, DRAIN_S + 5.0):
                logger.warning("Rollout workers did not drain within %.0f s", DRAIN_S)
            await self.pools.end_counted(handles)
        except BaseException:  # told to stop at once
            end_all({} if self.pools.folder.is_taken else everyone)
            raise
        self._workers = None
        return list(kind.progress.values())


@dataclass(slots=True)
class _TimeLeft:
    """How much is done of what was left of a rollout when this process came to a stage."""

    behind: float
    """See `rollout_share`."""
    costs: Sequence[StageCost]
    num_problems: int
    _at_start: float | None = None
    """Share that an earlier process, not this one's time, has done of this stage."""

    def share(self, done: int, committed: Totals) -> float:
        """See `SHARE_FACT`; `committed` is of this stage."""
        unsolved = 1.0 - committed.solved / committed.trees if committed.trees else 1.0
        share = rollout_share(self.behind, self.costs, self.num_problems, done, unsolved)
        if self._at_start is None:
            before = rollout_share(self.behind, self.costs, self.num_problems, 0, unsolved)
            self._at_start = share - before
        return (share - self._at_start) / (1.0 - self._at_start) if self._at_start < 1.0 else 1.0


def queue_config(cluster: ClusterConfig) -> QueueConfig:
    """Of the coordinator: after a restart it waits until every living worker has renewed."""
    return QueueConfig(lease_s=cluster.lease_s, adopt_s=3 * RENEW_S)
