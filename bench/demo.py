"""Where the time of a run went: seconds by stage and by process, from the run's own record.

    python -m bench.demo --profile RUN [--json FILE]

Stages and when they ended are in the log of the driver, CPU time by kind of process in the samples
(`cluster.telemetry.process_times`; every `metrics.sample_s`, between two of which it is taken to
be even). "cores" is CPU time over time: how much of the machine a stage has used. A run that is
older than these samples, or on an attached cluster, shows its stages alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.telemetry import logs
from cluster.telemetry.metrics import PROCESS_CPU
from cluster.telemetry.samples import Samples
from rollout.run_store import RunStore

_ENDED = re.compile(r"((?:round \d+: )?[a-z]\w*[^:(]*).* \((\d+) s\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of one start of a run."""

    label: str
    began_unix_s: float
    seconds: float
    cpu_seconds: dict[str, float]
    """By kind of process; empty if the run has no samples of it."""

    @property
    def cores(self) -> float:
        return sum(self.cpu_seconds.values()) / max(self.seconds, 1e-9)


def profile(store: RunStore) -> list[Stage]:
    """The stages of a run in their order, and as "between stages" what no stage accounts for.

    Raises:
        ValueError: the log of the driver tells of no stage.
    """
    spans: list[tuple[str, float, float]] = []
    last_s = 0.0
    for line in sorted(logs.read(store), key=lambda line: line.unix_s):
        ended = _ENDED.fullmatch(line.text) if line.logger.endswith(".progress") else None
        if ended is None or line.unix_s - float(ended[2]) < last_s - 2.0:
            continue
        spans.append((ended[1].strip(), max(line.unix_s - float(ended[2]), last_s), line.unix_s))
        last_s = line.unix_s
    if not spans:
        raise ValueError(f"{store.root}: the log of its driver tells of no stage that ended")
    series = Samples.read(store).series.get(PROCESS_CPU.exported, {})

    def used(began_s: float, ended_s: float) -> dict[str, float]:
        return {
            dict(labels)["process"]: float(
                np.interp(ended_s, found.times, found.values)
                - np.interp(began_s, found.times, found.values, left=0.0)
            )
            for labels, found in series.items()
        }

    stages = [
        Stage(
            label=label, began_unix_s=began, seconds=ended - began, cpu_seconds=used(began, ended)
        )
        for label, began, ended in spans
    ]
    gaps = [(a[2], b[1]) for a, b in pairwise(spans)]
    between: Counter[str] = Counter()
    for gap in gaps:
        between.update(used(*gap))
    rest = Stage(
        label="between stages",
        began_unix_s=spans[0][1],
        seconds=sum(b - a for a, b in gaps),
        cpu_seconds=dict(between),
    )
    return [*stages, rest]


def summed(stages: Sequence[Stage]) -> list[Stage]:
    """Stages of a kind together, the longest first."""
    kinds: dict[str, list[Stage]] = {}
    for stage in stages:
        kinds.setdefault(re.sub(r"round \d+: ", "", stage.label), []).append(stage)
    found = []
    for kind, alike in kinds.items():
        cpu: Counter[str] = Counter()
        for stage in alike:
            cpu.update(stage.cpu_seconds)
        found.append(
            Stage(
                label=f"{len(alike)} x {kind}",
                began_unix_s=alike[0].began_unix_s,
                seconds=sum(stage.seconds for stage in alike),
                cpu_seconds=dict(cpu),
            )
        )
    return sorted(found, key=lambda stage: -stage.seconds)


def table(title: str, stages: Sequence[Stage]) -> Table:
    """A row per stage and one for all; a column per kind of process that counts."""
    total: Counter[str] = Counter()
    for stage in stages:
        total.update(stage.cpu_seconds)
    shown = [kind for kind, seconds in total.most_common() if seconds >= 0.01 * total.total()]
    made = Table("stage", "s", "cores", *shown, title=title, box=box.SIMPLE_HEAD)
    made.columns[0].no_wrap = True
    for column in made.columns[1:]:
        column.justify = "right"
    whole = Stage(
        label="all",
        began_unix_s=0.0,
        seconds=sum(stage.seconds for stage in stages),
        cpu_seconds=dict(total),
    )
    for stage in (*stages, whole):
        cores = f"{stage.cores:.2f}" if stage.cpu_seconds and stage.seconds >= 1.0 else "-"
        parts = (f"{stage.cpu_seconds.get(kind, 0.0):.0f}" for kind in shown)
        made.add_row(stage.label, f"{stage.seconds:.0f}", cores, *parts)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", metavar="RUN", required=True, help="folder of a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the stages there too")
    given = parser.parse_args(arguments)
    try:
        stages = profile(RunStore(given.profile))
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table(f"{given.profile}: CPU seconds of processes, by stage", stages))
    console.print(table("stages of a kind together", summed(stages)))
    if given.json is not None:
        rows: list[dict[str, Any]] = [
            {"stage": s.label, "seconds": s.seconds, "cpu_seconds": s.cpu_seconds} for s in stages
        ]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
