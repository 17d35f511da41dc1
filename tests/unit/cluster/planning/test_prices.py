"""What a launch file costs: worked by hand, and wrong tables told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.folder.config_file import ConfigError, load_config
from cluster.machines.prices import PriceTable, read_prices
from cluster.planning.launch_file import read_launch
from cluster.planning.prices import costs, price_range
from cluster.runs.config import RunConfig


def test_prices_range_from_the_least_to_the_most_nodes(tmp_path: Path) -> None:
    table = PriceTable.model_validate(
        {
            "as_of": "2025-01-01",
            "instances": {
                "aws": {
                    "small": {"on_demand": 1.0, "cpus": 2},
                    "large": {"on_demand": 10.0, "spot": 4.0, "cpus": 8},
                }
            },
        }
    )
    spot = {"InstanceType": "large", "InstanceMarketOptions": {"MarketType": "spot"}}
    data: dict[str, Any] = {
        "provider": {"type": "aws"},
        "head_node_type": "head",
        "max_workers": 4,
        "available_node_types": {
            "head": {"node_config": {"InstanceType": "small"}, "max_workers": 0},
            "cheap": {"node_config": spot, "min_workers": 1, "max_workers": 3},
            "dear": {"node_config": {"InstanceType": "large"}, "max_workers": 2},
        },
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    rows = costs(read_launch(file), table)
    assert [row.price for row in rows] == [1.0, 4.0, 10.0]
    # 1 + 1 spot; 1 + 2 dear + 2 of the 3 spot ones; 1 + 4 on demand
    assert price_range(rows, max_workers=4) == (5.0, 29.0, 41.0)


def test_wrong_row_of_the_price_table_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("as_of: 2025-01-01\ninstances: {aws: {x: {on_demand: 0, cpus: 1}}}\n")
    with pytest.raises(ConfigError, match=r"prices.yaml: instances\.aws\.x\.on_demand: .*greater"):
        read_prices(file)


def test_the_preset_prices_the_machines_of_the_launch_file() -> None:
    root = Path(__file__).parents[4]
    config = load_config("cluster", kind=RunConfig)
    table = read_prices(root / "deploy/prices.yaml").by_kind
    types = read_launch(root / "ray_cluster.yaml").types
    assert config.cost.prices.keys() == {node.fields["labels"]["machine"] for node in types}
    for kind, price in config.cost.prices.items():
        assert (price.on_demand, price.spot) == (table[kind].on_demand, table[kind].spot)
    assert config.cost.expected is not None
    markets = {node.instance: node.fields["labels"]["market"] for node in types}
    for machine in config.cost.expected.machines.values():
        assert machine.market == markets[machine.kind]
