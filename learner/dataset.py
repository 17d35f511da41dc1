"""A dataset directory: what selection writes and training reads.

    sft_train, sft_validation, pairs_train, pairs_validation, steps_train (.parquet)
                     rows, by row group
    manifest.json    `template`, `counts`, `excluded`, `files` (name -> rows, sha256), `digest` over
                     all files, `info`; of one selected from trees also which rounds gave what
                     and `shape`, what the trees were like

Each file is written whole and the manifest last: where it is, the dataset is complete. It says how
many were taken and, for whatever was not, why. Texts are stored rendered: what search prompts with
is what training reads.

Neither side holds a dataset: rows are written and read by row group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from learner.pairs import PairKind, PreferencePair, ValuedNode, ValuedStep
from learner.spill import no_room
from rollout.files import atomic_write
from rollout.prompt import Segment, Step, parse_response
from rollout.run_store import RunStore

MANIFEST = "manifest.json"

FILES = ("sft_train", "sft_validation", "pairs_train", "pairs_validation", "steps_train")

_ROW_GROUP_ROWS = 1024
_BATCH_ROWS = 256

SEGMENTS = pa.list_(pa.struct([("text", pa.string()), ("trained", pa.bool_())]))
"""Of a rendered solution."""

PAIR_FIELDS = [
    ("node", pa.int32()),
    ("kind", pa.string()),
    ("shared_steps", pa.int32()),
    ("prefix", pa.string()),
    ("chosen", pa.string()),
    ("rejected", pa.string()),
    ("chosen_q", pa.float64()),
    ("rejected_q", pa.float64()),
    ("weight", pa.float64()),
]
"""Of a `PreferencePair`, besides which tree it is of."""

NODE_FIELDS = [
    ("node", pa.int32()),
    ("prefix", pa.string()),
    ("steps", pa.list_(pa.struct([("text", pa.string()), ("q", pa.float64())]))),
]
"""Of a `ValuedNode`, likewise."""

_SFT_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("level", pa.string()),
        ("origin", pa.string()),
        ("round", pa.int32()),
        ("mean_q", pa.float64()),
        ("segments", SEGMENTS),
    ]
)
_TREE_FIELDS = [
    ("problem_id", pa.string()),
    ("level", pa.string()),
    ("round", pa.int32()),
    ("tree_index", pa.int32()),
]
_PAIR_SCHEMA = pa.schema([*_TREE_FIELDS, *PAIR_FIELDS])
_NODE_SCHEMA = pa.schema([*_TREE_FIELDS, *NODE_FIELDS])
_SCHEMAS = dict(
    zip(
        FILES,
        (_SFT_SCHEMA, _SFT_SCHEMA, _PAIR_SCHEMA, _PAIR_SCHEMA, _NODE_SCHEMA),
        strict=True,
    )
)


class DatasetError(RuntimeError):
    """Training data is missing, incomplete or not in the expected form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTExample:
    """One trajectory to imitate."""

    problem_id: str
    level: str
    origin: str
    """"tree", "demonstration" or "file"."""
    round: int
    """Round that found it; -1 where no round did."""
    mean_q: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A worked solution from outside the searches."""

    id: str
    level: str
    problem: str
    steps: tuple[Step, ...]


def unusable(texts: Iterable[str], trained: Iterable[str]) -> str | None:
    """Why an example cannot be stored and trained on: "empty" or "unrenderable"; None: it can.

    Args:
        texts: all of it; one with a lone surrogate, which no UTF-8 file can hold, is unrenderable.
        trained: of which each must hold something.
    """
    if not all(trained):
        return "empty"
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return "unrenderable"
    return None


class DatasetWriter:
    """Fills a dataset row by row; `writing_dataset` makes one."""

    def __init__(self, directory: Path, hidden: Path) -> None:
        self._directory = directory
        self._hidden = {name: hidden / f"{name}.parquet" for name in FILES}
        self._files = {
            name: pq.ParquetWriter(path, _SCHEMAS[name], compression="zstd")
            for name, path in self._hidden.items()
        }
        self._rows_held: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
        self._held = {name: _SCHEMAS[name].empty_table() for name in FILES}
        self._rows = dict.fromkeys(FILES, 0)

    def add(self, name: str, row: SFTExample | PreferencePair | ValuedNode) -> None:
        """Append a row to one of `FILES`.

        Raises:
            OSError: the disk is full.
        """
        held = self._rows_held[name]
        held.append(asdict(row))
        if len(held) >= _ROW_GROUP_ROWS:
            self._take_rows(name)

    def add_table(self, name: str, table: pa.Table) -> None:
        """Append rows, the columns in any order; as `add`."""
        self._take_rows(name)
        schema = _SCHEMAS[name]
        table = pa.concat_tables([self._held[name], table.select(schema.names).cast(schema)])
        whole = len(table) - len(table) % _ROW_GROUP_ROWS
        self._write(name, table.slice(0, whole))
        # A copy, which does not keep all of what it was cut from.
        self._held[name] = table.slice(whole).take(pa.array(np.arange(len(table) - whole)))

    def commit(
        self,
        *,
        template: str | None,
        counts: Mapping[str, Mapping[str, int]],
        excluded: Mapping[str, Mapping[str, int]],
        facts: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Put the files in place, the manifest last; returns the manifest.

        Args:
            rounds: what the manifest says of the rounds it was selected from, name -> value.
        Raises:
            OSError: the disk is full.
        """
        files, digests = {}, ""
        for name in FILES:
            self._take_rows(name)
            self._write(name, self._held[name])
            self._files[name].close()
            with self._hidden[name].open("rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            files[name] = {"rows": self._rows[name], "sha256": digest}
            digests += digest
        total = hashlib.sha256(digests.encode()).hexdigest()
        manifest = {
            "template": template,
            "counts": counts,
            "excluded": excluded,
            **(facts or {}),
            "files": files,
            "digest": total,
            "info": dict(info or {}),
        }
        (self._directory / MANIFEST).unlink(missing_ok=True)
        for path in self._hidden.values():
            path.replace(self._directory / path.name)
        atomic_write(self._directory / MANIFEST, json.dumps(manifest, indent=1))
        return manifest

    def close(self) -> None:
        """Let go of the files: what was not committed need not be whole."""
        for file in self._files.values():
            with contextlib.suppress(OSError, pa.ArrowException):
                file.close()

    def _take_rows(self, name: str) -> None:
        rows, self._rows_held[name] = self._rows_held[name], []
        if rows:
            self.add_table(name, pa.Table.from_pylist(rows, schema=_SCHEMAS[name]))

    def _write(self, name: str, table: pa.Table) -> None:
        if len(table):
            self._files[name].write_table(table, row_group_size=_ROW_GROUP_ROWS)
            self._rows[name] += len(table)


@contextlib.contextmanager
def writing_dataset(directory: str | Path) -> Iterator[DatasetWriter]:
    """Fill a dataset directory; a dataset that is there stays as it is without a `commit`.

    Raises:
        DatasetError: the disk is full.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".", dir=directory, ignore_cleanup_errors=True
        ) as hidden:
            writer = DatasetWriter(directory, Path(hidden))
            try:
                yield writer
            finally:
                writer.close()
    except OSError as error:
        raise DatasetError(no_room(error, directory)) from error


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset, also one on a bucket; None if there is none."""
    try:
        return json.loads(RunStore(directory).read(MANIFEST))
    except FileNotFoundError:
        return None


def read_sft(directory: str | Path, split: str) -> Iterator[SFTExample]:
    """The SFT examples of a split ("train" or "validation"), one row group in memory at a time.

    Raises:
        DatasetError: the directory holds no complete dataset.
    """
    for piece in read_pieces(directory, f"sft_{split}", _BATCH_ROWS):
        yield from sft_of(piece)


def read_pairs(directory: str | Path, split: str) -> Iterator[PreferencePair]:
    """The preference pairs of a split, those of a node together; as `read_sft`."""
    for piece in read_pieces(directory, f"pairs_{split}", _BATCH_ROWS):
        yield from pairs_of(piece)


def read_valued_nodes(directory: str | Path) -> Iterator[ValuedNode]:
    """The nodes whose steps have Q-values, of the training problems; as `read_sft`."""
    for piece in read_pieces(directory, "steps_train", _BATCH_ROWS):
        yield from valued_nodes_of(piece)


def sft_of(rows: pa.Table) -> Iterator[SFTExample]:
    """The examples in rows of an SFT file."""
    for row in rows.to_pylist():
        yield SFTExample(**row | {"segments": tuple(Segment(**s) for s in row["segments"])})


def pairs_of(rows: pa.Table) -> Iterator[PreferencePair]:
    """The pairs in rows of a file of pairs."""
    for row in rows.to_pylist():
        yield PreferencePair(**row | {"kind": PairKind(row["kind"])})


def valued_nodes_of(rows: pa.Table) -> Iterator[ValuedNode]:
    """The nodes in rows of a file of valued steps."""
    for row in rows.to_pylist():
        yield ValuedNode(**row | {"steps": tuple(ValuedStep(**s) for s in row["steps"])})


def read_pieces(
    directory: str | Path, name: str, num_rows: int, *, together: Sequence[str] = ()
) -> Iterator[pa.Table]:
    """The rows of one of `FILES` as they stand there, about `num_rows` at a time.

    Args:
        together: rows that follow each other and are alike in these columns are in one piece.
    Raises:
        DatasetError: the directory holds no complete dataset.
    """
    left: pa.Table | None = None
    for batch in _batches(directory, name, num_rows):
        rows = pa.Table.from_batches([batch])
        if left is not None:
            rows = pa.concat_tables([left, rows]).combine_chunks()
        cut = len(rows)
        if together:
            keys = rows.select(together)
            last = keys.slice(cut - 1).to_pylist()
            while cut and keys.slice(cut - 1, 1).to_pylist() == last:
                cut -= 1
        if cut:
            yield rows.slice(0, cut)
        left = rows.slice(cut)
    if left is not None and len(left):
        yield left


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """Worked solutions from a Parquet or JSONL file.

    Columns: id, problem, solution (in the trajectory grammar of `rollout.prompt`), and level if
    there is one.

    Raises:
        DatasetError: the file or a column is missing, or a solution cannot be read.
    """
    path = Path(path)
    demonstrations = []
    rows = read_rows(path, "demonstration file", "demonstrations")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in ("id", "problem", "solution") if not row.get(name)]
        if missing:
            raise DatasetError(f"{path}, row {number}: no {', '.join(missing)}")
        try:
            steps = parse_response(row["solution"])
        except ValueError as error:
            raise DatasetError(f"{path}, row {number} (id {row['id']!r}): {error}") from error
        demonstrations.append(
            Demonstration(
                id=str(row["id"]),
                level=str(row.get("level") or "unknown"),
                problem=row["problem"],
                steps=tuple(steps),
            )
        )
    if not demonstrations:
        raise DatasetError(f"{path} holds no demonstration")
    return demonstrations


def read_rows(path: Path, what: str, content: str) -> Iterator[Any]:
    """The rows of a Parquet or JSONL file, a few in memory at a time.

    Args:
        what, content: the file and what is in it, for messages.
    Raises:
        DatasetError: the file is missing or cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DatasetError(
                            f"{path}, line {number}: no JSON ({error.msg}, column {error.pos + 1})"
                        ) from None
    except FileNotFoundError:
        raise DatasetError(f"no {what} {path}") from None
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise DatasetError(f"cannot read {content} from {path}: {error}") from error


def _batches(directory: str | Path, name: str, num_rows: int) -> Iterator[pa.RecordBatch]:
    directory = Path(directory)
    if read_manifest(directory) is None:
        raise DatasetError(f"no complete training data in {directory} ({MANIFEST} is missing)")
    columns = _SCHEMAS[name].names
    try:
        with pq.ParquetFile(directory / f"{name}.parquet") as file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise DatasetError(f"{directory / name}.parquet has no column {missing[0]!r}")
            yield from file.iter_batches(batch_size=num_rows, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"cannot read {name} from {directory}: {error}") from error
