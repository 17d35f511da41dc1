"""An actor that Ray leaves pending: a fleet says what is asked and what the cluster has."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.fleet import keeper
from rollout.engine import EngineError
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_fleet import scripted_fleet

ROOT = Path(__file__).resolve().parents[2]


async def test_resource_that_no_node_has_is_named_then_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert keeper.PLACEMENT_S < 30.0, "it must be said within 30 s"
    monkeypatch.setattr(keeper, "PLACEMENT_S", 1.0)
    fleet = scripted_fleet(
        tmp_path / "run", policy={"resources": {"policy": 1}}, start_timeout_s=15.0
    )
    notes: list[tuple[float, str]] = []
    fleet.note = lambda text: notes.append((time.monotonic(), text))
    async with stopped_at_the_end(fleet):
        began_s = time.monotonic()
        starting = asyncio.create_task(fleet.start(tmp_path / "x", version="r0", learner=False))
        await until(
            lambda: any("waits for a place: " in text for _, text in notes) or starting.done()
        )
        with pytest.raises(EngineError) as caught:
            await starting
    said = "policy replica (1 policy): no node has policy; the cluster has CPU"
    (told,) = [(when_s, text) for when_s, text in notes if "waits for a place: " in text]
    told_first = f"0 of 1 policy replicas serve; 1 waits for a place: {said}"
    assert told[1].startswith(told_first)
    assert str(caught.value).startswith(told_first)
    assert str(caught.value).endswith("(after 15 s; 1 are needed)")
    with capsys.disabled():
        print(f"\n{told[0] - began_s:.1f} s after the start, Ray's own included: {told[1]}")


async def test_second_replica_that_finds_no_room_beside_the_first_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(keeper, "PLACEMENT_S", 1.0)
    policy = {"replicas": 2, "num_cpus": 1.5, "min_ready": 1}
    fleet = scripted_fleet(tmp_path / "run", policy=policy, start_timeout_s=15.0)
    async with stopped_at_the_end(fleet):
        with pytest.raises(EngineError, match=r"1 of them wait until others give back") as caught:
            await fleet.start(tmp_path / "x", version="r0", learner=False)
    assert "2 CPU on 1 node, 0.5 of them free" in str(caught.value)
