from __future__ import annotations

import numpy as np
import pytest

from rollout.problem import DecontaminationRule
from rollout.problems.decontamination import BenchmarkIndex, BenchmarkProblem, Hit, HitKind
from rollout.problems.text import problem_key, tokenise

LONG = (
    "Aya walks from the harbour to the lighthouse at four kilometres per hour and back at six; "
    "how long is the way if she needs fifty minutes in all?"
)
SHORT = "What is $\\frac{1}{2} + 3$?"


def benchmark(
    text: str, answer: str = "2", name: str = "bench", id: str = "b1"
) -> BenchmarkProblem:
    return BenchmarkProblem(benchmark=name, id=id, text=text, answer=answer)


def hits(index: BenchmarkIndex, *texts: str, answer: str = "2") -> list[Hit]:
    keys = np.array([problem_key(text) for text in texts], np.uint64)
    return index.hits(texts, [answer] * len(texts), keys, tokenise(texts))


def test_the_same_text_is_a_hit_even_when_short_and_laid_out_otherwise() -> None:
    index = BenchmarkIndex([benchmark(LONG), benchmark(SHORT, id="b2")])
    found = hits(index, "no", "What is  \\(\\dfrac{1}{2}+3\\)?", LONG)
    assert [(hit.row, hit.benchmark.id, hit.kind) for hit in found] == [
        (1, "b2", HitKind.TEXT),
        (2, "b1", HitKind.TEXT),
    ]


def test_thirteen_words_in_a_row_are_a_hit_and_twelve_are_not() -> None:
    words = LONG.split()
    index = BenchmarkIndex([benchmark(LONG)])
    (hit,) = hits(index, "It rains. " + " ".join(words[3:16]).upper() + " or so", answer="5")
    assert hit.kind is HitKind.NGRAM
    assert hit.matched.split() == [word.lower() for word in words[3:16]]
    assert hit.overlap == pytest.approx(1 / (len(words) - 12))
    assert not hit.same_answer
    assert hits(index, "It rains. " + " ".join(words[3:15]) + " or so") == []


def test_answers_agree_as_the_grader_says() -> None:
    index = BenchmarkIndex([benchmark(LONG, answer="\\frac{1}{2}")])
    assert [hit.same_answer for hit in hits(index, LONG, answer="0.5")] == [True]
    assert [hit.same_answer for hit in hits(index, LONG, answer="0.25")] == [False]


def test_a_run_in_more_than_three_problems_of_one_benchmark_names_none() -> None:
    phrase = "where m and n are relatively prime positive integers find the sum m plus n"
    few = [benchmark(f"Case {n}: {phrase}", id=f"b{n}") for n in range(3)]
    many = [*few, benchmark(f"Case 77: {phrase}", id="b77")]
    assert len(hits(BenchmarkIndex(few), f"Something else, {phrase}")) == 1
    assert hits(BenchmarkIndex(many), f"Something else, {phrase}") == []
    repeated = [benchmark(few[0].text, id=f"b{n}") for n in range(20)]
    assert len(hits(BenchmarkIndex(repeated), f"Something else, {phrase}")) == 1
    elsewhere = [benchmark(p.text.upper(), name=f"other {n}") for n, p in enumerate(many)]
    assert len(hits(BenchmarkIndex(elsewhere), f"Something else, {phrase}")) == 4


def test_each_benchmark_is_named_once_with_the_problem_most_shared() -> None:
    words = LONG.split()
    index = BenchmarkIndex(
        [
            benchmark(" ".join(words[:14]) + " but not the rest of the text as it was", id="part"),
            benchmark(LONG + " Say why.", id="most"),
            benchmark(LONG, name="other", id="whole"),
        ]
    )
    found = hits(index, LONG, answer="9")
    assert [(hit.benchmark.benchmark, hit.benchmark.id, hit.kind) for hit in found] == [
        ("bench", "most", HitKind.NGRAM),
        ("other", "whole", HitKind.TEXT),
    ]
    assert found[0].overlap == pytest.approx(17 / 19)


def test_the_rule_says_which_hits_remove() -> None:
    index = BenchmarkIndex([benchmark(LONG)])
    changed = LONG.replace("fifty", "forty")
    (same,), (other,), (text,) = (
        hits(index, changed),
        hits(index, changed, answer="7"),
        hits(index, LONG, answer="7"),
    )
    any_, same_answer = DecontaminationRule.ANY, DecontaminationRule.SAME_ANSWER
    assert [hit.removes(any_) for hit in (same, other, text)] == [True, True, True]
    assert [hit.removes(same_answer) for hit in (same, other, text)] == [True, False, True]


def test_without_benchmarks_nothing_is_a_hit() -> None:
    assert hits(BenchmarkIndex([]), LONG, SHORT) == []
