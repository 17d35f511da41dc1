"""The supervisor's one epoll loop, and the client's line on it."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from typing import Any

from verifier.sandbox_wire import RECEIVE_BYTES, frame, take_frames


class EventLoop:
    """Descriptors and who is to be called when one of them has something."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}

    def register(self, descriptor: int, handler: Callable[[int], None]) -> None:
        self.handlers[descriptor] = handler
        self.epoll.register(descriptor, select.EPOLLIN)

    def unregister(self, descriptor: int) -> None:
        if self.handlers.pop(descriptor, None) is not None:
            self.epoll.unregister(descriptor)

    def turn(self, timeout_s: float) -> None:
        """Wait for events, at most so long, and call their handlers."""
        for descriptor, mask in self.epoll.poll(timeout_s):
            handler = self.handlers.get(descriptor)
            if handler is not None:
                handler(mask)


class ClientLine:
    """Messages from the client, and answers to it as fast as its socket takes them."""

    def __init__(
        self,
        client: socket.socket,
        loop: EventLoop,
        on_message: Callable[[dict[str, Any]], None],
        on_end: Callable[[], None],
    ) -> None:
        self.client, self.loop = client, loop
        self.on_message, self.on_end = on_message, on_end
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.waits_to_send = False
        client.setblocking(False)
        loop.register(client.fileno(), self._on_event)

    def send(self, content: dict[str, Any]) -> None:
        self.outgoing += frame(content)
        self._flush()

    def _on_event(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._flush()
        if not mask & ~select.EPOLLOUT:
            return
        try:
            data = self.client.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.on_end()
            return
        self.incoming += data
        for message in take_frames(self.incoming):
            self.on_message(message)

    def _flush(self) -> None:
        try:
            sent = self.client.send(self.outgoing)
            del self.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.on_end()
            return
        if self.waits_to_send != bool(self.outgoing):
            self.waits_to_send = bool(self.outgoing)
            wanted = select.EPOLLIN | (select.EPOLLOUT if self.outgoing else 0)
            with contextlib.suppress(OSError):
                self.loop.epoll.modify(self.client.fileno(), wanted)
