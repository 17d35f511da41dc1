"""Errors a user can do something about, and how loud the libraries may be."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from cluster.config import ConfigError
from cluster.model_check import ModelCheckError
from cluster.run_folder import RunFolderError
from learner.checkpoint import CheckpointError
from learner.dataset import DatasetError
from learner.fit import LearnerError
from rollout.engine import EngineError
from rollout.problems.reader import ProblemFileError
from rollout.search import SearchError
from rollout.store import StoreError
from verifier.sandbox import SandboxError

KNOWN_ERRORS: tuple[type[Exception], ...] = (
    CheckpointError,
    ConfigError,
    DatasetError,
    EngineError,
    LearnerError,
    ModelCheckError,
    ProblemFileError,
    RunFolderError,
    SandboxError,
    SearchError,
    StoreError,
)
"""Their message says what was wrong and where; no traceback helps."""


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
