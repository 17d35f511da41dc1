"""Trees as an Arrow table, a row per node, and back: the record every later stage reads.

The schema version stands in the table's metadata; docs/trajectories.md describes every column.
Identity and versions stand on every row; what describes the whole tree (problem text, gold answers,
budgets, totals, timings, outcome) only on its root row (`node == 0`), which thus serves as the row
per tree, and is null elsewhere. Stored although they follow from the rest, for readers without this
code: `step_code`, `outcome`, `num_nodes`. Not stored: a node's children (the nodes that name it as
parent, in id order) and Q, which is `value_sum / visit_count` and would add 6 bytes to a node. A
lone surrogate, which Arrow cannot hold, is stored as its backslash escape: the one value that does
not survive a round trip.

How a file is encoded was measured on trees of MATH-like text, 16 to a file (`bench.storage`):

    zstd 3, dictionaries everywhere (the defaults)           99.4 bytes per node
    zstd 12                                                  83.0
    texts without dictionary: zstd sees siblings together    80.7
    doubles split by byte                                    75.8
    pages of 8 MiB: few matches are cut by a page's end      74.6
    minima and maxima of the key columns only                74.1
    no Arrow schema beside Parquet's own (4 kB a file)       73.8
    (zstd 9: 75.8 at twice the speed; zstd 19: 69.8 at a twelfth)
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.problem import Level, Problem
from rollout.prompt import Step, StepKind
from rollout.tree import Discard, Node, Terminal, Tree

SCHEMA_VERSION = 3
"""Version of the table's columns; 2 is read too, others are refused."""

VERSION_KEY = b"rstar.schema_version"
"""Where the version stands: the schema's metadata, which Parquet keeps as file metadata."""

ZSTD_LEVEL = 12
PAGE_BYTES = 8 << 20

_KEY_FIELDS = [
    pa.field("problem_id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("level", pa.string(), nullable=False),
    pa.field("round", pa.int32(), nullable=False),
    pa.field("tree", pa.int32(), nullable=False),
]

_NODE_FIELDS = [
    pa.field("node", pa.int32(), nullable=False),
    pa.field("parent", pa.int32(), nullable=False),
    pa.field("depth", pa.int32(), nullable=False),
    pa.field("step_kind", pa.string()),
    pa.field("step_text", pa.string()),
    pa.field("step_code", pa.string()),
    pa.field("step_output", pa.string()),
    pa.field("step_answer", pa.string()),
    pa.field("stdout", pa.string(), nullable=False),
    pa.field("execution_status", pa.string(), nullable=False),
    pa.field("execution_error", pa.string(), nullable=False),
    pa.field("discard", pa.string()),
    pa.field("terminal", pa.string()),
    pa.field("multiplicity", pa.int32(), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("logprob", pa.float64()),
    pa.field("rollout", pa.int32(), nullable=False),
    pa.field("value", pa.float64()),
    pa.field("reward", pa.float64()),
    pa.field("correct", pa.bool_()),
    pa.field("verdict", pa.string(), nullable=False),
    pa.field("visit_count", pa.int32(), nullable=False),
    pa.field("value_sum", pa.float64(), nullable=False),
    pa.field("expanded", pa.bool_(), nullable=False),
    pa.field("exhausted", pa.bool_(), nullable=False),
]

_VERSION_FIELDS = [
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("policy_version", pa.string(), nullable=False),
    pa.field("preference_version", pa.string(), nullable=False),
    pa.field("grader_version", pa.string(), nullable=False),
]

_TREE_FIELDS = [
    pa.field("problem_text", pa.string()),
    pa.field("problem_answer", pa.string()),
    pa.field("problem_answers_alt", pa.list_(pa.string())),
    pa.field("problem_rewording_of", pa.string()),
    pa.field("outcome", pa.string()),
    pa.field("note", pa.string()),
    pa.field("search_config", pa.string()),
    pa.field("num_nodes", pa.int32()),
    pa.field("num_rollouts", pa.int32()),
    pa.field("num_requests", pa.int64()),
    pa.field("num_executions", pa.int64()),
    pa.field("generated_tokens", pa.int64()),
    pa.field("prompt_tokens", pa.int64()),
    pa.field("cached_tokens", pa.int64()),
    pa.field("scored_tokens", pa.int64()),
    pa.field("generate_s", pa.float64()),
    pa.field("execute_s", pa.float64()),
    pa.field("grade_s", pa.float64()),
    pa.field("evaluate_s", pa.float64()),
    pa.field("seconds", pa.float64()),
]
"""Filled on the root row only."""

SCHEMA = pa.schema(
    [*_KEY_FIELDS, *_NODE_FIELDS, *_VERSION_FIELDS, *_TREE_FIELDS],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)

_TEXTS = ("step_text", "step_code", "step_output", "stdout", "execution_error", "problem_text")
_DOUBLES = ("logprob", "value", "value_sum")

_PER_TREE: dict[str, Callable[[Tree], Any]] = {
    "problem_id": lambda tree: tree.problem.id,
    "source": lambda tree: tree.problem.source,
    "level": lambda tree: tree.problem.level,
    "tree": lambda tree: tree.index,
    "problem_text": lambda tree: tree.problem.text,
    "problem_answer": lambda tree: tree.problem.answer,
    "problem_answers_alt": lambda tree: list(tree.problem.answers_alt),
    "problem_rewording_of": lambda tree: tree.problem.rewording_of,
    "num_nodes": lambda tree: len(tree.nodes),
}
"""Columns that are not a field of `Tree` of the same name."""


def trees_to_table(trees: Iterable[Tree]) -> pa.Table:
    """One row per node, trees in their order, nodes in id order.

    Raises:
        ValueError: ids, parents or children of a tree disagree.
    """
    trees = list(trees)
    for tree in trees:
        _check_shape(tree)
    nodes = [node for tree in trees for node in tree.nodes]
    steps = [node.step for node in nodes]
    lengths = np.array([len(tree.nodes) for tree in trees], dtype=np.int64)
    tree_of_row = np.repeat(np.arange(len(trees)), lengths)
    is_root = np.zeros(len(nodes), dtype=bool)
    is_root[np.cumsum(lengths) - lengths] = True
    every_row = pa.array(tree_of_row, pa.int64())
    root_rows = pa.array(tree_of_row, pa.int64(), mask=~is_root)

    columns: dict[str, pa.Array] = {}
    for fields, rows in (
        (_KEY_FIELDS, every_row),
        (_VERSION_FIELDS, every_row),
        (_TREE_FIELDS, root_rows),
    ):
        for field in fields:
            read = _PER_TREE.get(field.name)
            cells = [read(tree) if read else getattr(tree, field.name) for tree in trees]
            columns[field.name] = _array(cells, field).take(rows)
    for field in _NODE_FIELDS:
        if field.name.startswith("step_"):
            own = field.name.removeprefix("step_")
            cells = [None if step is None else getattr(step, own) for step in steps]
        else:
            own = "id" if field.name == "node" else field.name
            cells = [getattr(node, own) for node in nodes]
        columns[field.name] = _array(cells, field)
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def table_to_trees(table: pa.Table) -> list[Tree]:
    """The trees of a table that `trees_to_table` made, equal to what it was given.

    Raises:
        ValueError: another schema version, a missing column, an incomplete tree, or a word (step
            kind, discard, terminal, level) that this version does not know.
    """
    table = _current(table)
    bounds = _tree_bounds(table)
    nodes = _nodes(table)
    names = [field.name for field in (*_VERSION_FIELDS, *_TREE_FIELDS)]
    own_fields = [name for name in names if name not in _PER_TREE and name != "outcome"]
    roots = table.take(pa.array([start for start, _ in bounds], pa.int64())).to_pylist()
    trees = []
    for (start, stop), root in zip(bounds, roots, strict=True):
        tree = Tree(
            problem=problem_of(root),
            round=root["round"],
            index=root["tree"],
            nodes=nodes[start:stop],
            **{name: root[name] for name in own_fields},
        )
        for node, children in zip(tree.nodes, _children(tree), strict=True):
            node.children = tuple(children)
        trees.append(tree)
    return trees


def table_to_bytes(table: pa.Table) -> bytes:
    """A Parquet file (zstd) as bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=[
            f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
            for field in SCHEMA
            if field.name not in (*_TEXTS, *_DOUBLES)
        ],
        column_encoding=dict.fromkeys(_DOUBLES, "BYTE_STREAM_SPLIT"),
        data_page_size=PAGE_BYTES,
        write_statistics=[field.name for field in _KEY_FIELDS],
        store_schema=False,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({VERSION_KEY: str(SCHEMA_VERSION)})
    return sink.getvalue()


def _check_shape(tree: Tree) -> None:
    for position, node in enumerate(tree.nodes):
        parent_fits = 0 <= node.parent < position if position else node.parent == -1
        if node.id != position or not parent_fits:
            raise ValueError(
                f"problem {tree.problem.id}: node at position {position} has id {node.id} and "
                f"parent {node.parent}"
            )
    for node, found in zip(tree.nodes, _children(tree), strict=True):
        if node.children != tuple(found):
            raise ValueError(
                f"problem {tree.problem.id}: node {node.id} lists children {node.children}, but "
                f"{found} name it as parent"
            )


def _children(tree: Tree) -> list[list[int]]:
    """Per node, those that name it as parent."""
    children: list[list[int]] = [[] for _ in tree.nodes]
    for node in tree.nodes[1:]:
        children[node.parent].append(node.id)
    return children


def _current(table: pa.Table) -> pa.Table:
    """The table with the columns of this version.

    Raises:
        ValueError: it is of a version that is not read, or lacks columns.
    """
    found = (table.schema.metadata or {}).get(VERSION_KEY)
    if found == b"2" and "problem_rewording_of" not in table.schema.names:
        # All that 2 lacks: of which problem another is a rewording.
        table = table.append_column("problem_rewording_of", pa.repeat("", len(table)))
    elif found != str(SCHEMA_VERSION).encode():
        raise ValueError(
            f"trajectory table has schema version {found.decode() if found else 'none'}, "
            f"this program reads {SCHEMA_VERSION}"
        )
    missing = [name for name in SCHEMA.names if name not in table.schema.names]
    if missing:
        raise ValueError(f"trajectory table lacks the columns {', '.join(missing)}")
    return table


def _tree_bounds(table: pa.Table) -> list[tuple[int, int]]:
    """First row of each tree and the one after its last.

    Raises:
        ValueError: rows are missing or out of place; names the problem.
    """
    ids = table["node"].to_numpy()
    starts = np.flatnonzero(ids == 0)
    stops = np.append(starts, len(ids))[1:]
    if len(ids) and ids[0] != 0:
        raise ValueError(f"node {ids[0]} of problem {table['problem_id'][0]} is out of place")
    problems = table["problem_id"].dictionary_encode().unify_dictionaries()
    codes = np.concatenate([np.empty(0, int), *(c.indices.to_numpy() for c in problems.chunks)])
    expected = np.arange(len(ids)) - np.repeat(starts, stops - starts)
    owner = np.repeat(codes[starts].astype(int), stops - starts)
    parents = table["parent"].to_numpy()
    stray = np.where(ids == 0, parents != -1, (parents < 0) | (parents >= ids))
    wrong = np.flatnonzero((ids != expected) | (codes != owner) | stray)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"node {ids[row]} of problem {table['problem_id'][row]} is out of place")
    written = table["num_nodes"].take(pa.array(starts, pa.int64())).to_pylist()
    for start, stop, count in zip(starts, stops, written, strict=True):
        if stop - start != count:
            raise ValueError(
                f"the tree of problem {table['problem_id'][int(start)]} has {stop - start} rows, "
                f"{count} were written"
            )
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _nodes(table: pa.Table) -> list[Node]:
    """A node per row, children still empty."""
    cells = {f.name: table[f.name].to_pylist() for f in _NODE_FIELDS if f.name != "step_code"}
    for name, kind in (("step_kind", StepKind), ("discard", Discard), ("terminal", Terminal)):
        cells[name] = _members(kind, cells[name])
    steps = [
        None if kind is None else Step(kind=kind, text=text, output=output, answer=answer)
        for kind, text, output, answer in zip(
            *(cells.pop(name) for name in ("step_kind", "step_text", "step_output", "step_answer")),
            strict=True,
        )
    ]
    cells |= {"id": cells["node"], "step": steps, "children": repeat(())}
    return list(map(Node, *(cells[field.name] for field in dataclasses.fields(Node))))


def _members(kind: type[StrEnum], cells: list[str | None]) -> list[StrEnum | None]:
    """The enum member of each cell."""
    members = {cell: None if cell is None else kind(cell) for cell in set(cells)}
    return [members[cell] for cell in cells]


def problem_of(root: Mapping[str, Any]) -> Problem:
    """The problem of a root row."""
    return Problem(
        id=root["problem_id"],
        source=root["source"],
        level=Level(root["level"]),
        text=root["problem_text"],
        answer=root["problem_answer"],
        answers_alt=tuple(root["problem_answers_alt"]),
        rewording_of=root.get("problem_rewording_of", ""),
    )


def _array(cells: list[Any], field: pa.Field) -> pa.Array:
    try:
        return pa.array(cells, type=field.type)
    except UnicodeEncodeError:
        return pa.array([_escape_surrogates(cell) for cell in cells], type=field.type)


def _escape_surrogates(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_escape_surrogates(item) for item in cell]
    if isinstance(cell, str):
        return cell.encode("utf-8", "backslashreplace").decode("utf-8")
    return cell
