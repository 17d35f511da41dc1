"""The last rung: sympy in a process that can be killed.

    parent: one JSON line (two trees) -> stdin of the worker worker: builds sympy objects from the
    trees, never from text, simplifies the difference -> one JSON line

The worker is a fresh interpreter (exec, not fork), started at the first question, with limits on
address space and CPU set before it reads anything. The parent keeps the deadline with `select`, not
with signals, so it works off the main thread; a worker that misses it is killed and the next
question starts another. One question is asked at a time; other threads wait their turn, but no
longer than their own deadline.

Not covered: the worker is limited, not isolated. It receives numbers, operators and letters only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from verifier.answer_tree import Node, to_json

logger = logging.getLogger(__name__)

ADDRESS_SPACE_BYTES = 1 << 30
QUESTIONS_PER_WORKER = 500
QUESTION_S = 0.8
START_S = 30.0
WAIT_S = 0.8
"""How long one question waits for a starting or busy worker: a verdict stays under two seconds."""
_READY = b"ready\n"


class Timeout(Exception):
    """No answer before the deadline."""


class SymbolicWorker:
    """A lazily started sympy process that answers "are these two trees equal?"."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._questions = 0
        self._ready = False
        self._spawned_s = 0.0

    def equal(self, left: Node, right: Node, timeout_s: float = QUESTION_S) -> bool | None:
        """Whether sympy shows the trees equal (True) or different (False); None when it cannot
        tell.

        Raises:
            Timeout: no answer in time. The worker has been killed.
        """
        try:
            request = json.dumps([to_json(left), to_json(right)]).encode() + b"\n"
        except TypeError:
            return None
        wait_s = max(WAIT_S, timeout_s)
        begun_s = time.monotonic()
        if not self._lock.acquire(timeout=wait_s):
            raise Timeout("other questions kept the worker busy")
        try:
            if not self._ensure_started(max(0.0, begun_s + wait_s - time.monotonic())):
                raise Timeout("the worker is still starting")
            reply = self._ask(request, timeout_s)
            self._questions += 1
            if self._questions >= QUESTIONS_PER_WORKER:
                self._end()
            return reply
        finally:
            self._lock.release()

    def start(self, timeout_s: float = START_S) -> bool:
        """Start the process and wait until it is ready."""
        with self._lock:
            return self._ensure_started(timeout_s)

    def stop(self) -> None:
        """End the process if there is one."""
        with self._lock:
            self._end()

    def _ensure_started(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for a ready worker; a slow one goes on starting behind the next
        questions."""
        if self._owner != os.getpid():
            # A forked child must not talk over its parent's pipe.
            self._process = None
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._spawn()
        if self._ready:
            return True
        line = self._read_line(time.monotonic() + timeout_s)
        self._ready = line == _READY
        if not self._ready and (line is not None or time.monotonic() > self._spawned_s + START_S):
            logger.warning("The symbolic worker did not start within %.0f s", START_S)
            self._end()
        return self._ready

    def _spawn(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "verifier.symbolic_worker", str(ADDRESS_SPACE_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[1],
            env={"PATH": os.environ.get("PATH", ""), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        self._owner = os.getpid()
        self._spawned_s = time.monotonic()
        self._questions = 0
        self._ready = False

    def _ask(self, request: bytes, timeout_s: float) -> bool | None:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except OSError as error:
            self._end()
            raise Timeout("the worker has gone") from error
        line = self._read_line(time.monotonic() + timeout_s)
        if line is None:
            self._end()
            raise Timeout(f"no answer within {timeout_s:g} s")
        reply = json.loads(line)
        return reply if isinstance(reply, bool) else None

    def _read_line(self, deadline_s: float) -> bytes | None:
        process = self._process
        assert process is not None and process.stdout is not None
        descriptor = process.stdout.fileno()
        received = b""
        while not received.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                return None
            if not (chunk := os.read(descriptor, 4096)):
                return None
            received += chunk
        return received

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
