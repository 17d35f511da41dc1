from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console

from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.telemetry import metrics as m
from cluster.watch.dashboard import (
    DashboardError,
    PrometheusSource,
    SampleSource,
    Source,
    dashboard_data,
    make_app,
    serve_dashboard,
)
from cluster.watch.panels import DASHBOARDS, ENGINES, OVERVIEW
from tests.made_metrics import write_made_run

PAGE = Path(__file__).resolve().parents[4] / "cluster" / "watch" / "dashboard.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_made_run(tmp_path / "demo", time.time())
    return tmp_path / "demo"


def lines(data: dict[str, Any], title: str) -> dict[str, list[list[float]]]:
    panel = next(panel for panel in data["panels"] if panel["title"] == title)
    return {line["name"]: line["points"] for line in panel["series"]}


def app_of(root: Path, **more: str) -> web.Application:
    folder = RunFolder(root)
    return make_app(folder, SampleSource(folder), **more)


async def get(source: Source, root: Path, dashboard: Any = OVERVIEW, **other: Any) -> Any:
    arguments = {"minutes": 60.0, "now_s": time.time(), **other}
    return await dashboard_data(RunFolder(root), dashboard, source, **arguments)


async def test_page_gets_the_numbers_of_the_runs_own_samples(root: Path) -> None:
    data = await get(SampleSource(RunFolder(root)), root)
    assert data["state"] == "running, round 2: rollout, 260/600, stage ETA 15:00, run ETA 1:30:00"
    assert data["well"] is True
    (trajectories,) = lines(data, "Verified").values()
    assert trajectories[-1][1] == pytest.approx(2.8, rel=0.01)
    assert lines(data, "Cost so far")["Cost so far"][-1][1] == pytest.approx(6.0, abs=0.1)
    generated = lines(data, "Generated and scored")["generated"]
    assert len(generated) > 80 and generated[0][0] < generated[-1][0] <= data["to_s"]
    engines = await get(SampleSource(RunFolder(root)), root, ENGINES)
    assert set(lines(engines, "Generated tokens by replica")) == {f"policy-{n}" for n in range(3)}
    assert lines(engines, "Preemptions") == {}


async def test_run_that_is_over_is_shown_up_to_its_end(tmp_path: Path) -> None:
    end_s = time.time() - 86_400
    write_made_run(tmp_path / "demo", end_s, state="finished")
    data = await get(SampleSource(RunFolder(tmp_path / "demo")), tmp_path / "demo")
    assert data["to_s"] == pytest.approx(end_s, abs=0.1)
    assert data["state"] == "finished 24:00:00 ago" and data["well"] is True
    assert lines(data, "Generated and scored")["generated"]


async def test_page_opens_on_the_runs_own_time(tmp_path: Path) -> None:
    """A run of half an hour, a day ago; its start is recorded an hour before its first sample."""
    end_s = float(int(time.time())) - 86_400
    root = tmp_path / "demo"
    write_made_run(root, end_s, state="finished")
    own = SampleSource(RunFolder(root))
    data = await get(own, root, minutes=None)
    first_s = own.first_s()
    assert first_s is not None and data["to_s"] == pytest.approx(end_s, abs=0.1)
    assert data["from_s"] == pytest.approx(first_s) and end_s - 3600 < first_s < end_s - 600
    (stages,) = [panel for panel in data["panels"] if panel["title"] == "Stage"]
    assert stages["kind"] == "timeline"

    class Far(PrometheusSource):
        """Has data of all of it, and of others still now."""

        async def refresh(self) -> float | None:
            return end_s + 86_400

        async def lines(self, *asked: Any) -> list[Any]:
            return []

    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end_s - 14 * 86_400))
    (root / "versions.json").write_text(json.dumps({"starts": [{"time": began}, {"time": "x"}]}))
    data = await get(Far("http://x", "demo"), root, minutes=None)
    assert (data["from_s"], data["to_s"]) == (end_s - 14 * 86_400, end_s)
    assert data["step_s"] == 14 * 86_400 / 180
    async with serving(app_of(root)) as url, aiohttp.ClientSession() as http:
        answer = await (await http.get(f"{url}/api/overview")).json()
    assert answer["from_s"] == pytest.approx(first_s)


async def test_new_rows_are_seen(root: Path) -> None:
    source = SampleSource(RunFolder(root))
    before = await source.refresh()
    write_made_run(root, time.time() + 60)
    after = await source.refresh()
    assert before is not None and after is not None and after > before + 50


async def test_every_dashboard_is_served_and_nothing_else(root: Path) -> None:
    async with (
        serving(app_of(root)) as url,
        aiohttp.ClientSession() as http,
    ):
        for dashboard in DASHBOARDS:
            reply = await http.get(f"{url}/api/{dashboard.name}?minutes=10")
            assert reply.status == 200
            titles = [panel["title"] for panel in (await reply.json())["panels"]]
            assert titles == [panel.title for panel in dashboard.panels]
        for wrong in ("nothing", "overview?minutes=x", "overview?minutes=6000"):
            assert (await http.get(f"{url}/api/{wrong}")).status == 404
        assert (await http.post(f"{url}/")).status == 405


async def test_loopback_answers_no_foreign_name(root: Path) -> None:
    async with (
        serving(app_of(root)) as url,
        aiohttp.ClientSession() as http,
    ):
        assert (await http.get(url)).status == 200
        reply = await http.get(url, headers={"Host": "evil.example"})
        assert reply.status == 403


async def test_token_is_asked_of_every_request_and_leaves_the_address(root: Path) -> None:
    app = app_of(root, token="s3cret")
    async with (
        serving(app) as url,
        aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as http,
    ):
        for path in ("/", "/api/overview", "/?token=wrong", "/nothing"):
            assert (await http.get(url + path)).status == 401
        bearer = {"Authorization": "Bearer s3cret"}
        assert (await http.get(f"{url}/api/overview", headers=bearer)).status == 200
        reply = await http.get(f"{url}/?token=s3cret")
        assert reply.status == 200 and "token" not in str(reply.url)
        assert (await http.get(f"{url}/api/overview")).status == 200


async def test_page_asks_for_nothing_from_elsewhere(root: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)|src=|@import|url\(", text)
    async with (
        serving(app_of(root)) as url,
        aiohttp.ClientSession() as http,
    ):
        policy = (await http.get(url)).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "connect-src 'self'" in policy


async def test_address_other_than_the_loopback_gets_a_token(root: Path) -> None:
    console = Console(record=True, width=200)
    task = asyncio.create_task(serve_dashboard(root, console, host="0.0.0.0", port=0))
    async with asyncio.timeout(30):
        while not (text := console.export_text(clear=False)):
            assert not task.done()
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert re.search(r"http://0\.0\.0\.0:\d+/\?token=[\w-]{20,}", text)


async def test_what_is_no_run_and_a_port_in_use_are_named(root: Path, tmp_path: Path) -> None:
    console = Console(quiet=True)
    with pytest.raises(RunFolderError, match="no such folder"):
        await serve_dashboard(tmp_path / "none", console)
    async with serving(app_of(root)) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(DashboardError, match=f"127.0.0.1:{port}.*--port"):
            await serve_dashboard(root, console, port=port)


async def test_prometheus_is_asked_the_same_questions(root: Path) -> None:
    asked: list[dict[str, str]] = []

    async def query_range(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        metric = {"replica": "policy-0"} if "by (replica)" in request.query["query"] else {}
        values = [[1000, "1.5"], [1020, "NaN"]]
        result = [{"metric": metric, "values": values}]
        return web.json_response({"status": "success", "data": {"result": result}})

    app = web.Application()
    app.router.add_get("/api/v1/query_range", query_range)
    async with serving(app) as url:
        source = PrometheusSource(url, "demo")
        data = await get(source, root, ENGINES)
        await source.close()
    assert lines(data, "Generated tokens by replica") == {"policy-0": [[1000.0, 1.5]]}
    expression = f'sum by (replica) (rate({m.GENERATED_TOKENS.exported}{{run="demo"}}[60s]))'
    assert asked[0]["query"] == expression


async def test_prometheus_that_does_not_answer_is_named_on_the_page(root: Path) -> None:
    source = PrometheusSource("http://127.0.0.1:9", "demo")
    async with serving(make_app(RunFolder(root), source)) as url, aiohttp.ClientSession() as http:
        reply = await http.get(f"{url}/api/overview")
        assert reply.status == 502
        assert "Prometheus at http://127.0.0.1:9 does not answer" in (await reply.json())["error"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (deploy/test_tools.sh)")
async def test_page_draws_itself_light_and_dark_in_a_browser(root: Path, tmp_path: Path) -> None:
    import matplotlib.image

    shots = {}
    async with serving(app_of(root)) as url:
        for scheme, number in (("light", 1), ("dark", 0)):
            shots[scheme] = tmp_path / f"{scheme}.png"
            process = await asyncio.create_subprocess_exec(
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--virtual-time-budget=3000",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--blink-settings=preferredColorScheme={number}",
                "--window-size=1400,1000",
                f"--screenshot={shots[scheme]}",
                f"{url}/#overview",
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            await asyncio.wait_for(process.wait(), 60)
    pictures = {name: matplotlib.image.imread(path)[..., :3] for name, path in shots.items()}
    assert pictures["light"][5, 5].mean() > 0.8 > 0.3 > pictures["dark"][5, 5].mean()
    for picture in pictures.values():
        # Curves are the only thing in these two colours of lines.
        for red, green, blue in ((0x2F, 0x7E, 0xD8), (0xE0, 0x7B, 0x21)):
            apart = abs(picture * 255 - (red, green, blue)).max(axis=2)
            assert (apart < 12).sum() > 300
