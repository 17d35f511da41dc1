"""What the processes of a sandbox say to each other, written once for both ends.

    client --frames--> supervisor     a 4-byte length and JSON
    supervisor --orders--> zygote     JSON with the channel of the root to be
    supervisor --SPAWN--> state       the channel of the child; the REQUEST already waits in it
    child --HELLO, REPLY--> supervisor

Messages to states are packets of a fixed layout, because a state is not trusted to keep to it.
No pickle anywhere.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

REQUEST = struct.Struct("<4sIIIIIIQI")
"""magic, nonce, step number, bytes kept, characters accepted, error bytes, CPU s, address space in
bytes, bytes of code."""
REPLY = struct.Struct("<4sIBBdQIII")
"""magic, nonce, status, truncated, seconds in the step, characters printed, three text lengths."""
REQUEST_MAGIC, REPLY_MAGIC = b"RSQ1", b"RSA1"
HELLO, ROOT_HELLO, SPAWN, NO_FORK, READY = b"H", b"L", b"S", b"N", b"READY"
FRAME_BYTES = 60_000
"""Larger messages travel as several packets of at most this size."""
RECEIVE_BYTES = 1 << 16
"""Read at once between client and supervisor; for more than 128 KiB memory is mapped each time."""
TWIN = "\x1f"
"""In the name of a tree: what follows it keeps trees of one name apart that are open at a time, and
is no part of what their random state follows from."""
OK, ERROR, MEMORY, OUTPUT_LIMIT, DENIED = range(5)
REPLY_STATUSES = ("ok", "error", "memory", "output_limit", "denied")
"""Names of the five codes above."""


def frame(content: Mapping[str, Any]) -> bytes:
    """A message between client and supervisor, its length in front."""
    body = json.dumps(content).encode("ascii")
    return len(body).to_bytes(4, "little") + body


def take_frames(buffer: bytearray) -> Iterator[dict[str, Any]]:
    """Remove and read the whole messages at the start of a buffer."""
    while len(buffer) >= 4:
        end = 4 + int.from_bytes(buffer[:4], "little")
        if len(buffer) < end:
            return
        content = json.loads(buffer[4:end])
        del buffer[:end]
        yield content
