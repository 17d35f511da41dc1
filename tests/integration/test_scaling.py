"""Pools that grow with the work of a rollout and shrink after it, on a local Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import ray

from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from rollout.search import SearchConfig
from tests.builders import make_problem
from tests.saboteur import stopped_at_the_end, until
from tests.scripted_replicas import HELD, ScriptedPolicyReplica

ROOT = Path(__file__).resolve().parents[2]
SEARCH = SearchConfig(template="short", num_candidates=2, num_rollouts=4, max_depth=4)


async def test_policy_grows_while_trees_wait_and_shrinks_when_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    root = tmp_path / "run"
    root.mkdir()
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "cluster": {
                "num_cpus": 2,
                "object_store_mib": 80,
                "max_open_trees": 6,
                "shard_size": 2,
                "stalled_after_s": 1.0,
                "supervision": {"look_s": 0.2},
                "autoscale": {
                    "policy": {
                        "min_replicas": 1,
                        "max_replicas": 3,
                        "slots": 2,
                        "step_s": 0.1,
                        "cool_down_s": 0.5,
                        "down_window_s": 0.5,
                    }
                },
            },
        }
    )
    fleet = Fleet(config, RunFolder(root))
    fleet._policy_kind.actor = ray.remote(ScriptedPolicyReplica)
    problems = [make_problem(f"p{n}", text=HELD, answer="3") for n in range(12)]
    hold = root / "hold"
    hold.touch()
    shown: list[str] = []

    async with stopped_at_the_end(fleet):
        await fleet.start(hold, version="policy-r0", learner=False)
        work = asyncio.create_task(
            fleet.rollout(
                1,
                problems,
                [RolloutStage(name="base", search=SEARCH)],
                preference=False,
                on_progress=lambda done, total, facts: shown.append(str(facts.get("stalled", ""))),
            )
        )
        await until(lambda: len(fleet.pools.handles("policy")) == 3)
        # Nothing moves while the policy says nothing, and the view says so.
        await until(lambda: any("search: no progress" in text for text in shown))
        hold.unlink()
        outcome = await work
        assert (outcome.lost, outcome.doubled) == (0, 0)
        await until(lambda: len(fleet.pools.keepers["policy"].all_handles) == 1)
        assert outcome.losses == {}
