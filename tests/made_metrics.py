"""A run's folder with half an hour of made samples, for what reads them, and what panels need."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cluster.telemetry import metrics as m
from cluster.telemetry.live import LIVE_FILE, Live, Snapshot
from cluster.telemetry.samples import Key, SampleWriter
from cluster.watch.queries import Expression
from rollout.run_store import RunStore

ROW_S = 10.0
NUM_ROWS = 180
WAITS = {m.POOL_WAIT: ("policy", "ppm", "sandbox"), m.REQUEST_SECONDS: ("policy", "ppm", "sandbox")}


def metrics_of(expression: Expression) -> Iterator[m.Metric]:
    """Every metric an expression of a panel needs."""
    for name in ("metric", "of", "left", "right"):
        part = getattr(expression, name, None)
        if isinstance(part, m.Metric):
            yield part
        elif part is not None:
            yield from metrics_of(part)


def write_made_run(root: Path, end_s: float, *, state: str = "running") -> None:
    """A run of which everything is known: curves that differ, and round numbers."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text("name: made\n", encoding="utf-8")
    live = Live(
        state=state,  # type: ignore[arg-type]
        time_unix_s=end_s,
        started_unix_s=end_s - 1800,
        seconds_total=1800,
        host="h",
        pid=1,
        command="rstar evolve demo",
        cwd="/",
        progress=Snapshot(
            stage="rollout",
            label="round 2: rollout",
            round=2,
            done=260,
            total=600,
            stage_eta_s=900,
            run_eta_s=5400,
            usd_per_hour=12.0,
            cost_usd=6.0,
        ),
    )
    (root / LIVE_FILE).write_text(json.dumps(asdict(live)), encoding="utf-8")
    writer = SampleWriter(RunStore(root))
    for row in range(NUM_ROWS + 1):
        writer.write(end_s - ROW_S * (NUM_ROWS - row), made_row(row))
    writer.close()


def made_row(row: int) -> dict[Key, float]:
    """What stands in one row: row * 10 seconds after the start."""
    seconds = ROW_S * row
    wave = seconds + 60 * math.sin(row / 12)
    found: dict[Key, float] = {}

    def put(metric: m.Metric, value: float, suffix: str = "", **labels: str) -> None:
        found[metric.exported + suffix, tuple(sorted(labels.items()))] = value

    for number, replica in enumerate(("policy-0", "policy-1", "policy-2")):
        speed = 1200 - 150 * number
        put(m.GENERATED_TOKENS, speed * wave, replica=replica)
        put(m.PROMPT_TOKENS, 3 * speed * seconds, replica=replica)
        put(m.CACHED_TOKENS, 2 * speed * seconds, replica=replica)
        put(m.KV_USED, 0.4 + 0.2 * number, replica=replica)
        put(m.ENGINE_RUNNING, 64 - 9 * number, pool="policy", replica=replica)
        put(m.ENGINE_WAITING, 3 * number, pool="policy", replica=replica)
        put(m.ENGINE_IDLE, 0.02 * seconds * number, pool="policy", replica=replica)
    put(m.SCORED_TOKENS, 9000 * wave, replica="ppm-0")
    put(m.ENGINE_RUNNING, 12, pool="ppm", replica="ppm-0")
    for level, share in (("gsm", 0.8), ("math", 0.5), ("olympiad", 0.1)):
        put(m.TREES, 0.2 * share * wave, level=level, solved="true")
        put(m.TREES, 0.2 * (1 - share) * wave, level=level, solved="false")
        put(m.TRAJECTORIES, 2 * share * seconds, level=level, verified="true")
        put(m.TRAJECTORIES, 2 * (1 - share) * seconds, level=level, verified="false")
        put(m.COMMITTED, 0.2 * seconds, round="2", level=level)
        put(m.SOLVED_RATIO, share, round="2", level=level)
    put(m.SOLVED_RATIO, 0.47, round="2", level="all")
    put(m.SOLVED_RATIO, 0.41, round="1", level="all")
    put(m.ROLLOUTS, 9.6 * seconds)
    put(m.NODES, 60 * seconds)
    for status, share in (("ok", 0.9), ("error", 0.08), ("timeout", 0.02)):
        put(m.SANDBOX_STEPS, 80 * share * wave, status=status)
    for metric, pools in WAITS.items():
        for pool in pools:
            for upper in (*metric.boundaries, math.inf):
                le = "+Inf" if math.isinf(upper) else str(upper)
                count = seconds * (1 - math.exp(-upper / (3 if pool == "policy" else 0.2)))
                put(metric, count, "_bucket", pool=pool, le=le)
            put(metric, seconds, "_count", pool=pool)
            put(metric, seconds, "_sum", pool=pool)
    put(m.JOBS, max(0, 40 - row // 5), state="pending")
    put(m.JOBS, 6, state="leased")
    put(m.JOBS, row // 5, state="done")
    put(m.JOBS, 0, state="failed")
    for pool, wanted in (("policy", 3), ("ppm", 1), ("sandbox", 2), ("worker", 2)):
        put(m.REPLICAS, wanted, pool=pool, state="ready")
        put(m.REPLICAS_WANTED, wanted, pool=pool)
        put(m.DEATHS, 1 if pool == "policy" and row > 90 else 0, pool=pool)
    for metric, value in (
        (m.SANDBOX_RUNNING, 14.0),
        (m.SANDBOX_QUEUED, 3.0),
        (m.SANDBOX_LIVE, 240.0),
        (m.SANDBOX_CAP, 512.0),
        (m.SANDBOX_TREES, 64.0),
        (m.OPEN_TREES, 64.0),
        (m.PROGRESS, row / 400),
        (m.RUN_SECONDS, seconds),
        (m.COST, seconds / 300),
        (m.PRICE, 12.0),
        (m.BUDGET, 50.0),
        (m.CLUSTER_CPUS, 32.0),
        (m.CLUSTER_GPUS, 4.0),
        (m.SAMPLE_SECONDS, 0.03),
        (m.LOOP_LAG, 0.01),
    ):
        put(metric, value)
    for process, cores in (("PolicyReplica", 0.9), ("SandboxWorker", 0.6), ("driver", 0.1)):
        put(m.PROCESS_CPU, cores * seconds, process=process)
    put(m.STAGE, 1, stage="rollout", round="2")
    put(m.ETA, 5400 - seconds, of="run")
    put(m.CLUSTER_NODES, 5, state="alive")
    put(m.NODE_LOSSES, 0)
    put(m.LEARNER_LOSS, 2.0 / (1 + row / 30), kind="policy")
    put(m.LEARNER_TOKENS, 5200, kind="policy")
    return found
