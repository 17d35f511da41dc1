"""What an HTTP stack adds to a request whose handler does nothing: aiohttp, FastAPI, Ray Serve.

    python -m bench.http_stack [--requests N] [--stack NAME ...]

Each stack stands in a process of its own and answers a small POST with a fixed chat completion; a
client in this process asks `--requests` times one after the other, then with 32 connections at a
time. Ray Serve needs more than this package installs: `pip install grpcio-reflection` first, or it
is left out. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import multiprocessing
import socket
import statistics
import time
from typing import Any

import aiohttp

STACKS = ("aiohttp", "fastapi", "ray-serve")
CONNECTIONS = 32
BODY = {"model": "rstar", "messages": [{"role": "user", "content": "What is 3 + 4? " * 20}]}
REPLY = {"object": "chat.completion", "choices": [{"message": {"content": "7 " * 200}}]}


def serve(stack: str, port: int) -> None:
    """Answer until the process is ended."""
    if stack == "aiohttp":
        from aiohttp import web

        async def answer(request: web.Request) -> web.Response:
            await request.json()
            return web.json_response(REPLY)

        app = web.Application()
        app.router.add_post("/", answer)
        web.run_app(app, host="127.0.0.1", port=port, print=lambda text: None, access_log=None)
        return
    from fastapi import FastAPI

    api = FastAPI()

    @api.post("/")
    async def reply(body: dict[str, Any]) -> dict[str, Any]:
        return REPLY

    if stack == "fastapi":
        import uvicorn

        uvicorn.run(api, host="127.0.0.1", port=port, log_level="error", access_log=False)
        return
    import ray
    from ray import serve as ray_serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})

    class Ingress:
        pass

    made: Any = ray_serve.deployment(max_ongoing_requests=CONNECTIONS)
    ray_serve.run(made(ray_serve.ingress(api)(Ingress)).bind())
    while True:
        time.sleep(1)


async def measure(port: int, requests: int) -> dict[str, float]:
    """Milliseconds of a request: alone, and among `CONNECTIONS`."""
    address = f"http://127.0.0.1:{port}/"

    async def ask(session: aiohttp.ClientSession) -> float:
        began_s = time.perf_counter()
        async with session.post(address, json=BODY) as reply:
            assert (await reply.json()) == REPLY, reply.status
        return 1e3 * (time.perf_counter() - began_s)

    async def ask_on(session: aiohttp.ClientSession, count: int) -> list[float]:
        return [await ask(session) for _ in range(count)]

    async with aiohttp.ClientSession() as session:
        for _ in range(1800):
            try:
                await ask(session)
                break
            except (aiohttp.ClientError, AssertionError):
                await asyncio.sleep(0.1)
        await ask_on(session, 50)
        alone = await ask_on(session, requests)
        began_s = time.perf_counter()
        each = requests // CONNECTIONS
        found = await asyncio.gather(*(ask_on(session, each) for _ in range(CONNECTIONS)))
        took_s = time.perf_counter() - began_s
    crowd = [ms for part in found for ms in part]
    return {
        "p50_ms": statistics.median(alone),
        "p99_ms": statistics.quantiles(alone, n=100)[98],
        "p99_of_32_ms": statistics.quantiles(crowd, n=100)[98],
        "requests_per_s_of_32": len(crowd) / took_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.http_stack")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--stack", nargs="+", choices=STACKS, default=STACKS)
    asked = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for stack in asked.stack:
        if stack == "ray-serve" and importlib.util.find_spec("grpc_reflection") is None:
            print("ray-serve: left out, grpcio-reflection is not installed")
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(stack, port))
        process.start()
        try:
            found[stack] = asyncio.run(measure(port, asked.requests))
        finally:
            process.terminate()
            process.join(30)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in found[stack].items())
        print(f"{stack}: {shown}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
