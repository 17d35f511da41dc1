from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.folder.config_file import ConfigError, load_config, presets
from cluster.runs.config import RolloutConfig, RunConfig

CONFIGS = Path(__file__).parents[4] / "deploy" / "configs"
MINIMAL = {
    "name": "t",
    "run_dir": "runs/t",
    "problems": {"miniature": {}},
    "rounds": [{"preference": False}],
}


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", presets(RunConfig))
def test_shipped_run_configs_are_valid_and_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name, kind=RunConfig)
    assert config.name == name
    again = write(tmp_path / "effective.yaml", config.effective())
    assert load_config(again, kind=RunConfig) == config


def test_an_optimiser_in_host_memory_has_threads_in_every_preset() -> None:
    for name in presets(RunConfig):
        config = load_config(name, kind=RunConfig)
        for fit in (config.train_policy, config.train_ppm):
            assert not fit.offload or fit.num_threads >= 8, name


def test_shipped_rollout_config_needs_only_problems_and_policy() -> None:
    given = {"problems": "p.parquet", "policy": "dir", "run_dir": "runs/x"}
    config = load_config(CONFIGS / "rollout.yaml", kind=RolloutConfig, given=given)
    assert config.ppm is None


def test_presets_of_each_command_are_known() -> None:
    names = ["cluster", "demo", "eight_gpus", "one_gpu", "paper", "pretrained", "smoke"]
    assert list(presets(RunConfig)) == names
    assert list(presets(RolloutConfig)) == ["rollout"]


def test_file_goes_before_the_preset_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("demo", kind=RunConfig).name == "demo"
    assert load_config("demo.yaml", kind=RunConfig).name == "demo"
    write(tmp_path / "demo.yaml", MINIMAL)
    assert load_config("demo.yaml", kind=RunConfig).name == "t"
    (tmp_path / "cluster").mkdir()  # a folder is no config
    assert load_config("cluster", kind=RunConfig).name == "cluster"


def test_unknown_preset_is_told_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("dmeo", kind=RunConfig)
    assert str(caught.value) == (
        "dmeo: no such config file; did you mean 'demo'? "
        "presets: cluster, demo, eight_gpus, one_gpu, paper, pretrained, smoke"
    )
    with pytest.raises(ConfigError, match=r"some/where\.yaml: no such config file$"):
        load_config("some/where.yaml", kind=RunConfig)


@pytest.mark.parametrize(("name", "gpus"), [("demo", 0), ("one_gpu", 1), ("eight_gpus", 8)])
def test_actors_of_a_one_machine_preset_fit_its_gpus(name: str, gpus: int) -> None:
    config = load_config(name, kind=RunConfig)
    cluster = config.cluster
    actors = [cluster.policy, cluster.ppm, cluster.sandbox, cluster.workers]
    learner = cluster.learner.num_gpus * cluster.learner.replicas
    if cluster.hand_over:  # it has the engines' GPUs when they are gone
        assert learner == gpus
    else:
        actors.append(cluster.learner)
    asked = [actor.num_gpus for actor in actors for _ in range(actor.replicas)]
    assert sum(asked) == pytest.approx(gpus)
    if any(0 < share < 1 for share in asked):
        # Engines that share a GPU leave the learner at least what Ray books for it.
        engines = (config.policy_engine, config.ppm_engine)
        taken = sum(engine.gpu_memory_utilization for engine in engines)
        assert taken <= (0.9 if cluster.hand_over else 1 - cluster.learner.num_gpus)


def test_paper_preset_has_the_budgets_of_the_paper() -> None:
    config = load_config("paper", kind=RunConfig)
    searches = [settings.search(config.search) for settings in config.rounds]
    assert [s.num_candidates for s in searches] == [5, 8, 8, 16]
    assert [s.num_rollouts for s in searches] == [8, 16, 16, 16]
    assert [r.preference for r in config.rounds] == [False, False, True, True]
    further = [[stage.num_rollouts for stage in r.escalation] for r in config.rounds]
    assert further == [[], [16], [16], [64, 128]]
    assert searches[0].template == "bootstrap"
    assert config.endpoint is not None
    policy, ppm = config.train_policy, config.train_ppm
    assert (policy.num_epochs, policy.batch_examples, policy.learning_rate) == (2, 128, 7e-6)
    assert (ppm.num_epochs, ppm.batch_examples, ppm.learning_rate) == (1, 512, 7e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serch.top_p=1", "unknown key 'serch'; did you mean 'search'?"),
        ("search.topp=1", "unknown key 'search.topp'; did you mean 'top_p'?"),
        ("rounds.0.preferense=1", "unknown key 'rounds.0.preferense'; did you mean 'preference'?"),
        ("sandbox.limits.wall=1", "unknown key 'sandbox.limits.wall'; did you mean 'wall_s'?"),
        ("search.top_p=2", "'search.top_p': Input should be less than or equal to 1 (got 2)"),
        ("rounds=[]", "'rounds': List should have at least 1 item"),
        ("rounds.3.trees=2", "rounds is a list of 1, '3' is no index"),
        ("rounds.0.preference=true", "must be false: no PPM exists before round 1"),
        ("search.terminal_value=preference", "search.terminal_value must be label"),
        ("rounds.0.temperature=0", "temperature: 0 makes all num_candidates"),
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
