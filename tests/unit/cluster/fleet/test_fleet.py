from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from cluster.fleet.config import ActorConfig, ClusterConfig
from cluster.fleet.fleet import RENEW_S, Fleet, _TimeLeft, queue_config
from cluster.fleet.stages import RolloutStage, StageSearch, hardest_first
from cluster.folder.config_file import ConfigError, make_config
from cluster.folder.run_folder import RunFolder
from cluster.jobs.coordinator import Coordinator, WorkerProgress
from cluster.jobs.escalation import StageCost
from cluster.jobs.queue import SearchTask, StagePlan
from cluster.runs.config import RolloutConfig
from rollout.engine import EngineError
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from rollout.store import Totals
from rollout.tree import Tree
from tests.builders import make_problem
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
    assert RolloutStage(name="base", search=search).tree_stages == ["base"]
    twice = RolloutStage(name="base", search=search, trees=2)
    assert twice.tree_stages == ["base-tree0", "base-tree1"]


def test_actors_ask_ray_for_what_their_config_says() -> None:
    gpu = ActorConfig(num_gpus=0.5, resources={"policy": 1})
    assert gpu.ray_options() == {"num_cpus": 0, "num_gpus": 0.5, "resources": {"policy": 1}}
    assert gpu.bundle() == {"GPU": 0.5, "policy": 1}
    assert ActorConfig(replicas=2).learner_bundle() == {"CPU": 1.0}
    assert ActorConfig(num_gpus=1, num_cpus=4).learner_bundle() == {"CPU": 4, "GPU": 1}


def test_job_in_work_is_not_granted_again_after_a_restart_of_the_coordinator(
    tmp_path: Path,
) -> None:
    """An idle worker asks at once; the one at work renews a moment later."""
    now = [0.0]
    config = queue_config(ClusterConfig())
    first = Coordinator(str(tmp_path), config, clock=lambda: now[0])
    ids = ("a", "b")
    first.plan(
        StagePlan(round=1, stage="base", tree_index=0, problem_ids=ids, shard_size=1, seed=0)
    )
    held = first.grant("at-work")
    assert held is not None
    again = Coordinator(str(tmp_path), config, clock=lambda: now[0])
    granted = []
    for tick in range(50):
        now[0] = tick * RENEW_S / 5
        if tick % 5 == 4:
            assert again.renew("at-work", [(held.job.id, held.id)], WorkerProgress()) == []
        lease = again.grant("idle")
        granted += [lease.job.problem_ids] if lease is not None else []
    assert held.job.problem_ids == ("a",) and granted == [("b",)]
    assert again.stats().leases.adopted == 1


def test_hard_levels_are_searched_first_in_their_order() -> None:
    levels = {"g1": "gsm", "m1": "math", "o1": "olympiad", "m2": "math", "o2": "olympiad"}
    problems = [make_problem(name, level=Level(level)) for name, level in levels.items()]
    assert hardest_first(problems) == ["o1", "o2", "m1", "m2", "g1"]


def test_time_left_leaves_out_what_an_earlier_process_did() -> None:
    left = _TimeLeft(0.0, [StageCost(rollouts=4)], num_problems=100)
    assert left.share(60, Totals()) == 0.0
    assert left.share(80, Totals()) == pytest.approx(0.5)
    assert left.share(100, Totals()) == pytest.approx(1.0)


def test_ranks_of_a_replica_have_a_bundle_each() -> None:
    large = ActorConfig(num_gpus=4, num_cpus=2, resources={"policy": 4})
    rank = {"GPU": 1.0, "policy": 1.0}
    assert large.rank_bundles(4) == [{"CPU": 2, **rank}, rank, rank, rank]
    assert ActorConfig(num_gpus=1).rank_bundles(1) == [{"GPU": 1}]
    assert ActorConfig().rank_bundles(2) == []


def test_autoscaler_is_asked_for_the_ranks_of_a_replica_one_by_one(tmp_path: Path) -> None:
    config = RolloutConfig.model_validate(
        {
            "run_dir": tmp_path,
            "problems": "p.jsonl",
            "policy": "x",
            "policy_engine": {"tensor_parallel_size": 2},
            "cluster": {"policy": {"num_gpus": 2}, "ppm": {"num_gpus": 1}},
        }
    )
    fleet = Fleet(config, RunFolder(tmp_path))
    assert fleet._parts({"GPU": 2.0}) == [{"GPU": 1.0}, {"GPU": 1.0}]
    assert fleet._parts({"GPU": 1.0}) == [{"GPU": 1.0}]
    assert fleet._parts({"CPU": 1.0}) == [{"CPU": 1.0}]


def test_gpus_of_a_replica_must_be_those_of_its_engine(tmp_path: Path) -> None:
    data = {
        "run_dir": tmp_path,
        "problems": "p.jsonl",
        "policy": "x",
        "policy_engine": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2},
        "cluster": {"policy": {"num_gpus": 8}},
    }
    with pytest.raises(ConfigError, match=r"cluster.policy.num_gpus must be 16, .*; got 8"):
        make_config(data, kind=RolloutConfig, source="test")
    made = make_config(data, ["cluster.policy.num_gpus=16"], kind=RolloutConfig, source="test")
    assert made.policy_engine.num_ranks == 16
