"""The data of a fit, tokenised and planned: policy and PPM differ only here and in their objective.

    dataset directory --row groups, tokenise, leave out--> Task --plan_fit--> all optimiser steps
                                                            |
                               lengths in memory, token ids in a file (`learner.spill.DiskList`)

Texts are read in pieces and tokenised once, each piece by one of the ranks, which then tell each
other the ids. What planning needs, a few numbers an example, stays in memory; the ids go to one
file of each machine, on a disk of its own, and a step of a rank reads back those of its rows.
Shuffling is a permutation of example numbers, drawn from (seed, epoch), and packing goes by the
lengths: neither touches the data.

An example that cannot be trained on is left out and counted: what a search accepts stops no fit.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from learner.attention import documents, trees
from learner.batch import (
    NODE_KEYS,
    PairGroup,
    PolicyBatch,
    TokenisedText,
    nodes_of,
    pack_policy,
    pack_preference,
    tokenise_nodes,
    tokenise_pairs,
    tokenise_texts,
)
from learner.dataset import pairs_of, read_manifest, read_pieces, sft_of, valued_nodes_of
from learner.fit import FitRequest, LearnerError, PreferenceTrainConfig, TrainConfig
from learner.packing import PlannedStep, Share, plan_epoch
from learner.pairs import PairKind
from learner.ranks import machine_list, on_all_ranks, share_out
from learner.spill import DiskList, no_room, pickled

T = TypeVar("T")
R = TypeVar("R")

OnRead = Callable[[int], None]

_TEXTS = 256
"""Rows tokenised at a time by each rank."""
_PAIRS = 256
"""Likewise; nodes are not cut."""
_NODES = 64
"""Likewise, of valued steps."""


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
    left_out: Mapping[str, int]
    """Reason -> examples: too_long, empty, untokenisable."""
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
    """The trajectories of a split ("train" or "validation"); every rank gets the same task.

    Args:
        spill: existing folder on a disk with room for all token ids.
        on_read: told how many rows are read, again and again.
    Raises:
        LearnerError: the data cannot be read, there is nothing to train on, or the disk of a rank
            is full; alike on all ranks.
    """
    limit = request.config.max_sequence_tokens
    kept: DiskList[TokenisedText] = machine_list(spill, request.fit_id)
    lengths, attended, trained = array("q"), array("q"), array("q")

    def measure(text: TokenisedText) -> str | _Numbers:
        if not text.trained[:-1].any():  # but the end of sequence
            return "empty"
        if text.length > limit:
            return "too_long"
        return text.length, documents([text.length]).num_attended, text.num_trained

    left_out = _tokenise(
        _told(read_pieces(request.data, f"sft_{split}", _TEXTS), on_read),
        lambda rows: [example.segments for example in sft_of(rows)],
        partial(tokenise_texts, tokenizer),
        measure,
        [lengths, attended, trained],
        kept=kept,
        spill=spill,
        request=request,
        what="trajectories" if split == "train" else None,
    )
    return Task(
        tokens=lengths,
        computed=lengths,
        attended=attended,
        counts=array("q", [1]) * len(kept),
        trained=trained,
        pack=lambda share: pack_policy([kept[e] for e in share.examples], filler=share.filler),
        denominator=lambda step: float(max(sum(trained[e] for e in step.examples), 1)),
        left_out=left_out,
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
    kept: DiskList[PairGroup] = machine_list(spill, request.fit_id)
    names = ("tokens", "computed", "attended", "counts", "trained")
    numbers = {name: array("q") for name in names}
    weights = array("d")
    if of_steps:
        pieces = read_pieces(request.data, "steps_train", _NODES)
    else:
        pieces = read_pieces(request.data, f"pairs_{split}", _PAIRS, together=NODE_KEYS)

    def items_of(rows: pa.Table) -> list[Any]:
        return list(valued_nodes_of(rows) if of_steps else nodes_of(pairs_of(rows)))

    def tokenise(nodes: Sequence[Any]) -> list[PairGroup]:
        if of_steps:
            return tokenise_nodes(tokenizer, nodes)
        return tokenise_pairs(tokenizer, chain.from_iterable(nodes))

    def measure(group: PairGroup) -> str | _Numbers:
        if not all(text.length for text in group.texts):
            return "empty"
        if group.length > config.max_sequence_tokens:
            return "too_long"
        outcome = config.objective == "outcome" and split == "train"
        if outcome and group.kind is not PairKind.ANSWER:
            return _PASSED_OVER
        auxiliary = config.lm_weight > 0.0
        pairwise = config.objective == "pairwise"
        return (
            group.num_tokens,
            group.num_computed,
            trees([(group.num_shared, group.branches)]).num_attended,
            len(group.texts if of_steps else group.weights),
            sum(t.num_trained for t in group.texts) if auxiliary else 0,
            sum(group.weights) if pairwise else float(len(group.texts)),
        )

    what = "steps with a Q-value" if of_steps else "preference pairs"
    left_out = _tokenise(
        _told(pieces, on_read, steps=of_steps),
        items_of,
        tokenise,
        measure,
        [*numbers.values(), weights],
        kept=kept,
        spill=spill,
        request=request,
        what=what if split == "train" else None,
    )
    if split == "train" and not kept:
        raise LearnerError(
            f"fit {request.fit_id!r}: no whole trajectories to train on in {request.data}: "
            "objective = outcome needs answer pairs (dataset.pairs.answer_pairs)"
        )
    return Task(
        **numbers,
        pack=lambda share: pack_preference([kept[e] for e in share.examples], filler=share.filler),
        denominator=lambda step: sum(weights[e] for e in step.examples) or 1.0,
        left_out=left_out,
        groups=kept,
    )


_Numbers = tuple[float, ...]
"""What is kept in memory of an example."""

_PASSED_OVER = ""
"""In place of a reason: nobody asked for it."""


def _told(
    pieces: Iterable[pa.Table], on_read: OnRead, *, steps: bool = False
) -> Iterator[pa.Table]:
    """Pieces of a file, and how many rows (or steps) were read tells `on_read`."""
    num_read = 0
    for rows in pieces:
        num_read += len(pc.list_flatten(rows["steps"])) if steps else len(rows)
        on_read(num_read)
        yield rows


def _tokenise(
    pieces: Iterable[pa.Table],
    items_of: Callable[[pa.Table], list[T]],
    work: Callable[[Sequence[T]], list[R]],
    measure: Callable[[R], str | _Numbers],
    columns: Sequence[array[Any]],
    *,
    kept: DiskList[R],
    spill: Path,
    request: FitRequest,
    what: str | None,
) -> Mapping[str, int]:
    """Have all pieces tokenised, a share of them by each rank; why how many items are left out.

    Args:
        items_of: what stands in a piece; called for those of this rank alone.
        work: tokenises some items; may fail for one that the tokenizer refuses.
        measure: what is noted of a tokenised item, one number a column, or why it is left out.
        columns: of numbers, one each of what is kept.
        what: the items, of which at least one must be kept or passed over; None: none need be.
    Raises:
        LearnerError: as `policy_task`.
    """
    left_out: Counter[str] = Counter()
    refusals: list[str] = []
    num_read = 0

    def make(pieces: Sequence[pa.Table]) -> list[tuple[str | _Numbers, bytes]]:
        found: list[tuple[str | _Numbers, bytes]] = []
        for result in (r for rows in pieces for r in _each(work, items_of(rows))):
            if isinstance(result, str):
                found.append(("untokenisable", result.encode(errors="replace")))
                continue
            numbers = measure(result)
            found.append((numbers, b"" if isinstance(numbers, str) else pickled(result)))
        return found

    def take(made: tuple[str | _Numbers, bytes]) -> None:
        nonlocal num_read
        num_read += 1
        numbers, data = made
        if isinstance(numbers, str):
            if numbers != _PASSED_OVER:
                left_out[numbers] += 1
            if numbers == "untokenisable":
                refusals[:] = refusals or [data.decode()]
            return
        try:
            kept.append_pickled(data)
        except OSError as error:
            raise LearnerError(_no_room(error, spill)) from error
        for column, number in zip(columns, numbers, strict=True):
            column.append(number)

    def finish() -> None:
        try:
            kept.flush()
        except OSError as error:
            raise LearnerError(_no_room(error, spill)) from error
        if what is not None and num_read == left_out.total():
            raise LearnerError(_nothing_to_train(request, what, left_out, refusals))

    share_out(pieces, make, take, size=1, fit_id=request.fit_id)
    on_all_ranks(finish, request.fit_id)
    return dict(left_out)


def _each(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R | str]:
    """What `work` makes of some items; of one that it fails for, the error."""
    try:
        return list(work(items))
    except MemoryError:
        raise
    except Exception as error:  # what a tokenizer raises has no type of its own
        if len(items) == 1:
            return [str(error)]
        return [result for item in items for result in _each(work, [item])]


def _no_room(error: OSError, spill: Path) -> str:
    return f"{no_room(error, spill)}; TMPDIR names the folder that token ids go to"


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


def _nothing_to_train(
    request: FitRequest, what: str, left_out: Counter[str], refusals: Sequence[str]
) -> str:
    if left_out:
        said = {
            "too_long": f"longer than max_sequence_tokens = {request.config.max_sequence_tokens}",
            "empty": "without a token to train on",
            "untokenisable": f"refused by the tokenizer ({', '.join(refusals)})",
        }
        reasons = ", ".join(f"{count} {said[reason]}" for reason, count in left_out.items())
        return f"all {left_out.total()} {what} in {request.data} are left out: {reasons}"
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
