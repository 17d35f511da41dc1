from __future__ import annotations

import asyncio
import io
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import aiohttp
import pytest
from rich.console import Console

import cluster.serve.models
from cluster.folder.config_file import ConfigError
from cluster.jobs.attempts import Attempts
from cluster.serve.command import bound, keys_for, run_serve, serve_config
from cluster.serve.keys import read_keys
from learner.checkpoint import Checkpoint, CheckpointStore, Kind, write_prompt_template
from rollout.methods import Method
from tests.serving import scripted_engines


def publish(run: Path, kind: Kind, round: int, *, template: str = "short") -> None:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text(f'{{"round": {round}}}')
        write_prompt_template(directory, template)

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


# ---------------------------------------------------------------- the whole command


class FakePools:
    keepers: ClassVar[dict[str, Any]] = {}

    def handles(self, name: str) -> dict[str, Any]:
        return {name: object()}

    def check(self) -> None:
        return None


class FakeMeter:
    def tell_service(self, *, running: int, waiting: int) -> None:
        return None


class FakeFleet:
    """Scripted engines in place of Ray and vLLM, which note what they were told to serve."""

    served: ClassVar[list[str]] = []

    def __init__(self, config: Any, folder: Any) -> None:
        engines = scripted_engines()
        self.policy, self.preference, self.sandbox = (
            engines.policy,
            engines.preference,
            engines.sandbox,
        )
        self.pools, self.meter = FakePools(), FakeMeter()
        self.attempts = Attempts(1, note=lambda text: None)
        self.pools.keepers.clear()
        self.attempts = Attempts(1, note=lambda text: None)

    def _keep(self, name: str, version: str) -> None:
        self.pools.keepers[name] = SimpleNamespace(kind=SimpleNamespace(version=version))
        self.served.append(version)

    async def start(self, policy: Path, *, version: str, learner: bool) -> None:
        self._keep("policy", version)

    async def serve_policy(self, base: Path, checkpoint: Checkpoint, *, marked: bool) -> None:
        self._keep("policy", checkpoint.version)

    async def serve_preference(self, checkpoint: Checkpoint) -> None:
        self._keep("ppm", checkpoint.version)

    def describe(self) -> str:
        return "fakes"

    async def stop(self, note: Any) -> None:
        self.served.append("stopped")


async def until(found: Any) -> None:
    async with asyncio.timeout(20):
        while not found():
            await asyncio.sleep(0.02)


async def test_server_starts_answers_follows_its_run_and_stops(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.serve.models, "Fleet", FakeFleet)
    monkeypatch.setattr(cluster.serve.models, "with_policy_form", lambda config: config)
    for name in ("check_policy_checkpoint", "check_preference_checkpoint"):
        monkeypatch.setattr(cluster.serve.models, name, lambda path: None)
    FakeFleet.served.clear()
    out = io.StringIO()
    folder = tmp_path / "serve"
    given = [f"run_dir={folder}", "serve.follow_s=0.05"]
    serving = run_serve(Console(file=out, width=200), follow=run, port=0, overrides=given)
    task = asyncio.create_task(serving)
    try:
        await until(lambda: task.done() or "http://" in out.getvalue())
        assert not task.done(), f"{task.exception()!r} after {out.getvalue()}"
        url = re.search(r"http://\S+", out.getvalue())
        assert url is not None and "this machine only; Ctrl-C ends" in out.getvalue()
        assert (folder / "config.yaml").is_file() and (folder / "live.json").is_file()
        first = [version[:7] for version in FakeFleet.served]
        assert first == ["policy-", "ppm-r0-"]
        body = {"model": "rstar-mcts-2", "messages": [{"role": "user", "content": "3"}]}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url[0]}/v1/chat/completions", json=body) as reply:
                assert reply.status == 200
            publish(run, "policy", 2, template="rstar")  # of another kind: refused, and said
            publish(run, "ppm", 2)
            await until(lambda: "no other checkpoint is served" in out.getvalue())
            assert "trained with prompt template 'rstar', and this server asks with 'short'" in (
                out.getvalue().replace("\n", " ")
            )
            await asyncio.sleep(0.3)
            assert out.getvalue().count("no other checkpoint") == 1
            publish(run, "policy", 3)
            publish(run, "ppm", 3)
            await until(lambda: len(FakeFleet.served) == 4)
            await until(lambda: out.getvalue().rstrip().endswith("served"))
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.2)
            assert len(FakeFleet.served) == 4
            async with session.get(f"{url[0]}/ready") as reply:
                assert reply.status == 200
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert FakeFleet.served[-1] == "stopped"
