"""Votes and pass rates, worked by hand."""

from __future__ import annotations

import pytest

from verifier.accuracy import answer_groups, pass_at_k, rank_answers
from verifier.verify import answers_match


def _winner(answers, **options) -> str:
    return rank_answers(answers, **options)[0].answer


def test_answers_vote_together_when_they_are_equal() -> None:
    assert answer_groups(["1/2", "0.5", None, "2", "\\frac12", ""]) == [[0, 1, 4], [3]]
    assert _winner(["3", "1/2", "0.5", None]) == "1/2"


def test_no_answers_give_no_vote() -> None:
    assert rank_answers([None, None]) == []


def test_grouping_by_text_agrees_with_comparing_all_pairs() -> None:
    answers = [
        "7",
        "007",
        "7.0",
        "+7",
        "-7",
        "0",
        "-0",
        "$7$",
        "8",
        "70",
        "\\text{7}",
        ".",
        ",",
        "7%",
    ]
    compared: list[list[int]] = []
    for index, answer in enumerate(answers):
        for group in compared:
            if answers_match(answers[group[0]], answer):
                group.append(index)
                break
        else:
            compared.append([index])
    assert answer_groups(answers) == compared


def test_ranking_names_every_answer_with_its_votes_best_value_and_samples() -> None:
    answers = ["1", "2", "1.0", None, "3", "2"]
    values = [0.2, 0.9, 0.3, 1.0, None, 0.1]
    ranked = rank_answers(answers, values=values)
    assert [(r.answer, r.votes, r.value, r.members) for r in ranked] == [
        ("2", 2, 0.9, (1, 5)),
        ("1.0", 2, 0.3, (2, 0)),
        ("3", 1, None, (4,)),
    ]
    top = rank_answers(answers, values=values, top_k=3)  # 0.9, 0.3 and 0.2 vote
    assert [(r.answer, r.votes, r.value, r.members) for r in top] == [
        ("1.0", 2, 0.3, (2, 0)),
        ("2", 1, 0.9, (1, 5)),
        ("3", 0, None, (4,)),
    ]
    assert rank_answers([None, " "], values=[0.1, 0.2], top_k=1) == []


def test_weights_are_added_up_and_outweigh_a_greater_number() -> None:
    answers = ["1", "1.0", "2", None, "3"]
    ranked = rank_answers(answers, values=[0.1, 0.2, 0.9, 1.0, 0.0], weights=[0.3, 0.1, 0.5, 9, 0])
    assert [(r.answer, r.votes, r.weight, r.members) for r in ranked] == [
        ("2", 1, 0.5, (2,)),
        ("1.0", 2, 0.4, (1, 0)),
        ("3", 1, 0.0, (4,)),
    ]
    # 0.1 + 0.2 is not 0.3 as floats are added: the same weights tie, and the value decides
    tied = ["1", "1", "1", "2", "2", "2"]
    weights = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]
    assert _winner(tied, values=[0, 0, 0, 0, 0, 0.1], weights=weights) == "2"
    assert _winner(tied, values=[0.1, 0, 0, 0, 0, 0], weights=weights) == "1"


def test_a_tie_goes_to_the_higher_value() -> None:
    answers = ["1", "1.0", "2", "2.0"]
    assert _winner(answers, values=[0.1, 0.2, 0.9, 0.0]) == "2"
    assert _winner(answers, values=[0.1, 0.95, 0.9, 0.0]) == "1.0"


def test_a_tie_without_values_is_settled_by_the_seed_alone() -> None:
    picks = {_winner(["1", "2"], seed=seed) for seed in range(20)}
    assert picks == {"1", "2"}
    assert _winner(["1", "2"], seed=3) == _winner(["1", "2"], seed=3)


def test_only_the_top_k_by_value_vote() -> None:
    answers = ["1", "1", "1", "2", "2"]
    values = [0.1, 0.2, 0.3, 0.9, 0.8]
    assert _winner(answers, values=values) == "1"
    assert _winner(answers, values=values, top_k=2) == "2"


@pytest.mark.parametrize(
    ("samples", "right", "k", "expected"),
    [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 0, 4, 0.0), (4, 1, 4, 1.0), (5, 2, 2, 0.7)],
)
def test_pass_at_k_is_the_unbiased_estimate(
    samples: int, right: int, k: int, expected: float
) -> None:
    assert pass_at_k(samples, right, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_answers(["1"], values=[0.1, 0.2]), "one value per answer"),
        (lambda: rank_answers(["1"], top_k=1), "top_k was given without values"),
        (lambda: rank_answers(["1"], values=[0.1], top_k=0), "top_k must be >= 1"),
        (lambda: rank_answers(["1"], values=[float("nan")]), "value 0 is NaN"),
        (lambda: rank_answers(["1"], weights=[]), "expected 1 finite weights"),
        (lambda: rank_answers(["1"], weights=[-0.5]), "finite weights >= 0"),
        (lambda: pass_at_k(3, 4, 1), "num_correct"),
        (lambda: pass_at_k(3, 1, 5), "k must be in"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
