from __future__ import annotations

import csv
import gzip
import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.problems.rows import ProblemFileError, Row, RowFile, expand, stem_of

ROWS = [{"problem": f"What is {n} · 2?", "answer": str(2 * n)} for n in range(300)]


def rows_of(path: Path) -> list[Row]:
    return list(RowFile(str(path)).rows())


def write_all(folder: Path) -> list[Path]:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (folder / "b.json").write_text(json.dumps({"example": ROWS}), encoding="utf-8")
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    with pa.CompressedOutputStream(str(folder / "a.json.zst"), "zstd") as file:
        file.write(json.dumps(ROWS).encode())
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["problem", "answer"])
        table.writeheader()
        table.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_rows_and_tells_how_far_it_is(tmp_path: Path) -> None:
    for path in write_all(tmp_path):
        source = RowFile(str(path))
        assert [row.data for row in source.rows()] == ROWS, path
        assert 0 <= source.position <= source.size


def test_a_json_list_longer_than_the_buffer_is_read_element_by_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.problems.rows._CHUNK", 17)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[:9]), encoding="utf-8")
    assert [row.data for row in rows_of(path)] == ROWS[:9]


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ({"version": 2, "problems": ROWS[:2]}, ROWS[:2]),
        ({"2024-I-1": ROWS[0], "2024-I-2": ROWS[1]}, ROWS[:2]),
        ({"Problem": "Why?", "parts": [{"a": 1}]}, [{"Problem": "Why?", "parts": [{"a": 1}]}]),
        ({"row": ROWS[0]}, [{"row": ROWS[0]}]),
        (ROWS[0], ROWS[:1]),
    ],
)
def test_rows_in_a_json_object(tmp_path: Path, data: dict, rows: list[dict]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert [row.data for row in rows_of(path)] == rows


def test_a_json_object_with_several_lists_of_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS[:2], "test": ROWS[2:3]}), encoding="utf-8")
    with pytest.raises(ProblemFileError, match=r"several lists of rows \(train, test\)"):
        rows_of(path)


def test_broken_rows_are_values_with_their_line_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\n{"a": "\xff"}\n[2]\n')
    found = [(row.number, row.data, row.error is None) for row in rows_of(path)]
    assert found == [(1, {"a": 1}, True), (2, None, False), (4, None, False), (5, [2], True)]


def test_a_csv_row_with_a_missing_or_an_extra_field_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('problem,answer\n"1+\n1",2\n1+2\n1+3,4,5\n', encoding="utf-8")
    assert [(row.number, row.error) for row in rows_of(path)] == [
        (2, None),
        (4, "1 fields, the header has 2"),
        (5, "3 fields, the header has 2"),
    ]


def test_a_cut_off_file_gives_its_rows_and_one_bad_row(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-200])
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:5])[:-30], encoding="utf-8")
    for path in sorted(tmp_path.iterdir()):
        found = rows_of(path)
        assert [row.data for row in found[:-1]] == ROWS[: len(found) - 1]
        assert found[-1].error is not None
        assert "rest of the" in found[-1].error


def test_a_folder_stands_for_the_problem_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "train" / "algebra").mkdir(parents=True)
    for name in ("2.json", "1.json", "notes.txt"):
        (tmp_path / "train" / "algebra" / name).write_text("{}", encoding="utf-8")
    assert [Path(name).name for name in expand([str(tmp_path)])] == ["1.json", "2.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.parquet", "no such problem file"),
        ("a.txt", "expected a file ending in .parquet"),
        ("a.parquet.gz", "expected a file ending in .parquet"),
        ("empty.jsonl", "the file is empty"),
    ],
)
def test_what_is_no_problem_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    if name != "none.parquet":
        (tmp_path / name).write_text("" if "empty" in name else "x", encoding="utf-8")
    with pytest.raises(ProblemFileError, match=message):
        expand([str(tmp_path / name)])


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no", encoding="utf-8")
    with pytest.raises(ProblemFileError, match="cannot be read"):
        rows_of(tmp_path / "a.parquet")


def test_hub_data_sets_are_streamed_by_name_split_and_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict]:
        asked.append((name, config, split, streaming))
        return ROWS[:2]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [row.data for row in RowFile("hf://o/n:test@main").rows()] == ROWS[:2]
    assert list(RowFile("hf://o/n").rows())
    assert asked == [("o/n", "main", "test", True), ("o/n", None, "train", True)]
    assert stem_of("hf://o/n:test@main") == "n"


def test_without_the_package_or_the_network_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ProblemFileError, match=r"need the package 'datasets': pip install"):
        list(RowFile("hf://o/n").rows())
    module = types.ModuleType("datasets")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    module.load_dataset = offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ProblemFileError, match=r"no route to host; is there a network\?"):
        list(RowFile("hf://o/n").rows())
