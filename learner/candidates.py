"""What a tree may give to training, before the other trees of its problem are known.

    worker:  trees of a shard --candidates--> table --table_to_bytes--> beside the shard's data file
    select:  tables of all shards, sorted by problem --> `learner.select`

A row per tree: counts, the programs of its correct trajectories and the best of these as text, its
pairs, and, for a PPM that learns Q-values, its valued steps. All that a tree alone decides is in a
`Recipe`; a file holds what one recipe gave and its name says which (`Recipe.name`). What compares
trees (`sft_rounds`, `pair_rounds`, thresholds of a problem, the split, as many trajectories as
`Recipe.top`) is decided later and needs no tree.

A file holds what its trees give when they are read back from the store: a lone surrogate is its
backslash escape (`rollout.table`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from learner.dataset import NODE_FIELDS, PAIR_FIELDS, SEGMENTS, unusable
from learner.pairs import PairConfig, PreferencePair, ValuedNode, tree_pairs, valued_nodes
from rollout.difficulty import right_share
from rollout.programs import program_of
from rollout.prompt import PromptTemplate, Segment, render_segments
from rollout.table import table_to_trees, trees_to_table
from rollout.trajectory import Trajectory, trajectories
from rollout.tree import Tree

VERSION = 1
"""Of the files: what is written under the same settings may have changed."""

TOP = 4
"""Trajectories of a tree whose texts are kept at least: a problem may want fewer."""

MANY_VISITS = 5
"""Nodes with so many visits are counted together."""

TRAJECTORY = pa.struct(
    [
        ("node", pa.int32()),
        ("mean_q", pa.float64()),
        ("min_q", pa.float64()),
        ("segments", SEGMENTS),
    ]
)
PAIR = pa.struct(PAIR_FIELDS)
NODE = pa.struct(NODE_FIELDS)
SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("original", pa.string()),
        ("source", pa.string()),
        ("level", pa.string()),
        ("labelled", pa.bool_()),
        ("round", pa.int32()),
        ("tree_index", pa.int32()),
        ("reached", pa.int32()),
        ("answered", pa.int32()),
        ("correct", pa.int32()),
        ("right_share", pa.float64()),
        ("empty", pa.int32()),
        ("unrenderable", pa.int32()),
        ("empty_pairs", pa.int32()),
        ("unrenderable_pairs", pa.int32()),
        ("visits", pa.list_(pa.int32(), MANY_VISITS)),
        ("programs", pa.list_(pa.binary(16))),
        ("num_pairs", pa.int32()),
        ("pairs_agree", pa.bool_()),
        ("trajectories", pa.list_(TRAJECTORY)),
        ("pairs", pa.list_(PAIR)),
        ("nodes", pa.list_(NODE)),
    ]
)
"""`reached` are all trajectories, `answered` those with a verdict. `empty` and `unrenderable` count
correct ones that no dataset can hold. `visits`: inner nodes that 1, 2, 3, 4, more rollouts went
through. `programs`: digests, best trajectory first; `trajectories` are those of the first ones.
`pairs` are in the order of a dataset; they agree if none stands there twice or turned round."""

TEXTS = ("trajectories", "pairs", "nodes")
"""Columns that are nearly all of a table's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides, tree by tree, what it may give."""

    template: PromptTemplate
    pairs: PairConfig
    valued_steps: bool = False
    """Also every step with its Q-value."""
    top: int = TOP
    """Trajectories of a tree, of different programs, whose texts are kept."""

    @property
    def name(self) -> str:
        """Of files made by it: alike exactly for recipes that give the same."""
        settings = [
            VERSION,
            self.template.text,
            self.pairs.model_dump(),
            self.valued_steps,
            self.top,
        ]
        text = json.dumps(settings, sort_keys=True)
        return f"candidates-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one tree may give, as records."""

    tree: Tree
    reached: int
    answered: int
    correct: int
    excluded: Counter[str]
    """Reason -> correct trajectories that no dataset can hold."""
    excluded_pairs: Counter[str]
    programs: tuple[tuple[bytes, Trajectory], ...]
    """Digest of a program and the best correct trajectory that holds it, best first."""
    pairs: tuple[PreferencePair, ...]
    """In the order of a dataset."""
    nodes: tuple[ValuedNode, ...]


def rank(trajectory: Trajectory) -> tuple[float, float, int, int, int]:
    """Best first: mean Q, then min Q, then the later round; the rest makes the order total."""
    return (
        -trajectory.mean_q,
        -trajectory.min_q,
        -trajectory.round,
        trajectory.tree_index,
        trajectory.node,
    )


def find(tree: Tree, recipe: Recipe) -> Found:
    """What a tree may give."""
    reached = trajectories(tree)
    correct = [t for t in reached if t.correct]
    excluded: Counter[str] = Counter()
    excluded_pairs: Counter[str] = Counter()
    programs: dict[bytes, Trajectory] = {}
    for trajectory in sorted(correct, key=rank):
        segments = render_segments(tree.problem.text, trajectory.steps, recipe.template)
        reason = unusable_solution(segments)
        if reason is not None:
            excluded[reason] += 1
            continue
        program = program_of(trajectory.steps).encode(errors="replace")
        programs.setdefault(hashlib.sha256(program).digest()[:16], trajectory)
    pairs = []
    for pair in tree_pairs(tree, template=recipe.template, config=recipe.pairs, ranked=reached):
        sides = pair.chosen, pair.rejected
        reason = unusable([pair.prefix, *sides], trained=sides)
        if reason is None:
            pairs.append(pair)
        else:
            excluded_pairs[reason] += 1
    pairs.sort(key=lambda pair: (pair.kind, pair.node, -pair.margin))
    nodes: list[ValuedNode] = []
    if recipe.valued_steps:
        for node in valued_nodes(tree, template=recipe.template, config=recipe.pairs):
            texts = [step.text for step in node.steps]
            if unusable([node.prefix, *texts], trained=texts) is None:
                nodes.append(node)
    return Found(
        tree=tree,
        reached=len(reached),
        answered=sum(t.correct is not None for t in reached),
        correct=len(correct),
        excluded=excluded,
        excluded_pairs=excluded_pairs,
        programs=tuple(programs.items()),
        pairs=tuple(pairs),
        nodes=tuple(nodes),
    )


def unusable_solution(segments: Sequence[Segment]) -> str | None:
    """As `unusable`, of a rendered solution."""
    written = "".join(segment.text for segment in segments if segment.trained)
    return unusable([segment.text for segment in segments], trained=[written])


def candidates(trees: Iterable[Tree], recipe: Recipe) -> pa.Table:
    """A row of what each tree may give, in their order."""
    rows = [row_of(find(tree, recipe), recipe) for tree in trees]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def candidates_file(trees: Iterable[Tree], recipe: Recipe) -> bytes:
    """What stands beside the data file of some trees: their candidates, as of stored ones."""
    return table_to_bytes(candidates(map(_as_stored, trees), recipe))


def row_of(found: Found, recipe: Recipe) -> dict[str, Any]:
    """A tree's row of the table."""
    tree, problem = found.tree, found.tree.problem
    visits = [0] * MANY_VISITS
    for node in tree.nodes[1:]:
        if node.expanded and node.num_passes > 0:
            visits[min(node.num_passes, MANY_VISITS) - 1] += 1
    return {
        "problem_id": problem.id,
        "original": problem.original,
        "source": problem.source,
        "level": problem.level.value,
        "labelled": bool(problem.golds),
        "round": tree.round,
        "tree_index": tree.index,
        "reached": found.reached,
        "answered": found.answered,
        "correct": found.correct,
        "right_share": right_share(tree),
        "empty": found.excluded["empty"],
        "unrenderable": found.excluded["unrenderable"],
        "empty_pairs": found.excluded_pairs["empty"],
        "unrenderable_pairs": found.excluded_pairs["unrenderable"],
        "visits": visits,
        "programs": [digest for digest, _ in found.programs],
        "num_pairs": len(found.pairs),
        "pairs_agree": all(kept_pairs([(p.prefix, p.chosen, p.rejected) for p in found.pairs])[0]),
        "trajectories": [
            {
                "node": t.node,
                "mean_q": t.mean_q,
                "min_q": t.min_q,
                "segments": [
                    {"text": s.text, "trained": s.trained}
                    for s in render_segments(problem.text, t.steps, recipe.template)
                ],
            }
            for _, t in found.programs[: recipe.top]
        ],
        "pairs": [{name: getattr(pair, name) for name in _PAIR_NAMES} for pair in found.pairs],
        "nodes": [
            {
                "node": node.node,
                "prefix": node.prefix,
                "steps": [{"text": step.text, "q": step.q} for step in node.steps],
            }
            for node in found.nodes
        ],
    }


_PAIR_NAMES = [field.name for field in PAIR]


def kept_pairs(texts: Sequence[tuple[str, str, str]]) -> tuple[list[bool], Counter[str]]:
    """Which pairs of a problem stay, and of the others how many why not.

    A pair goes if it stands before it already (duplicate_pair), or if a tree turned it round
    (contradicted_pair).

    Args:
        texts: (prefix, chosen, rejected), in the order of a dataset.
    """
    known = set(texts)
    seen: set[tuple[str, str, str]] = set()
    excluded: Counter[str] = Counter()
    kept = []
    for pair in texts:
        prefix, chosen, rejected = pair
        reason = None
        if (prefix, rejected, chosen) in known:
            reason = "contradicted_pair"
        elif pair in seen:
            reason = "duplicate_pair"
        if reason is not None:
            excluded[reason] += 1
        seen.add(pair)
        kept.append(reason is None)
    return kept, excluded


def _as_stored(tree: Tree) -> Tree:
    """The tree as it is read back from the store."""
    problem = tree.problem
    texts = [problem.id, problem.source, problem.text, problem.rewording_of]
    for node in tree.nodes:
        if node.step is not None and node.discard is None:
            texts += node.step.text, node.step.output or ""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return table_to_trees(trees_to_table([tree]))[0]
    return tree


def table_to_bytes(table: pa.Table) -> bytes:
    """A table as Arrow's stream (zstd) behind its SHA-256: thousands of small files are read again,
    which takes Parquet ten times as long."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    return hashlib.sha256(data).digest() + data


def table_from_bytes(data: bytes, columns: Sequence[str]) -> pa.Table:
    """The table that `table_to_bytes` wrote.

    Args:
        columns: read only these.
    Raises:
        ValueError: the bytes are not what was written.
    """
    digest, data = data[:32], data[32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError("truncated or changed since it was written (its SHA-256 differs)")
    numbers = sorted(SCHEMA.get_field_index(name) for name in columns)
    options = pa.ipc.IpcReadOptions(included_fields=numbers, use_threads=False)
    with pa.ipc.open_stream(pa.BufferReader(data), options=options) as reader:
        return reader.read_all()
