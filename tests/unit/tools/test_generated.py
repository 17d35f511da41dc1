"""One command for all generated files: it writes what differs, or names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.generated import main


def test_stale_files_are_named_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.md", tmp_path / "folder" / "new.md"
    old.write_text("before")
    files = {old: "after", new: "new"}
    monkeypatch.setattr(sys, "argv", ["tool", "--check"])
    assert main("tool", files) == 1
    assert f"{old} is out of date; run python -m tools.tool" in capsys.readouterr().out
    assert old.read_text() == "before" and not new.exists()
    monkeypatch.setattr(sys, "argv", ["tool"])
    assert main("tool", files) == 0
    assert (old.read_text(), new.read_text()) == ("after", "new")
    monkeypatch.setattr(sys, "argv", ["tool", "--check"])
    assert main("tool", files) == 0 and capsys.readouterr().out == ""
