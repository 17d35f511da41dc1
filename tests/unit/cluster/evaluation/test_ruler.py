"""The ruler of a round, with scripted models and everything else as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.ruler import Steering, measure, steering_of
from learner.candidates import Recipe
from learner.checkpoint import Checkpoint
from learner.dataset import writing_dataset
from learner.pairs import PairConfig, tree_pairs
from rollout.engine import GenerationRequest
from rollout.prompt import SHORT_TEMPLATE
from rollout.search import SearchConfig
from rollout.store import RunStore, TrajectoryStore, ruler_of
from tests.builders import answered, code, make_problem, make_tree
from tests.fakes import ScriptedPolicy, TablePreference
from tests.local_fleet import LocalFleet

POLICY = Checkpoint(kind="policy", round=2, path="unused", digest="d" * 64)
PPM = Checkpoint(kind="ppm", round=1, path="unused", digest="e" * 64)
RECIPE = Recipe(template=SHORT_TEMPLATE, pairs=PairConfig())
PROBLEMS = [make_problem(f"p{n:02}", text=f"How many in {n}?", answer="3") for n in range(24)]


@pytest.fixture(autouse=True)
def whole_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.fleet.stages.start_symbolic_worker", lambda: True)


def script(request: GenerationRequest) -> list[str]:
    """Half of the programs print the answer; the wrong ones are longer."""
    if request.prompt.endswith("<end_of_output>\n"):
        said = 3 if "print(3)" in request.prompt else 4
        return [f"<answer>\\boxed{{{said}}}<end_of_answer>"]
    return ["print(3)\n<end_of_code>", "print(4 * 1)\n<end_of_code>"]


def fleet(root: Path, ppm: Any) -> LocalFleet:
    made = LocalFleet(root, ScriptedPolicy(script), ppm)
    made.sandbox.outputs = {"print(4 * 1)": "4\n"}
    return made


async def ruler(root: Path, ppm: Any, **config: Any) -> dict[str, Any]:
    own = {"problems": PROBLEMS, "dataset": root / "none"} | config
    record, _ = await measure(
        fleet(root, ppm),  # type: ignore[arg-type]
        own.pop("problems"),
        own.pop("dataset"),
        config=EvaluationConfig(**own),
        search=SearchConfig(template="short", num_candidates=2, num_rollouts=4),
        recipe=RECIPE,
        round=2,
        policy=POLICY,
        ppm=PPM,
        on_progress=lambda done, total, facts: None,
    )
    return record


def knows(text: str) -> float:
    return 0.8 if "print(3)" in text else -0.8


async def test_pair_problems_are_searched_without_the_ppm_and_rank_it(tmp_path: Path) -> None:
    preference = TablePreference(knows)
    record = await ruler(tmp_path / "run", preference)
    assert (record["policy"], record["ppm"]) == (POLICY.version, PPM.version)
    assert (record["num_searched"], record["num_problems"]) == (24, 24)
    assert record["num_pairs"] >= 48 and record["left_out"] == 0
    means = {name: own["mean"] for name, own in record["rankings"].items()}
    assert means == {"ppm": 1.0, "logprob": 1.0, "blind": 1.0}
    assert record["calibration_error"] == pytest.approx(0.1)
    assert (record["passes"], record["why"]) == (True, "")
    store = TrajectoryStore(RunStore(tmp_path / "run"), ruler_of(2))
    trees = list(store.trees())
    assert len(trees) == 24
    assert all(node.value is None for tree in trees for node in tree.nodes)
    # Sealed: measured again, nothing is searched.
    again = fleet(tmp_path / "run", preference)
    found, _ = await measure(
        again,  # type: ignore[arg-type]
        PROBLEMS,
        tmp_path,
        config=EvaluationConfig(),
        search=SearchConfig(template="short", num_candidates=2, num_rollouts=4),
        recipe=RECIPE,
        round=2,
        policy=POLICY,
        ppm=PPM,
        on_progress=lambda done, total, facts: None,
    )
    assert found == record and not again.policy.requests


async def test_ppm_that_guesses_does_not_steer(tmp_path: Path) -> None:
    record = await ruler(tmp_path / "run", TablePreference(lambda text: 0.0))
    assert record["rankings"]["ppm"]["mean"] == 0.5
    assert not steering_of(record).steers
    assert "the lower bound has to be above 55" in steering_of(record).why
    free = await ruler(tmp_path / "free", TablePreference(lambda text: 0.0), min_pair_accuracy=None)
    assert steering_of(free) == Steering(ppm=PPM.version, steers=True, why="")


async def test_without_pair_problems_the_validation_pairs_are_taken(tmp_path: Path) -> None:
    tree = make_tree(
        code("a = 1", answered("3", correct=True)), code("b = 2", answered("8", correct=False))
    )
    with writing_dataset(tmp_path / "data") as writer:
        for pair in tree_pairs(tree, template=SHORT_TEMPLATE, config=RECIPE.pairs):
            writer.add("pairs_validation", pair)
        writer.commit(template="short", counts={}, excluded={}, facts={})
    record = await ruler(
        tmp_path / "run", TablePreference(knows), problems=[], dataset=tmp_path / "data"
    )
    assert record["source"] == "validation pairs"
    assert (record["num_pairs"], record["num_problems"], record["passes"]) == (2, 1, False)
    assert "of 1 problems only, 20 are needed" in record["why"]
    assert "blind" not in record["rankings"]
