"""The client's end of a sandbox: one supervisor process, one thread that reads its answers.

    caller --request()--> Future    any thread; the frame is sent from there if the pipe has room
    reader thread                   answers -> futures; supervisor gone -> a new one, journal
                                    restored, requests sent again

The journal keeps, for each state the caller was told of, how it came to be (parent, code, limits,
output hash); after a restart the states exist again as evicted ones and come back by replay. A
request is answered exactly once, whatever happens to the supervisor in between.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

from verifier.sandbox_interpreter import SUPERVISOR, start_interpreter
from verifier.sandbox_wire import RECEIVE_BYTES, frame, take_frames

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_MAX_RESTARTS = 5
_RESTART_WINDOW_S = 60.0
_SHUTDOWN_TIMEOUT_S = 10.0


class SandboxError(RuntimeError):
    """The sandbox itself failed: it could not start, was shut down, or kept breaking."""


@dataclass(slots=True)
class _Pending:
    frame: bytes
    future: Future[Any]
    fields: dict[str, Any]
    restarts: int = 0


class SupervisorClient:
    """Requests and answers over one supervisor, restarted when it dies."""

    capabilities: Mapping[str, Any]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start a supervisor; SandboxError if it reports that it cannot run here.

        Args:
            settings: `limits` in wire form, `isolation`, `cores` (None: all), `share` of the
                machine, `withheld` layers.
        """
        self._settings = settings
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 1
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._journal: dict[str, dict[str, Any]] = {}
        self._open_trees: dict[str, dict[str, Any]] = {}
        self._restarts: list[float] = []
        self._closing = False
        self._failure = ""
        self._owner_pid = os.getpid()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._start()
        except BaseException:
            os.close(self._wake_fd)
            raise
        self._thread = threading.Thread(target=self._serve, name="sandbox-client", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ start and end

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = start_interpreter(SUPERVISOR, theirs)
        try:
            ours.settimeout(_START_TIMEOUT_S)
            ours.sendall(frame(self._settings))
            received = bytearray()
            while (answer := next(take_frames(received), None)) is None:
                if not (part := ours.recv(1 << 16)):
                    raise EOFError("the supervisor ended while starting")
                received += part
            if "failed" in answer:
                raise SandboxError(answer["failed"])
        except (OSError, EOFError) as error:
            process.kill()
            process.wait()
            ours.close()
            raise SandboxError(f"the sandbox supervisor did not start: {error!r}") from error
        except SandboxError:
            process.wait()
            ours.close()
            raise
        ours.setblocking(False)
        self._socket, self._process = ours, process
        self.capabilities = answer["capabilities"]
        for layer, state in self.capabilities["layers"].items():
            if state.startswith("off") and layer in self.capabilities["required"]:
                logger.warning("sandbox layer missing: %s layer=%s", state, layer)

    def shutdown(self) -> None:
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(_SHUTDOWN_TIMEOUT_S)
        self._socket.close()
        try:
            self._process.wait(_SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._wake_fd)

    # ------------------------------------------------------------------ requests

    def request(self, operation: str, **fields: Any) -> Future[Any]:
        """Send one request; the future gets its answer, ValueError or SandboxError."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closing or self._failure:
                raise SandboxError(self._failure or "the sandbox is shut down")
            number = self._next_id
            self._next_id += 1
            content = {"op": operation, **fields}
            pending = _Pending(frame({"id": number, **content}), future, content)
            self._pending[number] = pending
            self._send(pending.frame)
        return future

    def _send(self, message: bytes) -> None:
        """Called with the lock held."""
        if not self._outgoing:
            try:
                sent = self._socket.send(message)
            except BlockingIOError:
                sent = 0
            except OSError:
                # the reader thread sees the end of the supervisor and sends it all again
                return
            if sent == len(message):
                return
            message = message[sent:]
        self._outgoing += message
        os.eventfd_write(self._wake_fd, 1)

    # ------------------------------------------------------------------ the reader thread

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wake_fd, selectors.EVENT_READ)
        selector.register(self._socket, selectors.EVENT_READ)
        try:
            while not self._closing:
                wanted = selectors.EVENT_READ
                if self._outgoing:
                    wanted |= selectors.EVENT_WRITE
                selector.modify(self._socket, wanted)
                lost = False
                for key, events in selector.select():
                    if key.fd == self._wake_fd:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(self._wake_fd)
                    else:
                        if events & selectors.EVENT_WRITE:
                            self._flush()
                        if events & selectors.EVENT_READ:
                            lost = not self._receive()
                if lost and not self._closing:
                    selector.unregister(self._socket)
                    self._restart()
                    selector.register(self._socket, selectors.EVENT_READ)
        except Exception as error:
            self._failure = f"the sandbox broke: {error!r}"
            if not isinstance(error, SandboxError):
                logger.exception("sandbox client thread ended")
        finally:
            selector.close()
            self._fail_all(self._failure or "the sandbox is shut down")

    def _flush(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            sent = self._socket.send(self._outgoing)
            del self._outgoing[:sent]

    def _receive(self) -> bool:
        """Take in what has come; False when the supervisor is gone."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._incoming += data
        for answer in take_frames(self._incoming):
            self._answer(answer)
        return bool(data)

    def _answer(self, answer: dict[str, Any]) -> None:
        with self._lock:
            pending = self._pending.pop(answer.pop("id"), None)
            if pending is None:
                return
            if not answer.keys() & {"value_error", "failed"}:
                self._record(pending, answer)
        with contextlib.suppress(InvalidStateError):
            if "value_error" in answer:
                pending.future.set_exception(ValueError(answer["value_error"]))
            elif "failed" in answer:
                pending.future.set_exception(SandboxError(answer["failed"]))
            else:
                pending.future.set_result(answer)

    def _record(self, pending: _Pending, answer: dict[str, Any]) -> None:
        """Note in the journal what the caller is about to learn."""
        fields = pending.fields
        if fields["op"] == "open":
            self._open_trees[fields["problem_id"]] = {**fields, "root": answer["state"]}
        elif fields["op"] == "close":
            self._open_trees.pop(fields["problem_id"], None)
            closed = fields["problem_id"]
            for state in [s for s, e in self._journal.items() if e["problem_id"] == closed]:
                del self._journal[state]
        elif fields["op"] == "run":
            for code, result in zip(fields["codes"], answer["results"], strict=True):
                result["attempts"] += pending.restarts
                entry = result.pop("journal", None)
                if entry is not None and entry["state"] not in self._journal:
                    self._journal[entry["state"]] = {
                        **entry,
                        "parent": fields["state"],
                        "code": code,
                        "limits": fields["limits"],
                    }

    def _restart(self) -> None:
        self._socket.close()
        code = self._process.wait()
        now = time.monotonic()
        self._restarts = [then for then in self._restarts if now - then < _RESTART_WINDOW_S]
        if len(self._restarts) >= _MAX_RESTARTS:
            raise SandboxError(
                f"the supervisor died {len(self._restarts) + 1} times within "
                f"{_RESTART_WINDOW_S:.0f} s, last with exit code {code}"
            )
        self._restarts.append(now)
        logger.error("sandbox supervisor died, starting another exit_code=%s", code)
        self._start()
        with self._lock:
            self._incoming.clear()
            self._outgoing.clear()
            restore = {
                "id": 0,
                "op": "restore",
                "next_number": self._next_id << 20,
                "trees": list(self._open_trees.values()),
                "states": list(self._journal.values()),
            }
            self._outgoing += frame(restore)
            for pending in self._pending.values():
                pending.restarts += 1
                self._outgoing += pending.frame

    def _fail_all(self, message: str) -> None:
        with self._lock:
            self._failure = self._failure or message
            waiting, self._pending = self._pending, {}
        for pending in waiting.values():
            with contextlib.suppress(InvalidStateError):
                pending.future.set_exception(SandboxError(message))
