from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cluster.errors import explain
from cluster.folder.config_file import ConfigError
from rollout.store import StoreError


def test_error_somebody_can_act_on_is_its_message() -> None:
    assert explain(ConfigError("no such key")) == "no such key"


def test_fault_of_the_program_is_not_explained() -> None:
    assert explain(KeyError("x")) is None
    assert explain(FileNotFoundError(errno.ENOENT, "gone")) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_wherever_it_was_met(code: int) -> None:
    told = explain(OSError(code, "No space", "runs/x/dataset.parquet"))
    assert told is not None
    assert told.startswith("runs/x/dataset.parquet: disk full")


def test_full_disk_of_a_library_with_errors_of_its_own_is_told() -> None:
    told = explain(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert told is not None
    assert told.startswith("disk full")


def test_first_of_several_errors_is_told_if_all_can_be() -> None:
    both = ExceptionGroup("", [StoreError("one"), ExceptionGroup("", [StoreError("two")])])
    assert explain(both) == "one"
    assert explain(ExceptionGroup("", [StoreError("one"), KeyError("x")])) is None


def test_error_from_another_process_is_told_without_its_traceback() -> None:
    class RemoteError(StoreError):
        """As Ray makes one: a child of the cause's class that carries the cause."""

        cause = StoreError("disk full")

    assert explain(RemoteError("Traceback ...")) == "disk full"


def test_files_of_a_full_disk_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.folder.run_folder import RunFolder, RunFolderError

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFolderError, match=r"stages/round=1-select\.json: disk full"):
        RunFolder(tmp_path).record_stage(1, "select", 1.0)
