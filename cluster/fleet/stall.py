"""Which stage does not move, and what it waits for: told counters, asked for sentences.

    report(stage, done, open, waits_on) -> stalls(now) -> the stages without progress for `after_s`

A stage is anything with a counter that only grows while it works: generated tokens of a policy
replica, executed steps of the sandbox pool, committed trees of a worker. A stage without work in
its hands is idle, never stalled. What a stage waits on is another stage's name, or anything else
("the store"); a stage that waits on a stalled one is its victim, so the causes come first and their
sentences name the victims.

Liveness is judged by these counters alone, not by an open port or a living process.

It owns no clock: `now_s` is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Stage:
    done: float
    open: int
    waits_on: str
    moved_s: float
    """When `done` last changed, or work came to an idle stage."""
    heard_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A stage that has work and made no progress."""

    stage: str
    for_s: float
    """Seconds without progress."""
    silent_s: float
    """Seconds since its last report."""
    done: float
    open: int
    """Units of work in its hands."""
    waits_on: str
    """As the stage said it; "" if it did not say."""
    cause: str
    """The stalled stage at the end of the chain of those waited on; the stage itself if none."""
    victims: tuple[str, ...]
    """Stalled stages that wait on this one, directly or not."""

    def __str__(self) -> str:
        text = f"{self.stage}: no progress for {self.for_s:.0f} s, {self.open} open"
        if self.silent_s >= self.for_s:
            text += ", and no report in that time"
        if self.waits_on:
            text += f"; waits on {self.waits_on}"
        if self.cause not in (self.stage, self.waits_on):
            text += f", which hangs on {self.cause}"
        if self.victims:
            text += f"; {', '.join(self.victims)} wait" + "s" * (len(self.victims) == 1)
            text += " for it"
        return text


class StallDetector:
    """Stages and when each last moved; see the module."""

    def __init__(self, after_s: float) -> None:
        """
        Args:
            after_s: seconds without progress that make a stall, > 0; longer than the slowest unit
                of any stage, or its normal work is reported.
        """
        if after_s <= 0:
            raise ValueError(f"after_s must be > 0, got {after_s}")
        self.after_s = after_s
        self._stages: dict[str, _Stage] = {}

    def report(
        self, stage: str, now_s: float, *, done: float, open: int, waits_on: str = ""
    ) -> None:
        """Take a stage's counter of finished work, the work it has, and what it waits for.

        Any change of `done` is progress, a smaller one too: its process was replaced.
        """
        known = self._stages.get(stage)
        if known is None:
            self._stages[stage] = _Stage(done, open, waits_on, now_s, now_s)
            return
        if done != known.done or not known.open:
            known.moved_s = now_s
        known.done, known.open, known.waits_on, known.heard_s = done, open, waits_on, now_s

    def stalls(self, now_s: float, after_s: float | None = None) -> list[Stall]:
        """Stages with work and without progress for so long: causes first, then the longest.

        Args:
            after_s: None: the detector's.
        """
        after_s = self.after_s if after_s is None else after_s
        stalled = {
            name: stage
            for name, stage in self._stages.items()
            if stage.open and now_s - stage.moved_s >= after_s
        }
        chains = {name: _chain(name, stalled) for name in stalled}
        found = [
            Stall(
                stage=name,
                for_s=now_s - stage.moved_s,
                silent_s=now_s - stage.heard_s,
                done=stage.done,
                open=stage.open,
                waits_on=stage.waits_on,
                cause=chains[name][-1],
                victims=tuple(sorted(n for n, chain in chains.items() if name in chain[1:])),
            )
            for name, stage in stalled.items()
        ]
        return sorted(found, key=lambda s: (s.cause != s.stage, -s.for_s, s.stage))


def _chain(name: str, stalled: dict[str, _Stage]) -> list[str]:
    """A stalled stage and the stalled ones it waits on, in order; a circle ends where it closes."""
    chain = [name]
    while (on := stalled[chain[-1]].waits_on) in stalled and on not in chain:
        chain.append(on)
    return chain
