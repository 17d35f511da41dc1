"""The actors of a run: engines, sandbox workers, coordinator, learner group, rollout workers.

    driver -- start --> Ray -- coordinator, sandbox workers, policy replicas, learner group
           -- serve_policy / serve_preference --> new weights in the running engines
           -- serve_endpoint --> a completions endpoint in place of the policy replicas
           -- rollout --> rollout workers, one stage after the other, until the round is sealed
           -- fit     --> learner group
           -- stop    --> drain, then everything ends

The PPM's replicas start when the first PPM is served, and so do the policy's where the run starts
with an endpoint. Rollout workers live for one round: they carry its search settings.

Not covered: growing and shrinking pools while a round runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ActorConfig, ServingConfig
from cluster.coordinator import CoordinatorActor, RemoteCoordinator, RoundStatus, audit_round
from cluster.endpoint import EndpointActor, EndpointConfig, EndpointStats, read_api_key
from cluster.escalation import EscalationPlan, plan_escalation
from cluster.jobs import QueueConfig, SearchTask, StagePlan
from cluster.learner_group import LearnerGroup
from cluster.pool import PolicyPool, PoolConfig, PreferencePool, SandboxPool
from cluster.replica import PolicyReplicaActor, PreferenceReplicaActor
from cluster.run_folder import RunFolder
from cluster.sandbox_worker import SandboxWorkerActor
from cluster.weight_sync import sync_weights
from cluster.worker import RolloutWorkerActor, WorkerConfig
from learner.checkpoint import Checkpoint
from learner.fit import FitProgress, FitRequest, FitResult
from rollout.difficulty import SuspectLabel
from rollout.engine import EngineError, PolicyEngine, PreferenceEngine
from rollout.problem import Problem
from rollout.search import SearchConfig, StepSandbox, run_search
from rollout.store import Manifest, RunStore, TrajectoryStore
from rollout.tree import Tree
from verifier.verify import start_symbolic_worker

logger = logging.getLogger(__name__)

POLL_S = 0.5
DRAIN_S = 20.0
"""How long a stopped rollout may take to commit what is finished."""

ENDPOINT_WAIT_S = 86_400.0
"""Bound on one call of the endpoint's actor, which bounds each request itself once it has a slot:
waiting for one, or for a limit per minute, is no failure."""

Progress = Callable[[int, int, Mapping[str, str]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStage:
    """One pass over problems in a round."""

    name: str
    search: SearchConfig
    trees: int = 1
    unsolved_only: bool = False
    """Only the problems no tree of the round has solved so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOutcome:
    """A sealed round and how it went."""

    manifest: Manifest
    solved: int
    expected: int
    lost: int
    doubled: int
    seconds: float
    generated_tokens: int
    """By this process's workers; a continued round had more before."""
    executions: int
    prefix_hit_rate: float
    endpoint: EndpointStats | None = None
    """What was asked of the endpoint since it was taken; None: replicas were the policy."""
    suspects: tuple[SuspectLabel, ...] = ()
    """Unsolved problems whose searches agree on another answer."""

    def facts(self) -> dict[str, Any]:
        """For the stage's record."""
        return {
            "solved": self.solved,
            "expected": self.expected,
            "lost": self.lost,
            "doubled": self.doubled,
            "generated_tokens_per_s": self.generated_tokens / self.seconds,
            "sandbox_steps_per_s": self.executions / self.seconds,
            "prefix_hit_rate": self.prefix_hit_rate,
            "suspect_labels": len(self.suspects),
            "totals": asdict(self.manifest.totals),
            **({"endpoint": asdict(self.endpoint)} if self.endpoint is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class StageSearch:
    """What a rollout worker runs for each task: the search settings of the task's stage."""

    searches: Mapping[str, SearchConfig]
    policy: PolicyEngine
    preference: PreferenceEngine | None
    sandbox: StepSandbox

    async def __call__(self, problem: Problem, task: SearchTask) -> Tree:
        # A symbolic question that has to wait for its process would end undecided.
        await asyncio.to_thread(start_symbolic_worker)
        return await run_search(
            problem,
            config=self.searches[task.stage],
            policy=self.policy,
            preference=self.preference,
            sandbox=self.sandbox,
            round=task.round,
            index=task.index,
            seed=task.seed,
            clock=time.monotonic,
        )


class Fleet:
    """Everything of a run that lives in Ray."""

    def __init__(self, config: ServingConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self._policies: dict[str, Any] = {}
        self._endpoint: Any = None
        self._endpoint_version = ""
        self._endpoint_ended = False
        self._preferences: dict[str, Any] = {}
        self._sandboxes: dict[str, Any] = {}
        self._workers: dict[str, Any] = {}
        self._worker_runs: list[Any] = []
        self._coordinator: Any = None
        self._learner: LearnerGroup | None = None
        self._policy_version = ""
        self._preference_version = ""
        self._ray_started = False

    @property
    def policy(self) -> PolicyPool:
        if self._endpoint is not None:
            # It sends requests again itself, and knows best when to rest.
            patient = PoolConfig(deadline_s=ENDPOINT_WAIT_S, attempts=1, rest_s=0.0)
            return PolicyPool(self._policy_handles, patient)
        return PolicyPool(self._policies, self._pool_config())

    @property
    def preference(self) -> PreferencePool:
        return PreferencePool(self._preferences, self._pool_config())

    @property
    def sandbox(self) -> SandboxPool:
        return SandboxPool(self._sandboxes, self._pool_config())

    @property
    def _policy_handles(self) -> dict[str, Any]:
        """The actors that are the policy now."""
        return self._policies if self._endpoint is None else {"endpoint": self._endpoint}

    def _pool_config(self) -> PoolConfig:
        return PoolConfig(deadline_s=self.config.cluster.request_timeout_s)

    def describe(self) -> str:
        """For people: what runs."""
        parts = [f"{len(self._policies)} policy", f"{len(self._sandboxes)} sandbox"]
        if self._endpoint is not None:
            parts.insert(0, self._endpoint_version)
        if self._preferences:
            parts.append(f"{len(self._preferences)} PPM")
        if self._learner is not None:
            parts.append(f"{self._learner.num_workers} learner ranks")
        return ", ".join(parts)

    async def start(
        self, policy: Path | None, *, version: str = "base", learner: bool = True
    ) -> None:
        """Bring up Ray and the actors; the policy engines start from `policy` (None: later).

        Raises:
            EngineError: an actor did not start in time or failed; says which and why.
        """
        self._start_ray()
        cluster = self.config.cluster
        if learner:
            self._learner = LearnerGroup(
                num_workers=cluster.learner.replicas,
                resources_per_worker=_learner_resources(cluster.learner),
                use_gpu=cluster.learner.num_gpus > 0,
                storage_path=self.folder.root / "ray_train",
            )
            self._learner.start()
        self._coordinator = CoordinatorActor.options(
            name=f"coordinator-{uuid.uuid4().hex[:8]}"
        ).remote(str(self.folder.root), QueueConfig(lease_s=cluster.lease_s))
        self._sandboxes = {
            f"sandbox-{number}": SandboxWorkerActor.options(**_options(cluster.sandbox)).remote(
                limits=self.config.sandbox.limits, isolation=self.config.sandbox.isolation
            )
            for number in range(cluster.sandbox.replicas)
        }
        if policy is not None:
            await self._start_policies(str(policy), version)
        await self._ready(self._sandboxes, cluster.sandbox, sign_of_life="stats")

    async def _start_policies(self, path: str, version: str) -> None:
        settings = self.config.cluster.policy
        self._policies = {
            f"policy-{number}": PolicyReplicaActor.options(**_options(settings)).remote(
                path, self.config.policy_engine, version=version, name=f"policy-{number}"
            )
            for number in range(settings.replicas)
        }
        self._policy_version = version
        await self._ready(self._policies, settings)

    def _start_ray(self) -> None:
        cluster = self.config.cluster
        if ray.is_initialized():
            return
        arguments: dict[str, Any] = {
            "namespace": "rstar",
            "log_to_driver": logger.isEnabledFor(logging.INFO),
            "logging_level": logging.ERROR,
            "configure_logging": True,
        }
        if cluster.address == "local":
            port = cluster.dashboard_port
            if port is not None and not _port_is_free(port):
                raise EngineError(
                    f"port {port} of cluster.dashboard_port is in use; choose another one, or null"
                )
            arguments |= {
                "include_dashboard": port is not None,
                **({"dashboard_port": port} if port is not None else {}),
                "num_cpus": cluster.num_cpus,
                "object_store_memory": cluster.object_store_mib * 2**20,
            }
        try:
            ray.init(address=cluster.address, **arguments)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"Ray could not be started at cluster.address={cluster.address!r}: {error}"
            ) from error
        self._ray_started = True

    async def serve_policy(self, base: Path, checkpoint: Checkpoint | None) -> None:
        """Have every policy replica serve a checkpoint (None: the base model).

        Starts them the first time; an endpoint is the policy no more.
        """
        await self._leave_endpoint()
        version = checkpoint.version if checkpoint is not None else "base"
        if version == self._policy_version:
            return
        path = checkpoint.path if checkpoint is not None else str(base)
        if not self._policies:
            await self._start_policies(path, version)
            return
        await sync_weights(self._policies, path, version)
        self._policy_version = version

    async def serve_endpoint(self, endpoint: EndpointConfig) -> None:
        """Make a completions endpoint the policy, until a checkpoint is served.

        Raises:
            EngineError: its key is not in the environment, or it does not answer.
        """
        key = read_api_key(endpoint, os.environ)
        here = NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )
        actor: Any = EndpointActor.options(scheduling_strategy=here).remote(endpoint)
        self._endpoint, self._endpoint_version = actor, endpoint.version
        self._endpoint_ended = False
        try:
            async with asyncio.timeout(self.config.cluster.start_timeout_s):
                # As an argument of a call it is kept nowhere; of the actor, Ray would keep it.
                await _as_future(actor.ready.remote(key))
        except TimeoutError:
            raise EngineError(
                f"the actor of the endpoint {endpoint.base_url} was not ready after "
                f"{self.config.cluster.start_timeout_s:.0f} s"
            ) from None
        except ray.exceptions.RayError as error:
            raise EngineError(str(getattr(error, "cause", None) or error)) from None

    async def _leave_endpoint(self) -> None:
        """End the endpoint's actor, if there is one."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            try:
                async with asyncio.timeout(5.0):
                    await _as_future(endpoint.shutdown.remote())
            except (TimeoutError, ray.exceptions.RayError) as error:
                logger.info("The endpoint's actor did not shut down: %s", error)
            ray.kill(endpoint)

    async def _endpoint_stats(self) -> EndpointStats | None:
        """What the endpoint has done; None: it is not the policy.

        Raises:
            EngineError: its actor is gone.
        """
        if self._endpoint is None:
            return None
        try:
            return await _as_future(self._endpoint.stats.remote())
        except ray.exceptions.RayError as error:
            raise EngineError(f"the endpoint's actor failed: {_cause(error)}") from error

    async def _check_endpoint(self) -> None:
        """An endpoint that will answer no more (wrong key, budget used up) ends the round."""
        stats = await self._endpoint_stats()
        if stats is not None and stats.fatal:
            self._endpoint_ended = True
            raise EngineError(stats.fatal)

    async def serve_preference(self, checkpoint: Checkpoint) -> None:
        """Have every PPM replica serve a checkpoint; starts them the first time."""
        if checkpoint.version == self._preference_version:
            return
        if not self._preferences:
            settings = self.config.cluster.ppm
            self._preferences = {
                f"ppm-{number}": PreferenceReplicaActor.options(**_options(settings)).remote(
                    checkpoint.path,
                    self.config.ppm_engine,
                    version=checkpoint.version,
                    name=f"ppm-{number}",
                )
                for number in range(settings.replicas)
            }
            await self._ready(self._preferences, settings)
        else:
            await sync_weights(self._preferences, checkpoint.path, checkpoint.version)
        self._preference_version = checkpoint.version

    async def _ready(
        self, actors: Mapping[str, Any], asked: ActorConfig, sign_of_life: str = "ready"
    ) -> None:
        """Wait until each actor answers a call of the method `sign_of_life`."""
        timeout_s = self.config.cluster.start_timeout_s
        for name, handle in actors.items():
            try:
                await asyncio.wait_for(
                    _as_future(getattr(handle, sign_of_life).remote()), timeout_s
                )
            except TimeoutError:
                raise EngineError(
                    f"{name} was not ready after {timeout_s:.0f} s; it asks for {_options(asked)}, "
                    f"the cluster has {ray.cluster_resources()} "
                    f"of which free: {ray.available_resources()}"
                ) from None
            except ray.exceptions.RayError as error:
                raise EngineError(f"{name} did not start: {_cause(error)}") from error

    # ---------------------------------------------------------------- rollouts

    async def rollout(
        self,
        round: int,
        problems: Sequence[Problem],
        stages: Sequence[RolloutStage],
        *,
        preference: bool,
        on_progress: Progress,
    ) -> RolloutOutcome:
        """Search the problems through all stages and seal the round.

        Cancelling drains: trees that are finished are committed, the rest is handed back.
        """
        began_s = time.monotonic()
        by_id = {problem.id: problem for problem in problems}
        search = StageSearch(
            searches={name: stage.search for stage in stages for name in _tree_stages(stage)},
            policy=self.policy,
            preference=self.preference if preference else None,
            sandbox=self.sandbox,
        )
        before = await self._engine_tokens()
        trees = TrajectoryStore(RunStore(str(self.folder.root)), round)
        await self._start_workers(by_id, search)
        planned = {
            name: StagePlan.from_json(data)
            for name, data in (await asyncio.to_thread(trees.plans)).items()
        }
        try:
            index = 0
            for stage in stages:
                wanted = list(by_id)
                if stage.unsolved_only:
                    wanted = (await self._plan_escalation(trees, by_id)).search
                for name in _tree_stages(stage):
                    if name in planned:  # a continued round: what was planned stands
                        wanted = list(planned[name].problem_ids)
                    if wanted:
                        await self._run_stage(round, name, index, wanted, on_progress, began_s)
                    index += 1
            left = await self._plan_escalation(trees, by_id)
            endpoint = await self._endpoint_stats()
            finished = await self._coordinator.status.remote(round)
            manifest = await self._coordinator.seal.remote(round)
        finally:
            # Without a policy no open search comes to its end.
            progress = await self._stop_workers(0.0 if self._endpoint_ended else DRAIN_S)
        audit = await asyncio.to_thread(
            audit_round, trees, reported=finished.totals.trees if not finished.sealed else None
        )
        after = await self._engine_tokens()
        prompt = after["prompt_tokens"] - before["prompt_tokens"]
        cached = after["cached_tokens"] - before["cached_tokens"]
        return RolloutOutcome(
            manifest=manifest,
            solved=len(await asyncio.to_thread(solved_problems, trees)),
            expected=audit.expected,
            lost=len(audit.lost),
            doubled=len(audit.doubled),
            seconds=time.monotonic() - began_s,
            generated_tokens=sum(p.finished.generated_tokens for p in progress),
            executions=sum(p.finished.executions for p in progress),
            prefix_hit_rate=cached / prompt if prompt else 0.0,
            endpoint=endpoint,
            suspects=tuple(left.suspects),
        )

    async def _plan_escalation(
        self, trees: TrajectoryStore, problems: Mapping[str, Problem]
    ) -> EscalationPlan:
        settings = self.config.hard_problems
        return await asyncio.to_thread(
            plan_escalation,
            trees,
            problems,
            suspect=settings.suspect,
            leave_suspects=settings.leave_suspects,
            max_generated_tokens=settings.max_generated_tokens,
        )

    async def _run_stage(
        self,
        round: int,
        name: str,
        index: int,
        problem_ids: Sequence[str],
        on_progress: Progress,
        began_s: float,
    ) -> None:
        plan = StagePlan(
            round=round,
            stage=name,
            tree_index=index,
            problem_ids=tuple(problem_ids),
            shard_size=self.config.cluster.shard_size,
            seed=self.config.seed,
            priority=index,
        )
        status: RoundStatus = await self._coordinator.plan.remote(plan)
        before = sum(stage.totals.trees for other, stage in status.stages.items() if other != name)
        while not status.finished:
            await asyncio.sleep(POLL_S)
            self._check_workers()
            status = await self._coordinator.status.remote(round)
            if not status.finished:
                await self._check_endpoint()
            stats = await self._coordinator.stats.remote()
            # Workers of earlier rounds are still known to the coordinator.
            workers = [p for name, p in stats.workers.items() if name in self._workers]
            tokens = sum(p.finished.generated_tokens for p in workers)
            steps = sum(p.finished.executions for p in workers)
            done = sum(p.finished.trees for p in workers)
            solved = sum(p.finished.solved for p in workers)
            elapsed_s = max(time.monotonic() - began_s, 1e-9)
            own = status.stages[name]
            facts = {
                "stage": name,
                "solved": f"{solved} of {done} trees",
                "open": str(sum(p.open_trees for p in workers)),
                "tokens/s": f"{tokens / elapsed_s:,.0f}",
                "steps/s": f"{steps / elapsed_s:,.0f}",
            }
            if own.failed:
                facts["quarantined"] = str(len(own.failed))
            errors = {p.error for p in workers if p.error}
            if errors:
                facts["last error"] = sorted(errors)[0][:80]
            # A worker's count runs ahead of what it has committed, and lacks what others had.
            shown = max(done - before, own.totals.trees)
            on_progress(min(shown, len(problem_ids)), len(problem_ids), facts)

    async def _start_workers(self, problems: Mapping[str, Problem], search: StageSearch) -> None:
        cluster = self.config.cluster
        shared = ray.put(dict(problems))
        self._workers = {
            f"worker-{number}-{uuid.uuid4().hex[:6]}": None
            for number in range(cluster.workers.replicas)
        }
        for name in self._workers:
            self._workers[name] = RolloutWorkerActor.options(**_options(cluster.workers)).remote(
                name,
                RemoteCoordinator(self._coordinator),
                str(self.folder.root),
                shared,
                search,
                WorkerConfig(
                    max_open_trees=cluster.max_open_trees,
                    admission=cluster.admission,
                    renew_s=1.0,
                ),
                engines=self.policy if self._endpoint is None else None,
                info={
                    "policy": self._endpoint_version if self._endpoint else self._policy_version,
                    "ppm": self._preference_version,
                },
            )
        self._worker_runs = [worker.run.remote() for worker in self._workers.values()]

    def _check_workers(self) -> None:
        """A worker whose run ended before it was drained has failed."""
        done, _ = ray.wait(self._worker_runs, num_returns=len(self._worker_runs), timeout=0)
        for run in done:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                raise EngineError(f"a rollout worker failed: {_cause(error)}") from error

    async def _stop_workers(self, drain_s: float) -> list[Any]:
        """Drain the workers and end them; returns what each reported last."""
        drains = [worker.drain.remote(drain_s) for worker in self._workers.values()]
        progress: list[Any] = []
        try:
            async with asyncio.timeout(DRAIN_S + 5.0):
                await asyncio.gather(*map(_as_future, drains), return_exceptions=True)
                results = await asyncio.gather(
                    *map(_as_future, self._worker_runs), return_exceptions=True
                )
                progress = [r for r in results if not isinstance(r, BaseException)]
        except TimeoutError:
            logger.warning("Rollout workers did not drain within %.0f s", DRAIN_S)
        for worker in self._workers.values():
            ray.kill(worker)
        self._workers, self._worker_runs = {}, []
        return progress

    async def _engine_tokens(self) -> dict[str, int]:
        stats = await asyncio.gather(
            *(_as_future(handle.stats.remote()) for handle in self._policy_handles.values())
        )
        return {
            name: sum(getattr(s, name) for s in stats)
            for name in ("prompt_tokens", "cached_tokens", "generated_tokens")
        }

    # ---------------------------------------------------------------- learner, end

    async def fit(
        self, request: FitRequest, on_progress: Callable[[FitProgress], None]
    ) -> FitResult:
        """Train on the learner group.

        Raises:
            LearnerError: the training run could not be done.
        """
        assert self._learner is not None
        return await asyncio.to_thread(self._learner.fit, request, on_progress)

    async def stop(self, note: Callable[[str], None] = lambda text: None) -> None:
        """End every actor, and Ray if it was started here. Bounded in time; safe to call twice."""
        if not self._ray_started:
            return
        actors = [*self._policies.values(), *self._preferences.values()]
        await self._leave_endpoint()
        try:
            async with asyncio.timeout(15.0):
                await asyncio.gather(
                    *(_as_future(handle.shutdown.remote()) for handle in actors),
                    return_exceptions=True,
                )
        except TimeoutError:
            note("engines did not stop within 15 s; they are killed")
        for handle in [*actors, *self._sandboxes.values()]:
            ray.kill(handle)
        if self._learner is not None:
            await asyncio.to_thread(self._learner.shutdown, 5.0)
            self._learner = None
        self._policies, self._preferences, self._sandboxes = {}, {}, {}
        ray.shutdown()
        self._ray_started = False
        shutil.rmtree(self.folder.root / "ray_train", ignore_errors=True)


async def _as_future(ref: Any) -> Any:
    return await ref


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _tree_stages(stage: RolloutStage) -> list[str]:
    """One stage of the coordinator per tree of a problem."""
    if stage.trees == 1:
        return [stage.name]
    return [f"{stage.name}-tree{number}" for number in range(stage.trees)]


def solved_problems(trees: TrajectoryStore) -> set[str]:
    """Ids of the problems some committed tree of the round solved."""
    return {
        key.problem_id for commit in trees.commits().values() for key in commit.trees if key.solved
    }


def _options(settings: ActorConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": settings.num_cpus}
    if settings.num_gpus:
        options["num_gpus"] = settings.num_gpus
    if settings.resources:
        options["resources"] = dict(settings.resources)
    return options


def _learner_resources(settings: ActorConfig) -> dict[str, float]:
    resources = dict(settings.resources)
    if settings.num_gpus:
        resources["GPU"] = settings.num_gpus
    resources["CPU"] = settings.num_cpus or 1.0
    return resources


def _cause(error: BaseException) -> str:
    """The message behind a Ray error, without its traceback."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    return str(error).strip().splitlines()[-1]
