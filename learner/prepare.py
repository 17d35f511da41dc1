"""What a fit starts from: its data, and models as objectives in its precision and attention.

    FitRequest --prepare--> tokenizer, tasks (train, validation), objective

Every rank prepares the same, and texts are tokenised by all of them together. Not covered: models
that do not fit into the host memory of one rank while they are loaded.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learner.attention import choose_backend
from learner.batch import check_markers
from learner.dataset import read_manifest
from learner.fit import (
    FitRequest,
    LearnerError,
    PolicyTrainConfig,
    PreferenceTrainConfig,
    TrainConfig,
)
from learner.objectives import PolicyObjective, PreferenceObjective, untied_output
from learner.preference_model import load_preference_model, new_preference_model
from learner.ranks import cores_of_a_rank, on_all_ranks
from learner.task import Task, policy_task, preference_task

Objective = PolicyObjective | PreferenceObjective
Tell = Callable[[str, int, int], None]


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A fit's data and model before the engine exists."""

    tokenizer: Any
    objective: Objective
    train: Task
    validation: Task


def prepare(request: FitRequest, tell: Tell = lambda phase, done, total: None) -> Prepared:
    """Read, tokenise and load; every rank calls it.

    Args:
        tell: told (phase, done, total) as it goes.
    Raises:
        LearnerError: no checkpoint, nothing to train on, no room for the token ids, or something
            cannot be read; alike on all ranks.
    """
    fit_id = request.fit_id
    # Read by the tokenizer when it first works; ranks would else all use all cores.
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores_of_a_rank()))
    tokenizer = on_all_ranks(lambda: _load_tokenizer(request), fit_id)
    make = policy_task if isinstance(request.config, PolicyTrainConfig) else preference_task
    splits = ("train", "validation")
    totals = on_all_ranks(lambda: [_rows(request, split) for split in splits], fit_id)
    # A disk of this machine, which checkpoints need not be on.
    spill = on_all_ranks(lambda: Path(tempfile.gettempdir()), fit_id)
    train, validation = (
        make(tokenizer, request, split, spill=spill, on_read=partial(_tell_rows, tell, total))
        for split, total in zip(splits, totals, strict=True)
    )
    objective = on_all_ranks(lambda: _load_objective(request, len(tokenizer)), fit_id)
    return Prepared(tokenizer=tokenizer, objective=objective, train=train, validation=validation)


def _load_tokenizer(request: FitRequest) -> Any:
    from transformers import AutoTokenizer

    if not (Path(request.base) / "config.json").is_file():
        raise LearnerError(f"no checkpoint in {request.base} (config.json is missing)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.base)
    except (OSError, ValueError) as error:
        raise LearnerError(f"no tokenizer in checkpoint {request.base}: {error}") from error
    check_markers(tokenizer, where=request.base)
    return tokenizer


def _load_objective(request: FitRequest, num_tokens: int) -> Objective:
    """The model to start from, for a tokenizer of so many tokens."""
    config = request.config
    objective: Objective
    with quiet_loading():
        if isinstance(config, PolicyTrainConfig):
            objective = _policy_objective(request.base)
        else:
            model = new_preference_model(request.base, seed=request.seed, dtype=torch.float32)
            lm_head = untied_output(request.base) if config.lm_weight else None
            objective = PreferenceObjective(model, config, lm_head)
    vocabulary = num_embeddings(objective)
    if num_tokens > vocabulary:
        raise LearnerError(
            f"checkpoint {request.base} does not fit its tokenizer: {num_tokens} tokens, "
            f"{vocabulary} embeddings"
        )
    if config.gradient_checkpointing:
        objective.model.gradient_checkpointing_enable()
    objective.to(dtype=training_dtype(config))
    return objective


def _tell_rows(tell: Tell, total: int, done: int) -> None:
    tell("reading", done, total)


def _rows(request: FitRequest, split: str) -> int:
    """Rows of a split by the dataset's manifest; 0: it does not say."""
    counts = (read_manifest(request.data) or {}).get("counts", {}).get("all", {})
    rows = "sft" if request.kind == "policy" else "pairs"
    if getattr(request.config, "objective", "") == "q_regression" and split == "train":
        rows = "steps"
    return counts.get(f"{rows}_{split}", 0)


def load_in_service(path: str, config: TrainConfig) -> Objective:
    """The objective of a checkpoint in service, to be measured with a fit's config.

    Raises:
        LearnerError: it cannot be read.
    """
    try:
        with quiet_loading():
            if isinstance(config, PreferenceTrainConfig):
                return PreferenceObjective(load_preference_model(path), config)
            return _policy_objective(path)
    except (OSError, ValueError) as error:
        raise LearnerError(f"checkpoint in service {path} cannot be read: {error}") from error


def _policy_objective(path: str) -> PolicyObjective:
    from transformers import AutoModelForCausalLM

    return PolicyObjective(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def num_embeddings(objective: Objective) -> int:
    """Tokens the model has an embedding for."""
    return objective.model.get_input_embeddings().num_embeddings


def choose_attention(objective: Objective, config: TrainConfig, device: torch.device) -> None:
    """Set the objective's attention backend.

    Raises:
        LearnerError: one is asked for by name and cannot run on the device.
    """
    shape = objective.model.config
    heads = shape.num_attention_heads
    try:
        objective.backend = choose_backend(
            config.attention,
            device,
            training_dtype(config),
            num_heads=heads,
            num_key_heads=getattr(shape, "num_key_value_heads", None) or heads,
            head_size=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        )
    except ValueError as error:
        raise LearnerError(str(error)) from error


def training_dtype(config: TrainConfig) -> torch.dtype:
    """The precision to train in, on what hardware there is."""
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence what is expected: a new head, a left-out output layer, progress bars."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
