"""Trees as tables: exact round trips, and refusals of what does not fit."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.problem import Level, Problem
from rollout.prompt import Step, StepKind
from rollout.table import (
    SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    table_to_bytes,
    table_to_trees,
    trees_to_table,
)
from rollout.tree import Discard, Node, Outcome, Terminal, Tree
from tests.builders import answered, code, discarded, make_problem, make_tree

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
number = st.floats(allow_nan=False, width=64)
count = st.integers(0, 2**31 - 1)


@st.composite
def random_trees(draw: st.DrawFn) -> Tree:
    """Trees with every field drawn, whatever a search would make of it."""
    word = text.filter(str.strip)
    tree = Tree(
        problem=Problem(
            id=draw(word),
            source=draw(text),
            level=draw(st.sampled_from(Level)),
            text=draw(word),
            answer=draw(text),
            answers_alt=tuple(draw(st.lists(text, max_size=2))),
            rewording_of=draw(text),
        ),
        round=draw(st.integers(0, 9)),
        index=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 2**62)),
        policy_version=draw(text),
        preference_version=draw(text),
        grader_version=draw(text),
        num_rollouts=draw(count),
        generated_tokens=draw(st.integers(0, 2**40)),
        prompt_tokens=draw(count),
        cached_tokens=draw(count),
        scored_tokens=draw(count),
        num_executions=draw(count),
        num_requests=draw(count),
        generate_s=draw(number),
        execute_s=draw(number),
        grade_s=draw(number),
        evaluate_s=draw(number),
        seconds=draw(number),
        search_config=draw(text),
        note=draw(text),
    )
    for id_ in range(1, draw(st.integers(1, 6))):
        parent = draw(st.integers(0, id_ - 1))
        tree.nodes[parent].children += (id_,)
        tree.nodes.append(
            Node(
                id=id_,
                parent=parent,
                depth=tree.nodes[parent].depth + 1,
                step=Step(
                    kind=draw(st.sampled_from(StepKind)),
                    text=draw(text),
                    output=draw(st.none() | text),
                    answer=draw(st.none() | text),
                ),
                multiplicity=draw(count),
                num_tokens=draw(count),
                logprob=draw(st.none() | number),
                rollout=draw(st.integers(-1, 99)),
                discard=draw(st.none() | st.sampled_from(Discard)),
                terminal=draw(st.none() | st.sampled_from(Terminal)),
                execution_status=draw(text),
                execution_error=draw(text),
                stdout=draw(text),
                value=draw(st.none() | number),
                reward=draw(st.none() | number),
                correct=draw(st.none() | st.booleans()),
                verdict=draw(text),
                visit_count=draw(count),
                value_sum=draw(number),
                expanded=draw(st.booleans()),
                exhausted=draw(st.booleans()),
            )
        )
    return tree


@settings(max_examples=60, deadline=None)
@given(st.lists(random_trees(), max_size=3))
def test_any_trees_survive_the_round_trip(trees: list[Tree]) -> None:
    assert table_to_trees(trees_to_table(trees)) == trees


def test_every_field_of_node_tree_and_problem_is_stored() -> None:
    stored = set(SCHEMA.names)
    renamed = {
        "id": {"problem_id", "node"},
        "index": {"tree"},
        "text": {"problem_text", "step_text"},
        "answer": {"problem_answer", "step_answer"},
        "answers_alt": {"problem_answers_alt"},
        "rewording_of": {"problem_rewording_of"},
        "kind": {"step_kind"},
        "code": {"step_code"},
        "output": {"step_output"},
        "step": {"step_kind"},
        "problem": {"problem_id"},
        "nodes": {"node"},
        "children": {"parent"},
    }
    for record in (Problem, Step, Node, Tree):
        for field in dataclasses.fields(record):
            names = renamed.get(field.name, {field.name})
            assert names <= stored, f"{record.__name__}.{field.name} is not in the table"


def test_root_row_is_the_row_per_tree() -> None:
    problem = make_problem("p9", answer="42")
    tree = make_tree(code("x = 1", answered("42", correct=True)), discarded("y"), problem=problem)
    tree.generated_tokens = 77
    rows = trees_to_table([tree]).to_pylist()
    assert [row["node"] for row in rows] == [0, 1, 2, 3, 4]
    assert {row["problem_id"] for row in rows} == {"p9"}
    assert [row["num_nodes"] for row in rows] == [5, None, None, None, None]
    assert rows[0]["generated_tokens"] == 77
    assert rows[0]["outcome"] == "solved"
    assert rows[0]["problem_answer"] == "42"
    assert rows[0]["step_kind"] is None


def test_a_nan_logprob_is_kept_apart_from_none() -> None:
    tree = make_tree(code("x = 1"), code("x = 2"))
    tree.nodes[1].logprob = math.nan
    back = table_to_trees(trees_to_table([tree]))[0]
    assert back.nodes[1].logprob is not None and math.isnan(back.nodes[1].logprob)
    assert back.nodes[2].logprob is None


def test_a_lone_surrogate_is_escaped_and_loses_no_other_tree() -> None:
    bad, good = make_tree(code("x = 1")), make_tree(code("y = 2"))
    bad.nodes[1].stdout = "a\udc80b"
    back = table_to_trees(trees_to_table([bad, good]))
    assert back[0].nodes[1].stdout == "a\\udc80b"
    assert back[1] == good


def test_code_and_outcome_are_stored_for_readers_without_this_code() -> None:
    solved = make_tree(code("x = 1", answered("7", correct=True)))
    unsolved = make_tree(code("x = 1", answered("8", correct=False)))
    open_question = make_tree(answered("8", correct=None), problem=make_problem("p2", answer=""))
    rows = trees_to_table([solved, unsolved, open_question, make_tree(code("y"))]).to_pylist()
    assert [row["step_code"] for row in rows[:4]] == [None, "x = 1", "print(7)", ""]
    outcomes = [row["outcome"] for row in rows if row["node"] == 0]
    assert outcomes == ["solved", "unsolved", "unlabelled", "no_answer"]
    assert {row["outcome"] for row in rows if row["node"]} == {None}


def test_a_file_gives_back_the_table_it_was_written_from() -> None:
    tree = make_tree(code("x = 1", answered("7", correct=True)), discarded("y = é\U0001f600"))
    tree.nodes[1].logprob, tree.nodes[1].value = -0.1, 1 / 3
    table = trees_to_table([tree, tree])
    back = pq.read_table(io.BytesIO(table_to_bytes(table)))
    assert back.equals(table)
    assert back.schema.metadata[VERSION_KEY] == b"3"
    assert table_to_trees(back) == [tree, tree]


def test_a_table_in_several_chunks_is_read_as_one() -> None:
    trees = [make_tree(code("x"), problem=make_problem(f"p{n}")) for n in range(4)]
    table = pa.concat_tables([trees_to_table(trees[:1]), trees_to_table(trees[1:])])
    table = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    assert table_to_trees(table) == trees


def test_duckdb_computes_q_without_code_of_ours(tmp_path: Path) -> None:
    import duckdb

    tree = make_tree(
        code("x = 1", answered("7", correct=True), answered("8", correct=False)), code("y = 2")
    )
    path = tmp_path / "shard.parquet"
    path.write_bytes(table_to_bytes(trees_to_table([tree])))
    rows = duckdb.sql(
        f"select node, value_sum / nullif(visit_count, 0) from read_parquet('{path}') order by node"
    ).fetchall()
    assert rows[:2] == [(0, 0.0), (1, 0.0)]
    assert [q for _, q in rows] == [n.q_value if n.visit_count else None for n in tree.nodes]
    version = duckdb.sql(
        f"select decode(value) from parquet_kv_metadata('{path}') "
        "where decode(key) = 'rstar.schema_version'"
    ).fetchall()
    assert version == [("3",)]


def test_the_document_describes_every_column_with_its_type() -> None:
    page = (Path(__file__).parents[3] / "docs" / "trajectories.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", page, re.MULTILINE))
    types = {f.name: "list" if pa.types.is_list(f.type) else str(f.type) for f in SCHEMA}
    assert described == types
    assert f"schema version {SCHEMA_VERSION}" in page


def test_the_document_names_every_word_of_the_enums() -> None:
    page = (Path(__file__).parents[3] / "docs" / "trajectories.md").read_text(encoding="utf-8")
    words = {str(word) for kind in (Level, StepKind, Discard, Terminal, Outcome) for word in kind}
    assert {word for word in words if f"`{word}`" not in page} == set()


def test_no_trees_make_a_table_without_rows() -> None:
    table = trees_to_table([])
    assert table.num_rows == 0 and table.schema.equals(SCHEMA)
    assert table_to_trees(table) == []


def test_a_tree_whose_children_disagree_is_refused() -> None:
    tree = make_tree(code("x = 1"), code("x = 2"))
    tree.root.children = tree.root.children[1:]
    with pytest.raises(ValueError, match="problem p1: node 0 lists children"):
        trees_to_table([tree])


def test_a_tree_with_a_missing_row_is_refused() -> None:
    table = trees_to_table([make_tree(code("x = 1"), code("x = 2")), make_tree(code("y"))])
    with pytest.raises(ValueError, match="has 2 rows, 3 were written"):
        table_to_trees(pa.concat_tables([table.slice(0, 2), table.slice(3)]))


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("parent", [-1, 1, 0], "node 1 of problem p1 is out of place"),
        ("node", [0, 2, 1], "node 2 of problem p1 is out of place"),
        ("node", [1, 2, 3], "node 1 of problem p1 is out of place"),
        ("problem_id", ["p1", "p1", "p2"], "node 2 of problem p2 is out of place"),
        ("discard", [None, "bored", None], "'bored' is not a valid Discard"),
    ],
)
def test_rows_that_make_no_tree_are_refused(column: str, cells: list, message: str) -> None:
    table = trees_to_table([make_tree(code("x = 1"), code("x = 2"))])
    at = table.schema.names.index(column)
    field = table.schema.field(at)
    broken = table.set_column(at, field, pa.array(cells, field.type))
    with pytest.raises(ValueError, match=message):
        table_to_trees(broken)


def test_a_table_without_a_column_is_refused_by_its_name() -> None:
    table = trees_to_table([make_tree(code("x = 1"))]).drop_columns(["verdict", "seconds"])
    with pytest.raises(ValueError, match="lacks the columns verdict, seconds"):
        table_to_trees(table)


def test_trees_of_the_version_before_are_read() -> None:
    trees = [make_tree(code("x = 1"))]
    older = trees_to_table(trees).drop_columns(["problem_rewording_of"])
    assert table_to_trees(older.replace_schema_metadata({VERSION_KEY: b"2"})) == trees


@pytest.mark.parametrize("version", ["1", "99"])
def test_another_schema_version_is_refused_by_name(version: str) -> None:
    table = trees_to_table([make_tree(code("x = 1"))])
    other = table.replace_schema_metadata({VERSION_KEY: version.encode()})
    with pytest.raises(ValueError, match=f"schema version {version}, this program reads 3"):
        table_to_trees(other)
    with pytest.raises(ValueError, match="schema version none"):
        table_to_trees(table.replace_schema_metadata(None))


def test_bytes_are_the_same_for_the_same_trees() -> None:
    trees = [make_tree(code("x = 1", answered("7", correct=True)))]
    assert table_to_bytes(trees_to_table(trees)) == table_to_bytes(trees_to_table(trees))
