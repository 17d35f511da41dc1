"""The last hour of a run's metrics, in the run's folder: written by the driver, read by anybody.

    RUN/metrics/samples-<unix seconds>.jsonl    a segment of ten minutes; the oldest are deleted
    {"series": [["rstar_open_trees", {}], ...]}     series from now on in the rows, in this order
    {"t": 1764000000.0, "v": [12, ...]}             a row; null: no value now

So that there is something to look at without Prometheus. Rows hold every metric summed over
processes: a counter is the growth of all of them since the driver started, whoever was replaced
meanwhile. A torn last line (the driver was killed) is left out, as is a segment that cannot be
read; readers never write.

Bounded: 7 segments, at ten seconds a row about 2 MB for 400 series.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.telemetry.lines import Lines
from cluster.telemetry.metrics import CATALOGUE, Kind, Source
from rollout.run_store import RunStore, StoreError

FOLDER = "metrics"

SEGMENT_S = 600.0
NUM_SEGMENTS = 7
"""An hour and the segment that is being written."""

Labels = tuple[tuple[str, str], ...]
"""Sorted pairs of name and value."""

Key = tuple[str, Labels]
"""A series: exported name, with a histogram's suffix, and labels."""

_LINE = re.compile(r"^(\w+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_BY_SERIES_NAME = {name: metric for metric in CATALOGUE.values() for name in metric.series_names}


class ActorTotals:
    """Adds up what actors export, over processes that come, restart and go."""

    def __init__(self, run: str) -> None:
        """
        Args:
            run: only series of this run are taken.
        """
        self._run = run
        self._last: dict[str, float] = {}
        """By series of one process, as it is written."""
        self._keys: dict[str, Key | None] = {}
        """None: another run's."""
        self.totals: dict[Key, float] = {}

    def take(self, page: str) -> None:
        """Take one page of a node's agent, in Prometheus' text format."""
        for line in page.splitlines():
            if not line.startswith("ray_rstar_"):
                continue
            series, _, text = line.rpartition(" ")
            if series not in self._keys:
                self._keys[series] = self._key(line)
            key = self._keys[series]
            if key is None:
                continue
            value = float(text)
            last = self._last.get(series, 0.0)
            self._last[series] = value
            self.totals[key] = self.totals.get(key, 0.0) + (
                value - last if value >= last else value
            )

    def _key(self, line: str) -> Key | None:
        match = _LINE.match(line)
        metric = _BY_SERIES_NAME.get(match[1]) if match else None
        if match is None or metric is None or metric.source is not Source.ACTOR:
            return None
        labels = dict(_LABEL.findall(match[2]))
        if labels.get("run") != self._run:
            return None
        kept = (*metric.labels, "le") if match[1].endswith("_bucket") else metric.labels
        return match[1], tuple(sorted((name, labels.get(name, "")) for name in kept))


class SampleWriter:
    """Appends rows to the segments of a run's folder."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._keys: dict[Key, int] = {}
        self._file: Lines | None = None
        self._began_s = 0.0

    def write(self, unix_s: float, values: Mapping[Key, float]) -> None:
        """Append one row."""
        if self._file is None or unix_s - self._began_s >= SEGMENT_S:
            self._begin(unix_s)
        assert self._file is not None
        new = [key for key in values if key not in self._keys]
        if new:
            self._keys.update((key, len(self._keys) + i) for i, key in enumerate(new))
            named = [[name, dict(labels)] for name, labels in new]
            self._file.add(json.dumps({"series": named}) + "\n")
        row = [_rounded(values.get(key)) for key in self._keys]
        self._file.add(json.dumps({"t": round(unix_s, 2), "v": row}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, unix_s: float) -> None:
        self.close()
        self._keys = {}
        self._file = Lines(self._store, f"{FOLDER}/samples-{int(unix_s * 1000):013d}.jsonl")
        self._began_s = unix_s
        with contextlib.suppress(StoreError):
            for old in segments(self._store)[: 1 - NUM_SEGMENTS]:
                self._store.delete(old)


def _rounded(value: float | None) -> float | None:
    if value is None or value != value:
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")


def segments(store: RunStore) -> list[str]:
    """Files of a run that hold its samples, oldest first."""
    return [path for path in store.files(FOLDER) if path.startswith(f"{FOLDER}/samples-")]


@dataclass(slots=True)
class Series:
    """Values of one key over time; a counter never falls."""

    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def at(self, time_s: float, within_s: float) -> float | None:
        """The last value at or before a time; None if there is none within so long."""
        i = bisect.bisect_right(self.times, time_s) - 1
        if i < 0 or time_s - self.times[i] > within_s:
            return None
        return self.values[i]


class Samples:
    """What was written, as series."""

    def __init__(self) -> None:
        self.series: dict[str, dict[Labels, Series]] = {}
        self.times: list[float] = []
        """Of every row."""
        self._resets: dict[Key, float] = {}
        self._raw: dict[Key, float] = {}
        self.interval_s = 10.0
        """Usual pause between rows."""

    def add(self, unix_s: float, values: Mapping[Key, float]) -> None:
        """Take one row; rows come in the order of their times."""
        if self.times and unix_s > self.times[-1]:
            pause_s = unix_s - self.times[-1]
            known = len(self.times) > 1
            self.interval_s = min(self.interval_s, pause_s) if known else pause_s
        self.times.append(unix_s)
        for key, value in values.items():
            name, labels = key
            metric = _BY_SERIES_NAME.get(name)
            if metric is not None and metric.kind is not Kind.GAUGE:
                last = self._raw.get(key, 0.0)
                if value < last:  # another start of the run
                    self._resets[key] = self._resets.get(key, 0.0) + last
                self._raw[key] = value
                value += self._resets.get(key, 0.0)
            series = self.series.setdefault(name, {}).setdefault(labels, Series())
            series.times.append(unix_s)
            series.values.append(value)

    def row_before(self, time_s: float) -> float | None:
        """Time of the last row at or before a time; None if there is none that is not too old."""
        i = bisect.bisect_right(self.times, time_s) - 1
        if i < 0 or time_s - self.times[i] > 2.5 * self.interval_s:
            return None
        return self.times[i]

    @classmethod
    def read(cls, store: RunStore) -> Samples:
        """Everything in a run's folder; empty if there is nothing."""
        found = cls()
        # One goes now and then.
        with contextlib.suppress(FileNotFoundError):
            for data in store.read_many(segments(store)).values():
                found._read(data.decode(errors="replace").splitlines())
        return found

    def _read(self, lines: Iterable[str]) -> None:
        keys: list[Key] = []
        for line in lines:
            try:
                record = json.loads(line)
                for name, labels in record.get("series", ()):
                    keys.append((name, tuple(sorted(labels.items()))))
                if "t" in record:
                    row = zip(keys, record["v"], strict=False)
                    self.add(record["t"], {key: value for key, value in row if value is not None})
            except (ValueError, TypeError, AttributeError):
                continue
