"""Held-out metrics of a model: the same numbers for the new checkpoint and the one in service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from learner.batch import PairGroup
from learner.fit import TrainConfig
from learner.packing import plan_epoch
from learner.pairs import PairKind
from learner.signals import NUM_BINS, bin_of, calibration
from learner.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What was measured on the validation problems; empty if there are none."""

    metrics: dict[str, float] = field(default_factory=dict)
    calibration: tuple[tuple[float, float, float], ...] = ()
    """As in `FitResult`."""


@torch.no_grad()
def validate(
    forward: Callable[[Any], torch.Tensor],
    task: Task,
    config: TrainConfig,
    device: torch.device,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut:
    """Measure an objective in evaluation mode on a split; every rank calls it and gets the result.

    Args:
        forward: the objective, or the engine around it.
        on_step: told (done, total) packed steps.
    """
    if not len(task):
        return HeldOut()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps = plan_epoch(
        task.tokens,
        task.counts,
        task.computed,
        max_tokens=config.micro_batch_tokens * world_size,
        max_examples=None,
        micro_tokens=config.micro_batch_tokens,
        world_size=world_size,
        rng=None,
    )
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    for number, step in enumerate(steps):
        on_step(number, len(steps))
        for shares in step.micro:
            output = forward(task.pack(shares[rank]).to(device))
            if shares[rank].filler:
                continue
            if task.groups is not None:
                members = [task.groups[e] for e in shares[rank].examples]
                sums += _pair_sums(members, output.float().tolist())
            else:
                sums[0] += float(output)
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    if task.groups is None:
        tokens = max(sum(task.trained), 1)
        return HeldOut(metrics={"loss": float(sums[0]) / tokens, "num_examples": float(len(task))})
    return _pair_metrics(dict(zip(_SUMS, sums.tolist(), strict=True)))


_SUMS = (
    "pairs",
    "right",
    "pairs_step",
    "right_step",
    "pairs_answer",
    "right_answer",
    "margin",
    "chosen",
    "rejected",
    "num_correct",
    "correct",
    "num_incorrect",
    "incorrect",
    *(f"{what}_{number}" for what in ("bin", "chance", "hit") for number in range(NUM_BINS)),
)


def _pair_sums(groups: Sequence[PairGroup], values: Sequence[float]) -> torch.Tensor:
    """Sums over the pairs of some groups, in the order of `_SUMS`; a tie is half right."""
    sums = dict.fromkeys(_SUMS, 0.0)
    base = 0
    for group in groups:
        for chosen, rejected in zip(group.chosen, group.rejected, strict=True):
            better, worse = values[base + chosen], values[base + rejected]
            right = 0.5 if better == worse else float(better > worse)
            sums["pairs"] += 1
            sums["right"] += right
            sums[f"pairs_{group.kind.value}"] += 1
            sums[f"right_{group.kind.value}"] += right
            sums["margin"] += better - worse
            sums["chosen"] += better
            sums["rejected"] += worse
        if group.kind is PairKind.ANSWER:
            for name, members in (("correct", group.chosen), ("incorrect", group.rejected)):
                for text in set(members):
                    value = values[base + text]
                    sums[f"num_{name}"] += 1
                    sums[name] += value
                    sums[f"bin_{bin_of(value)}"] += 1
                    sums[f"chance_{bin_of(value)}"] += (1.0 + value) / 2.0
                    sums[f"hit_{bin_of(value)}"] += name == "correct"
        base += len(group.texts)
    return torch.tensor([sums[name] for name in _SUMS], dtype=torch.float64)


def _pair_metrics(sums: dict[str, float]) -> HeldOut:
    metrics = {"num_pairs": sums["pairs"]}
    for name, top, bottom in (
        ("pair_accuracy", "right", "pairs"),
        ("pair_accuracy_step", "right_step", "pairs_step"),
        ("pair_accuracy_answer", "right_answer", "pairs_answer"),
        ("pair_margin", "margin", "pairs"),
        ("value_chosen", "chosen", "pairs"),
        ("value_rejected", "rejected", "pairs"),
        ("value_correct", "correct", "num_correct"),
        ("value_incorrect", "incorrect", "num_incorrect"),
    ):
        if sums[bottom]:
            metrics[name] = sums[top] / sums[bottom]
    counts, chances, hits = (
        [sums[f"{what}_{number}"] for number in range(NUM_BINS)]
        for what in ("bin", "chance", "hit")
    )
    bins, error = calibration(counts, chances, hits)
    if error is not None:
        metrics["calibration_error"] = error
    return HeldOut(metrics=metrics, calibration=bins)
