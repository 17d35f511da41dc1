from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.problem import Level
from rollout.problems.golds import SEVERAL_ANSWERS
from rollout.problems.reader import read_problems
from rollout.problems.rows import ProblemFileError

ROW = {"id": "a", "source": "s", "level": "gsm", "problem": "1+1?", "answer": "2"}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_parquet_jsonl_json_and_csv_give_the_same_problems(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "b", "level": "olympiad"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    write_jsonl(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = ["id,source,level,problem,answer", "a,s,gsm,1+1?,2", "b,s,olympiad,1+1?,2"]
    (tmp_path / "p.csv").write_text("\n".join(lines), encoding="utf-8")
    read = [read_problems(path)[0] for path in sorted(tmp_path.iterdir())]
    assert len(read) == 4
    assert all(problems == read[0] for problems in read)
    assert [p.level for p in read[0]] == [Level.GSM, Level.OLYMPIAD]


def test_row_without_answer_is_counted_reported_and_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [ROW, {**ROW, "id": "b", "answer": None}])
    problems, report = read_problems(path)
    assert [p.id for p in problems] == ["a"]
    assert report.skipped == {"without answer": 1}
    assert report.examples == [f"{path}, row 2: without answer (id 'b')"]


def test_accepted_alternatives_are_read_from_a_list_or_from_json_text(tmp_path: Path) -> None:
    rows = [{**ROW, "answers_alt": ["II"]}, {**ROW, "id": "b", "answers_alt": '["II"]'}]
    problems, _ = read_problems(write_jsonl(tmp_path / "p.jsonl", rows))
    assert [p.golds for p in problems] == [("2", "II"), ("2", "II")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], r"row 2: id 'a' already stands in row 1"),
        ([{**ROW, "level": "hard"}], r"row 1: unknown level 'hard'; expected one of gsm, math"),
        ([{k: v for k, v in ROW.items() if k != "level"}], r"row 1: no level"),
        ([{"id": "a", "answer": "2"}], r"no column 'problem' or 'question'"),
        ([{**ROW, "answer": ""}], r"no usable problem .*without answer"),
        ([{**ROW, "answers_alt": "II"}], r"answers_alt is not a JSON list"),
    ],
)
def test_unusable_rows_are_named_by_file_and_row(
    tmp_path: Path, rows: list[dict], message: str
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ProblemFileError, match=message) as caught:
        read_problems(path)
    assert str(path) in str(caught.value)


def test_unusable_files_are_named_with_what_would_be_right(tmp_path: Path) -> None:
    for name, content, message in (
        ("missing.parquet", None, "no such problem file"),
        ("empty.jsonl", "", "the file is empty"),
        ("p.txt", "x", "expected a file ending in .parquet"),
        ("bad.jsonl", "{", "line 1: not JSON"),
        ("bad.parquet", "not parquet", "cannot be read"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(ProblemFileError, match=message) as caught:
            read_problems(path)
        assert str(path) in str(caught.value)


def test_default_level_fills_rows_that_name_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "2"}])
    problems, _ = read_problems(path, default_level=Level.MATH)
    assert (problems[0].id, problems[0].level) == ("p-1", Level.MATH)


def test_rows_that_hold_more_than_is_read_are_refused(tmp_path: Path) -> None:
    story = write_jsonl(tmp_path / "p.jsonl", [ROW, {**ROW, "id": "b", "body": "Two reds."}])
    message = r"row 2: column body .*--drop body; `rstar problems import` reads more kinds"
    with pytest.raises(ProblemFileError, match=message):
        read_problems(story)
    lists = write_jsonl(tmp_path / "q.jsonl", [{**ROW, "answer": a} for a in (["7"], ["7", "8"])])
    problems, report = read_problems(lists)
    assert [p.answer for p in problems] == ["7"]
    assert list(report.skipped) == [SEVERAL_ANSWERS]
