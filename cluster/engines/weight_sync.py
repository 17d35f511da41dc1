"""Give a checkpoint to every replica of a pool, and see that all of them serve it.

    load on all (each drains, swaps, checks itself) --> ask all: version? fingerprint?
        ^                                                        |
        |                                                     judge (pure)
        +--- RETRY: load again <---------------------------------+--> all SERVE: done
                                                                 +--> one is DEAD: an error

Replicas of one version say the same of fixed texts, up to rounding: one that does not has the
wrong weights, whatever version it names, and is told to load again. With two replicas nobody knows
which is wrong, so both load again.

Not covered: keeping part of a pool on old weights. Either all serve the new version at the end, or
`EngineError` names those that do not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

import ray.exceptions

from cluster.engines.model_check import ModelCheckError
from rollout.engine import EngineError

logger = logging.getLogger(__name__)


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
    """What is known of a replica."""

    SERVES = "serves"
    RETRY = "retry"
    """It may serve after another load."""
    DEAD = "dead"


def judge(
    answers: Mapping[str, Answer], version: str, *, tolerance: float
) -> dict[str, tuple[Finding, str]]:
    """What is known of each replica, and why.

    Args:
        tolerance: largest difference of a fingerprint's number from the median over replicas.
    """
    findings: dict[str, tuple[Finding, str]] = {}
    for name, answer in answers.items():
        if answer.dead:
            findings[name] = (Finding.DEAD, answer.error)
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
    max_attempts: int = 3,
    timeout_s: float = 900.0,
    tolerance: float = 0.05,
) -> int:
    """Have every replica serve a checkpoint; returns how often the slowest was told to load.

    Args:
        replicas: Ray handles of `PolicyReplica` or `PreferenceReplica` actors by name.
        timeout_s: for one attempt of one replica, waiting for its requests included.
        tolerance: see `judge`; the default lets half precision pass.
    Raises:
        ModelCheckError: the checkpoint cannot be served by these replicas; none was changed.
        EngineError: a replica died, or does not serve it after `max_attempts`; says which.
    """
    answers: dict[str, Answer] = {}
    pending = list(replicas)
    findings: dict[str, tuple[Finding, str]] = {}
    for attempt in range(1, max_attempts + 1):
        found = await asyncio.gather(
            *(_load(replicas[n], path, version, attempt > 1, timeout_s) for n in pending)
        )
        answers |= dict(zip(pending, found, strict=True))
        findings = judge(answers, version, tolerance=tolerance)
        pending = [name for name, (finding, _) in findings.items() if finding != Finding.SERVES]
        if not pending:
            return attempt
        for name in pending:
            logger.warning(
                "Replica does not serve the new weights: %s replica=%s version=%s attempt=%d",
                findings[name][1],
                name,
                version,
                attempt,
            )
        if any(findings[name][0] is Finding.DEAD for name in pending):
            break
    reasons = "; ".join(f"{name}: {findings[name][1]}" for name in pending)
    raise EngineError(f"{version} is not served by {len(pending)} of {len(replicas)}: {reasons}")


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
