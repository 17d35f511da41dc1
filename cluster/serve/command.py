"""`rstar serve`: start the engines, answer until told to stop, take new checkpoints meanwhile.

config --> started (Ray, engines, sandboxes) --> HTTP server
           every look: metrics, dead pools, --follow RUN
           SIGHUP:     API keys and checkpoints are read again
           SIGTERM:    not ready, nothing new, what is in hand ends, then all of it
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from rich.console import Console

from cluster.fleet.fleet import Fleet
from cluster.folder.config_file import ConfigError
from cluster.folder.run_folder import CONFIG, RunFolder
from cluster.runs.solve import asked_config
from cluster.serve.app import Server
from cluster.serve.config import ServeConfig
from cluster.serve.keys import VARIABLE, Keys, read_keys
from cluster.serve.models import ServedModels, started
from cluster.serve.service import Service
from cluster.telemetry.live import LiveFile, Snapshot
from cluster.telemetry.progress import say
from cluster.watch.dashboard import is_loopback
from rollout.engine import EngineError

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Pause between two looks at the service."""

MEND_S = 30.0
"""A pool whose members died too often is tried again after so long."""


def serve_config(
    *,
    run: Path | None,
    follow: Path | None,
    host: str | None = None,
    port: int | None = None,
    keys: Path | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    **given: Any,
) -> ServeConfig:
    """The config of one `rstar serve`; as `asked_config`, with the server's own options.

    Raises:
        ConfigError: also where the address needs API keys and there are none.
    """
    if run is not None and follow is not None:
        raise ConfigError("give --run, or --follow, which takes its models too; not both")
    own = {"host": host, "port": port, "keys": keys}
    asked = [f"serve.{name}={value}" for name, value in own.items() if value is not None]
    return asked_config(
        ServeConfig,
        Path("runs") / "serve",
        run=run or follow,
        overrides=[*overrides, *asked],
        **given,
    )


async def run_serve(
    console: Console, *, run: Path | None = None, follow: Path | None = None, **given: Any
) -> None:
    """Serve until cancelled; then end what is in hand.

    Args:
        run, follow, given: as `serve_config` takes them.
    Raises:
        As `serve_config`, `bound` and `started`.
    """
    config = serve_config(run=run, follow=follow, **given)
    keys = keys_for(config)
    folder = RunFolder(config.run_dir)

    def note(text: str) -> None:
        say(console, text)

    with folder.locked(), bound(config) as door:
        text = yaml.safe_dump(config.effective(), sort_keys=False)
        folder.store.put(CONFIG, text.encode())
        note("starting the engines")
        async with started(config, note, folder) as (models, service, fleet):
            note(f"{fleet.describe()} up")
            server = Server(service, models.config, keys, models.why_not_ready)
            with LiveFile(folder.store, lambda: _snapshot(service)):
                async with listening(server, door) as address:
                    note(f"{address}  ({'API keys' if keys else 'this machine only'}; Ctrl-C ends)")
                    await _serve(server, models, fleet, run or follow, follow is not None)


def keys_for(config: ServeConfig) -> Keys:
    """The API keys a server with this config asks for.

    Raises:
        ConfigError: they cannot be read, or there are none where they are needed.
    """
    keys = read_keys(config.serve.keys)
    if not keys and not is_loopback(config.serve.host):
        raise ConfigError(
            f"serve.host {config.serve.host} can be reached from elsewhere: give API keys with "
            f"--keys FILE or in {VARIABLE}"
        )
    return keys


def bound(config: ServeConfig) -> socket.socket:
    """A socket at the server's address: taken before engines start, listened on when they are up.

    Raises:
        ConfigError: it cannot be had.
    """
    host, port = config.serve.host, config.serve.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        door = socket.socket(family, kind, protocol)
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
        except OSError:
            door.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another one with "
            "--port"
        ) from error
    return door


@asynccontextmanager
async def listening(server: Server, door: socket.socket) -> AsyncIterator[str]:
    """Answer inside the block; yields the address. At its end what is in hand may end first."""
    runner = web.AppRunner(
        server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.SockSite(runner, door).start()
        host, port = door.getsockname()[:2]
        try:
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        finally:
            await server.stop()
    finally:
        await runner.cleanup()


async def _serve(
    server: Server, models: ServedModels, fleet: Fleet, run: Path | None, follow: bool
) -> None:
    """Look after the server until cancelled."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_look(server.service, fleet))
            if follow:
                group.create_task(_follow(server, models, run))
            while True:
                await asked.wait()
                asked.clear()
                _read_keys_again(server)
                await models.renew(run)
                server.config = models.config
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _look(service: Service, fleet: Fleet) -> None:
    """Have as many searches as the replicas there are, tell the meter how the service stands, and
    have dead pools tried again."""
    while True:
        service.scale(len(fleet.pools.handles("policy")))
        standing = service.standing
        fleet.meter.tell_service(running=standing.running, waiting=standing.waiting)
        try:
            fleet.pools.check()
        except EngineError as error:
            fleet.note(f"{error}; tried again in {MEND_S:.0f} s")
            await asyncio.sleep(MEND_S)
            fleet.mend()
        await asyncio.sleep(LOOK_S)


async def _follow(server: Server, models: ServedModels, run: Path | None) -> None:
    """Take the newest promoted pair of a run whenever there is another one."""
    while True:
        await asyncio.sleep(server.config.serve.follow_s)
        await models.renew(run, look=True)
        server.config = models.config


def _read_keys_again(server: Server) -> None:
    try:
        server.keys = keys_for(server.config)
    except ConfigError as error:
        logger.error("The API keys stay as they were: %s", error)


def _snapshot(service: Service) -> Snapshot:
    standing = service.standing
    facts: dict[str, str | float] = {"running": standing.running, "waiting": standing.waiting}
    return Snapshot(stage="serve", label="answering", facts=facts)
