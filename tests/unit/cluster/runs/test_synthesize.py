"""Problems from a server: chat and completions, faults, a kill, budgets, the files."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web
from rich.console import Console

from cluster.folder.config_file import ConfigError
from cluster.runs.synthesize import (
    JournalFile,
    SynthesizeConfig,
    chat_body,
    completions_of_chat,
    run_synthesize,
    synthesize_config,
)
from rollout.engine import EngineError
from rollout.problems.reader import read_problems
from rollout.problems.synthesis import (
    ProposalRecord,
    Spending,
    SynthesisError,
    record_to_json,
)

ROOT = Path(__file__).parents[4]
SOLVE = "SOLVE"


@dataclass
class Model:
    """A server: new problems are numbered by the request's seed, their answer is in their text."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Callable[[], web.Response]] = field(default_factory=list)
    """Given first, one a request."""
    every: int = 0
    """Every so many requests a 500 comes first."""
    hold_after: int | None = None
    """Requests after which no answer comes any more."""
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    keys: set[str | None] = field(default_factory=set)

    @property
    def prompts(self) -> list[str]:
        return [
            body["messages"][0]["content"] if "messages" in body else body["prompt"]
            for body in self.bodies
        ]

    async def chat(self, request: web.Request) -> web.Response:
        return await self._answer(request, lambda t: {"message": {"content": t}})

    async def completions(self, request: web.Request) -> web.Response:
        return await self._answer(request, lambda t: {"text": t, "stop_reason": None})

    async def _answer(
        self, request: web.Request, choice: Callable[[str], dict[str, Any]]
    ) -> web.Response:
        body = await request.json()
        self.keys.add(request.headers.get("Authorization"))
        if self.faults:
            return self.faults.pop(0)()
        if self.hold_after is not None and len(self.bodies) >= self.hold_after:
            self.holding.set()
            await asyncio.sleep(60)
        self.bodies.append(body)
        if self.every and len(self.bodies) % self.every == 0:
            self.bodies.pop()
            self.every += 1
            return web.json_response({"error": {"message": "broken"}}, status=500)
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        texts = [self._text(prompt, body.get("seed", 0) + n, n) for n in range(body["n"])]
        choices = [
            {"index": n, "finish_reason": "stop", **choice(text)} for n, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 20, "completion_tokens": 5 * len(texts)}
        return web.json_response({"choices": choices, "usage": usage})

    def _text(self, prompt: str, seed: int, number: int) -> str:
        if SOLVE not in prompt:
            a, b = seed % 9973, seed % 7919
            return f"A barn of {a} cows gets {b} more cows in May. How many cows are there?\nEND"
        found = re.search(r"barn of (\d+) cows gets (\d+)", prompt)
        if found is None:
            return "I was only asked whether you are there."
        right = int(found[1]) + int(found[2])
        return f"There are \\boxed{{{right if number < 6 else right + number}}} cows."


@asynccontextmanager
async def serving(**more: Any) -> AsyncIterator[Model]:
    model = Model(**more)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", model.chat)
    app.router.add_post("/v1/completions", model.completions)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        model.url = f"http://{host}:{port}/v1"
        yield model
    finally:
        await runner.cleanup()


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    path = tmp_path / "seeds.jsonl"
    rows = [
        {"id": f"s{n}", "problem": f"Is {n} a number of seed {n}?", "answer": "1", "level": "gsm"}
        for n in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Model, seeds: Path, *overrides: str, number: int = 4) -> SynthesizeConfig:
    return synthesize_config(
        None,
        [
            "endpoint.first_pause_s=0.001",
            f"synthesis.solve_prompt='{SOLVE} {{problem}}'",
            *overrides,
        ],
        seeds=[seeds],
        endpoint=model.url,
        model="big",
        out=seeds.parent / "new.parquet",
        num_problems=number,
    )


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


async def test_a_chat_server_makes_a_problem_file(seeds: Path) -> None:
    async with serving() as model:
        config = settings(model, seeds)
        await run_synthesize(config, quiet())
    problems, _ = read_problems(config.out)
    assert len(problems) == 4
    for problem in problems:
        numbers = [int(n) for n in re.findall(r"\d+", problem.text)]
        assert int(problem.answer) == sum(numbers)
        assert problem.source == "synthetic"
    table = pq.read_table(config.out)
    assert set(table["agreement"].to_pylist()) == {0.6}
    assert set(table["model"].to_pylist()) == {"big"}
    asked = model.bodies[-1]
    assert asked["n"] == 10 and "stream" not in asked and "prompt" not in asked
    proposals = [b for b in model.bodies if SOLVE not in b["messages"][0]["content"]]
    assert proposals[1]["stop"] == ["\nEND"]


async def test_a_base_model_behind_completions_does_too(seeds: Path) -> None:
    async with serving() as model:
        config = settings(model, seeds, "endpoint.chat=false", "endpoint.dialect=vllm")
        await run_synthesize(config, quiet())
    assert len(read_problems(config.out)[0]) == 4
    assert all("prompt" in body for body in model.bodies)


async def test_a_server_in_trouble_is_asked_again(seeds: Path) -> None:
    def garbage() -> web.Response:
        return web.Response(text="<html>gateway</html>", content_type="text/html")

    def busy() -> web.Response:
        return web.json_response({"error": {"message": "slow down"}}, status=429)

    def no_choices() -> web.Response:
        return web.json_response({"choices": "none"})

    async with serving(faults=[busy, garbage, no_choices, busy], every=3) as model:
        config = settings(model, seeds)
        synthesis = await run_synthesize(config, quiet())
    assert len(read_problems(config.out)[0]) == 4
    assert synthesis.left_over == 0
    assert synthesis.spent.requests == len(model.bodies) - 1, "all but the first, a probe"


async def test_a_finished_run_asks_nothing_and_writes_the_same_file(seeds: Path) -> None:
    async with serving() as model:
        config = settings(model, seeds)
        await run_synthesize(config, quiet())
        before, asked = config.out.read_bytes(), len(model.bodies)
        config.out.unlink()
        await run_synthesize(config, quiet())
    assert len(model.bodies) == asked
    assert config.out.read_bytes() == before


async def test_a_killed_process_is_gone_on_with(seeds: Path) -> None:
    async with serving(hold_after=6) as model:
        config = settings(model, seeds)
        command = [sys.executable, "-m", "cluster", "problems", "synthesize", "--seeds", seeds]
        command += ["--endpoint", model.url, "--model", "big", "--out", config.out, "-n", "4"]
        command += ["--set", f"synthesis.solve_prompt='{SOLVE} {{problem}}'"]
        process = await asyncio.create_subprocess_exec(
            *map(str, command), cwd=ROOT, stdout=-3, stderr=-3
        )
        async with asyncio.timeout(120):
            await model.holding.wait()
        process.send_signal(signal.SIGKILL)
        await process.wait()
        lines = config.journal.read_bytes().count(b"\n")
        # As a kill in the middle of a write leaves it.
        with config.journal.open("ab") as journal:
            journal.write(b'{"kind": "solu')
        assert lines >= 2 and not config.out.exists()
        model.hold_after = None
        model.bodies.clear()
        await run_synthesize(config, quiet())
    assert len(read_problems(config.out)[0]) == 4
    after = [json.loads(line) for line in config.journal.read_text().splitlines()]
    assert len(model.bodies) == 1 + len(after) - lines, "a probe, and what was not answered"
    keys = [(r["kind"], r["number"], r.get("index")) for r in after[1:]]
    assert len(set(keys)) == len(keys) == 8


async def test_a_wrong_key_ends_at_once_and_names_no_key(
    seeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")

    def refused() -> web.Response:
        return web.json_response({"error": {"message": "bad key sk-secret"}}, status=401)

    async with serving(faults=[refused] * 3) as model:
        config = settings(model, seeds, "endpoint.api_key_env=SOME_KEY")
        with pytest.raises(EngineError, match="HTTP 401") as caught:
            await run_synthesize(config, quiet())
        assert "sk-secret" not in str(caught.value)
        assert len(model.faults) == 2 and model.keys == {"Bearer sk-secret"}
    assert "sk-secret" not in config.journal.read_text()


async def test_the_budget_ends_the_run_and_a_larger_one_goes_on(seeds: Path) -> None:
    async with serving() as model:
        config = settings(model, seeds, "budget.max_requests=4")
        first = await run_synthesize(config, quiet())
        assert first.spent.requests == 4 and len(first.kept) < 4
        assert len(read_problems(config.out)[0]) == len(first.kept) > 0
        more = settings(model, seeds, "budget.max_requests=40")
        second = await run_synthesize(more, quiet())
    assert len(second.kept) >= 4
    assert set(first.kept) <= set(second.kept)


async def test_another_model_or_prompt_is_refused(seeds: Path) -> None:
    async with serving() as model:
        await run_synthesize(settings(model, seeds, number=1), quiet())
        changed = settings(model, seeds, "synthesis.temperature=0.1", "endpoint.model=other")
        with pytest.raises(SynthesisError, match="begun with another value of model, temperature"):
            await run_synthesize(changed, quiet())


def test_a_journal_is_held_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with (
        JournalFile(path).opened({"model": "m"}),
        pytest.raises(SynthesisError, match="in use by another process"),
        JournalFile(path).opened({"model": "m"}),
    ):
        pass


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    record = ProposalRecord(number=0, seeds=("a",), level="gsm", texts=("t",), spent=Spending())
    with JournalFile(path).opened({"model": "m"}) as records:
        assert records == []
    journal = JournalFile(path)
    with journal.opened({"model": "m"}):
        journal.append(record)
    with JournalFile(path).opened({"model": "m"}) as records:
        assert records == [record]
    path.write_text(path.read_text() + "{}\n" + record_to_json(record) + "\n")
    with (
        pytest.raises(SynthesisError, match=r"j.jsonl, line 3: no record"),
        JournalFile(path).opened({"model": "m"}),
    ):
        pass
    path.write_text('["x"]\n')
    with (
        pytest.raises(SynthesisError, match="line 1: no journal of a synthesis"),
        JournalFile(path).opened({"model": "m"}),
    ):
        pass


def test_chat_requests_and_answers_are_turned_round() -> None:
    body = {"model": "m", "prompt": "Hi", "n": 2, "seed": 3, "stream": True, "stream_options": {}}
    assert chat_body(body, ("END",)) == {
        "model": "m",
        "n": 2,
        "seed": 3,
        "messages": [{"role": "user", "content": "Hi"}],
        "stop": ["END"],
    }
    said = {"choices": [{"index": 0, "message": {"content": None}, "finish_reason": "stop"}]}
    assert completions_of_chat(said)["choices"][0]["text"] == ""
    assert completions_of_chat(["?"]) == ["?"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'endpoint\.model' is missing"):
        synthesize_config(
            None, seeds=[tmp_path], endpoint="http://h/v1", out=tmp_path / "o.parquet"
        )
    with pytest.raises(ConfigError, match="did you mean 'num_solutions'"):
        synthesize_config(
            None,
            ["synthesis.num_solution=3"],
            seeds=[tmp_path],
            endpoint="http://h/v1",
            model="m",
            out=tmp_path / "o.parquet",
        )
