"""`rstar problems synthesize`: new problems from any OpenAI-compatible server, as a problems table.

    --seeds FILE --> Synthesis --> EndpointPolicy | ChatPolicy --> server
                         |
                         +--> OUT.journal.jsonl   a line for each answered request, synced
                         +--> OUT                 what is kept so far; written whole

Retries, pauses, limits per minute and the API key are those of `engines.endpoint`. Chat servers are
spoken to as such (`endpoint.chat`, the default here): a question and its solution need no text to
be continued, unlike the steps of a search. A base model behind /completions takes the same prompts.

The journal's first line says what it was asked with; a run is gone on with by the same command, and
with other seeds, model or prompts it is refused. OUT follows from the journal, so writing it again
changes nothing. A half-written last line, of a process that was killed, is cut off.

Not covered: servers without `n` (set `endpoint.max_n=1`), batch interfaces, requests whose answer
was lost on the way: they are asked again, and may have been billed.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from cluster.engines.completions_api import CompletionsReply, read_reply
from cluster.engines.config import EndpointConfig
from cluster.engines.endpoint import EndpointPolicy, EndpointStats, read_api_key
from cluster.folder.config_file import make_config, read_yaml
from cluster.telemetry.progress import ProgressView, say
from rollout.engine import EngineError, GenerationReply, GenerationRequest
from rollout.files import replacing
from rollout.problem import Level, Problem
from rollout.problems.reader import read_problems
from rollout.problems.synthesis import (
    BudgetConfig,
    PolicyEnded,
    Record,
    Synthesis,
    SynthesisConfig,
    SynthesisError,
    fingerprint,
    record_from_json,
    record_to_json,
    run_synthesis,
)

JOURNAL_VERSION = 1
SHOW_S = 1.0


class SynthesisEndpointConfig(EndpointConfig):
    """Where the problems are asked for."""

    chat: bool = Field(
        default=True, description="speak to /chat/completions; false: /completions, a base model"
    )

    @property
    def url(self) -> str:
        return f"{self.base_url}/chat/completions" if self.chat else super().url


class SynthesizeConfig(BaseModel):
    """`rstar problems synthesize`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: list[Path] = Field(min_length=1, description="problem files to write new ones after")
    default_level: Level | None = Field(None, description="level of rows that name none")
    out: Path = Field(description="problems table to write, Parquet")
    endpoint: SynthesisEndpointConfig = Field(description="the server")
    synthesis: SynthesisConfig = Field(
        default_factory=SynthesisConfig, description="what is asked and kept"
    )
    budget: BudgetConfig = Field(default_factory=BudgetConfig, description="over all starts")

    @property
    def journal(self) -> Path:
        return self.out.with_name(self.out.name + ".journal.jsonl")


class ChatPolicy(EndpointPolicy):
    """`EndpointPolicy` over /chat/completions: the prompt is the user's one message."""

    async def _post(self, request: GenerationRequest, body: dict[str, Any]) -> CompletionsReply:
        async with self._answer(chat_body(body, request.stop)) as response:
            data = self._parse((await response.read()).decode("utf-8"))
            # Which stop string ended a problem does not matter, so none is looked for.
            return read_reply(
                completions_of_chat(data), n=body["n"], stop=(), dialect="openai", logprobs=False
            )


def chat_body(body: Mapping[str, Any], stop: Sequence[str]) -> dict[str, Any]:
    """The JSON of a chat request that asks for what a completions request asks for."""
    left_out = ("prompt", "stream", "stream_options", "logprobs")
    asked = {name: value for name, value in body.items() if name not in left_out}
    asked["messages"] = [{"role": "user", "content": body["prompt"]}]
    return asked | ({"stop": list(stop)} if stop else {})


def completions_of_chat(data: Any) -> Any:
    """The answer of a chat server in the form of a completions server; as it is if it has none."""
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list):
        return data
    return data | {"choices": [_choice(choice) for choice in choices]}


def _choice(choice: Any) -> Any:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return choice
    # A message without content (a refusal, a tool call) is an empty text.
    return {**choice, "text": message.get("content") or "", "logprobs": None}


class _Checked:
    """A policy whose end can be told from a passing failure."""

    def __init__(self, endpoint: EndpointPolicy) -> None:
        self.endpoint = endpoint

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        try:
            return await self.endpoint.generate(request)
        except EngineError as error:
            fatal = (await self.endpoint.stats()).fatal
            if fatal:
                raise PolicyEnded(fatal) from error
            raise


# -------------------------------------------------------------------- the journal


class JournalFile:
    """Records in a file, a JSON line each; what `append` returned for is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    @contextmanager
    def opened(self, asked: Mapping[str, str]) -> Iterator[list[Record]]:
        """Hold the journal; gives the records of earlier starts.

        Args:
            asked: `fingerprint` of this start.
        Raises:
            SynthesisError: another process holds it, it was begun with other settings, or a line
                in it cannot be read.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as self._file:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise SynthesisError(f"{self.path}: in use by another process") from None
                yield self._read(asked)
        except OSError as error:
            raise SynthesisError(f"{self.path}: cannot be written: {error.strerror}") from error
        finally:
            self._file = None

    def append(self, record: Record) -> None:
        """Add a record."""
        self._write(record_to_json(record))

    def _read(self, asked: Mapping[str, str]) -> list[Record]:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        lines = whole.decode("utf-8").splitlines()
        if not lines:
            self._write(json.dumps({"kind": "start", "version": JOURNAL_VERSION, **asked}))
            return []
        self._check(lines[0], asked)
        records = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                records.append(record_from_json(line))
            except ValueError as error:
                raise SynthesisError(f"{self.path}, line {number}: {error}") from error
        return records

    def _check(self, line: str, asked: Mapping[str, str]) -> None:
        try:
            begun = json.loads(line)
        except json.JSONDecodeError as error:
            raise SynthesisError(f"{self.path}, line 1: not JSON: {error}") from error
        if not isinstance(begun, dict) or begun.get("kind") != "start":
            raise SynthesisError(f"{self.path}, line 1: no journal of a synthesis")
        changed = [name for name, value in asked.items() if begun.get(name) != value]
        if changed:
            raise SynthesisError(
                f"{self.path}: begun with another value of {', '.join(changed)}; go on with that, "
                "or choose another output file"
            )

    def _write(self, line: str) -> None:
        self._file.write(line.encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


# -------------------------------------------------------------------- the command


def synthesize_config(
    config: Path | None,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[Path] = (),
    endpoint: str | None = None,
    model: str | None = None,
    out: Path | None = None,
    num_problems: int | None = None,
) -> SynthesizeConfig:
    """The config of a file, with what the command line gives over it.

    Raises:
        ConfigError: a value is missing or wrong.
    """
    data = read_yaml(config) if config is not None else {}
    if seeds:
        data["seeds"] = list(seeds)
    if out is not None:
        data["out"] = out
    for section, name, value in (
        ("endpoint", "base_url", endpoint),
        ("endpoint", "model", model),
        ("synthesis", "num_problems", num_problems),
    ):
        if value is not None:
            data[section] = {**(data.get(section) or {}), name: value}
    source = str(config) if config is not None else "problems synthesize"
    return make_config(data, overrides, kind=SynthesizeConfig, source=source)


async def run_synthesize(config: SynthesizeConfig, console: Console) -> Synthesis:
    """Make problems, with a progress view, until enough are kept or the budget ends.

    What is kept is written whenever it ends, also when it is stopped or fails.

    Raises:
        ConfigError, ProblemFileError, SynthesisError, EngineError: what stopped it, in one line.
    """
    seeds = _seeds(config)
    settings, wanted = config.endpoint, config.synthesis.num_problems
    key = read_api_key(settings, os.environ)
    journal = JournalFile(config.journal)
    with journal.opened(fingerprint(config.synthesis, seeds, settings.model)) as records:
        synthesis = Synthesis(config.synthesis, seeds, records)
        endpoint = (ChatPolicy if settings.chat else EndpointPolicy)(settings)
        try:
            with ProgressView(console) as view:
                view.plan = ["synthesize"]
                view.begin("synthesize", f"new problems by {settings.model}", wanted)
                _show(view, synthesis, config)
                if synthesis.finished:
                    why = f"{len(synthesis.kept):,} problems are kept"
                else:
                    await endpoint.ready(key)
                    showing = asyncio.create_task(_keep_showing(view, synthesis, config, endpoint))
                    try:
                        why = await run_synthesis(
                            synthesis,
                            policy=_Checked(endpoint),
                            journal=journal,
                            budget=config.budget,
                            max_n=settings.max_n,
                        )
                    finally:
                        showing.cancel()
                    _show(view, synthesis, config)
                view.end(why)
        finally:
            await endpoint.shutdown()
            write_table(synthesis, config)
    print_synthesis(synthesis, config, console)
    return synthesis


def _seeds(config: SynthesizeConfig) -> list[Problem]:
    found: dict[str, Problem] = {}
    for path in config.seeds:
        for problem in read_problems(path, default_level=config.default_level)[0]:
            if problem.id in found:
                raise SynthesisError(f"{path}: id {problem.id!r} already stands in another file")
            found[problem.id] = problem
    return list(found.values())


async def _keep_showing(
    view: ProgressView, synthesis: Synthesis, config: SynthesizeConfig, endpoint: EndpointPolicy
) -> None:
    """Show how far it is, also while a server in trouble answers nothing."""
    while True:
        _show(view, synthesis, config, await endpoint.stats())
        await asyncio.sleep(SHOW_S)


def _show(
    view: ProgressView,
    synthesis: Synthesis,
    config: SynthesizeConfig,
    endpoint: EndpointStats | None = None,
) -> None:
    spent = synthesis.spent
    judged = synthesis.num_judged
    facts: dict[str, str | float] = {
        "proposed": f"{synthesis.num_proposed:,}",
        "judged": f"{judged:,}",
        "tokens": f"{spent.prompt_tokens + spent.generated_tokens:,}",
    }
    if judged:
        facts["kept of them"] = f"{100 * len(synthesis.kept) / judged:.0f} %"
    if usd := spent.usd(config.budget):
        facts["spent"] = f"${usd:,.2f}"
    if endpoint is not None:
        facts["under way"] = f"{endpoint.running_requests}"
        if endpoint.retries:
            facts["tried again"] = f"{endpoint.retries:,}"
    kept, wanted = len(synthesis.kept), config.synthesis.num_problems
    view.update(min(kept, wanted), wanted, facts)


def write_table(synthesis: Synthesis, config: SynthesizeConfig) -> None:
    """Write the kept problems whole, replacing an earlier table."""
    try:
        with replacing(config.out) as hidden:
            pq.write_table(synthesis.table(config.endpoint.model), hidden, compression="zstd")
    except OSError as error:
        raise SynthesisError(f"{config.out}: cannot be written: {error.strerror}") from error


def print_synthesis(synthesis: Synthesis, config: SynthesizeConfig, console: Console) -> None:
    """What came of what was asked for, and what it cost."""
    table = Table(box=None, show_header=False)
    table.add_row("kept", f"{len(synthesis.kept):,}")
    for reason, count in synthesis.rejected.most_common():
        table.add_row(f"left out: {reason}", f"{count:,}")
    if synthesis.left_over:
        table.add_row("without solutions, asked again by the next start", str(synthesis.left_over))
    if synthesis.kept:
        shares = [kept.agreement for kept in synthesis.kept.values()]
        table.add_row("mean agreement", f"{100 * sum(shares) / len(shares):.0f} %")
    spent = synthesis.spent
    table.add_row("requests", f"{spent.requests:,}")
    table.add_row("tokens", f"{spent.prompt_tokens:,} in, {spent.generated_tokens:,} out")
    if usd := spent.usd(config.budget):
        table.add_row("cost", f"${usd:,.2f}")
    console.print(table, soft_wrap=True)
    say(console, f"problems in {config.out}, every answer in {config.journal}")
