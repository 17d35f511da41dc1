"""A replica's life around a scripted engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.config import EngineConfig
from cluster.engines.model_check import ModelCheckError, ModelInfo, weights_digest
from cluster.engines.replica import PreferenceReplica
from cluster.folder.staging import Staged
from rollout.engine import EngineError, EvaluationRequest
from tests.models import make_model_info


class ScriptedEngine:
    """Remembers what it is told; `reload_weights` makes the named path's number its output."""

    def __init__(self, outputs: dict[str, float]) -> None:
        self.outputs = outputs
        self.output = 0.0
        self.errored = False
        self.told: list[str] = []

    async def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:
            self.told.append(method)
            return
        self.told.append(f"{method} {kwargs['weights_path']}")
        if kwargs["weights_path"] not in self.outputs:
            raise RuntimeError("no such weights")
        self.output = self.outputs[kwargs["weights_path"]]

    async def reset_prefix_cache(self) -> None:
        self.told.append("reset_prefix_cache")

    def shutdown(self) -> None:
        self.told.append("shutdown")


class ScriptedTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class ScriptedReplica(PreferenceReplica):
    """A preference replica whose engine answers with one number."""

    def __init__(
        self,
        engine: ScriptedEngine,
        config: EngineConfig | None = None,
        stage: Callable[[str], Staged] | None = None,
    ) -> None:
        super().__init__("old", config, version="r0", name="ppm-0", stage=stage)
        self.scripted = engine
        self.answer = asyncio.Event()
        self.answer.set()
        self.shapes: dict[str, str] = {}
        self.references: dict[str, float] = {}
        self.salts: list[str] = []

    def _take_reference(self, path: str) -> tuple[float, ...]:
        return (self.references.get(path, self.scripted.outputs.get(path, 0.0)),) * 2

    def _start_engine(self) -> None:
        self._engine = self.scripted
        self._tokenizer = ScriptedTokenizer()
        self._model = self._have("old")
        self._digest = weights_digest(self._model.path)
        self._max_model_len = 100
        self._device, self._dtype = "cpu", "float32"

    def _check_model(self, path: str) -> ModelInfo:
        return make_model_info(path, shape=self.shapes.get(path, "{}"))

    async def _values(self, rows: Sequence[list[int]]) -> list[float]:
        self.salts.append(self._salt)
        await self.answer.wait()
        return [self.scripted.output] * len(rows)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight files of the checkpoints "old" and "new", which differ."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        Path(name).mkdir()
        (Path(name) / "model.safetensors").write_bytes(name.encode())


async def test_load_swaps_weights_and_replies_carry_the_new_version(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    before = await replica.evaluate(EvaluationRequest(texts=("a", "b")))
    await replica.load("new", "r1")
    after = await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert (before.values, before.preference_version) == ((0.0, 0.0), "r0")
    assert (after.values, after.preference_version) == ((0.5,), "r1")
    told = replica.scripted.told
    assert told[told.index("reload_weights new") :] == [
        "reload_weights new",
        "repack_tied_head",
        "reset_prefix_cache",
        "reset_prefix_cache",
    ]
    stats = await replica.stats()
    assert (stats.version, stats.loads, stats.requests, stats.healthy) == ("r1", 1, 2, True)
    assert (await replica.ready()).version == "r1"


async def test_weights_are_read_where_they_are_at_hand_and_the_time_is_told(weights: None) -> None:
    asked: list[str] = []

    def stage(path: str) -> Staged:
        asked.append(path)
        if path == "new":
            Path("new").rename("local")
            return Staged(path="local", seconds=1.5)
        return Staged(path=path, seconds=0.5, note="no room")

    replica = ScriptedReplica(ScriptedEngine({"local": 0.5}), stage=stage)
    await replica.ready()
    stats = await replica.stats()
    assert (stats.stage_s, stats.stage_note) == (0.5, "no room")
    await replica.load("new", "r1")
    assert "reload_weights local" in replica.scripted.told
    stats = await replica.stats()
    assert (stats.stage_s, stats.stage_note, stats.version) == (1.5, "", "r1")
    assert (await replica.ready()).path == "new"
    assert await replica.load("new", "r1") == 0.0
    assert asked == ["old", "new"]


async def test_a_replica_says_what_all_its_callers_have_asked_and_its_pace(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}))
    assert await replica.pressure() is None
    await replica.ready()
    replica.answer.clear()
    asked = [
        asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a", "b")))) for _ in range(3)
    ]
    await asyncio.sleep(0)
    said = await replica.pressure()
    assert said is not None and (said.requests, said.running, said.pace_s) == (3, 6, None)
    replica.answer.set()
    await asyncio.gather(*asked)
    said = await replica.pressure()
    assert said is not None and said.requests == 0 and said.pace_s is not None


async def test_what_other_weights_left_in_the_prefix_cache_is_never_found(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5, "old": 0.0}))
    await replica.evaluate(EvaluationRequest(texts=("a",)))
    for path, version in (("new", "r1"), ("old", "r0"), ("new", "r1")):
        await replica.load(path, version)
        await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert len(dict.fromkeys(replica.salts)) == 4


async def test_time_without_a_request_is_counted_as_idle(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}))
    await replica.ready()
    replica.answer.clear()
    asked = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a", "b"))))
    await asyncio.sleep(0)
    before = (await replica.stats()).idle_s
    await asyncio.sleep(0.02)
    assert (await replica.stats()).idle_s == before
    replica.answer.set()
    await asked
    await asyncio.sleep(0.02)
    stats = await replica.stats()
    assert stats.idle_s >= before + 0.02
    assert stats.sequence_s >= 2 * 0.02


async def test_pressure_is_unknown_before_the_engine_has_started() -> None:
    assert await ScriptedReplica(ScriptedEngine({})).pressure() is None


async def test_request_in_flight_is_answered_by_the_weights_it_started_with(
    weights: None,
) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    await replica.ready()
    replica.answer.clear()
    early = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a",))))
    await asyncio.sleep(0)
    loading = asyncio.create_task(replica.load("new", "r1"))
    while replica._gate.is_open:
        await asyncio.sleep(0.001)
    late = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a",))))
    await asyncio.sleep(0)
    assert "reload_weights new" not in replica.scripted.told
    replica.answer.set()
    assert (await early).preference_version == "r0"
    assert (await late).preference_version == "r1"
    await loading


async def test_loading_what_is_served_does_nothing_unless_forced(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"old": 0.0}))
    assert await replica.load("old", "r0") == 0.0
    assert "reload_weights old" not in replica.scripted.told
    await replica.load("old", "r0", force=True)
    assert "reload_weights old" in replica.scripted.told


async def test_checkpoint_of_another_shape_is_refused_and_old_weights_serve_on(
    weights: None,
) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    replica.shapes = {"old": '{"hidden_size": 64}', "new": '{"hidden_size": 128}'}
    with pytest.raises(ModelCheckError, match="hidden_size: 64 served, 128 asked for"):
        await replica.load("new", "r1")
    reply = await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert reply.preference_version == "r0"


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({}, "no such weights"),
        ({"new": 0.0}, "did not change"),
        ({"new": math.nan}, "not finite"),
    ],
)
async def test_failed_load_makes_the_replica_refuse_requests(
    weights: None, outputs: dict[str, float], reason: str
) -> None:
    replica = ScriptedReplica(ScriptedEngine(outputs))
    with pytest.raises(EngineError, match=reason):
        await replica.load("new", "r1")
    with pytest.raises(EngineError, match=reason):
        await replica.evaluate(EvaluationRequest(texts=("a",)))
    assert (await replica.stats()).healthy is False


async def test_engine_that_does_not_say_what_the_files_say_is_not_served(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}))
    replica.references = {"new": 0.7}
    with pytest.raises(EngineError, match="from transformers"):
        await replica.load("new", "r1")
    with pytest.raises(EngineError, match="from transformers"):
        await replica.evaluate(EvaluationRequest(texts=("a",)))


async def test_load_gives_up_when_requests_do_not_end_and_old_weights_serve_on(
    weights: None,
) -> None:
    replica = ScriptedReplica(ScriptedEngine({"new": 0.5}), EngineConfig(load_timeout_s=0.02))
    await replica.ready()
    replica.answer.clear()
    early = asyncio.create_task(replica.evaluate(EvaluationRequest(texts=("a",))))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="still in flight"):
        await replica.load("new", "r1")
    replica.answer.set()
    assert (await early).preference_version == "r0"


async def test_request_over_its_deadline_is_an_engine_error(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}), EngineConfig(request_timeout_s=0.02))
    await replica.ready()
    replica.answer.clear()
    with pytest.raises(EngineError, match=r"no answer within 0\.02 s"):
        await replica.evaluate(EvaluationRequest(texts=("a",)))
    stats = await replica.stats()
    assert (stats.failed, stats.running_requests, stats.running_sequences) == (1, 0, 0)


async def test_replica_that_was_shut_down_refuses_requests(weights: None) -> None:
    replica = ScriptedReplica(ScriptedEngine({}))
    await replica.ready()
    await replica.shutdown()
    assert replica.scripted.told[-1] == "shutdown"
    with pytest.raises(EngineError, match="shut down"):
        await replica.evaluate(EvaluationRequest(texts=("a",)))
