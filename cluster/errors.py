"""Errors a user can do something about, and how loud the libraries may be."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from cluster.engines.model_check import ModelCheckError
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolderError, why_not_written
from cluster.jobs.ray_errors import plain
from cluster.planning.latency import CurveError
from cluster.planning.planner import PlanError
from cluster.runs.submit import SubmitError
from cluster.telemetry.live import StoppedError
from cluster.telemetry.tracing import TracingError
from cluster.watch.dashboard import DashboardError
from learner.checkpoint import CheckpointError
from learner.dataset import DatasetError
from learner.fit import LearnerError
from rollout.engine import EngineError
from rollout.problems.rows import ProblemFileError
from rollout.problems.synthesis import SynthesisError
from rollout.search import SearchError
from rollout.store import StoreError
from rollout.worked_examples import ExampleError
from verifier.sandbox import SandboxError

KNOWN_ERRORS: tuple[type[Exception], ...] = (
    CheckpointError,
    ConfigError,
    CurveError,
    DashboardError,
    DatasetError,
    EngineError,
    ExampleError,
    LearnerError,
    ModelCheckError,
    PlanError,
    ProblemFileError,
    RunFolderError,
    SandboxError,
    SearchError,
    StoppedError,
    StoreError,
    SubmitError,
    SynthesisError,
    TracingError,
)
"""Their message says what was wrong and where; no traceback helps."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def explain(error: BaseException) -> str | None:
    """What to tell somebody who can do something about it; None: it is a fault of the program.

    A disk that is full or cannot be written is explained wherever it was met. Of several errors at
    once the first is told, if all of them are of this kind.
    """
    if isinstance(error, BaseExceptionGroup):
        told = [explain(inner) for inner in error.exceptions]
        return None if None in told else told[0]
    if isinstance(error, KNOWN_ERRORS):
        return str(plain(error))
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{why_not_written(error)}; what is committed stays"
    if os.strerror(errno.ENOSPC) in str(error):  # of a library with errors of its own
        return f"disk full ({error}); what is committed stays"
    return None


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """End a program with one line where somebody can do something about its error."""
    try:
        yield
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"{program}: {line}", file=sys.stderr)
        raise SystemExit(1) from None


def quiet_logging(verbose: bool) -> None:
    """Leave the terminal to the progress view, unless asked for everything.

    Call before Ray, vLLM, DeepSpeed or torch are imported.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if not Path("/dev/nvidiactl").exists():
        # transformers imports DeepSpeed where it finds it, and DeepSpeed looks for a GPU, loudly.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if verbose:
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Ray announces a change of its defaults for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
