"""What a run of self-evolution refuses before anything is started, and the order of its stages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from cluster.evaluation.ruler import Steering
from cluster.fleet.keeper import PoolLostError
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import MARKED_TRUNK
from cluster.jobs.attempts import Attempts
from cluster.runs.config import RunConfig
from cluster.runs.evolve import Evolution
from cluster.telemetry.progress import ProgressView
from rollout.problem import Level, Problem
from rollout.prompt import MARKERS
from rollout.store import TrajectoryStore
from tests.builders import answered, code, make_tree
from tests.models import write_byte_tokenizer, write_tiny_policy

GENERAL, MARKED = Path("general"), Path("run/base_with_markers")


def evolution(tmp_path: Path, *templates: str, base: Path = MARKED, **own: Any) -> Evolution:
    data = {
        "name": "x",
        "run_dir": tmp_path / "run",
        "problems": {"train": ["p.jsonl"], "demonstrations": "d.jsonl"},
        "models": {"base_model": GENERAL},
        "rounds": [{"preference": False, "template": template} for template in templates],
    }
    made = Evolution(RunConfig.model_validate(data | own), ProgressView(Console(quiet=True)))
    made.untrained, made.base_model = GENERAL, base
    return made


def test_a_general_model_is_bootstrapped_or_gets_a_cold_start(tmp_path: Path) -> None:
    evolution(tmp_path, "bootstrap", "rstar")._check_templates()
    evolution(tmp_path, "rstar", "rstar", cold_start={})._check_templates()
    with pytest.raises(ConfigError, match=r"rounds.0.template: general was never fine-tuned"):
        evolution(tmp_path, "rstar")._check_templates()


def test_a_base_whose_tokenizer_has_the_markers_needs_no_worked_examples(tmp_path: Path) -> None:
    evolution(tmp_path, "rstar", base=GENERAL)._check_templates()
    with pytest.raises(ConfigError, match=r"bootstrap, but the tokenizer of general holds"):
        evolution(tmp_path, "bootstrap", base=GENERAL)._check_templates()


def test_worked_examples_are_for_the_first_round_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds.1.template: bootstrap .* round 2"):
        evolution(tmp_path, "bootstrap", "bootstrap")._check_templates()
    with pytest.raises(ConfigError, match=r"rounds.0.template: bootstrap .* round 1"):
        evolution(tmp_path, "bootstrap", cold_start={})._check_templates()


@pytest.mark.parametrize("trunk", ["policy", "previous", "cold_start", "base"])
def test_ppm_grows_from_the_checkpoint_the_config_names(tmp_path: Path, trunk: str) -> None:
    models = {"base_model": GENERAL, "ppm_trunk": trunk}
    run = evolution(tmp_path, "rstar", cold_start={}, models=models)
    for number in (0, 1):
        run.checkpoints.publish("policy", number, lambda folder: (folder / "weights").touch(), {})
    run.checkpoints.publish("ppm", 1, lambda folder: (folder / "weights").touch(), {})
    run.given_trunk = run._given_trunk()
    policy = run.checkpoints.current("policy", 1)
    cold = run.checkpoints.current("policy", 0)
    ppm = run.checkpoints.current("ppm", 1)
    assert policy is not None and cold is not None and ppm is not None
    wanted = {"policy": policy.path, "previous": ppm.path, "cold_start": cold.path, "base": MARKED}
    assert run._trunk(policy, ppm) == Path(wanted[trunk])
    if trunk == "previous":
        assert run._trunk(policy, None) == Path(policy.path)


@pytest.mark.parametrize(("low", "grows_from"), [(0.47, "policy"), (0.53, "ppm")])
def test_ppm_that_ranks_no_better_than_chance_is_not_gone_on_from(
    tmp_path: Path, low: float, grows_from: str
) -> None:
    models = {"base_model": GENERAL, "ppm_trunk": "previous"}
    run = evolution(tmp_path, "rstar", models=models)
    for kind, number in (("policy", 2), ("ppm", 1)):
        run.checkpoints.publish(kind, number, lambda folder: (folder / "weights").touch(), {})
    policy, ppm = run.checkpoints.current("policy", 2), run.checkpoints.current("ppm", 1)
    assert policy is not None and ppm is not None
    run.folder.write(run.folder.ruler_name(1), {"rankings": {"ppm": {"low": low}}})
    wanted = {"policy": policy.path, "ppm": ppm.path}
    assert run._trunk(policy, ppm) == Path(wanted[grows_from])


def test_a_directory_as_trunk_gets_the_markers_and_is_an_input_of_the_run(tmp_path: Path) -> None:
    plain = write_tiny_policy(tmp_path / "plain", hidden=32, layers=1)
    write_byte_tokenizer(plain, markers=MARKERS[1:])
    run = evolution(tmp_path, "rstar", models={"base_model": GENERAL, "ppm_trunk": str(plain)})
    made = run._given_trunk()
    assert made == run.folder.place(MARKED_TRUNK)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert all(len(tokenizer(mark, add_special_tokens=False).input_ids) == 1 for mark in MARKERS)
    assert run.inputs == [plain]
    assert run._given_trunk() == made


def test_a_trunk_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    models = {"base_model": GENERAL, "ppm_trunk": "cold-start"}
    with pytest.raises(ConfigError, match=r"models.ppm_trunk: .*cold-start.*expected policy, prev"):
        evolution(tmp_path, "rstar", models=models)._given_trunk()
    with pytest.raises(ValueError, match="ppm_trunk: cold_start, but the run has no cold_start"):
        evolution(tmp_path, "rstar", models=models | {"ppm_trunk": "cold_start"})
    with pytest.raises(ValueError, match=r"previous goes on from a PPM.*train_ppm.lm_weight"):
        models |= {"ppm_trunk": "previous"}
        evolution(tmp_path, "rstar", models=models, train_ppm={"lm_weight": 0.1})


class FleetScript:
    """What a run asks of its fleet, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.attempts = Attempts(
            3, mend=lambda: self.events.append("mend"), note=lambda text: self.events.append(text)
        )

    async def start(self, policy: Path, *, marked: bool) -> None:
        self.events.append("start")
        self.attempts.reasons = ["start, 1 of 3: no place"]

    def describe(self) -> str:
        return ""

    def want_learner(self) -> None:
        self.events.append("want learner")

    async def leave_learner(self) -> None:
        self.events.append("leave learner")


async def test_a_stage_that_loses_machines_is_done_again_and_the_learner_goes_after_its_last_fit(
    tmp_path: Path,
) -> None:
    made = evolution(tmp_path, "rstar", base=GENERAL)
    fleet = FleetScript()
    lost = {"rollout": 1, "train_ppm": 2}

    def stage(name: str, result: Any = None) -> Any:
        async def work(*_: Any) -> Any:
            fleet.events.append(name)
            if lost.get(name, 0):
                lost[name] -= 1
                raise PoolLostError(f"{name} lost its machines")
            made.folder.record_stage(1, name, 2.0, trees=7)
            return result

        return work

    async def nothing(*_: Any) -> None:
        return None

    for name, value in {
        "fleet": fleet,
        "session": SimpleNamespace(record_start=nothing),
        "_record_lineage": nothing,
        "_rollout": stage("rollout"),
        "_select": stage("select"),
        "_train": lambda number, kind, *_: stage(f"train_{kind}", SimpleNamespace(path="x"))(),
        "_ruler": stage("ruler"),
        "_evaluate": stage("evaluate"),
    }.items():
        setattr(made, name, value)
    await made._rounds()
    assert [event for event in fleet.events if not event.startswith("done again")] == [
        *("start", "rollout", "mend", "rollout", "want learner", "select"),
        *(
            "train_policy",
            "train_ppm",
            "mend",
            "train_ppm",
            "mend",
            "train_ppm",
            "leave learner",
            "ruler",
            "evaluate",
        ),
    ]
    assert made.folder.stage(0, "start")["retries"] == ["start, 1 of 3: no place"]
    record = made.folder.stage(1, "rollout")
    reason = "round 1: rollout, 1 of 3: rollout lost its machines"
    assert record == {"seconds": 2.0, "trees": 7, "retries": [reason]}
    assert len(made.folder.stage(1, "train_ppm")["retries"]) == 2
    assert "retries" not in made.folder.stage(1, "evaluate")


def measured(made: Evolution, *, passes: bool, ppm: str = "ppm-r1-d") -> None:
    why = "" if passes else "50 % of 90 held-out pairs right"
    made.folder.write(made.folder.ruler_name(1), {"ppm": ppm, "passes": passes, "why": why})


async def test_ppm_that_does_not_pass_does_not_steer_and_that_decision_stands(
    tmp_path: Path,
) -> None:
    rounds = [{"preference": False}, {"preference": True}]
    made = evolution(tmp_path, base=GENERAL, rounds=rounds)
    assert made._steering(1) is made._steering(2) is None  # not asked for; not measured
    measured(made, passes=False)
    steering = made._steering(2)
    assert steering == Steering(ppm="ppm-r1-d", steers=False, why="50 % of 90 held-out pairs right")
    await made._record_lineage(2, steering)
    measured(made, passes=True, ppm="ppm-r1-other")
    assert made._steering(2) == steering
    assert made.folder.read("lineage/round=2.json")["steering"]["steers"] is False  # type: ignore[index]


def test_round_that_was_begun_with_its_ppm_goes_on_with_it(tmp_path: Path) -> None:
    rounds = [{"preference": False}, {"preference": True}]
    made = evolution(tmp_path, base=GENERAL, rounds=rounds)
    measured(made, passes=False)
    TrajectoryStore(made.store, 2).create_plan("base", b"{}")
    assert made._steering(2) == Steering(ppm="ppm-r1-d", steers=True, why="")


class ServingScript(FleetScript):
    """What it is asked to serve and to search with."""

    async def serve_policy(self, *_: Any, **__: Any) -> None:
        return None

    async def serve_preference(self, ppm: Any) -> None:
        self.events.append("serve PPM")

    async def rollout(self, *_: Any, preference: bool, **__: Any) -> Any:
        raise PoolLostError(f"preference={preference}")


@pytest.mark.parametrize("steers", [True, False])
async def test_a_round_is_searched_as_was_decided(tmp_path: Path, steers: bool) -> None:
    rounds = [{"preference": False}, {"preference": True}]
    made = evolution(tmp_path, base=GENERAL, rounds=rounds)
    made.fleet = fleet = ServingScript()  # type: ignore[assignment]
    steering = Steering(ppm="ppm-r1", steers=steers, why="at chance")
    with pytest.raises(PoolLostError, match=f"preference={steers}"):
        await made._rollout(2, None, SimpleNamespace(), steering)  # type: ignore[arg-type]
    assert fleet.events == (["serve PPM"] if steers else [])


def problem(name: str, text: str = "", of: str = "") -> Problem:
    text = text or f"What is {name}?"
    return Problem(id=name, source="s", level=Level.GSM, text=text, answer="1", rewording_of=of)


async def test_a_selection_that_ends_with_its_driver_leaves_what_it_counted(tmp_path: Path) -> None:
    """It ends as soon as the dataset is there; the next one finds it and selects nothing."""
    run = evolution(tmp_path, "rstar")
    run.demonstrations = None
    trees = TrajectoryStore(run.store, 1)
    trees.commit("s1", [make_tree(code("x = 7", answered("7", correct=True)))])
    trees.seal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.view, "end", lambda text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await run._select(1)
    await run._select(1)
    record = run.folder.stage(1, "select")
    assert (record["trajectories"], record["correct_trajectories"]) == (1, 1)


def test_a_share_is_taken_out_of_the_training_problems_by_origin(tmp_path: Path) -> None:
    data = {"train": ["p.jsonl"], "pair_share": 0.3}
    made = evolution(tmp_path, "rstar", problems=data)
    known = problem("t", "What is p1?")
    made.test = [known]
    made.train = [problem(f"p{n}") for n in range(200)]
    made.train += [problem(f"again {n}", of=f"p{n}") for n in range(200)]
    everything = {p.id for p in made.train}
    made._hold_out_pairs(None)
    held, left = {p.original for p in made.pair_problems}, {p.original for p in made.train}
    assert 40 < len(held) < 80 and not held & left and "p1" in left
    assert {p.id for p in made.pair_problems} | {p.id for p in made.train} == everything


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"id": "q", "problem": "What  is p1?"}, "problem 'q' of .* is training problem 'p1' too"),
        ({"id": "q", "problem": "new", "rewording_of": "p1"}, "a variation of it"),
        ({"id": "q", "problem": "What is t?"}, "is test problem 't' too"),
    ],
)
def test_pair_problems_may_be_used_for_nothing_else(
    tmp_path: Path, row: dict[str, str], wanted: str
) -> None:
    made = evolution(tmp_path, "rstar", problems={"train": ["p.jsonl"]})
    made.train, made.test = [problem("p1")], [problem("t")]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**row, "answer": "1", "level": "gsm"}))
    with pytest.raises(ConfigError, match=wanted):
        made._hold_out_pairs(path)
    path.write_text(json.dumps({"id": "q", "problem": "new", "answer": "1", "level": "gsm"}))
    made._hold_out_pairs(path)
    assert [p.id for p in made.pair_problems] == ["q"] and len(made.train) == 1
