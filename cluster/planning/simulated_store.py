"""The store of a simulation: a whole run in memory, behind the interface of every other store.

`RunStore` reaches it as simulated://NAME through fsspec, so plans, commits, manifests and the
create-only rule run the code they run on a disk or in a bucket. Unlike fsspec's own memory file
system, whose look-ups walk over all files, each operation costs the same however many there are.

`RacingStore` adds a place between the data file and the marker of a commit, where a simulation
lets a rival commit.

Not covered: partial writes, failures, and more than one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from rollout.store import RunStore

PROTOCOL = "simulated"


class DictFileSystem(AbstractFileSystem):
    """Files of whole bytes in a dictionary of folders."""

    protocol = PROTOCOL
    root_marker = ""
    folders: dict[str, dict[str, bytes | None]] = {}  # noqa: RUF012  fsspec makes one instance
    """Content by folder and name; None is a folder."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        folder, _, name = self._strip_protocol(path).rpartition("/")
        files = self.folders.get(folder)
        if files is None:
            files = self._make_folder(folder)
        if mode == "create" and name in files:
            raise FileExistsError(path)
        files[name] = bytes(value)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        folder, _, name = self._strip_protocol(path).rpartition("/")
        content = self.folders.get(folder, {}).get(name)
        if content is None:
            raise FileNotFoundError(path)
        return content[start:end]

    def cat(self, path: Any, **_: Any) -> Any:
        if isinstance(path, list):
            return {self._strip_protocol(p): self.cat_file(p) for p in path}
        return self.cat_file(path)

    def exists(self, path: str, **_: Any) -> bool:
        plain = self._strip_protocol(path)
        folder, _, name = plain.rpartition("/")
        return plain in self.folders or name in self.folders.get(folder, {})

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        folder = self._strip_protocol(path)
        if folder not in self.folders:
            raise FileNotFoundError(path)
        found = self.folders[folder].items()
        if not detail:
            return [f"{folder}/{name}" for name, _ in found]
        return [
            {
                "name": f"{folder}/{name}",
                "size": 0 if content is None else len(content),
                "type": "directory" if content is None else "file",
            }
            for name, content in found
        ]

    def rm_file(self, path: str) -> None:
        folder, _, name = self._strip_protocol(path).rpartition("/")
        if self.folders.get(folder, {}).pop(name, None) is None:
            raise FileNotFoundError(path)

    def forget(self, path: str) -> None:
        """Remove a folder and everything below it."""
        top = self._strip_protocol(path)
        for folder in [f for f in self.folders if f == top or f.startswith(f"{top}/")]:
            del self.folders[folder]

    def _make_folder(self, folder: str) -> dict[str, bytes | None]:
        files = self.folders.setdefault(folder, {})
        parent, _, name = folder.rpartition("/")
        if parent:
            if parent not in self.folders:
                self._make_folder(parent)
            self.folders[parent].setdefault(name, None)
        return files


fsspec.register_implementation(PROTOCOL, DictFileSystem)


class RacingStore(RunStore):
    """A store with a place between a commit's data file and its marker."""

    on_put: Callable[[], None] | None = None
    """Called once after the next file was put."""

    def put_new(self, path: str, data: bytes) -> None:
        super().put_new(path, data)
        if self.on_put is not None:
            call, self.on_put = self.on_put, None
            call()
