"""A stage whose actors or machines are lost is done again, a few times, and each time says why.

    stage --LostError--> its reason is noted --> pools that are lost start anew --> stage again
                                                 `limit` times in all, then the run stops

What a stage has finished stays: a rollout goes on from its committed shards and open trees, a fit
from its last state. Any other error is a fault of config, data or program, would come again, and
ends the run at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

GO_ON = "What is finished is kept: see to what is named here, then start the same command again"
"""For a person whose run was stopped by losses."""


class LostError(Exception):
    """Actors or machines were lost, not a fault of what was asked: it may succeed when done again.

    A parent beside the error of the part that was lost.
    """


class Attempts:
    """Does stages, one after the other; see the module."""

    def __init__(
        self,
        limit: int,
        *,
        note: Callable[[str], None],
        mend: Callable[[], None] = lambda: None,
        key: str = "cluster.stage_attempts",
    ) -> None:
        """
        Args:
            limit: times a stage is done at most, which config `key` says.
            note: told what a person should know now.
            mend: called before a stage is done again.
        """
        self._limit = limit
        self._key = key
        self._mend = mend
        self._note = note
        self.reasons: list[str] = []
        """Why the last stage, or a part of it, was done again."""

    async def __call__(self, stage: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do a stage.

        Raises:
            LostError: of the kind of the last one, after `limit` times; says what to do.
        """
        self.reasons = []
        for number in range(1, self._limit + 1):
            try:
                return await work()
            except LostError as lost:
                if number == self._limit:
                    raise type(lost)(
                        f"{stage} failed {number} times ({self._key}), at last: {lost}. {GO_ON}"
                    ) from lost
                self.again(f"{stage}, {number} of {self._limit}: {lost}")
                self._mend()
        raise AssertionError("unreachable: limit >= 1")

    def again(self, reason: str) -> None:
        """Take note of why something is done again."""
        self.reasons.append(reason)
        self._note(f"done again: {reason}")
