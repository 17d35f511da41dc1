"""`rstar solve --batch FILE --out FILE`: many requests from a file, in the form of the Batch API.

    FILE   {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    OUT    {"id": ..., "custom_id": ..., "response": {"status_code": ..., "body": {...}}, ...}

A request of the file is what the server takes, and its answer what the server says, without the
tree's page. Each answer is appended as soon as it is there; the same command goes on with those
that have none. A line that a killed command left half is cut off.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from cluster.folder.config_file import ConfigError
from cluster.runs.solve import asked_config
from cluster.serve.api import ApiError, read_request
from cluster.serve.config import ServeConfig
from cluster.serve.models import started
from cluster.serve.replies import Answer, Reply, Thinking
from cluster.serve.service import Service
from cluster.telemetry.progress import say
from rollout.methods import Event
from rollout.tasks import all_of

URLS = {"/v1/chat/completions": True, "/v1/completions": False}
"""Whether each is a chat."""

SAID_EVERY = 10
"""Answers between two lines about how far it is."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    custom_id: str
    chat: bool
    body: dict[str, Any]


def read_batch(path: Path) -> list[Line]:
    """The requests of a file.

    Raises:
        ConfigError: the file cannot be read, or a line is no request; names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    lines: dict[str, Line] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from error
        custom_id = row.get("custom_id") if isinstance(row, dict) else None
        if not isinstance(custom_id, str) or not custom_id:
            raise ConfigError(f"{where}: expected an object with a custom_id")
        if custom_id in lines:
            raise ConfigError(f"{where}: custom_id {custom_id!r} is there twice")
        if row.get("url") not in URLS or row.get("method", "POST") != "POST":
            raise ConfigError(f"{where}: method and url must be POST and one of {', '.join(URLS)}")
        if not isinstance(row.get("body"), dict):
            raise ConfigError(f"{where}: body must be an object")
        if row["body"].get("stream"):
            raise ConfigError(f"{where}: stream is not for batches")
        lines[custom_id] = Line(custom_id, URLS[row["url"]], row["body"])
    if not lines:
        raise ConfigError(f"{path}: no request in it")
    return list(lines.values())


def answered_ids(out: Path) -> set[str]:
    """The requests that an earlier command answered; cuts off what it left half.

    Raises:
        ConfigError: the file cannot be read or is something else.
    """
    if not out.exists():
        return set()
    try:
        data = out.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        ids = {json.loads(line)["custom_id"] for line in whole.splitlines()}
        if len(whole) < len(data):
            os.truncate(out, len(whole))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out}: not the answers of a batch; choose another --out") from error
    return ids


async def answer_batch(
    lines: Sequence[Line],
    service: Service,
    config: ServeConfig,
    out: TextIO,
    console: Console,
) -> int:
    """Answer requests, as many at a time as the service runs; returns how many failed.

    Raises:
        EngineError, SandboxError, SearchError: a part failed again and again; the rest is not
            tried.
    """
    slots = asyncio.Semaphore(service.max_running)
    done = failed = 0

    async def one(line: Line) -> None:
        nonlocal done, failed
        async with slots:
            status, body = await _answer(line, service, config)
        record = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": {
                "status_code": status,
                "request_id": body.get("id", line.custom_id),
                "body": body,
            },
            "error": None,
        }
        out.write(json.dumps(record) + "\n")
        out.flush()
        done += 1
        failed += status != 200
        if done % SAID_EVERY == 0 or done == len(lines):
            say(console, f"{done} of {len(lines)} answered, {failed} refused")

    await all_of(one(line) for line in lines)
    return failed


async def _answer(line: Line, service: Service, config: ServeConfig) -> tuple[int, dict[str, Any]]:
    try:
        asked = read_request(json.dumps(line.body).encode(), config, chat=line.chat)
    except ApiError as error:
        return error.status, error.body
    with service.admitted(("batch",), len(asked.asks)) as tickets:

        async def choice(index: int) -> Answer:
            thinking = Thinking()

            def on_event(event: Event) -> None:
                thinking.more(event)

            result = await service.solve(tickets[index], asked.asks[index], on_event)
            return Answer(result=result, thinking=thinking.text, tree=None)

        answers = await all_of(choice(index) for index in range(len(asked.asks)))
    prefix = "chatcmpl" if asked.chat else "cmpl"
    return 200, Reply(asked=asked, id=f"{prefix}-{uuid.uuid4().hex}").completion(answers)


async def run_batch(batch: Path, out: Path, console: Console, **given: Any) -> None:
    """Answer what of a file is not answered yet.

    Args:
        given: what `asked_config` takes.
    Raises:
        As `read_batch`, `answered_ids`, `asked_config` and `answer_batch`.
    """
    lines = read_batch(batch)
    known = answered_ids(out)
    left = [line for line in lines if line.custom_id not in known]
    if len(left) < len(lines):
        say(console, f"{len(lines) - len(left)} of {len(lines)} are answered in {out}")
    if not left:
        return
    with tempfile.TemporaryDirectory(prefix="rstar-solve-") as scratch:
        config = asked_config(ServeConfig, Path(scratch), **given)
        # A batch waits for itself: every choice of what runs has its place.
        serve = config.serve.model_copy(update={"max_queued": sys.maxsize})
        config = config.model_copy(update={"serve": serve})
        say(console, "starting the engines")
        async with started(config, lambda text: say(console, text)) as (models, service, _):
            with out.open("a", encoding="utf-8") as stream:
                failed = await answer_batch(left, service, models.config, stream, console)
    say(console, f"answers in {out}" + (f"; {failed} were refused" if failed else ""))
