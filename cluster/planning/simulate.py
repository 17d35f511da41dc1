"""A round at virtual time: real coordinator, jobs, leases, scaler and commits, modelled engines.

    real:     Coordinator (and with it JobQueue), Scaler, TrajectoryStore with Parquet files,
              markers and manifest on a fsspec store in memory, the audit of all committed rows
    modelled: rollout workers, engines, nodes, losses; one event queue, seconds cost nothing

One replica is a GPU engine with its rollout worker. It holds up to `max_open_trees` trees, which
share its speed equally: `curve(open trees * requests_per_tree)` tokens per second, times its own
speed. A tree is done when it has had its tokens (log-normal, some are stragglers; the same problem
needs the same number wherever it is searched). The worker follows `RolloutWorker`: it takes a lease
as soon as a slot would stay empty, renews, looks for a marker before it starts, commits a shard
when all of its trees have ended, then completes it.

What goes wrong, at random and reproducibly:
- a replica is lost: at once, or after a notice (it stops taking jobs and, before the end, commits
  what is finished and hands back the rest); the loss is noticed `detect_s` later, the scaler asks
  for another one, which serves after the start times of node and engine; its open trees are
  gone on with from their last checkpoint (modelled too), without `checkpoint_s` searched again
  from the root;
- some lost replicas are only cut off: they go on for a while as zombies and commit shards that
  others hold meanwhile; half of these commits are placed between a rival's data file and its
  marker;
- the coordinator is killed and rebuilt from the store while workers carry on.

Not modelled: PPM, sandbox and grading (taken to keep up with the policy), network and store times
other than `commit_s`, start-up of the workers' processes, weights of a new round, prices that move.
"""

from __future__ import annotations

import heapq
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.queue import Lease, QueueConfig, StagePlan
from cluster.machines.scaler import MemberState, PoolLoad, ReplicaLoad, Scaler, ScalerConfig
from cluster.planning.latency import LatencyCurve
from cluster.planning.modelled_replica import ModelledReplica, ModelledShard
from cluster.planning.simulated_store import PROTOCOL, DictFileSystem, RacingStore
from cluster.planning.simulation_figures import SimulationConfig, SimulationReport
from rollout.problem import Level, Problem
from rollout.prompt import Step, StepKind
from rollout.store import TrajectoryStore
from rollout.tree import Node, Terminal, Tree, backup, expand

_PROGRESS = WorkerProgress()
_ANSWER = Step(kind=StepKind.ANSWER, text="simulated", answer="1")

ROUND, STAGE, POOL = 1, "base", "policy"
SCALE_INTERVAL_S = 10.0
DRAIN_MARGIN_S = 10.0
"""How long before its end a replica with a notice stops its open trees and commits."""


class Simulation:
    """One round at virtual time; see the module."""

    def __init__(self, config: SimulationConfig, curve: LatencyCurve) -> None:
        self.config = config
        self.now_s = 0.0
        self._random = random.Random(config.seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = 0
        self._speeds = [0.0] + [
            curve.tokens_per_s(n * config.requests_per_tree) / n
            for n in range(1, config.max_open_trees + 1)
        ]
        self.full_speed = self._speeds[-1] * config.max_open_trees
        self._tokens = self._draw_tokens()
        self._solved = [
            self._random.random() < config.solve_rate for _ in range(config.num_problems)
        ]
        # p000123: the position after the letter is the problem's number.
        self._ids = tuple(f"p{number:06d}" for number in range(config.num_problems))
        self._stored: dict[int, float] = {}
        """Tokens that stored trees in work have had, by problem number."""
        self._root = f"{PROTOCOL}://{uuid.uuid4().hex}"
        self._store = RacingStore(self._root)
        self._trajectories = TrajectoryStore(self._store, ROUND)
        self._queue_config = QueueConfig(lease_s=config.lease_s, adopt_s=2 * config.renew_s)
        self._scaler = Scaler(
            {
                POOL: (
                    ScalerConfig(
                        min_replicas=config.min_replicas or config.num_replicas,
                        max_replicas=config.num_replicas,
                        slots=config.max_open_trees,
                    ),
                    {"GPU": 1.0},
                )
            }
        )
        self._replicas: dict[str, ModelledReplica] = {}
        """All that were ever asked for."""
        self._seen: dict[str, ModelledReplica] = {}
        """Those the scaler does not know to be dead."""
        self._held: dict[str, list[ModelledReplica]] = {}
        """Who works on a job, zombies included."""
        self._ambushes: dict[str, tuple[ModelledReplica, ModelledShard]] = {}
        """Commits of zombies that wait for a rival's, by job."""
        self._coordinator: Coordinator | None = self._new_coordinator()
        self._up_s = 0.0
        self._finished_s = math.inf
        self._counts = Counter[str]()

    def run(self) -> SimulationReport:
        """Simulate until the round is finished, seal and audit it."""
        began_s = time.perf_counter()
        config = self.config
        coordinator = self._coordinator
        assert coordinator is not None
        try:
            coordinator.plan(
                StagePlan(
                    round=ROUND,
                    stage=STAGE,
                    tree_index=0,
                    problem_ids=self._ids,
                    shard_size=config.shard_size,
                    seed=config.seed,
                )
            )
            self._at(0.0, self._scale)
            if config.coordinator_kill_s:
                self._at(config.coordinator_kill_s, self._kill_coordinator)
            while self._finished_s == math.inf:
                self.now_s, _, action, arguments = heapq.heappop(self._events)
                action(*arguments)
            return self._report(began_s)
        finally:
            DictFileSystem().forget(self._root)

    # -- time

    def _at(self, when_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when_s, self._num_events, action, arguments))

    def _draw_tokens(self) -> list[float]:
        """Tokens that the tree of each problem needs, in the order of the plan."""
        config, random = self.config, self._random
        factors = config.level_factors
        scale = config.tokens_per_problem * len(factors) / sum(factors)
        levels = [factors[number % len(factors)] for number in range(config.num_problems)]
        random.shuffle(levels)
        if config.hardest_first:
            levels.sort(reverse=True)
        tokens = []
        for factor in levels:
            needed = random.lognormvariate(-(config.tokens_sigma**2) / 2, config.tokens_sigma)
            if random.random() < config.straggler_share:
                needed *= config.straggler_factor
            tokens.append(min(needed, config.tokens_limit) * factor * scale)
        return tokens

    # -- coordinator

    def _new_coordinator(self) -> Coordinator:
        return Coordinator(self._root, self._queue_config, clock=lambda: self.now_s)

    def _kill_coordinator(self) -> None:
        self._coordinator = None
        self._counts["coordinator_kills"] += 1
        self._up_s = self.now_s + self.config.coordinator_down_s
        self._at(self._up_s, self._restart_coordinator)

    def _restart_coordinator(self) -> None:
        self._coordinator = self._new_coordinator()
        self._at(self.now_s + self.config.coordinator_kill_s, self._kill_coordinator)

    def _or_later(self, action: Callable[..., None], *arguments: Any) -> Coordinator | None:
        """The coordinator; None if it is away, then the action is tried again afterwards."""
        if self._coordinator is None:
            self._at(self._up_s + self._random.random(), action, *arguments)
        return self._coordinator

    def _complete(self, lease: Lease) -> None:
        coordinator = self._or_later(self._complete, lease)
        if coordinator is None:
            return
        coordinator.complete(lease.job.id, lease.id)
        if coordinator.status(ROUND).finished:
            self._finished_s = min(self._finished_s, self.now_s)

    def _release(self, lease: Lease) -> None:
        coordinator = self._or_later(self._release, lease)
        if coordinator is not None:
            coordinator.release(lease.job.id, lease.id)

    def _forget(self, replica: ModelledReplica) -> None:
        coordinator = self._or_later(self._forget, replica)
        if coordinator is not None:
            self._seen.pop(replica.name, None)
            coordinator.forget_worker(replica.name)

    # -- scaler

    def _scale(self) -> None:
        self._at(self.now_s + SCALE_INTERVAL_S, self._scale)
        if self._coordinator is None:
            return
        stage = self._coordinator.status(ROUND).stages[STAGE]
        pending, leased, done, failed = stage.counts.problems.values()
        self._scaler.observe(
            POOL,
            self.now_s,
            PoolLoad(waiting=pending + failed, in_service=leased, served=done),
            {
                name: ReplicaLoad(state=replica.state, load=len(replica.trees))
                for name, replica in self._seen.items()
            },
        )
        decision = self._scaler.decide(self.now_s).pools[POOL]
        for name in decision.drain:
            self._drain(self._seen[name], self.now_s + self.config.notice_s)
        for _ in range(decision.start):
            self._start_replica()

    def _start_replica(self) -> None:
        config = self.config
        slow = self._random.random() < config.slow_share
        replica = ModelledReplica(
            name=f"replica-{len(self._replicas)}",
            asked_s=self.now_s,
            speed=config.slow_factor if slow else 1.0,
        )
        self._replicas[replica.name] = self._seen[replica.name] = replica
        start_s = (config.node_start_s + config.engine_start_s) * self._random.uniform(0.8, 1.2)
        self._at(self.now_s + start_s, self._ready, replica)
        if config.lost_per_hour:
            hazard = -math.log(1 - config.lost_per_hour) / 3600.0
            self._at(self.now_s + self._random.expovariate(hazard), self._lose, replica)

    def _ready(self, replica: ModelledReplica) -> None:
        if replica.dead or replica.draining:
            return
        replica.state, replica.ready_s = MemberState.READY, self.now_s
        replica.updated_s = self.now_s
        self._scaler.started(POOL)
        self._at(self.now_s + self.config.renew_s * self._random.random(), self._renew, replica)
        self._take(replica)

    # -- losses

    def _lose(self, replica: ModelledReplica) -> None:
        if replica.dead or replica.draining:
            return
        config = self.config
        self._counts["replicas_lost"] += 1
        if self._random.random() < config.notice_share:
            self._counts["notices"] += 1
            self._drain(replica, self.now_s + config.notice_s)
            return
        if replica.state is MemberState.READY and self._random.random() < config.zombie_share:
            self._counts["zombies"] += 1
            replica.cut_off = True
            self._at(self.now_s + config.zombie_s, self._end, replica)
        else:
            self._end(replica)
        self._at(self.now_s + config.detect_s, self._forget, replica)

    def _drain(self, replica: ModelledReplica, deadline_s: float) -> None:
        replica.draining = True
        if replica.state is MemberState.STARTING:
            self._leave(replica)
            return
        replica.state = MemberState.DRAINING
        self._give_back_unstarted(replica)
        if not replica.shards:
            self._leave(replica)
            return
        self._at(max(self.now_s, deadline_s - DRAIN_MARGIN_S), self._leave, replica)

    def _give_back_unstarted(self, replica: ModelledReplica) -> None:
        """Hand whole shards back that no tree of has been started."""
        waiting = dict.fromkeys(shard.lease.job.id for shard, _ in replica.queue)
        for job_id in waiting:
            shard = replica.shards[job_id]
            num_waiting = sum(other is shard for other, _ in replica.queue)
            if num_waiting == len(shard.lease.job.problem_ids):
                self._drop(replica, shard)
                self._release(shard.lease)

    def _leave(self, replica: ModelledReplica) -> None:
        """Commit finished parts, hand back the rest and end."""
        if replica.dead:
            return
        replica.advance(self.now_s)
        for shard in list(replica.shards.values()):
            if shard.committing:
                continue  # its commit goes through: the margin is longer
            if shard.done:
                self._commit(replica, shard)
            else:
                self._release(shard.lease)
        self._end(replica)
        self._forget(replica)

    def _store_open_trees(self, replica: ModelledReplica, *, at_the_end: bool) -> None:
        """What others can go on with; what came after the last regular checkpoint is not in it."""
        if self.config.checkpoint_s is None:
            return
        missing_s = 0.0 if at_the_end else self._random.uniform(0.0, self.config.checkpoint_s)
        for ends_at, number, _ in replica.trees:
            had = self._tokens[number] - (ends_at - replica.per_tree)
            had -= missing_s * replica.per_tree_s
            self._stored[number] = max(self._stored.get(number, 0.0), had)
        for shard in replica.shards.values():
            self._stored.update((number, self._tokens[number]) for number in shard.done)

    def _end(self, replica: ModelledReplica) -> None:
        if replica.dead:
            return
        replica.advance(self.now_s)
        self._store_open_trees(replica, at_the_end=replica.draining)
        replica.ended_s = self.now_s
        replica.version += 1
        replica.trees.clear()
        replica.queue.clear()
        for job_id in replica.shards:
            self._held[job_id].remove(replica)

    # -- worker

    def _take(self, replica: ModelledReplica) -> None:
        """Take leases until no slot would stay empty."""
        if replica.dead or replica.draining or replica.cut_off:
            return
        while replica.in_hand < self.config.max_open_trees:
            if self._coordinator is None:
                self._poll_at(replica, self._up_s + self._random.random())
                return
            lease = self._coordinator.grant(replica.name)
            if lease is None:
                self._poll_at(replica, self.now_s + self.config.poll_s)
                return
            if lease.job.id in replica.shards:
                self._coordinator.release(lease.job.id, lease.id)
                self._poll_at(replica, self.now_s + self.config.poll_s)
                return
            try:
                self._trajectories.read_commit(lease.job.id)
            except FileNotFoundError:
                self._begin(replica, lease)
            else:
                self._complete(lease)  # somebody committed it and died before saying so

    def _poll_at(self, replica: ModelledReplica, when_s: float) -> None:
        if not replica.polls:
            replica.polls = True
            self._at(when_s, self._poll, replica)

    def _poll(self, replica: ModelledReplica) -> None:
        replica.polls = False
        self._take(replica)

    def _begin(self, replica: ModelledReplica, lease: Lease) -> None:
        numbers = [int(problem_id[1:]) for problem_id in lease.job.problem_ids]
        replica.take(lease, numbers)
        self._held.setdefault(lease.job.id, []).append(replica)
        replica.advance(self.now_s)
        self._fill(replica)

    def _renew(self, replica: ModelledReplica) -> None:
        if replica.dead or replica.cut_off:
            return
        coordinator = self._or_later(self._renew, replica)
        if coordinator is None:
            return
        self._at(self.now_s + self.config.renew_s, self._renew, replica)
        held = [(shard.lease.job.id, shard.lease.id) for shard in replica.shards.values()]
        for job_id in coordinator.renew(replica.name, held, _PROGRESS):
            shard = replica.shards[job_id]
            if not shard.committing:
                self._drop(replica, shard)

    # -- engine

    def _fill(self, replica: ModelledReplica) -> None:
        """Give free slots to waiting trees, and come back when the next tree ends."""
        wait_s = replica.fill(self._speeds, self._todo)
        if wait_s is not None:
            self._at(self.now_s + wait_s, self._tree_ends, replica, replica.version)

    def _todo(self, number: int) -> float:
        """Tokens that the tree of a problem number still needs."""
        return self._tokens[number] - self._stored.get(number, 0.0)

    def _tree_ends(self, replica: ModelledReplica, version: int) -> None:
        if version != replica.version:
            return
        replica.advance(self.now_s)
        for shard in replica.end_trees():
            self._at(self.now_s + self.config.commit_s, self._shard_ends, replica, shard)
        self._fill(replica)
        if replica.in_hand < self.config.max_open_trees and not replica.polls:
            self._take(replica)

    def _drop(self, replica: ModelledReplica, shard: ModelledShard) -> None:
        """Forget a shard: another has it, or it is handed back."""
        replica.advance(self.now_s)
        replica.drop(shard)
        self._held[shard.lease.job.id].remove(replica)
        self._fill(replica)
        self._take(replica)

    # -- commits

    def _shard_ends(self, replica: ModelledReplica, shard: ModelledShard) -> None:
        if replica.dead and not replica.draining:
            return
        job_id = shard.lease.job.id
        rivals = [other for other in self._held[job_id] if other is not replica]
        if replica.cut_off and rivals and self._random.random() < 0.5:
            self._ambushes[job_id] = (replica, shard)
        else:
            self._commit(replica, shard)
        if not replica.dead:
            del replica.shards[job_id]
            self._held[job_id].remove(replica)
            if replica.draining and not replica.shards:
                self._leave(replica)
            elif not replica.polls:
                self._take(replica)

    def _commit(self, replica: ModelledReplica, shard: ModelledShard) -> None:
        """Commit what is done of a shard, and say so unless cut off."""
        job = shard.lease.job
        done = set(shard.done)
        rest = [p for p in job.problem_ids if int(p[1:]) not in done]
        trees = [self._tree(number) for number in sorted(done)]
        self._counts["zombie_commits"] += replica.cut_off
        ambush = None if replica.cut_off else self._ambushes.pop(job.id, None)
        if ambush is not None:
            self._store.on_put = lambda: self._spring(*ambush)
        won = self._trajectories.commit(job.id, trees, remaining=[rest] if rest else [])
        self._store.on_put = None
        self._counts["commits_refused"] += not won
        if not replica.cut_off:
            self._complete(shard.lease)

    def _spring(self, zombie: ModelledReplica, shard: ModelledShard) -> None:
        """A zombie's commit, between the data file and the marker of its rival's."""
        self._counts["races"] += 1
        self._commit(zombie, shard)

    def _tree(self, number: int) -> Tree:
        tree = Tree(
            problem=Problem(
                id=self._ids[number],
                source="simulated",
                level=Level.MATH,
                text="simulated",
                answer="1",
            ),
            round=ROUND,
            generated_tokens=round(self._tokens[number]),
        )
        if self._solved[number]:
            leaf = Node(
                id=-1, parent=-1, depth=-1, step=_ANSWER, terminal=Terminal.ANSWER, correct=True
            )
            expand(tree, tree.root, [leaf])
            backup(tree, leaf, 1.0)
        return tree

    # -- the end

    def _report(self, began_s: float) -> SimulationReport:
        config, makespan_s = self.config, self._finished_s
        assert self._coordinator is not None
        leases = self._coordinator.stats().leases
        reported = self._coordinator.status(ROUND).totals.trees
        manifest = self._coordinator.seal(ROUND)
        audit = audit_round(self._trajectories, reported=reported)
        assert audit.reported == audit.committed, f"{audit.reported} != {audit.committed} trees"
        for replica in self._replicas.values():
            if not replica.dead and replica.ready_s < math.inf:
                replica.advance(self.now_s)
        served = [r for r in self._replicas.values() if r.ready_s < makespan_s]
        ready_s = {r.name: min(r.ended_s, makespan_s) - r.ready_s for r in served}
        capacity = sum(ready_s[r.name] * r.speed for r in served) * self.full_speed
        billed_s = sum(
            max(0.0, min(r.ended_s, makespan_s) - r.asked_s - config.node_start_s)
            for r in self._replicas.values()
        )
        generated = sum(r.generated for r in self._replicas.values())
        useful = manifest.totals.generated_tokens
        ideal_s = useful / (config.num_replicas * self.full_speed)
        dollars = billed_s / 3600.0 * config.price_per_hour
        solved = manifest.totals.solved
        return SimulationReport(
            makespan_s=makespan_s,
            ideal_s=ideal_s,
            scaling_efficiency=useful / capacity,
            efficiency_of_constant=ideal_s / makespan_s,
            utilisation=generated / capacity,
            mean_replicas=sum(ready_s.values()) / makespan_s,
            lost=len(audit.lost),
            doubled=len(audit.doubled),
            unexpected=len(audit.unexpected),
            quarantined=len(audit.quarantined),
            committed=audit.committed,
            solved=solved,
            lost_work=1 - useful / generated,
            generated_tokens=generated,
            replicas_started=len(self._replicas),
            **self._counts,
            leases_granted=leases.granted,
            leases_expired=leases.expired,
            replica_hours=billed_s / 3600.0,
            dollars=dollars,
            dollars_per_solved=dollars / solved if solved else math.inf,
            wall_s=time.perf_counter() - began_s,
        )
