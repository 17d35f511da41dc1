"""What engines produced, read: completions cut at their stop strings, one value per text."""

from __future__ import annotations

import math

import pytest

from rollout.engine import (
    Completion,
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    cut_completion,
    values_of,
)
from rollout.prompt import END_OF_CODE, END_OF_STEP, STOP_STRINGS


def read(text: str, *, stopped: bool, stop: tuple[str, ...] = STOP_STRINGS) -> Completion:
    return cut_completion(
        text, stop=stop, stopped=stopped, end_of_sequence="</s>", num_tokens=5, logprob=-1.5
    )


def test_stop_string_stays_at_the_end_and_is_named() -> None:
    completion = read(f"x = 1\n{END_OF_STEP}", stopped=True)
    assert completion.text == f"x = 1\n{END_OF_STEP}"
    assert (completion.stop_string, completion.finish) == (END_OF_STEP, FinishReason.STOP)
    assert (completion.num_tokens, completion.logprob) == (5, -1.5)


def test_text_is_cut_behind_the_earliest_stop_string() -> None:
    text = f"a{END_OF_CODE}b{END_OF_STEP}"
    completion = read(text, stopped=False)
    assert completion.text == f"a{END_OF_CODE}"
    assert (completion.stop_string, completion.finish) == (END_OF_CODE, FinishReason.STOP)


def test_end_of_sequence_is_removed_and_is_no_stop_string() -> None:
    completion = read("the end</s>", stopped=True)
    assert completion.text == "the end"
    assert (completion.stop_string, completion.finish) == (None, FinishReason.STOP)


def test_end_of_sequence_that_was_asked_for_as_stop_string_stays() -> None:
    completion = read("the end</s>", stopped=True, stop=("</s>",))
    assert (completion.text, completion.stop_string) == ("the end</s>", "</s>")


def test_text_ended_by_length_is_whole() -> None:
    completion = read("unfinished</s>", stopped=False)
    assert (completion.text, completion.finish) == ("unfinished</s>", FinishReason.LENGTH)


def test_each_text_has_a_value_within_one_or_none() -> None:
    request = EvaluationRequest(texts=("a", "b", "c", "d", "e"), routing_key="p")
    reply = EvaluationReply(values=(0.25, 1.5, -math.inf, math.nan, -1.5))
    assert values_of(request, reply) == [0.25, 1.0, None, None, -1.0]


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_values_than_texts_is_the_engines_failure(given: int) -> None:
    request = EvaluationRequest(texts=("a", "b"), routing_key="p")
    with pytest.raises(EngineError, match=f"returned {given} values for 2 texts, problem p"):
        values_of(request, EvaluationReply(values=(0.0,) * given))
