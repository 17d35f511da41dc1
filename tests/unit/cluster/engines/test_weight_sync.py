"""Giving a checkpoint to a scripted replica, and finding the one with other weights."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.engines.model_check import ModelCheckError
from cluster.engines.weight_sync import POLICY_TOLERANCE, take_weights
from cluster.engines.weight_sync import odd_ones as odd_ones_of
from rollout.engine import EngineError
from tests.fingerprints import fingerprint, load_policy, with_noisy_layer
from tests.models import write_tiny_policy


class ScriptedReplica:
    """A handle: `load` raises what the script says, or loads."""

    def __init__(self, error: Exception | None = None, *, healthy: bool = True) -> None:
        self.error, self.healthy = error, healthy
        self.version = "v0"
        self.loads: list[tuple[str, str, bool]] = []
        for method in ("load", "stats", "fingerprint"):
            setattr(self, method, SimpleNamespace(remote=getattr(self, f"_{method}")))

    async def _load(self, path: str, version: str, force: bool = False) -> float:
        self.loads.append((path, version, force))
        if self.error is not None:
            raise self.error
        self.version = version
        return 0.0

    async def _stats(self) -> Any:
        return SimpleNamespace(version=self.version, healthy=self.healthy)

    async def _fingerprint(self) -> list[float]:
        return [1.0, 2.0]


async def test_replica_that_took_the_weights_says_what_they_say() -> None:
    replica = ScriptedReplica()
    assert await take_weights(replica, "path", "v1") == (1.0, 2.0)
    assert await take_weights(replica, "path", "v1", again=True) == (1.0, 2.0)
    assert replica.loads == [("path", "v1", False), ("path", "v1", True)]


@pytest.mark.parametrize("error", [EngineError("busy"), ModelCheckError("no tokenizer")])
async def test_replica_that_refuses_says_why(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        await take_weights(ScriptedReplica(error), "path", "v1")


async def test_replica_with_a_dead_engine_or_another_version_did_not_take_them() -> None:
    with pytest.raises(EngineError, match="its engine died"):
        await take_weights(ScriptedReplica(healthy=False), "path", "v1")
    replica = ScriptedReplica()

    async def nothing(*arguments: Any, **options: Any) -> None: ...

    replica.load = SimpleNamespace(remote=nothing)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="serves 'v0' instead of 'v1'"):
        await take_weights(replica, "path", "v1")


odd_ones = partial(odd_ones_of, tolerance=POLICY_TOLERANCE)


def noisy(numbers: list[float], seed: int, sigma: float) -> tuple[float, ...]:
    rng = random.Random(seed)
    return tuple(number + rng.gauss(0, sigma) for number in numbers)


LOGPROBS = [-0.1 * n for n in range(60)]


def test_replicas_that_agree_up_to_rounding_are_not_odd() -> None:
    """Of half precision, on several kinds of cards: single numbers differ by 0.2."""
    said = {f"policy-{n}": noisy(LOGPROBS, n, 0.08) for n in range(16)}
    largest = max(abs(a - b) for a, b in zip(said["policy-0"], said["policy-1"], strict=True))
    assert largest > 0.2
    assert odd_ones(said) == {}


def test_the_one_that_differs_from_the_others_is_odd() -> None:
    said = {f"policy-{n}": noisy(LOGPROBS, n, 0.02) for n in range(4)}
    said["policy-2"] = noisy(LOGPROBS, 9, 0.3)
    assert list(odd_ones(said)) == ["policy-2"]
    assert odd_ones(said)["policy-2"].startswith("its output differs by 0.2")


def test_of_two_that_differ_both_are_odd() -> None:
    assert set(odd_ones({"a": (1.0,), "b": (1.5,)})) == {"a", "b"}


def test_one_alone_and_those_that_say_nothing_are_not_odd() -> None:
    assert odd_ones({"a": (1.0, 2.0)}) == odd_ones({"a": (), "b": ()}) == odd_ones({}) == {}


def test_replicas_that_say_things_of_different_length_are_odd() -> None:
    assert set(odd_ones({"a": (1.0,), "b": (1.0, 2.0)})) == {"a", "b"}


def test_rounding_of_half_precision_is_accepted_and_one_wrong_layer_found(tmp_path: Path) -> None:
    path = write_tiny_policy(tmp_path / "policy", layers=4)
    said = {
        "exact": fingerprint(load_policy(path), path),
        "half": fingerprint(load_policy(path, dtype="bfloat16"), path),
        "other kernel": fingerprint(load_policy(path, dtype="bfloat16", attention="eager"), path),
    }
    assert len(set(said.values())) == 3
    assert odd_ones(said) == {}
    said["wrong"] = fingerprint(with_noisy_layer(load_policy(path), 0.3), path)
    assert list(odd_ones(said)) == ["wrong"]
