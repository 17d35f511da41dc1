"""Give a replica a checkpoint, and find those whose weights are not what they say.

    take_weights: load (it drains, swaps, checks itself) --> version? healthy? --> its fingerprint
    odd_ones:     the fingerprints of all who took a version --> who says something else

Replicas of one version say the same of fixed texts, up to rounding: one that does not has the wrong
weights, whatever version it names. Rounding is not small: half precision rounds a logit of 20 to
steps of 0.125, and another kind of card, or another kernel, adds up in another order. A single
number may therefore differ by 0.1 and more, its mean over many tokens hardly does; so a replica is
judged by the mean distance of its numbers from the median of all replicas.

With two replicas nobody knows which is wrong: both are odd.

Not covered: wrong weights on most of the replicas, and weights so near the right ones that what
they say differs by less than rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from rollout.engine import EngineError

Fingerprint = tuple[float, ...]

POLICY_TOLERANCE = 0.1
"""Largest mean distance of log-probabilities."""

PREFERENCE_TOLERANCE = 0.05
"""Largest mean distance of values in (-1, 1)."""


async def take_weights(handle: Any, path: str, version: str, *, again: bool = False) -> Fingerprint:
    """Have a replica serve a checkpoint; returns what it then says of fixed texts.

    Args:
        handle: of a `PolicyReplica` or `PreferenceReplica` actor.
        again: load even what it says it serves already.
    Raises:
        ModelCheckError: a replica like this cannot serve the checkpoint; it was not changed.
        EngineError: it does not serve it; says why.
        RayError: it is dead.
    """
    await handle.load.remote(path, version, force=again)
    stats = await handle.stats.remote()
    if not stats.healthy:
        raise EngineError("its engine died")
    if stats.version != version:
        raise EngineError(f"serves {stats.version!r} instead of {version!r}")
    return tuple(await handle.fingerprint.remote())


def odd_ones(fingerprints: Mapping[str, Fingerprint], *, tolerance: float) -> dict[str, str]:
    """Why, of each that does not say what the others do.

    Args:
        fingerprints: by replica, all of one version.
        tolerance: largest mean distance of its numbers from the median over replicas.
    """
    if len({len(fingerprint) for fingerprint in fingerprints.values()}) > 1:
        return dict.fromkeys(fingerprints, "fingerprints of different lengths")
    middle = [median(numbers) for numbers in zip(*fingerprints.values(), strict=True)]
    if not middle:
        return {}
    apart = {
        name: fmean(abs(a - b) for a, b in zip(fingerprint, middle, strict=True))
        for name, fingerprint in fingerprints.items()
    }
    return {
        name: f"its output differs by {distance:.3g} from the other replicas'"
        for name, distance in apart.items()
        if distance > tolerance
    }
