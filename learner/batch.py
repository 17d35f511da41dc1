"""Text to tensors: tokenise, mask, pack.

A text is tokenised once, whole, and the loss mask is laid over it by character offsets. Step
boundaries are special tokens, so the ids of `prefix + continuation` are those of the prefix
followed by those of the continuation: what an engine sees at search time. Where a loss boundary
falls inside a token all the same, the segments of that text are tokenised one by one.

    texts or nodes of a share --pack_*--> one row of T tokens, without padding, and its `Layout`

The texts of a node stand in the row as a tree: the tokens all of them begin with once, then what is
each one's own. That prefix is found among the ids, so it is right for any tokenizer.

Shapes: T tokens of a row, B texts, P positions that a loss reads, R pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from typing import Any, Self

import numpy as np
import torch

from learner.attention import Layout, documents, trees
from learner.pairs import PairKind, PreferencePair, ValuedNode
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
    """All pairs of one node: each distinct text once, and which is preferred to which; or the steps
    of one node, without pairs."""

    texts: tuple[TokenisedText, ...]
    """Prefix and continuation; `trained` marks the continuation of a chosen text, or of a step
    with Q > 0."""
    chosen: tuple[int, ...]
    """[R] index into `texts`."""
    rejected: tuple[int, ...]
    weights: tuple[float, ...]
    targets: tuple[float, ...]
    """Per text, in [-1, 1]: 1 if it is chosen in a pair, else -1; of a node without pairs the
    Q-value of the step."""
    kind: PairKind
    num_shared: int
    """Tokens that all texts begin with; each that is not empty has at least one more."""

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(text.length for text in self.texts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, each counted whole."""
        return sum(text.length for text in self.texts)

    @property
    def num_computed(self) -> int:
        """Tokens the node takes in a row."""
        return self.num_tokens - self.num_shared * (len(self.texts) - 1)

    @property
    def branches(self) -> list[int]:
        """Tokens of each text after the shared ones."""
        return [text.length - self.num_shared for text in self.texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """One packed row for the next-token loss."""

    input_ids: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64; from 0 in each text, and on from the prefix in a branch."""
    layout: Layout
    positions: torch.Tensor
    """[P] int64 into the T hidden states whose next token has a loss."""
    targets: torch.Tensor
    """[P] int64, those next tokens."""

    def to(self, device: torch.device) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch(PolicyBatch):
    """One packed row for the losses of the PPM; `positions` are those of the chosen texts, a
    shared one once for each of them."""

    last: torch.Tensor
    """[B] int64 into the T hidden states: the last token of each text."""
    chosen: torch.Tensor
    """[R] int64 into B."""
    rejected: torch.Tensor
    """[R] int64 into B."""
    weights: torch.Tensor
    """[R] float32; 0 for a filler."""
    value_targets: torch.Tensor
    """[B] float32, `PairGroup.targets`."""
    text_weights: torch.Tensor
    """[B] float32: 1, or 0 for a filler."""


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
    """`tokenise_texts` of one text."""
    return tokenise_texts(tokenizer, [segments], end_of_sequence=end_of_sequence)[0]


def tokenise_texts(
    tokenizer: Any, texts: Sequence[Sequence[Segment]], *, end_of_sequence: bool = True
) -> list[TokenisedText]:
    """Tokenise whole texts; the loss applies to the trained segments and the end of sequence.

    Where a token would reach across the boundary of a trained segment, the segments of that text
    are tokenised one by one: a policy continues the ids of its prompt.

    Args:
        texts: the segments of each.
        end_of_sequence: a text ends with that token.
    """
    encoded = tokenizer(
        ["".join(segment.text for segment in segments) for segments in texts],
        return_offsets_mapping=True,
    )
    found = []
    for segments, ids, offsets in zip(
        texts, encoded.input_ids, encoded.offset_mapping, strict=True
    ):
        lengths = [len(segment.text) for segment in segments]
        wanted = np.repeat([segment.trained for segment in segments], lengths)
        before = np.concatenate(([0], np.cumsum(wanted, dtype=np.int64)))
        starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        inside = before[stops] - before[starts]
        if ((inside > 0) & (inside < stops - starts)).any():
            ids, trained = _one_by_one(tokenizer, segments)
        else:
            trained = inside > 0
        if end_of_sequence and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
            trained = np.append(trained, True)
        trained[:1] = False
        found.append(TokenisedText(ids=np.asarray(ids, dtype=np.int32), trained=trained))
    return found


def _one_by_one(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], np.ndarray]:
    """Ids of a text whose segments are tokenised each for itself, and which of them are trained."""
    pieces = [
        tokenizer(segment.text, add_special_tokens=number == 0).input_ids
        for number, segment in enumerate(segments)
    ]
    trained = np.repeat([segment.trained for segment in segments], [len(ids) for ids in pieces])
    return [token for ids in pieces for token in ids], trained


def nodes_of(pairs: Iterable[PreferencePair]) -> Iterator[list[PreferencePair]]:
    """Pairs by node, order kept: those of a node follow each other, as in every dataset."""
    for _, members in groupby(pairs, key=_node_of):
        yield list(members)


def _node_of(pair: PreferencePair) -> tuple[Any, ...]:
    return pair.problem_id, pair.round, pair.tree_index, pair.kind, pair.node, pair.prefix


def tokenise_pairs(tokenizer: Any, pairs: Iterable[PreferencePair]) -> list[PairGroup]:
    """Group pairs by node and tokenise each distinct text of a node once, all nodes together."""
    nodes = list(nodes_of(pairs))
    values = [_values(members) for members in nodes]
    wanted = []
    for members, own in zip(nodes, values, strict=True):
        prefix = Segment(text=members[0].prefix, trained=False)
        chosen = {pair.chosen for pair in members}
        wanted += [[prefix, Segment(text=text, trained=text in chosen)] for text in own]
    texts = iter(tokenise_texts(tokenizer, wanted, end_of_sequence=False))
    return [
        _group(members, own, tuple(islice(texts, len(own))))
        for members, own in zip(nodes, values, strict=True)
    ]


def _values(members: Sequence[PreferencePair]) -> dict[str, float]:
    """The distinct texts after the prefix of a node, and the target of each."""
    values: dict[str, float] = {}
    for pair in members:
        values.setdefault(pair.chosen, 1.0)
        values.setdefault(pair.rejected, -1.0)
    return values


def _group(
    members: Sequence[PreferencePair],
    values: Mapping[str, float],
    texts: tuple[TokenisedText, ...],
) -> PairGroup:
    numbers = {text: number for number, text in enumerate(values)}
    return PairGroup(
        texts=texts,
        chosen=tuple(numbers[pair.chosen] for pair in members),
        rejected=tuple(numbers[pair.rejected] for pair in members),
        weights=tuple(pair.weight for pair in members),
        targets=tuple(values.values()),
        kind=members[0].kind,
        num_shared=_num_shared([text.ids for text in texts]),
    )


def tokenise_nodes(tokenizer: Any, nodes: Iterable[ValuedNode]) -> list[PairGroup]:
    """Each node's steps as a group without pairs, their Q-values as targets; order kept."""
    nodes = list(nodes)
    wanted = [
        [Segment(text=node.prefix, trained=False), Segment(text=step.text, trained=step.q > 0)]
        for node in nodes
        for step in node.steps
    ]
    texts = iter(tokenise_texts(tokenizer, wanted, end_of_sequence=False))
    groups = []
    for node in nodes:
        own = tuple(islice(texts, len(node.steps)))
        groups.append(
            PairGroup(
                texts=own,
                chosen=(),
                rejected=(),
                weights=(),
                targets=tuple(step.q for step in node.steps),
                kind=PairKind.STEP,
                num_shared=_num_shared([text.ids for text in own]),
            )
        )
    return groups


def _num_shared(rows: Sequence[np.ndarray]) -> int:
    """Leading ids that all rows share, at least one of each left over."""
    limit = max(min(len(row) for row in rows) - 1, 0)
    first = rows[0][:limit]
    for row in rows[1:]:
        differ = np.flatnonzero(first != row[: len(first)])
        first = first[: differ[0]] if len(differ) else first
    return len(first)


def pack_policy(texts: Sequence[TokenisedText], *, filler: bool = False) -> PolicyBatch:
    """Put texts into one row and list the positions that have a loss; a filler has none."""
    lengths = [text.length for text in texts]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    at = [np.flatnonzero(text.trained) for text in ([] if filler else texts)]
    return PolicyBatch(
        input_ids=_row([text.ids for text in texts]),
        position_ids=_row([np.arange(length) for length in lengths]),
        layout=documents(lengths),
        positions=_joined([start + own - 1 for start, own in zip(starts, at, strict=False)]),
        targets=_joined([text.ids[own] for text, own in zip(texts, at, strict=False)]),
    )


def pack_preference(groups: Sequence[PairGroup], *, filler: bool = False) -> PreferenceBatch:
    """Put the texts of some nodes into one row as trees and number their pairs in it."""
    ids: list[np.ndarray] = []
    places: list[np.ndarray] = []
    last: list[int] = []
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    chosen: list[int] = []
    rejected: list[int] = []
    start = 0
    for group in groups:
        base = len(last)
        chosen += [base + i for i in group.chosen]
        rejected += [base + i for i in group.rejected]
        shared = group.num_shared
        ids.append(group.texts[0].ids[:shared])
        places.append(np.arange(shared))
        branch = start + shared
        for text in group.texts:
            ids.append(text.ids[shared:])
            places.append(np.arange(shared, text.length))
            if not filler:
                at = np.flatnonzero(text.trained)
                before = at - 1
                positions.append(before + np.where(before < shared, start, branch - shared))
                targets.append(text.ids[at])
            branch += text.length - shared
            last.append(branch - 1)
        start = branch
    weights = [0.0 if filler else weight for group in groups for weight in group.weights]
    values = [target for group in groups for target in group.targets]
    return PreferenceBatch(
        input_ids=_row(ids),
        position_ids=_row(places),
        layout=trees([(group.num_shared, group.branches) for group in groups]),
        last=torch.tensor(last),
        chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32),
        value_targets=torch.tensor(values, dtype=torch.float32),
        text_weights=torch.full((len(last),), 0.0 if filler else 1.0),
        positions=_joined(positions),
        targets=_joined(targets),
    )


def _row(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    return _joined(pieces)[None]


def _joined(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate([np.empty(0, dtype=np.int64), *pieces])
    return torch.from_numpy(joined.astype(np.int64))
