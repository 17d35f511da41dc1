"""How long a request may take: four times what its tokens take at its replica's pace.

A replica's pace is the time its last answers took over the tokens of the longest completion in
each, waiting included, so it grows with the load and with a slow card. A request that ran out of
time counts as one that took so long for all its tokens: if a replica has become slower than the
margin allows, the next request is given more.

That bounds a request, not a replica: one whose engine makes no step is found by its keeper
(`cluster.supervision.stall_s`), however patient its callers are.
"""

from __future__ import annotations

MARGIN = 4.0
"""Times the expected seconds of a request before it is given up."""

MIN_LIMIT_S = 300.0
"""No request is given up before that: a burst, a large prompt, a graph being captured."""

FIRST_S_PER_TOKEN = 0.25
"""Pace before anything is known: half as fast as an L40S with 256 sequences of a 7B model."""

MEMORY = 0.98
"""Weight of the past at each answer: the last fifty or so count."""


class Pace:
    """Seconds a token of one replica takes."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """An answer came, or did not in time.

        Args:
            tokens: of its longest completion; of what was asked for, if there is none.
        """
        self._seconds = MEMORY * self._seconds + seconds
        self._tokens = MEMORY * self._tokens + tokens

    @property
    def s_per_token(self) -> float | None:
        """None: nothing is known."""
        return self._seconds / self._tokens if self._tokens else None


def limit_s(max_tokens: int, s_per_token: float) -> float:
    """Seconds after which a request that may write so many tokens is given up."""
    return max(MIN_LIMIT_S, MARGIN * max_tokens * s_per_token)
