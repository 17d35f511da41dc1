from __future__ import annotations

import asyncio
import io
import json
import os
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from rich.console import Console

import cluster.runs.solve
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolderError
from cluster.jobs.attempts import Attempts
from cluster.runs.solve import (
    PathLog,
    SolveView,
    printable,
    read_problem,
    read_steps,
    run_solve,
    solve_config,
)
from learner.checkpoint import Checkpoint, CheckpointStore, Kind, write_prompt_template
from rollout.engine import EngineError, GenerationRequest
from rollout.methods import Cost, Event, EventKind, Method
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference

# ---------------------------------------------------------------- the question


def test_problem_is_its_text_or_stdin_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("What is 3 + 4?\n")
    texts = [
        read_problem("What is 3 + 4?", io.StringIO()),
        read_problem("-", io.StringIO("  What is 3 + 4?\n")),
        read_problem(f"@{path}", io.StringIO()),
    ]
    assert {problem.text for problem in texts} == {"What is 3 + 4?"}
    assert len({problem.id for problem in texts}) == 1
    assert texts[0].golds == ()


@pytest.mark.parametrize(
    ("argument", "stdin", "message"),
    [
        ("  \n", "", "the problem is empty"),
        ("-", "\n", "stdin is empty"),
        ("@{tmp}/none.txt", "", "none.txt: cannot be read: No such file"),
        ("@{tmp}/latin.txt", "", "latin.txt: not UTF-8"),
        ("@{tmp}", "", "cannot be read: Is a directory"),
        ("broken \udcff", "", "the problem: not UTF-8"),
    ],
)
def test_question_that_cannot_be_read_is_named(
    tmp_path: Path, argument: str, stdin: str, message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=message):
        read_problem(argument.replace("{tmp}", str(tmp_path)), io.StringIO(stdin))


# ---------------------------------------------------------------- the config


def publish(run: Path, kind: Kind, round: int) -> Checkpoint:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        write_prompt_template(directory, "short")

    return CheckpointStore(run / "checkpoints").publish(kind, round, write)


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """Round 2 has a policy and no PPM yet, as while it is trained."""
    run = tmp_path / "run"
    for kind, round in (("policy", 0), ("policy", 1), ("ppm", 1), ("policy", 2)):
        publish(run, kind, round)  # type: ignore[arg-type]
    stored = {
        "name": "demo",
        "seed": 5,
        "cluster": {"policy": {"replicas": 8, "num_gpus": 0.5}, "dashboard_port": 8265},
        "policy_engine": {"max_model_len": 512},
        "search": {"num_candidates": 3, "temperature": 0.8, "template": "short"},
        "evaluation": {"max_solution_tokens": 160, "vote_top_k": 6, "num_candidates": 5},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    return run


def test_run_gives_the_models_of_its_last_finished_round_and_its_settings(
    tmp_path: Path, finished_run: Path
) -> None:
    config = solve_config(tmp_path, run=finished_run, method=Method.BEAM, trajectories=7)
    assert "round=1/policy" in str(config.policy)
    assert "round=1/ppm" in str(config.ppm)
    assert (config.seed, config.policy_engine.max_model_len) == (5, 512)
    assert (config.search.num_candidates, config.search.template) == (5, "short")
    assert config.search.temperature == 0.8  # the evaluation has none of its own
    assert (config.method.name, config.method.num_trajectories) == (Method.BEAM, 7)
    assert (config.method.max_solution_tokens, config.method.top_k) == (160, 6)
    # one of each, where the run had them
    assert (config.cluster.policy.replicas, config.cluster.policy.num_gpus) == (1, 0.5)
    assert config.cluster.dashboard_port is None


def test_later_settings_win_over_earlier_ones(tmp_path: Path, finished_run: Path) -> None:
    file = tmp_path / "solve.yaml"
    file.write_text("seed: 6\nmethod: {name: beam, top_k: 2}\n")
    config = solve_config(
        tmp_path,
        run=finished_run,
        config=file,
        method=Method.MCTS,
        overrides=["method.top_k=3", "search.num_candidates=9"],
    )
    assert (config.seed, config.method.name, config.method.top_k) == (6, Method.MCTS, 3)
    assert config.search.num_candidates == 9


def test_run_before_its_first_ppm_gives_its_policy_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    publish(run, "policy", 0)
    (run / "config.yaml").write_text("name: demo\n")
    assert solve_config(tmp_path, run=run).ppm is None


def test_named_policy_brings_its_template(tmp_path: Path) -> None:
    policy = Path(publish(tmp_path / "run", "policy", 0).path)
    config = solve_config(tmp_path, policy=policy)
    assert (config.search.template, config.ppm, config.method.name) == ("short", None, Method.MCTS)
    assert config.method.num_trajectories == 64


def test_what_is_missing_for_a_solve_is_named(tmp_path: Path, finished_run: Path) -> None:
    policy = Path(publish(tmp_path / "other", "policy", 0).path)
    with pytest.raises(ConfigError, match="no policy: give --policy DIR, or --run RUN"):
        solve_config(tmp_path)
    with pytest.raises(ConfigError, match="method beam needs a PPM: give --ppm DIR"):
        solve_config(tmp_path, policy=policy, method=Method.BEAM)
    with pytest.raises(ConfigError, match="not both"):
        solve_config(tmp_path, policy=policy, run=finished_run)
    with pytest.raises(RunFolderError, match="nowhere: no such folder; expected"):
        solve_config(tmp_path, run=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"unknown key 'method\.beam_with'; did you mean"):
        solve_config(tmp_path, policy=policy, overrides=["method.beam_with=2"])
    weighed = ["method.logprob_weight=1", "method.name=weighted-majority", "ppm=p"]
    with pytest.raises(ConfigError, match=r"needs policy_engine\.logprobs: true"):
        solve_config(tmp_path, policy=policy, overrides=weighed)


# ---------------------------------------------------------------- while it goes

FIRST = "<code>\nx = 3\n<end_of_step>"
OTHER = "<code>\nx = 9\n<end_of_step>"
LAST = "\nprint(x + 4)\n<end_of_code>\n<output>7<end_of_output>\n"
SEVEN = "<answer>\\boxed{7}<end_of_answer>"
NINE = "<answer>\\boxed{9}<end_of_answer>"


def event(text: str, value: float | None = None, tokens: int = 0) -> Event:
    kind = EventKind.ANSWERED if text.endswith("<end_of_answer>") else EventKind.EXTENDS
    return Event(kind=kind, text=text, value=value, cost=Cost(generated_tokens=tokens, seconds=0.5))


def test_steps_are_told_once_as_they_are_chosen_with_output_and_answer() -> None:
    log = PathLog()
    assert log.lines(event("")) == []
    assert log.lines(event(FIRST, 0.25, 1200)) == [
        "step 1  (value +0.25, 1,200 tokens, 0.5 s)",
        "    x = 3",
    ]
    assert log.lines(event(FIRST, 0.25)) == []
    assert log.lines(event(FIRST + LAST, 0.1)) == [
        "step 2  (value +0.10, 0 tokens, 0.5 s)",
        "    print(x + 4)",
        "output: 7",
    ]
    assert log.lines(event(FIRST + LAST + SEVEN)) == ["answer: 7  (0 tokens, 0.5 s)"]


def test_before_an_answer_another_path_is_told_only_if_it_is_valued_more() -> None:
    log = PathLog()
    log.lines(event(FIRST, 0.2))
    assert log.lines(event(OTHER, 0.1)) == []
    assert log.lines(event(OTHER, 0.3))[:2] == [
        "another path, from step 1:",
        "step 1  (value +0.30, 0 tokens, 0.5 s)",
    ]


def test_after_an_answer_only_better_answers_are_told() -> None:
    log = PathLog()
    log.lines(event(FIRST + LAST + SEVEN, 0.2))
    assert log.lines(event(OTHER, 0.9)) == []
    assert log.lines(event(FIRST + LAST + NINE, 0.1)) == []
    assert log.lines(event(FIRST + LAST + NINE, 0.3)) == [
        "another path, from step 3:",
        "answer: 9  (value +0.30, 0 tokens, 0.5 s)",
    ]
    assert (log.best, log.best_value, log.num_answers) == ("9", 0.3, 3)


def test_text_outside_the_grammar_is_passed_over() -> None:
    log = PathLog()
    assert log.lines(event("no marker")) == []
    assert log.lines(event("<answer>no box<end_of_answer>")) == []
    assert read_steps("print(1)\n<end_of_code>") == []


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\tc\n") == "a\ufffd[2Jb\ufffd\tc\n"


# ---------------------------------------------------------------- the whole command


class FakeFleet:
    """Scripted engines in place of Ray and vLLM."""

    failures = 0
    started: tuple[str, ...] = ()

    def __init__(self, config: Any, folder: Any) -> None:
        self.policy = ScriptedPolicy(self._write, failures=type(self).failures)
        self.preference = TablePreference({SEVEN: 0.5}, default=-0.5)
        self.sandbox = ScriptedSandbox(default="7\n")
        self.attempts = Attempts(1, note=lambda text: None)

    @staticmethod
    def _write(request: GenerationRequest) -> list[str]:
        if request.prompt.endswith("<end_of_output>\n"):
            return [SEVEN if "print(3 + 4)" in request.prompt else NINE]
        return ["print(3 + 4)\n<end_of_code>", "print(4 + 5)\n<end_of_code>"]

    async def start(self, policy: Path, *, version: str, learner: bool) -> None:
        print("noise of a library")
        os.write(1, b"noise of a process\n")
        type(self).started = ("policy",)

    async def serve_preference(self, checkpoint: Checkpoint) -> None:
        type(self).started += ("ppm",)

    def describe(self) -> str:
        return "fakes"

    async def stop(self, note: Any) -> None:
        type(self).started += ("stopped",)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> type[FakeFleet]:
    class Own(FakeFleet):
        pass

    monkeypatch.setattr(cluster.runs.solve, "Fleet", Own)
    monkeypatch.setattr(cluster.runs.solve, "with_policy_form", lambda config: config)
    monkeypatch.setattr(cluster.runs.solve, "check_preference_checkpoint", lambda path: None)
    return Own


def test_result_names_steps_output_answer_value_runners_up_and_cost(
    fleet: type[FakeFleet], finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(run_solve("What?", run=finished_run, trajectories=2, overrides=["method.top_k=1"]))
    out = capfd.readouterr().out
    live, _, result = out.partition("\n\n")
    assert "fakes up after" in live
    assert "    print(3 + 4)\noutput: 7\nanswer: 7  (value +0.50," in live
    assert result.splitlines()[:-1] == [
        "solution:",
        "step 1",
        "    print(3 + 4)",
        "output: 7",
        "answer: 7",
        "    value +0.500, 1 of 1 votes, 1 of 2 solutions",
        "runners-up:",
        "    9: value -0.500, 0 of 1 votes, 1 of 2 solutions",
    ]
    assert result.splitlines()[-1].startswith("mcts: ")
    assert fleet.started == ("policy", "ppm", "stopped")


def test_json_is_the_only_thing_on_stdout(
    fleet: type[FakeFleet], finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(run_solve("What?", run=finished_run, trajectories=2, as_json=True))
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    record = json.loads(out)
    assert (record["answer"], record["value"], record["votes"]) == ("7", 0.5, 1)
    assert [step["kind"] for step in record["steps"]] == ["last_code", "answer"]
    assert (record["output"], record["num_solutions"]) == ("7\n", 2)
    assert [answer["answer"] for answer in record["answers"]] == ["7", "9"]
    assert record["generated_tokens"] > 0 < record["scored_tokens"]
    assert record["seconds"] >= 0 <= record["start_seconds"]
    assert "noise of a library" in err and "noise of a process" in err and "step 1" in err


def test_no_ppm_is_started_for_a_method_that_uses_none(
    fleet: type[FakeFleet], finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(run_solve("What?", run=finished_run, method=Method.GREEDY))
    assert fleet.started == ("policy", "stopped")
    assert "answer: 7\n    not valued, 1 of 1 votes, 1 of 1 solutions" in capfd.readouterr().out


def test_engines_are_stopped_and_stdout_restored_when_a_part_fails(
    fleet: type[FakeFleet], finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fleet.failures = 1
    with pytest.raises(EngineError, match="scripted failure"):
        asyncio.run(run_solve("What?", run=finished_run, as_json=True))
    assert fleet.started[-1] == "stopped"
    print("after")
    assert capfd.readouterr().out == "after\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self


def test_terminal_shows_the_best_path_and_what_it_cost_so_far() -> None:
    console = Console(file=Terminal(), force_terminal=True, width=80, height=20)
    view = SolveView(console)
    view.on_event(event(FIRST + LAST + SEVEN, 0.2, 1234))
    view.on_event(event(OTHER, 0.9, 2345))
    with console.capture() as captured:
        console.print(view._render())
    shown = captured.get()
    assert "    x = 3" in shown and "x = 9" not in shown
    assert "2,345 tokens   0 s   answers found: 1, best: 7 (value +0.20)" in shown
