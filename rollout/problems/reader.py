"""Problem files -> `Problem` records: Parquet, JSONL, JSON list or CSV, one row a problem.

Columns: `id`, `problem` (or `question`), `answer`, and optionally `source`, `level`, `answers_alt`
(a list, or a JSON list as text) and `rewording_of` (the id of a problem). A row that cannot be used
is left out and reported with its file and number; a file that cannot be used is an error.

Not covered: solutions, deduplication, decontamination and the readers of named data sets.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.problem import Level, Problem
from rollout.problems.formats import refuse_losses
from rollout.problems.golds import alternatives, given
from rollout.problems.rows import SUFFIXES, ProblemFileError, RowError, RowFile

_LEVELS = ", ".join(level.value for level in Level)


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """What was read from a file and what was left out."""

    path: str
    num_rows: int = 0
    num_problems: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of rows left out, by reason."""
    examples: list[str] = field(default_factory=list)
    """The first few skipped rows, each with file, row and reason."""

    MAX_EXAMPLES = 5

    def skip(self, row: int, reason: str, detail: str = "") -> None:
        self.skipped[reason] += 1
        if len(self.examples) < self.MAX_EXAMPLES:
            self.examples.append(f"{self.path}, row {row}: {reason}{detail}")

    def lines(self) -> list[str]:
        """For people: one line of counts, then the examples."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        head = f"{self.path}: {self.num_problems} problems of {self.num_rows} rows"
        return [head + (f"; left out: {left_out}" if left_out else ""), *self.examples]


def read_problems(
    path: str | Path, *, default_level: Level | None = None
) -> tuple[list[Problem], ReadReport]:
    """Read one file.

    Args:
        default_level: level of rows that name none; None makes a row without level an error.
    Raises:
        ProblemFileError: missing, unreadable or empty file, unknown format, missing column, content
            in a column that is not read, unknown level, or two rows with one id; the message names
            file, row and what is right.
    """
    path = Path(path)
    report = ReadReport(path=str(path))
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_rows(path), start=1):
        report.num_rows += 1
        problem = _problem(row, path, number, default_level, report)
        if problem is None:
            continue
        if problem.id in seen:
            raise ProblemFileError(
                f"{path}, row {number}: id {problem.id!r} already stands in row "
                f"{seen[problem.id]}; ids must be unique"
            )
        seen[problem.id] = number
        problems.append(problem)
    report.num_problems = len(problems)
    if not problems:
        reasons = "; ".join(report.lines()[1:]) or "the file has no rows"
        raise ProblemFileError(f"{path}: no usable problem ({reasons})")
    return problems, report


def _problem(
    row: Mapping[str, Any],
    path: Path,
    number: int,
    default_level: Level | None,
    report: ReadReport,
) -> Problem | None:
    text = row.get("problem", row.get("question"))
    if text is None and "problem" not in row and "question" not in row:
        raise ProblemFileError(
            f"{path}, row {number}: no column 'problem' or 'question'; found {sorted(row)}"
        )
    if not str(text or "").strip():
        report.skip(number, "without problem text")
        return None
    try:
        refuse_losses(row, (), "of runs")
        gold = given(row.get("answer"))
        answers_alt = alternatives(row.get("answers_alt"))
    except RowError as error:
        raise ProblemFileError(
            f"{path}, row {number}: {error}; `rstar problems import` reads more kinds of files"
        ) from error
    if gold.answer is None:
        report.skip(number, gold.doubt or "without answer", f" (id {row.get('id')!r})")
        return None
    level = _level(row.get("level"), path, number, default_level)
    identifier = row.get("id", row.get("index"))
    return Problem(
        id=str(identifier) if identifier is not None else f"{path.stem}-{number}",
        source=str(row.get("source") or path.stem),
        level=level,
        text=str(text),
        answer=gold.answer,
        answers_alt=answers_alt,
        rewording_of=str(row.get("rewording_of") or ""),
    )


def _level(value: Any, path: Path, number: int, default: Level | None) -> Level:
    if value is None or value == "":
        if default is not None:
            return default
        raise ProblemFileError(
            f"{path}, row {number}: no level; give one of {_LEVELS} in a column 'level', "
            "or a default level"
        )
    try:
        return Level(str(value).strip().lower())
    except ValueError:
        raise ProblemFileError(
            f"{path}, row {number}: unknown level {value!r}; expected one of {_LEVELS}"
        ) from None


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.exists():
        raise ProblemFileError(f"{path}: no such problem file")
    if path.is_dir() or path.suffix not in SUFFIXES:
        raise ProblemFileError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ProblemFileError(f"{path}: the file is empty")
    if path.suffix == ".csv":
        # Unlike in an import, cells may be missing at the end of a row.
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                yield from csv.DictReader(lines)
        except (OSError, ValueError) as error:
            raise ProblemFileError(f"{path}: cannot be read: {error}") from error
        return
    file = RowFile(str(path))
    for row in file.rows():
        if row.error is not None or not isinstance(row.data, dict):
            wrong = row.error or "expected a JSON object"
            raise ProblemFileError(f"{path}, {file.place} {row.number}: {wrong}")
        yield row.data
