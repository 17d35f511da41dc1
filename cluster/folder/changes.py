"""What was changed in a run's config while it went on: by whom, when, and what it was before.

    rstar set RUN key=value -------+--> RUN/lineage/changes/00001.json --look--> driver --> fleet
    a start with an edited config -+

A change is created once and never touched again: two people at once get two numbers, and the later
one counts. A start writes down what its own config says of the keys that may change (`LIVE`). Where
that differs from what the last start's config said, somebody has edited it, and that counts like
`rstar set`: the last word stands. So what was set stays over restarts, until either is changed.
"""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any, Literal, TypeVar

from cluster.folder.config_file import Config
from cluster.folder.run_folder import RunFolder, RunFolderError
from rollout.run_store import StoreError

FOLDER = "lineage/changes"

LIVE = (
    "cluster.policy.replicas",
    "cluster.ppm.replicas",
    "cluster.sandbox.replicas",
    "cluster.workers.replicas",
    "cluster.autoscale.*.min_replicas",
    "cluster.autoscale.*.max_replicas",
    "cluster.max_open_trees",
    "cluster.priority",
    "cluster.priorities",
    "cost.*",
    "log_level",
)
"""Keys that a running driver takes over within seconds; * is any one name."""

C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of one or more keys."""

    number: int
    """1, 2, ..., as they came."""
    by: Literal["set", "start"]
    """`rstar set`, or a start of the run with an edited config (the first one: as it is)."""
    who: str
    """user@host"""
    time: str
    """UTC, as 2026-01-31T12:00:00Z."""
    values: Mapping[str, Any]
    """Dotted key -> value, as in the config."""
    before: Mapping[str, Any]
    """The same keys as they were."""


def live_key(key: str) -> str | None:
    """The key of `LIVE` that this is, or stands below; None: none of them."""
    names = key.split(".")
    for pattern in LIVE:
        wanted = pattern.split(".")
        if len(names) >= len(wanted) and all(map(fnmatch, names, wanted)):
            return ".".join(names[: len(wanted)])
    return None


def live_values(config: Config) -> dict[str, Any]:
    """What a config says of the keys that may change."""
    found = {}

    def walk(value: Any, key: str) -> None:
        if key and live_key(key) == key:
            found[key] = value
        elif isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}".lstrip("."))

    walk(config.effective(), "")
    return found


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """The config with other values of some keys of `LIVE`.

    Raises:
        pydantic.ValidationError: they do not fit it.
    """
    data = config.effective()
    for key, value in values.items():
        *path, last = key.split(".")
        place = data
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    changed = type(config).model_validate(data)
    sections = {key.partition(".")[0] for key in values}
    return config.model_copy(update={name: getattr(changed, name) for name in sections})


class Changes:
    """The changes of a run, as its driver or `rstar set` sees them."""

    def __init__(self, folder: RunFolder) -> None:
        """
        Raises:
            RunFolderError, StoreError: they cannot be read.
        """
        self._folder = folder
        names = folder.store.files(FOLDER)
        self.known = [change for name in names if (change := _read(folder, name)) is not None]
        """In order."""
        self.newer()  # a listing may lack what was made a moment ago

    def newer(self) -> list[Change]:
        """Those that came since the last look; one small read if there is none.

        Raises:
            RunFolderError: they cannot be read.
        """
        found: list[Change] = []
        while (change := _read(self._folder, _name(self.last + 1))) is not None:
            self.known.append(change)
            found.append(change)
        return found

    @property
    def last(self) -> int:
        """Number of the last known one; 0: there is none."""
        return self.known[-1].number if self.known else 0

    def effective(self, config: C) -> C:
        """A start's config with what was set by others since its own keys were last edited."""
        own, said = live_values(config), self._said_by_starts()
        last: dict[str, tuple[str, Any]] = {}
        for change in self.known:
            last |= {key: (change.by, value) for key, value in change.values.items()}
        values = {
            key: value
            for key, (by, value) in last.items()
            # A pool may have ceased to scale.
            if by == "set" and key in own and said.get(key, own[key]) == own[key]
        }
        return with_values(config, values) if values else config

    def record_start(self, config: Config) -> None:
        """Write down what a start's own config says that the last start's did not.

        Raises:
            RunFolderError: it cannot be written.
        """
        said = self._said_by_starts()
        edited = {k: v for k, v in live_values(config).items() if k not in said or said[k] != v}
        if edited:
            before = {key: said[key] for key in edited if key in said}
            self.record(edited, before, by="start")

    def record(
        self,
        values: Mapping[str, Any],
        before: Mapping[str, Any],
        *,
        by: Literal["set", "start"] = "set",
    ) -> Change:
        """Add a change, behind those that others add at the same time.

        Raises:
            RunFolderError: it cannot be written.
        """
        while True:
            self.newer()
            change = Change(
                number=self.last + 1,
                by=by,
                who=f"{_user()}@{socket.gethostname()}",
                time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                values=dict(values),
                before=dict(before),
            )
            data = json.dumps(asdict(change), indent=1).encode()
            name = _name(change.number)
            try:
                # After an unclear answer a second try finds the file of the first.
                made = self._folder.store.create(name, data)
                made = made or self._folder.read_bytes(name) == data
            except StoreError as error:
                raise RunFolderError(f"{self._folder.at(name)}: {error}") from error
            if made:
                self.known.append(change)
                return change

    def _said_by_starts(self) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for change in self.known:
            if change.by == "start":
                said |= change.values
        return said


def _read(folder: RunFolder, name: str) -> Change | None:
    record = folder.read(name)
    try:
        return None if record is None else Change(**record)
    except TypeError as error:
        raise RunFolderError(f"{folder.at(name)}: not a change: {error}") from error


def _name(number: int) -> str:
    return f"{FOLDER}/{number:05d}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
