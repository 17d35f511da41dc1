from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster.folder import run_folder
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.runs.config import RunConfig
from rollout.problem import Level
from tests.builders import make_problem


def config(**more: object) -> RunConfig:
    data = {
        "name": "t",
        "run_dir": "x",
        "problems": {"miniature": {}},
        "rounds": [{"preference": False}],
        **more,
    }
    return RunConfig.model_validate(data)


def test_only_one_driver_at_a_time_holds_a_run(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
    with RunFolder(tmp_path / "run").locked():
        pass


def test_run_is_continued_with_an_equal_config_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(config())
    folder.keep_config(config())
    with pytest.raises(ConfigError, match=r"other values of search\.top_p, seed"):
        folder.keep_config(config(seed=1, search={"top_p": 0.9}))


def test_key_that_is_newer_than_the_run_counts_as_its_default(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(config())
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("  min_pair_accuracy: 0.55\n", ""))
    folder.keep_config(config())
    with pytest.raises(ConfigError, match=r"other values of evaluation\.min_pair_accuracy"):
        folder.keep_config(config(evaluation={"min_pair_accuracy": None}))


def test_run_may_be_continued_on_another_cluster(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_config(config())
    folder.keep_config(config(cluster={"policy": {"replicas": 4}}, cost={"usd_per_hour": 3.0}))


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="cannot be written"), folder.locked():
        pass


def test_folder_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "write", full)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunFolderError, match="disk full"), folder.locked():
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.fcntl, "flock", refused)
    folder = RunFolder(tmp_path / "run")
    wanted = rf"run: its file system locks no files \({os.strerror(code)}\).* NFS 4"
    with pytest.raises(RunFolderError, match=wanted), folder.locked():
        pass


@pytest.mark.parametrize("root", ["s3://bucket/run", Path("s3://bucket/run"), "gs:/b", "file:///x"])
def test_address_is_no_run_folder(root: str | Path) -> None:
    with pytest.raises(RunFolderError, match=r"has to be a path, not an address.*mount"):
        RunFolder(root)


def test_problems_are_read_back_with_their_levels(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.problem_levels() == {}
    folder.write_problems([make_problem("a", level=Level.MATH), make_problem("b", level=Level.GSM)])
    assert folder.problem_levels() == {"a": "math", "b": "gsm"}
    (tmp_path / "problems.parquet").write_bytes(b"cut off")
    with pytest.raises(RunFolderError, match=r"problems\.parquet: cannot be read"):
        folder.problem_levels()


def test_stage_records_are_read_back_and_missing_ones_are_empty(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.stage(1, "rollout") == {}
    folder.record_stage(1, "rollout", 1.234, lost=0)
    assert folder.stage(1, "rollout") == {"seconds": 1.23, "lost": 0}


def test_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"stages\.json: not JSON"):
        RunFolder(tmp_path).read("stages.json")
