"""`rstar dashboard RUN`: the dashboards of `cluster.watch.panels` as a page that draws itself anew.

    browser -- GET /api/overview every 5 s --> this server --+-- RUN/metrics/samples-* (default)
                                                             +-- Prometheus (--prometheus URL)

One definition, two readers: the page shows what Grafana shows, without Grafana and, by default,
without Prometheus. It can be served from any machine that sees the run's folder, while the run goes
on and afterwards. Everything it needs is in one file; nothing is fetched from elsewhere.

It listens on the loopback unless told otherwise, and there answers only requests for a loopback
name, so that no web page can reach it under a name of its own. Anywhere else it asks for a token:
once in the address, then as a cookie, or as `Authorization: Bearer`. The page only reads.

Not covered: encryption; put a proxy in front, or an ssh tunnel to the loopback.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from aiohttp import web
from rich.console import Console

from cluster.folder.lineage import first_start_s
from cluster.folder.run_folder import RunFolder
from cluster.telemetry.live import read_live
from cluster.telemetry.samples import FOLDER, Samples
from cluster.watch.panels import DASHBOARDS, Dashboard, Query
from cluster.watch.queries import MIN_WINDOW_S, rate_window_s
from cluster.watch.status import run_folder, runs, state_text

COOKIE = "rstar_token"

POINTS = 180
"""Of a line, at most about so many."""

_PAGE = Path(__file__).with_name("dashboard.html")

_BY_NAME = {dashboard.name: dashboard for dashboard in DASHBOARDS}

Line = dict[str, Any]
"""{"name": ..., "points": [[unix seconds, value], ...]}"""


class DashboardError(RuntimeError):
    """The page cannot be served, or its data not be had; the message says why."""


class SampleSource:
    """The run's own samples as the source of a page's numbers."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._samples = Samples()
        self._read: dict[str, int] = {}

    async def refresh(self) -> float | None:
        """Have the newest data; returns the time of the last of it, None if there is none."""
        now = await asyncio.to_thread(self._folder.store.sizes, FOLDER)
        if now != self._read:
            self._samples = await asyncio.to_thread(Samples.read, self._folder.store)
            self._read = now
        return self._samples.times[-1] if self._samples.times else None

    async def lines(self, query: Query, from_s: float, to_s: float, step_s: float) -> list[Line]:
        """Every line of a query over a time."""
        window_s = max(rate_window_s(self._samples), step_s)
        found: dict[str, list[list[float]]] = {}
        for time_s in self._times(from_s, to_s, step_s):
            values = query.expression.evaluate(self._samples, time_s, window_s)
            for labels, value in values.items():
                if math.isfinite(value):
                    name = query.legend.format(**dict(labels))
                    found.setdefault(name, []).append([time_s, value])
        return [{"name": name, "points": points} for name, points in sorted(found.items())]

    def _times(self, from_s: float, to_s: float, step_s: float) -> list[float]:
        """Evenly from the end, which is where people look, back to the first sample."""
        first_s = max(from_s, self._samples.times[0] if self._samples.times else to_s)
        count = int((to_s - first_s) / step_s)
        return [to_s - step_s * i for i in range(count, -1, -1)]

    def describe(self) -> str:
        """For people."""
        return f"from the samples in {self._folder.at(FOLDER)}, of the last hour"

    def first_s(self) -> float | None:
        """Time of the first of the data; None: it is not known."""
        return self._samples.times[0] if self._samples.times else None

    async def close(self) -> None:
        return None


class PrometheusSource:
    """A Prometheus that scrapes the run; it is asked the same."""

    def __init__(self, url: str, run: str) -> None:
        self._url = url.rstrip("/")
        self._run = run
        self._session: aiohttp.ClientSession | None = None

    async def refresh(self) -> float | None:
        return time.time()

    async def lines(self, query: Query, from_s: float, to_s: float, step_s: float) -> list[Line]:
        """Likewise.

        Raises:
            DashboardError: it does not answer, or refuses.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15))
        window_s = max(MIN_WINDOW_S, step_s)
        arguments = {
            "query": query.expression.promql(self._run, f"{window_s:.0f}s"),
            "start": f"{from_s:.3f}",
            "end": f"{to_s:.3f}",
            "step": f"{step_s:.3f}",
        }
        address = f"{self._url}/api/v1/query_range"
        try:
            async with self._session.get(address, params=arguments) as reply:
                answer = await reply.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise DashboardError(f"Prometheus at {self._url} does not answer: {error}") from error
        if answer.get("status") != "success":
            raise DashboardError(f"Prometheus at {self._url}: {answer.get('error', 'no data')}")
        lines = []
        for series in answer["data"]["result"]:
            labels = {name: series["metric"].get(name, "") for name in query.expression.by}
            pairs = ((float(t), float(v)) for t, v in series["values"])
            points = [[t, v] for t, v in pairs if math.isfinite(v)]
            if points:
                lines.append({"name": query.legend.format(**labels), "points": points})
        return sorted(lines, key=lambda line: line["name"])

    def first_s(self) -> float | None:
        return None

    def describe(self) -> str:
        return f"from Prometheus at {self._url}"

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


Source = SampleSource | PrometheusSource


async def dashboard_data(
    folder: RunFolder, dashboard: Dashboard, source: Source, *, minutes: float | None, now_s: float
) -> dict[str, Any]:
    """Everything the page shows of one dashboard.

    A run that does not go on is shown up to its last sample.

    Args:
        minutes: None: the run's own time, from its first start on, as far as there is data.
    Raises:
        DashboardError: the source cannot be asked.
    """
    live = await asyncio.to_thread(read_live, folder.store)
    alive = runs(live, now_s)
    last_s = await source.refresh()
    to_s = now_s if alive or last_s is None else min(now_s, last_s)
    if minutes is not None:
        from_s = to_s - 60 * minutes
    else:
        if live is not None and not alive:  # Prometheus has no last sample of a run
            to_s = min(to_s, live.time_unix_s)
        began_s = await asyncio.to_thread(first_start_s, folder) or to_s - 3600
        from_s = min(max(began_s, source.first_s() or 0.0), to_s - 60.0)
    step_s = max(5.0, (to_s - from_s) / POINTS)
    panels = []
    for panel in dashboard.panels:
        start_s = from_s if panel.kind == "lines" else to_s - step_s
        lines = [
            line
            for query in panel.queries
            for line in await source.lines(query, start_s, to_s, step_s)
        ]
        panels.append(
            {
                "title": panel.title,
                "unit": panel.unit,
                "kind": panel.kind,
                "help": panel.help,
                "series": lines,
            }
        )
    return {
        "run": folder.name,
        "title": dashboard.title,
        "state": state_text(live, now_s),
        "well": alive or (live is not None and live.state == "finished"),
        "dashboards": [[each.name, each.title] for each in DASHBOARDS],
        "from_s": from_s,
        "to_s": to_s,
        "step_s": step_s,
        "panels": panels,
        "source": source.describe(),
    }


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(folder: RunFolder, source: Source, *, token: str = "") -> web.Application:
    """The server.

    Args:
        token: asked of every request; "": requests must be for a loopback name instead.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not token:
            if not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
                raise web.HTTPForbidden(text="this page is served to this machine only\n")
            return await handler(request)
        given = request.query.get("token")
        if given is not None and _equal(given, token):
            reply = web.HTTPFound(request.path)
            reply.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            raise reply
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if _equal(request.cookies.get(COOKIE, ""), token) or _equal(bearer, token):
            return await handler(request)
        raise web.HTTPUnauthorized(text="open the address with its token\n")

    async def page(request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(12)
        text = _PAGE.read_text(encoding="utf-8").replace("<script>", f'<script nonce="{nonce}">')
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
            "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def data(request: web.Request) -> web.Response:
        dashboard = _BY_NAME.get(request.match_info["name"])
        asked = request.query.get("minutes")
        try:
            minutes = None if asked is None else float(asked)
        except ValueError:
            minutes = 0.0
        if dashboard is None or not (minutes is None or 1 <= minutes <= 60):
            return web.json_response({"error": "no such dashboard, or time"}, status=404)
        try:
            found = await dashboard_data(
                folder, dashboard, source, minutes=minutes, now_s=time.time()
            )
        except DashboardError as error:
            return web.json_response({"error": str(error)}, status=502)
        return web.json_response(found, headers={"Cache-Control": "no-store"})

    async def close(app: web.Application) -> None:
        await source.close()

    app = web.Application(middlewares=[guard])
    app.router.add_get("/", page)
    app.router.add_get("/api/{name}", data)
    app.on_cleanup.append(close)
    return app


async def serve_dashboard(
    run: Path,
    console: Console,
    *,
    host: str = "127.0.0.1",
    port: int = 8300,
    token: str | None = None,
    prometheus: str | None = None,
) -> None:
    """Serve the page until cancelled.

    Args:
        port: 0: any free one.
        token: None: made, where one is needed.
        prometheus: its address; None: the run's own samples.
    Raises:
        RunFolderError: there is no such run.
        DashboardError: the address cannot be listened on.
    """
    folder = run_folder(run)
    source = PrometheusSource(prometheus, folder.label) if prometheus else SampleSource(folder)
    secret = "" if is_loopback(host) and token is None else token or secrets.token_urlsafe(18)
    app = make_app(folder, source, token=secret)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise DashboardError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another one "
                "with --port"
            ) from error
        bound = runner.addresses[0][1]
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{bound}/" + (f"?token={quote(secret)}" if secret else "")
        console.print(
            f"{address}  ({source.describe()}; Ctrl-C ends it)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
