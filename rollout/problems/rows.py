"""Rows of problem files as they stand: Parquet, JSONL, JSON, CSV, each also .gz or .zst where it is
text, and data sets of the Hugging Face hub.

    RowFile(path).rows() -> Row(number, data) | Row(number, error)

A row that cannot be read is a value with its place and what is wrong, and reading goes on behind
it; only a file of which nothing can be read raises. Memory does not grow with the file: a JSON list
is decoded element by element. `position` tells how far reading has come, in bytes of `size`.

Not covered: a single line or element is held in memory whole; behind a broken element of a JSON
list, or broken compressed data, nothing more can be read, which is reported as one bad row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
TEXT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".parquet")
COMPRESSIONS = (".gz", ".zst")
HUB = "hf://"
LIST_KEYS = ("example", "examples", "data", "rows")
"""Under which of its keys a JSON object may hold the list of rows."""
_ASKED = {"problem", "question", "prompt", "messages", "conversations", "query", "input", "content"}
"""Keys that say that an object is a row."""
_BATCH_ROWS = 2048
_CHUNK = 1 << 20
_MAX_FIELD = 1 << 27
_MAX_ELEMENT = 1 << 26
_BETWEEN = re.compile(r"[\s,]*")


class ProblemFileError(ValueError):
    """A problem file as a whole cannot be used."""


class RowError(ValueError):
    """A row is not what its format says; the message says how."""


class WholeFileError(RowError):
    """A row shows that its file would be read wrongly, so that nothing of it may be kept."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its data, or why it cannot be read."""

    number: int
    """Line of a JSONL or CSV file, else place in the file, from 1."""
    data: Any
    """None for a row that cannot be read."""
    error: str | None = None


def kind_of_value(value: Any) -> str:
    """What a value of a row is, for people."""
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def columns(names: str, **types: pa.DataType) -> list[tuple[str, pa.DataType]]:
    """Columns of a table by name in their order, texts where no other type is given."""
    return [(name, types.get(name, pa.string())) for name in names.split()]


def expand(inputs: Sequence[str]) -> list[str]:
    """Files and data set ids in the order given; a folder stands for all problem files below it.

    Raises:
        ProblemFileError: something is missing, holds no problem file, or has an unknown ending.
    """
    found: list[str] = []
    for given in inputs:
        if given.startswith(HUB):
            found.append(given)
            continue
        path = Path(given)
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*") if kind_of(file) is not None)
            if not inside:
                raise ProblemFileError(f"{path}: no file ending in {', '.join(SUFFIXES)} in it")
            found += inside
        elif not path.exists():
            raise ProblemFileError(f"{path}: no such problem file")
        elif kind_of(path) is None:
            raise ProblemFileError(
                f"{path}: expected a file ending in {', '.join(SUFFIXES)} (text also .gz or .zst)"
            )
        elif path.stat().st_size == 0:
            raise ProblemFileError(f"{path}: the file is empty")
        else:
            found.append(given)
    repeated = sorted({name for name in found if found.count(name) > 1})
    if repeated:
        raise ProblemFileError(f"{repeated[0]}: given twice")
    return found


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read; None: not a problem file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if inner in TEXT_SUFFIXES else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def stem_of(name: str) -> str:
    """What a file or data set is called without folders and endings."""
    if name.startswith(HUB):
        return name.removeprefix(HUB).split("@")[0].split(":")[0].split("/")[-1]
    base = Path(name).name
    for suffix in (*COMPRESSIONS, *SUFFIXES):
        base = base.removesuffix(suffix)
    return base


class RowFile:
    """The rows of one file or hub data set, once."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: path, or hf://owner/name[:split][@config] (split: train).
        """
        self.name = name
        self.on_hub = name.startswith(HUB)
        self.size = 0 if self.on_hub else Path(name).stat().st_size
        self.position = 0
        self.place = "line" if kind_of(Path(name)) in (".jsonl", ".csv") else "row"

    def at(self, row: Row) -> str:
        """Where a row stands, for people."""
        return f"{self.name}, {self.place} {row.number}"

    def rows(self) -> Iterator[Row]:
        """Every row in order.

        Raises:
            ProblemFileError: nothing of the file can be read; names file and cause.
        """
        if self.on_hub:
            yield from self._hub_rows()
            return
        path = Path(self.name)
        kind = kind_of(path)
        try:
            if kind == ".parquet":
                yield from self._parquet_rows(path)
                return
            with path.open("rb") as raw:
                stream = _decompressed(raw, path)
                if kind == ".jsonl":
                    yield from self._jsonl_rows(raw, stream)
                elif kind == ".csv":
                    yield from self._csv_rows(raw, stream)
                else:
                    yield from self._json_rows(raw, stream)
        except ProblemFileError:
            raise
        except (OSError, ValueError, csv.Error) as error:
            raise ProblemFileError(f"{path}: cannot be read: {error}") from error

    def _parquet_rows(self, path: Path) -> Iterator[Row]:
        with pq.ParquetFile(path) as file:
            total, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(number, data)
                self.position = self.size * number // max(1, total)

    def _jsonl_rows(self, raw: IO[bytes], stream: IO[bytes]) -> Iterator[Row]:
        number = 0
        while True:
            try:
                line = stream.readline()
            except (EOFError, OSError, zlib.error) as error:
                yield Row(number + 1, None, f"the rest of the file cannot be read: {error}")
                return
            if not line:
                return
            number += 1
            if number % 512 == 0:
                self.position = raw.tell()
            if line.isspace():
                continue
            try:
                yield Row(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Row(number, None, f"not JSON: {error}")

    def _csv_rows(self, raw: IO[bytes], stream: IO[bytes]) -> Iterator[Row]:
        csv.field_size_limit(_MAX_FIELD)
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        table = csv.DictReader(text)
        width = len(table.fieldnames or ())
        while True:
            number = table.line_num + 1
            try:
                data = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, None, f"not CSV: {error}")
                continue
            except (EOFError, OSError, zlib.error) as error:
                yield Row(number, None, f"the rest of the file cannot be read: {error}")
                return
            self.position = raw.tell()
            if None in data or None in data.values():
                fields = sum(value is not None for key, value in data.items() if key is not None)
                extra = len(cast("dict[Any, list[str]]", data).get(None, ()))
                yield Row(number, None, f"{fields + extra} fields, the header has {width}")
            else:
                yield Row(number, data)

    def _json_rows(self, raw: IO[bytes], stream: IO[bytes]) -> Iterator[Row]:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace")
        head = text.read(_CHUNK)
        if head.lstrip()[:1] != "[":
            yield from self._json_object_rows(head + text.read())
            return
        decoder, number = json.JSONDecoder(), 0
        buffer, at = head, head.index("[") + 1
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer[at : at + 1] == "]":
                return
            try:
                data, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                more = self._more(text) if len(buffer) - at < _MAX_ELEMENT else ""
                if not more:
                    yield Row(number + 1, None, f"the rest of the list cannot be read: {error}")
                    return
                buffer, at = buffer[at:] + more, 0
                self.position = raw.tell()
                continue
            number += 1
            yield Row(number, data)

    def _more(self, text: IO[str]) -> str:
        try:
            return text.read(_CHUNK)
        except (EOFError, OSError, zlib.error):
            return ""

    def _json_object_rows(self, text: str) -> Iterator[Row]:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ProblemFileError(
                f"{self.name}: expected a list of rows, one row, or an object with the list under "
                f"one of {', '.join(LIST_KEYS)}"
            )
        for number, row in enumerate(self._rows_in(data), start=1):
            yield Row(number, row)

    def _rows_in(self, data: dict[str, Any]) -> list[Any]:
        """The rows of a JSON object: under a key that is known for it, or as its only list of
        objects; its values, if all of them are objects; else it is a row itself."""
        known = [data[key] for key in LIST_KEYS if isinstance(data.get(key), list)]
        if known or _ASKED & {key.lower() for key in data}:
            return known[0] if known else [data]
        if len(data) > 1 and all(isinstance(value, dict) for value in data.values()):
            return list(data.values())
        lists = {
            key: value
            for key, value in data.items()
            if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
        }
        if len(lists) > 1:
            raise ProblemFileError(
                f"{self.name}: holds several lists of rows ({', '.join(lists)}); expected one list "
                "to a file"
            )
        return next(iter(lists.values()), [data])

    def _hub_rows(self) -> Iterator[Row]:
        try:
            import datasets
        except ImportError as error:
            raise ProblemFileError(
                f"{self.name}: data sets of the Hugging Face hub need the package 'datasets': "
                "pip install 'rstar-cluster[hub]'"
            ) from error
        name, _, config = self.name.removeprefix(HUB).partition("@")
        name, _, split = name.partition(":")
        try:
            table = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True
            )
            for number, data in enumerate(table, start=1):
                yield Row(number, data)
        except Exception as error:
            # Whatever the hub, the network or the data set's own script raised.
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ProblemFileError(
                f"{self.name}: cannot be read from the Hugging Face hub: {first[0]}; is there a "
                "network? A downloaded file can be imported by its path"
            ) from error


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        return cast("IO[bytes]", io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _CHUNK))
    return raw
