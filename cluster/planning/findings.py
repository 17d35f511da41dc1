"""What a check of a launch file has to say: where, what is wrong, what is right; a line each."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """It keeps the cluster from working, or makes it unsafe."""
    WARNING = "warning"
    """Worth a look."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at."""

    severity: Severity
    where: str
    """Path in the file, as "available_node_types.learner.max_workers"."""
    wrong: str
    right: str

    def __str__(self) -> str:
        return f"{self.severity} {self.where}: {self.wrong}; {self.right}"


error = functools.partial(Finding, Severity.ERROR)
warning = functools.partial(Finding, Severity.WARNING)


def unknown(where: str, what: Any, valid: Iterable[Any]) -> Finding:
    """An error that names the nearest of the valid words."""
    names = [str(name) for name in valid]
    near = difflib.get_close_matches(str(what), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(names)[:12])}"
    return error(where, f"unknown: {what!r}", hint)
