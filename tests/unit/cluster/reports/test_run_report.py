from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.evaluation.shares import shares_by_level
from cluster.reports.plots import as_png, rounds_figure
from cluster.reports.run_report import print_report


def shares(value: float) -> dict[str, float]:
    return dict.fromkeys(("gsm", "math", "olympiad", "all"), value)


def report() -> dict[str, Any]:
    entry = {
        "coverage": {**shares(0.5), "gsm": 1.0},
        "greedy": shares(0.4),
        "majority": None,
        "best_of_n": shares(0.3),
        "search": {**shares(0.2), "olympiad": None},
        "search_over_samples_tokens": 1.014,
        "ppm_pair_accuracy": 0.615,
        "trees": 12,
        "trajectories": 30,
        "correct_trajectories": 9,
        "newest_round_share": 0.875,
        "generated_tokens": 12345,
        "generated_tokens_per_s": 1234.5,
        "sandbox_steps_per_s": 50.0,
        "lost": 1,
        "doubled": 2,
        "seconds": {"rollout": 10.0, "select": 0.2, "train_policy": None},
    }
    return {
        "name": "t",
        "cold_start": {"greedy": shares(0.1)},
        "rounds": [{"round": 1, **entry}, {"round": 2, **entry}],
        "evaluation": {"num_problems": 300, "num_search_problems": 150, "num_rollouts": 4},
        "seconds_total": 99.4,
        "config": {"seed": 3},
    }


def test_shares_count_each_level_and_all_and_none_where_there_is_nothing() -> None:
    assert shares_by_level([("gsm", True), ("gsm", False), ("math", True)]) == {
        "gsm": 0.5,
        "math": 1.0,
        "olympiad": None,
        "all": 2 / 3,
    }


def test_table_fits_eighty_columns_and_adds_up_what_was_lost() -> None:
    output = io.StringIO()
    print_report(report(), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[-3] == "SFT trajectories that the round itself found, %: 88, 88"
    assert lines[-2] == "validation pairs that the round's PPM ranks right, %: 61.5, 61.5"
    assert lines[-1] == "lost 2, doubled 4 (leases against committed rows); 99 s in all"
    row = next(line for line in lines if line.strip().startswith("1 "))
    assert row.split() == [
        *("1", "100", "50", "50", "50"),
        *("40", "40", "40", "40"),
        *("30", "30", "30", "30"),
        *("20", "20", "-", "20", "1.01"),
    ]


def test_plot_of_the_rounds_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(as_png(rounds_figure(report())))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_held_out_problems_that_were_set_aside_are_named_with_their_reasons() -> None:
    output = io.StringIO()
    reasons = {f"q{n}": "OverflowError: five" for n in range(5)}
    print_report({**report(), "set_aside": {"2": reasons}}, Console(file=output, width=80))
    told = " ".join(output.getvalue().split())
    assert "round 2: 5 held-out problems were set aside and count as wrong (q0: Over" in told
    assert "q2: OverflowError: five; and 2 more)" in told
