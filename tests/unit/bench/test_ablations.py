"""Ablations: intervals, cells that are done once, plain reasoning, the shipped configs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.ablations import (
    CONFIGS,
    AblationConfig,
    ArmConfig,
    Cell,
    Study,
    differences,
    interval,
    read_tables,
)
from bench.plain_reasoning import plain_solution
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder
from learner.checkpoint import CheckpointStore
from rollout.prompt import parse_response
from rollout.search import SearchConfig
from tests.fakes import Failure, ScriptedSandbox

SOLUTION = """<code>
# Step 1: All the shells
from math import gcd
total = 17 * 84
<end_of_step>
# Step 2: The shells of each one
each = total // 12
<end_of_step>
# Step 3: Now print the final answer
print(each)
<end_of_code>
<output>119<end_of_output>
<answer>The answer is \\boxed{119}<end_of_answer>"""


def test_interval_holds_the_mean_and_shrinks_with_more_problems() -> None:
    few, many = interval([0.0, 1.0] * 20), interval([0.0, 1.0] * 500)
    assert few.mean == many.mean == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    # Of a share p of n problems the interval is about 1.96 * sqrt(p * (1 - p) / n) wide each side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.05)
    assert interval([1.0] * 9) == interval([1.0] * 9, seed=3)
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_a_paired_difference_is_taken_over_common_problems() -> None:
    arm = {"a": [1.0, 1.0], "b": [0.0, 1.0], "c": [1.0]}
    reference = {"a": [1.0], "b": [1.0], "d": [0.0]}
    assert differences(arm, reference) == [0.0, -0.5]
    same = interval(differences({"a": [1.0], "b": [0.0]}, {"a": [0.0], "b": [1.0]}))
    assert same.within_noise
    assert not interval([0.4] * 30).within_noise


def sandbox(*outputs: str | Failure) -> ScriptedSandbox:
    steps = parse_response(SOLUTION)
    shows = [
        "\nprint('\\x1f'.join([str(total)]), end='')",
        "\nprint('\\x1f'.join([str(each)]), end='')",
        "",
    ]
    codes = [step.code + show for step, show in zip(steps, shows, strict=False)]
    return ScriptedSandbox(dict(zip(codes, outputs, strict=False)), default=Failure())


async def test_plain_reasoning_shows_formula_and_value_and_runs_no_code() -> None:
    box = sandbox("1428", "119", "119\n")
    text = await plain_solution("t", parse_response(SOLUTION), box)
    assert text == (
        "\n# Step 1: All the shells\ntotal = 17 * 84 = 1428"
        "\n# Step 2: The shells of each one\neach = total // 12 = 119"
        "\n<answer>The answer is \\boxed{119}<end_of_answer>"
    )
    assert box.open_trees == []


async def test_a_solution_whose_code_fails_has_no_plain_form() -> None:
    box = sandbox("1428", Failure())
    assert await plain_solution("t", parse_response(SOLUTION), box) is None
    assert box.open_trees == []


def test_shipped_configs_are_whole_and_name_their_references() -> None:
    tables = {table.table: table for table in read_tables(CONFIGS, [])}
    assert set(tables) == {"data", "heads", "trunks", "rounds", "search"}
    for table in tables.values():
        for arm in table.arms.values():
            SearchConfig.model_validate(arm.search)
            assert (arm.reference or table.reference) in table.arms
    assert tables["data"].arms["plain"].render == "plain"


def test_wrong_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no table nothing"):
        read_tables(CONFIGS, ["nothing"])
    (tmp_path / "x.yaml").write_text("table: data\ntitle: T\nseeds: 3\n")
    with pytest.raises(ConfigError, match=r"x.yaml: unknown key 'seeds'"):
        read_tables(tmp_path, [])


class FakeStudy(Study):
    """Cells without a run."""

    def __init__(self, folder: Path) -> None:
        self.out = RunFolder(folder)
        self.done: list[str] = []
        self.fail: str | None = None
        self._fleet = None

    async def _note(self, name: str) -> dict[str, Any]:
        if name == self.fail:
            raise RuntimeError(name)
        self.done.append(name)
        return {"name": name}

    def cells(self) -> list[Cell]:
        def cell(name: str, *needs: str, engines: bool = False) -> Cell:
            return Cell(name=name, needs=needs, engines=engines, run=partial(self._note, name))

        return [
            cell("sample/0", engines=True),
            cell("train/a/0", "sample/0"),
            cell("train/b/0"),
            cell("greedy/a/0", "train/a/0", engines=True),
            cell("greedy/b/0", "train/b/0", engines=True),
        ]


async def test_cells_are_done_once_and_after_what_they_need(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.fail = "greedy/a/0"
    with pytest.raises(RuntimeError):
        await study.run_cells([], None, 2)
    again = FakeStudy(tmp_path)
    assert await again.run_cells([], None, 2) == []
    order = study.done + again.done
    assert sorted(order) == sorted(cell.name for cell in study.cells())
    for cell in study.cells():
        assert all(order.index(need) < order.index(cell.name) for need in cell.needs)


async def test_only_what_is_asked_for_is_done(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    assert await study.run_cells(["train/*"], None, 1) == ["train/a/0"]
    assert study.done == ["train/b/0"]
    assert await study.run_cells([], 0.0, 1) != []
    assert study.done == ["train/b/0"]


def test_a_table_says_reference_noise_and_missing_cells(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.seeds = [0]
    table = AblationConfig.model_validate(
        {
            "table": "search",
            "title": "Rules",
            "reference": "paper",
            "arms": {"paper": {}, "released": {}, "other": {}},
        }
    )
    study.tables = {"search": table}
    for name, right in (("paper", [True, True, False]), ("released", [True, False, True])):
        problems = [
            {"id": f"p{n}", "right": r, "tokens": 100, "requests": 2, "rollouts": 1, "solutions": 1}
            for n, r in enumerate(right)
        ]
        study.out.write(f"cells/search/{name}/0.json", {"problems": problems})
    text = study._table(table)
    assert "| paper | 66.7 [0.0, 100.0] | reference | 3 | 100 | 2.0 |" in text
    assert "+0.0 [-100.0, +100.0] within noise" in text
    assert "| other | - | - | 0 | - |" in text


async def test_trunk_of_an_arm_is_the_checkpoint_it_names(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.run, study.base = RunFolder(tmp_path), tmp_path / "base"
    study.checkpoints = CheckpointStore(tmp_path / "checkpoints")

    async def trunk(**arm: Any) -> str:
        return await study._trunk(2, ArmConfig(**arm), tmp_path, "a-0", 0)

    with pytest.raises(ConfigError, match="no checkpoint for trunk cold_start"):
        await trunk(trunk="cold_start")
    for number in (0, 1, 2):
        study.checkpoints.publish("policy", number, lambda made: (made / "w").touch(), {})
    assert "round=2" in await trunk()
    assert "round=0" in await trunk(trunk="cold_start", ppm_only_share=0.5)
    assert await trunk(trunk="base") == str(study.base)
    study.checkpoints.publish("ppm", 1, lambda made: (made / "w").touch(), {})
    assert "round=1/ppm" in await trunk(trunk="previous")
