"""Where a run keeps what it made, and how it knows what is done.

    RUN/config.yaml                    the effective config of the first start
    RUN/drivers/NNNNN.json             who has the run (lease)
    RUN/run.id                         tells a new run in the same place from the one before
    RUN/versions.json                  each start: code, packages, machine, problem files (lineage)
    RUN/lineage/round=R.json           which models, grader and data made what (lineage)
    RUN/lineage/changes/NNNNN.json     what was changed while it went on, and by whom (changes)
    RUN/cost.json, estimate.json       what it has cost, and what that was thought to be
    RUN/live.json                      what the driver does right now (live)
    RUN/logs/, RUN/traces/             what each process logged, and traced if asked (docs/logs.md)
    RUN/tracking.json, RUN/tensorboard/     what experiment trackers were told (tracking)
    RUN/metrics/                       what to scrape, and the last hour of samples (exporter)
    RUN/problems.parquet               id and level of every problem to search
    RUN/problem_blocks/                the problems themselves, for the workers of the round in hand
    RUN/problems/, RUN/base/           only with the miniature: generated files, initial weights
    RUN/base_with_markers/             only if the base model's tokenizer lacks step markers
    RUN/trajectories/round=R/          trees (rollout.store)
    RUN/datasets/round=R/              SFT examples and preference pairs (learner.dataset)
    RUN/checkpoints/round=R/{policy,ppm}/   (learner.checkpoint); round 0 is the cold start
    RUN/evaluations/round=R.json       held-out verdicts per problem, read from the trees in
                       round=R/        (rollout.store)
    RUN/rulers/round=R.json            what its PPM ranks right of problems held out for pairs,
                       round=R/        read from their trees (rollout.store)
    RUN/suspects/round=R.jsonl         unsolved problems whose label may be wrong
    RUN/regrades/round=R-N.{json,jsonl}     what a newer grader judged otherwise (regrade)
    RUN/stages/round=R-STAGE.json      seconds and facts of each finished stage
    RUN/report.json, report.png, report.html    what it all showed

Everything is written and read through the run's store (`rollout.run_store`), by the names above,
which no other module joins to a path: the folder is on a file system that all machines of the
cluster see, which each process of the run that needs it checks by the run's id before it begins, or
on a bucket (s3://bucket/runs/demo). What is created once: shards' markers, manifests, CURRENT.json,
drivers/. What is replaced whole: every other record. What grows: logs/, traces/, metrics/, on a
bucket by parts (`cluster.telemetry.lines`). What is read as files (datasets, checkpoints): made on
a machine's disk and uploaded, and copied to one where it is needed (`cluster.folder.staging`).

A stage is done when its product is there, written whole; nothing else is remembered. `rstar status`
reads it from any machine, at any time, and writes nothing.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import ValidationError

from cluster.folder.config_file import Config, ConfigError
from cluster.folder.lease import LeaseHeldError, RunLease
from learner.dataset import MANIFEST
from rollout.difficulty import SuspectLabel
from rollout.files import new_folder
from rollout.problem import Problem
from rollout.run_store import RUN_ID, RunStore, StoreError, absolute

RESUMABLE = (
    "cluster",
    "cost",
    "log_level",
    "metrics",
    "policy_engine",
    "ppm_engine",
    "name",
    "run_dir",
    "sandbox",
    "storage",
    "tracing",
    "tracking",
    "endpoint.api_key_env",
    "endpoint.base_url",
    "endpoint.deadline_s",
    "endpoint.first_pause_s",
    "endpoint.max_in_flight",
    "endpoint.max_n",
    "endpoint.max_pause_s",
    "endpoint.max_total_tokens",
    "endpoint.request_timeout_s",
    "endpoint.requests_per_minute",
    "endpoint.tokens_per_minute",
)
"""What may differ when a run is continued: it says where it runs, not what it makes."""


CONFIG = "config.yaml"
COST = "cost.json"
ESTIMATE = "estimate.json"
PROBLEMS = "problems.parquet"
BASE = "base"
MARKED_BASE = "base_with_markers"
MARKED_TRUNK = "trunk_with_markers"
"""The model that the PPM grows from, where it is neither base nor policy, likewise marked."""
REPORT = "report.json"
"""What a finished run showed, under its folder."""
PAGE = "report.html"


class RunFolderError(RuntimeError):
    """A run's folder cannot be used; the message says why."""


class RunFolder:
    """Paths and small records of one run."""

    def __init__(self, root: str | Path, *, storage: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            root: a folder, or an address as s3://bucket/run.
            storage: arguments of a bucket's client.
        Raises:
            StoreError: nothing here can open such an address.
        """
        self.storage = dict(storage or {})
        self.store = RunStore(absolute(root), options=storage)
        self._lease: RunLease | None = None

    @property
    def turn(self) -> int:
        """Which driver of the run this process is, a number that grows; 0: it holds no lease."""
        return self._lease.number if self._lease is not None else 0

    @property
    def is_taken(self) -> bool:
        """Whether another driver has taken the run from this process, and all that is its."""
        return self._lease is not None and self._lease.taken_by is not None

    @property
    def root(self) -> Path:
        """The folder on a file system of this machine.

        Raises:
            RunFolderError: it is on a bucket.
        """
        if self.store.local is None:
            raise RunFolderError(f"{self.store.root}: no folder of this machine")
        return self.store.local

    @property
    def name(self) -> str:
        """Of the run, for people: the last part of where it is."""
        return self.store.root.rpartition("/")[2]

    @property
    def label(self) -> str:
        """Of the run among all others, in metrics: its name and the beginning of its id.

        Raises:
            RunFolderError: its id cannot be read.
        """
        known = self.read_bytes(RUN_ID)
        return self.name if known is None else f"{self.name}-{known.decode()[:6]}"

    def place(self, name: str) -> Path:
        """Where something of the run is, as a path that may stand for an address."""
        return Path(self.at(name))

    def dataset(self, round: int) -> Path:
        return self.place(dataset_name(round))

    def dataset_manifest(self, round: int) -> dict[str, Any] | None:
        """Of a round's dataset; None if it is not complete."""
        return self.read(f"{dataset_name(round)}/{MANIFEST}")

    @property
    def checkpoints(self) -> Path:
        return self.place("checkpoints")

    @property
    def base_model(self) -> Path:
        return self.place(BASE)

    @property
    def marked_base(self) -> Path:
        """The base model with the step markers added, if its tokenizer lacked any."""
        return self.place(MARKED_BASE)

    @property
    def problems(self) -> Path:
        return self.place("problems")

    @contextmanager
    def filling(self, name: str, *, last: str, whole: bool = False) -> Iterator[Path]:
        """A directory of this machine for what is to stand in a folder of the run.

        On a bucket what is in it is uploaded as the block ends, `last` after all else.

        Args:
            whole: on a file system, a hidden directory that takes its place as the block ends;
                False: the folder itself, whose files whoever writes them replaces whole.
        Raises:
            OSError, StoreError: it cannot be written.
        """
        if self.store.local is None:
            with tempfile.TemporaryDirectory(prefix="rstar-") as scratch:
                yield Path(scratch)
                self.store.upload(Path(scratch), name, last=last)
        elif whole:
            with new_folder(self.root / name) as hidden:
                yield hidden
        else:
            yield self.root / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it: one driver at a time (`cluster.folder.lease`).

        Raises:
            RunFolderError: it cannot be written, its store lets a key be created twice, another
                process holds it, or took it meanwhile.
        """
        lease = RunLease(self.store, lost=lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            self.store.self_check()  # what a lease rests on, too
            lease.take()
            self._lease = lease
        except StoreError as error:
            raise RunFolderError(
                f"{self.store.root}: {_why(error)}; choose another folder with --set run_dir=..."
            ) from error
        except LeaseHeldError as error:
            raise RunFolderError(
                f"{self.store.root}: in use by {error}; wait for it, or choose another folder "
                "with --set run_dir=..."
            ) from None
        try:
            yield
        except BaseException:
            if lease.taken_by is None:
                raise
        finally:
            lease.release()
        if lease.taken_by is not None:
            raise RunFolderError(
                f"{self.store.root}: {lease.taken_by} has taken over this run, since nothing was "
                "heard of this process for a while; what is committed stays"
            )

    def keep_config(self, config: Config) -> None:
        """Store the effective config, or check that the run was started with an equal one.

        Raises:
            ConfigError: it was started with another one; names the keys that differ.
        """
        effective = config.effective()
        earlier = self.config()
        if earlier is None:
            self.write_bytes(CONFIG, yaml.safe_dump(effective, sort_keys=False).encode())
            return
        # A key that is newer than the run counts as its default; one that is gone shows below.
        with suppress(ValidationError):
            earlier = type(config).model_validate(earlier).effective()
        changed = [
            name
            for name in differences(earlier, effective)
            if not any(name == part or name.startswith(f"{part}.") for part in RESUMABLE)
        ]
        if changed:
            raise ConfigError(
                f"{self.at(CONFIG)}: this run was started with other values of "
                f"{', '.join(changed[:5])}; continue with those, or choose another folder "
                "with --set run_dir=..."
            )

    def config(self) -> dict[str, Any] | None:
        """The config the run was started with, unchecked; None: it never was.

        Raises:
            RunFolderError: it cannot be read.
        """
        data = self.read_bytes(CONFIG)
        if data is None:
            return None
        try:
            config = yaml.safe_load(data)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunFolderError(f"{self.at(CONFIG)}: cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunFolderError(
                f"{self.at(CONFIG)}: expected a YAML mapping, got {type(config).__name__}"
            )
        return config

    def at(self, name: str) -> str:
        """Where something of the run is, for people."""
        return f"{self.store.root}/{name}"

    def read_bytes(self, name: str) -> bytes | None:
        """A file by its path under the run; None if it is not there.

        Raises:
            RunFolderError: it cannot be read.
        """
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None
        except StoreError as error:
            raise RunFolderError(f"{self.at(name)}: cannot be read: {error}") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole.

        Raises:
            RunFolderError: it cannot be written.
        """
        try:
            self.store.put(name, data, durable=False)
        except StoreError as error:
            raise RunFolderError(f"{self.at(name)}: {_why(error)}") from error

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON record by its path under the run; None if it is not there.

        Raises:
            RunFolderError: it cannot be read.
        """
        data = self.read_bytes(name)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise RunFolderError(f"{self.at(name)}: not JSON: {error}") from error

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a JSON record whole."""
        self.write_bytes(name, (json.dumps(record, indent=1) + "\n").encode())

    def read_lines(self, name: str) -> list[Any]:
        """The records of a file of JSON lines; [] if it is not there.

        Raises:
            RunFolderError: it cannot be read.
        """
        try:
            return [json.loads(line) for line in (self.read_bytes(name) or b"").splitlines()]
        except ValueError as error:
            raise RunFolderError(f"{self.at(name)}: cannot be read: {error}") from error

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of JSON lines whole."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.write_bytes(name, "".join(lines).encode())

    def read_table(self, name: str, columns: Sequence[str]) -> pa.Table | None:
        """Columns of a Parquet file; None if it is not there.

        Raises:
            RunFolderError: it cannot be read.
        """
        data = self.read_bytes(name)
        try:
            return None if data is None else pq.read_table(io.BytesIO(data), columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{self.at(name)}: cannot be read: {error}") from error

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file whole."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(name, sink.getvalue())

    def rounds(self, folder: str) -> list[int]:
        """Numbers of the rounds that have something in a folder of the run, ascending."""
        names = (name.removeprefix("round=") for name in self.store.folders(folder))
        return sorted(int(name) for name in names if name.isdigit())

    def stage(self, round: int, stage: str) -> dict[str, Any]:
        """Seconds and facts of a finished stage; {} if it was never recorded."""
        return self.read(_stage_name(round, stage)) or {}

    def record_stage(self, round: int, stage: str, seconds: float, **facts: Any) -> None:
        self.write(_stage_name(round, stage), {"seconds": round_to(seconds), **facts})

    def stages(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Every finished stage's record, by round and name."""
        found = {}
        for path in self.store.files("stages"):
            name = path.removeprefix("stages/").removesuffix(".json")
            number, _, stage = name.removeprefix("round=").partition("-")
            if number.isdigit():
                found[int(number), stage] = self.stage(int(number), stage)
        return found

    def training_log(self, kind: str, round: int) -> bytes:
        """What the training of a model logged; empty if it did not."""
        return self.read_bytes(f"checkpoints/round={round}/{kind}/metrics.jsonl") or b""

    def write_problems(self, problems: Sequence[Problem]) -> None:
        """Write which problems are searched: the one place that tells their number and levels."""
        table = pa.table(
            {
                "id": pa.array([problem.id for problem in problems], pa.string()),
                "level": pa.array([p.level.value for p in problems], pa.string()),
            }
        )
        self.write_table(PROBLEMS, table)

    def problem_levels(self) -> dict[str, str]:
        """Level of every problem that is searched, by id; {} if they are not written yet.

        Raises:
            RunFolderError: the file cannot be read.
        """
        table = self.read_table(PROBLEMS, ["id", "level"])
        if table is None:
            return {}
        ids, levels = (table[name].to_pylist() for name in ("id", "level"))
        return dict(zip(ids, levels, strict=True))

    def write_suspects(self, round: int, suspects: Sequence[SuspectLabel]) -> None:
        """Write the suspect labels of a round, a JSON line each, for a person to look at."""
        self.write_lines(suspects_name(round), map(asdict, suspects))

    def evaluation_name(self, round: int) -> str:
        return f"evaluations/round={round}.json"

    def ruler_name(self, round: int) -> str:
        return f"rulers/round={round}.json"


def _why(error: StoreError) -> str:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return why_not_written(cause)
    return str(error)  # what a bucket's client raises has a message and no number


def why_not_written(error: OSError) -> str:
    """For people: why a file could not be written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full ({reason})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot be written: no permission ({reason})"
    return f"cannot be written: {reason}"


def round_to(seconds: float) -> float:
    """Seconds as they are recorded."""
    return float(f"{seconds:.2f}")


def dataset_name(round: int) -> str:
    """Of the folder of a round's dataset, under the run."""
    return f"datasets/round={round}"


def suspects_name(round: int) -> str:
    """Of a round's suspect labels, under the run."""
    return f"suspects/round={round}.jsonl"


def _stage_name(round: int, stage: str) -> str:
    return f"stages/round={round}-{stage}.json"


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that are not equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            name = f"{prefix}.{key}" if prefix else str(key)
            found += differences(old.get(key), new.get(key), name)
        return found
    return [] if old == new else [prefix]


def resolve_problem(problem: str, known: Iterable[str], root: str) -> str:
    """The id that is meant by an id or the beginning of exactly one.

    Raises:
        RunFolderError: none (with the nearest ids) or several.
    """
    ids = sorted(known)
    if problem in ids:
        return problem
    longer = [i for i in ids if i.startswith(problem)] if problem else []
    if len(longer) == 1:
        return longer[0]
    if longer:
        shown = ", ".join(longer[:5]) + (", ..." if len(longer) > 5 else "")
        raise RunFolderError(
            f"{root}: {len(longer)} problems begin with {problem!r} ({shown}); give more of the id"
        )
    near = difflib.get_close_matches(problem, ids, n=3, cutoff=0.3) or ids[:3]
    raise RunFolderError(
        f"{root}: no problem {problem!r} among {len(ids)}; the nearest: {', '.join(near)}"
    )
