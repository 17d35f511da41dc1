"""What is asked of Ray about nodes, and what becomes of it for people."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
import ray
from ray.autoscaler.v2 import sdk

from cluster.engines.config import EngineConfig
from cluster.fleet.actors import PolicyKind
from cluster.fleet.config import MembersConfig
from cluster.machines import nodes
from cluster.machines.placement import NodeResources

HEAD = NodeResources(name="head", total={"CPU": 2}, free={"CPU": 2})


def test_nodes_that_start_are_counted_by_type(monkeypatch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(
        pending_nodes=[SimpleNamespace(ray_node_type_name="gpu")],
        pending_launches=[
            SimpleNamespace(ray_node_type_name="gpu", count=2),
            SimpleNamespace(ray_node_type_name="cpu", count=1),
        ],
    )
    context = SimpleNamespace(gcs_address="1.2.3.4:6379")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(sdk, "get_cluster_status", lambda address: status)
    assert nodes.starting() == {"gpu": 3, "cpu": 1}


def test_actor_without_a_place_says_which_nodes_are_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "living", lambda: {"id": HEAD})
    monkeypatch.setattr(nodes, "starting", lambda: {"gpu": 2})
    kind = PolicyKind(MembersConfig(resources={"policy": 1}), EngineConfig())
    assert kind.why_pending() == (
        "policy replica (1 policy): no node has policy; the cluster has CPU. "
        "The autoscaler is starting 2 x gpu."
    )


def test_actor_that_fits_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "living", lambda: {"id": HEAD})
    assert PolicyKind(MembersConfig(num_cpus=2), EngineConfig()).why_pending() == ""


async def test_who_is_cancelled_waits_for_the_answer_of_an_open_question() -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def question(what: str) -> str:
        begun.set()
        assert go.wait(10)
        ended.set()
        return what

    asking = asyncio.create_task(nodes.asked(question, "who"))
    await asyncio.to_thread(begun.wait, 10)
    asking.cancel()
    await asyncio.sleep(0)
    assert not asking.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert ended.is_set()
    assert await nodes.asked(question, "who") == "who"
