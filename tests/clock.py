"""A clock for one module: `time` itself stays what it is for every other thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest


def set_clock(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., object]
) -> None:
    """Replaces functions of `time` (by name) as `module` sees them, and nowhere else."""
    monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), **functions}))
