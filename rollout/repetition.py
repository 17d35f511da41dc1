"""Generations that go round in circles: a text whose end is one passage over and over.

A sampled policy that falls into a loop writes until its token limit. The engine bounds what that
costs; this finds it afterwards, so that the candidate is named for what it is and never run.

Not covered: loops that change a little each time ("case 1 ... case 2 ..."), and repetition before
the end of the text, which finished code may have for good reason.
"""

from __future__ import annotations

MIN_CHARS = 200
"""A repeated end shorter than this is no loop: rows of zeros or dashes are ordinary code."""

_PROBE_CHARS = 16


def ends_in_repetition(text: str, repeats: int) -> bool:
    """True if the text ends in at least `repeats` equal passages, together `MIN_CHARS` or longer.

    The last passage may be cut anywhere. Costs a few searches for a short string, whatever the
    text.

    Args:
        repeats: >= 2.
    """
    if len(text) < MIN_CHARS:
        return False
    # The period can only be the distance at which the last characters stood before.
    last = len(text) - _PROBE_CHARS
    before = text.rfind(text[last:], 0, len(text) - 1)
    if before < 0:
        return False
    period = last - before
    size = max(MIN_CHARS, repeats * period)
    return size <= len(text) and text[-size:-period] == text[period - size :]
