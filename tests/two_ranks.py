"""Two gloo ranks in processes of their own, for what only a group of them shows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.distributed as dist


def on_two_ranks(body: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What body(rank, *arguments) returns on each rank of a group of two; it must be importable.

    Args:
        folder: where the ranks meet.
    """
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        made = [pool.submit(_rank, rank, body, folder, arguments) for rank in range(2)]
        for future in as_completed(made):
            future.result()  # the first to fail says why
        return [future.result() for future in made]


def _rank(rank: int, body: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> Any:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        return body(rank, *arguments)
    finally:
        dist.destroy_process_group()
