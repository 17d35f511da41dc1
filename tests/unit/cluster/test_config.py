from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.config import ConfigError, RolloutConfig, RunConfig, load_config

CONFIGS = Path(__file__).parents[3] / "deploy" / "configs"
MINIMAL = {
    "name": "t",
    "run_dir": "runs/t",
    "problems": {"miniature": {}},
    "rounds": [{"preference": False}],
}


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["demo.yaml", "smoke.yaml"])
def test_shipped_run_configs_are_valid_and_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(CONFIGS / name, kind=RunConfig)
    again = write(tmp_path / "effective.yaml", config.effective())
    assert load_config(again, kind=RunConfig) == config


def test_shipped_rollout_config_needs_only_problems_and_policy() -> None:
    given = {"problems": "p.parquet", "policy": "dir", "run_dir": "runs/x"}
    config = load_config(CONFIGS / "rollout.yaml", kind=RolloutConfig, given=given)
    assert config.ppm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serch.top_p=1", "unknown key 'serch'; did you mean 'search'?"),
        ("search.topp=1", "unknown key 'search.topp'; did you mean 'top_p'?"),
        ("rounds.0.preferense=1", "unknown key 'rounds.0.preferense'; did you mean 'preference'?"),
        ("search.top_p=2", "'search.top_p': Input should be less than or equal to 1 (got 2)"),
        ("rounds=[]", "'rounds': List should have at least 1 item"),
        ("rounds.3.trees=2", "rounds is a list of 1, '3' is no index"),
        ("rounds.0.preference=true", "must be false: no PPM exists before round 1"),
        ("problems.miniature=null", "give either problems.train files or problems.miniature"),
        ("nothing", "expected KEY=VALUE"),
        ("a=[", "the value is not YAML"),
    ],
)
def test_wrong_override_is_named_with_what_would_be_right(
    tmp_path: Path, override: str, message: str
) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override], kind=RunConfig)
    assert message in str(caught.value)


def test_all_errors_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", {**MINIMAL, "sed": 1, "seed": -1})
    with pytest.raises(ConfigError) as caught:
        load_config(path, kind=RunConfig)
    assert len(str(caught.value).splitlines()) == 2


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    for name, message in (
        ("none.yaml", "no such config file"),
        ("list.yaml", "expected a YAML mapping, got list"),
        ("bad.yaml", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(tmp_path / name, kind=RunConfig)
        assert name in str(caught.value)


def test_override_reaches_into_lists_and_new_mappings(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    overrides = ["rounds.0.num_rollouts=3", "cluster.policy.replicas=2", "search.top_p=0.9"]
    config = load_config(path, overrides, kind=RunConfig)
    assert config.rounds[0].search(config.search).num_rollouts == 3
    assert config.cluster.policy.replicas == 2
    assert config.rounds[0].search(config.search).top_p == 0.9
