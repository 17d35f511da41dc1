"""A text file of a run that one process writes line by line: its log, its spans, its samples.

    a disk    RUN/logs/policy-0.jsonl              appended to; full: renamed to .jsonl.1
    a bucket  RUN/logs/policy-0-1764000000000-0000.jsonl, -0001, ...

An object is never appended to. So on a bucket lines are held, and the part that is being filled is
written whole, as it stands, every `PAUSE_S`, in a thread: who reads it sees whole lines, who writes
a line never waits. A process that is killed loses the lines of that pause.

What cannot be written is lost: this is for people to look at, and a store that fails is told by
those who have something to lose.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TextIO

from rollout.run_store import RunStore, StoreError

PAUSE_S = 2.0
"""Between two writes of a part, on a bucket."""

PART_BYTES = 1 << 20
PARTS_KEPT = 32


class Lines:
    """One file; see the module. Safe to use from many threads."""

    def __init__(self, store: RunStore, path: str, *, max_bytes: int | None = None) -> None:
        """
        Args:
            path: under the run, ending in .jsonl; of this process alone.
            max_bytes: about half of what is kept of it on a disk; None: all is.
        """
        self._store = store
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._held: list[str] = []
        self._written = 0
        """Of the lines held."""
        self._parts: list[str] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, text: str) -> None:
        """Take whole lines."""
        with self._lock:
            if self._store.local is not None:
                with contextlib.suppress(OSError):
                    self._append(self._store.local / self._path, text)
                return
            self._held.append(text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._put_forever, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what is held; nothing may be added any more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _append(self, path: Path, text: str) -> None:
        if self._file is None:
            path.parent.mkdir(exist_ok=True)  # the run's folder is the driver's to make
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.write(text)
        self._file.flush()
        if self._max_bytes is not None and self._file.tell() >= self._max_bytes:
            self._file.close()
            self._file = None
            path.replace(f"{path}.1")

    def _put_forever(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(PAUSE_S)
            # Left for the next time, or for good: see the module.
            with contextlib.suppress(StoreError):
                self._put()

    def _put(self) -> None:
        with self._lock:
            count = len(self._held)
            data = "".join(self._held).encode(errors="backslashreplace")
        if count == self._written:
            return
        if not self._written:
            stamp = f"{time.time_ns() // 1_000_000}-{len(self._parts):04d}"
            self._parts.append(f"{self._path.removesuffix('.jsonl')}-{stamp}.jsonl")
        self._store.put(self._parts[-1], data)
        self._written = count
        if len(data) >= PART_BYTES:
            with self._lock:
                del self._held[:count]
            self._written = 0
            for old in self._parts[-PARTS_KEPT - 1 : -PARTS_KEPT]:
                self._store.delete(old)
