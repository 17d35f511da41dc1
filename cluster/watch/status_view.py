"""`rstar status RUN`: how a run stands (`cluster.watch.status`), in the terminal or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as Redrawn
from rich.table import Table
from rich.text import Text

from cluster.evaluation.shares import COLUMNS, ruler_text
from cluster.machines.cost import cost_lines
from cluster.telemetry.live import INTERVAL_S, Live
from cluster.telemetry.progress import LEVELS_FACT, ROUND_STAGES, duration, eta_text, fact_text
from cluster.watch.status import (
    DONE,
    RUNNING,
    STOPPED,
    RoundState,
    RunStatus,
    StageState,
    read_status,
)

_SHOWN_CHANGES = 5

_SHOWN_PROBLEMS = 10
"""Quarantined problems, and suspects, that are shown to people; --json has all."""


def show_status(
    run: str | Path, console: Console, *, as_json: bool = False, watch: bool = False
) -> None:
    """Print how a run stands; with `watch` again and again, until it does not run any more.

    Raises:
        RunFolderError, StoreError, CheckpointError: as `read_status`.
    """
    readings = _readings(run)
    if watch and console.is_terminal and not as_json:
        redraw(console, map(status_view, readings))
        return
    for status in readings:
        if as_json:
            console.file.write(json.dumps(asdict(status), indent=None if watch else 1) + "\n")
            console.file.flush()
        else:
            console.print(status_view(status))
        if not watch:
            return


def redraw(console: Console, views: Iterable[RenderableType]) -> None:
    """Show one view after the other in the same place of a terminal; the last one stays."""
    with Redrawn(console=console, auto_refresh=False) as redrawn:
        for view in views:
            redrawn.update(view, refresh=True)


def _readings(run: str | Path) -> Iterator[RunStatus]:
    """A run until it ends, read at most a quarter of the time, however large it is."""
    while True:
        began_s = time.monotonic()
        status = read_status(run, now_unix_s=time.time())
        took_s = time.monotonic() - began_s
        yield status
        if status.state not in ("running", "stopping"):
            return
        time.sleep(max(INTERVAL_S, 3 * took_s))


def status_view(status: RunStatus) -> RenderableType:
    """What is shown in the terminal, within 80 columns."""
    parts: list[RenderableType] = [
        Text.assemble((status.name, "bold"), f"  {status.run}"),
        Text(status.explanation, style=_STYLES.get(status.state, "")),
    ]
    if status.state in ("running", "stopping") and status.live is not None:
        parts += _now_lines(status.live)
    parts += ["", _stages_table(status), ""]
    searched = [round for round in status.rounds if round.trees or round.quarantined]
    if searched:
        parts += [_problems_table(status, searched), ""]
    for round in status.rounds:
        parts += _round_lines(round)
    parts += _lineage_lines(status)
    parts += _change_lines(status)
    parts += [Text(line) for line in cost_lines(status.cost)]
    parts.append(Text(_totals_line(status), style="cyan"))
    for name, told in status.tracked.items():
        parts.append(Text(f"tracked: {told['link'] or name}", overflow="fold"))
        if told["error"]:
            parts.append(Text(f"{name} was not told last: {told['error']}", style="yellow"))
    if status.go_on:
        parts.append(Text(f"to go on: {status.go_on}", style="bold"))
    return Group(*parts)


_STYLES = {"running": "green", "finished": "green", "failed": "red", "killed": "yellow"}


def _now_lines(live: Live) -> list[RenderableType]:
    now = live.progress
    if not now.stage:
        return []
    count = f" {now.done:,}/{now.total:,}" if now.total else ""
    facts = ", ".join(fact_text(k, v) for k, v in now.facts.items() if k != LEVELS_FACT)
    lines = [
        Text(f"now: {now.label}{count}" + (f"; {facts}" if facts else "")),
        Text(
            f"stage {duration(now.stage_elapsed_s)}, ETA {eta_text(now.stage_eta_s)}; "
            f"run ETA {eta_text(now.run_eta_s)}"
        ),
    ]
    if now.last_error:
        lines.append(Text(f"last error: {now.last_error}", style="yellow"))
    return list(lines)


def _stages_table(status: RunStatus) -> Table:
    names = [n for n in ROUND_STAGES if any(n in round.stages for round in status.rounds)]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("round")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for round in status.rounds:
        cells = [_stage_cell(round.stages.get(name)) for name in names]
        table.add_row(_round_name(round.round), *cells)
    return table


def _stage_cell(stage: StageState | None) -> Text:
    if stage is None:
        return Text("")
    if stage.state == DONE:
        took = f" {duration(stage.seconds)}" if stage.seconds is not None else ""
        return Text(f"done{took}", style="green")
    return Text(stage.state, style={RUNNING: "bold", STOPPED: "yellow"}.get(stage.state, "dim"))


def _problems_table(status: RunStatus, rounds: Sequence[RoundState]) -> Table:
    of = f", of {status.problems['all']:,} problems" if status.problems else ""
    table = Table(
        title=f"problems solved / searched{of}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("round")
    names = [c for c in COLUMNS if any(c in round.searched for round in rounds)]
    for name in (*names, "trees", "commits", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for round in rounds:
        cells = [
            f"{round.solved.get(c, 0):,}/{round.searched[c]:,}" if c in round.searched else ""
            for c in names
        ]
        sums = (f"{round.trees:,}", f"{round.commits:,}", short(round.generated_tokens))
        table.add_row(_round_name(round.round), *cells, *sums)
    return table


def _round_lines(round: RoundState) -> list[Text]:
    lines = []
    name = f"round {round.round}"
    if round.passes and round.stages["rollout"].state != DONE:
        told = ", ".join(
            f"{p.name} {p.committed:,} of {p.planned:,} committed, {p.solved:,} solved"
            for p in round.passes
        )
        lines.append(Text(f"{name}: {told}"))
    if round.quarantined:
        lines.append(
            Text(f"{name}: quarantined problems: {len(round.quarantined):,}", style="yellow")
        )
        shown = list(round.quarantined.items())[:_SHOWN_PROBLEMS]
        lines += [Text(f"  {problem}: {error}", overflow="ellipsis") for problem, error in shown]
        lines += _more(len(round.quarantined))
    if round.suspects:
        lines.append(Text(f"{name}: suspect labels: {len(round.suspects):,}", style="yellow"))
        lines += [
            Text(
                f"  {s['problem_id']}: label {s['gold']}, {s['votes']} of {s['num_answers']} "
                f"answers say {s['answer']}"
            )
            for s in round.suspects[:_SHOWN_PROBLEMS]
        ]
        lines += _more(len(round.suspects))
    if round.ruler:
        lines.append(Text(f"{name}: {ruler_text(round.ruler)}"))
    steering = round.lineage.get("steering", {})
    if steering and not steering["steers"]:
        why = f"{steering['ppm']} does not steer it: {steering['why']}"
        lines.append(Text(f"{name}: terminal-guided, {why}", style="yellow"))
    for checkpoint in round.checkpoints.values():
        if checkpoint.held:
            lines.append(
                Text(f"{name}: {checkpoint.version} still serves: {checkpoint.held}", "yellow")
            )
    return lines


def _more(count: int) -> list[Text]:
    left = count - _SHOWN_PROBLEMS
    return [Text(f"  and {left:,} more (--json names all)", style="dim")] if left > 0 else []


def _change_lines(status: RunStatus) -> list[Text]:
    lines = []
    live = status.live.progress.change if status.live is not None else 0
    for change in status.changes[-_SHOWN_CHANGES:]:
        told = ", ".join(
            f"{key} {change.before.get(key)!r} -> {value!r}" for key, value in change.values.items()
        )
        how = "set" if change.by == "set" else "config edited"
        late = "" if change.number <= live else " (not taken over yet)"
        lines.append(Text(f"{change.time} {how} by {change.who}: {told}{late}"))
    return lines


def _lineage_lines(status: RunStatus) -> list[Text]:
    lines = []
    for round in status.rounds:
        found = " -> ".join(filter(None, _lineage_parts(round)))
        if found:
            lines.append(Text(f"{_round_name(round.round)}: {found}", style="dim"))
    return [Text("lineage"), *lines] if lines else []


def _lineage_parts(round: RoundState) -> list[str]:
    lineage = round.lineage
    by = lineage.get("searched_by", {})
    models = [m["version"] for kind in ("policy", "ppm") for m in by.get(kind, [])]
    trees = lineage.get("trajectories")
    dataset = lineage.get("dataset")
    made = [f"{c.version}{' (held)' if c.held else ''}" for c in round.checkpoints.values()]
    return [
        " + ".join(filter(None, [*models, *by.get("grader", [])])),
        f"{trees['trees']:,} trees {trees['sha256'][:8]}" if trees else "",
        f"dataset {dataset['sha256'][:8]}" if dataset else "",
        ", ".join(made),
    ]


def _totals_line(status: RunStatus) -> str:
    parts = [f"{short(status.generated_tokens)} tokens generated"]
    if status.seconds_total is not None:
        starts = f" in {status.num_starts} starts" if status.num_starts > 1 else ""
        parts.insert(0, f"elapsed {duration(status.seconds_total)}{starts}")
    usd = status.cost.get("usd")
    if usd is not None:
        budget = f" of ${status.budget_usd:,.2f}" if status.budget_usd is not None else ""
        parts.append(f"${usd:,.2f}{budget} so far")
    audited = [round for round in status.rounds if round.lost is not None]
    if audited:
        lost = sum(round.lost or 0 for round in audited)
        parts.append(f"trees lost {lost}, doubled {sum(r.doubled or 0 for r in audited)}")
    return "; ".join(parts)


def _round_name(number: int) -> str:
    return str(number) if number else "cold"


def short(count: int) -> str:
    """A large number in a few characters: 371672 -> 372k, 2100000 -> 2.1M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.1f}{letter}"
    return str(count)
