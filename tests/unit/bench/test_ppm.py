from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.ppm import difference_of_runs, figures
from cluster.folder.run_folder import RunFolder, RunFolderError


def row(greedy: bool, majority: bool | None, search: bool | None, **more: Any) -> dict[str, Any]:
    tokens = {"search_tokens": 105, "sample_tokens": 100}
    best = {"best_of_n": majority, "any_sample": bool(majority or search)}
    best |= {"weighted_search": search}
    return {"greedy": greedy, "majority": majority, "search": search, **best, **tokens, **more}


def run(root: Path, rows: list[dict[str, Any]], pairs: dict[str, dict[str, float]] | None) -> Path:
    folder = RunFolder(root)
    folder.write(folder.evaluation_name(2), {"round": 2, "problems": rows})
    if pairs is not None:
        folder.write(folder.ruler_name(2), {"problems": pairs, "passes": True})
    return root


def test_figures_of_two_runs_and_what_they_lack(tmp_path: Path) -> None:
    first = run(
        tmp_path / "a",
        [row(True, True, True), row(False, False, True), row(True, None, None)],
        {"p": {"pairs": 3.0, "ppm": 3.0, "logprob": 1.0}, "q": {"pairs": 1.0, "ppm": 0.0}},
    )
    more = {"weighted_majority": True}
    rows = [row(False, False, False, **more), row(True, True, True, **more)]
    second = run(tmp_path / "b", rows, None)
    found = figures([first, second])
    assert json.loads(json.dumps(found)) == found
    assert (found["round"], found["pair_accuracy"], found["logprob_accuracy"]) == (2, 0.75, 1 / 3)
    assert (found["pair_accuracy_low"], found["blind_accuracy"]) == (0.0, None)
    entry = found["rounds"]["2"]
    assert (entry["problems"], entry["tokens_search_over_samples"]) == (4, 1.05)
    assert entry["mcts_minus_majority"]["mean"] == 25.0  # 50 and 0 points
    assert entry["mcts_minus_greedy"]["of_runs"][str(first)][0] == 50.0
    assert entry["vote_minus_majority"]["of_runs"] == {str(second): [50.0, 0.0, 100.0]}
    assert found["missing"] == [
        f"{second}, round 2: no ruler",
        f"{first}, round 2: no weighted_majority, so no vote_minus_majority",
    ]
    with pytest.raises(RunFolderError, match=r"none: no evaluation of a round"):
        figures([tmp_path / "none"])


def test_mean_of_runs_has_an_interval_over_problems_and_one_over_runs() -> None:
    wrong = [0.0] * 100
    pairs = {str(n): (wrong, [1.0] * gain + wrong[gain:]) for n, gain in enumerate((2, 4, 6))}
    found = difference_of_runs(pairs)
    assert found["mean"] == pytest.approx(4.0)
    # Standard error of the mean of the runs' shares: sqrt(0.0196 + 0.0384 + 0.0564) / 30 = 1.13.
    assert found["low"] == pytest.approx(4.0 - 1.96 * 1.13, abs=0.3)
    assert found["high"] == pytest.approx(4.0 + 1.96 * 1.13, abs=0.3)
    # Student's t, two degrees of freedom: 4.303 * 2 / sqrt(3) = 4.97.
    assert found["low_of_runs"] == pytest.approx(4.0 - 4.97, abs=0.01)
    assert difference_of_runs({"a": (wrong, wrong)})["low_of_runs"] is None
