"""Give a checkpoint to every replica of a pool, and see that all of them serve it.

    load on all (each drains, swaps, checks itself) --> ask all: version? fingerprint?
        ^                                                        |
        |                                                     judge (pure)
        +--- RETRY: load again, REPLACE: a new replica <---------+--> all SERVE: done

Replicas of one version say the same of fixed texts, up to rounding: one that does not has the
wrong weights, whatever version it names, and is told to load again. With two replicas nobody knows
which is wrong, so both load again.

Not covered: keeping part of a pool on old weights. Either all serve the new version at the end, or
`EngineError` names those that do not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

import ray.exceptions

from cluster.engines.model_check import ModelCheckError
from rollout.engine import EngineError

logger = logging.getLogger(__name__)

Replace = Callable[[str], Awaitable[Any]]
"""Makes a new replica under a dead one's name; returns its handle, ready or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one replica said after it was told to load."""

    version: str = ""
    fingerprint: tuple[float, ...] = ()
    error: str = ""
    """Not empty: it refused, failed or did not answer in time."""
    dead: bool = False
    """There is no process any more, or an engine that cannot be used again."""


class Finding(StrEnum):
    """What to do with a replica next."""

    SERVES = "serves"
    RETRY = "retry"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """How a synchronisation went."""

    version: str
    attempts: int
    """Times the slowest replica was told to load."""
    replaced: Mapping[str, Any]
    """New handles by name, for the pool."""
    seconds: float


def judge(
    answers: Mapping[str, Answer], version: str, *, tolerance: float
) -> dict[str, tuple[Finding, str]]:
    """What to do with each replica, and why.

    Args:
        tolerance: largest difference of a fingerprint's number from the median over replicas.
    """
    findings: dict[str, tuple[Finding, str]] = {}
    for name, answer in answers.items():
        if answer.dead:
            findings[name] = (Finding.REPLACE, answer.error)
        elif answer.error:
            findings[name] = (Finding.RETRY, answer.error)
        elif answer.version != version:
            findings[name] = (Finding.RETRY, f"serves {answer.version!r} instead of {version!r}")
    candidates = {name: answers[name].fingerprint for name in answers if name not in findings}
    lengths = {len(fingerprint) for fingerprint in candidates.values()}
    if len(lengths) > 1:
        reason = (Finding.RETRY, "fingerprints of different lengths")
        return findings | dict.fromkeys(candidates, reason)
    middle = [median(numbers) for numbers in zip(*candidates.values(), strict=True)]
    for name, fingerprint in candidates.items():
        apart = max((abs(a - b) for a, b in zip(fingerprint, middle, strict=True)), default=0.0)
        findings[name] = (
            (Finding.SERVES, "")
            if apart <= tolerance
            else (Finding.RETRY, f"its output differs by {apart:.3g} from the other replicas'")
        )
    return findings


async def sync_weights(
    replicas: Mapping[str, Any],
    path: str,
    version: str,
    *,
    replace: Replace | None = None,
    max_attempts: int = 3,
    timeout_s: float = 900.0,
    tolerance: float = 0.05,
) -> SyncReport:
    """Have every replica serve a checkpoint.

    Args:
        replicas: Ray handles of `PolicyReplica` or `PreferenceReplica` actors by name.
        replace: how to make a new replica for one that died; None: a death is an error.
        timeout_s: for one attempt of one replica, waiting for its requests included.
        tolerance: see `judge`; the default lets half precision pass.
    Raises:
        ModelCheckError: the checkpoint cannot be served by these replicas; none was changed.
        EngineError: a replica does not serve it after `max_attempts`; the message says which.
    """
    started = time.monotonic()
    handles = dict(replicas)
    replaced: dict[str, Any] = {}
    answers: dict[str, Answer] = {}
    pending = list(handles)
    findings: dict[str, tuple[Finding, str]] = {}
    for attempt in range(1, max_attempts + 1):
        found = await asyncio.gather(
            *(_load(handles[n], path, version, attempt > 1, timeout_s) for n in pending)
        )
        answers |= dict(zip(pending, found, strict=True))
        findings = judge(answers, version, tolerance=tolerance)
        pending = [name for name, (finding, _) in findings.items() if finding != Finding.SERVES]
        if not pending:
            return SyncReport(
                version=version,
                attempts=attempt,
                replaced=replaced,
                seconds=time.monotonic() - started,
            )
        for name in pending:
            finding, reason = findings[name]
            logger.warning(
                "Replica does not serve the new weights: %s replica=%s version=%s attempt=%d",
                reason,
                name,
                version,
                attempt,
            )
            if finding is Finding.REPLACE and replace is not None and attempt < max_attempts:
                handles[name] = replaced[name] = await replace(name)
        if replace is None and any(findings[name][0] is Finding.REPLACE for name in pending):
            break
    reasons = "; ".join(f"{name}: {findings[name][1]}" for name in pending)
    raise EngineError(f"{version} is not served by {len(pending)} of {len(handles)}: {reasons}")


async def _load(handle: Any, path: str, version: str, force: bool, timeout_s: float) -> Answer:
    """Tell one replica to load and ask what it serves then.

    Raises:
        ModelCheckError: it cannot serve this checkpoint, and neither can any like it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await handle.load.remote(path, version, force=force)
            stats = await handle.stats.remote()
            fingerprint = await handle.fingerprint.remote()
    except ModelCheckError:
        raise
    except TimeoutError:
        return Answer(error=f"no answer within {timeout_s:.0f} s")
    except ray.exceptions.RayActorError as error:
        return Answer(error=f"the actor died: {error}", dead=True)
    except (EngineError, ray.exceptions.RayError) as error:
        return Answer(error=str(error), dead=not await _is_healthy(handle, timeout_s))
    return Answer(version=stats.version, fingerprint=tuple(fingerprint), dead=not stats.healthy)


async def _is_healthy(handle: Any, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            return (await handle.stats.remote()).healthy
    except (TimeoutError, ray.exceptions.RayError):
        return False
