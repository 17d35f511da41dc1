"""Files that grow, on a disk; on a bucket in tests/integration/test_run_s3.py."""

from __future__ import annotations

from pathlib import Path

from cluster.telemetry.lines import Lines
from rollout.run_store import RunStore


def test_full_file_is_set_aside_and_another_begun(tmp_path: Path) -> None:
    file = Lines(RunStore(tmp_path), "logs/x.jsonl", max_bytes=10)
    for line in ("first line\n", "second line\n", "third\n"):
        file.add(line)
    file.close()
    assert (tmp_path / "logs" / "x.jsonl").read_text() == "third\n"
    assert (tmp_path / "logs" / "x.jsonl.1").read_text() == "second line\n"


def test_folder_of_the_run_is_not_made(tmp_path: Path) -> None:
    file = Lines(RunStore(tmp_path / "gone"), "logs/x.jsonl")
    file.add("lost\n")
    file.close()
    assert not (tmp_path / "gone").exists()
