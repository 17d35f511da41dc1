"""What a problem file holds, and what is wrong with it; for `rstar problems stats|check`.

Not covered: whether the answers are right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rollout.problem import Level
from rollout.problems.formats import converter, detect
from rollout.problems.import_report import ImportReport, ImportSettings
from rollout.problems.importer import PROBLEM_SCHEMA, VERSION_KEY, Progress, import_problems
from rollout.problems.rows import (
    ProblemFileError,
    RowError,
    RowFile,
    WholeFileError,
    expand,
    kind_of,
    stem_of,
)
from rollout.problems.text import problem_id, problem_key

_KINDS = (
    ("integer", re.compile(r"[-+]?\$?\d[\d,]*\$?")),
    ("decimal", re.compile(r"[-+]?\$?\d*\.\d+\$?")),
    ("fraction", re.compile(r"\$?[-+]?(?:\\[dt]?frac\{-?\d+\}\{\d+\}|\d+/\d+)\$?")),
    ("choice", re.compile(r"\(?(?:\\text(?:bf)?\{)?\(?[A-E]\)?\}?")),
    ("words", re.compile(r"(?:\\text\{)?[A-Za-z][A-Za-z ,.'-]+\}?")),
)


@dataclass(slots=True, kw_only=True)
class Stats:
    """Counts over a problem file."""

    file: str
    format: str
    rows: int = 0
    unreadable: int = 0
    by_source: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (source, level); level "?" where nothing says."""
    answers: Counter[str] = field(default_factory=Counter)
    """By kind: integer, decimal, fraction, choice, words, expression, none."""
    characters: tuple[int, ...] = ()
    """Of the problem texts: least, median, 95 % and most."""


def problem_stats(name: str, progress: Progress = lambda stage, done, total: None) -> Stats:
    """Read a problem file of any known format and count.

    Raises:
        ProblemFileError: the file is missing, of no known format, or would be read wrongly.
    """
    (name,) = expand([name])
    source, convert = RowFile(name), None
    stats = Stats(file=name, format="unreadable")
    lengths: list[int] = []
    for row in source.rows():
        stats.rows += 1
        if stats.rows % 2048 == 0:
            progress("reading", source.position, source.size)
        try:
            if row.error is not None:
                raise RowError(row.error)
            if convert is None:
                stats.format = detect(row.data, source.at(row))
                convert = converter(stats.format, subsets=None)
            draft = convert(row.data, stem_of(name))
        except WholeFileError as wrong:
            raise ProblemFileError(f"{source.at(row)}: {wrong}") from wrong
        except RowError:
            stats.unreadable += 1
            continue
        level = draft.level.value if draft.level is not None else "?"
        stats.by_source[draft.source, level] += 1
        stats.answers[_answer_kind(draft.answer)] += 1
        lengths.append(len(draft.problem))
    if lengths:
        quantiles = np.quantile(np.array(lengths), [0, 0.5, 0.95, 1], method="nearest")
        stats.characters = tuple(int(value) for value in quantiles)
    return stats


def _answer_kind(answer: str | None) -> str:
    if answer is None:
        return "none"
    text = answer.strip()
    return next((name for name, form in _KINDS if form.fullmatch(text)), "expression")


def check_problems(
    name: str,
    against: Sequence[str] = (),
    *,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[list[str], ImportReport]:
    """Everything wrong with a problem file, a sentence each; empty: nothing is.

    A table of `rstar problems import` must also have its columns, and ids that fit the texts.

    Raises:
        ProblemFileError: the file or a benchmark is missing or of no known format.
    """
    settings = ImportSettings(inputs=(name,), against=tuple(against), subsets=None)
    report = import_problems(settings, None, progress=progress)
    wrong = [f"{count} rows: {reason}" for reason, count in report.set_aside().items()]
    counts = {
        "rows cannot be used": report.total("bad"),
        "rows repeat the text of another": report.total("exact_duplicates"),
        "rows are near-duplicates of another": report.total("near_duplicates"),
        "repeated rows have another answer than the first": report.other_answers,
        "rows say no level, nor does their source": report.total("assumed_levels"),
    }
    wrong += [f"{count} {what}" for what, count in counts.items() if count]
    wrong += [
        f"{item.removed} rows share a text or 13 words with {item.file}"
        for item in report.benchmarks
        if item.removed
    ]
    if not report.total("rows"):
        wrong.append("the file has no rows")
    return wrong + _wrong_in_own_table(name), report


def _wrong_in_own_table(name: str) -> list[str]:
    path = Path(name)
    if kind_of(path) != ".parquet" or not path.is_file():
        return []
    with pq.ParquetFile(path) as file:
        if VERSION_KEY not in (file.schema_arrow.metadata or {}):
            return []
        missing = [column for column in PROBLEM_SCHEMA.names if column not in file.schema.names]
        if missing:
            return [f"columns are missing: {', '.join(missing)}"]
        seen: set[str] = set()
        counts = {"ids do not fit their text": 0, "ids are repeated": 0, "levels are unknown": 0}
        for batch in file.iter_batches(columns=["id", "problem", "level"]):
            for row in batch.to_pylist():
                text = row["problem"] or ""
                counts["ids do not fit their text"] += row["id"] != problem_id(problem_key(text))
                counts["ids are repeated"] += row["id"] in seen
                counts["levels are unknown"] += row["level"] not in set(Level)
                seen.add(row["id"])
    return [f"{count} {what}" for what, count in counts.items() if count]
