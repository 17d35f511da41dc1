"""Files on a local disk that appear whole or not at all.

A reader sees the old content or the new one, never a part: what is written goes to a hidden file
beside its place first. `durable` also asks the disk to keep it before the call returns, for what a
restart after a power cut must find (markers, checkpoints); what is only looked at does without.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A hidden path beside `path`; what the block wrote there takes its place as the block ends.

    If the block raises, the hidden file goes and `path` stays as it was. Missing folders are made.

    Raises:
        OSError: from the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield hidden
        if durable:
            _sync(hidden)
        hidden.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise
    if durable:
        _sync(path.parent)


def atomic_write(path: Path, data: str | bytes, *, durable: bool = False) -> None:
    """Write `path` whole, in place of an earlier one (text as UTF-8).

    Raises:
        OSError: from the disk; `path` stays as it was.
    """
    with replacing(path, durable=durable) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def create_only(path: Path, data: str | bytes) -> bool:
    """Write `path` whole and durably if there is none; False if there is one, which stays.

    Of several writers at a time, on any machine of the file system, one is told True.

    Raises:
        OSError: from the disk; nothing of `data` is left.
    """
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)
        _sync(hidden)
        # A link appears whole or not at all, and never over another file.
        os.link(hidden, path)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()
    _sync(path.parent)
    return True


def _sync(path: Path) -> None:
    """Ask the disk to keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
