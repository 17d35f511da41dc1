"""Problem files in, one problems table out, and every row accounted for.

    files -> rows -> drafts -> screen -> benchmarks -> duplicates -> problems.parquet
                |         |        |           |            |
             bad rows  bad rows  set aside  contaminated  duplicates    problems.report/*.parquet

A row in is exactly one of: kept, duplicate, contaminated, set aside, bad. The sums are checked
file by file before anything is put in place. The report folder lies beside the table and holds
each of the others with its place and reason, `report.md` for people and `report.json` for programs.

Memory stays flat but for 152 bytes a problem (`duplicates`): what passes the first three gates
waits in a file beside the output, and is copied once the duplicates are known. Everything is made
in a hidden folder beside the output and moved into place at the end, the table last: after Ctrl-C
or a crash the output is the old one, or none.

Not covered: a process killed outright (SIGKILL) leaves the hidden folder behind.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.problem import Level
from rollout.problems.decontamination import (
    BenchmarkIndex,
    BenchmarkProblem,
    Hit,
    HitKind,
    agree,
    beginning,
)
from rollout.problems.duplicates import Duplicate, DuplicateFinder
from rollout.problems.formats import Convert, Draft, converter, detect
from rollout.problems.import_report import (
    FORMAT_VERSION,
    BenchmarkReport,
    FileReport,
    ImportReport,
    ImportSettings,
    report_folder,
    report_to_json,
    report_to_markdown,
)
from rollout.problems.rows import (
    ProblemFileError,
    Row,
    RowError,
    RowFile,
    WholeFileError,
    columns,
    expand,
    stem_of,
)
from rollout.problems.screening import Reason, screen
from rollout.problems.text import (
    Places,
    TokenBatch,
    answer_key,
    bands,
    drawing_key,
    numbers_key,
    problem_id,
    problem_key,
    tokenise,
)
from verifier import answers_match

VERSION_KEY = b"rstar.problems_version"
_BATCH = 2048


_PROBLEM_FIELDS = columns(
    "id source level problem answer answers_alt subject difficulty solution origin origin_id "
    "rewording_of",
    difficulty=pa.int8(),
)
PROBLEM_SCHEMA = pa.schema(_PROBLEM_FIELDS, metadata={VERSION_KEY: str(FORMAT_VERSION).encode()})
"""Columns of a problems table; `answers_alt` is a JSON list, `origin` is FILE:ROW, `origin_id` what
the row called itself, `solution` filled only where asked for, `rewording_of` the id of the problem
it is a variation of."""
SET_ASIDE_SCHEMA = pa.schema([*columns("reason detail"), *_PROBLEM_FIELDS[1:]])
DUPLICATE_SCHEMA = pa.schema(
    columns(
        "id origin kept_id kept_origin kind similarity same_answer answer problem",
        similarity=pa.float32(),
        same_answer=pa.bool_(),
    )
)
CONTAMINATION_SCHEMA = pa.schema(
    columns(
        "id origin benchmark benchmark_id kind matched overlap same_answer removed answer "
        "benchmark_answer problem benchmark_problem",
        overlap=pa.float32(),
        same_answer=pa.bool_(),
        removed=pa.bool_(),
    )
)
BAD_ROW_SCHEMA = pa.schema(columns("file row error", row=pa.int64()))

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it, of how much)"""


def import_problems(
    settings: ImportSettings,
    out: Path | None,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> ImportReport:
    """Read, judge and write; the whole of `rstar problems import`.

    Args:
        out: the problems table; its report folder lies beside it. None: only the report is made, as
            for a check.
    Raises:
        ProblemFileError: a file is missing or of unknown format, an input is also a benchmark, or
            there is no row to keep. Nothing is written then.
    """
    started = time.monotonic()
    if settings.columns and settings.format:
        raise ProblemFileError("--format and --columns exclude each other")
    names, against = expand(settings.inputs), expand(settings.against)
    both = {_real(name) for name in names} & {_real(name) for name in against}
    if both:
        raise ProblemFileError(f"{sorted(both)[0]}: both imported and a benchmark")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name if out else 'problems'}.", dir=out.parent if out else None
    ) as folder:
        run = _Import(settings, names, against, Path(folder), progress)
        report = run.run()
        report.seconds = time.monotonic() - started
        if out is not None:
            if not report.total("kept"):
                raise ProblemFileError(
                    f"no problem to keep of {report.total('rows')} rows: "
                    + "; ".join(_where_they_went(report))
                )
            run.write_reports()
            _put_in_place(Path(folder), out)
    return report


def _real(name: str) -> str:
    return name if name.startswith("hf://") else str(Path(name).resolve())


def _put_in_place(folder: Path, out: Path) -> None:
    """The report first, the table last: a table always has its own report."""
    target = report_folder(out)
    if target.exists():
        target.rename(folder / "old_report")
    (folder / "report").rename(target)
    (folder / "problems.parquet").replace(out)


def _where_they_went(report: ImportReport) -> list[str]:
    counts = {
        "duplicates": report.total("duplicates"),
        "contaminated": report.total("contaminated"),
        "bad": report.total("bad"),
        **report.set_aside(),
    }
    told = [f"{count} {name}" for name, count in counts.items() if count]
    return told + report.bad_examples[:3]


Append = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def _table(path: Path, schema: pa.Schema) -> Iterator[Append]:
    """A Parquet file that grows by rows; written even when it stays empty."""
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()

        def append(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) >= _BATCH:
                flush()

        yield append
        flush()


_SPILL_SCHEMA = pa.schema([*_PROBLEM_FIELDS, ("file", pa.int32())])


class _Import:
    """One import: state between its passes."""

    def __init__(
        self,
        settings: ImportSettings,
        names: Sequence[str],
        against: Sequence[str],
        folder: Path,
        progress: Progress,
    ) -> None:
        self.settings, self.names, self.folder, self.progress = settings, names, folder, progress
        self.report = ImportReport(settings=settings)
        self.benchmarks = list(against)
        self.index = BenchmarkIndex(())
        self.finder = DuplicateFinder()
        self._groups: list[int] = []
        """Number of rows waiting in each row group of the spilled file."""
        (folder / "report").mkdir()

    def run(self) -> ImportReport:
        converts = [self._convert_of(name) for name in self.names]
        self.index = self._read_benchmarks()
        report_folder = self.folder / "report"
        with (
            _table(report_folder / "set_aside.parquet", SET_ASIDE_SCHEMA) as self._aside,
            _table(report_folder / "contaminated.parquet", CONTAMINATION_SCHEMA) as self._hits,
            _table(report_folder / "bad_rows.parquet", BAD_ROW_SCHEMA) as self._bad,
        ):
            with pq.ParquetWriter(self.folder / "spill.parquet", _SPILL_SCHEMA) as self._spill:
                self._read(converts)
            self._settle_duplicates()
        for file in self.report.files:
            if file.accounted != file.rows:
                raise AssertionError(f"{file.file}: {file.rows} rows, {file.accounted} accounted")
        return self.report

    def _convert_of(self, name: str) -> tuple[str | None, Convert | None]:
        """The format of a file and how its rows are read; both None where no row can be read."""
        settings = self.settings
        chosen = "columns" if settings.columns else settings.format
        if chosen is None:
            row = _first_readable(name)
            if row is None:
                return None, None
            chosen = detect(row.data, f"{name}, row {row.number}", settings.drop)
        convert = converter(
            chosen, columns=settings.columns, subsets=settings.subsets, drop=settings.drop
        )
        return chosen, convert

    def _read_benchmarks(self) -> BenchmarkIndex:
        problems: list[BenchmarkProblem] = []
        for done, name in enumerate(self.benchmarks):
            self.progress("benchmarks", done, len(self.benchmarks))
            read, bad = read_benchmark(name, self.settings.drop)
            if not read:
                raise ProblemFileError(f"{name}: no problem in this benchmark file")
            problems += read
            sha256 = "" if name.startswith("hf://") else _sha256(Path(name))
            self.report.benchmarks.append(
                BenchmarkReport(file=name, problems=len(read), bad_rows=bad, sha256=sha256)
            )
        index = BenchmarkIndex(problems)
        self.report.common_ngrams = len(index.common)
        for start in range(0, len(problems), _BATCH):
            part = problems[start : start + _BATCH]
            texts, answers = [p.text for p in part], [p.answer for p in part]
            self._add_to_finder(texts, answers, list(map(problem_key, texts)), tokenise(texts))
        return index

    def _read(self, converts: Sequence[tuple[str | None, Convert | None]]) -> None:
        sources = [RowFile(name) for name in self.names]
        total, before = sum(source.size for source in sources), 0
        for place, (source, (format, convert)) in enumerate(zip(sources, converts, strict=True)):
            self._file = FileReport(file=source.name, format=format)
            self.report.files.append(self._file)
            self._name, self._stem = Path(source.name).name, stem_of(source.name)
            batch: list[tuple[Row, Draft]] = []
            for row in source.rows():
                self._file.rows += 1
                draft = self._draft(source, row, convert)
                if draft is not None:
                    batch.append((row, draft))
                if len(batch) >= _BATCH:
                    self._judge(place, batch)
                    batch.clear()
                    self.progress(f"reading {self._name}", before + source.position, total)
            self._judge(place, batch)
            before += source.size
            self.progress(f"reading {self._name}", before, total)

    def _draft(self, source: RowFile, row: Row, convert: Convert | None) -> Draft | None:
        error = row.error
        if error is None and convert is not None:
            try:
                draft = convert(row.data, self._stem)
                _check_unicode(draft)
            except WholeFileError as wrong:
                raise ProblemFileError(f"{source.at(row)}: {wrong}") from wrong
            except RowError as wrong:
                error = str(wrong)
            else:
                draft.source = self.settings.source or draft.source
                draft.level = self.settings.level or draft.level
                self._file.joined_answers += draft.gold.joined
                return draft
        self._file.bad += 1
        self._bad({"file": source.name, "row": row.number, "error": error})
        if len(self.report.bad_examples) < 10:
            self.report.bad_examples.append(f"{source.at(row)}: {error}")
        return None

    def _judge(self, file: int, batch: Sequence[tuple[Row, Draft]]) -> None:
        """Screen a batch, look for benchmarks, and let the rest wait."""
        waiting: list[dict[str, Any]] = []
        for row, draft in batch:
            record = self._record(row, draft)
            detail = draft.exclusion or draft.gold.doubt
            marked = Reason.MARKED if draft.exclusion else Reason.UNCLEAR if detail else None
            reason = marked or screen(draft.problem, draft.answer)
            if reason is not None:
                self._file.set_aside[detail or reason.value] += 1
                self._aside({"reason": reason.value, "detail": detail, **record})
                continue
            if draft.level is None:
                self._file.assumed_levels += 1
                record["level"] = Level.MATH.value
            waiting.append({**record, "file": file})
        if not waiting:
            return
        texts = [record["problem"] for record in waiting]
        keys = [problem_key(text) for text in texts]
        for record, key in zip(waiting, keys, strict=True):
            record["id"] = problem_id(key)
        tokens = tokenise(texts)
        hits = self.index.hits(
            texts, [record["answer"] for record in waiting], np.array(keys, np.uint64), tokens
        )
        removed = {hit.row for hit in hits if hit.removes(self.settings.rule)}
        for hit in hits:
            self._report_hit(hit, waiting[hit.row])
        self._file.contaminated += len(removed)
        left = [place for place in range(len(waiting)) if place not in removed]
        if left:
            rows = [waiting[place] for place in left]
            self._spill.write_table(pa.Table.from_pylist(rows, schema=_SPILL_SCHEMA))
            self._groups.append(len(rows))
            texts, answers = [r["problem"] for r in rows], [r["answer"] for r in rows]
            if removed:
                tokens = tokenise(texts)
            self._add_to_finder(texts, answers, [keys[place] for place in left], tokens)

    def _add_to_finder(
        self, texts: Sequence[str], answers: Sequence[str], keys: Sequence[int], tokens: TokenBatch
    ) -> None:
        if not self.settings.near_duplicates:
            self.finder.add(np.array(keys, np.uint64), np.zeros((len(texts), 0), np.uint64))
            return
        salts = numbers_key(tokens)
        salts += np.array([answer_key(answer) for answer in answers], np.uint64)
        salts ^= np.array([drawing_key(text) for text in texts], np.uint64)
        self.finder.add(np.array(keys, np.uint64), bands(tokens, salts))

    def _record(self, row: Row, draft: Draft) -> dict[str, Any]:
        others = list(draft.answers_alt)
        return {
            "source": draft.source,
            "level": draft.level.value if draft.level is not None else None,
            "problem": draft.problem,
            "answer": draft.answer,
            "answers_alt": json.dumps(others, ensure_ascii=False) if others else None,
            "subject": draft.subject,
            "difficulty": draft.difficulty,
            "solution": draft.solution if self.settings.keep_solutions else None,
            "origin": f"{self._name}:{row.number}",
            "origin_id": draft.origin_id,
            "rewording_of": draft.rewording_of,
        }

    def _report_hit(self, hit: Hit, record: Mapping[str, Any]) -> None:
        problem = hit.benchmark
        removed = hit.removes(self.settings.rule)
        self._hits(
            {
                "id": record["id"],
                "origin": record["origin"],
                "benchmark": problem.benchmark,
                "benchmark_id": problem.id,
                "kind": hit.kind.value,
                "matched": hit.matched,
                "overlap": hit.overlap,
                "same_answer": hit.same_answer,
                "removed": removed,
                "answer": record["answer"],
                "benchmark_answer": problem.answer,
                "problem": record["problem"],
                "benchmark_problem": problem.text,
            }
        )
        report = next(r for r in self.report.benchmarks if r.file == problem.benchmark)
        report.hits[hit.kind.value] += 1
        report.same_answer += hit.same_answer
        report.removed += removed
        report.found.add(problem.id)

    def _settle_duplicates(self) -> None:
        """Second pass: what waits is a duplicate, too near to a benchmark, or kept."""
        waiting, first = sum(self._groups), len(self.index.problems)
        self.progress("comparing", 0, max(1, waiting))
        found = {item.problem: item for item in self.finder.find(self._texts_of)}
        kept_numbers = sorted({item.kept for item in found.values() if item.kept >= first})
        kept_rows = self._columns_of(np.array(kept_numbers, np.int64), ["id", "origin", "answer"])
        number = first
        with (
            pq.ParquetFile(self.folder / "spill.parquet") as spill,
            _table(self.folder / "report" / "duplicates.parquet", DUPLICATE_SCHEMA) as duplicates,
            pq.ParquetWriter(
                self.folder / "problems.parquet", PROBLEM_SCHEMA, compression="zstd"
            ) as out,
        ):
            for group in range(len(self._groups)):
                table = spill.read_row_group(group)
                kept = np.ones(table.num_rows, bool)
                gone = [place for place in range(table.num_rows) if number + place in found]
                kept[gone] = False
                rows = table.take(pa.array(gone, pa.int64())).to_pylist()
                for place, row in zip(gone, rows, strict=True):
                    item = found[number + place]
                    if item.kept < first:
                        self._near_hit(item, row)
                    else:
                        self._duplicate(item, row, kept_rows[item.kept], duplicates)
                left = table.filter(pa.array(kept))
                for place, count in Counter(left["file"].to_pylist()).items():
                    self.report.files[place].kept += count
                pairs = zip(left["source"].to_pylist(), left["level"].to_pylist(), strict=True)
                self.report.kept_by.update(pairs)
                out.write_table(left.select(PROBLEM_SCHEMA.names).cast(PROBLEM_SCHEMA))
                number += table.num_rows
                self.progress("writing", number - first, waiting)

    def _near_hit(self, item: Duplicate, row: Mapping[str, Any]) -> None:
        problem = self.index.problems[item.kept]
        self.report.files[row["file"]].contaminated += 1
        hit = Hit(
            row=0,
            benchmark=problem,
            kind=HitKind.NEAR,
            matched=beginning(row["problem"]),
            overlap=item.similarity,
            same_answer=agree(problem, row["answer"]),
        )
        self._report_hit(hit, row)

    def _duplicate(
        self, item: Duplicate, row: Mapping[str, Any], kept: Mapping[str, Any], into: Append
    ) -> None:
        report = self.report.files[row["file"]]
        report.exact_duplicates += item.exact
        report.near_duplicates += not item.exact
        same = answer_key(row["answer"]) == answer_key(kept["answer"]) or answers_match(
            kept["answer"], row["answer"]
        )
        self.report.other_answers += not same
        into(
            {
                "id": row["id"],
                "origin": row["origin"],
                "kept_id": kept["id"],
                "kept_origin": kept["origin"],
                "kind": "exact" if item.exact else "near",
                "similarity": item.similarity,
                "same_answer": same,
                "answer": row["answer"],
                "problem": row["problem"],
            }
        )

    def _texts_of(self, numbers: Places) -> dict[int, str]:
        first = len(self.index.problems)
        texts = {int(n): self.index.problems[n].text for n in numbers[numbers < first]}
        rows = self._columns_of(numbers[numbers >= first], ["problem"])
        return texts | {number: row["problem"] for number, row in rows.items()}

    def _columns_of(self, numbers: Places, columns: list[str]) -> dict[int, dict[str, Any]]:
        """Some columns of waiting problems, by number; numbers ascending."""
        if not len(numbers):
            return {}
        found: dict[int, dict[str, Any]] = {}
        begins = np.cumsum([len(self.index.problems), *self._groups])
        groups = np.searchsorted(begins, numbers, "right") - 1
        with pq.ParquetFile(self.folder / "spill.parquet") as spill:
            for group in np.unique(groups).tolist():
                table = spill.read_row_group(group, columns=columns)
                wanted = numbers[groups == group]
                rows = table.take(pa.array(wanted - begins[group])).to_pylist()
                found.update(zip(wanted.tolist(), rows, strict=True))
        return found

    def write_reports(self) -> None:
        folder = self.folder / "report"
        (folder / "report.json").write_text(
            json.dumps(report_to_json(self.report), indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        (folder / "report.md").write_text(report_to_markdown(self.report, folder), encoding="utf-8")


def read_benchmark(name: str, drop: Collection[str] = ()) -> tuple[list[BenchmarkProblem], int]:
    """The problems of a benchmark file, and how many rows could not be read.

    Args:
        drop: columns that are taken as not there.
    Raises:
        ProblemFileError: unknown columns, content that would be left out, or nothing readable.
    """
    first = _first_readable(name)
    if first is None:
        return [], 0
    format = detect(first.data, f"{name}, row {first.number}", drop)
    convert = converter(format, subsets=None, drop=drop)
    problems, bad, source = [], 0, RowFile(name)
    for row in source.rows():
        try:
            if row.error is not None:
                raise RowError(row.error)
            draft = convert(row.data, stem_of(name))
        except WholeFileError as wrong:
            raise ProblemFileError(f"{source.at(row)}: {wrong}") from wrong
        except RowError:
            bad += 1
            continue
        problems.append(
            BenchmarkProblem(
                benchmark=name,
                id=draft.origin_id or f"{stem_of(name)}:{row.number}",
                text=draft.problem,
                answer=draft.answer or "",
                answers_alt=draft.answers_alt,
            )
        )
    return problems, bad


def _first_readable(name: str) -> Row | None:
    return next((row for row in RowFile(name).rows() if row.error is None), None)


def _check_unicode(draft: Draft) -> None:
    for name, text in (("problem", draft.problem), ("answer", draft.answer or "")):
        if "\ufffd" in text:
            raise RowError(f"{name} holds characters that could not be decoded")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RowError(f"{name} is no valid Unicode: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
