"""Where the time of a run went, of a run made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import demo
from cluster.telemetry import logs
from cluster.telemetry.metrics import PROCESS_CPU
from cluster.telemetry.samples import Key, SampleWriter
from rollout.run_store import RunStore

ENDED = [
    (110.0, "starting engines and learner: 1 policy (10 s)"),
    (140.0, "cold start: SFT on demonstrations: 400 examples, loss 0.014 (30 s)"),
    (141.0, "a replica was slow (7 s)"),
    (163.0, "round 1: rollout: 3 of 4 solved (20 s)"),
    (170.0, "round 1: rollout 3/4; stage 0:15"),
    (203.0, "round 2: rollout: 4 of 4 solved (40 s)"),
]


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path)
    (tmp_path / "logs").mkdir()
    lines = [
        logs.LogLine(
            unix_s=unix_s,
            level="INFO",
            process="driver-1",
            logger="cluster.telemetry.progress",
            text=text,
            ids={},
        )
        for unix_s, text in ENDED
    ]
    written = "".join(line.to_json() + "\n" for line in lines)
    (tmp_path / "logs" / "driver-1.jsonl").write_text(written)
    return store


def sample(store: RunStore) -> None:
    """One core of the policy at all times, and in round 2 one of the sandbox."""
    writer = SampleWriter(store)
    name = PROCESS_CPU.exported
    for unix_s in range(100, 210, 10):
        row: dict[Key, float] = {(name, (("process", "PolicyReplica"),)): unix_s - 100.0}
        row[name, (("process", "SandboxWorker"),)] = max(unix_s - 160.0, 0.0)
        writer.write(unix_s, row)
    writer.close()


def test_stages_have_their_time_and_that_of_each_process(run: RunStore) -> None:
    sample(run)
    stages = demo.profile(run)
    assert [(stage.label, round(stage.seconds)) for stage in stages] == [
        ("starting engines and learner", 10),
        ("cold start", 30),
        ("round 1: rollout", 20),
        ("round 2: rollout", 40),
        ("between stages", 3),
    ]
    assert stages[1].cpu_seconds == pytest.approx({"PolicyReplica": 30, "SandboxWorker": 0})
    # The last sample is of three seconds before its end.
    assert stages[3].cpu_seconds == pytest.approx({"PolicyReplica": 37, "SandboxWorker": 37})
    first, *_ = demo.summed(stages)
    assert (first.label, round(first.seconds)) == ("2 x rollout", 60)
    assert first.cpu_seconds["PolicyReplica"] == pytest.approx(57)


def test_run_without_samples_shows_its_stages_alone(
    run: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--profile", run.root])
    shown = capsys.readouterr().out
    assert "round 2: rollout" in shown and "2 x rollout" in shown
    assert "PolicyReplica" not in shown


def test_folder_without_a_driver_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tells of no stage"):
        demo.profile(RunStore(tmp_path))
