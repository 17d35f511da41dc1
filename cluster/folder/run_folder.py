"""Where a run keeps what it made, and how it knows what is done.

    RUN/config.yaml                    the effective config of the first start
    RUN/run.id                         tells a new run in the same place from the one before
    RUN/versions.json                  each start: code, packages, machine, problem files (lineage)
    RUN/lineage/round=R.json           which models, grader and data made what (lineage)
    RUN/live.json                      what the driver does right now (live)
    RUN/logs/, RUN/traces/             what each process logged, and traced if asked (docs/logs.md)
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

A stage is done when its product is there, written whole; nothing else is remembered. The folder
must be on a file system that all machines of the cluster see, which each process of the run that
needs it checks by the run's id before it begins (`rollout.run_store`). `rstar status` reads it from
any machine, at any time, and writes nothing.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import io
import json
import os
import re
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
from rollout.difficulty import SuspectLabel
from rollout.files import atomic_write
from rollout.problem import Problem

RESUMABLE = (
    "cluster",
    "cost",
    "metrics",
    "policy_engine",
    "ppm_engine",
    "name",
    "run_dir",
    "sandbox",
    "tracing",
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


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""s3://bucket/run, and what a `Path` makes of it; of one letter it could be a drive."""

REPORT = "report.json"
"""What a finished run showed, under its folder."""


class RunFolderError(RuntimeError):
    """A run's folder cannot be used; the message says why."""


class RunFolder:
    """Paths and small records of one run."""

    def __init__(self, root: str | Path) -> None:
        """
        Raises:
            RunFolderError: an address (s3://bucket/run) instead of a folder.
        """
        if _ADDRESS.match(str(root)):
            raise RunFolderError(
                f"{root}: a run's folder has to be a path, not an address: checkpoints and "
                "datasets are files there; mount a file system that all machines share (NFS, EFS, "
                "Filestore, Azure Files) and name a folder on it, as with "
                "--set run_dir=/mnt/shared/runs/..."
            )
        self.root = Path(root).absolute()

    def dataset(self, round: int) -> Path:
        return self.root / "datasets" / f"round={round}"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def base_model(self) -> Path:
        return self.root / "base"

    @property
    def marked_base(self) -> Path:
        """The base model with the step markers added, if its tokenizer lacked any."""
        return self.root / "base_with_markers"

    @property
    def marked_trunk(self) -> Path:
        """Likewise, of the model that the PPM grows from, where it is neither base nor policy."""
        return self.root / "trunk_with_markers"

    @property
    def problems(self) -> Path:
        return self.root / "problems"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it: one driver at a time.

        Raises:
            RunFolderError: no write permission, no locks, or another process holds it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("a+")
        except OSError as error:
            raise RunFolderError(
                f"{self.root}: {why_not_written(error)}; choose another folder with "
                "--set run_dir=..."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    raise RunFolderError(
                        f"{self.root}: its file system locks no files ({error.strerror}), so that "
                        "two drivers could write it at once; mount it with NFS 4, or NFS 3 with "
                        "its lock service running, or choose another folder with --set run_dir=..."
                    ) from error
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise RunFolderError(
                    f"{self.root}: in use by {holder}; wait for it, or choose another folder "
                    "with --set run_dir=..."
                ) from None
            try:
                lock.truncate(0)
                os.write(lock.fileno(), f"process {os.getpid()}".encode())
            except OSError as error:
                raise RunFolderError(
                    f"{self.root}: {why_not_written(error)}; free some space, or choose another "
                    "folder with --set run_dir=..."
                ) from error
            yield

    def keep_config(self, config: Config) -> None:
        """Store the effective config, or check that the run was started with an equal one.

        Raises:
            ConfigError: it was started with another one; names the keys that differ.
        """
        path = self.root / "config.yaml"
        effective = config.effective()
        if not path.exists():
            self._write(path, yaml.safe_dump(effective, sort_keys=False))
            return
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
        # A key that is newer than the run counts as its default; one that is gone shows below.
        with suppress(ValidationError):
            earlier = type(config).model_validate(earlier).effective()
        changed = [
            name
            for name in _differences(earlier, effective)
            if not any(name == part or name.startswith(f"{part}.") for part in RESUMABLE)
        ]
        if changed:
            raise ConfigError(
                f"{path}: this run was started with other values of {', '.join(changed[:5])}; "
                "continue with those, or choose another folder with --set run_dir=..."
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON record by its path under the run; None if it is not there."""
        try:
            return json.loads((self.root / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise RunFolderError(f"{self.root / name}: not JSON: {error}") from error

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a JSON record whole."""
        self._write(self.root / name, json.dumps(record, indent=1) + "\n")

    def write_lines(self, name: str, lines: Sequence[str]) -> None:
        """Write a text file of lines whole."""
        self._write(self.root / name, "".join(f"{line}\n" for line in lines))

    def stage(self, round: int, stage: str) -> dict[str, Any]:
        """Seconds and facts of a finished stage; {} if it was never recorded."""
        return self.read(_stage_name(round, stage)) or {}

    def record_stage(self, round: int, stage: str, seconds: float, **facts: Any) -> None:
        self.write(_stage_name(round, stage), {"seconds": round_to(seconds), **facts})

    def write_problems(self, problems: Sequence[Problem]) -> None:
        """Write which problems are searched: the one place that tells their number and levels."""
        table = pa.table(
            {
                "id": pa.array([problem.id for problem in problems], pa.string()),
                "level": pa.array([p.level.value for p in problems], pa.string()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self._write(self.root / "problems.parquet", sink.getvalue())

    def problem_levels(self) -> dict[str, str]:
        """Level of every problem that is searched, by id; {} if they are not written yet.

        Raises:
            RunFolderError: the file cannot be read.
        """
        path = self.root / "problems.parquet"
        try:
            table = pq.read_table(path, columns=["id", "level"])
        except FileNotFoundError:
            return {}
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{path}: cannot be read: {error}") from error
        ids, levels = (table[name].to_pylist() for name in ("id", "level"))
        return dict(zip(ids, levels, strict=True))

    def write_suspects(self, round: int, suspects: Sequence[SuspectLabel]) -> None:
        """Write the suspect labels of a round, a JSON line each, for a person to look at."""
        lines = [json.dumps(asdict(suspect), ensure_ascii=False) for suspect in suspects]
        self.write_lines(f"suspects/round={round}.jsonl", lines)

    def evaluation_name(self, round: int) -> str:
        return f"evaluations/round={round}.json"

    def ruler_name(self, round: int) -> str:
        return f"rulers/round={round}.json"

    def _write(self, path: Path, data: str | bytes) -> None:
        try:
            atomic_write(path, data)
        except OSError as error:
            raise RunFolderError(f"{path}: {why_not_written(error)}") from error


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


def _stage_name(round: int, stage: str) -> str:
    return f"stages/round={round}-{stage}.json"


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that are not equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            name = f"{prefix}.{key}" if prefix else str(key)
            found += _differences(old.get(key), new.get(key), name)
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
