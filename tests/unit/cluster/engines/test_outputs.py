"""Pieces of vLLM's output put together."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from cluster.engines.outputs import CachedPrefixes, HeldOutputs


@dataclass
class Stats:
    num_cached_tokens: int


class Logprobs(NamedTuple):
    token_ids: Any
    logprobs: Any
    ranks: Any
    counts: Any = None


@dataclass
class Output:
    """The fields of vLLM's `EngineCoreOutput` that are looked at."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    new_logprobs: Any = None
    events: Any = None
    prefill_stats: Any = None


def always(request_id: str) -> bool:
    return True


def test_a_sequence_is_sent_once_with_all_its_tokens() -> None:
    held = HeldOutputs()
    assert held.take([Output("a", [1]), Output("b", [5])], always) == []
    assert held.take([Output("a", [2]), Output("b", [6], "stop")], always) == [
        Output("b", [5, 6], "stop")
    ]
    assert held.take([Output("a", [3], "length")], always) == [Output("a", [1, 2, 3], "length")]
    assert len(held) == 0


def test_what_came_with_any_piece_is_sent_with_the_last() -> None:
    held = HeldOutputs()
    held.take([Output("a", [1], events=["queued"], prefill_stats=Stats(32))], always)
    held.take([Output("a", [2], events=["preempted"])], always)
    (sent,) = held.take([Output("a", [3], "stop")], always)
    assert (sent.events, sent.prefill_stats) == (["queued", "preempted"], Stats(32))


def test_log_probabilities_are_joined_in_order() -> None:
    def piece(token: int, logprob: float) -> Logprobs:
        return Logprobs(np.array([[token]]), np.array([[logprob]]), np.array([token]))

    held = HeldOutputs()
    held.take([Output("a", [1], new_logprobs=piece(1, -0.5))], always)
    (sent,) = held.take([Output("a", [2], "stop", new_logprobs=piece(2, -0.25))], always)
    assert sent.new_logprobs.token_ids.tolist() == [[1], [2]]
    assert sent.new_logprobs.logprobs.tolist() == [[-0.5], [-0.25]]
    assert sent.new_logprobs.ranks.tolist() == [1, 2]


def test_a_sequence_that_is_watched_while_it_grows_is_sent_piece_by_piece() -> None:
    held = HeldOutputs()
    pieces = [Output("a", [1]), Output("a", [2], "stop")]
    sent = [held.take([piece], lambda request_id: False) for piece in pieces]
    assert sent == [[Output("a", [1])], [Output("a", [2], "stop")]]


def test_a_sequence_of_one_piece_is_sent_as_it_is() -> None:
    assert HeldOutputs().take([Output("a", [1], "stop")], always) == [Output("a", [1], "stop")]


def test_an_aborted_sequence_is_forgotten() -> None:
    held = HeldOutputs()
    held.take([Output("a", [1]), Output("b", [2])], always)
    held.forget(["a", "unknown"])
    assert len(held) == 1


class Processor:
    """What is used of vLLM's `OutputProcessor`."""

    def __init__(self, **requests: str) -> None:
        self.request_states = {
            sequence: SimpleNamespace(external_req_id=request)
            for sequence, request in requests.items()
        }
        self.given: list[str] = []

    def process_outputs(self, outputs: list[Output], time_s: float, *, stats: Any = None) -> str:
        self.given += [output.request_id for output in outputs]
        return f"processed at {time_s}"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["streamed", "whole-answers"])
def test_cached_tokens_are_what_was_there_before_the_request(order: tuple[int, ...]) -> None:
    """Whichever sequence's first piece comes first: held ones come as they end."""
    processor = Processor(**{"0_p-7-ab": "p-7", "1_p-7-ab": "p-7", "2_p-7-ab": "p-7", "p-8": "p-8"})
    prefixes = CachedPrefixes(processor)
    outputs = [
        Output("0_p-7-ab", [1], prefill_stats=Stats(32)),
        Output("1_p-7-ab", [1], prefill_stats=Stats(96)),
        Output("2_p-7-ab", [1], prefill_stats=Stats(96)),
    ]
    alone = Output("p-8", [1], prefill_stats=Stats(64))
    given = [*(outputs[index] for index in order), alone]
    assert processor.process_outputs(given, 3.0, stats=None) == "processed at 3.0"
    processor.process_outputs([Output("0_p-7-ab", [2])], 4.0)
    assert len(processor.given) == 5
    assert [prefixes.take("p-7"), prefixes.take("p-8"), prefixes.take("p-7")] == [32, 64, 0]


def test_an_aborted_request_leaves_no_count() -> None:
    prefixes = CachedPrefixes(processor := Processor())
    processor.process_outputs([Output("gone", [1], prefill_stats=Stats(32))], 1.0)
    assert prefixes.take("gone") == 0
