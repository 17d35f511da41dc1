"""What a comparison found: the verdict, its reason, and the rung that decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a verdict came out as it did."""

    EXACT = "exact"
    """Equal by text, structure or rational arithmetic."""
    NUMERIC = "numeric"
    """Equal to 60 digits, or at every test point."""
    SYMBOLIC = "symbolic"
    """Equal by sympy."""
    DIFFERENT = "different"
    UNDECIDED = "undecided"
    """Not shown equal: neither arithmetic nor sympy could tell in the time allowed."""
    LIMIT = "limit"
    """Refused: too long, too deep or too large to compute."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one comparison; `path` names the rung that decided."""

    equal: bool
    reason: Reason
    path: str


def equal(reason: Reason, path: str) -> Finding:
    return Finding(True, reason, path)


def different(path: str) -> Finding:
    return Finding(False, Reason.DIFFERENT, path)


SAME = equal(Reason.EXACT, "tree")
_STRENGTH = {Reason.EXACT: 0, Reason.NUMERIC: 1, Reason.SYMBOLIC: 2}


def weakest(findings: list[Finding], path: str) -> Finding:
    reasons = (finding.reason for finding in findings)
    return equal(max(reasons, key=_STRENGTH.__getitem__, default=Reason.EXACT), path)
