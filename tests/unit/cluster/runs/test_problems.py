"""`rstar problems`: what a person sees, and the exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from cluster import cli
from rollout.problems.import_report import ImportReport, ImportSettings
from rollout.problems.importer import Progress, import_problems


def rstar(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rstar", "problems", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    long = "how many of the " + " ".join(f"word{n}" for n in range(20)) + " are there"
    rows = [
        {"q": "What is 1+1?", "a": "2"},
        {"q": "What is  1+1?", "a": "3"},
        {"q": long + " today?", "a": "4"},
        {"q": "How long is it? ![](x.png)", "a": "4"},
        {"q": 5, "a": "4"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    bench = {"id": "b7", "problem": long + "?", "answer": "4", "level": "gsm"}
    (tmp_path / "bench.json").write_text(json.dumps([bench]), encoding="utf-8")
    return tmp_path


IMPORT = ("import", "own.jsonl", "--out", "p.parquet", "--columns", "problem=q,answer=a")


def test_import_shows_where_every_row_went(monkeypatch, capsys, folder):
    status, out, err = rstar(monkeypatch, capsys, *IMPORT, "--against", "bench.json")
    assert status == 0, err
    line = next(line.split() for line in out.splitlines() if line.strip().startswith("own"))
    assert line == ["own", "columns", "5", "1", "1", "0", "1", "1", "1"]
    assert "set aside: 1 image" in out
    assert "bad row: own.jsonl, line 5: problem is a number, not text" in out
    assert "1 duplicates have another answer than the problem kept" in out
    assert "1 problems in p.parquet" in out
    assert "p.report/report.md" in out
    assert "b7" in (folder / "p.report" / "report.md").read_text(encoding="utf-8")

    assert rstar(monkeypatch, capsys, "check", "p.parquet")[0] == 0
    status, out, _ = rstar(monkeypatch, capsys, "stats", "p.parquet")
    assert status == 0
    assert "p.parquet: 1 rows, format table" in out


def test_a_column_with_content_is_named_and_joined_or_dropped(monkeypatch, capsys, folder):
    rows = [{"context": "Of seven four go.", "question": "How many are left?", "answer": "3"}]
    (folder / "own.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    given = ("import", "own.jsonl", "--out", "p.parquet")
    status, _, err = rstar(monkeypatch, capsys, *given)
    assert status == 1
    assert "own.jsonl, line 1: column context ('Of seven four go.')" in " ".join(err.split())
    assert rstar(monkeypatch, capsys, *given, "--drop", "context")[0] == 0
    joined = "problem=context+question,answer=answer"
    assert rstar(monkeypatch, capsys, *given, "--force", "--columns", joined)[0] == 0


def test_check_of_a_file_with_faults_ends_with_status_1(monkeypatch, capsys, folder):
    rows = [{"problem": "What is it?", "answer": "1", "level": "gsm"}] * 2
    (folder / "twice.json").write_text(json.dumps(rows), encoding="utf-8")
    status, out, _ = rstar(monkeypatch, capsys, "check", "twice.json")
    assert status == 1
    assert "wrong: 1 rows repeat the text of another" in out
    assert "not in order" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "none.jsonl", "--out", "q.parquet"), "none.jsonl: no such problem file"),
        (("import", "own.jsonl", "--out", "q.parquet"), "no known format has the columns a, q"),
        (("import", "own.jsonl", "--out", "q.csv"), "expected a name ending in .parquet"),
        ((*IMPORT[:-1], "text=q"), "--columns: expected NAME=COLUMN"),
        ((*IMPORT, "--format", "rstar"), "--format and --columns exclude each other"),
        (("stats", "none.csv"), "none.csv: no such problem file"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, folder, arguments, message):
    status, _, err = rstar(monkeypatch, capsys, *arguments)
    assert status == 1
    assert err.strip().startswith("rstar: ")
    assert message in err
    assert not (folder / "q.parquet").exists()


def test_an_existing_output_is_replaced_only_by_force(monkeypatch, capsys, folder):
    assert rstar(monkeypatch, capsys, *IMPORT)[0] == 0
    status, _, err = rstar(monkeypatch, capsys, *IMPORT)
    assert status == 1
    assert "p.parquet: exists; --force replaces it" in err
    assert rstar(monkeypatch, capsys, *IMPORT, "--force")[0] == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_import_says_so_and_leaves_nothing(monkeypatch, capsys, folder, sent):
    def stopped(settings: ImportSettings, out: Path, *, progress: Progress) -> ImportReport:
        def stop(stage: str, done: int, total: int) -> None:
            if stage == "comparing":
                os.kill(os.getpid(), sent)

        return import_problems(settings, out, progress=stop)

    monkeypatch.setattr("cluster.runs.problems.import_problems", stopped)
    before = sorted(folder.iterdir())
    status, out, err = rstar(monkeypatch, capsys, *IMPORT)
    assert (status, out) == (130, "")
    assert "stopped; nothing was written" in err
    assert sorted(folder.iterdir()) == before


def test_what_a_script_starts_in_its_background_obeys_an_interrupt_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.cli.app", lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell leaves it there
    try:
        with pytest.raises(KeyboardInterrupt):
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
