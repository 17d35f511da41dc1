"""What an import was told, what became of every row, and the page that says so to people.

`report.json` holds the same numbers for programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollout.problem import DecontaminationRule, Level
from rollout.problems.decontamination import MAX_PROBLEMS_WITH_NGRAM, HitKind
from rollout.problems.formats import PAPER_SUBSETS

FORMAT_VERSION = 1
"""Of problems tables and their reports."""
MAX_SHOWN_HITS = 200
"""Hits in the page for people; the table has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """What is imported, and how it is judged."""

    inputs: tuple[str, ...]
    """Files, folders, or hf://owner/name."""
    against: tuple[str, ...] = ()
    """Benchmark files."""
    format: str | None = None
    """None: told from the columns, file by file."""
    columns: Mapping[str, str] | None = None
    drop: tuple[str, ...] = ()
    """Columns that are taken as not there, in benchmarks too."""
    source: str | None = None
    """Source of every row; None: as the rows say."""
    level: Level | None = None
    """Level of every row; None: as the rows or their source say."""
    subsets: tuple[str, ...] | None = PAPER_SUBSETS
    """Subsets of NuminaMath that are kept; None: all."""
    rule: DecontaminationRule = DecontaminationRule.ANY
    near_duplicates: bool = True
    """False: only exact ones are looked for."""
    keep_solutions: bool = False


@dataclass(slots=True, kw_only=True)
class FileReport:
    """What became of the rows of one file."""

    file: str
    format: str | None = None
    """None: no row could be read."""
    rows: int = 0
    kept: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """By reason."""
    bad: int = 0
    assumed_levels: int = 0
    """Rows of which nothing said the level, so that "math" was taken."""
    joined_answers: int = 0
    """Rows whose answer was put together from several boxes of the solution, kept or not."""

    @property
    def duplicates(self) -> int:
        return self.exact_duplicates + self.near_duplicates

    @property
    def accounted(self) -> int:
        return self.kept + self.duplicates + self.contaminated + self.set_aside.total() + self.bad


@dataclass(slots=True, kw_only=True)
class BenchmarkReport:
    """What was found of one benchmark."""

    file: str
    problems: int
    bad_rows: int
    sha256: str
    """Of the file; "" for a hub data set."""
    hits: Counter[str] = field(default_factory=Counter)
    """Training rows by kind of hit."""
    same_answer: int = 0
    removed: int = 0
    found: set[str] = field(default_factory=set)
    """Its problems that were met at least once."""


@dataclass(slots=True, kw_only=True)
class ImportReport:
    """Everything about one import."""

    settings: ImportSettings
    files: list[FileReport] = field(default_factory=list)
    benchmarks: list[BenchmarkReport] = field(default_factory=list)
    kept_by: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kept problems by (source, level)."""
    other_answers: int = 0
    """Duplicates whose answer differs from that of the problem kept: one of the two is wrong."""
    common_ngrams: int = 0
    bad_examples: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def total(self, name: str) -> int:
        return sum(
            value.total() if isinstance(value := getattr(file, name), Counter) else value
            for file in self.files
        )

    def set_aside(self) -> Counter[str]:
        return sum((file.set_aside for file in self.files), Counter())


def report_folder(out: Path) -> Path:
    """Where the report of a problems table lies."""
    return out.parent / f"{out.stem}.report"


def report_to_json(report: ImportReport) -> dict[str, Any]:
    """Everything of a report, for programs."""
    totals = ("rows", "kept", "exact_duplicates", "near_duplicates", "contaminated", "bad")
    return {
        "version": FORMAT_VERSION,
        "settings": _fields(report.settings),
        "totals": {name: report.total(name) for name in totals}
        | {"set_aside": report.total("set_aside")},
        "joined_answers": report.total("joined_answers"),
        "set_aside": dict(report.set_aside()),
        "duplicates_with_another_answer": report.other_answers,
        "common_ngrams": report.common_ngrams,
        "files": [_fields(file) for file in report.files],
        "benchmarks": [_fields(item) | {"found": len(item.found)} for item in report.benchmarks],
        "kept": [
            {"source": source, "level": level, "problems": count}
            for (source, level), count in sorted(report.kept_by.items())
        ],
        "seconds": round(report.seconds, 1),
    }


def _fields(record: Any) -> dict[str, Any]:
    """`asdict` would take a Counter apart into its items."""
    values = ((item.name, getattr(record, item.name)) for item in fields(record))
    return {name: dict(v) if isinstance(v, Counter) else v for name, v in values}


def report_to_markdown(report: ImportReport, folder: Path) -> str:
    """The report for people; `folder` holds the tables it quotes."""
    lines = [
        *("# Import of problems", "", "## Rows by file", ""),
        "| file | format | rows | kept | exact duplicates | near duplicates | contaminated |"
        " set aside | bad |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {file.file} | {file.format or 'unreadable'} | {file.rows} | {file.kept} |"
        f" {file.exact_duplicates} | {file.near_duplicates} | {file.contaminated} |"
        f" {file.set_aside.total()} | {file.bad} |"
        for file in report.files
    ]
    totals = ("rows", "kept", "exact_duplicates", "near_duplicates", "contaminated")
    sums = [report.total(name) for name in (*totals, "set_aside", "bad")]
    lines += ["| all | | " + " | ".join(map(str, sums)) + " |", ""]
    if report.other_answers:
        lines += [
            f"{report.other_answers} duplicates have another answer than the problem kept: one of "
            "the two is wrong (`duplicates.parquet`, `same_answer`).",
            "",
        ]
    if joined := report.total("joined_answers"):
        lines += [f"{joined} rows have as answer several boxes of their solution, joined.", ""]
    if aside := report.set_aside():
        lines += ["## Set aside", "", "| reason | rows |", "|---|---:|"]
        lines += [f"| {reason} | {count} |" for reason, count in aside.most_common()] + [""]
    lines += ["## Kept", "", "| source | level | problems |", "|---|---|---:|"]
    lines += [
        f"| {source} | {level} | {count} |"
        for (source, level), count in sorted(report.kept_by.items())
    ] + [""]
    if report.benchmarks:
        lines += _contamination_lines(report, folder)
    if report.bad_examples:
        lines += ["## Bad rows, the first of them", ""]
        lines += [f"- {example}" for example in report.bad_examples] + [""]
    return "\n".join(lines)


def _contamination_lines(report: ImportReport, folder: Path) -> list[str]:
    lines = [
        "## Contamination",
        "",
        f"Rule: {_RULES[report.settings.rule]} {report.common_ngrams} runs of 13 words stand in "
        f"more than {MAX_PROBLEMS_WITH_NGRAM} problems of one benchmark and count for none.",
        "",
        "| benchmark | problems | of them met | rows with its text | with 13 words of it |"
        " near it | with its answer | removed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {item.file} | {item.problems} | {len(item.found)} | {item.hits[HitKind.TEXT]} |"
        f" {item.hits[HitKind.NGRAM]} | {item.hits[HitKind.NEAR]} | {item.same_answer} |"
        f" {item.removed} |"
        for item in report.benchmarks
    ]
    lines += ["", "SHA-256 of the benchmark files:", ""]
    lines += [f"- `{item.sha256}` {item.file}" for item in report.benchmarks]
    lines += ["", "### Hits", ""]
    table = pq.read_table(folder / "contaminated.parquet")
    if table.num_rows > MAX_SHOWN_HITS:
        lines += [f"The first {MAX_SHOWN_HITS} of {table.num_rows}; all: `contaminated.parquet`."]
        lines += [""]
    lines += [
        "| row | benchmark problem | kind | overlap | answers | matched |",
        "|---|---|---|---:|---|---|",
    ]
    for hit in table.slice(0, MAX_SHOWN_HITS).to_pylist():
        answers = "same" if hit["same_answer"] else "differ"
        matched = hit["matched"].replace("|", "\\|").replace("`", "'")
        lines.append(
            f"| {hit['origin']} | {hit['benchmark_id']} | {hit['kind']} | {hit['overlap']:.2f} |"
            f" {answers} | `{matched}` |"
        )
    return [*lines, ""]


_RULES = {
    DecontaminationRule.ANY: "every row with a hit is removed.",
    DecontaminationRule.SAME_ANSWER: "rows with a hit are removed where the answers agree or the "
    "text is the same.",
}
