"""A run is read back from nothing but its folder."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.evaluation.shares import problems_by_level
from cluster.folder.changes import Changes
from cluster.folder.lineage import record_lineage, record_start
from cluster.folder.run_folder import COST, ESTIMATE, RunFolder, RunFolderError
from cluster.jobs.queue import StagePlan
from cluster.machines.cost import CostAccount, MachinePrice, NodeUse, cost_lines, run_cost
from cluster.runs.config import RunConfig
from cluster.telemetry.live import STALE_S, LiveFile, Snapshot
from cluster.watch import status as status_module
from cluster.watch import status_view
from cluster.watch.status import RunStatus, read_status
from cluster.watch.status_view import short, show_status
from learner.checkpoint import CheckpointStore
from rollout.difficulty import SuspectLabel
from rollout.problem import Level, Problem
from rollout.store import RunStore, TrajectoryStore
from tests.builders import answer, make_problem, make_tree
from tests.clock import set_clock
from tests.rulers import ruler_record

PROBLEMS = {"g1": Level.GSM, "g2": Level.GSM, "m1": Level.MATH, "o1": Level.OLYMPIAD}


def problem(id_: str) -> Problem:
    return make_problem(id_, answer="7", level=PROBLEMS[id_])


class Run:
    """A run of two rounds without held-out problems, made by hand."""

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root)
        config = RunConfig.model_validate(
            {
                "name": "by hand",
                "run_dir": str(root),
                "problems": {"train": ["train.parquet"]},
                "models": {"base_model": "base"},
                "rounds": [{"preference": False}, {"preference": True}],
            }
        )
        self.folder.keep_config(config)
        self.folder.write_problems([problem(id_) for id_ in PROBLEMS])
        self.store = RunStore(root)
        self.checkpoints = CheckpointStore(self.folder.checkpoints)

    def trees(self, round: int) -> TrajectoryStore:
        return TrajectoryStore(self.store, round)

    def plan(self, round: int, stage: str = "base", index: int = 0) -> None:
        plan = StagePlan(
            round=round,
            stage=stage,
            tree_index=index,
            problem_ids=tuple(PROBLEMS),
            shard_size=2,
            seed=0,
        )
        self.trees(round).create_plan(stage, plan.to_json())

    def commit(self, round: int, shard: str, solved: dict[str, bool], **more: object) -> None:
        trees = [
            make_tree(
                answer("7" if right else "8", correct=right), problem=problem(id_), round=round
            )
            for id_, right in solved.items()
        ]
        info = {"policy": f"policy-r{round - 1}-abc", "ppm": "", "stage": "base"}
        assert self.trees(round).commit(shard, trees, info=info, **more)  # type: ignore[arg-type]

    def publish(self, kind: str, round: int) -> None:
        def write(directory: Path) -> None:
            (directory / "weights").write_text(f"{kind} {round}", encoding="utf-8")

        info = {"base": "/models/base", "data_digest": "d" * 64}
        self.checkpoints.publish(kind, round, write, info)  # type: ignore[arg-type]

    def finish_round(self, round: int) -> None:
        self.plan(round)
        self.commit(round, "s1", {"g1": True, "g2": False})
        self.commit(round, "s2", {"m1": True}, failed={"o1": "ValueError: no such glyph"})
        self.trees(round).seal()
        directory = self.folder.dataset(round)
        directory.mkdir(parents=True)
        manifest = {"template": "rstar", "digest": "e" * 64, "info": {"rounds": [round]}}
        (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        self.folder.record_stage(round, "select", 3.0)
        for kind in ("policy", "ppm"):
            self.publish(kind, round)
        self.folder.write(self.folder.ruler_name(round), ruler_record(round))

    def account(self, at_s: float, **progress: object) -> None:
        """A driver that was at work at `at_s`, and then was killed."""
        now = [at_s - 100.0]
        snapshot = Snapshot(**progress)  # type: ignore[arg-type]
        live = LiveFile(self.folder.store, lambda: snapshot, clock=lambda: now[0])
        live.__enter__()
        now[0] = at_s
        live._write()
        live._ended.set()

    def status(self, now_s: float | None = None, host: str | None = None) -> RunStatus:
        now_s = time.time() if now_s is None else now_s
        return read_status(self.folder.root, now_unix_s=now_s, host=host)

    def shown(self) -> str:
        output = io.StringIO()
        show_status(self.folder.root, Console(file=output, width=80))
        return output.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def states(status: RunStatus, round: int) -> list[str]:
    return [s.state for r in status.rounds if r.round == round for s in r.stages.values()]


def test_run_that_has_only_begun_is_all_pending(run: Run) -> None:
    status = run.status()
    assert states(status, 1) == states(status, 2) == ["pending"] * 5
    assert status.problems == {"gsm": 2, "math": 1, "olympiad": 1, "all": 4}
    assert status.go_on.startswith("rstar evolve")


def test_round_in_progress_tells_commits_problems_by_level_and_quarantine(run: Run) -> None:
    run.plan(1)
    run.commit(1, "s1", {"g1": True, "g2": False})
    run.commit(1, "s2", {"m1": True}, failed={"o1": "ValueError: no such glyph"})
    run.account(1000.0, stage="rollout", label="round 1: rollout", round=1, done=3, total=4)
    status = run.status(1001.0)
    one = status.rounds[0]
    assert status.state == "running"
    assert states(status, 1) == ["running", *["pending"] * 4]
    assert one.searched == {"gsm": 2, "math": 1, "all": 3}
    assert one.solved == {"gsm": 1, "math": 1, "all": 2}
    assert (one.commits, one.trees, one.sealed) == (2, 3, False)
    assert one.quarantined == {"o1": "ValueError: no such glyph"}
    assert [(p.name, p.planned, p.committed, p.solved) for p in one.passes] == [("base", 4, 3, 2)]
    assert status.go_on == ""


def test_finished_round_is_done_and_the_next_pending(run: Run) -> None:
    run.finish_round(1)
    status = run.status()
    assert states(status, 1) == ["done"] * 5
    assert states(status, 2) == ["pending"] * 5
    assert status.rounds[0].stages["select"].seconds == 3.0
    assert status.rounds[0].quarantined == {"o1": "ValueError: no such glyph"}
    assert set(status.rounds[0].checkpoints) == {"policy", "ppm"}


def test_finished_run_says_so_and_needs_no_command(run: Run) -> None:
    run.finish_round(1)
    run.finish_round(2)
    with LiveFile(run.folder.store, Snapshot):
        pass
    status = run.status()
    assert (status.state, status.go_on) == ("finished", "")


def test_killed_run_says_since_when_where_and_how_to_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rstar", "evolve", "demo"])
    run.plan(1)
    run.account(1000.0, stage="rollout", label="round 1: rollout", round=1)
    status = run.status(1000.0 + 2 * STALE_S)
    assert status.state == "killed"
    assert "not running since" in status.explanation
    assert "round 1: rollout" in status.explanation
    assert states(status, 1)[0] == "stopped"
    assert status.go_on.startswith("cd ")
    assert status.go_on.endswith(" && rstar evolve demo")
    assert status.seconds_total == 100.0


def test_submitted_run_goes_on_as_it_was_submitted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "rstar submit cluster --set seed=1"
    monkeypatch.setenv("RSTAR_COMMAND", typed)
    run.account(1000.0)
    assert run.status(1000.0 + 2 * STALE_S).go_on == typed


def test_run_of_another_machine_whose_clock_is_behind_is_looked_at_twice(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.account(1000.0)
    set_clock(monkeypatch, status_module, sleep=lambda s: run.account(1002.0))
    assert run.status(5000.0, host="elsewhere").state == "running"
    set_clock(monkeypatch, status_module, sleep=lambda s: None)
    assert run.status(5000.0, host="elsewhere").state == "killed"


def test_error_of_a_failed_run_is_told(run: Run) -> None:
    with pytest.raises(ValueError), LiveFile(run.folder.store, Snapshot):
        raise ValueError("no GPU left")
    assert "no GPU left" in run.status().explanation


def test_cost_and_changes_are_told(run: Run) -> None:
    run.account(1000.0)
    account = CostAccount({"gpu": MachinePrice(on_demand=36.0)})
    up = {"a": NodeUse(kind="gpu", market="on-demand", idle=True)}
    for now_s in (0.0, 100.0, 200.0):
        account.look(now_s, up, "round 1: rollout" if now_s == 100.0 else "start")
    run.folder.write(COST, account.record())
    run.finish_round(1)
    run.folder.record_stage(1, "select", 1.0, correct_trajectories=8)
    run.folder.write(ESTIMATE, {"usd": 1.6, "by_stage": {"start": {"usd": 0.5}}})
    Changes(run.folder).record({"cost.budget_usd": 5.0}, {"cost.budget_usd": None})
    status = run.status(1001.0)
    assert status.cost["usd"] == pytest.approx(2.0)
    assert status.cost["rounds"][1]["per_solved_usd"] == pytest.approx(0.5)
    assert status.cost["rounds"][1]["per_verified_usd"] == pytest.approx(0.125)
    assert status.cost["estimate_error"] is None  # it is not finished
    done = run_cost(run.folder, {}, finished=True)
    assert done["estimate_error"] == pytest.approx(0.25)
    assert (
        cost_lines(done)[-1]
        == "cost estimated at the start: $1.60 in all; it cost +25 % against that"
    )
    shown = " ".join(run.shown().split())
    assert "$2.00 of $5.00 so far" in shown
    assert "cost $2.00, 100 % of it for idle nodes: 0.1 h gpu on-demand" in shown
    assert "cost of round 1: $1.00, $0.5000 per solved problem, $0.1250 per verified" in shown
    assert "cost by stage: round 1: rollout $1.00, start $1.00 (estimated $0.50)" in shown
    assert "cost estimated at the start: $1.60 in all" in shown
    assert "cost.budget_usd None -> 5.0 (not taken over yet)" in shown


def test_record_of_a_sealed_round_spares_its_markers(run: Run) -> None:
    run.finish_round(1)
    levels = problems_by_level(run.trees(1).commits(), run.folder.problem_levels())
    run.folder.record_stage(1, "rollout", 9.0, **levels)
    for marker in (run.folder.root / "trajectories/round=1/commits").iterdir():
        marker.unlink()
    assert run.status().rounds[0].solved == {"gsm": 1, "math": 1, "all": 2}


def test_terminal_shows_everything_within_80_columns(run: Run) -> None:
    record_start(run.folder, [])
    run.finish_round(1)
    record_lineage(run.folder, 1)
    suspect = SuspectLabel(
        problem_id="g2",
        gold="7",
        answer="8",
        votes=9,
        num_answers=10,
        num_trees=2,
        mean_value=None,
        generated_tokens=5,
    )
    run.folder.write_suspects(1, [suspect])
    facts = {"tokens/s": 3472.1, "open": 6}
    run.account(time.time(), stage="rollout", label="round 2: rollout", round=2, facts=facts)
    shown = run.shown()
    for text in (
        "by hand",
        "running since",
        "now: round 2: rollout; 3,472 tokens/s, open 6",
        "problems solved / searched, of 4 problems",
        "1/2   1/1  2/3",
        "round 1: quarantined problems: 1",
        "round 1: suspect labels: 1",
        "o1: ValueError: no such glyph",
        "g2: label 7, 9 of 10 answers say 8",
        "lineage",
        "policy-r0-abc -> 3 trees",
        "dataset eeeeeeee",
        "elapsed 1:40",
    ):
        assert text in shown, shown
    assert max(map(len, shown.splitlines())) <= 80


def test_json_holds_all_of_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.finish_round(1)
    run.account(time.time(), stage="rollout", round=2)
    show_status(run.folder.root, Console(), as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["state"] == "running"
    assert data["rounds"][0]["stages"]["rollout"] == {"state": "done", "seconds": None}
    assert data["live"]["progress"]["stage"] == "rollout"


def test_watching_ends_when_the_run_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.account(time.time(), stage="rollout", label="round 1: rollout", round=1)

    def end(seconds: float) -> None:
        with LiveFile(run.folder.store, Snapshot):
            pass

    set_clock(monkeypatch, status_view, sleep=end)
    output = io.StringIO()
    show_status(run.folder.root, Console(file=output, width=80), watch=True)
    assert output.getvalue().index("running since") < output.getvalue().index("stopped 20")


def test_folder_that_is_no_run_is_named_with_runs_nearby(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"nope: no such folder; runs there: .*run"):
        read_status(tmp_path / "nope", now_unix_s=0.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match=r"empty: not a run: it has no config\.yaml"):
        read_status(tmp_path / "empty", now_unix_s=0.0)


def test_rollout_run_has_one_stage(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("problems: some/gsm8k.parquet\n", encoding="utf-8")
    TrajectoryStore(RunStore(tmp_path), 1).seal()
    status = read_status(tmp_path, now_unix_s=0.0)
    assert (status.kind, status.name, status.state) == (
        "rollout",
        "rollout of gsm8k.parquet",
        "finished",
    )


def test_large_numbers_are_short() -> None:
    assert [short(n) for n in (999, 1234, 371_672, 2_100_000, 10**12)] == [
        "999",
        "1.2k",
        "372k",
        "2.1M",
        "1.0T",
    ]


def test_what_the_ppm_ranks_right_and_that_it_does_not_steer_are_told(run: Run) -> None:
    run.finish_round(1)
    record = ruler_record(1)
    steering = {"ppm": record["ppm"], "steers": record["passes"], "why": record["why"]}
    record_lineage(run.folder, 2, steering)
    record_lineage(run.folder, 2, {**steering, "steers": True})  # the first decision stands
    run.plan(2)
    shown = " ".join(run.shown().split())
    assert "round 1: PPM does not pass: 50.0 [" in shown
    assert "] % of 24 pairs right (log-probability 100.0, question-blind 50.0, chance 50)" in shown
    assert "24 of 30 problems have pairs" in shown
    assert "round 2: terminal-guided, ppm-r1-d does not steer it: 50.0 % of 24 held-out" in shown
    found = run.status().rounds[0].ruler
    assert found["rankings"]["ppm"]["mean"] == 0.5 and "problems" not in found


def test_run_of_a_version_without_rulers_is_finished_without_them(run: Run) -> None:
    path = run.folder.root / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["evaluation"]["min_pair_accuracy"]
    path.write_text(yaml.safe_dump(config))
    for number in (1, 2):
        run.finish_round(number)
        (run.folder.root / run.folder.ruler_name(number)).unlink()
    assert run.status().state == "finished"
