"""A run as experiment trackers show it: `tracking: [tensorboard, mlflow, wandb]`, `rstar track`.

    RUN/config.yaml ----------------------> parameters
    RUN/stages, evaluations, rulers ------> metrics over rounds; rounds.csv, all of them
    RUN/checkpoints/*/metrics.jsonl ------> metrics over training steps
    RUN/*.html, *.png, *.json, lineage ---> files
    RUN/tracking.json <-------------------- link, what was told, the last error

A process of its own reads what the run wrote anyway, so a run on a bucket is followed as one on a
disk, one that has ended can be told afterwards, and a tracker that hangs, fails or eats its memory
does the run no harm. The driver starts it (`Following`) and holds its standard input: when that
ends, however the driver ended, what is left is told and the process ends, too.

Each tracker has an account of its own of what it was told, in `tracking.json`: one that could not
be reached is warned of once, tried again after a growing pause, and then told everything it missed;
a run that is started again goes on in the same run there. Told twice is only what was told in the
moments before a kill.

The rounds' numbers are what stands in the records, by its path there (`rollout/totals/trees`,
`train_ppm/metrics/pair_accuracy`, `held_out/greedy/all`). Optimiser steps are counted through all
rounds, so that a curve of four rounds is one curve.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import hashlib
import io
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder
from cluster.telemetry import logs
from cluster.telemetry.live import read_live
from cluster.telemetry.trackers import Point, Tracker, check_trackers, flatten, open_tracker
from rollout.run_store import StoreError

logger = logging.getLogger(__name__)

TRACKING = "tracking.json"
"""Under the run."""

TABLE = "rounds.csv"

LOOK_S = 15.0
"""Between two looks at the run."""

LONGEST_PAUSE_S = 600.0
"""Between two tries of a tracker that fails."""

LAST_WORDS_S = 60.0
"""That a driver which has ended waits for its trackers."""

_FOLDERS = ("lineage", "suspects")
_NOT_TOLD = (TRACKING, "live.json")
_KINDS = ("policy", "ppm")
_BATCH = 200
"""Points told at a time, between two notes of how far it is."""


class Following:
    """The driver's side: the process that follows its run."""

    def __init__(
        self, folder: RunFolder, trackers: Sequence[str], note: Callable[[str], None]
    ) -> None:
        """
        Args:
            note: takes a line for people, in a thread.
        """
        self._folder = folder
        self._trackers = list(trackers)
        self._note = note
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._ending = False

    def start(self) -> None:
        """Have the run followed until this process ends; nothing is done without trackers.

        Raises:
            ConfigError: a tracker is not installed here.
        """
        if not self._trackers or self._process is not None:
            return
        check_trackers(self._trackers)
        store = self._folder.store
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.telemetry.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is the driver's
        )
        given = {"run": store.root, "trackers": self._trackers, "storage": self._folder.storage}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(given) + "\n")
            self._process.stdin.flush()
        self._thread = threading.Thread(target=self._listen, name="tracking", daemon=True)
        self._thread.start()
        # The report page is written when all else is over.
        atexit.register(self.end)

    def end(self) -> None:
        """Let it tell what is left, for a while, and end it."""
        atexit.unregister(self.end)
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._ending = True
            self._process.kill()
            self._process.wait()
            self._note(
                f"trackers were not told everything within {LAST_WORDS_S:.0f} s; the rest: "
                f"rstar track {self._folder.store.root}"
            )
        if self._thread is not None:
            self._thread.join()
        self._process = None

    def _listen(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError, TypeError):
                self._note(json.loads(line)["note"])
        status = process.wait()
        if status != 0 and not self._ending:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            self._note(
                f"the process that tells the trackers ended ({how}); the run goes on; afterwards: "
                f"rstar track {self._folder.store.root}"
            )


@dataclass(slots=True, kw_only=True)
class Account:
    """What one tracker was told of a run."""

    link: str = ""
    error: str = ""
    """Why it could not be told the last time; "" if it was."""
    steps: dict[str, dict[str, int]] = field(default_factory=lambda: {k: {} for k in _KINDS})
    """Kind of model -> round -> last step told."""
    records: dict[str, str] = field(default_factory=dict)
    """Record -> digest of the numbers told."""
    files: dict[str, str] = field(default_factory=dict)
    """File -> digest of what was told."""


@dataclass(slots=True)
class _Told:
    """A tracker, and when it is tried again."""

    account: Account
    tracker: Tracker | None = None
    failures: int = 0
    next_s: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    """Training log -> its bytes when all in it was told."""


class Follower:
    """Tells trackers of one run; see the module."""

    def __init__(
        self,
        folder: RunFolder,
        trackers: Sequence[str],
        tell: Callable[[str], None],
        *,
        opener: Callable[..., Tracker] = open_tracker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tell: takes a line for people.
        """
        self._folder = folder
        self._tell = tell
        self._opener = opener
        self._clock = clock
        known = folder.read(TRACKING) or {}
        self._told = {name: _Told(Account(**known.get(name, {}))) for name in trackers}
        self._others = {name: known[name] for name in known if name not in trackers}
        self._written = ""
        self._stamps: dict[str, str] = {}
        self._contents: dict[str, bytes] = {}
        """Small files as they were read last."""

    def turn(self, *, last: bool = False) -> bool:
        """Tell every tracker what is new to it; with `last` also those that wait for a try.

        Returns:
            True if all of them know everything.
        """
        try:
            points, files = self._records()
        except (StoreError, RuntimeError, ValueError) as error:
            logger.warning("The run cannot be read for its trackers: %s", error)
            return False
        for name, told in self._told.items():
            if not last and self._clock() < told.next_s:
                continue
            try:
                self._tell_one(name, told, points, files)
            except Exception as error:  # of a library that anything may go wrong in
                self._failed(name, told, error)
            else:
                if told.account.error:
                    self._tell(f"{name}: told again, and all that it missed")
                told.account.error, told.failures = "", 0
        self._keep()
        return not any(told.account.error for told in self._told.values())

    def close(self, state: str) -> None:
        """The run is at its end, or its driver."""
        for name, told in self._told.items():
            if told.tracker is None or told.account.error:
                continue
            try:
                told.tracker.close(state)
            except Exception as error:
                self._failed(name, told, error)
        self._keep()

    # ------------------------------------------------------------------ one tracker

    def _tell_one(
        self, name: str, told: _Told, points: Mapping[str, Point], files: Mapping[str, bytes]
    ) -> None:
        account = told.account
        if told.tracker is None:
            config = self._config()
            title = f"{config.get('name', 'run')} ({self._folder.name})"
            run_id = self._folder.store.identify()
            told.tracker = self._opener(name, self._folder, run_id, title, config)
            if told.tracker.link != account.link:
                account.link = told.tracker.link
                self._tell(f"{name}: {account.link}")
            self._keep()
        for record, point in points.items():
            digest = _digest(json.dumps(sorted(point.values.items())).encode())
            if account.records.get(record) != digest:
                told.tracker.log([point])
                account.records[record] = digest
        for kind, number, last, rows in self._steps(account, told.sizes):
            told.tracker.log(rows)
            account.steps[kind][number] = last
            self._keep()
        for path, data in files.items():
            digest = _digest(data)
            if account.files.get(path) != digest:
                told.tracker.file(path, data)
                account.files[path] = digest
        told.tracker.flush()

    def _failed(self, name: str, told: _Told, error: Exception) -> None:
        """Warn once, and try again after a while, from the beginning where it never began."""
        text = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        if not told.account.error:
            self._tell(f"{name} is not told of the run: {text}; tried again, the run goes on")
            logger.warning("A tracker could not be told tracker=%s", name, exc_info=error)
        told.account.error = text
        told.failures += 1
        pause_s = min(LOOK_S * 2 ** (told.failures - 1), LONGEST_PAUSE_S)
        told.next_s = self._clock() + pause_s

    def _keep(self) -> None:
        record = {name: _plain(told.account) for name, told in self._told.items()}
        text = json.dumps({**self._others, **record}, indent=1)
        if text == self._written:
            return
        with contextlib.suppress(StoreError):
            self._folder.store.put(TRACKING, text.encode(), durable=False)
            self._written = text

    # ------------------------------------------------------------------ the run

    def _config(self) -> dict[str, Any]:
        """Of the run, or of the training that `rstar train` did."""
        trained = (self._folder.read(f"train/{kind}.json") for kind in _KINDS)
        return self._folder.config() or next(filter(None, trained), {})

    def _records(self) -> tuple[dict[str, Point], dict[str, bytes]]:
        """Numbers of the rounds by record, and the files to keep."""
        points: dict[str, Point] = {}
        for path in [
            *self._folder.store.files("stages"),
            *self._folder.store.files("evaluations"),
            *self._folder.store.files("rulers"),
        ]:
            number, _, rest = path.removesuffix(".json").partition("round=")[2].partition("-")
            if not number.isdigit() or not path.endswith(".json"):
                continue
            record = json.loads(self._read(path))
            values = _numbers(path.partition("/")[0], rest, record)
            if values:
                points[path] = Point(axis="round", step=int(number), values=values)
        names = [path.lstrip("/") for path in self._folder.store.files("")]
        names = [
            name
            for name in names
            if name.endswith((".yaml", ".json", ".html", ".png", ".md")) and name not in _NOT_TOLD
        ]
        names += [path for folder in _FOLDERS for path in self._folder.store.files(folder)]
        files = {name: self._read(name) for name in names}
        evaluation = files.get("evaluation.json")
        if evaluation is not None:
            points["evaluation.json"] = Point(
                axis="round", step=0, values=_summaries(json.loads(evaluation))
            )
        if points:
            files[TABLE] = _table(points.values())
        return points, files

    def _steps(
        self, account: Account, sizes: dict[str, int]
    ) -> Iterator[tuple[str, str, int, list[Point]]]:
        """(kind, round, last step, points) of training steps that a tracker does not know."""
        for kind in _KINDS:
            for number in self._folder.rounds("checkpoints"):
                known = account.steps[kind].setdefault(str(number), 0)
                place = f"checkpoints/round={number}/{kind}"
                size = self._folder.store.sizes(place).get(f"{place}/metrics.jsonl", 0)
                if not size or sizes.get(place) == size:
                    continue
                before = sum(
                    last for earlier, last in account.steps[kind].items() if int(earlier) < number
                )
                log = self._folder.training_log(kind, number)
                rows = [row for row in _rows(log) if row["step"] > known]
                for at in range(0, len(rows), _BATCH):
                    batch = rows[at : at + _BATCH]
                    last = batch[-1]["step"]
                    points = [
                        Point(axis=kind, step=before + row.pop("step"), values=flatten(row, kind))
                        for row in ({**row, "round": number} for row in batch)
                    ]
                    yield kind, str(number), last, points
                sizes[place] = size

    def _read(self, path: str) -> bytes:
        """A small file, from memory unless it was written anew."""
        try:
            stamp = self._folder.store.stamp(path)
        except (StoreError, FileNotFoundError):
            stamp = ""
        if not stamp or self._stamps.get(path) != stamp:
            self._contents[path] = self._folder.store.read(path)
            self._stamps[path] = stamp
        return self._contents[path]


def follow(
    folder: RunFolder,
    trackers: Sequence[str],
    tell: Callable[[str], None],
    ended: threading.Event,
) -> bool:
    """Tell trackers of a run until `ended` is set, and then what is left.

    Returns:
        True if every tracker knows everything.
    """
    follower = Follower(folder, trackers, tell)
    while not ended.is_set():
        follower.turn()
        ended.wait(LOOK_S)
    knows = follower.turn(last=True)
    follower.close(_state(folder))
    return knows


def track(run: RunFolder, trackers: Sequence[str], tell: Callable[[str], None]) -> bool:
    """Tell trackers of a run once, as it stands.

    Returns:
        True if every tracker knows everything.
    Raises:
        ConfigError: a tracker is not installed here, none is named, or a driver tells it.
    """
    if not trackers:
        raise ConfigError(f"{run.store.root}: its config names no tracker; give --to")
    check_trackers(trackers)
    live = read_live(run.store)
    if live is not None and live.claims_to_run and live.fresh(time.time()):
        raise ConfigError(f"{run.store.root}: its driver runs; what it tracks is told by itself")
    ended = threading.Event()
    ended.set()
    return follow(run, trackers, tell, ended)


def links(folder: RunFolder) -> dict[str, dict[str, str]]:
    """Where a run is tracked: by tracker its link, and why it could not be told last ("")."""
    try:
        known = folder.read(TRACKING) or {}
        return {n: {"link": a["link"], "error": a["error"]} for n, a in known.items()}
    except (RuntimeError, KeyError, TypeError, AttributeError):
        return {}


def _state(folder: RunFolder) -> str:
    """How the run ended, for its trackers."""
    live = read_live(folder.store)
    if live is None:  # `rstar train` keeps no account
        return "finished" if folder.store.files("stages") else "failed"
    return "stopped" if live.claims_to_run else live.state


def _numbers(kind: str, stage: str, record: dict[str, Any]) -> dict[str, float]:
    """What a record of a round says, by the metric's name."""
    problems = record.pop("problems", None)
    if kind == "evaluations":
        return _shares(problems or [])
    record.pop("round", None)
    return flatten(record, stage if kind == "stages" else "ruler")


def _shares(problems: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share right of held-out problems by method, level and over all."""
    sums: dict[str, list[bool]] = {}
    for row in problems:
        for method, right in row.items():
            if isinstance(right, bool):
                for level in (row["level"], "all"):
                    sums.setdefault(f"held_out/{method}/{level}", []).append(right)
    return {name: sum(found) / len(found) for name, found in sums.items()}


def _summaries(report: Mapping[str, Any]) -> dict[str, float]:
    """What `rstar evaluate` measured."""
    found: dict[str, float] = {}
    for summary in report.get("summaries", ()):
        name = f"{summary['benchmark']}/{summary['method']}-{summary['budget']}"
        found |= flatten({k: v for k, v in summary.items() if k != "budget"}, name)
    return found


def _table(points: Any) -> bytes:
    """A row per round, a column per number."""
    rounds: dict[int, dict[str, float]] = {}
    for point in points:
        rounds.setdefault(point.step, {}).update(point.values)
    columns = sorted({name for values in rounds.values() for name in values})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["round", *columns], lineterminator="\n")
    writer.writeheader()
    for number in sorted(rounds):
        writer.writerow({"round": number, **rounds[number]})
    return text.getvalue().encode()


def _rows(log: bytes) -> Iterator[dict[str, Any]]:
    """Steps of a training log, without a last line that is cut off."""
    for line in log.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _plain(account: Account) -> dict[str, Any]:
    return {name: getattr(account, name) for name in Account.__slots__}


def _main() -> None:
    """The process that `Following` starts: its input says what to follow, and when to end."""
    given = json.loads(sys.stdin.readline())
    out = sys.stdout
    sys.stdout = sys.stderr  # a library may print
    folder = RunFolder(given["run"], storage=given["storage"])
    logs.begin(folder.store, "tracking")
    ended = threading.Event()

    def listen() -> None:
        while sys.stdin.readline():
            pass
        ended.set()

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):  # the driver is gone
            out.write(json.dumps({"note": text}) + "\n")
            out.flush()

    threading.Thread(target=listen, daemon=True).start()
    follow(folder, given["trackers"], tell, ended)
    logs.end()


if __name__ == "__main__":
    _main()
