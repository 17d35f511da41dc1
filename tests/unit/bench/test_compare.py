from __future__ import annotations

from pathlib import Path

import pytest

from bench.compare import figures
from cluster.folder.run_folder import RunFolder, RunFolderError


def run(root: Path, greedy: list[list[bool]], solved: float, ids: str = "pqrs") -> Path:
    folder = RunFolder(root)
    for number, verdicts in enumerate(greedy):
        rows = [{"problem_id": i, "greedy": g} for i, g in zip(ids, verdicts, strict=True)]
        folder.write(folder.evaluation_name(number), {"round": number, "problems": rows})
    folder.write("report.json", {"rounds": [{"coverage": {"all": solved}}] * (len(greedy) - 1)})
    return root


def test_pairs_of_runs_are_compared_problem_by_problem(tmp_path: Path) -> None:
    none, some = [False] * 4, [True, False, False, False]
    first = run(tmp_path / "a", [none, [True, True, False, False]], 0.5)
    second = run(tmp_path / "b", [none, some], 0.7)
    other = run(tmp_path / "c", [none, some], 0.4)
    found = figures([first, second], [other, other])
    assert found["rounds"]["0"]["greedy_gained"]["mean"] == 0.0
    entry = found["rounds"]["1"]
    assert (entry["greedy"], entry["greedy_against"]) == (37.5, 25.0)
    assert entry["greedy_gained"]["of_runs"][str(first)][0] == 25.0
    assert entry["greedy_gained"]["mean"] == 12.5
    assert entry["solved"] == pytest.approx(60.0) and entry["solved_against"] == 40.0


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    first = run(tmp_path / "a", [[True] * 4], 0.5)
    stranger = run(tmp_path / "b", [[True] * 4], 0.5, ids="pqrx")
    with pytest.raises(RunFolderError, match=r"a and .*b were not evaluated on the same problems"):
        figures([first], [stranger])
    with pytest.raises(RunFolderError, match="1 runs against 0"):
        figures([first], [])
    with pytest.raises(RunFolderError, match="named twice"):
        figures([first, first], [stranger, stranger])
    with pytest.raises(RunFolderError, match=r"none: no report\.json"):
        figures([first], [tmp_path / "none"])
