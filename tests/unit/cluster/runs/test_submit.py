from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.folder.config_file import ConfigError, load_config
from cluster.runs import submit as module
from cluster.runs.config import RunConfig
from cluster.runs.submit import SubmitError, fill, job_id, submit


def config(**changes: Any) -> RunConfig:
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return load_config("smoke", ["run_dir=/mnt/runs/a", *overrides], kind=RunConfig)


def test_a_run_has_one_id_wherever_it_is_asked_from() -> None:
    assert job_id(Path("/mnt/runs/a b")) == job_id("/mnt/runs/a b")
    assert job_id("/mnt/runs/a b").startswith("rstar-a-b-")
    assert job_id(Path("s3://bucket/runs/demo")) == job_id("s3://bucket/runs/demo")
    assert len({job_id(place) for place in ("/x/a", "/y/a", "s3://x/a")}) == 3


def test_the_config_is_uploaded_whole_and_reads_back_the_same(tmp_path: Path) -> None:
    given = config(**{"search.top_p": 0.7})
    fill(tmp_path, given, code=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    assert load_config(tmp_path / "run.yaml", kind=RunConfig) == given


def test_relative_problem_files_are_uploaded_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "sets").mkdir(parents=True)
    there.mkdir()
    for name in ("train.jsonl", "other.jsonl"):
        (here / "sets" / name).write_text("{}")
    monkeypatch.chdir(here)
    given = {
        "problems.miniature": "null",
        "problems.train": "[sets/train.jsonl, /mnt/problems/more.jsonl, s3://b/p.jsonl]",
        "models.base_model": "/mnt/models/m",
        "cold_start": "null",
    }
    fill(there, config(**given), code=False)
    files = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}
    assert files == {"run.yaml", "sets/train.jsonl"}
    with pytest.raises(ConfigError, match=r"problems.train: sets/no.jsonl is no file below this"):
        fill(there, config(**{**given, "problems.train": "[sets/no.jsonl]"}), code=False)
    with pytest.raises(ConfigError, match=r"models.base_model: m is relative; models are not upl"):
        fill(there, config(**{**given, "models.base_model": "m"}), code=False)
    monkeypatch.setattr(module, "MAX_UPLOAD_BYTES", 1000)
    with pytest.raises(ConfigError, match="MiB would be uploaded, at most 0 are"):
        fill(there, config(**given), code=False)


def test_code_is_uploaded_without_what_was_compiled(tmp_path: Path) -> None:
    fill(tmp_path, config(), code=True)
    assert (tmp_path / "cluster" / "cli.py").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"run.yaml", *module.CODE}
    assert not list(tmp_path.rglob("__pycache__"))


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent: dict[str, Any] = {}

    def send(name: str, command: str, directory: Path, **rest: Any) -> str:
        run = yaml.safe_load((directory / "run.yaml").read_text())
        sent.update(name=name, command=command, address=run["cluster"]["address"], **rest["env"])
        return "http://head:8265"

    monkeypatch.setattr(module, "send", send)
    monkeypatch.setenv("HERE", "given")
    submit(
        Path("smoke"),
        ["run_dir=/mnt/runs/a"],
        Console(),
        address=None,
        env=["HERE", "COLOUR=a=b"],
        restarts=4,
    )
    assert sent == {
        "name": job_id("/mnt/runs/a"),
        "command": "python -m cluster evolve run.yaml --restarts 4",
        "address": "auto",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "RSTAR_COMMAND": "rstar submit smoke --set run_dir=/mnt/runs/a",
        "HERE": "given",
        "COLOUR": "a=b",
    }
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"submitted {job_id('/mnt/runs/a')} to http://head:8265: run in /mnt/runs/a"
    assert shown[1].split() == [
        *("rstar", "job", "status", job_id("/mnt/runs/a"), "--address", "http://head:8265")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": []}, "run_dir must be absolute"),
        ({"overrides": ["run_dir=/mnt/a"], "env": ["NOT_SET_HERE"]}, "not set here; give NOT_SET"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_sent(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        submit(Path("smoke"), console=Console(), address=None, restarts=0, **arguments)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head:8265", "expected the dashboard's address, as http://head:8265"),
        ("http://127.0.0.1:9", "no job server answers at http://127.0.0.1:9"),
    ],
)
def test_an_address_that_is_none_is_named(address: str, message: str) -> None:
    with pytest.raises(SubmitError, match=message):
        module.show_jobs(Console(), address=address)
