"""`rstar top RUN`: a run's numbers in the terminal, drawn anew every few seconds; works over ssh.

    RUN/live.json, RUN/metrics/samples-*  -->  the overview, a row for each replica, waits

The numbers are those of the dashboards (`cluster.watch.panels`), from the samples the driver keeps.
Where the output is no terminal, a line is printed now and then. Nothing is asked of the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.folder.run_folder import RunFolder
from cluster.telemetry import metrics as m
from cluster.telemetry.live import read_live
from cluster.telemetry.progress import duration
from cluster.telemetry.samples import Samples
from cluster.watch.panels import CLUSTER, OVERVIEW, ROLLOUTS, SANDBOX, Panel, Unit
from cluster.watch.queries import Expression, Quantile, Rate, Result, Value, rate_window_s
from cluster.watch.status import run_folder, runs, state_text
from cluster.watch.status_view import redraw, short

_REDRAW_S = 2.0
_LINE_S = 15.0
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_S = 900.0
"""What the small curves look back on."""

_NUMBERS: tuple[Panel, ...] = tuple(
    {
        panel.title: panel
        for dashboard in (OVERVIEW, SANDBOX, CLUSTER)
        for panel in dashboard.panels
        if panel.kind == "number"
    }.values()
)

_REPLICA_COLUMNS: tuple[tuple[str, Expression, Unit], ...] = (
    ("tokens/s", Rate(m.GENERATED_TOKENS, by=("replica",)), "short"),
    ("scored/s", Rate(m.SCORED_TOKENS, by=("replica",)), "short"),
    (
        "hits",
        Rate(m.CACHED_TOKENS, by=("replica",)) / Rate(m.PROMPT_TOKENS, by=("replica",)),
        "share",
    ),
    ("KV", Value(m.KV_USED, by=("replica",)), "share"),
    ("running", Value(m.ENGINE_RUNNING, by=("replica",)), "short"),
    ("waiting", Value(m.ENGINE_WAITING, by=("replica",)), "short"),
    ("idle", Rate(m.ENGINE_IDLE, by=("replica",)), "share"),
)

_WAITS: tuple[tuple[str, Expression], ...] = (
    ("lease", Quantile(0.95, m.LEASE_WAIT)),
    ("slot", Quantile(0.95, m.SLOT_WAIT)),
    ("policy", Quantile(0.95, m.POOL_WAIT, where={"pool": "policy"})),
    ("ppm", Quantile(0.95, m.POOL_WAIT, where={"pool": "ppm"})),
    ("sandbox", Quantile(0.95, m.SANDBOX_WAIT)),
    ("commit", Quantile(0.95, m.COMMIT_SECONDS)),
)


def show_top(run: Path, console: Console, *, once: bool = False) -> None:
    """Show a run until it ends, or once.

    Raises:
        RunFolderError: there is no such run.
    """
    folder = run_folder(run)
    if once:
        console.print(top_view(folder, Samples.read(folder.store), time.time()))
    elif console.is_terminal:
        redraw(console, (top_view(folder, s, time.time()) for s in _samples(folder, _REDRAW_S)))
    else:
        for samples in _samples(folder, _LINE_S):
            console.print(top_line(folder, samples, time.time()), soft_wrap=True)


def _samples(folder: RunFolder, pause_s: float) -> Iterator[Samples]:
    """Those of a run, read again and again until it ends."""
    while True:
        yield Samples.read(folder.store)
        if not runs(read_live(folder.store), time.time()):
            return
        time.sleep(pause_s)


def top_line(folder: RunFolder, samples: Samples, now_s: float) -> str:
    """A run in one line."""
    live = read_live(folder.store)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
    found = [(panel, _now(panel.queries[0].expression, samples)) for panel in _NUMBERS[:6]]
    told = [f"{p.title.lower()} {number(v, p.unit)}" for p, v in found if v is not None]
    return "; ".join([f"{stamp} {folder.name}: {state_text(live, now_s)}", *told])


def top_view(folder: RunFolder, samples: Samples, now_s: float) -> RenderableType:
    """A run on one screen."""
    live = read_live(folder.store)
    state = state_text(live, now_s)
    style = "green" if live is not None and live.fresh(now_s) else "yellow"
    parts: list[RenderableType] = [
        Text.assemble((folder.name, "bold"), "  ", (state, style)),
    ]
    if live is not None and live.progress.last_error:
        parts.append(Text(f"last error: {live.progress.last_error}", style="yellow"))
    if not samples.times:
        parts.append(Text("no samples yet; is metrics.enabled false?", style="dim"))
        return Group(*parts)
    age_s = now_s - samples.times[-1]
    if age_s > 5 * samples.interval_s:
        parts.append(Text(f"the last sample is {duration(age_s)} old", style="yellow"))
    parts += ["", _numbers_table(samples), ""]
    replicas = _replicas_table(samples)
    if replicas.row_count:
        parts += [replicas, ""]
    jobs = _all(Value(m.JOBS, by=("state",)), samples)
    if jobs:
        told = ", ".join(f"{short(int(count))} {dict(key)['state']}" for key, count in jobs.items())
        parts.append(Text(f"jobs: {told}"))
    waits = [(name, _now(expression, samples)) for name, expression in _WAITS]
    told = ", ".join(f"{name} {number(value, 's')}" for name, value in waits if value is not None)
    if told:
        parts.append(Text(f"waits, 95 %: {told}"))
    levels = _all(ROLLOUTS.panels[0].queries[0].expression, samples)
    if levels:
        told = ", ".join(f"{dict(k)['level']} {number(v, 'share')}" for k, v in levels.items())
        parts.append(Text(f"solved now: {told}", style="green"))
    for key in _all(Value(m.STALLED, by=("part", "waits_on")), samples):
        labels = dict(key)
        parts.append(Text(f"stalled: {labels['part']}, waits on {labels['waits_on']}", style="red"))
    deaths = _all(Value(m.DEATHS, by=("pool",)), samples)
    died = ", ".join(f"{int(n)} x {dict(key)['pool']}" for key, n in deaths.items() if n)
    if died:
        parts.append(Text(f"died and replaced: {died}", style="yellow"))
    return Group(*parts)


def _numbers_table(samples: Samples) -> Table:
    """Two to a row, so that it fits 80 columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    cells = [
        (panel, value)
        for panel in _NUMBERS
        if (value := _now(panel.queries[0].expression, samples)) is not None
    ]
    half = (len(cells) + 1) // 2
    for left in range(half):
        row: list[RenderableType] = []
        for panel, value in cells[left::half]:
            row += [
                Text(panel.title, style="dim", no_wrap=True),
                Text(number(value, panel.unit), style="bold", no_wrap=True, justify="right"),
                Text(_spark(panel, samples), style="cyan", no_wrap=True),
            ]
        table.add_row(*row)
    return table


def _spark(panel: Panel, samples: Samples) -> str:
    """How a rate went lately; "" for what is no rate."""
    if not panel.unit.endswith("/s"):
        return ""
    end_s = samples.times[-1]
    start_s = max(samples.times[0], end_s - _SPARK_S)
    values = []
    for i in range(1, 9):
        time_s = start_s + (end_s - start_s) * i / 8
        found = panel.queries[0].expression.evaluate(samples, time_s, rate_window_s(samples))
        values.append(found.get((), 0.0))
    top = max(values)
    if top <= 0:
        return ""
    return "".join(_SPARKS[round(value / top * (len(_SPARKS) - 1))] for value in values)


def _replicas_table(samples: Samples) -> Table:
    columns = [
        (name, _all(expression, samples), unit) for name, expression, unit in _REPLICA_COLUMNS
    ]
    names = sorted({dict(key)["replica"] for _, found, _ in columns for key in found})
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("replica", no_wrap=True)
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for name in names:
        values = [(found.get((("replica", name),)), unit) for _, found, unit in columns]
        table.add_row(name, *("" if v is None else number(v, unit) for v, unit in values))
    return table


def _all(expression: Expression, samples: Samples) -> Result:
    if not samples.times:
        return {}
    return expression.evaluate(samples, samples.times[-1], rate_window_s(samples))


def _now(expression: Expression, samples: Samples) -> float | None:
    """The one value of an expression without labels; None if it has none."""
    return _all(expression, samples).get(())


def number(value: float, unit: Unit) -> str:
    """A value for people: `3.5k tokens/s`, `42 %`, `1.2 h`."""
    if unit == "share":
        return f"{100 * value:.0f} %"
    if unit in ("usd", "usd/h"):
        return f"${value:,.2f}" + ("/h" if unit == "usd/h" else "")
    if unit == "s":
        if value >= 120:
            return duration(value)
        return f"{1000 * value:.0f} ms" if value < 0.1 else f"{value:.1f} s"
    amount = short(round(value)) if abs(value) >= 100 else f"{value:.3g}"
    after = {"/s": "/s", "/h": "/h", "tokens/s": " tokens/s", "per usd": " per $"}.get(unit, "")
    return amount + after
