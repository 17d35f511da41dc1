"""The check of a world: it finds the shortcuts it is there to find."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.world import (
    GATES,
    Comparison,
    generated_comparisons,
    main,
    report,
    run_comparisons,
    shares,
)
from learner.select import DatasetConfig, select_dataset
from rollout.prompt import RSTAR_TEMPLATE
from tests.builders import answered, code, make_problem, make_tree


def compared(chosen: str, rejected: str, problem: int = 0) -> Comparison:
    return Comparison(f"p{problem}", "step", "", chosen, rejected)


def pairs(tell: str, count: int = 200) -> list[Comparison]:
    """Pairs of random sums whose wrong sides hold `tell`; "" leaves nothing to find."""
    rng = random.Random(0)

    def text() -> str:
        return f"x = {rng.choice('abcd')} {rng.choice(['+', '-'])} {rng.choice('efgh')}"

    return [compared(text(), text() + tell, number) for number in range(count)]


def test_the_families_that_their_result_decides_pass_the_gates() -> None:
    found = report(generated_comparisons(seed=1, num_problems=360))
    assert found["failed"] == []
    kinds = found["kinds"]
    assert set(kinds) == {"all", "answer", "step"}
    assert kinds["step"]["pairs"] == kinds["answer"]["pairs"] == 360
    assert kinds["all"]["number_only"] == 0


def test_a_token_that_only_wrong_sides_hold_is_found_without_the_question() -> None:
    found = shares(pairs(" * 2"))
    assert found["blind"] > 0.95
    assert found["form"] > 0.95
    assert found["length"] > 0.95


def test_a_wrong_number_is_no_matter_of_form() -> None:
    found = shares([compared("x = 1 + 2", "x = 1 + 77", number) for number in range(50)])
    assert found["number_only"] == 1
    assert found["blind"] == 1
    assert found["form"] == found["length"] == 0.5


def test_where_nothing_tells_about_half_is_ranked_right() -> None:
    found = shares(pairs("", 600))
    assert 0.4 < found["blind"] < 0.6
    assert found["length"] == 0.5


def test_folds_are_by_problem() -> None:
    # A problem's own token is in its pairs only: a fit of the other problems cannot know it.
    own = [compared("x" * n, "y" * n, n) for n in range(1, 41) for _ in range(5)]
    assert shares(own)["blind"] == 0.5


def test_pairs_of_a_run_are_read_without_their_question(tmp_path: Path) -> None:
    right, wrong = answered("7", correct=True), answered("8", correct=False)
    trees = [
        make_tree(code("a = 1", code("b = 1", right, wrong)), problem=make_problem(f"p{n}"))
        for n in range(3)
    ]
    select_dataset(
        trees,
        tmp_path / "datasets" / "round=1",
        template=RSTAR_TEMPLATE,
        config=DatasetConfig(validation_share=0.0),
    )
    found = run_comparisons(tmp_path, None)
    assert found == run_comparisons(tmp_path, [1])
    assert found
    for pair in found:
        assert make_problem(pair.problem).text not in pair.shared
        assert "a = 1" in pair.shared + pair.chosen
    assert len({pair.problem for pair in found}) == 3


def test_the_exit_status_says_whether_all_gates_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["world", "--problems", "360"])
    assert main() == 0
    monkeypatch.setitem(GATES, "blind", 0.0)
    assert main() == 1
    assert '"failed": ["blind"]' in capsys.readouterr().out
