"""The learner's machine, as the simulation models it: it comes, fits, may be lost, and goes.

    ask --> runs (paid for) --> its ranks are there --> fit, fit, ... --> give_back --> idle timeout
     ^                                                   |
     +------ lost: the fit goes on from its checkpoint <-+

Not modelled: fits that fail for another reason, and a machine that is not to be had.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from cluster.planning.simulation_figures import SimulationConfig


class ModelledLearner:
    """One machine with all ranks; see the module."""

    def __init__(
        self,
        config: SimulationConfig,
        *,
        after: Callable[..., None],
        now_s: Callable[[], float],
        random: random.Random,
    ) -> None:
        """
        Args:
            after: after(wait_s, action, *arguments) has an action done later.
        """
        self._config, self._after, self._now_s, self._random = config, after, now_s, random
        self.machines = 0
        self.paid_s = 0.0
        self.fit_s = 0.0
        """Fits ran so long, work included that was lost with a machine."""
        self._fits: list[float] = []
        """Seconds each fit still needs, the running one first."""
        self._done: Callable[[], None] | None = None
        self._since_s: float | None = None
        """When the machine began to run; None: there is none."""
        self._ready = False
        self._began_s: float | None = None
        """When the running fit began, or went on; None: none runs."""
        self._life = 0
        """Of the machine whose events count."""

    def ask(self) -> None:
        """Have a machine and its ranks started."""
        self._after(self._config.learner_node_start_s, self._in_life(self._runs))

    def fit(self, seconds: Sequence[float], done: Callable[[], None]) -> None:
        """Run fits one after the other as soon as the ranks are there, then call `done`."""
        self._fits, self._done = list(seconds), done
        self._go_on()

    def give_back(self, idle_s: float = 0.0) -> None:
        """End the machine, which is paid for `idle_s` longer."""
        if self._since_s is not None:
            self.paid_s += self._now_s() - self._since_s + idle_s
        self._since_s, self._ready = None, False
        self._life += 1

    def _in_life(self, action: Callable[[], None]) -> Callable[[], None]:
        """An action that is not done once the machine is another one."""
        life = self._life

        def act() -> None:
            if life == self._life:
                action()

        return act

    def _runs(self) -> None:
        self.machines += 1
        self._since_s = self._now_s()
        self._after(self._config.learner_start_s, self._in_life(self._has_ranks))
        if self._config.learner_lost_per_hour:
            hazard = -math.log(1 - self._config.learner_lost_per_hour) / 3600.0
            self._after(self._random.expovariate(hazard), self._in_life(self._lose))

    def _has_ranks(self) -> None:
        self._ready = True
        self._go_on()

    def _go_on(self) -> None:
        if not self._ready or self._done is None:
            return
        if self._fits:
            self._began_s = self._now_s()
            self._after(self._fits[0], self._in_life(self._fit_ends))
            return
        done, self._done = self._done, None
        done()

    def _fit_ends(self) -> None:
        self._stop_fit()
        del self._fits[0]
        self._go_on()

    def _stop_fit(self) -> float:
        """Seconds for which the running fit had gone on; 0 if none runs."""
        went_s = 0.0 if self._began_s is None else self._now_s() - self._began_s
        self.fit_s += went_s
        self._began_s = None
        return went_s

    def _lose(self) -> None:
        went_s = self._stop_fit()
        if self._fits:
            self._fits[0] -= went_s - went_s % self._config.fit_checkpoint_s
        self.give_back()
        self.ask()
