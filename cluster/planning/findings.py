"""What a check of a launch file found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to look at."""

    severity: Severity
    where: str
    """Path in the file, as "available_node_types.learner.max_workers"."""
    wrong: str
    right: str

    def __str__(self) -> str:
        return f"{self.severity} {self.where}: {self.wrong}; {self.right}"


def error(where: str, wrong: str, right: str) -> Finding:
    return Finding(severity=Severity.ERROR, where=where, wrong=wrong, right=right)


def warning(where: str, wrong: str, right: str) -> Finding:
    return Finding(severity=Severity.WARNING, where=where, wrong=wrong, right=right)


def unknown(where: str, what: Any, valid: Iterable[Any]) -> Finding:
    names = [str(name) for name in valid]
    near = difflib.get_close_matches(str(what), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(names)[:12])}"
    return error(where, f"unknown: {what!r}", hint)
