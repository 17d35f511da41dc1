"""What every process of a run logs, in one place, and how to find it again.

    logger.warning("A lease expired job=%s", ...)      a sentence, then ids
      -> RUN/logs/PROCESS.jsonl   {"unix_s", "level", "process", "logger", "text", "ids": {...}}
      -> rstar logs RUN           all processes, by time; --problem, --job, --level, --follow

A line's ids are those at the end of its sentence, those of the search the task is busy with
(`ids`: problem, job, lease), and those of the process (replica, policy version), in this order of
precedence. So a call that a pool tries again says which problem it was for.

A process writes its own file, about 2 x 16 MiB at most (`cluster.telemetry.lines`; on a bucket, in
parts). A file that cannot be written is no reason to stop: the line is lost. Warnings also go where
they went before, to the process's stderr.

Not covered: what vLLM and Ray log themselves, which Ray keeps in its session folder; processes of
the sandbox.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from cluster.telemetry.lines import Lines
from rollout.run_store import RunStore

FOLDER = "logs"
PACKAGES = ("cluster", "learner", "rollout", "verifier")
MAX_BYTES = 16 * 2**20

_IDS_AT_END = re.compile(r"(?:\s[a-z_]+=\S+)+$")

_ids: ContextVar[Mapping[str, str]] = ContextVar("rstar_log_ids", default={})  # noqa: B039


@contextmanager
def ids(**known: Any) -> Iterator[None]:
    """Lines logged inside, by this task and those it starts, carry these ids."""
    token = _ids.set({**_ids.get(), **{name: str(value) for name, value in known.items()}})
    try:
        yield
    finally:
        _ids.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of one process."""

    unix_s: float
    level: str
    process: str
    logger: str
    text: str
    """The sentence, its ids still at the end; with the traceback, if there is one."""
    ids: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line, without the newline."""
        record = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> LogLine | None:
        """None for a line that is cut off or of something else."""
        try:
            return cls(**json.loads(line))
        except (TypeError, ValueError):
            return None


class _Handler(logging.Handler):
    def __init__(self, lines: Lines, process: str, process_ids: Mapping[str, str]) -> None:
        super().__init__()
        self.lines = lines
        self.process = process
        self.process_ids = dict(process_ids)

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        found = _IDS_AT_END.search(text)
        own = dict(pair.split("=", 1) for pair in found.group().split()) if found else {}
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return LogLine(
            unix_s=round(record.created, 4),
            level=record.levelname,
            process=self.process,
            logger=record.name,
            text=text,
            ids={**self.process_ids, **_ids.get(), **own},
        ).to_json()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.lines.add(self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self.lines.close()
        super().close()


_handler: _Handler | None = None


def begin(store: RunStore, process: str, *, level: str = "info", **process_ids: Any) -> None:
    """Keep what this process logs from now on in the run's folder.

    Args:
        store: of the run.
        process: unique in the run: "policy-0".
        level: see `set_level`.
        process_ids: carried by every line.
    """
    global _handler
    end()
    root = logging.getLogger()
    if not root.handlers:
        # Ours would take away the last resort that prints warnings.
        loud = logging.StreamHandler()
        loud.setLevel(logging.WARNING)
        root.addHandler(loud)
    for handler in root.handlers:
        # They get our packages' lines whatever root's own level is.
        handler.setLevel(max(handler.level, root.getEffectiveLevel()))
    known = {name: str(value) for name, value in process_ids.items()}
    lines = Lines(store, f"{FOLDER}/{process}.jsonl", max_bytes=MAX_BYTES)
    _handler = _Handler(lines, process, known)
    for package in PACKAGES:
        logging.getLogger(package).addHandler(_handler)
    set_level(level)


def set_level(level: str) -> None:
    """Keep lines of this level and above: debug, info, warning or error."""
    if _handler is None:
        return
    _handler.setLevel(level.upper())
    shown = logging.getLogger().getEffectiveLevel()
    for package in PACKAGES:
        logging.getLogger(package).setLevel(min(shown, _handler.level))


def end() -> None:
    """Keep nothing more of what this process logs."""
    global _handler
    if _handler is None:
        return
    for package in PACKAGES:
        logging.getLogger(package).removeHandler(_handler)
    _handler.close()
    _handler = None


def carry(**process_ids: Any) -> None:
    """Have every further line of this process carry these ids, as the policy version it serves."""
    if _handler is not None:
        _handler.process_ids.update({name: str(value) for name, value in process_ids.items()})


# ------------------------------------------------------------------------------- reading


def read(store: RunStore) -> list[LogLine]:
    """All lines of a run, in order of time; lines that are cut off are left out."""
    while True:
        try:
            found = store.read_many([*store.sizes(FOLDER)])
            break
        except FileNotFoundError:
            continue  # one was rotated away meanwhile
    lines = (line for data in found.values() for line in _lines_of(data))
    return sorted(lines, key=lambda line: line.unix_s)


def read_ends(store: RunStore, most_bytes: int = 1 << 16) -> list[LogLine]:
    """The last lines of every process, in order of time."""
    found: list[LogLine] = []
    for path, size in store.sizes(FOLDER).items():
        with suppress(FileNotFoundError):  # rotated away meanwhile
            found += _lines_of(store.read(path, start=max(0, size - most_bytes)))
    return sorted(found, key=lambda line: line.unix_s)


def _lines_of(data: bytes) -> Iterator[LogLine]:
    for text in data.decode(errors="replace").splitlines():
        line = LogLine.from_json(text)
        if line is not None:
            yield line


def follow(store: RunStore, *, pause_s: float = 0.5) -> Iterator[LogLine]:
    """Lines written from now on, of processes that start later too; for ever."""
    read_to = store.sizes(FOLDER)
    while True:
        found: list[LogLine] = []
        for path, size in store.sizes(FOLDER).items():
            begin_at = read_to.get(path, 0)
            if size < begin_at:  # rotated
                begin_at = 0
            if size == begin_at:
                continue
            try:
                data = store.read(path, start=begin_at)
            except FileNotFoundError:
                continue  # rotated away meanwhile
            whole = data[: data.rfind(b"\n") + 1]
            read_to[path] = begin_at + len(whole)
            found += _lines_of(whole)
        yield from sorted(found, key=lambda line: line.unix_s)
        time.sleep(pause_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFilter:
    """Which lines are wanted; what is "" or empty does not matter."""

    problem: str = ""
    jobs: frozenset[str] = frozenset()
    """With `problem`: lines about these jobs as a whole count too."""
    lease: str = ""
    process: str = ""
    """Beginning of its name."""
    level: int = logging.NOTSET
    since_unix_s: float = 0.0

    def takes(self, line: LogLine) -> bool:
        """True if the line is wanted."""
        return (
            line.unix_s >= self.since_unix_s
            and logging.getLevelNamesMapping().get(line.level, 0) >= self.level
            and line.process.startswith(self.process)
            and (not self.lease or line.ids.get("lease") == self.lease)
            and self._takes_subject(line.ids)
        )

    def _takes_subject(self, ids: Mapping[str, str]) -> bool:
        if self.problem:
            about = ids.get("problem")
            return about == self.problem or (about is None and ids.get("job") in self.jobs)
        return not self.jobs or ids.get("job") in self.jobs


def select(lines: Iterable[LogLine], wanted: LogFilter) -> Iterator[LogLine]:
    """The lines that are wanted, in the same order."""
    return (line for line in lines if wanted.takes(line))
