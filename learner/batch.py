"""Text to tensors: tokenise, mask, pack.

A text is tokenised once, whole, and the loss mask is laid over it by the step markers at its
boundaries, or else by character offsets. Step boundaries are special tokens, so the ids of
`prefix + continuation` are those of the prefix followed by those of the continuation: what an
engine sees at search time. Where a loss boundary falls inside a token all the same, the segments of
that text are tokenised one by one.

    texts or nodes of a share --pack_*--> one row of T tokens, without padding, and its `Layout`

The texts of a node stand in the row as a tree: the tokens all of them begin with once, then what is
each one's own. That prefix is found among the ids, so it is right for any tokenizer.

Shapes: T tokens of a row, B texts, P positions that a loss reads, R pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from operator import attrgetter
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
    outcome_weights: torch.Tensor
    """[B] float32: of whole trajectories, 1 a node; 0 for a step or a filler."""


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
    wholes = ["".join(segment.text for segment in segments) for segments in texts]
    found = []
    marks = _marks(tokenizer)
    if marks is None:
        encoded = tokenizer(wholes, return_offsets_mapping=True)
        pieces = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        tokenised = (
            _masked_by_offsets(tokenizer, segments, *piece)
            for segments, piece in zip(texts, pieces, strict=True)
        )
    else:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        tokenised = (
            _masked_by_marks(tokenizer, segments, np.asarray(encoding.ids, dtype=np.int32), marks)
            for segments, encoding in zip(texts, backend.encode_batch_fast(wholes), strict=True)
        )
    for ids, trained in tokenised:
        if end_of_sequence and not (len(ids) and ids[-1] == tokenizer.eos_token_id):
            ids = np.append(ids, np.int32(tokenizer.eos_token_id))
            trained = np.append(trained, True)
        trained[:1] = False
        found.append(TokenisedText(ids=ids, trained=trained))
    return found


_MARK = re.compile("|".join(map(re.escape, MARKERS)))


def _marks(tokenizer: Any) -> np.ndarray | None:
    """Ids of the step markers, if each stands for itself wherever it is written; None: it may not.

    They are then cut out of a text before anything else is done to it, so that no token reaches
    across one, and a text needs no character offsets, which take half as long again.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.num_special_tokens_to_add():
        return None
    added = {token.content: (n, token) for n, token in backend.get_added_tokens_decoder().items()}
    ids = []
    for marker in MARKERS:
        number, token = added.get(marker, (0, None))
        if token is None or token.lstrip or token.rstrip or token.single_word or token.normalized:
            return None
        ids.append(number)
    return np.array(ids, dtype=np.int32)


def _masked_by_marks(
    tokenizer: Any, segments: Sequence[Segment], ids: np.ndarray, marks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text and which are trained, by the markers at the boundaries of its segments."""
    at = np.flatnonzero(np.isin(ids, marks))
    trained = np.zeros(len(ids), dtype=bool)
    runs = [
        ("".join(segment.text for segment in run), wanted)
        for wanted, run in groupby(segments, key=attrgetter("trained"))
    ]
    start = count = 0
    for number, (text, wanted) in enumerate(runs):
        found = _MARK.findall(text)
        count += len(found)
        if number == len(runs) - 1:
            stop = len(ids)
        elif found and text.endswith(found[-1]):
            stop = int(at[count - 1]) + 1 if count <= len(at) else -1
        elif _MARK.match(runs[number + 1][0]):
            stop = int(at[count]) if count < len(at) else -1
        else:
            stop = -1
        if stop < start:
            break
        trained[start:stop] = wanted
        start = stop
    else:
        if count == len(at):
            return ids, trained
    # A boundary without a marker, or markers that the tokenizer sees otherwise.
    encoded = tokenizer(["".join(text for text, _ in runs)], return_offsets_mapping=True)
    return _masked_by_offsets(tokenizer, segments, encoded.input_ids[0], encoded.offset_mapping[0])


def _masked_by_offsets(
    tokenizer: Any,
    segments: Sequence[Segment],
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text and which are trained, by what characters each stands for."""
    lengths = [len(segment.text) for segment in segments]
    wanted = np.repeat([segment.trained for segment in segments], lengths)
    before = np.concatenate(([0], np.cumsum(wanted, dtype=np.int64)))
    starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = before[stops] - before[starts]
    trained = inside > 0
    if (trained & (inside < stops - starts)).any():
        ids, trained = _one_by_one(tokenizer, segments)
    return np.asarray(ids, dtype=np.int32), trained


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


NODE_KEYS = ("problem_id", "round", "tree_index", "kind", "node", "prefix")
"""In which pairs of a node are alike."""

_node_of = attrgetter(*NODE_KEYS)


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
    whole = [not filler and group.kind is PairKind.ANSWER for group in groups]
    outcomes = [
        float(counts) / len(group.texts)
        for group, counts in zip(groups, whole, strict=True)
        for _ in group.texts
    ]
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
        outcome_weights=torch.tensor(outcomes, dtype=torch.float32),
        positions=_joined(positions),
        targets=_joined(targets),
    )


def _row(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    return _joined(pieces)[None]


def _joined(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate([np.empty(0, dtype=np.int64), *pieces])
    return torch.from_numpy(joined.astype(np.int64))
