"""The simulated parts of the coordinator's benchmark."""

from __future__ import annotations

import pytest

from bench import coordinator
from cluster.planning.latency import DEFAULT_CURVE


def test_each_scenario_is_a_simulation_and_has_its_figures_under_its_own_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: dict[str, float] = {}
    for name, settings in coordinator.SCENARIOS.items():
        small = settings | {"num_replicas": 2, "num_problems": 40}
        monkeypatch.setitem(coordinator.SCENARIOS, name, small)
        figures |= coordinator.scenario_figures(name, DEFAULT_CURVE)
        assert figures[f"lost_{name}"] == figures[f"doubled_{name}"] == 0
    scenarios = tuple(f"_{name}" for name in coordinator.SCENARIOS)
    assert {key for key in coordinator.GOALS if key.endswith(scenarios)} <= figures.keys()
    assert figures["wait_s_short"] < 3600 < figures["wait_s_short_old"]
    assert figures["learner_dollars_learner"] < figures["learner_dollars_learner_old"]
