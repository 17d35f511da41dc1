"""Bytes by path on any fsspec store: whole files, keys that are created once, listings.

    RunStore --local disk----> `rollout.files`, read without fsspec
             --s3://, gs://--> fsspec, a key created by a conditional write

What is built on it (`rollout.store`) needs one promise: of several creators of a key one succeeds.
`RunStore.self_check` refuses a store that does not keep it.

On many machines a path may mean a folder of each one's own. So a run has an id, which stands in its
store (`run.id`) and is handed to every process of the run: a store opened with it reads it back
before each write, makes no folder on a disk that is not the run's, and says on which machine it
found what instead.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import inspect
import io
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path
from typing import Any, Self, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations import local
from fsspec.spec import AbstractFileSystem

from rollout.files import atomic_write, create_only, is_unfinished, replacing

T = TypeVar("T")


class StoreError(RuntimeError):
    """The store cannot be used, or holds something other than what was written."""


_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", re.DOTALL)
"""s3://bucket/run, and what a `Path` makes of it (s3:/bucket/run); of one letter it could be a
drive."""


def address_of(place: str | os.PathLike[str]) -> str | None:
    """The fsspec URL that is meant, also by what a `Path` makes of it; None: a path.

    So an address may stand wherever a path may; who opens it asks here first.
    """
    found = _ADDRESS.fullmatch(os.fspath(place))
    if found is None or found[1] in ("file", "local"):
        return None
    return f"{found[1]}://{found[2]}"


def absolute(place: str | os.PathLike[str]) -> str:
    """The same for any process: an address as it is, a path from the machine's root on."""
    found = _ADDRESS.fullmatch(os.fspath(place))
    if found is not None:
        return address_of(place) or f"/{found[2]}"
    return str(Path(place).absolute())


RUN_ID = "run.id"
"""File that tells a run from all others, also from one that was in the same place before."""

STREAMS = 4
"""Files written or read at a time: one stream seldom fills the line to a store."""

NUM_ATTEMPTS = 4
"""Tries of one operation."""

_PERMANENT = (FileExistsError, PermissionError, NotADirectoryError)
_MAKES = ("write", "create")
"""Actions for which a missing file is no answer: a bucket is not there."""


class RunStore:
    """Bytes by path under one root, local or any fsspec URL; safe to use from many threads.

    Paths are relative to the root, with forward slashes. A passing failure (`OSError`) is retried
    with back-off; what still fails is a `StoreError` that names the path.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        run_id: str | None = None,
        backoff_s: float = 0.2,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            root: a folder or an fsspec URL such as s3://bucket/run.
            options: of fsspec's client, as an endpoint, for this and every later store of its kind
                in each process that is handed this one; credentials are found by the client.
            run_id: of the run whose store it has to be (`identify`), see `check_run`; None: it may
                be any, and is made on the first write.
            backoff_s: pause before the second try; doubled each time.
        """
        self.root = (address_of(root) or os.fspath(root)).rstrip("/")
        self.run_id = run_id
        self.backoff_s = backoff_s
        self._options = dict(options or {})
        self._share_options()
        try:
            self._fs, self._base = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            kind = self.root.partition("://")[0]
            extra = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}.get(kind, kind)
            raise StoreError(
                f"store {self.root}: {error}; stores are reached by the extras s3, gcs and azure, "
                f'as in: pip install "rstar-cluster[{extra}]"'
            ) from error
        self._base = self._base.rstrip("/")
        # s3fs else asks for the size first, twice the requests for what is mostly small.
        known = inspect.signature(getattr(self._fs, "_cat_file", self._fs.cat_file)).parameters
        self._small = {"max_concurrency": 1} if "max_concurrency" in known else {}
        self._local = isinstance(self._fs, local.LocalFileSystem)

    def _share_options(self) -> None:
        kind = self.root.partition("://")[0]
        if self._options:
            fsspec.config.conf.setdefault(kind, {}).update(self._options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_options()

    def identify(self) -> str:
        """The id of the run that stands here, a new one where there is none; this store is known
        by it from now on.

        Raises:
            StoreError: the root cannot be written or read.
        """
        self.create(RUN_ID, uuid.uuid4().hex.encode())
        self.run_id = self.read(RUN_ID).decode(errors="replace")
        return self.run_id

    def check_run(self) -> None:
        """Prove, without writing anything, that this is the store of run `run_id`.

        Raises:
            StoreError: it is not; names machine, root, what is there, and the remedy.
        """
        if self.run_id is None:
            return
        try:
            found = self.read(RUN_ID).decode(errors="replace")
        except FileNotFoundError:
            there = "has no run.id" if self.exists("") else "is not there"
        else:
            if found == self.run_id:
                return
            there = f"is of another run ({RUN_ID}: {found[:40]!r})"
        raise StoreError(
            f"store {self.root} {there} on machine {socket.gethostname()}, where run "
            f"{self.run_id!r} was looked for: have every machine mount the file system that the "
            "driver's run_dir lies on, at the same place, or choose a run_dir that all of them see"
        )

    def below(self, path: str) -> Self:
        """The store of a folder of this one, reached in the same way."""
        other = copy.copy(self)
        other.root, other._base = f"{self.root}/{path}", self._full(path)
        other.run_id = None
        return other

    def for_arrow(self) -> tuple[Any, str]:
        """A file system of pyarrow, and where this store is in it."""
        from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

        if self._local:
            return LocalFileSystem(), self._base
        return PyFileSystem(FSSpecHandler(self._fs)), self._base

    @property
    def local(self) -> Path | None:
        """The folder, if it is one of this machine."""
        return Path(self._base) if self._local else None

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Write a file whole, replacing one that exists.

        Args:
            durable: ask a local disk to keep it before this returns.
        Raises:
            StoreError: it cannot be written, or the store is not the run's (`check_run`).
        """
        full = self._full(path)
        if self._local:
            self.check_run()
            self._retry("write", path, lambda: atomic_write(Path(full), data, durable=durable))
        else:
            self._retry("write", path, lambda: self._fs.pipe_file(full, data))

    def put_new(self, path: str, data: bytes) -> None:
        """As `put`, of a name that nobody else writes: a bucket is asked to create it, for which a
        key that may replace nothing will do."""
        if self._local or not (self.create(path, data) or self.read(path) == data):
            self.put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file whole only if there is none; False if there was one.

        After a failure whose outcome is unknown the retry may find its own file and answer False:
        callers compare the content where that matters.

        Raises:
            StoreError: as `put`.
        """
        if self._local:  # a bucket is nowhere mounted, so it does not go away either
            self.check_run()
        return self._retry("create", path, lambda: self._create(path, data))

    def read(self, path: str, *, start: int = 0) -> bytes:
        """The content of a file, from a byte on.

        Raises:
            FileNotFoundError: there is none.
        """
        full = self._full(path)
        if self._local:
            return self._retry("read", path, lambda: _read_whole(full, start))
        return self._retry(
            "read", path, lambda: self._fs.cat_file(full, start or None, **self._small)
        )

    def read_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The contents of several files; remote ones are fetched side by side."""
        if self._local or len(paths) < 2:
            return {path: self.read(path) for path in paths}
        full = {self._full(path): path for path in paths}
        found = self._retry("read", paths[0], lambda: self._fs.cat(list(full), **self._small))
        return {path: found[self._fs._strip_protocol(key)] for key, path in full.items()}

    def upload(self, source: Path, path: str, *, last: str | None = None) -> None:
        """Write all files of a local folder, several at a time, large ones in parts.

        Args:
            last: written after all others, and taken away before them: where it is the folder is
                whole.
        """
        files = {file.relative_to(source).as_posix(): file for file in _files(source)}
        final = {name: files.pop(name) for name in [last] if name in files}
        target = self.below(path) if path else self
        for name in final:
            target.delete(name)

        for some in (files, final):
            with ThreadPoolExecutor(STREAMS) as threads:
                for _ in threads.map(target.put_file, some.keys(), some.values()):
                    pass

    def put_file(self, path: str, source: Path) -> None:
        """Write a local file's content whole, a large one in parts, replacing one that exists."""
        full = self._full(path)

        def copied() -> None:
            with replacing(Path(full), durable=True) as hidden:
                shutil.copyfile(source, hidden)

        put = copied if self._local else lambda: self._fs.put_file(str(source), full)
        self._retry("write", path, put)

    def fetch(self, path: str, target: Path) -> None:
        """Copy one file to this machine.

        Raises:
            FileNotFoundError: there is none.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        full = self._full(path) if path else self._base
        self._retry("read", path, lambda: self._fs.get_file(full, str(target)))

    def below_all(self, path: str) -> dict[str, int]:
        """Bytes of every file at any depth below a folder, by its path from there.

        In the order of `sorted(Path.rglob)`, folder by folder.
        """
        full = self._full(path) if path else self._base

        def found() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return self._fs.find(full, detail=True)

        entries = self._retry("list", path, found)
        return {
            name.removeprefix(full).lstrip("/"): entry["size"]
            for name, entry in sorted(entries.items(), key=lambda found: found[0].split("/"))
            if entry["type"] != "directory"
        }

    def stamp(self, path: str) -> str:
        """What changes once a file is written anew, without reading it."""
        full = self._full(path) if path else self._base
        return str(self._retry("look up", path, lambda: self._fs.checksum(full)))

    def delete_folder(self, path: str) -> None:
        """Remove a folder with all that is in it; harmless if there is none."""
        if self._local:
            with contextlib.suppress(FileNotFoundError):
                self._retry("delete", path, lambda: shutil.rmtree(self._full(path)))
            return
        for name in self.below_all(path):  # not every S3 can delete many at once
            self.delete(f"{path}/{name}")

    def exists(self, path: str) -> bool:
        """True if there is a file or folder."""
        if self._local:
            return Path(self._full(path)).exists()
        self._fs.invalidate_cache()
        return self._retry("look up", path, lambda: self._fs.exists(self._full(path)))

    def files(self, prefix: str) -> list[str]:
        """Paths of all files directly in a folder, sorted; empty if there is no such folder."""
        names = self._names(prefix, "file")
        return [f"{prefix.strip('/')}/{name}" for name in names if not name.startswith(".")]

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each file directly in a folder; empty if there is no such folder."""
        found = {}
        for entry in self._entries(prefix):
            name = _last(entry["name"])
            if entry["type"] == "file" and not name.startswith("."):
                found[f"{prefix.strip('/')}/{name}"] = entry["size"]
        return found

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly in a folder, sorted; empty if there is no such folder."""
        names = self._names(prefix, "directory")
        return [name for name in names if not name.startswith(".")]

    def unfinished(self, prefix: str) -> list[str]:
        """Paths of the hidden files directly in a folder that a killed writer left half-written.

        Only local stores have any: elsewhere a file appears whole.
        """
        names = self._names(prefix, "file") if self._local else []
        return [f"{prefix.strip('/')}/{name}" for name in names if is_unfinished(name)]

    def modified_unix_s(self, path: str) -> float:
        """When a file was written last, by the store's clock.

        Raises:
            FileNotFoundError: there is none.
        """
        when = self._retry("look up", path, lambda: self._fs.modified(self._full(path)))
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()

    def delete(self, path: str) -> None:
        """Remove a file; harmless if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._retry("delete", path, lambda: self._fs.rm_file(self._full(path)))

    def self_check(self) -> None:
        """Prove that the root can be written and that a key can be created only once.

        Raises:
            StoreError: it cannot; the message says which.
        """
        if not self._local and not _has_own_create(self._fs):
            raise StoreError(
                f"store {self.root}: {type(self._fs).__name__} has no atomic create; use a store "
                "with create-only writes (local disk, S3, GCS), and a client that knows them "
                "(s3fs of 2025.7 or later)"
            )
        path = f".self-check/{uuid.uuid4().hex}"
        first, second = b"first", b"second"
        if not self.create(path, first):
            raise StoreError(f"store {self.root}: creating a new key failed as if it existed")
        try:
            if self.create(path, second):
                raise StoreError(
                    f"store {self.root} lets a key be created twice: finished work could be "
                    "written twice; use a store with create-only writes (local disk, S3, GCS), "
                    "and a client that knows them (s3fs of 2025.7 or later)"
                )
            if self.read(path) != first:
                raise StoreError(f"store {self.root}: a refused create changed the file")
        finally:
            self.delete(path)

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _retry(self, action: str, path: str, operation: Callable[[], T]) -> T:
        # Cloud libraries also raise their own kinds, which say little about what will pass.
        passing: type[Exception] = OSError if self._local else Exception
        pause = self.backoff_s
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                return operation()
            except passing as error:
                absent = isinstance(error, FileNotFoundError)
                if absent and action not in _MAKES:
                    raise
                if attempt == NUM_ATTEMPTS or absent or isinstance(error, _PERMANENT):
                    raise StoreError(self._explain(action, path, error, attempt)) from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _explain(self, action: str, path: str, error: Exception, attempts: int) -> str:
        # What is the matter comes first: a progress view shows only the beginning.
        tries = f" after {attempts} tries" if attempts > 1 else ""
        what = f"cannot {action} {path} of {self.root}{tries}"
        said = f"{type(error).__name__}: {error}"
        if re.search(r"credential|expired|token", said, re.IGNORECASE):
            return (
                f"store: credentials are missing, wrong or expired: {what} ({said}); what is "
                "committed stays: renew them and start again"
            )
        if isinstance(error, PermissionError):
            return f"store: no permission: {what} ({error})"
        if isinstance(error, FileNotFoundError) and not self._local:
            return f"store: no such bucket, or none that may be seen: {what} ({error})"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"store: no space left: {what} ({error})"
        return f"store: {what}: {said}"

    def _create(self, path: str, data: bytes) -> bool:
        full = self._full(path)
        if self._local:
            return create_only(Path(full), data)
        try:
            self._fs.pipe_file(full, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or _is_refused(error):
                return False
            raise
        return True

    def _names(self, prefix: str, kind: str) -> list[str]:
        """Names of what is directly in a folder, sorted: of each "file" or each "directory"."""
        folder = self._full(prefix.strip("/"))

        def local() -> list[str]:
            is_kind = os.DirEntry.is_file if kind == "file" else os.DirEntry.is_dir
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if is_kind(entry)]

        if not self._local:
            return sorted(_last(e["name"]) for e in self._entries(prefix) if e["type"] == kind)
        with contextlib.suppress(FileNotFoundError):
            return sorted(self._retry("list", prefix, local))
        return []

    def _entries(self, prefix: str) -> list[dict[str, Any]]:
        """What is directly in a folder, as fsspec tells it; [] if there is no such folder."""

        def listed() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            return self._fs.ls(self._full(prefix.strip("/")), detail=True)

        with contextlib.suppress(FileNotFoundError):
            return self._retry("list", prefix, listed)
        return []


def _has_own_create(fs: AbstractFileSystem) -> bool:
    """False if creating is what fsspec makes of it: a look whether the key exists, then a write."""
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._pipe_file is not AsyncFileSystem._pipe_file
    return type(fs).pipe_file is not AbstractFileSystem.pipe_file


def _is_refused(error: OSError) -> bool:
    """True if S3 refused a write for its condition. s3fs says so only where the answer has the
    element `Condition`, which is Amazon's own."""
    answer = getattr(error.__cause__, "response", None) or {}
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _read_whole(path: str, start: int) -> bytes:
    # Unbuffered and without a Path: a restart reads tens of thousands of small files.
    with io.FileIO(path) as file:
        if start:
            file.seek(start)
        return file.readall()
