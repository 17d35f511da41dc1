"""The live view of a run: where it is, how fast it goes, what it costs, when it will be done.

    run -- begin(stage) / update(done, total, facts) / end(stage) --> view --> terminal | log
                                                                         \\--> telemetry.live

In a terminal a small panel is redrawn in place; elsewhere a plain line with the time is printed now
and then. The time left of the run is estimated from the stages that are over: each kind of stage
has a relative weight, rescaled by what was measured, and a stage seen before is expected to take as
long again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.telemetry.live import Snapshot
from rollout.problem import Level
from rollout.store import Totals

logger = logging.getLogger(__name__)

Facts = Mapping[str, str | float]

STAGE_WEIGHTS: Mapping[str, float] = {
    "start": 3.0,
    "cold start": 2.0,
    "rollout": 10.0,
    "select": 0.3,
    "train policy": 4.0,
    "train ppm": 4.0,
    "ruler": 4.0,
    "evaluate": 5.0,
}
"""How long kinds of stages take relative to each other before anything was measured."""

ROUND_STAGES = ("rollout", "select", "train policy", "train ppm", "ruler", "evaluate")
"""Kinds of the stages of a round, in order."""

LEVELS_FACT = "solved by level"
"""Shown on a line of its own; `solved_by_level` makes it."""

SHARE_FACT = "share"
"""Share of the stage's work that is done, 0 to 1, where that is not done / total: it is not shown,
but the time left is estimated from it."""

ERROR_FACT = "last error"
"""Shown on a line of its own, and kept when the facts are replaced."""

STOP_TEXTS: Mapping[str, str] = {
    "rollout": "finished trees are committed and open ones handed back (at most 25 s), then the "
    "engines end (at most 25 s); again: at once",
    "": "the engines end (at most 25 s); what this stage has not saved is done again when the run "
    "goes on; again: at once",
}
"""What is done after Ctrl-C, by kind of stage; "" for all others. Bounds: `cluster.fleet.fleet`."""

LOG_INTERVAL_S = 15.0


@dataclass(slots=True)
class Eta:
    """Expected seconds of the stages to come; pure, time comes in as durations."""

    measured: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def finished(self, stage: str, seconds: float) -> None:
        self.measured[stage].append(seconds)

    def expected(self, stage: str) -> float | None:
        """Seconds a stage of this kind should take; None before anything was measured."""
        known = self.measured.get(stage)
        if known:
            return known[-1]
        weight = sum(STAGE_WEIGHTS.get(s, 1.0) * len(v) for s, v in self.measured.items())
        seconds = sum(sum(v) for v in self.measured.values())
        if not weight:
            return None
        return STAGE_WEIGHTS.get(stage, 1.0) * seconds / weight

    def of_stage(self, stage: str, elapsed_s: float, share: float) -> float | None:
        """Seconds until the current stage ends; None while nothing can be said.

        What is done of it tells, or how long one like it took. A guess from other kinds of stages
        is none, nor is a stage that took longer already than the one before.

        Args:
            share: of it that is done, 0 to 1.
        """
        known = self.measured.get(stage)
        if share <= 0.05 and known and known[-1] > elapsed_s:
            return known[-1] - elapsed_s
        return elapsed_s * (1 - share) / share if share > 0 else None

    def remaining(
        self, current: str, elapsed_s: float, share: float, later: Sequence[str]
    ) -> float | None:
        """Seconds until the last stage ends; None while nothing can be said.

        Args:
            share: of the current stage that is done, 0 to 1.
            later: kinds of the stages after the current one.
        """
        own = self.of_stage(current, elapsed_s, share)
        ahead = [self.expected(stage) for stage in later]
        if own is None or any(seconds is None for seconds in ahead):
            return None
        return own + sum(seconds for seconds in ahead if seconds is not None)


class ProgressView:
    """Shows one run. Told things from the driver's event loop; drawn from other threads."""

    def __init__(
        self,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            clock: seconds, for durations.
            wall_clock: seconds since 1970, for the time stamps of log lines.
        """
        self.console = console
        self.clock = clock
        self.wall_clock = wall_clock
        self.eta = Eta()
        self.plan: list[str] = []
        """Kinds of the stages still to come, the current one first."""
        self.num_rounds = 0
        """Rounds of the run; 0: it has none."""
        self.cost_usd: float | None = None
        """Of the run so far; None: it is not known and not shown."""
        self.usd_per_hour: float | None = None
        """Of what is up now."""
        self.change = 0
        """Number of the last change that was taken over."""
        self._label = ""
        self._stage = ""
        self._round: int | None = None
        self._began_s = self._moved_s = clock()
        self._run_began_s = clock()
        self._done, self._total = 0, 0
        self._work_share: float | None = None
        self._facts: dict[str, str | float] = {}
        self._last_error = ""
        self._stopping = ""
        self._last_log_s = 0.0
        self._live: Live | None = None

    @property
    def drawn(self) -> bool:
        """True if a panel is redrawn in place, false if lines are printed."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def __enter__(self) -> ProgressView:
        if self.drawn:
            self._live = Live(
                console=self.console,
                get_renderable=self._render,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._stopping:
            self.note("ending the engines")

    # ---------------------------------------------------------------- what it is told

    def begin(self, stage: str, label: str, total: int = 0, *, round: int | None = None) -> None:
        """Start a stage of a kind named in STAGE_WEIGHTS; `label` is for people."""
        self._stage, self._label, self._round = stage, label, round
        self._done, self._total = 0, total
        self._work_share = None
        self._facts = {}
        self._began_s = self._moved_s = self.clock()
        self._last_log_s = self._began_s
        if not self.drawn:
            self.note(label)

    def update(self, done: int, total: int, facts: Facts | None = None) -> None:
        """Where the current stage stands; `facts` are short name -> value."""
        if done != self._done:
            self._moved_s = self.clock()
        self._done, self._total = done, total
        self._work_share = None
        if facts:
            self._facts = dict(facts)
            share = self._facts.pop(SHARE_FACT, None)
            self._work_share = None if share is None else float(share)
            self._last_error = str(facts.get(ERROR_FACT, "")) or self._last_error
        now = self.clock()
        if not self.drawn and now - self._last_log_s >= LOG_INTERVAL_S:
            self._last_log_s = now
            self.note(self._line())

    def end(self, summary: str = "") -> float:
        """Close the current stage and return its seconds; the summary stays on the screen."""
        seconds = self._stage_s
        self.eta.finished(self._stage, seconds)
        if self._stage in self.plan:
            self.plan.remove(self._stage)
        text = f"{self._label}: {summary}" if summary else self._label
        self.note(f"{text} ({seconds:.0f} s)")
        self._stage, self._facts = "", {}
        return seconds

    def skip(self, stage: str, seconds: float | None = None) -> None:
        """A planned stage turned out to be done already, in so many seconds if that is known."""
        if stage in self.plan:
            self.plan.remove(stage)
        if seconds is not None:
            self.eta.finished(stage, seconds)

    def stop_requested(self) -> None:
        """The run was asked to stop; says what is still done about it, and for how long."""
        self._stopping = "stopping: " + STOP_TEXTS.get(self._stage, STOP_TEXTS[""])
        self.note(self._stopping)

    def note(self, text: str) -> None:
        """A line that stays, here and in the run's logs."""
        logger.info("%s", text)
        say(self.console, f"{self._stamp()} {text}")

    def snapshot(self) -> Snapshot:
        """Where the run stands now."""
        return Snapshot(
            stage=self._stage,
            label=self._label,
            round=self._round,
            done=self._done,
            total=self._total,
            facts=dict(self._facts),
            stage_elapsed_s=self._stage_s,
            stage_still_s=self.clock() - self._moved_s,
            stage_eta_s=self._stage_eta_s() if self._stage else None,
            run_eta_s=self._run_eta_s(),
            last_error=self._last_error,
            stopping=bool(self._stopping),
            usd_per_hour=self.usd_per_hour,
            cost_usd=self.cost_usd,
            change=self.change,
        )

    @property
    def stage_name(self) -> str:
        """Kind and round of the current stage: "round 2: rollout"; "between stages" in none."""
        if not self._stage:
            return "between stages"
        return f"round {self._round}: {self._stage}" if self._round else self._stage

    # ---------------------------------------------------------------- what it shows

    def _stamp(self) -> str:
        if self.drawn:
            return f"[{self._elapsed_text()}]"
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.wall_clock()))

    def _elapsed_text(self) -> str:
        return duration(self.clock() - self._run_began_s)

    @property
    def _stage_s(self) -> float:
        return self.clock() - self._began_s

    def _share(self) -> float:
        return min(self._done / self._total, 1.0) if self._total else 0.0

    def _stage_eta_s(self) -> float | None:
        return self.eta.of_stage(self._stage, self._stage_s, self._share_of_work())

    def _run_eta_s(self) -> float | None:
        later = list(self.plan)
        if self._stage in later:
            later.remove(self._stage)
        return self.eta.remaining(self._stage, self._stage_s, self._share_of_work(), later)

    def _share_of_work(self) -> float:
        return self._share() if self._work_share is None else self._work_share

    def _cost_text(self) -> str:
        if self.cost_usd is None:
            return ""
        text = f"${self.cost_usd:,.2f} so far"
        left = self._run_eta_s()
        if left is not None and self.usd_per_hour is not None:
            whole = self.cost_usd + left / 3600.0 * self.usd_per_hour
            text += f", about ${whole:,.2f} in all"
        return text

    def _line(self) -> str:
        count = f" {self._done:,}/{self._total:,}" if self._total else ""
        facts = ", ".join(fact_text(name, value) for name, value in self._facts.items())
        parts = [
            f"{self._label}{count}" + (f" ({facts})" if facts else ""),
            f"stage {duration(self._stage_s)}, ETA {eta_text(self._stage_eta_s())}",
            f"run {self._elapsed_text()}, ETA {eta_text(self._run_eta_s())}",
        ]
        return "; ".join([*parts, *filter(None, [self._cost_text()])])

    def _render(self) -> Group:
        lines: list[Table | Text] = []
        if self._stage:
            table = Table.grid(padding=(0, 2))
            bar = ProgressBar(
                total=max(self._total, 1), completed=self._done, width=28, pulse=not self._total
            )
            count = f"{self._done:,}/{self._total:,}" if self._total else ""
            share = f"{100 * self._share():.0f} %" if self._total else ""
            table.add_row(Text(self._label, style="bold"), bar, count, share)
            lines.append(table)
        if self._round:
            lines.append(self._round_line())
        own_line = (LEVELS_FACT, ERROR_FACT)
        rest = [fact_text(k, v) for k, v in self._facts.items() if k not in own_line]
        if LEVELS_FACT in self._facts:
            lines.append(Text(f"{LEVELS_FACT}: {self._facts[LEVELS_FACT]}", style="green"))
        if rest:
            lines.append(Text("   ".join(rest), style="dim"))
        if self._last_error:
            lines.append(Text(f"{ERROR_FACT}: {self._last_error}", style="yellow"))
        times = []
        if self._stage:
            times.append(f"stage {duration(self._stage_s)}")
            times.append(f"stage ETA {eta_text(self._stage_eta_s())}")
        times += [f"run {self._elapsed_text()}", f"run ETA {eta_text(self._run_eta_s())}"]
        times += filter(None, [self._cost_text()])
        lines.append(Text("   ".join(times), style="cyan"))
        if self._stopping:
            lines.append(Text("stopping", style="bold yellow"))
        return Group(*lines)

    def _round_line(self) -> Text:
        """`round 2 of 4: rollout > select > ...` with what is over and what runs marked."""
        text = Text(f"round {self._round}")
        if self.num_rounds:
            text.append(f" of {self.num_rounds}")
        text.append(":")
        current = ROUND_STAGES.index(self._stage) if self._stage in ROUND_STAGES else -1
        for position, stage in enumerate(ROUND_STAGES):
            style = "green" if position < current else "dim"
            mark = "bold" if position == current else style
            text.append("  " if position == 0 else " > ", style="dim")
            text.append(stage, style=mark)
        return text


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss; days are counted from 48 hours on."""
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours >= 48:
        return f"{hours // 24} d {hours % 24}:{minutes:02d}:{whole % 60:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"


def eta_text(seconds: float | None) -> str:
    """Time left for people; None: it is not known yet."""
    return "unknown" if seconds is None else duration(seconds)


def fact_text(name: str, value: str | float) -> str:
    """One fact for people: `3,472 tokens/s`, `open 64`, `solved 12 of 40 trees`."""
    if isinstance(value, str):
        return f"{name} {value}"
    shown = f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.3g}"
    return f"{shown} {name}" if name.endswith("/s") else f"{name} {shown}"


def solved_by_level(totals: Totals) -> str:
    """`gsm 92/200, math 81/200`: solved of searched trees, for `LEVELS_FACT`."""
    levels = [level.value for level in Level if totals.trees_by_level.get(level.value)]
    return ", ".join(
        f"{level} {totals.solved_by_level.get(level, 0):,}/{totals.trees_by_level[level]:,}"
        for level in levels
    )


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
