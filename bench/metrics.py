"""What the metrics cost: python -m bench.metrics

    calls per tree x CPU time of a call, against the CPU time of a tree   (always)
    a fleet of scripted engines with and without metrics, in turn         (--pairs N)

Engines and sandboxes are actors that answer from a script: a tree costs what search, pools and Ray
take, and no model and no step code, so the share of the metrics is greater than in any real run.
The fleets tell how much throughput is lost in all, the driver's looks and Ray's exports included,
as far as the machine is quiet.

Goal: below 1 % of throughput. Prints a table and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.fleet.fleet import Fleet
from cluster.fleet.stages import RolloutStage
from cluster.folder.machine import hardware
from cluster.folder.run_folder import RunFolder
from cluster.jobs.pool import PolicyPool, PreferencePool, SandboxPool
from cluster.jobs.sandbox_worker import SandboxWorker, SandboxWorkerActor
from cluster.runs.config import RolloutConfig
from cluster.telemetry import metrics as m
from cluster.telemetry.samples import Samples
from learner.checkpoint import Checkpoint
from rollout.problem import Problem
from rollout.run_store import RunStore
from rollout.search import SearchConfig, run_search
from rollout.tasks import all_of
from rollout.tree import Tree
from tests.builders import make_problem
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference, random_steps
from tests.scripted_replicas import (
    ScriptedPolicyReplica,
    ScriptedPreferenceReplica,
    hash_value,
)

ROOT = Path(__file__).resolve().parents[1]
SEARCH = SearchConfig(template="short", num_candidates=8, num_rollouts=16, max_depth=8)
CALLS = 50_000
WORKER_CALLS = 4
"""Of a worker per tree besides `count_tree`: slot, lease, commit and its count, if each shard held
one tree only."""


class _Method:
    def __init__(self, function: Any) -> None:
        self.remote = function


class _Local:
    """An actor handle whose methods run here."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._actor, name))


def call_figures() -> dict[str, float]:
    """CPU time of one call, in a process that counts and in one that does not."""
    off_s = _cpu_s_per_call()
    try:
        m.switch_on("bench")
        on_s = _cpu_s_per_call()
    finally:
        m.switch_on("")
    return {"call_us": 1e6 * on_s, "call_off_us": 1e6 * off_s}


def _cpu_s_per_call() -> float:
    """The mean of counters and histograms, of which a search needs about as many."""
    began_s = time.process_time()
    for _ in range(CALLS):
        m.count(m.REQUESTS, pool="policy", replica="policy-0", outcome="ok")
        m.observe(m.REQUEST_SECONDS, 0.02, pool="policy")
    m.flush()
    return (time.process_time() - began_s) / (2 * CALLS)


def tree_figures(num_trees: int) -> dict[str, float]:
    """Calls per tree, and the CPU time of one, this process and its engines' together."""
    problems = [make_problem(f"p{n}", text="How many?", answer="3") for n in range(num_trees)]
    scripted: Any = ScriptedSandbox(default="3\n")
    local = [
        _Local(ScriptedPolicy(random_steps)),
        _Local(TablePreference(hash_value)),
        _Local(SandboxWorker(sandbox=scripted)),
    ]
    with m.recorded() as counted:
        for tree in asyncio.run(_search_all(problems, *local)):
            m.count_tree(tree, 1.0)
    names = {"version": "v", "name": "bench"}
    policy: Any = ray.remote(num_cpus=0)(ScriptedPolicyReplica).remote("none", **names)
    preference: Any = ray.remote(num_cpus=0)(ScriptedPreferenceReplica).remote("none", **names)
    sandbox: Any = SandboxWorkerActor.options(num_cpus=0).remote(
        sandbox=ScriptedSandbox(default="3\n")
    )
    actors = (policy, preference, sandbox)
    replicas = ray.get([policy.ready.remote(), preference.ready.remote()])
    pids = [os.getpid(), ray.get(sandbox.pid.remote()), *(info.pid for info in replicas)]
    asyncio.run(_search_all(problems[:4], *actors))
    began_s = _cpu_s(pids)
    trees = asyncio.run(_search_all(problems, *actors))
    cpu_s = (_cpu_s(pids) - began_s) / num_trees
    for actor in actors:
        ray.kill(actor)
    return {
        "nodes_per_tree": sum(len(tree.nodes) for tree in trees) / num_trees,
        "requests_per_tree": sum(tree.num_requests for tree in trees) / num_trees,
        "calls_per_tree": counted.calls / num_trees + WORKER_CALLS,
        "tree_cpu_ms": 1e3 * cpu_s,
    }


def _cpu_s(pids: Sequence[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


async def _search_all(
    problems: Sequence[Problem], policy: Any, preference: Any, sandbox: Any
) -> list[Tree]:
    engines: dict[str, Any] = {
        "policy": PolicyPool({"policy-0": policy}),
        "preference": PreferencePool({"ppm-0": preference}),
        "sandbox": SandboxPool({"sandbox-0": sandbox}),
    }
    searches = (
        run_search(problem, config=SEARCH, round=1, seed=number, **engines)
        for number, problem in enumerate(problems)
    )
    return await all_of(searches)


def fleet_figures(pairs: int, num_problems: int) -> dict[str, float]:
    """Trees per second of fleets with and without metrics, and the driver's look."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    looks: list[float] = []
    for pair in range(pairs):
        # In turn, and the other way round each time: a machine slows down and speeds up.
        for enabled in (True, False) if pair % 2 == 0 else (False, True):
            with tempfile.TemporaryDirectory(prefix="bench-metrics-") as folder:
                root = Path(folder) / "run"
                speeds[enabled].append(asyncio.run(_fleet_speed(root, enabled, num_problems)))
                taken = Samples.read(RunStore(root)).series.get(m.SAMPLE_SECONDS.exported, {})
                looks += [value for series in taken.values() for value in series.values]
    on, off = (statistics.median(speeds[enabled]) for enabled in (True, False))
    spread = max(max(each) / min(each) for each in speeds.values()) - 1
    return {
        "fleet_trees_per_s": on,
        "fleet_trees_per_s_without": off,
        "fleet_loss_percent": 100 * (1 - on / off),
        "fleet_spread_percent": 100 * spread,
        "driver_look_ms": 1e3 * statistics.median(looks) if looks else 0.0,
    }


async def _fleet_speed(root: Path, enabled: bool, num_problems: int) -> float:
    root.mkdir()
    config = RolloutConfig.model_validate(
        {
            "run_dir": root,
            "problems": "unused",
            "policy": "unused",
            "metrics": {"enabled": enabled},
            "cluster": {"num_cpus": 2, "object_store_mib": 80, "max_open_trees": 16},
        }
    )
    fleet = Fleet(config, RunFolder(root))
    # The fleet's own classes start engines.
    policy: Any = fleet._policy_kind
    preference: Any = fleet._preference_kind
    policy.actor = ray.remote(ScriptedPolicyReplica)
    preference.actor = ray.remote(ScriptedPreferenceReplica)
    problems = [make_problem(f"p{n}", text="How many?", answer="3") for n in range(num_problems)]
    try:
        await fleet.start(root / "none", version="v", learner=False)
        await fleet.serve_preference(Checkpoint(kind="ppm", round=0, path="x", digest="d"))
        outcome = await fleet.rollout(
            1,
            problems,
            [RolloutStage(name="base", search=SEARCH)],
            preference=True,
            on_progress=lambda done, total, facts: None,
        )
    finally:
        await fleet.stop()
    return num_problems / outcome.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--trees", type=int, default=40, help="searched in this process")
    parser.add_argument("--pairs", type=int, default=0, help="fleets with and without, in turn")
    parser.add_argument("--problems", type=int, default=150, help="of each fleet")
    options = parser.parse_args(arguments)
    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        figures: dict[str, Any] = {**call_figures(), **tree_figures(options.trees)}
    finally:
        ray.shutdown()
    share = figures["calls_per_tree"] * figures["call_us"] / (1e3 * figures["tree_cpu_ms"])
    figures["share_percent"] = 100 * share
    if options.pairs:
        figures |= fleet_figures(options.pairs, options.problems)
    for name, value in figures.items():
        goal = "   < 1" if name in ("share_percent", "fleet_loss_percent") else ""
        print(f"{name:28} {value:12,.3f}{goal}")
    figures["machine"] = hardware()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
