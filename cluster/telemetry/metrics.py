"""The catalogue of metrics, and how a process counts.

    worker, pool, sandbox worker --count, observe--> ray.util.metrics --> Ray's agent on the node -+
    driver (telemetry.exporter) --- looks at the run --> prometheus-client endpoint ---------------+
                                                                                                   v
                       Prometheus, and the samples that the driver keeps in the run's folder <-----+

What only grows is counted where it happens and leaves through Ray: no ports of our own, and nodes
may come and go. What goes up and down is looked at by the driver, because Ray goes on exporting the
last value of a process that is gone: a dead replica would look busy for ever. Every expression sums
over processes, so a restarted one that counts from 0 again does no harm (`rate` copes).

This catalogue is the only place where a metric gets its name. Dashboards (`cluster.watch.panels`),
alert rules, docs/metrics.md and the tests read it; a name that is not here does not exist.

A process counts only if it was told to (`RSTAR_METRICS_RUN`, which the driver gives to its actors):
elsewhere `count` and `observe` return at once. Nothing here raises for want of Ray. Callers count
per request, step or tree, never per token.

Not covered: metrics of vLLM's own (`vllm:*`); what is needed of them is measured here, so that the
panels do not depend on an engine.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Literal

from rollout.tree import Terminal, Tree
from verifier import StepResult

logger = logging.getLogger(__name__)

FLUSH_S = 1.0

VARIABLE = "RSTAR_METRICS_RUN"
"""Environment variable with the run's name; unset or empty: this process counts nothing."""


class Kind(StrEnum):
    """What a number does over time."""

    COUNTER = "counter"
    """Only grows, until its process is replaced."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Who exports it."""

    ACTOR = "actor"
    """The process where it happens, through Ray, which puts `ray_` before the name."""
    DRIVER = "driver"
    """The driver's own endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One entry of the catalogue."""

    name: str
    """In code: counters end in _total, seconds in _seconds."""
    kind: Kind
    source: Source
    unit: str
    """Of the value: "tokens", "seconds", ...; "1" for a share."""
    labels: tuple[str, ...]
    """Besides `run`, which every metric has."""
    help: str
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets, without infinity."""
    combine: Literal["sum", "max"] = "sum"
    """How several series of a gauge become one."""

    @property
    def exported(self) -> str:
        """Name as Prometheus sees it, without a histogram's suffixes."""
        return f"ray_{self.name}" if self.source is Source.ACTOR else self.name

    @property
    def series_names(self) -> tuple[str, ...]:
        """Every name under which Prometheus stores it."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.exported}{end}" for end in ("_bucket", "_sum", "_count"))
        return (self.exported,)


CATALOGUE: dict[str, Metric] = {}
"""Every metric by name."""


def _metric(
    kind: Kind,
    source: Source,
    name: str,
    unit: str,
    labels: str,
    help: str,
    *,
    boundaries: tuple[float, ...] = (),
    combine: Literal["sum", "max"] = "sum",
) -> Metric:
    ending = {Kind.COUNTER: "_total", Kind.GAUGE: "", Kind.HISTOGRAM: "_seconds"}[kind]
    metric = Metric(
        name=f"rstar_{name}{ending}",
        kind=kind,
        source=source,
        unit=unit,
        labels=tuple(labels.split()),
        help=help,
        boundaries=boundaries,
        combine=combine,
    )
    assert metric.name not in CATALOGUE
    CATALOGUE[metric.name] = metric
    return metric


_counted = partial(_metric, Kind.COUNTER, Source.ACTOR)
_looked = partial(_metric, Kind.GAUGE, Source.DRIVER)
_told = partial(_metric, Kind.COUNTER, Source.DRIVER)


def _timed(name: str, labels: str, help: str, boundaries: tuple[float, ...]) -> Metric:
    return _metric(
        Kind.HISTOGRAM, Source.ACTOR, name, "seconds", labels, help, boundaries=boundaries
    )


_WAITS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Of waits and calls: half decades from a millisecond to minutes."""
_SEARCHES = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

# --- Search: rollout workers --------------------------------------------------------------------

TREES = _counted("trees", "trees", "level solved", "Searches that ended; solved is true or false.")
TRAJECTORIES = _counted(
    "trajectories",
    "trajectories",
    "level verified",
    "Root-to-answer paths of ended searches; verified is true if the answer is right.",
)
ROLLOUTS = _counted("rollouts", "rollouts", "", "Root-to-terminal descents of ended searches.")
NODES = _counted("nodes", "nodes", "", "Nodes of ended searches.")
DEAD_ENDS = _counted("dead_ends", "nodes", "reason", "Branches that ended without an answer.")
TREE_SECONDS = _timed("tree", "", "From the start of a search to its end.", _SEARCHES)
SEARCH_RETRIES = _counted(
    "search_retries",
    "retries",
    "cause",
    "Searches gone on with or begun again; cause is engine, search or other.",
)
QUARANTINED = _counted("quarantined_problems", "problems", "", "Problems set aside with an error.")
RESUMED = _counted("resumed_trees", "trees", "", "Searches gone on with from another worker's.")
LEASE_WAIT = _timed("lease_wait", "", "A worker with room, until it has a lease.", _WAITS)
SLOT_WAIT = _timed("slot_wait", "", "A leased problem, until its search starts.", _WAITS)
COMMIT_SECONDS = _timed(
    "commit", "", "A finished shard, until its marker stands in the store.", _WAITS
)
COMMITS = _counted(
    "commits", "shards", "outcome", "Shards committed; outcome is written, or late if another was."
)
STORE_ERRORS = _counted(
    "store_errors", "errors", "operation", "Operations that the store refused; they are retried."
)
LOST_LEASES = _counted("lost_leases", "leases", "", "Leases a worker was told to drop.")

# --- Pools: every request to an engine or a sandbox, as its caller sees it -----------------------

REQUESTS = _counted(
    "requests",
    "requests",
    "pool replica outcome",
    "Calls of a replica; outcome is ok or failed (and tried again where that helps).",
)
REQUEST_SECONDS = _timed(
    "request", "pool", "A call of a replica, from its slot to its end.", _WAITS
)
POOL_WAIT = _timed("pool_wait", "pool", "A call, until it has a slot of a replica.", _WAITS)
GENERATED_TOKENS = _counted(
    "generated_tokens", "tokens", "replica", "Tokens the policy wrote, by replica."
)
PROMPT_TOKENS = _counted(
    "prompt_tokens", "tokens", "replica", "Prompt tokens, once a request whatever its candidates."
)
CACHED_TOKENS = _counted(
    "cached_tokens", "tokens", "replica", "Prompt tokens found in the prefix cache."
)
SCORED_TOKENS = _counted("scored_tokens", "tokens", "replica", "Tokens the PPM read, by replica.")
ENGINE_WAIT = _timed(
    "engine_wait", "", "A request inside a replica, held back while weights are loaded.", _WAITS
)

# --- Sandbox workers -----------------------------------------------------------------------------

SANDBOX_STEPS = _counted("sandbox_steps", "steps", "status", "Steps run, by how they ended.")
SANDBOX_STEP_SECONDS = _timed(
    "sandbox_step", "", "The longest step of a call, from its fork to its answer.", _STEPS
)
SANDBOX_WAIT = _timed(
    "sandbox_wait", "", "A call of the sandbox besides its longest step: queue and replays.", _STEPS
)
SANDBOX_REPLAYS = _counted(
    "sandbox_replayed_steps", "steps", "", "Steps run again because their state was evicted."
)

# --- `rstar serve` -------------------------------------------------------------------------------

SERVE_REQUESTS = _counted(
    "serve_requests",
    "requests",
    "method outcome",
    "Requests that ended; outcome is ok, late (the best answer so far), cancelled, refused (by the "
    "queue), invalid, unauthorised or failed.",
)
SERVE_WAIT = _timed("serve_wait", "method", "A request, until its search begins.", _WAITS)
SERVE_FIRST_STEP = _timed(
    "serve_first_step", "method", "A request, until its first step is told.", _WAITS
)
SERVE_ANSWER = _timed("serve_answer", "method", "A request, until its answer.", _SEARCHES)
SERVE_TOKENS = _counted(
    "serve_tokens",
    "tokens",
    "method kind",
    "Of answered requests; kind is generated, prompt, cached or scored.",
)

# --- The run, looked at by the driver ------------------------------------------------------------

STAGE = _looked("stage_running", "1", "stage round", "1 for the stage the run is at.")
PROGRESS = _looked("stage_done_ratio", "1", "", "Share of the present stage that is done.")
ETA = _looked("eta_seconds", "seconds", "of", "Time left; of is stage or run.")
RUN_SECONDS = _looked("run_seconds", "seconds", "", "Of all starts of the run together.")
JOBS = _looked("jobs", "jobs", "state", "Jobs of the present round, by state.")
PROBLEMS = _looked("problems", "problems", "state", "Problems of its stages, by their job's state.")
OPEN_TREES = _looked("open_trees", "trees", "", "Searches in hand of all workers.")
COMMITTED = _looked(
    "committed_trees", "trees", "round level", "Trees committed, by round and level."
)
SOLVED_RATIO = _looked(
    "solved_ratio", "1", "round level", "Share of the committed trees that solved their problem."
)
LEASES = _told(
    "leases",
    "leases",
    "event",
    "What became of leases: granted, adopted, completed, released, failed, expired, superseded.",
)
STALLED = _looked(
    "stalled", "1", "part waits_on", "1 for a part that has work and makes no progress."
)
REPLICAS = _looked(
    "replicas", "actors", "pool state", "Actors; state is starting, syncing, ready or draining."
)
REPLICAS_WANTED = _looked("replicas_wanted", "actors", "pool", "Actors there should be.")
DEATHS = _told("deaths", "actors", "pool", "Actors that died without having been drained.")
AWAY = _told("away_seconds", "seconds", "pool", "Sum over deaths of the time until replaced.")
ENGINE_RUNNING = _looked(
    "engine_running_sequences", "sequences", "pool replica", "Sequences in an engine's batch."
)
ENGINE_WAITING = _looked(
    "engine_waiting_sequences", "sequences", "pool replica", "Accepted and not yet started."
)
KV_USED = _looked(
    "kv_cache_used_ratio",
    "1",
    "replica",
    "Share of the key-value cache in use.",
    combine="max",
)
PREEMPTIONS = _told(
    "preemptions", "sequences", "replica", "Sequences thrown out of the batch for want of cache."
)
ENGINE_IDLE = _told(
    "engine_idle_seconds", "seconds", "pool replica", "Time of an engine without any request."
)
WEIGHT_LOAD_SECONDS = _told(
    "weight_load_seconds",
    "seconds",
    "pool replica",
    "Time spent loading weights in place, waiting included.",
)
ENGINE_MEMORY = _looked(
    "replica_memory_bytes", "bytes", "pool replica", "Resident memory of a replica's processes."
)
SERVE_SEARCHES = _looked(
    "serve_searches", "searches", "state", "Searches of requests; state is running or waiting."
)
SANDBOX_RUNNING = _looked("sandbox_running", "steps", "", "Steps that run now.")
SANDBOX_QUEUED = _looked("sandbox_queued", "steps", "", "Steps that wait for a core.")
SANDBOX_LIVE = _looked("sandbox_live_states", "processes", "", "Forked states kept alive.")
SANDBOX_CAP = _looked("sandbox_live_cap", "processes", "", "Most that may be alive.")
SANDBOX_TREES = _looked("sandbox_trees", "trees", "", "Trees with a sandbox of their own.")
SANDBOX_EVICTIONS = _told("sandbox_evictions", "processes", "", "States ended to make room.")
SANDBOX_RESTARTS = _told(
    "sandbox_restarts", "restarts", "", "Supervisors replaced inside a worker."
)
LEARNER_STEP = _looked("learner_step", "steps", "kind", "Optimiser steps of the present fit.")
LEARNER_STEPS = _looked("learner_steps", "steps", "kind", "Steps the present fit will take.")
LEARNER_LOSS = _looked("learner_loss", "1", "kind", "Loss of the last step's global batch.")
LEARNER_TOKENS = _looked(
    "learner_tokens_per_second", "tokens/s", "kind", "Tokens of texts over all ranks."
)
LEARNER_MFU = _looked(
    "learner_mfu_ratio", "1", "kind", "Model FLOP/s over the devices' peak, where it is known."
)
LEARNER_GRAD_NORM = _looked("learner_grad_norm", "1", "kind", "Gradient norm before clipping.")
LEARNER_PAIR_ACCURACY = _looked(
    "ppm_pair_accuracy_ratio", "1", "", "Held-out pairs that the last PPM ranks right."
)
LEARNER_PAIR_MARGIN = _looked(
    "ppm_pair_margin", "1", "", "Mean held-out value of the chosen minus the rejected."
)
RULER_ACCURACY = _looked(
    "ppm_ruler_ratio",
    "1",
    "of",
    "Pairs of problems held out for pairs that are ranked right; of is ppm, its lower bound low, "
    "or a baseline: logprob (the policy's), blind (the PPM under another question).",
)
PPM_STEERS = _looked(
    "ppm_steers", "1", "", "1: the last PPM may steer a search; 0: its pair accuracy is too low."
)
CLUSTER_NODES = _looked("cluster_nodes", "nodes", "state", "Ray nodes; state is alive or draining.")
NODE_LOSSES = _told("node_losses", "nodes", "", "Ray nodes that went since the run's start.")
CLUSTER_CPUS = _looked("cluster_cpus", "CPUs", "", "Logical CPUs of the living nodes.")
CLUSTER_GPUS = _looked("cluster_gpus", "GPUs", "", "GPUs of the living nodes.")
COST = _looked("cost_usd", "usd", "", "Dollars of the run so far, all starts.")
PRICE = _looked("cost_usd_per_hour", "usd/h", "", "Price of the machines that are up.")
BUDGET = _looked("budget_usd", "usd", "", "Dollars the run may cost (cost.budget_usd), if set.")
LOOP_LAG = _looked(
    "driver_loop_lag_seconds",
    "seconds",
    "",
    "Longest time since the last look that the driver's event loop stood still.",
)
PROCESS_CPU = _told(
    "process_cpu_seconds",
    "seconds",
    "process",
    "CPU time of the driver and of what it started on its machine, by kind of process.",
)
SAMPLE_SECONDS = _looked(
    "sample_seconds", "seconds", "", "Time the driver took for its last look at everything."
)


# --- Counting ------------------------------------------------------------------------------------

_run = os.environ.get(VARIABLE, "")
_instruments: dict[str, Any] = {}
_pending: dict[tuple[Any, ...], float] = {}
"""Metric's name and labels -> counted since the last flush: adding up here costs less than half a
call of Ray's, which looks at its counters every ten seconds anyway."""
_pending_lock = threading.Lock()
_flushing = False
_recorder: Recorder | None = None


class Recorder:
    """Takes what is counted in this process, for tests and measurements."""

    def __init__(self) -> None:
        self.calls = 0
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        """Sum of the values by metric name and sorted labels."""

    def take(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Raises AssertionError if the labels are not the catalogue's."""
        assert CATALOGUE[metric.name] is metric
        assert set(labels) == set(metric.labels), (metric.name, labels)
        self.calls += 1
        key = (metric.name, tuple(sorted(labels.items())))
        self.values[key] = self.values.get(key, 0.0) + value

    def total(self, metric: Metric, **labels: str) -> float:
        """Sum over everything counted under these labels."""
        wanted = labels.items()
        return sum(
            value
            for (name, found), value in self.values.items()
            if name == metric.name and wanted <= dict(found).items()
        )


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Have this process's counts go to a `Recorder`, and nowhere else."""
    global _recorder
    before, _recorder = _recorder, Recorder()
    try:
        yield _recorder
    finally:
        _recorder = before


def switch_on(run: str) -> None:
    """Have this process, and those it starts from now on, count for a run; "" ends it."""
    global _run
    flush()
    _run = run
    # An instrument belongs to one connection with Ray.
    _instruments.clear()
    if run:
        os.environ[VARIABLE] = run
    else:
        os.environ.pop(VARIABLE, None)


def count(metric: Metric, amount: float = 1.0, **labels: str) -> None:
    """Add to a counter; nothing is done where this process does not count, or for 0."""
    if amount <= 0:
        return
    if _recorder is not None:
        _recorder.take(metric, amount, labels)
    elif _run:
        key = (metric.name, *labels.items())
        with _pending_lock:
            _pending[key] = _pending.get(key, 0.0) + amount
            started = _flushing
        if not started:
            _start_flushing()


def observe(metric: Metric, value: float, **labels: str) -> None:
    """Add a value to a histogram; nothing is done where this process does not count."""
    if _recorder is not None:
        _recorder.take(metric, value, labels)
    elif _run:
        instrument = _instruments.get(metric.name) or _instrument(metric)
        if instrument is not None:
            instrument.observe(value, {"run": _run, **labels})


def flush() -> None:
    """Hand what was counted since the last time to Ray, if there is one; any thread."""
    with _pending_lock:
        counted = dict(_pending)
        _pending.clear()
    for (name, *labels), amount in counted.items():
        instrument = _instruments.get(name) or _instrument(CATALOGUE[name])
        if instrument is not None:
            instrument.inc(amount, {"run": _run, **dict(labels)})


def _start_flushing() -> None:
    """Flush every second from now on, for as long as the process lives."""
    global _flushing
    with _pending_lock:
        if _flushing:
            return
        _flushing = True

    def flush_for_ever() -> None:
        while True:
            time.sleep(FLUSH_S)
            try:
                flush()
            except Exception:
                logger.debug("Counts were lost", exc_info=True)

    threading.Thread(target=flush_for_ever, name="metrics-flush", daemon=True).start()


def _instrument(metric: Metric) -> Any:
    """Ray's side of a metric; None where there is no Ray."""
    import ray
    from ray.util import metrics as ray_metrics

    if not ray.is_initialized():
        return None
    keys = ("run", *metric.labels)
    if metric.kind is Kind.HISTOGRAM:
        made: Any = ray_metrics.Histogram(
            metric.name,
            description=metric.help,
            boundaries=list(metric.boundaries),
            tag_keys=keys,
        )
    else:
        made = ray_metrics.Counter(metric.name, description=metric.help, tag_keys=keys)
    _instruments[metric.name] = made
    return made


def count_tree(tree: Tree, seconds: float) -> None:
    """What an ended search adds, all of it at once."""
    if not _run and _recorder is None:
        return
    level = str(tree.problem.level)
    answers = list(tree.reached_answers())
    verified = sum(bool(node.correct) for node in answers)
    count(TREES, level=level, solved="true" if tree.solved else "false")
    count(TRAJECTORIES, verified, level=level, verified="true")
    count(TRAJECTORIES, len(answers) - verified, level=level, verified="false")
    count(ROLLOUTS, tree.num_rollouts)
    count(NODES, len(tree.nodes))
    ends = [n.terminal for n in tree.nodes if n.terminal not in (None, Terminal.ANSWER)]
    for reason in set(ends):
        count(DEAD_ENDS, ends.count(reason), reason=str(reason))
    observe(TREE_SECONDS, seconds)


def count_steps(results: Sequence[StepResult], seconds: float) -> None:
    """What one call of a sandbox worker adds.

    Args:
        seconds: the call took.
    """
    if (not _run and _recorder is None) or not results:
        return
    statuses = [str(result.status) for result in results]
    for status in set(statuses):
        count(SANDBOX_STEPS, statuses.count(status), status=status)
    longest_s = max(result.wall_s for result in results)
    observe(SANDBOX_STEP_SECONDS, longest_s)
    observe(SANDBOX_WAIT, max(0.0, seconds - longest_s))
    count(SANDBOX_REPLAYS, sum(result.replayed for result in results))
