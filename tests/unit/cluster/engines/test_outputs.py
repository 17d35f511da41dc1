"""Pieces of vLLM's output put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cluster.engines.outputs import HeldOutputs


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


def test_cached_tokens_are_those_of_the_first_sequence_of_a_request() -> None:
    held = HeldOutputs()
    outputs = [
        Output("0_policy-0-7-ab", [1], "stop", prefill_stats=Stats(32)),
        Output("1_policy-0-7-ab", [1], "stop", prefill_stats=Stats(96)),
        Output("0_policy-0-8-cd", [1], "stop", prefill_stats=Stats(0)),
        Output("policy-0-9-ef", [1], "stop", prefill_stats=Stats(64)),
    ]
    sent = held.take(outputs, always)
    assert [output.prefill_stats.num_cached_tokens for output in sent] == [32, 32, 0, 64]
