"""Giving a checkpoint to all replicas, with replicas that follow a script."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.engines.model_check import ModelCheckError
from cluster.engines.weight_sync import Answer, Finding, judge, sync_weights
from rollout.engine import EngineError


def findings(answers: dict[str, Answer]) -> dict[str, Finding]:
    return {name: f for name, (f, _) in judge(answers, "v1", tolerance=0.01).items()}


def serves(*fingerprint: float, version: str = "v1") -> Answer:
    return Answer(version=version, fingerprint=fingerprint)


def test_replicas_that_agree_serve() -> None:
    answers = {"a": serves(1.0, 2.0), "b": serves(1.001, 2.0)}
    assert findings(answers) == {"a": Finding.SERVES, "b": Finding.SERVES}


def test_the_one_that_differs_from_two_others_loads_again() -> None:
    answers = {"a": serves(1.0), "b": serves(1.5), "c": serves(1.0)}
    assert findings(answers) == {
        "a": Finding.SERVES,
        "b": Finding.RETRY,
        "c": Finding.SERVES,
    }


def test_of_two_that_differ_both_load_again() -> None:
    assert set(findings({"a": serves(1.0), "b": serves(1.5)}).values()) == {Finding.RETRY}


def test_an_old_version_is_loaded_again_and_does_not_count_as_witness() -> None:
    answers = {"a": serves(9.0, version="v0"), "b": serves(1.0)}
    assert findings(answers) == {"a": Finding.RETRY, "b": Finding.SERVES}


def test_the_dead_are_given_up_and_the_failed_told_again() -> None:
    answers = {"a": Answer(error="gone", dead=True), "b": Answer(error="busy"), "c": serves(1.0)}
    assert findings(answers) == {
        "a": Finding.DEAD,
        "b": Finding.RETRY,
        "c": Finding.SERVES,
    }


class ScriptedReplica:
    """A handle: each call of `load` takes the next entry of the script.

    An entry is the fingerprint the replica has afterwards, or an exception.
    """

    def __init__(self, *script: float | Exception, healthy: bool = True) -> None:
        self.script = list(script)
        self.healthy = healthy
        self.version = "v0"
        self.number = 0.0
        self.loads: list[tuple[str, str, bool]] = []
        for method in ("load", "stats", "fingerprint"):
            setattr(self, method, SimpleNamespace(remote=getattr(self, f"_{method}")))

    async def _load(self, path: str, version: str, force: bool = False) -> float:
        self.loads.append((path, version, force))
        entry = self.script.pop(0)
        if isinstance(entry, Exception):
            raise entry
        self.number, self.version = entry, version
        return 0.0

    async def _stats(self) -> Any:
        return SimpleNamespace(version=self.version, healthy=self.healthy)

    async def _fingerprint(self) -> tuple[float, ...]:
        return (self.number,)


async def test_all_replicas_load_once_when_all_goes_well() -> None:
    replicas = {"a": ScriptedReplica(1.0), "b": ScriptedReplica(1.0)}
    assert await sync_weights(replicas, "path", "v1") == 1
    assert [replica.loads for replica in replicas.values()] == [[("path", "v1", False)]] * 2


async def test_replica_that_was_busy_is_told_again_and_the_other_left_alone() -> None:
    replicas = {"a": ScriptedReplica(EngineError("busy"), 1.0), "b": ScriptedReplica(1.0)}
    assert await sync_weights(replicas, "path", "v1") == 2
    assert replicas["a"].loads == [("path", "v1", False), ("path", "v1", True)]
    assert len(replicas["b"].loads) == 1


async def test_replica_with_other_output_is_made_to_load_again() -> None:
    replicas = {
        "a": ScriptedReplica(1.0),
        "b": ScriptedReplica(7.0, 1.0),
        "c": ScriptedReplica(1.0),
    }
    assert await sync_weights(replicas, "path", "v1") == 2


async def test_replica_that_never_serves_is_named() -> None:
    replicas = {"a": ScriptedReplica(*[EngineError("busy")] * 3), "b": ScriptedReplica(1.0)}
    with pytest.raises(EngineError, match="v1 is not served by 1 of 2: a: busy"):
        await sync_weights(replicas, "path", "v1")


async def test_broken_replica_is_an_error_at_once() -> None:
    replica = ScriptedReplica(EngineError("lost"), healthy=False)
    with pytest.raises(EngineError, match="a: lost"):
        await sync_weights({"a": replica}, "path", "v1")
    assert len(replica.loads) == 1


async def test_checkpoint_that_cannot_be_served_is_not_tried_twice() -> None:
    replica = ScriptedReplica(ModelCheckError("no tokenizer"))
    with pytest.raises(ModelCheckError, match="no tokenizer"):
        await sync_weights({"a": replica}, "path", "v1")
    assert len(replica.loads) == 1


async def test_replica_that_does_not_answer_is_given_up_after_its_time() -> None:
    replica = ScriptedReplica()

    async def hang(*arguments: Any, **options: Any) -> None:
        await asyncio.Event().wait()

    replica.load = SimpleNamespace(remote=hang)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="no answer within 0 s"):
        await sync_weights({"a": replica}, "path", "v1", timeout_s=0.01, max_attempts=2)
