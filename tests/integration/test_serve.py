"""`rstar serve` as it is started: Ray, real sandboxes, scripted models; killed at work, renewed."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import ray
from rich.console import Console

import cluster.serve.models
from cluster.fleet.actors import PolicyKind, PreferenceKind
from cluster.serve.command import run_serve
from cluster.serve.models import ServedModels, started
from learner.checkpoint import CheckpointStore, Kind, write_prompt_template
from tests.scripted_replicas import ScriptedPolicyReplica, ScriptedPreferenceReplica

ROOT = Path(__file__).resolve().parents[2]
QUESTION: list[Any] = [{"role": "user", "content": "How many?"}]


def publish(run: Path, round: int) -> None:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text(f'{{"round": {round}}}')
        write_prompt_template(directory, "short")

    kinds: tuple[Kind, ...] = ("policy", "ppm")
    for kind in kinds:
        CheckpointStore(run / "checkpoints").publish(kind, round, write)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose models are scripted, and whose checkpoints hold no weights."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(PolicyKind, "actor", ray.remote(ScriptedPolicyReplica))
    monkeypatch.setattr(PreferenceKind, "actor", ray.remote(ScriptedPreferenceReplica))
    for name in ("check_policy_checkpoint", "check_preference_checkpoint"):
        monkeypatch.setattr(cluster.serve.models, name, lambda path: None)
    monkeypatch.setattr(cluster.serve.models, "with_policy_form", lambda config: config)
    folder = tmp_path / "run"
    publish(folder, 1)
    (folder / "config.yaml").write_text(
        "name: x\n"
        "search: {template: short, num_candidates: 3, max_depth: 5}\n"
        "cluster:\n"
        "  num_cpus: 2\n"
        "  object_store_mib: 80\n"
        "  policy: {replicas: 2}\n"
        "  sandbox: {replicas: 2}\n"
        "  supervision: {look_s: 0.2, backoff_s: 0.2, max_failures: 20}\n"
    )
    return folder


class Served:
    """A server, and a client of it."""

    def __init__(self, url: str, models: ServedModels, task: asyncio.Task[None]) -> None:
        self.url, self.models, self.task = url, models, task
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def ask(self, seed: int, trajectories: int = 12) -> Any:
        return await self.client.chat.completions.create(
            model=f"rstar-mcts-{trajectories}", messages=QUESTION, seed=seed
        )

    async def ask_many(self, seeds: range) -> list[dict[str, Any]]:
        found = await asyncio.gather(*(self.ask(seed) for seed in seeds))
        return [{k: a.rstar[k] for k in ("answer", "value", "answers")} for a in found]


@asynccontextmanager
async def server(run: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> AsyncIterator[Served]:
    """`rstar serve --follow RUN`, ended as by SIGTERM."""
    out = io.StringIO()
    kept: list[ServedModels] = []

    @asynccontextmanager
    async def kept_models(*arguments: Any) -> AsyncIterator[Any]:
        async with started(*arguments) as parts:
            kept.append(parts[0])
            yield parts

    monkeypatch.setattr("cluster.serve.command.started", kept_models)
    overrides = [f"run_dir={run.parent / 'serve'}", "serve.follow_s=0.3"]
    serving = run_serve(
        Console(file=out, width=200), follow=run, port=0, overrides=overrides, **given
    )
    task = asyncio.create_task(serving)
    try:
        while not (found := re.search(r"http://\S+", out.getvalue())):
            # told as text: the errors of actors refer to each other
            assert not task.done(), f"{task.exception()!r} after {out.getvalue()}"
            await asyncio.sleep(0.1)
        yield Served(found[0], kept[0], task)
    finally:
        if not task.cancelling():  # a second time would end it at once
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not ray.is_initialized()


async def test_replicas_and_sandboxes_that_are_killed_cost_no_request_and_change_no_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(run, monkeypatch) as served:
        before = await served.ask_many(range(24))
        assert any(row["answer"] for row in before)
        asking = asyncio.create_task(served.ask_many(range(24)))
        await asyncio.sleep(0.3)
        pools = served.models._fleet.pools
        replica = next(iter(pools.handles("policy").values()))
        os.kill((await replica.ready.remote()).pid, signal.SIGKILL)
        sandbox = next(iter(pools.handles("sandbox").values()))
        os.kill(await sandbox.pid.remote(), signal.SIGKILL)
        assert await asking == before
        losses = pools.losses()
        assert {losses["policy replica"].deaths, losses["sandbox worker"].deaths} == {1}


async def test_newest_pair_of_the_followed_run_is_taken_without_a_refused_request(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(run, monkeypatch) as served:
        fingerprints: list[str] = []
        stop = asyncio.Event()

        async def keep_asking(seed: int) -> None:
            while not stop.is_set():
                found = await served.ask(seed, 4)
                fingerprints.append(found.system_fingerprint)

        asking = [asyncio.create_task(keep_asking(seed)) for seed in range(6)]
        await asyncio.sleep(1.0)
        publish(run, 2)
        async with asyncio.timeout(300):
            while not fingerprints or fingerprints[-1] == fingerprints[0]:
                await asyncio.sleep(0.1)
        stop.set()
        await asyncio.gather(*asking)
        # One pair before, one after, and no answer by a mixture of both.
        assert len(set(fingerprints)) == 2
        assert "round=2/policy" in str(served.models.config.policy)
        os.kill(os.getpid(), signal.SIGHUP)  # the same again: nothing changes
        await asyncio.sleep(0.5)
        assert (await served.ask(0, 4)).system_fingerprint == fingerprints[-1]


async def test_server_that_is_told_to_stop_ends_what_it_has_and_is_not_ready(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(run, monkeypatch) as served, aiohttp.ClientSession() as session:
        async with session.get(f"{served.url}/ready") as reply:
            assert reply.status == 200
        asking = asyncio.create_task(served.ask(0, 64))
        await asyncio.sleep(0.3)
        served.task.cancel()
        await asyncio.sleep(0.1)
        async with session.get(f"{served.url}/ready") as reply:
            assert reply.status == 503 and "stopping" in await reply.text()
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            await served.ask(1)
        assert (await asking).choices
