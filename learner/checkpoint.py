"""Checkpoints on a file system all machines see: written whole or not at all.

    checkpoints/round=R/policy/<uuid>/...          Hugging Face format, tokenizer included
    checkpoints/round=R/policy/CURRENT.json        create-only: names the one that counts
    checkpoints/round=R/ppm/...                    the same for the process preference model

A folder is filled under a hidden name, renamed to its final one and only then named by
CURRENT.json, which is linked into place whole and never replaced. A writer that dies leaves a
folder nobody refers to; of two writers of one round the second deletes its own and takes the
first's. Round 0 is the cold start.

A checkpoint that is not promoted (`hold`) is written too, but CURRENT.json names the earlier one,
which so serves the round, and says why; `release` promotes it after all.

Not covered: object stores. vLLM, transformers and DeepSpeed read checkpoints through POSIX paths,
so the root is a local or shared directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from learner.spill import no_room
from rollout.files import atomic_write, create_only, new_folder

Kind = Literal["policy", "ppm"]

NOTES_FILE = "rstar.json"
"""What Hugging Face's files do not say of a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or not what its record says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One published checkpoint."""

    kind: Kind
    round: int
    path: str
    """Directory in Hugging Face format."""
    digest: str
    """sha256 over the names and contents of its files."""

    @property
    def version(self) -> str:
        """Short name for logs and replies, as `policy-r2-1a2b3c4d`."""
        return f"{self.kind}-r{self.round}-{self.digest[:8]}"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def publish(
        self,
        kind: Kind,
        round: int,
        write: Callable[[Path], None],
        info: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint and make it the current one of its round.

        Args:
            write: fills the empty directory it is given.
            info: stored beside the record (config, metrics, data digest).
        Returns:
            What is current afterwards: the new one, or the one that was there before.
        Raises:
            CheckpointError: nothing could be written, or `write` left the directory empty.
        """
        made = self._write(kind, round, write)
        return self._name(made, made.path, info or {}, None)

    def hold(
        self,
        kind: Kind,
        round: int,
        previous: str | Path,
        reason: str,
        write: Callable[[Path], None] | None,
        info: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Let an earlier checkpoint serve a round, and keep the new one aside.

        Args:
            previous: directory of the earlier one.
            write: fills the directory of the new one; None: it has no weights worth keeping.
        Returns:
            What is current afterwards; as `publish`.
        Raises:
            CheckpointError: nothing could be written, or the earlier one is gone.
        """
        previous = Path(previous).absolute()
        earlier = Checkpoint(
            kind=kind, round=round, path=str(previous), digest=directory_digest(previous)
        )
        made = self._write(kind, round, write) if write is not None else None
        aside = {"path": Path(made.path).name, "digest": made.digest} if made is not None else None
        held = {"reason": reason, "checkpoint": aside}
        return self._name(earlier, made.path if made is not None else None, info or {}, held)

    def held(self, kind: Kind, round: int) -> str | None:
        """Why a round's own checkpoint was not promoted; None if it was, or there is none."""
        record = self._record(kind, round)
        held = record.get("held") if record is not None else None
        return held["reason"] if held else None

    def release(self, kind: Kind, round: int) -> Checkpoint:
        """Promote the checkpoint that was held back.

        Raises:
            CheckpointError: none was, or it had no weights worth keeping.
        """
        record = self._record(kind, round)
        held = record.get("held") if record is not None else None
        if record is None or not held or held["checkpoint"] is None:
            raise CheckpointError(
                f"no {kind} checkpoint of round {round} is held back with its weights"
            )
        record |= held["checkpoint"] | {"held": None}
        path = self.folder(kind, round) / "CURRENT.json"
        atomic_write(path, json.dumps(record, indent=1), durable=True)
        current = self.current(kind, round)
        assert current is not None
        return current

    def _write(self, kind: Kind, round: int, write: Callable[[Path], None]) -> Checkpoint:
        """A whole checkpoint in a folder that nothing refers to yet."""
        folder = self.folder(kind, round)
        final = folder / uuid.uuid4().hex

        @contextlib.contextmanager
        def telling() -> Iterator[None]:
            try:
                yield
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{kind} checkpoint of round {round}: {no_room(error, folder)}; the one in "
                    "service is untouched"
                ) from error

        # Inside as well: what is free is told before the folder goes and its disk has room again.
        with telling(), new_folder(final, durable=True) as hidden, telling():
            write(hidden)
            digest = directory_digest(hidden)
        return Checkpoint(kind=kind, round=round, path=str(final), digest=digest)

    def _name(
        self,
        checkpoint: Checkpoint,
        made: str | None,
        info: Mapping[str, Any],
        held: Mapping[str, Any] | None,
    ) -> Checkpoint:
        """Make a checkpoint the current one of its round, unless another is: then `made` goes."""
        folder = self.folder(checkpoint.kind, checkpoint.round)
        record = {
            **asdict(checkpoint),
            "path": os.path.relpath(checkpoint.path, folder),
            "created_unix_s": time.time(),
            "info": dict(info),
            "held": held,
        }
        try:
            if create_only(folder / "CURRENT.json", json.dumps(record, indent=1)):
                return checkpoint
            if made is not None:
                shutil.rmtree(made)
        except OSError as error:
            raise CheckpointError(
                f"{checkpoint.kind} checkpoint of round {checkpoint.round}: "
                f"{no_room(error, folder)}"
            ) from error
        current = self.current(checkpoint.kind, checkpoint.round)
        assert current is not None
        return current

    def current(self, kind: Kind, round: int) -> Checkpoint | None:
        """The published checkpoint of a round; None if there is none.

        Raises:
            CheckpointError: the record cannot be read, or what it names is gone.
        """
        record = self._record(kind, round)
        if record is None:
            return None
        path = Path(os.path.normpath(self.folder(kind, round) / record["path"]))
        if not path.is_dir():
            raise CheckpointError(f"{kind} checkpoint of round {round} is gone: {path}")
        return Checkpoint(kind=kind, round=round, path=str(path), digest=record["digest"])

    def info(self, kind: Kind, round: int) -> dict[str, Any]:
        """What was stored beside a round's checkpoint; empty if there is none."""
        record = self._record(kind, round)
        return {} if record is None else record["info"]

    def latest(self, kind: Kind) -> Checkpoint | None:
        """The published checkpoint of the highest round; None if there is none."""
        rounds = []
        for folder in self.root.glob("round=*"):
            number = folder.name.removeprefix("round=")
            if number.isdigit() and (folder / kind / "CURRENT.json").exists():
                rounds.append(int(number))
        return self.current(kind, max(rounds)) if rounds else None

    def folder(self, kind: Kind, round: int) -> Path:
        """Where a round's checkpoints of a kind are, and the logs of their training.

        Raises:
            ValueError: no such kind or round.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"checkpoint kind must be one of {get_args(Kind)}, got {kind!r}")
        if round < 0:
            raise ValueError(f"checkpoint round must be >= 0, got {round}")
        return self.root / f"round={round}" / kind

    def _record(self, kind: Kind, round: int) -> dict[str, Any] | None:
        return _read(self.folder(kind, round) / "CURRENT.json", "path", "digest", "info")


def write_prompt_template(directory: Path, name: str) -> None:
    """Note in a checkpoint directory which prompt template its model was trained with."""
    (directory / NOTES_FILE).write_text(json.dumps({"prompt_template": name}) + "\n")


def read_prompt_template(directory: str | Path) -> str | None:
    """The prompt template a checkpoint names; None for models trained elsewhere.

    Raises:
        CheckpointError: the note cannot be read.
    """
    notes = _read(Path(directory) / NOTES_FILE, "prompt_template")
    return None if notes is None else str(notes["prompt_template"])


def checkpoint_directory(path: str | Path) -> Path:
    """The Hugging Face directory a path means: itself, or what its CURRENT.json names.

    So that `checkpoints/round=4/policy` can be given where its one published checkpoint is meant.

    Raises:
        CheckpointError: CURRENT.json is there and cannot be read.
    """
    path = Path(path)
    record = _read(path / "CURRENT.json", "path") if path.is_dir() else None
    return path if record is None else path / str(record["path"])


def recorded_digest(path: str | Path) -> str | None:
    """What the record beside a checkpoint's directory says of it; None if there is no such record.

    Raises:
        CheckpointError: the record cannot be read.
    """
    path = Path(path)
    record = _read(path.parent / "CURRENT.json", "path", "digest")
    return record["digest"] if record is not None and record["path"] == path.name else None


def directory_digest(path: Path) -> str:
    """sha256 over names and contents of all files below a directory, in name order.

    Raises:
        CheckpointError: there are none.
    """
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise CheckpointError(f"checkpoint directory is empty or missing: {path}")
    for file in files:
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
        total.update(f"{file.relative_to(path).as_posix()}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _read(path: Path, *keys: str) -> dict[str, Any] | None:
    """A JSON object that has some keys; None if there is no such file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
        for key in keys:
            record[key]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    return record
