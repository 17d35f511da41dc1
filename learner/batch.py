"""Text to tensors: tokenise, mask, cut into batches, pad.

A text is tokenised once, whole, and the loss mask is laid over it by character offsets. Step
boundaries are special tokens, so the ids of `prefix + continuation` are those of the prefix
followed by those of the continuation: what an engine sees at search time. A text whose loss
boundary falls inside a token is refused rather than trained with a wrong mask.

    lengths --plan_batches--> steps; each step: micro-batches x ranks -> example numbers
    examples --collate_*----> padded tensors, right padding, no attention mask

No attention mask is needed: attention is causal, padding stands on the right, and nothing reads
its positions. All ranks hold the same plan, so they agree on the number of steps and micro-batches
without talking; an example with weight 0 fills a rank's place where there are too few.

Shapes: B sequences, T padded length, P positions that a loss reads, R pairs.

Not covered: packing several examples into one row. A packed batch would be another `collate_policy`
with position ids; plan and losses stay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from learner.pairs import PairKind, PreferencePair
from rollout.prompt import MARKERS, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedText:
    """One trajectory as ids."""

    ids: np.ndarray
    """[T] int32, end-of-sequence included."""
    trained: np.ndarray
    """[T] bool: the loss predicts this token. The first is never trained."""

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGroup:
    """All pairs of one node: each distinct text once, and which is preferred to which."""

    texts: tuple[TokenisedText, ...]
    """Prefix and continuation; `trained` marks the continuation of a chosen text."""
    chosen: tuple[int, ...]
    """[R] index into `texts`."""
    rejected: tuple[int, ...]
    weights: tuple[float, ...]
    kind: PairKind

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(text.length for text in self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """One rank's share of a micro-batch for the next-token loss."""

    input_ids: torch.Tensor
    """[B, T] int64."""
    positions: torch.Tensor
    """[P] int64 into the flattened [B * T] hidden states whose next token has a loss."""
    targets: torch.Tensor
    """[P] int64, those next tokens."""

    def to(self, device: torch.device) -> PolicyBatch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            targets=self.targets.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """One rank's share of a micro-batch for the pairwise loss."""

    input_ids: torch.Tensor
    """[B, T] int64."""
    last: torch.Tensor
    """[B] int64 into the flattened [B * T] hidden states: the last token of each text."""
    chosen: torch.Tensor
    """[R] int64 into B."""
    rejected: torch.Tensor
    """[R] int64 into B."""
    weights: torch.Tensor
    """[R] float32; 0 for a filler."""
    positions: torch.Tensor
    """[P] as in `PolicyBatch`, over the chosen texts; empty without auxiliary loss."""
    targets: torch.Tensor
    """[P]."""

    def to(self, device: torch.device) -> PreferenceBatch:
        names = ("input_ids", "last", "chosen", "rejected", "weights", "positions", "targets")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank computes in one micro-batch."""

    examples: tuple[int, ...]
    filler: bool = False
    """True: there was nothing left; compute this with weight 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """One optimiser step: `micro[i][r]` is rank r's share of micro-batch i."""

    micro: tuple[tuple[Share, ...], ...]

    @property
    def examples(self) -> list[int]:
        """All example numbers of the step, fillers excluded."""
        return [e for ranks in self.micro for s in ranks if not s.filler for e in s.examples]


def check_markers(tokenizer: Any, *, where: str) -> None:
    """Check that a tokenizer can serve the trajectory grammar.

    Raises:
        ValueError: a step marker is not one token, there is no end of sequence, or there are no
            character offsets.
    """
    missing = [m for m in MARKERS if len(tokenizer(m, add_special_tokens=False).input_ids) != 1]
    if missing:
        raise ValueError(
            f"tokenizer of {where} lacks step markers as single tokens: {' '.join(missing)}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer of {where} has no end-of-sequence token")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer of {where} gives no character offsets (not a fast tokenizer)")


def tokenise_segments(
    tokenizer: Any, segments: Sequence[Segment], *, end_of_sequence: bool = True
) -> TokenisedText:
    """Tokenise a whole text; the loss applies to the trained segments and the end of sequence.

    Raises:
        ValueError: a token reaches across the boundary of a trained segment.
    """
    text = "".join(segment.text for segment in segments)
    wanted = np.zeros(len(text), dtype=bool)
    at = 0
    for segment in segments:
        wanted[at : at + len(segment.text)] = segment.trained
        at += len(segment.text)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoded.input_ids)
    trained = np.zeros(len(ids) + 1, dtype=bool)
    for i, (start, stop) in enumerate(encoded.offset_mapping):
        span = wanted[start:stop]
        if span.any() and not span.all():
            raise ValueError(
                f"token {text[start:stop]!r} reaches across the boundary of what the policy wrote"
            )
        trained[i] = bool(span.any())
    if end_of_sequence and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
        trained[len(ids) - 1] = True
    trained[0] = False
    return TokenisedText(ids=np.asarray(ids, dtype=np.int32), trained=trained[: len(ids)])


def tokenise_pairs(tokenizer: Any, pairs: Sequence[PreferencePair]) -> list[PairGroup]:
    """Group pairs by node and tokenise each distinct text of a node once; order kept."""
    by_node: dict[tuple[Any, ...], list[PreferencePair]] = {}
    for pair in pairs:
        key = (pair.problem_id, pair.round, pair.tree_index, pair.kind, pair.node, pair.prefix)
        by_node.setdefault(key, []).append(pair)
    groups = []
    for members in by_node.values():
        chosen = {pair.chosen for pair in members}
        numbers = {t: i for i, t in enumerate(dict.fromkeys(t for p in members for t in _both(p)))}
        texts = [
            tokenise_segments(
                tokenizer,
                [
                    Segment(text=members[0].prefix, trained=False),
                    Segment(text=text, trained=text in chosen),
                ],
                end_of_sequence=False,
            )
            for text in numbers
        ]
        groups.append(
            PairGroup(
                texts=tuple(texts),
                chosen=tuple(numbers[pair.chosen] for pair in members),
                rejected=tuple(numbers[pair.rejected] for pair in members),
                weights=tuple(pair.weight for pair in members),
                kind=members[0].kind,
            )
        )
    return groups


def _both(pair: PreferencePair) -> tuple[str, str]:
    return pair.chosen, pair.rejected


def plan_batches(
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    rows: Sequence[int] | None = None,
    max_tokens: int | None,
    max_examples: int | None,
    micro_tokens: int,
    world_size: int,
    rng: random.Random | None,
) -> list[PlannedStep]:
    """Cut one pass over the data into optimiser steps of like lengths, the same on every rank.

    Args:
        lengths: tokens of the longest row of each example.
        counts: what an example counts as against `max_examples` (1, or its pairs).
        rows: sequences of each example; None: one each.
        max_tokens: most padded tokens of a step (its sequences x its longest); None: no limit.
        max_examples: most counts in a step; None: no limit. An example over a limit stands alone.
        micro_tokens: most padded tokens of one forward pass of one rank.
        rng: shuffles; None keeps the longest-first order (evaluation).
    """
    rows = rows or [1] * len(lengths)
    order = list(range(len(lengths)))
    if rng is None:
        order.sort(key=lambda e: -lengths[e])
    else:
        rng.shuffle(order)
        order = _bucketed(order, lengths, rows, max_tokens, max_examples)
    cut = _cut(order, lengths, counts, rows, max_tokens, max_examples)
    if rng is not None:
        rng.shuffle(cut)
    return [_share(step, lengths, rows, micro_tokens, world_size) for step in cut]


def _bucketed(
    order: list[int],
    lengths: Sequence[int],
    rows: Sequence[int],
    max_tokens: int | None,
    max_examples: int | None,
) -> list[int]:
    """Sort by length inside pools of about 50 steps: like lengths meet, but not always the same."""
    tokens = sum(lengths[e] * rows[e] for e in order) / max(len(order), 1)
    limits = [max_examples or len(order)]
    if max_tokens is not None:
        limits.append(max(1, int(max_tokens / max(tokens, 1.0))))
    pool = 50 * min(limits)
    return [
        e
        for start in range(0, len(order), pool)
        for e in sorted(order[start : start + pool], key=lambda e: lengths[e])
    ]


def _cut(
    order: Sequence[int],
    lengths: Sequence[int],
    counts: Sequence[int],
    rows: Sequence[int],
    max_tokens: int | None,
    max_examples: int | None,
) -> list[list[int]]:
    """Fill batches in order up to the limits."""
    batches: list[list[int]] = []
    count = width = num_rows = 0
    for e in order:
        grown = max(width, lengths[e]) * (num_rows + rows[e])
        fits = (max_tokens is None or grown <= max_tokens) and (
            max_examples is None or count + counts[e] <= max_examples
        )
        if not batches or not fits:
            batches.append([])
            count = width = num_rows = 0
        batches[-1].append(e)
        count += counts[e]
        num_rows += rows[e]
        width = max(width, lengths[e])
    return batches


def _share(
    step: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[int],
    micro_tokens: int,
    world_size: int,
) -> PlannedStep:
    """Deal a step to the ranks so that all have about the same work and as many micro-batches."""
    dealt = sorted(step, key=lambda e: -lengths[e] * rows[e])
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for e in dealt:
        lightest = loads.index(min(loads))
        hands[lightest].append(e)
        loads[lightest] += lengths[e] * rows[e]
    ones = [1] * len(lengths)
    cuts = [
        _cut(sorted(hand, key=lambda e: -lengths[e]), lengths, ones, rows, micro_tokens, None)
        for hand in hands
    ]
    smallest = min(step, key=lambda e: lengths[e] * rows[e])
    filler = Share(examples=(smallest,), filler=True)
    micro = tuple(
        tuple(Share(examples=tuple(cut[i])) if i < len(cut) else filler for cut in cuts)
        for i in range(max(len(cut) for cut in cuts))
    )
    return PlannedStep(micro=micro)


def padded_tokens(step: PlannedStep, lengths: Sequence[int], rows: Sequence[int]) -> int:
    """Tokens a step computes over all ranks, padding included, fillers excluded."""
    return sum(
        max(lengths[e] for e in share.examples) * sum(rows[e] for e in share.examples)
        for ranks in step.micro
        for share in ranks
        if not share.filler
    )


def collate_policy(
    texts: Sequence[TokenisedText], *, pad_id: int, filler: bool = False
) -> PolicyBatch:
    """Pad texts on the right and list the positions that have a loss; a filler has none."""
    ids = _padded([text.ids for text in texts], pad_id)
    positions, targets = _loss_positions([] if filler else texts, ids.shape[1])
    return PolicyBatch(input_ids=torch.from_numpy(ids), positions=positions, targets=targets)


def collate_preference(
    groups: Sequence[PairGroup], *, pad_id: int, filler: bool = False
) -> PreferenceBatch:
    """Pad the texts of some nodes into one batch and number their pairs in it."""
    texts = [text for group in groups for text in group.texts]
    ids = _padded([text.ids for text in texts], pad_id)
    width = ids.shape[1]
    chosen, rejected, weights = [], [], []
    base = 0
    for group in groups:
        chosen += [base + i for i in group.chosen]
        rejected += [base + i for i in group.rejected]
        weights += [0.0 if filler else weight for weight in group.weights]
        base += len(group.texts)
    positions, targets = _loss_positions([] if filler else texts, width)
    return PreferenceBatch(
        input_ids=torch.from_numpy(ids),
        last=torch.tensor([i * width + text.length - 1 for i, text in enumerate(texts)]),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        weights=torch.tensor(weights, dtype=torch.float32),
        positions=positions,
        targets=targets,
    )


def _padded(rows: Sequence[np.ndarray], pad_id: int) -> np.ndarray:
    ids = np.full((len(rows), max(len(row) for row in rows)), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids


def _loss_positions(
    texts: Sequence[TokenisedText], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions before each trained token, and those tokens."""
    positions = [np.empty(0, dtype=np.int64)]
    targets = [np.empty(0, dtype=np.int64)]
    for i, text in enumerate(texts):
        at = np.flatnonzero(text.trained)
        positions.append(i * width + at - 1)
        targets.append(text.ids[at].astype(np.int64))
    return torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(targets))
