"""The spot watcher against metadata services that are played by a local server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.machines.spot import Cloud, SpotConfig, SpotNotice, SpotWatcher

NOW_S = 1_700_000_000.0
"""2023-11-14T22:13:20Z."""


class FakeMetadata:
    """Answers what a test lays out, 404 for the rest; remembers what was asked."""

    def __init__(self, answers: dict[tuple[str, str], object]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []

    async def handle(self, request: web.Request) -> web.Response:
        key = (request.method, request.path)
        self.asked.append(key)
        answer = self.answers.get(key)
        if answer is None:
            return web.Response(status=404)
        if callable(answer):
            return answer(request)
        return web.json_response(answer) if isinstance(answer, dict) else web.Response(text=answer)


class Notices:
    """Collects notices and lets a test wait for the next one."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[SpotNotice] = asyncio.Queue()

    async def __call__(self, notice: SpotNotice) -> None:
        await self.queue.put(notice)

    async def next(self) -> SpotNotice:
        async with asyncio.timeout(30):
            return await self.queue.get()


@asynccontextmanager
async def watching(
    service: FakeMetadata, **settings: float
) -> AsyncIterator[tuple[SpotWatcher, Notices]]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.handle)
    async with TestServer(app) as server:
        url = str(server.make_url("/")).rstrip("/")
        config = SpotConfig(url=url, **{"interval_s": 0.01, **settings})
        notices = Notices()
        watcher = SpotWatcher(notices, config, clock=lambda: NOW_S)
        task = asyncio.create_task(watcher.run())
        try:
            yield watcher, notices
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


TOKEN = ("PUT", "/latest/api/token")
ACTION = ("GET", "/latest/meta-data/spot/instance-action")
REBALANCE = ("GET", "/latest/meta-data/events/recommendations/rebalance")
GCP_ROOT = ("GET", "/computeMetadata/v1/")
PREEMPTED = ("GET", "/computeMetadata/v1/instance/preempted")
VM_NAME = ("GET", "/metadata/instance/compute/name")
EVENTS = ("GET", "/metadata/scheduledevents")


def gcp_answers(request: web.Request) -> web.Response:
    ok = request.headers.get("Metadata-Flavor") == "Google"
    return web.Response(status=200 if ok else 403, headers={"Metadata-Flavor": "Google"})


def azure(value: object) -> Callable[[web.Request], web.Response]:
    def answer(request: web.Request) -> web.Response:
        if request.headers.get("Metadata") != "true" or "api-version" not in request.query:
            return web.Response(status=400)
        return web.json_response(value) if isinstance(value, dict) else web.Response(text=value)

    return answer


def event(kind: str, *, id: str = "e1", vm: str = "gpu-7", starts: str = "") -> dict[str, object]:
    return {
        "EventId": id,
        "EventType": kind,
        "EventStatus": "Scheduled" if starts else "Started",
        "ResourceType": "VirtualMachine",
        "Resources": [vm],
        "NotBefore": starts,
    }


# -- AWS


async def test_aws_instance_action_gives_its_deadline_once() -> None:
    service = FakeMetadata({TOKEN: "secret"})
    async with watching(service) as (watcher, notices):
        await until(lambda: service.asked.count(ACTION) >= 2)
        assert watcher.cloud is Cloud.AWS and notices.queue.empty()
        service.answers[ACTION] = {"action": "terminate", "time": "2023-11-14T22:15:20Z"}
        notice = await notices.next()
        assert notice == SpotNotice(cloud=Cloud.AWS, reason="terminate", deadline_s=NOW_S + 120)
        assert notice.left_s(NOW_S + 20) == 100 and notice.left_s(NOW_S + 500) == 0
        asked = service.asked.count(ACTION)
        await until(lambda: service.asked.count(ACTION) >= asked + 3)
        assert notices.queue.empty()


async def test_aws_rebalance_is_no_notice_unless_asked_for() -> None:
    service = FakeMetadata({TOKEN: "secret", REBALANCE: {"noticeTime": "2023-11-14T22:13:00Z"}})
    async with watching(service) as (_, notices):
        await until(lambda: service.asked.count(ACTION) >= 3)
        assert notices.queue.empty() and REBALANCE not in service.asked
    async with watching(service, leave_on_rebalance=True) as (_, notices):
        notice = await notices.next()
        assert (notice.reason, notice.deadline_s, notice.left_s(NOW_S)) == ("rebalance", None, None)


async def test_aws_token_that_ran_out_is_renewed() -> None:
    tokens = iter(["old", "new"])

    def action(request: web.Request) -> web.Response:
        if request.headers.get("X-aws-ec2-metadata-token") != "new":
            return web.Response(status=401)
        return web.json_response({"action": "stop", "time": "2023-11-14T22:15:20Z"})

    service = FakeMetadata({TOKEN: lambda _: web.Response(text=next(tokens)), ACTION: action})
    async with watching(service) as (_, notices):
        assert (await notices.next()).reason == "stop"


# -- GCP


async def test_gcp_preemption_counts_from_when_it_is_seen() -> None:
    service = FakeMetadata({GCP_ROOT: gcp_answers, PREEMPTED: "FALSE"})
    async with watching(service) as (watcher, notices):
        await until(lambda: PREEMPTED in service.asked)
        assert watcher.cloud is Cloud.GCP and notices.queue.empty()
        service.answers[PREEMPTED] = "TRUE"
        notice = await notices.next()
        assert notice == SpotNotice(cloud=Cloud.GCP, reason="preempted", deadline_s=NOW_S + 30)


# -- Azure


async def test_azure_preemption_of_this_machine_is_told_and_nothing_else() -> None:
    events = [
        event("Reboot", id="r", starts="Tue, 14 Nov 2023 22:20:00 GMT"),
        event("Preempt", id="other", vm="gpu-8", starts="Tue, 14 Nov 2023 22:13:50 GMT"),
        event("Preempt", id="own", starts="Tue, 14 Nov 2023 22:13:50 GMT"),
    ]
    service = FakeMetadata({VM_NAME: azure("gpu-7"), EVENTS: azure({"Events": events})})
    async with watching(service) as (watcher, notices):
        notice = await notices.next()
        assert watcher.cloud is Cloud.AZURE
        assert notice == SpotNotice(cloud=Cloud.AZURE, reason="Preempt", deadline_s=NOW_S + 30)
        # The same event once it has begun: it has no time any more and is not told again.
        service.answers[EVENTS] = azure({"Events": [event("Preempt", id="own")]})
        asked = service.asked.count(EVENTS)
        await until(lambda: service.asked.count(EVENTS) >= asked + 3)
        assert notices.queue.empty()


async def test_azure_event_that_has_begun_is_due_now() -> None:
    service = FakeMetadata(
        {VM_NAME: azure("gpu-7"), EVENTS: azure({"Events": [event("Terminate")]})}
    )
    async with watching(service) as (_, notices):
        assert (await notices.next()).deadline_s == NOW_S


# -- no cloud, and clouds that fail


async def test_machine_without_metadata_service_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with TestServer(web.Application()) as server:
        closed = str(server.make_url("/")).rstrip("/")
    watcher = SpotWatcher(Notices(), SpotConfig(url=closed, interval_s=0.01))
    with caplog.at_level(logging.INFO, logger="cluster.machines.spot"):
        async with asyncio.timeout(30):
            await watcher.run()
    assert watcher.cloud is None
    assert [record.getMessage() for record in caplog.records] == [
        "No metadata service answers here: spot notices are not watched"
    ]


async def test_web_server_that_is_no_metadata_service_is_no_cloud() -> None:
    service = FakeMetadata({})
    async with watching(service, attempts=2) as (watcher, _):
        await until(lambda: service.asked.count(TOKEN) == 2)
        assert watcher.cloud is None


async def test_metadata_service_that_never_answers_does_not_block() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hang)
    async with TestServer(app) as server:
        url = str(server.make_url("/")).rstrip("/")
        config = SpotConfig(url=url, interval_s=0.01, attempts=2, timeout_s=0.05)
        async with asyncio.timeout(30):
            await SpotWatcher(Notices(), config).run()


async def test_outage_is_logged_once_and_the_notice_after_it_is_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken: dict[tuple[str, str], object] = {
        TOKEN: "secret",
        ACTION: lambda _: web.Response(status=500),
    }
    service = FakeMetadata(broken)
    async with watching(service) as (_, notices):
        await until(lambda: service.asked.count(ACTION) >= 4)
        service.answers[ACTION] = "{not json"
        asked = service.asked.count(ACTION)
        await until(lambda: service.asked.count(ACTION) >= asked + 3)
        service.answers[ACTION] = {"action": "terminate", "time": "2023-11-14T22:15:20Z"}
        assert (await notices.next()).reason == "terminate"
    messages = [r.getMessage() for r in caplog.records if "fails" in r.getMessage()]
    assert messages == [
        "The metadata service fails: MetadataError: spot/instance-action: status 500"
    ]


async def test_notice_that_could_not_be_acted_on_is_told_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[SpotNotice] = []

    async def act(notice: SpotNotice) -> None:
        told.append(notice)
        if len(told) < 3:
            raise RuntimeError("the head is away")

    service = FakeMetadata(
        {TOKEN: "t", ACTION: {"action": "terminate", "time": "2023-11-14T22:15:20Z"}}
    )
    async with watching(service) as (watcher, _):
        watcher._on_notice = act
        await until(lambda: len(told) == 3)
        asked = service.asked.count(ACTION)
        await until(lambda: service.asked.count(ACTION) >= asked + 3)
        assert len(told) == 3
    assert sum("told again" in record.getMessage() for record in caplog.records) == 2
