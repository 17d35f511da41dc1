"""How much of the engines `rstar serve` gives to its users, and what it costs a request.

    python -m bench.serve [--run RUN | --policy DIR --ppm DIR --problems FILE] [--only SECTION ...]
                          [--users N] [--requests N] [--json FILE]

    overhead   the HTTP layer alone: engines that cost nothing, one request after the other
    users      `--users` clients that stream, against the bare search of `bench.search`: the same
               models, problems and engines, as many searches open; turn by turn, since what else
               a machine does is never the same twice
    cancel     from a closed connection until engine and sandbox hold nothing of it
    chaos      `--requests` requests, every tenth closed by its client, the policy's replica killed
               in the middle: answers that are lost, and answers that went to somebody else

Clients stand in a process of their own and are plain HTTP. Each request is one of its own kind
(problem and seed), and the server notes what it found for it, so that an answer which belongs to
another request is seen. Models as in `bench.search`. Figures are of one run on a machine that does
nothing else. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.search import Recorder, commit, find_models, search_all, timed
from bench.search_engines import ScriptedEngines
from cluster.engines.config import EngineConfig
from cluster.errors import quiet_logging
from cluster.folder.machine import hardware, versions
from cluster.runs.solve import asked_problem
from cluster.serve.app import Server
from cluster.serve.command import bound, listening
from cluster.serve.config import ServeConfig, ServiceConfig
from cluster.serve.keys import Keys
from cluster.serve.models import started
from cluster.serve.replies import content_of
from cluster.serve.service import Ask, Engines, Service
from rollout.methods import SolveResult
from rollout.problem import Problem
from rollout.search import SearchConfig

SECTIONS = ("overhead", "users", "cancel", "chaos")

GOALS = {
    "utilisation_vs_search": ">= 0.9",
    "p99_overhead_ms": "<= 10",
    "cancel_s": "<= 1",
    "lost": "0",
    "wrong_user": "0",
}

SEARCHES_PER_USER = 4
"""In the section `users`, unless `--problems-used` is less."""

CANCELS = 5


# --------------------------------------------------------------------------- clients


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request of a client."""

    model: str
    problem: str
    seed: int
    stream: bool = True
    leave_after_s: float | None = None
    """Its client closes the connection then; None: it waits."""


@dataclass(frozen=True, slots=True)
class Got:
    """What came of it."""

    wanted: Wanted
    content: str | None
    """None: no answer."""
    error: str = ""
    began_s: float = 0.0
    """On the clock that all processes of a machine share; likewise below."""
    first_step_s: float | None = None
    ended_s: float = 0.0


async def ask(session: aiohttp.ClientSession, url: str, wanted: Wanted) -> Got:
    body = {
        "model": wanted.model,
        "seed": wanted.seed,
        "stream": wanted.stream,
        "messages": [{"role": "user", "content": wanted.problem}],
    }
    began_s = time.monotonic()
    first_s: float | None = None
    content = ""
    try:
        async with (
            asyncio.timeout(wanted.leave_after_s),
            session.post(f"{url}/v1/chat/completions", json=body) as reply,
        ):
            if reply.status != 200:
                error = await reply.text()
                return Got(wanted, None, f"{reply.status} {error}", began_s, None, time.monotonic())
            if not wanted.stream:
                content = (await reply.json())["choices"][0]["message"]["content"]
                return Got(wanted, content, "", began_s, None, time.monotonic())
            async for raw in reply.content:
                line = raw.decode().strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    ended_s = time.monotonic()
                    return Got(wanted, None, chunk["error"]["message"], began_s, first_s, ended_s)
                delta = chunk["choices"][0]["delta"]
                if first_s is None and delta.get("reasoning_content"):
                    first_s = time.monotonic() - began_s
                content += delta.get("content") or ""
    except TimeoutError:
        return Got(wanted, None, "left", began_s, first_s, time.monotonic())
    except (aiohttp.ClientError, OSError) as error:
        return Got(wanted, None, repr(error), began_s, first_s, time.monotonic())
    return Got(wanted, content, "", began_s, first_s, time.monotonic())


async def ask_all(url: str, wanted: Sequence[Wanted], users: int) -> list[Got]:
    """So many users, each with one request at a time."""
    left = list(reversed(wanted))
    found: list[Got] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)

    async def one(session: aiohttp.ClientSession) -> None:
        while left:
            found.append(await ask(session, url, left.pop()))

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(one(session) for _ in range(users)))
    return found


def clients(url: str, wanted: Sequence[Wanted], users: int, out: Any) -> None:
    """The process of the clients."""
    out.send(asyncio.run(ask_all(url, wanted, users)))


async def from_clients(url: str, wanted: Sequence[Wanted], users: int) -> list[Got]:
    """Ask from another process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=clients, args=(url, list(wanted), users, theirs))
    process.start()
    theirs.close()  # so that a client that dies ends the wait
    try:
        return await asyncio.to_thread(ours.recv)
    finally:
        process.join()


# --------------------------------------------------------------------------- the server


class Noted(Service):
    """A service that notes what it found, and when."""

    def __init__(self, engines: Engines, config: ServiceConfig) -> None:
        super().__init__(engines, config)
        self.found: dict[tuple[str, int], SolveResult] = {}
        self.spans: dict[tuple[str, int], float] = {}

    async def solve(self, ticket: Any, ask: Ask, on_event: Any = None) -> SolveResult:
        began_s = time.monotonic()
        result = await super().solve(ticket, ask, on_event)
        key = (ask.problem.text, ask.seed)
        self.found[key], self.spans[key] = result, time.monotonic() - began_s
        return result

    def overhead_ms(self, found: Sequence[Got]) -> list[float]:
        """What was added to the time of each search, queue included, by everything around it."""
        return [
            1e3 * (g.ended_s - g.began_s - self.spans[g.wanted.problem, g.wanted.seed])
            for g in found
            if g.content is not None
        ]


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


async def overhead(figures: dict[str, Any]) -> None:
    """The HTTP layer alone, in a process of its own beside its client."""
    engines = ScriptedEngines(3)
    config = ServeConfig(
        run_dir=Path("unused"),
        policy=Path("unused"),
        ppm=Path("unused"),
        search=SearchConfig(template="short", num_candidates=2),
    ).model_copy(update={"serve": ServiceConfig(port=0)})
    service = Noted(Engines(policy=engines, preference=engines, sandbox=engines), config.serve)
    server = Server(service, config, Keys({}))
    for name, stream in (("overhead", False), ("overhead_stream", True)):
        wanted = [Wanted("rstar-mcts-1", f"Question {n}?", n, stream) for n in range(550)]
        async with listening(server, bound(config)) as url:
            found = await from_clients(url, wanted, 1)
        server.service._stopping = False
        ms = service.overhead_ms(found[50:])
        figures |= {f"p50_{name}_ms": statistics.median(ms), f"p99_{name}_ms": p99(ms)}


@dataclass(frozen=True, slots=True)
class Supply:
    """What an engine did while there was more to do than fits."""

    tokens: int = 0
    """Generated."""
    seconds: float = 0.0
    idle_s: float = 0.0

    def __add__(self, other: Supply) -> Supply:
        return Supply(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.idle_s + other.idle_s,
        )


class Bench:
    """The sections that need engines."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.models = find_models(arguments, folder)
        engine = EngineConfig(max_model_len=arguments.max_model_len, kv_cache_gib=1.0)
        self.search = SearchConfig(
            num_candidates=arguments.candidates,
            num_rollouts=arguments.rollouts,
            max_step_tokens=arguments.max_step_tokens,
            template=self.models.template,
        )
        self.config = ServeConfig(
            run_dir=folder / "serve",
            policy=self.models.policy,
            ppm=self.models.ppm,
            policy_engine=engine,
            ppm_engine=engine,
            search=self.search,
            serve=ServiceConfig(port=0, max_running=arguments.users, max_queued=4096),
        )

    async def run(self, sections: Sequence[str], figures: dict[str, Any]) -> None:
        self.config.run_dir.mkdir()
        async with started(self.config, lambda text: None) as (models, service, fleet):
            noted = Noted(service.engines, self.config.serve)
            server = Server(noted, self.config, Keys({}), models.why_not_ready)
            self.fleet = fleet
            self.policy = next(iter(fleet.pools.handles("policy").values()))
            self.sandbox = next(iter(fleet.pools.handles("sandbox").values()))
            async with listening(server, bound(self.config)) as url:
                for section in SECTIONS[1:]:
                    if section in sections:
                        with timed(section, figures):
                            found = await getattr(self, section)(url, noted)
                        print(f"{section}: {json.dumps(found)}", file=sys.stderr, flush=True)
                        figures |= found

    async def users(self, url: str, service: Noted) -> dict[str, Any]:
        """Generated tokens per second with all users at it, and without HTTP, queue and method.

        Each half of the problems is searched both ways, the second in the other order: what the
        first of two left in the engines' caches, and what else the machine does, is shared.
        """
        users = self.arguments.users
        problems = self.models.problems[: users * SEARCHES_PER_USER]
        middle = len(problems) // 2
        bare, served = Supply(), Supply()
        found: list[Got] = []
        for half, order in ((problems[:middle], "bs"), (problems[middle:], "sb")):
            for way in order:
                if way == "b":
                    bare += await self.bare(half, service)
                else:
                    supply, some = await self.served(half, url, service)
                    served += supply
                    found += some
        firsts = [got.first_step_s for got in found if got.first_step_s is not None]
        ms = service.overhead_ms(found)
        return {
            "users": users,
            "searches": len(found),
            "served_tokens_per_s": served.tokens / served.seconds,
            "search_tokens_per_s": bare.tokens / bare.seconds,
            "utilisation_vs_search": served.tokens / served.seconds * bare.seconds / bare.tokens,
            "served_idle_share": served.idle_s / served.seconds,
            "search_idle_share": bare.idle_s / bare.seconds,
            "p50_first_step_s": statistics.median(firsts),
            "p99_first_step_s": p99(firsts),
            "p50_answer_s": statistics.median(got.ended_s - got.began_s for got in found),
            "p50_overhead_loaded_ms": statistics.median(ms),
            "p99_overhead_loaded_ms": p99(ms),
        }

    async def bare(self, problems: Sequence[Problem], service: Noted) -> Supply:
        recorder = self.recorded(service.engines)
        before = await self.policy.stats.remote()
        supplied: list[Any] = []

        async def note() -> None:
            supplied.append(await self.policy.stats.remote())

        _, window = await search_all(
            problems,
            self.search,
            recorder,
            recorder,
            service.engines.sandbox,
            self.arguments.users,
            note,
        )
        return Supply(
            tokens=recorder.tokens(0.0, window.supplied_s),
            seconds=window.supplied_s - window.began_s,
            idle_s=supplied[0].idle_s - before.idle_s,
        )

    async def served(
        self, problems: Sequence[Problem], url: str, service: Noted
    ) -> tuple[Supply, list[Got]]:
        """The same from clients, until there are fewer requests left than users."""
        plain = service.engines
        recorder = self.recorded(plain)
        service.engines = Engines(policy=recorder, preference=recorder, sandbox=plain.sandbox)
        model = f"rstar-mcts-{self.arguments.rollouts}"
        wanted = [Wanted(model, p.text, n) for n, p in enumerate(problems)]
        known = len(service.spans)
        asking = asyncio.create_task(from_clients(url, wanted, self.arguments.users))
        while not service.standing.running and not asking.done():
            await asyncio.sleep(0.01)
        before = await self.policy.stats.remote()
        last = known + len(wanted) - self.arguments.users
        while len(service.spans) < last and not asking.done():
            await asyncio.sleep(0.01)
        after = await self.policy.stats.remote()
        found = await asking
        service.engines = plain
        began_s = min(got.began_s for got in found)
        supplied_s = sorted(got.ended_s for got in found)[-self.arguments.users]
        supply = Supply(
            tokens=recorder.tokens(0.0, supplied_s),
            seconds=supplied_s - began_s,
            idle_s=after.idle_s - before.idle_s,
        )
        return supply, found

    @staticmethod
    def recorded(engines: Engines) -> Recorder:
        assert engines.preference is not None
        return Recorder(engines.policy, engines.preference)

    async def cancel(self, url: str, service: Noted) -> dict[str, Any]:
        """The longest of a few closed connections."""
        took = []
        timeout = aiohttp.ClientTimeout(total=None)
        for number in range(CANCELS):
            async with aiohttp.ClientSession(timeout=timeout) as session:
                wanted = Wanted("rstar-mcts-256", self.models.problems[number].text, number)
                asking = asyncio.create_task(ask(session, url, wanted))
                while not (await self.policy.stats.remote()).running_requests:
                    await asyncio.sleep(0.01)
                asking.cancel()
                began_s = time.monotonic()
                await asyncio.gather(asking, return_exceptions=True)
                while (
                    (await self.policy.stats.remote()).running_requests
                    or (await self.sandbox.stats.remote())["open_trees"]
                    or service.standing.running
                ):
                    await asyncio.sleep(0.01)
                took.append(time.monotonic() - began_s)
        return {"cancel_s": max(took)}

    async def chaos(self, url: str, service: Noted) -> dict[str, Any]:
        """Everything at once."""
        count = self.arguments.requests
        rng = random.Random(1)
        problems = self.models.problems
        wanted = [
            Wanted(
                rng.choice(("rstar-greedy", "rstar-majority-2", "rstar-mcts-1")),
                problems[n % len(problems)].text,
                1000 + n,
                stream=bool(n % 2),
                leave_after_s=rng.uniform(0.0, 0.5) if n % 10 == 0 else None,
            )
            for n in range(count)
        ]
        began_s = time.monotonic()
        asking = asyncio.create_task(from_clients(url, wanted, 2 * self.arguments.users))
        while len(service.found) < count // 3 and not asking.done():
            await asyncio.sleep(0.1)
        os.kill((await self.policy.ready.remote()).pid, signal.SIGKILL)
        found = await asking
        stayed = [got for got in found if got.error != "left"]
        lost = [got for got in stayed if got.content is None]
        for got in lost[:3]:
            print(f"lost: {got.error}")
        wrong = 0
        for got in stayed:
            result = service.found.get((got.wanted.problem, got.wanted.seed))
            own = (
                result is not None
                and result.problem_id == problem_id(got.wanted.problem)
                and content_of(result) == got.content
            )
            wrong += got.content is not None and not own
        return {
            "requests": len(found),
            "left": len(found) - len(stayed),
            "lost": len(lost) + count - len(found),
            "wrong_user": wrong,
            "deaths": sum(loss.deaths for loss in self.fleet.pools.losses().values()),
            "requests_per_s": len(found) / (time.monotonic() - began_s),
        }


def problem_id(text: str) -> str:
    return asked_problem(text, source="request").id


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve")
    parser.add_argument("--run", type=Path, help="folder of a finished run, as runs/demo")
    parser.add_argument("--policy", type=Path, help="policy checkpoint")
    parser.add_argument("--ppm", type=Path, help="PPM checkpoint")
    parser.add_argument("--problems", type=Path, help="problem file")
    parser.add_argument("--problems-used", type=int, default=400, help="first so many problems")
    parser.add_argument("--users", type=int, default=32, help="clients at a time")
    parser.add_argument("--requests", type=int, default=2000, help="of the section chaos")
    parser.add_argument("--candidates", type=int, default=8, help="of an expansion")
    parser.add_argument("--rollouts", type=int, default=8, help="of a tree")
    parser.add_argument("--max-step-tokens", type=int, default=64, help="of a candidate")
    parser.add_argument("--max-model-len", type=int, default=512, help="of both engines")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    models = (arguments.policy, arguments.ppm, arguments.problems)
    if any(models) and not all(models):
        parser.error("give --policy, --ppm and --problems together")
    quiet_logging(verbose=False)
    figures: dict[str, Any] = {}
    if "overhead" in arguments.only:
        with timed("overhead", figures):
            asyncio.run(overhead(figures))
    if set(arguments.only) - {"overhead"}:
        with tempfile.TemporaryDirectory(prefix="bench-serve-") as temporary:
            bench = Bench(arguments, Path(temporary))
            figures["models"] = bench.models.said
            asyncio.run(bench.run(arguments.only, figures))
    figures |= {
        "load_average": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    for name, value in figures.items():
        if isinstance(value, (int, float)):
            print(f"{name:30s} {value:14,.3f}   {GOALS.get(name, '')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
