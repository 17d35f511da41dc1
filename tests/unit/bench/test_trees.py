from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bench.trees import RULES, World, facts_of, run_figures
from learner.select import DatasetConfig, select_dataset
from rollout.prompt import RSTAR_TEMPLATE
from tests.builders import answered, code, make_problem, make_tree


@pytest.mark.parametrize("ppm", [False, True])
def test_paper_rules_visit_deep_at_no_more_tokens_than_the_released_ones(ppm: bool) -> None:
    world = World(2, 40)
    paper, first, released = (facts_of(world.search(rules, ppm=ppm)) for rules in RULES.values())
    assert paper["deep"] >= 0.55
    assert first["deep"] < 0.25
    assert paper["tokens"] <= released["tokens"]
    assert paper["clean"] > 2 * released["clean"]


def test_figures_of_a_run_are_read_from_what_it_committed(tmp_path: Path) -> None:
    rounds = [{"preference": False}, {"preference": True}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rounds": rounds}))
    right, wrong = answered("7", correct=True), answered("8", correct=False)
    first = make_tree(code("a = 1", code("b = 1", right, wrong)), problem=make_problem("p1"))
    other = make_tree(right, wrong, problem=make_problem("p2"), round=2)
    for number, trees in ((1, [first]), (2, [first, other])):
        select_dataset(
            trees,
            tmp_path / "datasets" / f"round={number}",
            template=RSTAR_TEMPLATE,
            config=DatasetConfig(validation_share=0.0),
        )
    problems = [
        {"sample_tokens": 100, "search_tokens": 120},
        {"sample_tokens": 100, "search_tokens": 90},
        {"sample_tokens": 0, "search_tokens": 0},
    ]
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "round=2.json").write_text(json.dumps({"problems": problems}))
    assert run_figures(tmp_path) == {
        "deep_pair_share_terminal": 1.0,
        "deep_pair_share_ppm": 0.0,
        "tokens_vs_released": None,
        "budget_ratio": 1.05,
        "newest_round_share": 0.5,
        "distinct_program_share": 1.0,
    }
