"""`rstar rollout` with a completions endpoint as its policy: a real fleet, a server in the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from cluster.folder.config_file import make_config
from cluster.runs.config import RolloutConfig
from cluster.runs.rollout import RolloutRun
from cluster.telemetry.progress import ProgressView
from rollout.engine import EngineError
from rollout.store import RunStore, TrajectoryStore

KEY = "sk-very-secret-0123456789"


def answer(body: dict[str, Any]) -> web.Response:
    choice = {
        "text": "<answer>It is \\boxed{3}.",
        "finish_reason": "stop",
        "stop_reason": "<end_of_answer>",
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * body["n"]}
    choices = [{"index": index, **choice} for index in range(body["n"])]
    return web.json_response({"choices": choices, "usage": usage})


@asynccontextmanager
async def serving(handle: Callable[[dict[str, Any]], web.Response]) -> AsyncIterator[str]:
    async def completions(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": "no key"}, status=401)
        return handle(await request.json())

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


def rollout_run(folder: Path, url: str, **endpoint: Any) -> RolloutRun:
    problems = folder / "problems.jsonl"
    rows = [
        {"id": f"p{number}", "problem": "What is 1 + 2?", "answer": gold, "level": "gsm"}
        for number, gold in enumerate(("3", "3", "4"))
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "problems": problems,
        "run_dir": folder / "run",
        "cluster": {"num_cpus": 1, "shard_size": 1},
        "search": {"num_candidates": 4, "num_rollouts": 2},
        "endpoint": {
            "base_url": url,
            "model": "m",
            "dialect": "vllm",
            "api_key_env": "RSTAR_TEST_KEY",
            "first_pause_s": 0.05,
            **endpoint,
        },
    }
    config = make_config(data, kind=RolloutConfig, source="test")
    return RolloutRun(config, ProgressView(Console(quiet=True)))


async def test_trees_of_an_endpoint_are_committed_and_its_key_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSTAR_TEST_KEY", KEY)
    async with serving(answer) as url:
        first = rollout_run(tmp_path, url, max_total_tokens=1, max_in_flight=1)
        with pytest.raises(EngineError, match=r"budget of 1 tokens .* is used up: 10 in, 5 out"):
            await first.run()
        report = await rollout_run(tmp_path, url).run()
    assert report["solved"]["all"] == pytest.approx(2 / 3)
    assert (report["lost"], report["doubled"], report["quarantined"]) == (0, 0, {})
    account = report["endpoint"]
    assert account["version"] == "endpoint:m"
    # The request that showed that the endpoint can be used is paid for as well.
    assert account["generated_tokens"] == report["generated_tokens"] + 5
    trees = list(TrajectoryStore(RunStore(str(tmp_path / "run")), 1).trees())
    assert {tree.policy_version for tree in trees} == {"endpoint:m"}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


async def test_wrong_key_ends_the_run_with_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSTAR_TEST_KEY", "sk-another")
    async with serving(answer) as url:
        with pytest.raises(EngineError) as caught:
            await rollout_run(tmp_path, url).run()
    assert str(caught.value).startswith(f"endpoint m at {url}: HTTP 401 Unauthorized")
    assert "sk-another" not in str(caught.value)
