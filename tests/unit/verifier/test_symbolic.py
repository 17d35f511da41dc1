"""The sympy process: right when it answers, killed when it does not, never given text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from verifier.answer_parser import parse_answer
from verifier.answer_tree import Label, Node
from verifier.symbolic import SymbolicWorker, Timeout

PATIENT_S = 60.0


@pytest.fixture(scope="module")
def worker() -> Iterator[SymbolicWorker]:
    made = SymbolicWorker()
    assert made.start(PATIENT_S)
    yield made
    made.stop()


def tree(text: str) -> Node:
    return parse_answer(text)[0]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (r"\sum_{n=0}^{\infty} \frac{1}{2^n}", "2", True),
        (r"\sum_{n=0}^{\infty} \frac{1}{2^n}", "3", False),
        (r"\sin^2 x + \cos^2 x", "1", True),
    ],
)
def test_sympy_settles_sums_and_identities_from_any_thread(
    worker: SymbolicWorker, left: str, right: str, expected: bool
) -> None:
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(worker.equal, tree(left), tree(right), PATIENT_S) for _ in range(2)]
        assert [one.result() for one in asked] == [expected, expected]


def test_a_question_out_of_time_is_killed_and_the_next_is_answered(worker: SymbolicWorker) -> None:
    with pytest.raises(Timeout):
        worker.equal(tree(r"\sum_{n=1}^{\infty} \sin(n^2)/n^{1.5}"), tree("5"), 0.2)
    assert worker.start(PATIENT_S)
    assert worker.equal(tree(r"\sum_{n=1}^{\infty} \frac{1}{n^2}"), tree(r"\pi^2/6"), PATIENT_S)


def test_what_has_no_value_is_not_asked() -> None:
    assert SymbolicWorker().equal(Label("no"), Label("yes")) is None
