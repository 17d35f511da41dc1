"""What the ranks of a fit do together, so that all of them go on or all of them stop.

What one rank could not do is a `LearnerError` on every rank, and the group stays usable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from learner.checkpoint import CheckpointError
from learner.dataset import DatasetError
from learner.fit import LearnerError

T = TypeVar("T")


def ensure_group(rank: int, world_size: int) -> None:
    """Join the caller's process group, or make one of a single rank."""
    if not dist.is_initialized():
        if world_size != 1:
            raise LearnerError(f"{world_size} ranks need an initialised torch.distributed group")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != world_size or dist.get_rank() != rank:
        raise LearnerError(
            f"rank {rank} of {world_size} asked, torch.distributed says "
            f"{dist.get_rank()} of {dist.get_world_size()}"
        )
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ.setdefault(name, str(value))


def device_of(rank: int) -> torch.device:
    """Where DeepSpeed puts a rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))


def on_all_ranks(function: Callable[[], T], fit_id: str) -> T:
    """What a function gives on this rank, once it has given something on every rank.

    Raises:
        LearnerError: it failed on a rank; alike on all ranks.
    """
    problem: str | None = None
    try:
        result = function()
    except (DatasetError, LearnerError, OSError, ValueError) as error:
        problem = str(error)
    problems = [problem]
    if dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise LearnerError(f"fit {fit_id!r}: {first}")
    return result


def from_rank_0(function: Callable[[], T], fit_id: str) -> T:
    """What a function says on rank 0, on every rank; the others do not call it.

    Raises:
        LearnerError: it failed; alike on all ranks.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (CheckpointError, LearnerError, OSError, ValueError, KeyError, TypeError) as error:
            outcome[1] = f"fit {fit_id!r}: {error}"
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise LearnerError(outcome[1])
    return outcome[0]
