"""The cloud is about to take this machine back: a watcher of its metadata service.

    run() -> which cloud is this? -- none after `attempts` tries --> ends, logged once
                | AWS, GCP or Azure
                v
             poll every `interval_s` -> on_notice(SpotNotice), once for each different notice

One watcher runs on each node. What a notice leads to (drain the node, commit finished parts) is the
caller's; the deadline says how long there is.

| cloud | asked | notice before the end |
|---|---|---|
| AWS | token (IMDSv2), then spot/instance-action, events/recommendations/rebalance | 2 minutes |
| GCP | instance/preempted | 30 s, counted from when it is seen |
| Azure | scheduledevents, events of kind Preempt or Terminate that name this VM | 30 s or more |

A rebalance recommendation is advice: the machine is at risk, no time is set, and many such machines
run on for days. It is a notice only if the config asks for it. Notices are best effort everywhere;
machines also go without one.

Once a cloud is known a failing answer is no reason to stop: the service has outages of its own. It
is logged when it begins and the polling goes on. A notice that could not be acted on is told again
at the next poll. Nothing here blocks: every request has a timeout.

Not covered: telling Azure that the event may start early; maintenance that moves a VM and keeps it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)

METADATA_URL = "http://169.254.169.254"
GCP_NOTICE_S = 30.0


class Cloud(StrEnum):
    """Whose metadata service answers."""

    AWS = "aws"
    GCP = "gcp"
    AZURE = "azure"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotNotice:
    """This machine will go, or is likely to."""

    cloud: Cloud
    reason: str
    """As the cloud calls it: "terminate", "preempted", "Preempt", "rebalance", ..."""
    deadline_s: float | None
    """Unix time of the end; None: advice without a time."""

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the end, at least 0; None: no time is set."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)


class SpotConfig(BaseModel):
    """How the metadata service is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(default=METADATA_URL, description="of the metadata service, no slash at end")
    interval_s: float = Field(default=5.0, gt=0, description="pause between polls")
    attempts: int = Field(default=3, ge=1, description="tries before there is no cloud here")
    timeout_s: float = Field(default=2.0, gt=0, description="of one request")
    azure_timeout_s: float = Field(
        default=130.0,
        gt=0,
        description="of a request for Azure's events: the first one may take two minutes",
    )
    leave_on_rebalance: bool = Field(
        default=False,
        description="leave a node on AWS' mere recommendation, too; Ray cannot take that back",
    )


OnNotice = Callable[[SpotNotice], Awaitable[None]]


class MetadataError(RuntimeError):
    """The metadata service did not answer as documented."""


class SpotWatcher:
    """Polls the metadata service of the machine it runs on; see the module."""

    def __init__(
        self,
        on_notice: OnNotice,
        config: SpotConfig | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            on_notice: awaited before the next poll; if it raises it is told again then.
            clock: Unix time.
        """
        self.config = config or SpotConfig()
        self.cloud: Cloud | None = None
        """None until it is known."""
        self._on_notice = on_notice
        self._clock = clock
        self._token = ""
        self._vm_name = ""
        self._told: set[str] = set()

    async def run(self) -> None:
        """Watch until cancelled; returns if this is no cloud machine."""
        # The link-local address must not be asked of a proxy (trust_env stays off).
        async with aiohttp.ClientSession() as session:
            self.cloud = await self._find_cloud(session)
            if self.cloud is None:
                logger.info("No metadata service answers here: spot notices are not watched")
                return
            logger.info("Spot notices are watched cloud=%s", self.cloud)
            failing = False
            while True:
                try:
                    found = await self._poll(session, self.cloud)
                except _FAILURES as error:
                    if not failing:
                        logger.warning(
                            "The metadata service fails: %s: %s", type(error).__name__, error
                        )
                    failing, found = True, {}
                else:
                    failing = False
                for event, notice in found.items():
                    if event not in self._told and await self._tell(notice):
                        self._told.add(event)
                await asyncio.sleep(self.config.interval_s)

    async def _tell(self, notice: SpotNotice) -> bool:
        """Have a notice acted on; False if that failed."""
        left_s = notice.left_s(self._clock())
        logger.warning(
            "This machine will be taken: %s, %s",
            notice.reason,
            "no time is set" if left_s is None else f"in {left_s:.0f} s",
        )
        try:
            await self._on_notice(notice)
        except Exception:
            # Whatever it was (Ray's head may be away for a moment), the machine still goes.
            logger.exception("A notice was not acted on; it is told again")
            return False
        return True

    async def _find_cloud(self, session: aiohttp.ClientSession) -> Cloud | None:
        signs = {
            Cloud.AWS: self._renew_token,
            Cloud.GCP: self._gcp_answers,
            Cloud.AZURE: self._read_vm_name,
        }
        for attempt in range(self.config.attempts):
            if attempt:
                await asyncio.sleep(self.config.interval_s)
            answers = await asyncio.gather(
                *(sign(session) for sign in signs.values()), return_exceptions=True
            )
            for cloud, answer in zip(signs, answers, strict=True):
                if answer is None:
                    return cloud
                if not isinstance(answer, _FAILURES):
                    raise answer
        return None

    async def _poll(self, session: aiohttp.ClientSession, cloud: Cloud) -> dict[str, SpotNotice]:
        """Notices that stand now, by what tells one event from another."""
        polls = {
            Cloud.AWS: self._poll_aws,
            Cloud.GCP: self._poll_gcp,
            Cloud.AZURE: self._poll_azure,
        }
        return await polls[cloud](session)

    # -- AWS

    async def _renew_token(self, session: aiohttp.ClientSession) -> None:
        status, text, _ = await self._ask(
            session,
            "PUT",
            "/latest/api/token",
            {"X-aws-ec2-metadata-token-ttl-seconds": "21600"},
        )
        if status != 200 or not text:
            raise MetadataError(f"token: status {status}")
        self._token = text

    async def _poll_aws(self, session: aiohttp.ClientSession) -> dict[str, SpotNotice]:
        found = {}
        action = await self._aws(session, "spot/instance-action")
        if action is not None:
            found[f"{action.get('action')} {action.get('time')}"] = SpotNotice(
                cloud=Cloud.AWS,
                reason=str(action.get("action")),
                deadline_s=_time(action.get("time"), datetime.fromisoformat),
            )
        if (
            self.config.leave_on_rebalance
            and await self._aws(session, "events/recommendations/rebalance") is not None
        ):
            found["rebalance"] = SpotNotice(cloud=Cloud.AWS, reason="rebalance", deadline_s=None)
        return found

    async def _aws(self, session: aiohttp.ClientSession, what: str) -> dict[str, Any] | None:
        """A metadata document; None if there is none (404)."""
        path = f"/latest/meta-data/{what}"
        for _ in range(2):
            headers = {"X-aws-ec2-metadata-token": self._token}
            status, text, _ = await self._ask(session, "GET", path, headers)
            if status != 401:
                break
            await self._renew_token(session)  # it has run out
        if status == 404:
            return None
        return _document(what, status, text)

    # -- GCP

    async def _gcp_answers(self, session: aiohttp.ClientSession) -> None:
        status, _, headers = await self._ask(session, "GET", "/computeMetadata/v1/", _GCP)
        if status != 200 or headers.get("Metadata-Flavor") != "Google":
            raise MetadataError(f"computeMetadata: status {status}")

    async def _poll_gcp(self, session: aiohttp.ClientSession) -> dict[str, SpotNotice]:
        path = "/computeMetadata/v1/instance/preempted"
        status, text, _ = await self._ask(session, "GET", path, _GCP)
        if status != 200:
            raise MetadataError(f"preempted: status {status}")
        if text.strip().upper() != "TRUE":
            return {}
        deadline_s = self._clock() + GCP_NOTICE_S
        notice = SpotNotice(cloud=Cloud.GCP, reason="preempted", deadline_s=deadline_s)
        return {notice.reason: notice}

    # -- Azure

    async def _read_vm_name(self, session: aiohttp.ClientSession) -> None:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        status, text, _ = await self._ask(session, "GET", path, _AZURE)
        if status != 200 or not text.strip():
            raise MetadataError(f"instance name: status {status}")
        self._vm_name = text.strip()

    async def _poll_azure(self, session: aiohttp.ClientSession) -> dict[str, SpotNotice]:
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        status, text, _ = await self._ask(
            session, "GET", path, _AZURE, timeout_s=self.config.azure_timeout_s
        )
        found = {}
        for event in _document("scheduledevents", status, text).get("Events") or []:
            kind, starts = event.get("EventType"), event.get("NotBefore")
            if kind in ("Preempt", "Terminate") and self._vm_name in (event.get("Resources") or []):
                found[str(event.get("EventId"))] = SpotNotice(
                    cloud=Cloud.AZURE,
                    reason=kind,
                    # An event that has begun has no time any more.
                    deadline_s=_time(starts, parsedate_to_datetime) if starts else self._clock(),
                )
        return found

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        headers: dict[str, str],
        *,
        timeout_s: float | None = None,
    ) -> tuple[int, str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s or self.config.timeout_s)
        url = self.config.url + path
        async with session.request(
            method, url, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            return response.status, await response.text(), response.headers


_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, MetadataError)
_GCP = {"Metadata-Flavor": "Google"}
_AZURE = {"Metadata": "true"}


def _document(what: str, status: int, text: str) -> dict[str, Any]:
    if status != 200:
        raise MetadataError(f"{what}: status {status}")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise MetadataError(f"{what}: not JSON: {text[:100]!r}") from error
    if not isinstance(parsed, dict):
        raise MetadataError(f"{what}: expected a JSON object, got {text[:100]!r}")
    return parsed


def _time(text: Any, read: Callable[[str], datetime]) -> float:
    """Unix time; UTC where no zone is named."""
    try:
        when = read(str(text))
    except ValueError as error:
        raise MetadataError(f"not a time: {text!r}") from error
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
