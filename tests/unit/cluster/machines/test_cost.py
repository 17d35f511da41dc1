from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.machines.cost import NO_DRIVER, CostAccount, MachinePrice, NodeUse

PRICES = {"gpu": MachinePrice(on_demand=3.6, spot=1.8), "cpu": MachinePrice(on_demand=0.36)}


def gpu(market: str = "spot", **other: Any) -> NodeUse:
    return NodeUse(kind="gpu", market=market, **other)


def test_nodes_cost_while_they_are_up_at_the_price_of_their_market() -> None:
    account = CostAccount(PRICES)
    assert not account.known
    account.look(1000, {"a": gpu(), "h": NodeUse(kind="cpu", market="on-demand")}, "start")
    account.look(1010, {"a": gpu(), "b": gpu("on-demand")}, "start")  # h went, b came
    account.look(1020, {"a": gpu(idle=True), "b": gpu("on-demand")}, "round 1: rollout")
    # a: 20 s at 0.0005 $/s, of which 10 idle; b: 10 s at 0.001 $/s
    summary = account.summary()
    assert summary["usd"] == pytest.approx(0.02)
    assert summary["by_stage"] == pytest.approx({"start": 0.005, "round 1: rollout": 0.015})
    assert summary["idle_usd"] == pytest.approx(0.005)
    assert summary["usd_per_hour"] == pytest.approx(1.8 + 3.6)
    rows = {(row["kind"], row["market"]): row for row in summary["nodes"]}
    assert rows["gpu", "spot"]["hours"] == pytest.approx(20 / 3600)
    assert rows["gpu", "spot"]["idle_hours"] == pytest.approx(10 / 3600)


def test_a_market_without_a_price_of_its_own_is_on_demand() -> None:
    assert PRICES["cpu"].usd_per_hour("spot") == 0.36


def test_an_account_goes_on_and_books_what_was_up_without_a_driver() -> None:
    first = CostAccount(PRICES)
    first.look(0, {"a": gpu(), "b": gpu()}, "start")
    first.look(10, {"a": gpu(), "b": gpu()}, "start")
    second = CostAccount(PRICES)
    second.take_up(json.loads(json.dumps(first.record())))
    assert second.usd == pytest.approx(first.usd)
    second.look(610, {"a": gpu(), "c": gpu()}, "start")  # b went meanwhile, c is new
    second.look(620, {"a": gpu(), "c": gpu()}, "start")
    assert second.summary()["by_stage"] == pytest.approx({"start": 0.02, NO_DRIVER: 0.3})


def test_a_changed_price_counts_from_then_on_a_missing_one_for_all_the_time() -> None:
    account = CostAccount({})
    account.look(0, {"a": gpu()}, "start")
    account.look(3600, {"a": gpu()}, "start")  # not a gap: see below
    assert account.summary()["usd"] is None
    account.look(3610, {"a": gpu()}, "start")
    assert account.summary()["unpriced"] == ["gpu"]
    account.prices = {"gpu": MachinePrice(on_demand=1.0)}
    assert account.known
    assert account.usd == pytest.approx(3610 / 3600)
    assert account.summary()["unpriced"] == []
    account.look(3620, {"a": gpu()}, "start")
    account.prices = {"gpu": MachinePrice(on_demand=100.0)}
    account.look(3630, {"a": gpu()}, "start")
    # What had no price takes that of now; ten seconds at 1 and ten at 100 stay as they were.
    assert account.usd == pytest.approx((3610 * 100 + 10 * 1 + 10 * 100) / 3600)


def test_shared_nodes_are_paid_in_parts() -> None:
    account = CostAccount(PRICES)
    nodes = {"a": gpu(share=0.5), "b": gpu(share=0.0)}
    account.look(0, nodes, "start")
    account.look(100, nodes, "start")
    assert account.usd == pytest.approx(0.0005 * 50)


def test_one_price_for_all_machines_counts_while_a_driver_runs() -> None:
    account = CostAccount({}, usd_per_hour=36.0)
    assert account.known
    account.look(0, {"a": gpu(), "b": gpu()}, "start")
    account.look(100, {"a": gpu(), "b": gpu(), "c": gpu()}, "start")
    account.look(5000, {"a": gpu()}, "start")  # nobody can say how long all were there
    assert account.usd == pytest.approx(1.0)
    assert account.rate == 36.0
