"""The miniature's problems: runnable, disjoint, seeded, balanced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rollout.problem import Level
from rollout.problems import miniature_checked
from rollout.problems.miniature import (
    FAMILIES,
    Miniature,
    generate,
    render_solution,
    write_miniature,
)
from rollout.prompt import StepKind, parse_response

# Runs every program of a JSON list in a namespace of its own; prints the JSON list of outputs.
RUN_ALL = """
import contextlib, io, json, sys
outputs = []
for program in json.load(sys.stdin):
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        exec(program, {})
    outputs.append(captured.getvalue())
json.dump(outputs, sys.stdout)
"""


@pytest.fixture(scope="module")
def miniature() -> Miniature:
    return generate(seed=3, num_demonstrations=360, num_train=480, num_test=240)


def outputs_of(trajectories: Sequence[str]) -> list[str]:
    """What the program of each trajectory prints."""
    programs = [
        "\n".join(step.code for step in parse_response(trajectory) if step.code)
        for trajectory in trajectories
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_solution_runs_and_prints_its_answer(miniature: Miniature) -> None:
    problems = [*miniature.demonstrations, *miniature.train]
    outputs = outputs_of([problem.solution for problem in problems])
    assert {problem.family for problem in problems} == set(FAMILIES)
    for problem, output in zip(problems, outputs, strict=True):
        printed = parse_response(problem.solution)[-2].output
        assert output == f"{printed}\n", problem
        assert output.split()[0] == problem.answer, problem


def test_a_solution_is_a_trajectory_of_code_output_and_answer(miniature: Miniature) -> None:
    for problem in miniature.demonstrations:
        steps = parse_response(problem.solution)
        kinds = [step.kind for step in steps]
        assert "".join(step.rendered for step in steps) == problem.solution
        assert kinds[-2:] == [StepKind.LAST_CODE, StepKind.ANSWER]
        assert set(kinds[:-2]) == {StepKind.CODE}
        assert (steps[-2].output or "").split()[0] == problem.answer
        assert steps[-1].answer == problem.answer


def test_solution_text_has_the_released_step_format() -> None:
    text = render_solution([("Add", "from math import lcm\ntotal = 2 + 3")], 5)
    assert text == (
        "<code>\n# Step 1: Add\nfrom math import lcm\ntotal = 2 + 3\n<end_of_step>"
        "\n# Step 2: Now print the final answer\nprint(total)\n<end_of_code>"
        "\n<output>5<end_of_output>\n<answer>The answer is \\boxed{5}<end_of_answer>"
    )


def test_no_problem_text_occurs_twice(miniature: Miniature) -> None:
    texts = [
        problem.text
        for split in (miniature.demonstrations, miniature.train, miniature.test)
        for problem in split
    ]
    assert len(texts) == 1080
    assert len(set(texts)) == len(texts)


def test_a_seed_decides_every_problem_and_another_seed_gives_others() -> None:
    counts = {"num_demonstrations": 36, "num_train": 36, "num_test": 36}
    first = generate(seed=1, **counts)
    assert generate(seed=1, **counts) == first
    other = generate(seed=2, **counts)
    assert not {problem.text for problem in other.test} & {problem.text for problem in first.test}


def test_test_set_does_not_depend_on_the_other_counts() -> None:
    small = generate(seed=5, num_demonstrations=18, num_train=0, num_test=90)
    large = generate(seed=5, num_demonstrations=400, num_train=500, num_test=90)
    assert small.test == large.test


def test_problems_held_out_for_pairs_change_no_other_set_and_occur_in_none(tmp_path: Path) -> None:
    counts = {"seed": 3, "num_demonstrations": 20, "num_train": 40, "num_test": 10}
    plain, held = generate(**counts), generate(**counts, num_pairs=30)
    assert (plain.train, plain.test, plain.pairs) == (held.train, held.test, ())
    others = {p.text for p in (*held.train, *held.test, *held.demonstrations)}
    assert len({p.text for p in held.pairs} - others) == 30
    files = write_miniature(tmp_path, held)
    assert files.pairs is not None and len(pq.read_table(files.pairs)) == 30
    assert write_miniature(tmp_path / "plain", plain).pairs is None


def test_levels_and_families_are_balanced(miniature: Miniature) -> None:
    for split in (miniature.demonstrations, miniature.train, miniature.test):
        assert set(Counter(problem.level for problem in split).values()) == {len(split) // 3}
        per_family = Counter(problem.family for problem in split)
        shares = {name: len(split) * family.weight // 60 for name, family in FAMILIES.items()}
        assert per_family == shares


def test_paraphrases_are_uneven_only_in_demonstrations(miniature: Miniature) -> None:
    shown = Counter((p.family, p.paraphrase) for p in miniature.demonstrations)
    searched = Counter((p.family, p.paraphrase) for p in miniature.train)
    # 18 or 24 per family at 8:6:2:1:1 of 18, largest remainders first; 24 or 32 uniformly.
    assert [shown["buy", index] for index in range(5)] == [8, 6, 2, 1, 1]
    assert [shown["signed", index] for index in range(5)] == [11, 8, 3, 1, 1]
    assert [searched["buy", index] for index in range(5)] == [5, 5, 5, 5, 4]
    assert [searched["signed", index] for index in range(5)] == [7, 7, 6, 6, 6]


def test_uneven_counts_are_spread_to_the_last_problem() -> None:
    miniature = generate(seed=0, num_demonstrations=7, num_train=20, num_test=1)
    assert [len(miniature.demonstrations), len(miniature.train), len(miniature.test)] == [7, 20, 1]
    assert sorted(Counter(p.level for p in miniature.train).values()) == [6, 7, 7]


def test_ids_are_unique_and_name_the_split(miniature: Miniature) -> None:
    ids = [p.id for p in (*miniature.demonstrations, *miniature.train, *miniature.test)]
    assert len(set(ids)) == len(ids)
    assert miniature.train[7].id == "miniature-train-000007"


def test_a_subset_of_families_is_drawn_alone() -> None:
    miniature = generate(
        seed=0, num_demonstrations=12, num_train=12, num_test=12, families=["vieta", "times"]
    )
    assert Counter(problem.family for problem in miniature.train) == {"times": 6, "vieta": 6}


def test_demonstrations_show_half_of_the_compositions() -> None:
    miniature = generate(
        seed=0, num_demonstrations=200, num_train=200, num_test=0, families=["compose"]
    )

    def kinds(problems: tuple) -> set[tuple[str, str, str]]:
        code = [[step.code for step in parse_response(problem.solution)] for problem in problems]
        return {
            tuple("".join(c for c in part if not c.isdigit()) for part in steps[:3])
            for steps in code
        }

    assert len(kinds(miniature.demonstrations)) == 12
    assert len(kinds(miniature.train)) == 24


def test_what_is_open_is_decided_by_the_result(miniature: Miniature) -> None:
    problems = [p for p in (*miniature.demonstrations, *miniature.train) if p.misreadings]
    assert {problem.family for problem in problems} == set(miniature_checked.FAMILIES)
    outputs = outputs_of([wrong for p in problems for wrong in p.misreadings])
    for problem, output in zip(problems, outputs, strict=True):
        (wrong,) = problem.misreadings
        asked = re.search(r"The result is (a|no) multiple of (\d)\.", problem.text)
        assert asked is not None, problem
        fits = {
            text: int(text) % int(asked[2]) == 0 for text in (problem.answer, output.split()[0])
        }
        assert list(fits.values()) == ([True, False] if asked[1] == "a" else [False, True])
        assert output == f"{parse_response(wrong)[-2].output}\n"
        for trajectory, (answer, check) in zip(
            (problem.solution, wrong), fits.items(), strict=True
        ):
            assert parse_response(trajectory)[-2].output == f"{answer} {check}"
            assert parse_response(trajectory)[-1].answer == answer
            assert trajectory.endswith(f", multiple: {check}<end_of_answer>")


def test_either_reading_and_either_outcome_is_as_frequent() -> None:
    miniature = generate(
        seed=3,
        num_demonstrations=0,
        num_train=1800,
        num_test=0,
        families=list(miniature_checked.FAMILIES),
    )
    counts = Counter(
        (problem.family, problem.solution.endswith("True<end_of_answer>"))
        for problem in miniature.train
    )
    assert len(counts) == 12 and min(counts.values()) > 120
    added = Counter(
        "total + " in problem.solution for problem in miniature.train if problem.family == "signed"
    )
    assert min(added.values()) > 120


def test_written_files_hold_the_generated_problems(tmp_path: Path) -> None:
    counts = {"num_demonstrations": 18, "num_train": 36, "num_test": 18}
    miniature = generate(seed=4, **counts)
    files = write_miniature(tmp_path / "new" / "world", miniature)
    columns = ["id", "source", "level", "problem", "answer"]
    extra = ["family", "paraphrase"]
    demonstrations = pq.read_table(files.demonstrations)
    assert demonstrations.column_names == [*columns, "solution", *extra]
    assert demonstrations["solution"].to_pylist() == [p.solution for p in miniature.demonstrations]
    for path, problems in ((files.train, miniature.train), (files.test, miniature.test)):
        table = pq.read_table(path)
        assert table.column_names == [*columns, *extra]
        assert table["problem"].to_pylist() == [problem.text for problem in problems]
        assert table["answer"].to_pylist() == [problem.answer for problem in problems]
        assert set(table["level"].to_pylist()) == {level.value for level in Level}
    names = sorted(path.name for path in (tmp_path / "new" / "world").iterdir())
    assert names == ["demonstrations.parquet", "test.parquet", "train.parquet"]


def test_an_unknown_family_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"unknown family 'vietta'; did you mean 'vieta'\?"):
        generate(seed=0, num_demonstrations=1, num_train=1, num_test=1, families=["vietta"])


@pytest.mark.parametrize(
    ("families", "message"), [([], "families is empty"), (["buy", "buy"], "names one twice")]
)
def test_an_empty_or_repeated_choice_of_families_is_refused(
    families: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(seed=0, num_demonstrations=1, num_train=1, num_test=1, families=families)


def test_a_negative_count_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="num_train must be >= 0, got -1"):
        generate(seed=0, num_demonstrations=1, num_train=-1, num_test=1)


def test_an_exhausted_family_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.problems.miniature.MAX_DRAWS_PER_PROBLEM", 3)
    with pytest.raises(ValueError, match="family 'gcd_lcm' ran out of new problems for test"):
        generate(seed=0, num_demonstrations=0, num_train=0, num_test=30_000, families=["gcd_lcm"])
