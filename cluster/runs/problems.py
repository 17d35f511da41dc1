"""What `rstar problems` shows: a progress bar while problems are read, then tables.

The work is in `rollout.problems`; here is only the terminal.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.telemetry.progress import say
from rollout.problems.decontamination import HitKind
from rollout.problems.import_report import ImportReport, ImportSettings, report_folder
from rollout.problems.importer import Progress as Report
from rollout.problems.importer import import_problems
from rollout.problems.rows import ProblemFileError, stem_of
from rollout.problems.summary import Stats, check_problems, problem_stats


def run_import(
    settings: ImportSettings, out: Path, console: Console, *, force: bool = False
) -> ImportReport:
    """Import with a bar, then the tables.

    Args:
        force: an existing output is replaced.
    Raises:
        ProblemFileError: bad input, or the output exists.
        KeyboardInterrupt: Ctrl-C or SIGTERM; nothing was written.
    """
    if out.suffix != ".parquet":
        raise ProblemFileError(f"--out {out}: expected a name ending in .parquet")
    if not force and (out.exists() or report_folder(out).exists()):
        there = out if out.exists() else report_folder(out)
        raise ProblemFileError(f"{there}: exists; --force replaces it")
    with _bar(console) as progress:
        report = import_problems(settings, out, progress=progress)
    print_import(report, console)
    return report


def run_check(name: str, against: tuple[str, ...], console: Console) -> bool:
    """Check a file, say what is wrong; True: nothing is."""
    with _bar(console) as progress:
        wrong, report = check_problems(name, against, progress=progress)
    for example in report.bad_examples:
        say(console, f"  {example}")
    for sentence in wrong:
        say(console, f"wrong: {sentence}")
    rows = f"{name}: {report.total('rows'):,} rows"
    compared = f", compared with {len(against)} benchmark files" if against else ""
    say(console, f"{rows}{compared}: {'not in order' if wrong else 'in order'}")
    return not wrong


def run_stats(name: str, console: Console) -> Stats:
    """Print what a file holds."""
    with _bar(console) as progress:
        stats = problem_stats(name, progress)
    say(console, f"{name}: {stats.rows:,} rows, format {stats.format}")
    if stats.unreadable:
        say(console, f"{stats.unreadable:,} rows cannot be used")
    table = _table("source", "level", counts=["problems"])
    for (source, level), count in sorted(stats.by_source.items()):
        table.add_row(source, level, f"{count:,}")
    console.print(table)
    kinds = _table("answer", counts=["problems"])
    for kind, count in stats.answers.most_common():
        kinds.add_row(kind, f"{count:,}")
    console.print(kinds)
    if stats.characters:
        least, median, most_of, most = stats.characters
        say(
            console,
            f"characters of a problem: {least} to {most}, median {median}, 95 % up to {most_of}",
        )
    return stats


def print_import(report: ImportReport, console: Console) -> None:
    """The counts of an import: files, what was set aside, benchmarks, bad rows.

    Columns of files: `same` and `near` are duplicates, `bench` met a benchmark, `aside` was set
    aside. Of benchmarks: `met` counts its problems, the others rows of the files.
    """
    names = ("rows", "kept", "same", "near", "bench", "aside", "bad")
    table = _table("file", "format", counts=names)
    for file in report.files:
        counts = (
            file.rows,
            file.kept,
            file.exact_duplicates,
            file.near_duplicates,
            file.contaminated,
            file.set_aside.total(),
            file.bad,
        )
        row = (f"{count:,}" for count in counts)
        table.add_row(stem_of(file.file), file.format or "unreadable", *row)
    console.print(table)
    for reason, count in report.set_aside().most_common():
        say(console, f"set aside: {count:,} {reason}")
    if report.benchmarks:
        console.print(_benchmark_table(report))
    for example in report.bad_examples:
        say(console, f"bad row: {example}")
    if len(report.bad_examples) < report.total("bad"):
        say(console, "more bad rows: bad_rows.parquet of the report")
    if report.other_answers:
        say(
            console,
            f"{report.other_answers:,} duplicates have another answer than the problem kept",
        )
    if joined := report.total("joined_answers"):
        say(console, f"{joined:,} rows have as answer several boxes of their solution, joined")
    if assumed := report.total("assumed_levels"):
        say(console, f"{assumed:,} rows say no level, taken as math; --level says another")


def _benchmark_table(report: ImportReport) -> Table:
    names = ("problems", "met", "text", "13-gram", "near", "=answer", "removed")
    table = _table("benchmark", counts=names)
    for item in report.benchmarks:
        counts = (
            item.problems,
            len(item.found),
            item.hits[HitKind.TEXT],
            item.hits[HitKind.NGRAM],
            item.hits[HitKind.NEAR],
            item.same_answer,
            item.removed,
        )
        table.add_row(stem_of(item.file), *(f"{count:,}" for count in counts))
    return table


@contextmanager
def _bar(console: Console) -> Iterator[Report]:
    """A bar on stderr; SIGTERM acts like Ctrl-C, and both act in the background of a script too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("starting", total=None)

            def show(stage: str, done: int, total: int) -> None:
                progress.update(task, description=stage, completed=done, total=total or None)

            yield show
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _table(*names: str, counts: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in counts:
        table.add_column(name, justify="right", no_wrap=True)
    return table
