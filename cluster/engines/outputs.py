"""Pieces of vLLM's output put together, in the engine process (`cluster.engines.scheduler`).

The prompt tokens found in the prefix cache are told of the first sequence of a request. vLLM tells
those of the sequence that ended last, and all but the first find the whole prompt there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_MAX_KNOWN_PREFIXES = 4096
"""Requests whose first sequence's cached tokens are remembered for the others."""


@dataclass(slots=True)
class _Held:
    """A sequence whose tokens stay here until it ends."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    prefill_stats: Any = None


class HeldOutputs:
    """Pieces of output kept until their sequence ends."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._cached_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def take(self, outputs: Iterable[Any], wants_whole: Callable[[str], bool]) -> list[Any]:
        """Outputs of one step to send now; those of sequences that go on are kept.

        Args:
            outputs: vLLM's `EngineCoreOutput`s, at most one a sequence.
            wants_whole: asked once a sequence, at its first piece, unless that is all of it.
        """
        sent = []
        for output in outputs:
            if output.prefill_stats is not None:
                self._count_prefix_once(output.request_id, output.prefill_stats)
            held = self._held.get(output.request_id)
            if held is None:
                if output.finish_reason is not None or not wants_whole(output.request_id):
                    sent.append(output)
                    continue
                held = self._held[output.request_id] = _Held()
            held.token_ids += output.new_token_ids
            if output.new_logprobs is not None:
                held.logprobs.append(output.new_logprobs)
            held.events += output.events or ()
            if output.prefill_stats is not None:
                held.prefill_stats = output.prefill_stats
            if output.finish_reason is not None:
                del self._held[output.request_id]
                output.new_token_ids = held.token_ids
                output.new_logprobs = _joined(held.logprobs)
                output.events = held.events or None
                output.prefill_stats = held.prefill_stats
                sent.append(output)
        return sent

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is kept of aborted sequences."""
        for request_id in request_ids:
            self._held.pop(request_id, None)

    def _count_prefix_once(self, request_id: str, stats: Any) -> None:
        """Give every sequence of a request the cached tokens that its first one found."""
        index, _, request = request_id.partition("_")
        if not index.isdigit():
            return  # the only sequence of its request
        if index == "0":
            self._cached_tokens[request] = stats.num_cached_tokens
            if len(self._cached_tokens) > _MAX_KNOWN_PREFIXES:
                del self._cached_tokens[next(iter(self._cached_tokens))]
        stats.num_cached_tokens = self._cached_tokens.get(request, stats.num_cached_tokens)


def _joined(pieces: list[Any]) -> Any:
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    columns = (np.concatenate([piece[column] for piece in pieces]) for column in range(3))
    return type(pieces[0])(*columns)
