"""The data of a fit, tokenised and planned: policy and PPM differ only here and in their objective.

    dataset directory --row groups, tokenise, leave out--> Task --plan_fit--> all optimiser steps
                                                            |
                               lengths in memory, token ids in a file (`learner.spill.DiskList`)

Texts are read by row group and tokenised once. What planning needs, a few numbers an example, stays
in memory; the ids go to a file of this process beside the checkpoint that is being made, and a
step reads back those of its own rows. Shuffling is a permutation of example numbers, drawn from
(seed, epoch), and packing goes by the lengths: neither touches the data.

Each rank tokenises all of a dataset and keeps its own file: they share nothing but the plan.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from learner.attention import documents, trees
from learner.batch import (
    PairGroup,
    PolicyBatch,
    TokenisedText,
    pack_policy,
    pack_preference,
    tokenise_nodes,
    tokenise_pairs,
    tokenise_texts,
)
from learner.dataset import read_manifest, read_pairs, read_sft, read_valued_nodes
from learner.fit import FitRequest, LearnerError, PreferenceTrainConfig, TrainConfig
from learner.packing import PlannedStep, Share, plan_epoch
from learner.pairs import PairKind
from learner.spill import DiskList

OnRead = Callable[[int], None]

_TEXTS = 64
"""Tokenised at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One split of a fit's data; an example is a trajectory, or a node with its pairs or steps."""

    tokens: Sequence[int]
    """Of each example's texts, each counted whole."""
    computed: Sequence[int]
    """Tokens each example takes in a row."""
    attended: Sequence[int]
    """Pairs of a token and one it sees."""
    counts: Sequence[int]
    """What an example counts as against `batch_examples`."""
    trained: Sequence[int]
    """Tokens of each example with a next-token loss."""
    pack: Callable[[Share], PolicyBatch]
    denominator: Callable[[PlannedStep], float]
    """What the loss sum of a global batch is divided by."""
    skipped_long: int
    groups: DiskList[PairGroup] | None = None
    """The nodes of a PPM; None: of a policy."""

    def __len__(self) -> int:
        return len(self.tokens)

    def total(self, numbers: Sequence[int], step: PlannedStep) -> int:
        """Sum of one of the lists above over the examples of a step."""
        return sum(numbers[e] for e in step.examples)


def policy_task(
    tokenizer: Any,
    request: FitRequest,
    split: str,
    *,
    spill: Path,
    on_read: OnRead = lambda n: None,
) -> Task:
    """The trajectories of a split ("train" or "validation").

    Args:
        spill: existing folder on a disk with room for all token ids.
        on_read: told how many rows are tokenised, again and again.
    Raises:
        LearnerError: nothing to train on.
        DatasetError, ValueError: the data cannot be read or tokenised.
        OSError: the disk is full.
    """
    limit = request.config.max_sequence_tokens
    kept = DiskList[TokenisedText](spill)
    lengths, attended, trained = array("q"), array("q"), array("q")
    num_read = 0
    examples = (example.segments for example in read_sft(request.data, split))
    while batch := list(islice(examples, _TEXTS)):
        num_read += len(batch)
        on_read(num_read)
        for text in tokenise_texts(tokenizer, batch):
            if text.length > limit:
                continue
            kept.append(text)
            lengths.append(text.length)
            attended.append(documents([text.length]).num_attended)
            trained.append(text.num_trained)
    if split == "train" and not kept:
        raise LearnerError(_nothing_to_train(request, "trajectories", num_read))
    return Task(
        tokens=lengths,
        computed=lengths,
        attended=attended,
        counts=array("q", [1]) * len(kept),
        trained=trained,
        pack=lambda share: pack_policy([kept[e] for e in share.examples], filler=share.filler),
        denominator=lambda step: float(max(sum(trained[e] for e in step.examples), 1)),
        skipped_long=num_read - len(kept),
    )


def preference_task(
    tokenizer: Any,
    request: FitRequest,
    split: str,
    *,
    spill: Path,
    on_read: OnRead = lambda n: None,
) -> Task:
    """The nodes of a split with their pairs; as `policy_task`.

    Objective q_regression trains on all steps with a Q-value, and is judged by pairs like the
    others.
    """
    config = request.config
    assert isinstance(config, PreferenceTrainConfig)
    of_steps = config.objective == "q_regression" and split == "train"
    groups = (
        tokenise_nodes(tokenizer, read_valued_nodes(request.data))
        if of_steps
        else tokenise_pairs(tokenizer, read_pairs(request.data, split))
    )
    kept = DiskList[PairGroup](spill)
    names = ("tokens", "computed", "attended", "counts", "trained")
    numbers = {name: array("q") for name in names}
    weights = array("d")
    num_read = num_short = num_pairs = 0
    for group in groups:
        num_read += 1
        count = len(group.texts if of_steps else group.weights)
        num_pairs += count
        on_read(num_pairs)
        if group.length > config.max_sequence_tokens:
            continue
        num_short += 1
        outcome = config.objective == "outcome" and split == "train"
        if outcome and group.kind is not PairKind.ANSWER:
            continue
        kept.append(group)
        numbers["tokens"].append(group.num_tokens)
        numbers["computed"].append(group.num_computed)
        numbers["attended"].append(trees([(group.num_shared, group.branches)]).num_attended)
        numbers["counts"].append(count)
        auxiliary = config.lm_weight > 0.0
        numbers["trained"].append(sum(t.num_trained for t in group.texts) if auxiliary else 0)
        pairwise = config.objective == "pairwise"
        weights.append(sum(group.weights) if pairwise else float(len(group.texts)))
    if split == "train" and not num_short:
        what = "steps with a Q-value" if of_steps else "preference pairs"
        raise LearnerError(_nothing_to_train(request, what, num_read))
    if split == "train" and not kept:
        raise LearnerError(
            f"no whole trajectories to train on in {request.data}: objective = outcome "
            "needs answer pairs (dataset.pairs.answer_pairs)"
        )
    return Task(
        **numbers,
        pack=lambda share: pack_preference([kept[e] for e in share.examples], filler=share.filler),
        denominator=lambda step: sum(weights[e] for e in step.examples) or 1.0,
        skipped_long=num_read - num_short,
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
    if what == "steps with a Q-value":
        message += ": its trees were selected for another objective than q_regression"
    elif request.kind == "ppm":
        manifest = read_manifest(request.data) or {}
        counts = manifest.get("counts", {}).get("all", {})
        if counts.get("trees"):
            found = counts.get("trajectories_correct", 0)
            message += (
                f": {counts['trees']} trees with {found} correct trajectories, but none with one "
                "correct and one wrong (a PPM needs both classes)"
            )
        if earlier := manifest.get("excluded", {}).get("all", {}).get("other_round_pair"):
            message += f"; other rounds have {earlier} pairs (dataset.pair_rounds: all takes them)"
    return message
