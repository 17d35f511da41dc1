"""The dashboards of a run, defined once: for Grafana, for `rstar dashboard` and for `rstar top`.

    overview    is it well, how fast, how far, what does it cost
    rollouts    searches, solved shares, jobs, waits at every hand-over
    engines     tokens, cache, batches of each replica
    sandbox     steps, how they ended, queue, live states
    learner     loss, speed, utilisation, the PPM's held-out pairs
    cluster     actors, deaths, nodes, money
    serve       requests of `rstar serve`: queue, first step, answers, tokens

A panel is a title, a unit and queries (`watch.queries`); where it stands follows from the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.telemetry import metrics as m
from cluster.watch.queries import Expression, Mean, Quantile, Rate, Value

Unit = Literal[
    "short", "/s", "/h", "tokens/s", "s", "share", "bytes", "usd", "usd/h", "per usd", "steps"
]


@dataclass(frozen=True, slots=True)
class Query:
    """One or more lines of a panel."""

    expression: Expression
    legend: str
    """Of each line: text with `{label}` for labels the expression keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Something to look at."""

    title: str
    unit: Unit
    queries: tuple[Query, ...]
    help: str
    """What it means and what to look for."""
    kind: Literal["lines", "number", "timeline"] = "lines"
    """number: only the present value of its first query; timeline: a bar for each line while it has
    a value."""

    @property
    def width(self) -> int:
        """Of 24 columns."""
        return 4 if self.kind == "number" else 12

    @property
    def height(self) -> int:
        """In Grafana's units of 30 pixels."""
        return 4 if self.kind == "number" else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One page of panels."""

    name: str
    """In addresses and file names."""
    title: str
    panels: tuple[Panel, ...]


def _lines(title: str, unit: Unit, help: str, *queries: tuple[Expression, str]) -> Panel:
    return Panel(title=title, unit=unit, queries=tuple(Query(*q) for q in queries), help=help)


def _number(title: str, unit: Unit, help: str, expression: Expression) -> Panel:
    return Panel(
        title=title, unit=unit, queries=(Query(expression, title),), help=help, kind="number"
    )


_HOUR = 3600.0

_TREES = Rate(m.TREES)
_VERIFIED = Rate(m.TRAJECTORIES, where={"verified": "true"})
_GENERATED = Rate(m.GENERATED_TOKENS)
_SCORED = Rate(m.SCORED_TOKENS)
_STEPS = Rate(m.SANDBOX_STEPS)
_HIT_SHARE = Rate(m.CACHED_TOKENS) / Rate(m.PROMPT_TOKENS)
_SOLVED_NOW = Rate(m.TREES, where={"solved": "true"}) / _TREES
_OK_STEPS = Rate(m.SANDBOX_STEPS, where={"status": "ok"}) / _STEPS
_PER_GPU_HOUR = (_VERIFIED * _HOUR) / Value(m.CLUSTER_GPUS)
_PER_USD = (_VERIFIED * _HOUR) / Value(m.PRICE)

OVERVIEW = Dashboard(
    name="overview",
    title="Overview",
    panels=(
        _number("Trees", "/s", "Searches that end, per second.", _TREES),
        _number(
            "Verified",
            "/s",
            "Right solutions found, per second: what a run is for.",
            _VERIFIED,
        ),
        _number("Generated tokens", "tokens/s", "Of all policy replicas.", _GENERATED),
        _number("Solved now", "share", "Of the trees that ended lately.", _SOLVED_NOW),
        _number("Stage done", "share", "Of the present stage.", Value(m.PROGRESS)),
        _number("Cost so far", "usd", "All starts of the run.", Value(m.COST)),
        _lines(
            "Generated and scored",
            "tokens/s",
            "Written by the policy and read by the PPM. Both fall together when searches starve; "
            "only one falls when its engines are the trouble.",
            (_GENERATED, "generated"),
            (_SCORED, "scored"),
        ),
        _lines(
            "Trees and trajectories",
            "/s",
            "Searches that ended, paths with an answer, and those with the right one.",
            (_TREES, "trees"),
            (Rate(m.TRAJECTORIES), "trajectories"),
            (_VERIFIED, "verified"),
        ),
        _lines(
            "Jobs of the round",
            "short",
            "Pending falls and done grows; failed jobs are split or quarantined at once.",
            (Value(m.JOBS, by=("state",)), "{state}"),
        ),
        _lines(
            "Stalled parts",
            "short",
            "1 for a part that has work and does not move, and what it waits for. Empty is well.",
            (Value(m.STALLED, by=("part", "waits_on")), "{part} waits on {waits_on}"),
        ),
        Panel(
            title="Stage",
            unit="short",
            kind="timeline",
            help="What the run did when, by round.",
            queries=(Query(Value(m.STAGE, by=("stage", "round")), "round {round} {stage}"),),
        ),
        _lines(
            "Time",
            "s",
            "Elapsed over all starts, and what is estimated to be left.",
            (Value(m.RUN_SECONDS), "elapsed"),
            (Value(m.ETA, by=("of",)), "left of {of}"),
        ),
    ),
)

ROLLOUTS = Dashboard(
    name="rollouts",
    title="Rollouts",
    panels=(
        _lines(
            "Solved share by level",
            "share",
            "Of the trees that ended lately. A sudden fall at all levels is a broken policy or "
            "sandbox, not harder problems.",
            (
                Rate(m.TREES, by=("level",), where={"solved": "true"})
                / Rate(m.TREES, by=("level",)),
                "{level}",
            ),
        ),
        _lines(
            "Solved share by round",
            "share",
            "Of all committed trees of a round; it should grow from round to round.",
            (Value(m.SOLVED_RATIO, by=("round",), where={"level": "all"}), "round {round}"),
        ),
        _lines(
            "Committed trees",
            "short",
            "In the store, by level, of all rounds this driver knows.",
            (Value(m.COMMITTED, by=("round", "level")), "round {round} {level}"),
        ),
        _lines(
            "Problems of the round",
            "short",
            "By the state of their job; every stage of a problem counts.",
            (Value(m.PROBLEMS, by=("state",)), "{state}"),
        ),
        _lines(
            "Open trees",
            "short",
            "Searches in hand. They follow what the engines take.",
            (Value(m.OPEN_TREES), "open"),
        ),
        _lines(
            "Waits at each hand-over, 95 %",
            "s",
            "Where work waits: for a lease, a slot of its worker, a slot of a replica, the "
            "sandbox's queue, the store. The longest one is the bottleneck.",
            (Quantile(0.95, m.LEASE_WAIT), "lease"),
            (Quantile(0.95, m.SLOT_WAIT), "worker slot"),
            (Quantile(0.95, m.POOL_WAIT, by=("pool",)), "{pool} slot"),
            (Quantile(0.95, m.ENGINE_WAIT), "weights being loaded"),
            (Quantile(0.95, m.SANDBOX_WAIT), "sandbox queue"),
            (Quantile(0.95, m.COMMIT_SECONDS), "commit"),
        ),
        _lines(
            "Seconds of a search",
            "s",
            "From its start to its end.",
            (Quantile(0.5, m.TREE_SECONDS), "half"),
            (Quantile(0.95, m.TREE_SECONDS), "95 %"),
        ),
        _lines(
            "Size of a tree",
            "short",
            "Means over the trees that ended lately.",
            (Rate(m.ROLLOUTS) / _TREES, "rollouts"),
            (Rate(m.NODES) / _TREES, "nodes"),
        ),
        _lines(
            "Branches without an answer",
            "/s",
            "Why they ended. Mostly too_deep: steps are too short; no_valid_child: code fails.",
            (Rate(m.DEAD_ENDS, by=("reason",)), "{reason}"),
        ),
        _lines(
            "Commits",
            "/s",
            "Shards. Late ones lost against another worker's: leases are too short.",
            (Rate(m.COMMITS, by=("outcome",)), "{outcome}"),
        ),
        _lines(
            "Leases",
            "/s",
            "Expired ones belonged to workers that were not heard of.",
            (Rate(m.LEASES, by=("event",)), "{event}"),
        ),
        _lines(
            "Troubles",
            "/s",
            "Searches tried again, problems set aside, leases lost, trees gone on with.",
            (Rate(m.SEARCH_RETRIES, by=("cause",)), "retry: {cause}"),
            (Rate(m.QUARANTINED), "quarantined"),
            (Rate(m.LOST_LEASES), "lost leases"),
            (Rate(m.RESUMED), "resumed trees"),
        ),
        _lines(
            "Store errors",
            "/s",
            "Operations that the store refused. They are tried again; work waits meanwhile.",
            (Rate(m.STORE_ERRORS, by=("operation",)), "{operation}"),
        ),
    ),
)

ENGINES = Dashboard(
    name="engines",
    title="Engines",
    panels=(
        _lines(
            "Generated tokens by replica",
            "tokens/s",
            "Replicas of one kind should be alike; a low one is ill or badly placed.",
            (Rate(m.GENERATED_TOKENS, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Scored tokens by replica",
            "tokens/s",
            "Read by the PPM.",
            (Rate(m.SCORED_TOKENS, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Prefix cache hits",
            "share",
            "Prompt tokens that were not computed again. Searches of one tree stay on one replica "
            "for this; it falls when the cache is full or replicas come and go.",
            (_HIT_SHARE, "policy"),
        ),
        _lines(
            "Key-value cache in use",
            "share",
            "At 1 the engine preempts: what it throws out is computed again.",
            (Value(m.KV_USED, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Sequences in the batch",
            "short",
            "Running now, by replica.",
            (Value(m.ENGINE_RUNNING, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Sequences that wait in the engine",
            "short",
            "Accepted, not started.",
            (Value(m.ENGINE_WAITING, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Idle share",
            "share",
            "Time without any request. A GPU that idles is paid for nothing.",
            (Rate(m.ENGINE_IDLE, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Preemptions",
            "/s",
            "Sequences thrown out of the batch for want of cache.",
            (Rate(m.PREEMPTIONS, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Seconds of a call",
            "s",
            "As its caller sees it, by pool.",
            (Quantile(0.5, m.REQUEST_SECONDS, by=("pool",)), "{pool}, half"),
            (Quantile(0.95, m.REQUEST_SECONDS, by=("pool",)), "{pool}, 95 %"),
        ),
        _lines(
            "Calls",
            "/s",
            "By pool and how they ended.",
            (Rate(m.REQUESTS, by=("pool", "outcome")), "{pool} {outcome}"),
        ),
        _lines(
            "Weights loaded in place",
            "s",
            "Seconds spent on it so far, waiting for requests in flight included.",
            (Value(m.WEIGHT_LOAD_SECONDS, by=("replica",)), "{replica}"),
        ),
        _lines(
            "Memory",
            "bytes",
            "Resident, actor and engine together.",
            (Value(m.ENGINE_MEMORY, by=("replica",)), "{replica}"),
        ),
    ),
)

SANDBOX = Dashboard(
    name="sandbox",
    title="Sandbox",
    panels=(
        _number("Steps", "/s", "Run by all workers.", _STEPS),
        _number("Ending well", "share", "Of all steps.", _OK_STEPS),
        _number("Queued", "short", "Steps that wait for a core.", Value(m.SANDBOX_QUEUED)),
        _number("Live states", "short", "Forked processes kept alive.", Value(m.SANDBOX_LIVE)),
        _number(
            "Live share",
            "share",
            "Of the states that may be alive; at 1 they are evicted and replayed.",
            Value(m.SANDBOX_LIVE) / Value(m.SANDBOX_CAP),
        ),
        _number("Sandboxed trees", "short", "With a sandbox of their own.", Value(m.SANDBOX_TREES)),
        _lines(
            "Steps by status",
            "/s",
            "How steps ended. infra_error and pool_overloaded are the sandbox's fault, the others "
            "the code's.",
            (Rate(m.SANDBOX_STEPS, by=("status",)), "{status}"),
        ),
        _lines(
            "Running and queued",
            "short",
            "A queue that stays means too few cores.",
            (Value(m.SANDBOX_RUNNING), "running"),
            (Value(m.SANDBOX_QUEUED), "queued"),
        ),
        _lines(
            "Seconds of a step",
            "s",
            "The longest of each call, from its fork to its answer.",
            (Quantile(0.5, m.SANDBOX_STEP_SECONDS), "half"),
            (Quantile(0.95, m.SANDBOX_STEP_SECONDS), "95 %"),
            (Mean(m.SANDBOX_STEP_SECONDS), "mean"),
        ),
        _lines(
            "Wait of a call",
            "s",
            "Besides its longest step: queue and replays.",
            (Quantile(0.5, m.SANDBOX_WAIT), "half"),
            (Quantile(0.95, m.SANDBOX_WAIT), "95 %"),
        ),
        _lines(
            "Replays, evictions, restarts",
            "/s",
            "Steps run again because their state was evicted; supervisors replaced.",
            (Rate(m.SANDBOX_REPLAYS), "replayed steps"),
            (Rate(m.SANDBOX_EVICTIONS), "evictions"),
            (Rate(m.SANDBOX_RESTARTS), "supervisor restarts"),
        ),
        _lines(
            "Live states and their cap",
            "short",
            "Forked processes kept alive, and the most that may be.",
            (Value(m.SANDBOX_LIVE), "live"),
            (Value(m.SANDBOX_CAP), "cap"),
        ),
    ),
)

LEARNER = Dashboard(
    name="learner",
    title="Learner",
    panels=(
        _lines(
            "Loss",
            "short",
            "Of the last step's global batch.",
            (Value(m.LEARNER_LOSS, by=("kind",)), "{kind}"),
        ),
        _lines(
            "Tokens",
            "tokens/s",
            "Of texts, over all ranks.",
            (Value(m.LEARNER_TOKENS, by=("kind",)), "{kind}"),
        ),
        _lines(
            "Steps",
            "steps",
            "Done, and those the fit will take.",
            (Value(m.LEARNER_STEP, by=("kind",)), "{kind}"),
            (Value(m.LEARNER_STEPS, by=("kind",)), "{kind}, in all"),
        ),
        _lines(
            "Model FLOP/s utilisation",
            "share",
            "Of the devices' peak, where it is known.",
            (Value(m.LEARNER_MFU, by=("kind",)), "{kind}"),
        ),
        _lines(
            "Gradient norm",
            "short",
            "Before clipping.",
            (Value(m.LEARNER_GRAD_NORM, by=("kind",)), "{kind}"),
        ),
        _lines(
            "PPM: held-out pairs",
            "short",
            "Share ranked right (0.5 is chance) and mean margin of the values.",
            (Value(m.LEARNER_PAIR_ACCURACY), "accuracy"),
            (Value(m.LEARNER_PAIR_MARGIN), "margin"),
        ),
        _lines(
            "PPM: ruler",
            "short",
            "Share of pairs ranked right of problems held out for that: by the PPM, its lower "
            "bound, by the policy's log-probability, by the PPM under another question (blind).",
            (Value(m.RULER_ACCURACY, by=("of",)), "{of}"),
            (Value(m.PPM_STEERS), "may steer"),
        ),
    ),
)

CLUSTER = Dashboard(
    name="cluster",
    title="Cluster and cost",
    panels=(
        _number("Cost so far", "usd", "All starts of the run.", Value(m.COST)),
        _number("Price", "usd/h", "Of the machines that are up.", Value(m.PRICE)),
        _number(
            "Verified per $",
            "per usd",
            "Right trajectories for a dollar, at the present rate.",
            _PER_USD,
        ),
        _number(
            "Verified per GPU-hour",
            "/h",
            "Right trajectories, at the present rate; empty without GPUs.",
            _PER_GPU_HOUR,
        ),
        _number("GPUs", "short", "Of the living nodes.", Value(m.CLUSTER_GPUS)),
        _number("CPUs", "short", "Of the living nodes.", Value(m.CLUSTER_CPUS)),
        _lines(
            "Actors by state",
            "short",
            "Everything should be ready; starting that stays finds no place.",
            (Value(m.REPLICAS, by=("pool", "state")), "{pool} {state}"),
        ),
        _lines(
            "Actors wanted and ready",
            "short",
            "By pool.",
            (Value(m.REPLICAS_WANTED, by=("pool",)), "{pool} wanted"),
            (Value(m.REPLICAS, by=("pool",), where={"state": "ready"}), "{pool} ready"),
        ),
        _lines(
            "Deaths",
            "short",
            "Of actors that were not drained, since the start.",
            (Value(m.DEATHS, by=("pool",)), "{pool}"),
        ),
        _lines(
            "Time without a dead actor",
            "s",
            "Sum over deaths until the place was taken again.",
            (Value(m.AWAY, by=("pool",)), "{pool}"),
        ),
        _lines(
            "Nodes",
            "short",
            "Ray nodes, and those that went.",
            (Value(m.CLUSTER_NODES, by=("state",)), "{state}"),
            (Value(m.NODE_LOSSES), "lost"),
        ),
        _lines(
            "Money",
            "usd",
            "So far, and the budget if one is set.",
            (Value(m.COST), "cost"),
            (Value(m.BUDGET), "budget"),
        ),
        _lines(
            "Cores in use",
            "short",
            "Of the driver and of what it started on its own machine, by kind of process.",
            (Rate(m.PROCESS_CPU, by=("process",)), "{process}"),
        ),
        _lines(
            "Driver",
            "s",
            "What one look at everything takes, which should stay far below metrics.sample_s; "
            "and for how long its event loop stood still, while it heard nobody.",
            (Value(m.SAMPLE_SECONDS), "look"),
            (Value(m.LOOP_LAG), "event loop late"),
        ),
    ),
)

_SERVED = Rate(m.SERVE_REQUESTS)

SERVE = Dashboard(
    name="serve",
    title="Serving",
    panels=(
        _number("Requests", "/s", "Of `rstar serve`, that ended.", _SERVED),
        _number(
            "Answered",
            "share",
            "Of the requests that ended lately: answered whole, within their time.",
            Rate(m.SERVE_REQUESTS, where={"outcome": "ok"}) / _SERVED,
        ),
        _number(
            "Searching",
            "short",
            "At present.",
            Value(m.SERVE_SEARCHES, where={"state": "running"}),
        ),
        _lines(
            "Searches",
            "short",
            "Running and waiting for their turn. Waiting that stays is more demand than engines; "
            "at serve.max_queued further requests are refused with 429.",
            (Value(m.SERVE_SEARCHES, by=("state",)), "{state}"),
        ),
        _lines(
            "Requests by outcome",
            "/s",
            "late: the deadline came first, with the best answer so far. cancelled: the client "
            "left. refused: the queue was full, or the turn did not come in time.",
            (Rate(m.SERVE_REQUESTS, by=("outcome",)), "{outcome}"),
        ),
        _lines(
            "Wait for a turn, 95 %",
            "s",
            "In the queue, by method.",
            (Quantile(0.95, m.SERVE_WAIT, by=("method",)), "{method}"),
        ),
        _lines(
            "Time to the first step",
            "s",
            "Until there is something to show, the queue included.",
            (Quantile(0.5, m.SERVE_FIRST_STEP, by=("method",)), "{method}, half"),
            (Quantile(0.95, m.SERVE_FIRST_STEP, by=("method",)), "{method}, 95 %"),
        ),
        _lines(
            "Time to the answer",
            "s",
            "Of whole requests.",
            (Quantile(0.5, m.SERVE_ANSWER, by=("method",)), "{method}, half"),
            (Quantile(0.95, m.SERVE_ANSWER, by=("method",)), "{method}, 95 %"),
        ),
        _lines(
            "Tokens of requests",
            "tokens/s",
            "Written by the policy, in prompts, of these found in the cache, and read by the PPM.",
            (Rate(m.SERVE_TOKENS, by=("kind",)), "{kind}"),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, ROLLOUTS, ENGINES, SANDBOX, LEARNER, CLUSTER, SERVE)


def places(dashboard: Dashboard) -> Iterator[tuple[Panel, int, int]]:
    """Every panel with its column (of 24) and row (in Grafana's units), without gaps or overlap."""
    x = y = height = 0
    for panel in dashboard.panels:
        if x + panel.width > 24:
            x, y, height = 0, y + height, 0
        yield panel, x, y
        x += panel.width
        height = max(height, panel.height)
