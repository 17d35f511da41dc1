"""The data of a fit, tokenised and planned: policy and PPM differ only here and in their objective.

dataset directory --read, tokenise, leave out--> Task --plan_fit--> all optimiser steps
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from learner.attention import documents, trees
from learner.batch import (
    PairGroup,
    PolicyBatch,
    PreferenceBatch,
    pack_policy,
    pack_preference,
    tokenise_pairs,
    tokenise_segments,
)
from learner.dataset import read_manifest, read_pairs, read_sft
from learner.fit import FitRequest, LearnerError, PreferenceTrainConfig, TrainConfig
from learner.packing import PlannedStep, Share, plan_epoch
from learner.pairs import PairKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One split of a fit's data; an example is a trajectory, or a node with its pairs."""

    tokens: list[int]
    """Of each example's texts, each counted whole."""
    computed: list[int]
    """Tokens each example takes in a row."""
    attended: list[int]
    """Pairs of a token and one it sees."""
    counts: list[int]
    """What an example counts as against `batch_examples`."""
    trained: list[int]
    """Tokens of each example with a next-token loss."""
    pack: Callable[[Share], PolicyBatch | PreferenceBatch]
    denominator: Callable[[PlannedStep], float]
    """What the loss sum of a global batch is divided by."""
    skipped_long: int
    groups: list[PairGroup] = field(default_factory=list)
    """The nodes of a PPM; empty for a policy."""

    def __len__(self) -> int:
        return len(self.tokens)

    def total(self, numbers: list[int], step: PlannedStep) -> int:
        """Sum of one of the lists above over the examples of a step."""
        return sum(numbers[e] for e in step.examples)


def policy_task(tokenizer: Any, request: FitRequest, split: str) -> Task:
    """The trajectories of a split ("train" or "validation").

    Raises:
        LearnerError: nothing to train on.
        DatasetError, ValueError: the data cannot be read or tokenised.
    """
    limit = request.config.max_sequence_tokens
    examples = read_sft(request.data, split)
    texts = [tokenise_segments(tokenizer, example.segments) for example in examples]
    kept = [text for text in texts if text.length <= limit]
    if split == "train" and not kept:
        raise LearnerError(_nothing_to_train(request, "trajectories", len(texts)))
    trained = [text.num_trained for text in kept]
    lengths = [text.length for text in kept]
    return Task(
        tokens=lengths,
        computed=lengths,
        attended=[documents([length]).num_attended for length in lengths],
        counts=[1] * len(kept),
        trained=trained,
        pack=lambda share: pack_policy([kept[e] for e in share.examples], filler=share.filler),
        denominator=lambda step: float(max(sum(trained[e] for e in step.examples), 1)),
        skipped_long=len(texts) - len(kept),
    )


def preference_task(tokenizer: Any, request: FitRequest, split: str) -> Task:
    """The nodes of a split with their pairs; as `policy_task`."""
    config = request.config
    assert isinstance(config, PreferenceTrainConfig)
    groups = tokenise_pairs(tokenizer, read_pairs(request.data, split))
    kept = [group for group in groups if group.length <= config.max_sequence_tokens]
    if split == "train":
        if not kept:
            raise LearnerError(_nothing_to_train(request, "preference pairs", len(groups)))
        if config.objective == "outcome":
            kept = [group for group in kept if group.kind is PairKind.ANSWER]
            if not kept:
                raise LearnerError(
                    f"no whole trajectories to train on in {request.data}: objective = outcome "
                    "needs answer pairs (dataset.pairs.answer_pairs)"
                )
    weights = [sum(group.weights) for group in kept]
    if config.objective != "pairwise":
        weights = [float(len(group.texts)) for group in kept]
    auxiliary = config.lm_weight > 0.0
    return Task(
        tokens=[group.num_tokens for group in kept],
        computed=[group.num_computed for group in kept],
        attended=[trees([(group.num_shared, group.branches)]).num_attended for group in kept],
        counts=[len(group.weights) for group in kept],
        trained=[
            sum(text.num_trained for text in group.texts) if auxiliary else 0 for group in kept
        ],
        pack=lambda share: pack_preference([kept[e] for e in share.examples], filler=share.filler),
        denominator=lambda step: sum(weights[e] for e in step.examples) or 1.0,
        skipped_long=len(groups) - len(kept),
        groups=kept,
    )


def plan_fit(task: Task, config: TrainConfig, *, world_size: int, seed: int) -> list[PlannedStep]:
    """All steps of a fit: `total_tokens` tokens, or `num_epochs` passes."""
    steps: list[PlannedStep] = []
    tokens = epoch = 0
    while True:
        one_pass = plan_epoch(
            task.tokens,
            task.counts,
            task.computed,
            max_tokens=config.batch_tokens,
            max_examples=config.batch_examples,
            micro_tokens=config.micro_batch_tokens,
            world_size=world_size,
            rng=random.Random(f"{seed}:{epoch}"),
        )
        if config.total_tokens is None:
            left = config.num_epochs - epoch
            steps += one_pass[: math.ceil(len(one_pass) * min(left, 1.0))]
            if left <= 1.0:
                return steps
        else:
            for step in one_pass:
                steps.append(step)
                tokens += task.total(task.tokens, step)
                if tokens >= config.total_tokens:
                    return steps
        epoch += 1


def _nothing_to_train(request: FitRequest, what: str, num_read: int) -> str:
    if num_read:
        return (
            f"all {num_read} {what} in {request.data} are longer than max_sequence_tokens = "
            f"{request.config.max_sequence_tokens}"
        )
    message = f"no {what} to train on in {request.data}"
    if request.kind == "ppm":
        counts = (read_manifest(request.data) or {}).get("counts", {}).get("all", {})
        if counts.get("trees"):
            found = counts.get("trajectories_correct", 0)
            message += (
                f": {counts['trees']} trees with {found} correct trajectories, but none with one "
                "correct and one wrong (a PPM needs both classes)"
            )
    return message
