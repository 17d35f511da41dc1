"""A round at virtual time: real coordinator, jobs, leases, scaler and commits, modelled engines.

    real:     Coordinator (and with it JobQueue), Scaler, TrajectoryStore with Parquet files,
              markers and manifest on a fsspec store in memory, the audit of all committed rows
    modelled: rollout workers, engines, nodes, losses, selection, fits; one event queue, seconds
              cost nothing

    wait for replicas --> rollout --> seal --> select --> fit, fit --> evaluation, over leases too
         min_ready                             +- the learner's machine -+

All replicas may be waited for (`min_ready` 1), the learner's machine held through the round
(`learner_held`), the engines given back while it works (`engines_held` false): what a rule costs is
the difference of two simulations. Whatever has no time or number (0) is left out.

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
- the coordinator is killed and rebuilt from the store while workers carry on;
- machines are not to be had for a while, or a zone goes with all it has: who is asked for then
  waits for a place;
- the learner's machine is lost (`modelled_learner`).

Not modelled: PPM, sandbox and grading (taken to keep up with the policy), network and store times
other than `commit_s`, start-up of the workers' processes, prices that move; that the run could end
where all replicas are waited for, with `start_timeout_s`.
"""

from __future__ import annotations

import heapq
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from cluster.jobs.audit import audit_round
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.queue import Lease, QueueConfig, StagePlan
from cluster.machines.scaler import MemberState, PoolLoad, ReplicaLoad, Scaler, ScalerConfig
from cluster.planning.latency import LatencyCurve
from cluster.planning.modelled_learner import ModelledLearner
from cluster.planning.modelled_replica import ModelledReplica, ModelledShard
from cluster.planning.simulated_store import PROTOCOL, DictFileSystem, RacingStore
from cluster.planning.simulation_figures import SimulationConfig, SimulationReport
from rollout.problem import Level, Problem
from rollout.prompt import Step, StepKind
from rollout.store import TrajectoryStore
from rollout.tree import Node, Terminal, Tree, backup, expand

_PROGRESS = WorkerProgress()
_ANSWER = Step(kind=StepKind.ANSWER, text="simulated", answer="1")

ROUND, EVALUATION = 1, 2
"""What is searched, in the coordinator's rounds: an evaluation is leased like them."""
STAGE, POOL = "base", "policy"
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
        # Those of the evaluation have the last numbers.
        self._tokens += self._random.choices(self._tokens, k=config.num_evaluation)
        self._solved += [False] * config.num_evaluation
        # p000123: the position after the letter is the problem's number.
        self._ids = tuple(f"p{number:06d}" for number in range(len(self._tokens)))
        self._stored: dict[int, float] = {}
        """Tokens that stored trees in work have had, by problem number."""
        self._root = f"{PROTOCOL}://{uuid.uuid4().hex}"
        self._store = RacingStore(self._root)
        self._trajectories = {n: TrajectoryStore(self._store, n) for n in (ROUND, EVALUATION)}
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
        self._waiting: list[ModelledReplica] = []
        """Asked for, and without a place."""
        places = [n % config.num_zones for n in range(config.num_replicas)]
        self._places = places[config.short_replicas :]
        """Zones of the free places; one may stand there several times."""
        self._zone_away = False
        self._coordinator: Coordinator | None = self._new_coordinator()
        self._up_s = 0.0
        self._searched: int | None = None
        """What is searched now."""
        self._wanted = 0
        """Replicas, by the scaler."""
        self._serving = False
        """Work is given out."""
        self._served_s = math.inf
        self._round_s = math.inf
        self._counts = Counter[str]()
        self._figures: dict[str, Any] = {}
        """Of the rollout, once it is over."""
        self._learner = ModelledLearner(
            config,
            after=lambda wait_s, action: self._at(self.now_s + wait_s, action),
            now_s=lambda: self.now_s,
            random=self._random,
        )

    def run(self) -> SimulationReport:
        """Simulate until the round is over, its trees sealed and audited."""
        began_s = time.perf_counter()
        config = self.config
        try:
            self._search(ROUND)
            self._at(0.0, self._scale)
            if config.learner_held:
                self._learner.ask()
            if config.short_replicas:
                self._at(config.short_s, self._free, range(config.short_replicas))
            if config.zone_outage_at_s:
                self._at(config.zone_outage_at_s, self._lose_zone)
            if config.coordinator_kill_s:
                self._at(config.coordinator_kill_s, self._kill_coordinator)
            while self._round_s == math.inf:
                self.now_s, _, action, arguments = heapq.heappop(self._events)
                action(*arguments)
            return self._report(began_s)
        finally:
            DictFileSystem().forget(self._root)

    # -- stages

    def _search(self, what: int) -> None:
        """Plan a search and begin it as soon as enough replicas are READY."""
        coordinator = self._or_later(self._search, what)
        if coordinator is None:
            return
        config = self.config
        numbers = slice(config.num_problems) if what == ROUND else slice(config.num_problems, None)
        coordinator.plan(
            StagePlan(
                round=what,
                stage=STAGE,
                tree_index=0,
                problem_ids=self._ids[numbers],
                shard_size=config.shard_size,
                seed=config.seed,
            )
        )
        self._searched = what
        self._serve()

    def _serve(self) -> None:
        """Give work out if enough replicas are READY."""
        ready = [r for r in self._seen.values() if r.state is MemberState.READY]
        enough = max(1, math.ceil(round(self.config.min_ready * self._wanted, 6)))
        if self._serving or self._searched is None or len(ready) < enough:
            return
        self._serving = True
        self._served_s = min(self._served_s, self.now_s)
        for replica in ready:
            self._take(replica)

    def _search_ends(self, coordinator: Coordinator) -> None:
        config, ended = self.config, self._searched
        self._searched, self._serving = None, False
        for replica in self._replicas.values():
            if replica.dead:
                continue
            replica.advance(self.now_s)
            if replica.cut_off:
                continue
            for shard in list(replica.shards.values()):
                if not shard.committing:
                    self._drop(replica, shard)  # another has committed it
        if ended == EVALUATION:
            self._round_s = self.now_s
            return
        self._figures = self._rollout_figures(coordinator)
        if not config.engines_held:
            for replica in list(self._seen.values()):
                self._drain(replica, self.now_s, idle_s=config.idle_timeout_s)
        fits = [
            config.policy_fit_tokens * self._figures["solved"],
            config.ppm_fit_tokens * config.num_problems,
        ]
        if not config.learner_held and any(fits):
            self._learner.ask()
        self._at(
            self.now_s + config.select_ms_per_tree / 1000 * config.num_problems,
            self._fit,
            [tokens / config.learner_tokens_per_s for tokens in fits if tokens],
        )

    def _fit(self, seconds: list[float]) -> None:
        if seconds:
            self._learner.fit(seconds, self._evaluate)
        else:
            self._evaluate()

    def _evaluate(self) -> None:
        config = self.config
        if not config.learner_held:
            self._learner.give_back(config.learner_idle_timeout_s)
        if config.num_evaluation:
            weights_s = config.weights_s if config.engines_held else 0.0
            self._at(self.now_s + weights_s, self._search, EVALUATION)
        else:
            self._round_s = self.now_s

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
        if self._searched is None:
            self._at(self.now_s + self.config.coordinator_kill_s, self._kill_coordinator)
            return
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
        job = lease.job
        coordinator.complete(job.id, lease.id)
        if job.round == self._searched and coordinator.status(job.round).finished:
            self._search_ends(coordinator)

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
        if self._coordinator is None or (self._searched is None and not self.config.engines_held):
            return
        pending, leased, done, failed = 0, 0, 0, 0
        if self._searched is not None:
            stage = self._coordinator.status(self._searched).stages[STAGE]
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
        self._wanted = decision.target
        for name in decision.drain:
            self._drain(
                self._seen[name],
                self.now_s + self.config.notice_s,
                idle_s=self.config.idle_timeout_s,
            )
        for _ in range(decision.start):
            self._start_replica()

    def _start_replica(self) -> None:
        config = self.config
        slow = self._random.random() < config.slow_share
        replica = ModelledReplica(
            name=f"replica-{len(self._replicas)}",
            speed=config.slow_factor if slow else 1.0,
        )
        self._replicas[replica.name] = self._seen[replica.name] = replica
        self._waiting.append(replica)
        self._place()

    def _place(self) -> None:
        """Give free places to those that wait, as evenly over the zones as they are."""
        self._waiting = [replica for replica in self._waiting if not replica.draining]
        free = Counter(self._places)
        if self._zone_away:
            del free[0]
        while self._waiting and free.total():
            zone = max(free, key=lambda zone: free[zone])
            free[zone] -= 1
            self._places.remove(zone)
            self._start_on(zone, self._waiting.pop(0))

    def _free(self, zones: Iterable[int]) -> None:
        """Others may have these places."""
        self._places += [zone % self.config.num_zones for zone in zones]
        self._place()

    def _start_on(self, zone: int, replica: ModelledReplica) -> None:
        config = self.config
        replica.zone, replica.placed_s = zone, self.now_s
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
        self._serve()
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
        self._vanish(replica)

    def _lose_zone(self) -> None:
        self._zone_away = True
        for replica in list(self._seen.values()):
            if replica.zone == 0:
                self._counts["replicas_lost"] += 1
                self._vanish(replica)
        self._at(self.now_s + self.config.zone_outage_s, self._regain_zone)

    def _regain_zone(self) -> None:
        self._zone_away = False
        self._place()

    def _vanish(self, replica: ModelledReplica) -> None:
        """Lose a replica without notice."""
        config = self.config
        if replica.state is MemberState.READY and self._random.random() < config.zombie_share:
            self._counts["zombies"] += 1
            replica.cut_off = True
            self._leave_place(replica)
            self._at(self.now_s + config.zombie_s, self._end, replica)
        else:
            self._end(replica)
        self._at(self.now_s + config.detect_s, self._forget, replica)

    def _leave_place(self, replica: ModelledReplica) -> None:
        if replica.zone is not None:
            zone, replica.zone = replica.zone, None
            self._free([zone])

    def _drain(self, replica: ModelledReplica, deadline_s: float, idle_s: float = 0.0) -> None:
        """Have a replica commit and leave; its node is paid for `idle_s` longer."""
        if replica.dead or replica.draining or replica.cut_off:
            return
        replica.draining, replica.idle_s = True, idle_s
        self._leave_place(replica)
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
        self._leave_place(replica)
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
        if replica.dead or replica.draining or replica.cut_off or not self._serving:
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
                self._trajectories[lease.job.round].read_commit(lease.job.id)
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
            shard = replica.shards.get(job_id)
            if shard is not None and not shard.committing:
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
        trees = [self._tree(number, job.round) for number in sorted(done)]
        self._counts["zombie_commits"] += replica.cut_off
        ambush = None if replica.cut_off else self._ambushes.pop(job.id, None)
        if ambush is not None:
            self._store.on_put = lambda: self._spring(*ambush)
        won = self._trajectories[job.round].commit(job.id, trees, remaining=[rest] if rest else [])
        self._store.on_put = None
        self._counts["commits_refused"] += not won
        if not replica.cut_off:
            self._complete(shard.lease)

    def _spring(self, zombie: ModelledReplica, shard: ModelledShard) -> None:
        """A zombie's commit, between the data file and the marker of its rival's."""
        self._counts["races"] += 1
        self._commit(zombie, shard)

    def _tree(self, number: int, what: int) -> Tree:
        tree = Tree(
            problem=Problem(
                id=self._ids[number],
                source="simulated",
                level=Level.MATH,
                text="simulated",
                answer="1",
            ),
            round=what,
            generated_tokens=round(self._tokens[number]),
        )
        if self._solved[number]:
            leaf = Node(
                id=-1, parent=-1, depth=-1, step=_ANSWER, terminal=Terminal.ANSWER, correct=True
            )
            expand(tree, tree.root, [leaf])
            backup(tree, leaf, 1.0)
        return tree

    # -- figures

    def _rollout_figures(self, coordinator: Coordinator) -> dict[str, Any]:
        """Seal and audit the round; all replicas have been brought up to now."""
        makespan_s = self.now_s
        reported = coordinator.status(ROUND).totals.trees
        manifest = coordinator.seal(ROUND)
        audit = audit_round(self._trajectories[ROUND], reported=reported)
        assert audit.reported == audit.committed, f"{audit.reported} != {audit.committed} trees"
        served = [r for r in self._replicas.values() if r.ready_s < makespan_s]
        ready_s = {r.name: min(r.ended_s, makespan_s) - r.ready_s for r in served}
        capacity = sum(ready_s[r.name] * r.speed for r in served) * self.full_speed
        generated = sum(r.generated for r in self._replicas.values())
        useful = manifest.totals.generated_tokens
        ideal_s = useful / (self.config.num_replicas * self.full_speed)
        leases = coordinator.stats().leases
        return {
            "makespan_s": makespan_s,
            "ideal_s": ideal_s,
            "scaling_efficiency": useful / capacity,
            "efficiency_of_constant": ideal_s / makespan_s,
            "wait_s": self._served_s,
            "utilisation": generated / capacity,
            "mean_replicas": sum(ready_s.values()) / makespan_s,
            "lost": len(audit.lost),
            "doubled": len(audit.doubled),
            "unexpected": len(audit.unexpected),
            "quarantined": len(audit.quarantined),
            "committed": audit.committed,
            "solved": manifest.totals.solved,
            "lost_work": 1 - useful / generated,
            "generated_tokens": generated,
            "replicas_started": len(self._replicas),
            "leases_granted": leases.granted,
            "leases_expired": leases.expired,
            **self._counts,
        }

    def _report(self, began_s: float) -> SimulationReport:
        config, learner = self.config, self._learner
        learner.give_back()
        paid_s = sum(
            max(0.0, min(r.ended_s + r.idle_s, self._round_s) - r.placed_s - config.node_start_s)
            for r in self._replicas.values()
        )
        engine_dollars = paid_s / 3600.0 * config.price_per_hour
        learner_dollars = learner.paid_s / 3600.0 * config.learner_price_per_hour
        solved = self._figures["solved"]
        return SimulationReport(
            **self._figures,
            round_s=self._round_s,
            replica_hours=paid_s / 3600.0,
            learner_machines=learner.machines,
            learner_hours=learner.paid_s / 3600.0,
            learner_idle_share=1 - learner.fit_s / learner.paid_s if learner.paid_s else 0.0,
            engine_dollars=engine_dollars,
            learner_dollars=learner_dollars,
            dollars_per_solved=(engine_dollars + learner_dollars) / solved if solved else math.inf,
            wall_s=time.perf_counter() - began_s,
        )
