"""What the ranks of a fit do together, so that all of them go on or all of them stop.

What one rank could not do is a `LearnerError` on every rank, and the group stays usable.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from learner.checkpoint import CheckpointError
from learner.dataset import DatasetError
from learner.fit import LearnerError
from learner.spill import DiskList
from rollout.run_store import StoreError

T = TypeVar("T")
R = TypeVar("R")


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


def release_memory() -> None:
    """Give what a fit has left behind back to the machine: its rank stands idle beside engines."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


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
    kept: list[T] = []
    from_all_ranks(lambda: kept.append(function()), fit_id)
    return kept[0]


def from_all_ranks(function: Callable[[], T], fit_id: str) -> list[T]:
    """What a function gives on each rank, on every rank.

    Raises:
        LearnerError: it failed on a rank; alike on all ranks.
    """
    outcome: tuple[str | None, T | None]
    try:
        outcome = None, function()
    except (CheckpointError, DatasetError, LearnerError, OSError, StoreError, ValueError) as error:
        outcome = str(error), None
    outcomes: list[Any] = [outcome]
    if _num_ranks() > 1:
        outcomes = [None] * _num_ranks()
        dist.all_gather_object(outcomes, outcome)
    problem = next((problem for problem, _ in outcomes if problem is not None), None)
    if problem is not None:
        raise LearnerError(f"fit {fit_id!r}: {problem}")
    return [given for _, given in outcomes]


def machine_list(folder: Path, fit_id: str) -> DiskList[Any]:
    """A list whose file the ranks of a machine share: one of them writes what all are told.

    Args:
        folder: of the machine, on a disk with room for all records.
    Raises:
        LearnerError: a rank cannot write there; alike on all ranks.
    """
    kept = on_all_ranks(lambda: DiskList[Any](folder), fit_id)
    try:
        files = from_all_ranks(lambda: (platform.node(), kept.path), fit_id)
        rank = dist.get_rank() if _num_ranks() > 1 else 0
        # The same name may stand for two containers, the same folder for one of the network.
        mine = (path for node, path in files if node == files[rank][0] and path.exists())
        first = next(mine)
        on_all_ranks(lambda: kept.follow(first) if first != kept.path else None, fit_id)
    finally:
        kept.hide()
    return kept


def cores_of_a_rank() -> int:
    """Cores of this machine for each of its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_out(
    items: Iterable[T],
    work: Callable[[Sequence[T]], list[R]],
    take: Callable[[R], None],
    *,
    size: int,
    fit_id: str,
) -> None:
    """Have the ranks work on a share of the items each and every rank take all that was made.

    Args:
        items: the same on every rank, which reads all of them.
        work: makes a result of each of at most `size` items.
        take: given all results in the order of the items, whatever the number of ranks.
    Raises:
        LearnerError: items, work or take failed on a rank; alike on all ranks.
    """
    left = iter(items)
    num_ranks = _num_ranks()
    first = size * dist.get_rank() if num_ranks > 1 else 0
    made: list[list[R]] = []

    def go_on() -> list[R]:
        for piece in made:
            for result in piece:
                take(result)
        share = list(islice(left, size * num_ranks))[first : first + size]
        return work(share) if share else []

    # What all of them took is known with the next pieces, the last one empty.
    while any(made := from_all_ranks(go_on, fit_id)):
        pass


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_0(function: Callable[[], T], fit_id: str) -> T:
    """What a function says on rank 0, on every rank; the others do not call it.

    Raises:
        LearnerError: it failed; alike on all ranks.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (
            CheckpointError,
            LearnerError,
            OSError,
            StoreError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:
            outcome[1] = f"fit {fit_id!r}: {error}"
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise LearnerError(outcome[1])
    return outcome[0]
