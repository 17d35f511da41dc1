"""Trees as an Arrow table, a row per node, and back: the record every later stage reads.

The schema version stands in the table's metadata. Identity and versions stand on every row; what
describes the whole tree (problem text, gold answers, totals) only on its root row (`node == 0`),
which thus serves as the row per tree, and is null elsewhere. A node's children are not stored: they
are the nodes that name it as parent, in id order. A lone surrogate, which Arrow cannot hold, is
stored as its backslash escape: the one value that does not survive a round trip.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.problem import Level, Problem
from rollout.prompt import Step, StepKind
from rollout.tree import Discard, Node, Terminal, Tree

SCHEMA_VERSION = 1
"""Version of the table's columns; readers refuse another one."""

_VERSION_KEY = b"rstar.schema_version"

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
    pa.field("num_nodes", pa.int32()),
    pa.field("num_rollouts", pa.int32()),
    pa.field("generated_tokens", pa.int64()),
    pa.field("prompt_tokens", pa.int64()),
    pa.field("cached_tokens", pa.int64()),
    pa.field("scored_tokens", pa.int64()),
    pa.field("num_executions", pa.int64()),
    pa.field("seconds", pa.float64()),
    pa.field("note", pa.string()),
    pa.field("solved", pa.bool_()),
]
"""Filled on the root row only."""

SCHEMA = pa.schema(
    [*_KEY_FIELDS, *_NODE_FIELDS, *_VERSION_FIELDS, *_TREE_FIELDS],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


def trees_to_table(trees: Iterable[Tree]) -> pa.Table:
    """One row per node, trees in their order, nodes in id order.

    Raises:
        ValueError: ids, parents or children of a tree disagree.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    appends = [columns[name].append for name in SCHEMA.names]
    for tree in trees:
        _check_shape(tree)
        problem = tree.problem
        key = (problem.id, problem.source, str(problem.level), tree.round, tree.index)
        versions = (tree.seed, tree.policy_version, tree.preference_version, tree.grader_version)
        whole: tuple[Any, ...] = (
            problem.text,
            problem.answer,
            list(problem.answers_alt),
            len(tree.nodes),
            tree.num_rollouts,
            tree.generated_tokens,
            tree.prompt_tokens,
            tree.cached_tokens,
            tree.scored_tokens,
            tree.num_executions,
            tree.seconds,
            tree.note,
            tree.solved,
        )
        empty = (None,) * len(whole)
        for node in tree.nodes:
            row = (*key, *_node_cells(node), *versions, *(whole if node.id == 0 else empty))
            for append, cell in zip(appends, row, strict=True):
                append(cell)
    arrays = [_array(columns[f.name], f) for f in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def table_to_trees(table: pa.Table) -> list[Tree]:
    """The trees of a table that `trees_to_table` made, equal to what it was given.

    Raises:
        ValueError: another schema version, a missing column or an incomplete tree.
    """
    _check_schema(table.schema)
    columns = [table.column(name).to_pylist() for name in SCHEMA.names]
    num_keys, num_node = len(_KEY_FIELDS), len(_NODE_FIELDS)
    at_versions = num_keys + num_node
    at_whole = at_versions + len(_VERSION_FIELDS)
    trees: list[Tree] = []
    expected = 0
    for row in zip(*columns, strict=True):
        problem_id, source, level, round_, index = row[:num_keys]
        node = _node(row[num_keys:at_versions])
        if node.id == 0:
            _check_complete(trees, expected)
            text, answer, alternatives, expected, *totals, _solved = row[at_whole:]
            rollouts, generated, prompt, cached, scored, executions, seconds, note = totals
            seed, policy_version, preference_version, grader_version = row[at_versions:at_whole]
            tree = Tree(
                problem=Problem(
                    id=problem_id,
                    source=source,
                    level=Level(level),
                    text=text,
                    answer=answer,
                    answers_alt=tuple(alternatives),
                ),
                round=round_,
                index=index,
                seed=seed,
                policy_version=policy_version,
                preference_version=preference_version,
                grader_version=grader_version,
                nodes=[node],
                num_rollouts=rollouts,
                generated_tokens=generated,
                prompt_tokens=prompt,
                cached_tokens=cached,
                scored_tokens=scored,
                num_executions=executions,
                seconds=seconds,
                note=note,
            )
            trees.append(tree)
            continue
        if not trees or trees[-1].problem.id != problem_id or len(trees[-1].nodes) != node.id:
            raise ValueError(f"node {node.id} of problem {problem_id} is out of place")
        nodes = trees[-1].nodes
        nodes[node.parent].children.append(node.id)
        nodes.append(node)
    _check_complete(trees, expected)
    return trees


def _check_shape(tree: Tree) -> None:
    children: list[list[int]] = [[] for _ in tree.nodes]
    for position, node in enumerate(tree.nodes):
        parent_fits = 0 <= node.parent < position if position else node.parent == -1
        if node.id != position or not parent_fits:
            raise ValueError(
                f"problem {tree.problem.id}: node at position {position} has id {node.id} and "
                f"parent {node.parent}"
            )
        if node.parent >= 0:
            children[node.parent].append(node.id)
    for node, found in zip(tree.nodes, children, strict=True):
        if node.children != found:
            raise ValueError(
                f"problem {tree.problem.id}: node {node.id} lists children {node.children}, but "
                f"{found} name it as parent"
            )


def _check_complete(trees: list[Tree], expected: int) -> None:
    if trees and len(trees[-1].nodes) != expected:
        raise ValueError(
            f"the tree of problem {trees[-1].problem.id} has {len(trees[-1].nodes)} rows, "
            f"{expected} were written"
        )


def _check_schema(schema: pa.Schema) -> None:
    found = (schema.metadata or {}).get(_VERSION_KEY)
    if found != str(SCHEMA_VERSION).encode():
        raise ValueError(
            f"trajectory table has schema version {found.decode() if found else 'none'}, "
            f"this program reads {SCHEMA_VERSION}"
        )
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        raise ValueError(f"trajectory table lacks the columns {', '.join(missing)}")


def _node_cells(node: Node) -> tuple[Any, ...]:
    step = node.step
    if step is None:
        step_cells: tuple[Any, ...] = (None, None, None, None, None)
    else:
        step_cells = (str(step.kind), step.text, step.code, step.output, step.answer)
    return (
        node.id,
        node.parent,
        node.depth,
        *step_cells,
        node.stdout,
        node.execution_status,
        node.execution_error,
        None if node.discard is None else str(node.discard),
        None if node.terminal is None else str(node.terminal),
        node.multiplicity,
        node.num_tokens,
        node.logprob,
        node.rollout,
        node.value,
        node.reward,
        node.correct,
        node.verdict,
        node.visit_count,
        node.value_sum,
        node.expanded,
        node.exhausted,
    )


def _node(cells: Sequence[Any]) -> Node:
    (
        id_,
        parent,
        depth,
        kind,
        text,
        code,
        output,
        answer,
        stdout,
        execution_status,
        execution_error,
        discard,
        terminal,
        multiplicity,
        num_tokens,
        logprob,
        rollout,
        value,
        reward,
        correct,
        verdict,
        visit_count,
        value_sum,
        expanded,
        exhausted,
    ) = cells
    step = None
    if kind is not None:
        step = Step(kind=StepKind(kind), text=text, code=code, output=output, answer=answer)
    return Node(
        id=id_,
        parent=parent,
        depth=depth,
        step=step,
        multiplicity=multiplicity,
        num_tokens=num_tokens,
        logprob=logprob,
        rollout=rollout,
        discard=None if discard is None else Discard(discard),
        terminal=None if terminal is None else Terminal(terminal),
        execution_status=execution_status,
        execution_error=execution_error,
        stdout=stdout,
        value=value,
        reward=reward,
        correct=correct,
        verdict=verdict,
        visit_count=visit_count,
        value_sum=value_sum,
        expanded=expanded,
        exhausted=exhausted,
    )


def _array(cells: list[Any], field_: pa.Field) -> pa.Array:
    try:
        return pa.array(cells, type=field_.type)
    except UnicodeEncodeError:
        return pa.array([_escape_surrogates(cell) for cell in cells], type=field_.type)


def _escape_surrogates(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_escape_surrogates(item) for item in cell]
    if isinstance(cell, str):
        return cell.encode("utf-8", "backslashreplace").decode("utf-8")
    return cell


def table_to_bytes(table: pa.Table) -> bytes:
    """A Parquet file (zstd) as bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
