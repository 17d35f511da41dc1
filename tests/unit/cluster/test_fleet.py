from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from cluster.actors import actor_bundle, actor_options
from cluster.config import ActorConfig, RolloutConfig
from cluster.fleet import (
    Fleet,
    RolloutStage,
    StageSearch,
    _learner_resources,
    _tree_stages,
)
from cluster.jobs import SearchTask
from cluster.run_folder import RunFolder
from rollout.engine import EngineError
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from rollout.tree import Tree
from tests.fakes import ScriptedPolicy, ScriptedSandbox


def test_dashboard_port_in_use_is_named_before_ray_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = RolloutConfig.model_validate(
            {
                "problems": "p.jsonl",
                "policy": "x",
                "run_dir": tmp_path,
                "cluster": {"dashboard_port": port},
            }
        )
        fleet = Fleet(config, RunFolder(tmp_path))
        with pytest.raises(EngineError, match=f"port {port} of cluster.dashboard_port is in use"):
            asyncio.run(fleet.start(tmp_path))


def test_each_stage_of_a_round_has_its_own_search() -> None:
    policy = ScriptedPolicy({"": ["<answer>\\boxed{3}<end_of_answer>"]})
    search = StageSearch(
        searches={
            "base": SearchConfig(num_candidates=2, num_rollouts=1),
            "escalation-1": SearchConfig(num_candidates=5, num_rollouts=1),
        },
        policy=policy,
        preference=None,
        sandbox=ScriptedSandbox(),
    )
    problem = Problem(id="p", source="s", level=Level.GSM, text="q", answer="3")
    task = SearchTask(round=4, stage="escalation-1", index=1, seed=9)
    given = Tree(problem=problem, round=4, index=1, seed=9)
    tree = asyncio.run(search(problem, task, given))
    assert tree is given
    assert [r.num_candidates for r in policy.requests] == [5]
    assert (tree.round, tree.index, tree.seed, tree.solved) == (4, 1, 9, True)


def test_tree_of_other_search_settings_is_not_gone_on_with() -> None:
    search = StageSearch(
        searches={"base": SearchConfig(num_candidates=2)},
        policy=ScriptedPolicy({}),
        preference=None,
        sandbox=ScriptedSandbox(),
    )
    problem = Problem(id="p", source="s", level=Level.GSM, text="q", answer="3")
    tree = Tree(problem=problem, round=1, search_config=SearchConfig().model_dump_json())
    task = SearchTask(round=1, stage="base", index=0, seed=0)
    with pytest.raises(ValueError, match="other settings"):
        asyncio.run(search(problem, task, tree))


def test_several_trees_per_problem_are_stages_of_their_own() -> None:
    search = SearchConfig()
    assert _tree_stages(RolloutStage(name="base", search=search)) == ["base"]
    twice = RolloutStage(name="base", search=search, trees=2)
    assert _tree_stages(twice) == ["base-tree0", "base-tree1"]


def test_actors_ask_ray_for_what_their_config_says() -> None:
    gpu = ActorConfig(num_gpus=0.5, resources={"policy": 1})
    assert actor_options(gpu) == {"num_cpus": 0, "num_gpus": 0.5, "resources": {"policy": 1}}
    assert actor_bundle(gpu) == {"GPU": 0.5, "policy": 1}
    assert _learner_resources(ActorConfig(replicas=2)) == {"CPU": 1.0}
    assert _learner_resources(ActorConfig(num_gpus=1, num_cpus=4)) == {"CPU": 4, "GPU": 1}
