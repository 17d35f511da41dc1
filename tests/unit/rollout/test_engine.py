"""What engines produced, read: one value per text."""

from __future__ import annotations

import math

import pytest

from rollout.engine import (
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    values_of,
)


def test_each_text_has_a_value_within_one_or_none() -> None:
    request = EvaluationRequest(texts=("a", "b", "c", "d", "e"), routing_key="p")
    reply = EvaluationReply(values=(0.25, 1.5, -math.inf, math.nan, -1.5))
    assert values_of(request, reply) == [0.25, 1.0, None, None, -1.0]


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_values_than_texts_is_the_engines_failure(given: int) -> None:
    request = EvaluationRequest(texts=("a", "b"), routing_key="p")
    with pytest.raises(EngineError, match=f"returned {given} values for 2 texts, problem p"):
        values_of(request, EvaluationReply(values=(0.0,) * given))
