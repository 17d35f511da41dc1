from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.folder.config_file import ConfigError
from cluster.serve.batch import answer_batch, answered_ids, read_batch
from cluster.serve.service import Service
from tests.serving import Stuck, scripted_engines, serve_config


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "rstar-mcts-8", "messages": [{"role": "user", "content": "3"}]}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": asked | body,
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


async def answer(path: Path, out: Path, engines: Any = None) -> int:
    config = serve_config(serve={"max_running": 1, "max_queued": 8})
    service = Service(engines or scripted_engines(), config.serve)
    known = answered_ids(out)
    left = [line for line in read_batch(path) if line.custom_id not in known]
    with out.open("a", encoding="utf-8") as stream:
        return await answer_batch(left, service, config, stream, Console(file=io.StringIO()))


def records(out: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row["response"] for row in found}


async def test_each_request_has_one_answer_in_the_form_of_the_batch_api(tmp_path: Path) -> None:
    completion = {"custom_id": "c", "url": "/v1/completions"}
    completion["body"] = {"model": "rstar-greedy", "prompt": "3"}  # type: ignore[assignment]
    rows = [request("a"), request("b", seed=4, n=2), request("wrong", temperature=0), completion]
    out = tmp_path / "out.jsonl"
    assert await answer(write(tmp_path / "in.jsonl", rows), out) == 1
    found = records(out)
    assert {name: row["status_code"] for name, row in found.items()} == {
        "a": 200,
        "b": 200,
        "wrong": 400,
        "c": 200,
    }
    assert "boxed" in found["a"]["body"]["choices"][0]["message"]["content"]
    assert found["a"]["body"]["rstar"]["tree"] is None
    assert len(found["b"]["body"]["choices"]) == 2
    assert found["wrong"]["body"]["error"]["param"] == "temperature"
    assert found["c"]["body"]["object"] == "text_completion"


async def test_batch_that_was_killed_goes_on_with_what_has_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [request(f"r{n}", seed=n) for n in range(6)])
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    engines = scripted_engines()
    await answer(path, whole, engines)
    half = len(engines.policy.requests) // 2  # type: ignore[attr-defined]
    stuck = type(engines)(
        policy=Stuck(half), preference=engines.preference, sandbox=engines.sandbox
    )
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(answer(path, out, stuck), 1.0)
    before = records(out)
    assert 0 < len(before) < 6
    with out.open("a") as stream:
        stream.write('{"custom_id": "r5", "resp')
    await answer(path, out)
    after = records(out)
    assert {n: after[n] for n in before} == before

    def texts(rows: dict[str, Any]) -> dict[str, str]:
        return {n: r["body"]["choices"][0]["message"]["content"] for n, r in rows.items()}

    assert texts(after) == texts(records(whole))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no request in it"),
        ([{"body": {}}], "line 1: expected an object with a custom_id"),
        ([request("a"), request("a")], "line 2: custom_id 'a' is there twice"),
        ([request("a") | {"url": "/v1/embeddings"}], "line 1: method and url must be POST and"),
        ([request("a") | {"body": 3}], "line 1: body must be an object"),
        ([request("a", stream=True)], "line 1: stream is not for batches"),
    ],
)
def test_line_that_is_no_request_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_batch(write(tmp_path / "in.jsonl", rows))


def test_file_of_something_else_is_not_added_to(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("my notes\n")
    with pytest.raises(ConfigError, match="not the answers of a batch"):
        answered_ids(out)
    assert out.read_text() == "my notes\n"
