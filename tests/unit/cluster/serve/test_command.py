from __future__ import annotations

from pathlib import Path

import pytest

from cluster.folder.config_file import ConfigError
from cluster.serve.command import bound, keys_for, serve_config
from cluster.serve.keys import read_keys
from learner.checkpoint import CheckpointStore, Kind, write_prompt_template
from rollout.methods import Method


def publish(run: Path, kind: Kind, round: int) -> None:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        write_prompt_template(directory, "short")

    CheckpointStore(run / "checkpoints").publish(kind, round, write)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    publish(run, "policy", 1)
    publish(run, "ppm", 1)
    (run / "config.yaml").write_text("name: x\nseed: 4\ncluster: {policy: {replicas: 3}}\n")
    return run


# ---------------------------------------------------------------- config


def test_run_gives_models_settings_and_as_many_replicas(run: Path) -> None:
    config = serve_config(run=run, follow=None, port=0, trajectories=8, method=Method.BEAM)
    assert "round=1/policy" in str(config.policy) and "round=1/ppm" in str(config.ppm)
    assert (config.seed, config.cluster.policy.replicas, config.serve.port) == (4, 3, 0)
    assert (config.method.name, config.method.num_trajectories) == (Method.BEAM, 8)
    assert config.run_dir == Path("runs/serve")
    assert serve_config(run=None, follow=run).policy == config.policy


def test_options_of_the_command_line_win_over_the_file(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("serve: {port: 1, max_running: 7}\n")
    config = serve_config(run=run, follow=None, config=file, port=2, overrides=["run_dir=/x"])
    assert (config.serve.port, config.serve.max_running) == (2, 7)
    assert config.run_dir == Path("/x")


def test_what_does_not_go_together_is_named(run: Path) -> None:
    with pytest.raises(ConfigError, match="give --run, or --follow"):
        serve_config(run=run, follow=run)
    with pytest.raises(ConfigError, match=r"timeout_s must be at most serve\.max_timeout_s: 5"):
        serve_config(run=run, follow=None, overrides=["serve.max_timeout_s=5"])


# ---------------------------------------------------------------- who may ask


def test_address_that_others_reach_needs_keys(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RSTAR_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from elsewhere: give API"):
        keys_for(serve_config(run=run, follow=None, host="0.0.0.0"))
    assert not keys_for(serve_config(run=run, follow=None))
    monkeypatch.setenv("RSTAR_API_KEYS", "sk-0123456789abcdef, b sk-fedcba9876543210")
    keys = keys_for(serve_config(run=run, follow=None, host="0.0.0.0"))
    assert keys.name_of("sk-0123456789abcdef") == "key-1"
    assert keys.name_of("sk-fedcba9876543210") == "b"
    assert keys.name_of("sk-0123456789abcdeg") is None and keys.name_of("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no API key in it"),
        ("# only this\n", "no API key in it"),
        ("short\n", "line 1: a key has at least 16 characters"),
        ("\na b sk-0123456789abcdef\n", "line 2: expected KEY or NAME KEY"),
    ],
)
def test_key_file_that_is_wrong_is_named_and_no_key_told(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(file)
    assert "sk-" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")


def test_no_key_is_held_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-0123456789abcdef\n")
    assert "sk-0123" not in repr(vars(read_keys(file)))


def test_port_in_use_is_named_before_engines_start(run: Path) -> None:
    with bound(serve_config(run=run, follow=None, port=0)) as door:
        door.listen()
        port = door.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            bound(serve_config(run=run, follow=None, port=port))
