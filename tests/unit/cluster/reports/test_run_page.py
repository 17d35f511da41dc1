from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.folder.run_folder import RunFolderError
from cluster.reports.run_facts import (
    answers_below,
    rate_over_time,
    read_curve,
    read_round,
    sample_trees,
)
from cluster.reports.run_report import show_report
from rollout.store import RunStore, TrajectoryStore
from rollout.table import trees_to_table
from rollout.tree import Tree
from tests.builders import (
    answer,
    answered,
    code,
    discarded,
    failed,
    last_code,
    make_problem,
    make_tree,
)
from tests.rulers import ruler_record

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def mixed_tree(name: str = "p1", round: int = 3) -> Tree:
    """Answers 7 (right, valued high) and 8 (wrong, low) behind one step, and two failures."""
    return make_tree(
        code(
            "a = 1  # <script>alert(1)</script>",
            last_code("print(7)", answer("7", correct=True, value=0.9), output="7", value=0.5),
            last_code("print(8)", answer("8", correct=False, value=-0.9), output="8", value=-0.5),
            value=0.1,
        ),
        failed(),
        discarded("bad"),
        problem=make_problem(name, text="How many <b>apples</b>?"),
        round=round,
    )


def shares(value: float) -> dict[str, float]:
    return dict.fromkeys(("gsm", "math", "olympiad", "all"), value)


def write_run(root: Path) -> Path:
    """A small finished run of one round, number 3."""
    trees = TrajectoryStore(RunStore(root), 3)
    for number in range(6):
        unsolved = make_tree(
            answered("8", correct=False), problem=make_problem(f"u{number}"), round=3
        )
        trees.commit(f"shard{number}", [mixed_tree(f"p{number}"), unsolved])
        path = root / trees.read_commit(f"shard{number}").path
        os.utime(path, (1000.0 + 10 * number, 1000.0 + 10 * number))
    trees.seal()
    entry: dict[str, Any] = {
        "round": 3,
        "coverage": shares(0.5),
        "greedy": shares(0.4),
        "majority": shares(0.45),
        "best_of_n": shares(0.3),
        "search": {**shares(0.2), "olympiad": None},
        "any_sample": shares(0.6),
        "ppm_pair_accuracy": 0.615,
        "ppm_metrics": {"num_pairs": 48.0, "pair_accuracy": 0.615, "pair_accuracy_step": 0.6},
        "step_pairs": {"0": 3, "2": 1},
        "node_visits": {"1": 9, "2": 2},
        "trees": 12,
        "trajectories": 30,
        "correct_trajectories": 9,
        "difficulty": {"all": {"easy": 1234, "unsolved": 6}},
        "origins": {"sft_train": {"2": 10, "3": 30}, "pairs_train": {"3": 50}},
        "newest_round_share": 0.75,
        "generated_tokens": 12345,
        "generated_tokens_per_s": 1234.5,
        "sandbox_steps_per_s": 50.0,
        "failed_problems": 0,
        "lost": 0,
        "doubled": 0,
        "deaths": {"sandbox worker": {"deaths": 2, "restarts": 2, "away_s": 1.0}},
        "seconds": {"rollout": 50.0, "select": 0.2, "train_policy": None},
    }
    report = {
        "name": "small <run>",
        "cold_start": {"greedy": shares(0.1)},
        "rounds": [entry],
        "evaluation": {"num_problems": 300, "num_search_problems": 150, "num_rollouts": 4},
        "seconds_total": 99.4,
        "config": {
            "seed": 3,
            "problems": {"train": ["train.parquet"]},
        },
        "cost": {
            "usd": 1.5,
            "usd_per_hour": 36.0,
            "idle_usd": 0.3,
            "by_stage": {"start": 1.0, "round 3: rollout": 0.5},
            "nodes": [],
            "unpriced": [],
            "rounds": {"3": {"usd": 0.5, "per_solved_usd": 0.25, "per_verified_usd": None}},
        },
        "versions": {"python": "3.11"},
        "hardware": {"cores": 2, "cpu": "test", "memory_gib": 8.0},
    }
    (root / "report.json").write_text(json.dumps(report))
    stage = {"examples": 5, "steps": 20, "useful_tokens": 100, "tokens_per_s": 9.0}
    (root / "stages").mkdir()
    (root / "stages" / "round=3-rollout.json").write_text('{"expected": 12, "solved": 6}')
    (root / "stages" / "round=3-train_ppm.json").write_text(
        json.dumps({**stage, "final_loss": 0.5, "calibration": [[9.0, 0.2, 0.3], [8.0, 0.9, 0.7]]})
    )
    log = root / "checkpoints" / "round=3" / "ppm" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 50)))
    return root


def test_answers_are_counted_from_the_leaves_up() -> None:
    tree = mixed_tree()
    below, right = answers_below(trees_to_table([mixed_tree("other"), tree]))
    start = len(tree.nodes)
    assert (below[start], right[start]) == (2, 1)
    by_code = {n.step.code: n.id for n in tree.nodes if n.step is not None and n.step.code}
    assert (below[start + by_code["print(8)"]], right[start + by_code["print(8)"]]) == (1, 0)
    assert np.array_equal(below[:start], below[start:])


def test_round_tells_reliability_q_values_and_failures(tmp_path: Path) -> None:
    facts = read_round(TrajectoryStore(RunStore(write_run(tmp_path / "run")), 3))
    assert (facts.files_read, facts.files) == (6, 6)
    assert facts.answer_bins[9] == (6, pytest.approx(0.95), 1.0)
    assert facts.answer_bins[0] == (6, pytest.approx(0.05), 0.0)
    assert sum(count for count, _, _ in facts.step_bins) == 18  # three valued steps a tree
    assert facts.terminals["too_deep"] == 6
    assert facts.discards == {"code_failed": 6}
    # A right answer, and the two steps that lead to it, in each of six trees.
    assert sum(facts.q_right) == 18
    few = read_round(TrajectoryStore(RunStore(tmp_path / "run"), 3), max_files=2)
    assert (few.files_read, few.files) == (2, 6)


def test_rate_is_tokens_by_time_and_silent_where_times_were_lost() -> None:
    steady = [(1000.0 + n, 100) for n in range(41)]
    points = rate_over_time(steady)
    assert all(rate == pytest.approx(100.0, rel=0.35) for _, rate in points)
    assert sum(rate for _, rate in points) * 40 / len(points) == pytest.approx(4000)
    assert rate_over_time([(5.0, 100)] * 50) == []


def test_curve_is_smoothed_and_survives_a_cut_line(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": n, "loss": 2.0}) for n in range(1, 501)]
    log.write_text("\n".join([*rows, '{"validation": {}}', '{"step": 501, "lo']))
    curve = read_curve(log.read_bytes())
    assert len(curve) <= 120
    assert {loss for _, loss in curve} == {2.0}
    assert read_curve(b"") == []


def test_sample_trees_show_different_outcomes(tmp_path: Path) -> None:
    samples, corrected = sample_trees(TrajectoryStore(RunStore(write_run(tmp_path / "run")), 3))
    assert {why for why, _ in samples} == {
        "solved, after wrong answers too",
        "answered, but never rightly",
    }
    assert (corrected.trajectories, corrected.correcting) == (12, 0)  # of four files


def test_trajectories_that_take_a_step_back_are_counted_and_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    again = code("b = 1", code("b = 2", answered("7", correct=True)))
    trees = TrajectoryStore(RunStore(run), 4)
    trees.commit("shard", [make_tree(again, failed(), problem=make_problem("q<1>"), round=4)])
    trees.seal()
    report = json.loads((run / "report.json").read_text())
    report["rounds"].append({**report["rounds"][0], "round": 4})
    (run / "report.json").write_text(json.dumps(report))
    show_report(run, Console(file=io.StringIO(), width=160))
    text = (run / "report.html").read_text()
    assert "1 of 1 trajectories read of the last round (1 of them right)" in text
    assert "q&lt;1&gt;, right (step 2, code: b)" in text
    assert "25.0" in text and "0: 3, 2: 1" in text and "1: 9, 2: 2" in text


def test_page_escapes_what_models_wrote_and_loads_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    output = io.StringIO()
    show_report(run, Console(file=output, width=160))
    text = (run / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "How many &lt;b&gt;apples" in text and "small &lt;run&gt;" in text
    assert " src=" not in text and "@import" not in text and "url(http" not in text
    assert {p.name for p in run.glob("*.png")} == {
        "report.png",
        "report-coverage.png",
        "report-reliability.png",
        "report-q-values.png",
    }
    assert "sandbox worker 2" in text
    assert "77.86" in text  # of the paper
    assert "10 of round 2, 30 of round 3" in text and "50 of round 3" in text
    assert "75.0" in text  # % of round 3 in its SFT set
    assert "1,234" in text  # easy problems
    assert "0.50" in text
    assert "cost of round 3: $0.50, $0.2500 per solved problem" in text
    assert "page " in output.getvalue()


def test_page_tells_what_the_ppm_ranks_right_and_labels_what_it_chose(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    ruler = ruler_record(3)
    del ruler["problems"]
    head_room = {"mean": 0.15, "low": 0.1, "high": 0.2}
    steering = {"ppm": "ppm-r2-d", "steers": False, "why": "at chance"}
    report["rounds"][0] |= {"ruler": ruler, "steering": steering, "head_room": head_room}
    (run / "report.json").write_text(json.dumps(report))
    output = io.StringIO()
    show_report(run, Console(file=output, width=200))
    text = (run / "report.html").read_text()
    assert "round 3*" in text and "did not pass its ruler" in text
    assert "24 of 30" in text and "15.0 [10.0, 20.0]" in text and "round 3, depth 2" in text
    assert "Round 3 stayed terminal-guided: ppm-r2-d did not pass, at chance." in text
    assert (run / "report-ruler.png").stat().st_size > 5000
    told = " ".join(output.getvalue().split())
    assert "round 3: PPM does not pass: 50.0 [" in told
    assert "round 3 stayed terminal-guided: at chance" in told


def test_folder_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no report; has `rstar evolve` finished"):
        show_report(tmp_path, Console(quiet=True))


def test_a_real_browser_draws_the_page(tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    run = write_run(tmp_path / "run")
    show_report(run, Console(quiet=True))
    picture = tmp_path / "page.png"
    base = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,3000"]
    home = {**os.environ, "HOME": str(tmp_path)}
    address = (run / "report.html").as_uri()
    shown = subprocess.run(
        [*base, "--dump-dom", address], capture_output=True, text=True, timeout=90, env=home
    )
    assert shown.stdout.count("<svg") == 6
    assert "Sample trees" in shown.stdout
    subprocess.run(
        [*base, f"--screenshot={picture}", address], capture_output=True, timeout=90, env=home
    )
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (1100, 3000)
    # A page that stayed white, or lost its charts, packs into a few kilobytes.
    assert picture.stat().st_size > 100_000
