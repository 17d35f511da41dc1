from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.telemetry import metrics as m
from cluster.telemetry.live import LIVE_FILE, read_live
from cluster.telemetry.samples import Samples, SampleWriter
from cluster.watch.status import state_text
from cluster.watch.top import show_top, top_line, top_view
from rollout.run_store import RunStore
from tests.made_metrics import write_made_run


def shown(root: Path, now_s: float, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(top_view(RunFolder(root), Samples.read(RunStore(root)), now_s))
    return console.export_text()


def test_numbers_replicas_jobs_and_waits_fit_80_columns(tmp_path: Path) -> None:
    now_s = time.time()
    write_made_run(tmp_path / "demo", now_s)
    text = shown(tmp_path / "demo", now_s)
    assert max(map(len, text.splitlines())) <= 80
    assert "running, round 2: rollout, 260/600" in text
    assert "2.3k tokens/s" in text and "$12.00/h" in text and "…" not in text
    row = next(line for line in text.splitlines() if line.startswith("policy-2"))
    assert row.split() == ["policy-2", "644", "67", "%", "80", "%", "46", "6", "4", "%"]
    assert "jobs: 4 pending, 6 leased, 36 done, 0 failed" in text
    assert "waits, 95 %: policy 9.7 s, ppm 0.9 s" in text
    assert "solved now: gsm 80 %, math 50 %, olympiad 10 %" in text
    assert "died and replaced: 1 x policy" in text
    assert "stalled" not in text


def test_stalled_parts_and_old_samples_are_told(tmp_path: Path) -> None:
    now_s = float(int(time.time()))  # samples keep no more than milliseconds
    write_made_run(tmp_path / "demo", now_s)
    writer = SampleWriter(RunStore(tmp_path / "demo"))
    stalled = (m.STALLED.exported, (("part", "search"), ("waits_on", "policy")))
    writer.write(now_s + 10, {stalled: 1.0})
    writer.close()
    text = shown(tmp_path / "demo", now_s + 100)
    assert "stalled: search, waits on policy" in text
    assert "the last sample is 1:30 old" in text
    assert "not running: last seen 1:40 ago in round 2: rollout" in text


def test_time_left_that_nobody_knows_is_unknown(tmp_path: Path) -> None:
    now_s = time.time()
    write_made_run(tmp_path / "demo", now_s)
    made = read_live(RunStore(tmp_path / "demo"))
    assert made is not None
    begun = replace(made.progress, done=0, stage_eta_s=None, run_eta_s=None)
    text = state_text(replace(made, progress=begun), now_s)
    assert text == "running, round 2: rollout, 0/600, stage ETA unknown, run ETA unknown"


def test_without_a_terminal_a_line_is_printed_until_the_run_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "demo"
    write_made_run(root, time.time() - 60, state="finished")
    show_top(root, Console(width=80))
    (line,) = capsys.readouterr().out.splitlines()
    assert "demo: finished 1:00 ago; trees 0.429/s; verified 2.8/s" in line
    assert top_line(RunFolder(root), Samples(), time.time()).endswith("finished 1:00 ago")


def test_run_without_samples_and_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    text = shown(tmp_path, time.time())
    assert "never started" in text and "no samples yet" in text
    (tmp_path / LIVE_FILE).write_text(json.dumps({"state": "running"}))
    assert "never started" in shown(tmp_path, time.time())
    with pytest.raises(RunFolderError, match=r"not a run: it has no config\.yaml"):
        show_top(tmp_path / "..", Console())
