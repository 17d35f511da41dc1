from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.fleet.config import ServingConfig
from cluster.folder.changes import Changes, live_key, live_values, with_values
from cluster.folder.run_folder import RunFolder


def config(**sections: Any) -> ServingConfig:
    return ServingConfig.model_validate({"run_dir": "runs/a", **sections})


def sized(replicas: int) -> ServingConfig:
    return config(cluster={"policy": {"replicas": replicas}})


def test_live_keys_are_found_at_and_below_their_place() -> None:
    assert live_key("cluster.policy.replicas") == "cluster.policy.replicas"
    assert live_key("cluster.priorities.olympiad") == "cluster.priorities"
    assert live_key("cost.prices.a.spot") == "cost.prices"
    assert live_key("cluster.autoscale.ppm.max_replicas") == "cluster.autoscale.ppm.max_replicas"
    assert live_key("cluster.learner.replicas") is None
    assert live_key("cost") is None


def test_values_of_a_config_are_read_and_replaced_by_key() -> None:
    own = live_values(sized(4))
    assert own["cluster.policy.replicas"] == 4
    assert own["log_level"] == "info"
    assert "cluster.autoscale.policy.min_replicas" not in own
    other = with_values(
        sized(4), {"cluster.policy.replicas": 6, "cost.prices": {"g6e.4xl": {"on_demand": 3.0}}}
    )
    assert other.cluster.policy.replicas == 6
    assert other.cost.prices["g6e.4xl"].on_demand == 3.0
    assert other.run_dir == Path("runs/a")


def test_what_was_set_stays_over_starts_until_the_config_is_edited(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = Changes(folder)
    first.record_start(sized(4))
    first.record({"cluster.policy.replicas": 8}, {"cluster.policy.replicas": 4})
    again = Changes(folder)
    assert again.effective(sized(4)).cluster.policy.replicas == 8
    again.record_start(sized(4))
    assert again.last == 2  # nothing was edited
    edited = Changes(folder)
    assert edited.effective(sized(5)).cluster.policy.replicas == 5
    edited.record_start(sized(5))
    assert edited.known[-1].by == "start"
    assert edited.known[-1].values == {"cluster.policy.replicas": 5}
    assert edited.known[-1].before == {"cluster.policy.replicas": 4}
    assert Changes(folder).effective(sized(5)).cluster.policy.replicas == 5
    Changes(folder).record({"cluster.policy.replicas": 9}, {})
    assert Changes(folder).effective(sized(5)).cluster.policy.replicas == 9


def test_two_at_once_get_two_numbers_and_the_driver_sees_both(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    driver = Changes(folder)
    one, other = Changes(folder), Changes(folder)
    assert one.record({"log_level": "debug"}, {"log_level": "info"}).number == 1
    # It has not looked since.
    change = other.record({"log_level": "error"}, {"log_level": "info"})
    assert change.number == 2
    assert "@" in change.who
    assert change.time.endswith("Z")
    assert [c.values["log_level"] for c in driver.newer()] == ["debug", "error"]
    assert driver.newer() == []
    assert driver.effective(config()).log_level == "error"


def test_what_was_set_of_a_pool_that_scales_no_more_is_left_out(tmp_path: Path) -> None:
    changes = Changes(RunFolder(tmp_path))
    changes.record({"cluster.autoscale.policy.max_replicas": 9}, {})
    scaled = config(cluster={"autoscale": {"policy": {"max_replicas": 3}}})
    assert changes.effective(scaled).cluster.autoscale["policy"].max_replicas == 9
    assert changes.effective(config()).cluster.autoscale == {}
