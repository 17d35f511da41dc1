"""The live view of a run: where it is, how fast it goes, when it will be done.

    run -- begin(stage) / update(done, total, facts) / end(stage) --> view --> terminal | log

In a terminal a small panel is redrawn in place; elsewhere a plain line is logged now and then. The
time left of the run is estimated from the stages that are over: each kind of stage has a relative
weight, rescaled by what was measured, and a stage seen before is expected to take as long again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGE_WEIGHTS: Mapping[str, float] = {
    "start": 3.0,
    "cold start": 2.0,
    "rollout": 10.0,
    "select": 0.3,
    "train policy": 4.0,
    "train ppm": 4.0,
    "evaluate": 5.0,
}
"""How long kinds of stages take relative to each other before anything was measured."""

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

    def remaining(
        self, current: str, elapsed_s: float, share: float, later: Sequence[str]
    ) -> float | None:
        """Seconds until the last stage ends; None while nothing can be said.

        Args:
            share: of the current stage that is done, 0 to 1.
            later: kinds of the stages after the current one.
        """
        ahead = [self.expected(stage) for stage in later]
        if share > 0.05:
            own: float | None = elapsed_s * (1 - share) / share
        else:
            whole = self.expected(current)
            own = max(whole - elapsed_s, 0.0) if whole is not None else None
        if own is None or any(seconds is None for seconds in ahead):
            return None
        return own + sum(seconds for seconds in ahead if seconds is not None)


class ProgressView:
    """Shows one run. Not thread-safe: called from the driver's event loop."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.eta = Eta()
        self.plan: list[str] = []
        """Kinds of the stages still to come, the current one first."""
        self._label = ""
        self._stage = ""
        self._began_s = clock()
        self._run_began_s = clock()
        self._done, self._total = 0, 0
        self._facts: dict[str, str] = {}
        self._last_log_s = 0.0
        self._live: Live | None = None

    def __enter__(self) -> ProgressView:
        self._run_began_s = self.clock()
        if self.console.is_terminal:
            self._live = Live(
                console=self.console, get_renderable=self._render, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, stage: str, label: str, total: int = 0) -> None:
        """Start a stage of a kind named in STAGE_WEIGHTS; `label` is for people."""
        self._stage, self._label = stage, label
        self._done, self._total = 0, total
        self._facts = {}
        self._began_s = self.clock()
        self._last_log_s = self._began_s
        if not self.console.is_terminal:
            self.console.print(
                f"[{self._clock_text()}] {label}", markup=False, highlight=False, soft_wrap=True
            )

    def update(self, done: int, total: int, facts: Mapping[str, str] | None = None) -> None:
        """Where the current stage stands; `facts` are short name -> value texts."""
        self._done, self._total = done, total
        if facts:
            self._facts = dict(facts)
        now = self.clock()
        if not self.console.is_terminal and now - self._last_log_s >= LOG_INTERVAL_S:
            self._last_log_s = now
            self.console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def end(self, summary: str = "") -> float:
        """Close the current stage and return its seconds; the summary stays on the screen."""
        seconds = self.clock() - self._began_s
        self.eta.finished(self._stage, seconds)
        if self._stage in self.plan:
            self.plan.remove(self._stage)
        text = f"{self._label}: {summary}" if summary else self._label
        self.note(f"{text} ({seconds:.0f} s)")
        return seconds

    def skip(self, stage: str) -> None:
        """A planned stage turned out to be done already."""
        if stage in self.plan:
            self.plan.remove(stage)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(
            f"[{self._clock_text()}] {text}", markup=False, highlight=False, soft_wrap=True
        )

    def _clock_text(self) -> str:
        return duration(self.clock() - self._run_began_s)

    def _share(self) -> float:
        return min(self._done / self._total, 1.0) if self._total else 0.0

    def _eta_text(self) -> str:
        later = list(self.plan)
        if self._stage in later:
            later.remove(self._stage)
        seconds = self.eta.remaining(
            self._stage, self.clock() - self._began_s, self._share(), later
        )
        return "estimating" if seconds is None else duration(seconds)

    def _line(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts.items())
        count = f" {self._done}/{self._total}" if self._total else ""
        tail = f" ({facts})" if facts else ""
        return f"[{self._clock_text()}] {self._label}{count}{tail}; run ETA {self._eta_text()}"

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(
            total=max(self._total, 1), completed=self._done, width=32, pulse=not self._total
        )
        count = f"{self._done}/{self._total}" if self._total else ""
        stage_s = duration(self.clock() - self._began_s)
        table.add_row(Text(self._label, style="bold"), bar, count, stage_s)
        facts = Text("   ".join(f"{k} {v}" for k, v in self._facts.items()), style="dim")
        foot = Text(f"elapsed {self._clock_text()}   ETA {self._eta_text()}", style="cyan")
        return Group(table, facts, foot)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"
