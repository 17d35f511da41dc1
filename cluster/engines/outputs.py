"""vLLM's output put right: pieces of a sequence joined, cached tokens counted once a request.

HeldOutputs      in the engine process (`cluster.engines.scheduler`)
CachedPrefixes   in the process that asks it, on CPU and GPU alike
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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


class CachedPrefixes:
    """Prompt tokens of each request that the prefix cache held before it came.

    vLLM tells those of the sequence that ended last, and all but the first sequence of a request
    find the whole prompt there, left by the first: the fewest are what was there before.
    """

    def __init__(self, processor: Any) -> None:
        """
        Args:
            processor: vLLM's `OutputProcessor`; what it is given passes through here first.
        """
        self._fewest: dict[str, int] = {}
        self._states = processor.request_states
        self._process = processor.process_outputs
        processor.process_outputs = self._look

    def take(self, request_id: str) -> int:
        """Of a request that has ended, by the id it was sent with; forgets it."""
        return self._fewest.pop(request_id, 0)

    def _look(self, outputs: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        for output in outputs:
            state = self._states.get(output.request_id)  # None: aborted
            if output.prefill_stats is not None and state is not None:
                request_id, found = state.external_req_id, output.prefill_stats.num_cached_tokens
                self._fewest[request_id] = min(found, self._fewest.get(request_id, found))
        return self._process(outputs, *arguments, **options)


def _joined(pieces: list[Any]) -> Any:
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    columns = (np.concatenate([piece[column] for piece in pieces]) for column in range(3))
    return type(pieces[0])(*columns)
