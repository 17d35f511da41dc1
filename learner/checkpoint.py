"""Checkpoints in a run's store: written whole or not at all.

    checkpoints/round=R/policy/<uuid>/...          Hugging Face format, tokenizer included
    checkpoints/round=R/policy/CURRENT.json        create-only: names the one that counts
    checkpoints/round=R/ppm/...                    the same for the process preference model

A folder is filled under a hidden name, renamed to its final one (on a bucket: filled on this
machine, then uploaded, several files at a time) and only then named by CURRENT.json, which is
created once and only replaced by `release`. A writer that dies leaves a
folder nobody refers to; of two writers of one round the second deletes its own and takes the
first's. Round 0 is the cold start.

A checkpoint that is not promoted (`hold`) is written too, but CURRENT.json names the earlier one,
which so serves the round, and says why; `release` promotes it after all.

vLLM, transformers and DeepSpeed read checkpoints through POSIX paths: from a bucket each machine
copies what it needs first (`cluster.folder.staging`), checked by the digest in CURRENT.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from learner.spill import no_room
from rollout.files import new_folder
from rollout.run_store import RunStore, StoreError, absolute, address_of

Kind = Literal["policy", "ppm"]

CURRENT = "CURRENT.json"
"""Names the checkpoint of a round that counts."""

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
    """Directory in Hugging Face format; an address, where the run is on a bucket."""
    digest: str
    """sha256 over the names and contents of its files."""

    @property
    def version(self) -> str:
        """Short name for logs and replies, as `policy-r2-1a2b3c4d`."""
        return f"{self.kind}-r{self.round}-{self.digest[:8]}"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: str | Path) -> None:
        self.store = RunStore(absolute(root))

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
        *,
        previous_here: Path | None = None,
    ) -> Checkpoint:
        """Let an earlier checkpoint serve a round, and keep the new one aside.

        Args:
            previous: directory of the earlier one.
            write: fills the directory of the new one; None: it has no weights worth keeping.
            previous_here: where this machine has a copy of the earlier one; None: there.
        Returns:
            What is current afterwards; as `publish`.
        Raises:
            CheckpointError: nothing could be written, or the earlier one is gone.
        """
        digest = directory_digest(previous_here or Path(previous))
        earlier = Checkpoint(kind=kind, round=round, path=absolute(previous), digest=digest)
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
        with _told(kind, round):
            self.home(kind, round).put(CURRENT, json.dumps(record, indent=1).encode())
        current = self.current(kind, round)
        assert current is not None
        return current

    def _write(self, kind: Kind, round: int, write: Callable[[Path], None]) -> Checkpoint:
        """A whole checkpoint in a folder that nothing refers to yet."""
        home = self.home(kind, round)
        name = uuid.uuid4().hex
        scratch = home.local or Path(tempfile.mkdtemp(prefix="rstar-"))

        @contextlib.contextmanager
        def telling() -> Iterator[None]:
            try:
                yield
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{kind} checkpoint of round {round}: {no_room(error, scratch)}; the one in "
                    "service is untouched"
                ) from error

        try:
            # Inside as well: what is free is told before the folder goes and its disk has room.
            with (
                telling(),
                new_folder(scratch / name, durable=home.local is not None) as hidden,
                telling(),
            ):
                write(hidden)
                digest = directory_digest(hidden)
            if home.local is None:
                with _told(kind, round):
                    home.upload(scratch / name, name)
        finally:
            if home.local is None:
                shutil.rmtree(scratch, ignore_errors=True)
        return Checkpoint(kind=kind, round=round, path=f"{home.root}/{name}", digest=digest)

    def _name(
        self,
        checkpoint: Checkpoint,
        made: str | None,
        info: Mapping[str, Any],
        held: Mapping[str, Any] | None,
    ) -> Checkpoint:
        """Make a checkpoint the current one of its round, unless another is: then `made` goes."""
        home = self.home(checkpoint.kind, checkpoint.round)
        path = checkpoint.path
        if home.local is not None and address_of(path) is None:
            path = os.path.relpath(path, home.root)
        elif path.startswith(f"{self.store.root}/"):
            path = posixpath.relpath(path, home.root)
        record = {
            **asdict(checkpoint),
            "path": path,
            "created_unix_s": time.time(),
            "info": dict(info),
            "held": held,
        }
        with _told(checkpoint.kind, checkpoint.round):
            if home.create(CURRENT, json.dumps(record, indent=1).encode()):
                return checkpoint
            current = self.current(checkpoint.kind, checkpoint.round)
            assert current is not None
            # It may be one's own: the answer to a first try can be lost.
            if made is not None and current.path != made:
                home.delete_folder(made.rpartition("/")[2])
        return current

    def current(self, kind: Kind, round: int) -> Checkpoint | None:
        """The published checkpoint of a round; None if there is none.

        Raises:
            CheckpointError: the record cannot be read, or what it names is gone.
        """
        record = self._record(kind, round)
        if record is None:
            return None
        path = _named(self.home(kind, round), record["path"])
        if not RunStore(path).exists(""):
            raise CheckpointError(f"{kind} checkpoint of round {round} is gone: {path}")
        return Checkpoint(kind=kind, round=round, path=path, digest=record["digest"])

    def info(self, kind: Kind, round: int) -> dict[str, Any]:
        """What was stored beside a round's checkpoint; empty if there is none."""
        record = self._record(kind, round)
        return {} if record is None else record["info"]

    def latest(self, kind: Kind) -> Checkpoint | None:
        """The published checkpoint of the highest round; None if there is none."""
        with _told(kind):
            names = (name.removeprefix("round=") for name in self.store.folders(""))
            for number in sorted((int(name) for name in names if name.isdigit()), reverse=True):
                if (found := self.current(kind, number)) is not None:
                    return found
        return None

    def home(self, kind: Kind, round: int) -> RunStore:
        """Where a round's checkpoints of a kind are, and the logs of their training.

        Raises:
            ValueError: no such kind or round.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"checkpoint kind must be one of {get_args(Kind)}, got {kind!r}")
        if round < 0:
            raise ValueError(f"checkpoint round must be >= 0, got {round}")
        return self.store.below(f"round={round}/{kind}")

    def _record(self, kind: Kind, round: int) -> dict[str, Any] | None:
        return _read(self.home(kind, round), CURRENT, "path", "digest", "info")


@contextlib.contextmanager
def _told(kind: Kind, round: int | None = None) -> Iterator[None]:
    """A failure of the store as one of the checkpoint."""
    try:
        yield
    except StoreError as error:
        of = f" of round {round}" if round is not None else ""
        raise CheckpointError(f"{kind} checkpoint{of}: {error}") from error


def _named(home: RunStore, path: str) -> str:
    """The directory that a record in a folder means."""
    if (elsewhere := address_of(path)) is not None:
        return elsewhere
    if home.local is not None:
        return os.path.normpath(home.local / path)
    kind, _, rest = f"{home.root}/{path}".partition("://")
    return f"{kind}://{posixpath.normpath(rest)}"


def write_prompt_template(directory: Path, name: str) -> None:
    """Note in a checkpoint directory which prompt template its model was trained with."""
    (directory / NOTES_FILE).write_text(json.dumps({"prompt_template": name}) + "\n")


def read_prompt_template(directory: str | Path) -> str | None:
    """The prompt template a checkpoint names; None for models trained elsewhere.

    Raises:
        CheckpointError: the note cannot be read.
    """
    notes = _read(RunStore(absolute(directory)), NOTES_FILE, "prompt_template")
    return None if notes is None else str(notes["prompt_template"])


def checkpoint_directory(path: str | Path) -> Path:
    """The Hugging Face directory a path means: itself, or what its CURRENT.json names.

    So that `checkpoints/round=4/policy` can be given where its one published checkpoint is meant.

    Raises:
        CheckpointError: CURRENT.json is there and cannot be read.
    """
    home = RunStore(path)
    record = _read(home, CURRENT, "path")
    return Path(path) if record is None else Path(_named(home, str(record["path"])))


def recorded_digest(path: str | Path) -> str | None:
    """What the record beside a checkpoint's directory says of it; None if there is no such record.

    Raises:
        CheckpointError: the record cannot be read.
    """
    folder, _, name = absolute(path).rpartition("/")
    record = _read(RunStore(folder), CURRENT, "path", "digest") if folder else None
    return record["digest"] if record is not None and record["path"] == name else None


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


def _read(store: RunStore, name: str, *keys: str) -> dict[str, Any] | None:
    """A JSON object that has some keys; None if there is no such file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        record = json.loads(store.read(name))
        for key in keys:
            record[key]
    except FileNotFoundError:
        return None
    except (StoreError, ValueError, KeyError, TypeError) as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return None
        raise CheckpointError(f"{store.root}/{name} cannot be read: {error!r}") from error
    return record
