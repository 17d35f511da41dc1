"""Figures of the coordinator: at full size on real Ray, after a restart, and at virtual time.

    python -m bench.coordinator [--json FILE] [--problems N] [--replicas N] [--shard-size N]
                                [--lost-per-hour P] [--latency-curve FILE] [--only PART]

Parts:
* actor: the real coordinator actor on real Ray, pinned to one core. Simulated workers in this
  process, on the other cores, lease every problem, renew and complete, as rollout workers do it:
  each holds four jobs, one renewal names them all. Nothing is searched and nothing is written: the
  markers, which the coordinator reads, stand on the local disk before. `problems_per_s` is by the
  clock, `problems_per_cpu_s` by the CPU time of the actor's process, which other load disturbs
  less.
* rebuild: as many commit markers as the round has jobs, of 30 trees each, on the local disk; the
  time in which a new coordinator has read them and knows what is left. The markers are fresh, so
  the file system has them in memory.
* seal: the same markers, all of them, in a process of its own as the coordinator's: it rebuilds the
  round, then writes the manifest, for which it reads the name of every tree. `sealing_mib` is the
  most memory it ever had, `seal_s` the time of the manifest alone.
* checkpoint: what it costs a worker to keep its open trees now and then (`rollout.open_trees`):
  24 trees in two shards, made as `bench.storage` makes them, each searched to its end, which is
  more than an open tree has. `checkpoint_loop_s` holds the worker's searches up, `checkpoint_s` is
  all of it, by CPU time; `checkpoint_mib` goes to the store, here the local disk.
* simulation: `rstar simulate` with its defaults; what its figures mean is printed by that command.
* short, losses, zone, learner: the same at a smaller size (`SCENARIOS`), for two CPU minutes each:
  one of 16 machines is not to be had for an hour; 20 % of the replicas are lost an hour; a third of
  them goes for ten minutes; the learner's machine comes, is lost, and goes. Figures end with the
  name of the part; after it `_old` are those of the rules before (`OLD_RULES`: all replicas are
  waited for, the learner's machine stays through the round), `_returned` those with engines that
  are given back while the learner works.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ray

from bench.storage import load_problems, make_trees
from cluster.fleet.config import ClusterConfig
from cluster.jobs.coordinator import Coordinator, CoordinatorActor, WorkerProgress
from cluster.jobs.coordinator_client import RemoteCoordinator
from cluster.jobs.queue import Job, QueueConfig, StagePlan, plan_jobs
from cluster.planning.latency import DEFAULT_CURVE, LatencyCurve
from cluster.planning.simulate import Simulation
from cluster.planning.simulation_figures import SimulationConfig
from rollout.open_trees import OpenTreeStore
from rollout.store import Commit, RunStore, Totals, TrajectoryStore, TreeKey
from rollout.table import trees_to_table

OLD_RULES: dict[str, Any] = {"min_ready": 1.0, "learner_held": True}
SCENARIOS: dict[str, dict[str, Any]] = {
    "short": {"num_replicas": 16, "num_problems": 11_700, "short_replicas": 1},
    "losses": {"num_replicas": 32, "num_problems": 23_400, "lost_per_hour": 0.2},
    "zone": {"num_replicas": 32, "num_problems": 23_400, "zone_outage_at_s": 3600.0},
    "learner": {
        "num_replicas": 16,
        "num_problems": 60_000,
        "shard_size": 32,
        "learner_lost_per_hour": 0.3,
    },
}
"""A replica has as many problems as in the whole round, in `learner` five times as many."""
SCENARIO_KEYS = (
    "scaling_efficiency",
    "efficiency_of_constant",
    "lost",
    "doubled",
    "replicas_lost",
    "wait_s",
    "round_s",
    "learner_machines",
    "learner_idle_share",
    "engine_dollars",
    "learner_dollars",
    "dollars_per_solved",
    "simulation_cpu_s",
)
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "short": {"": {}, "_old": OLD_RULES},
    "learner": {"": {}, "_returned": {"engines_held": False}, "_old": OLD_RULES},
}
PARTS = ("actor", "rebuild", "seal", "checkpoint", "simulation", *SCENARIOS)
JOBS_HELD = 4
NUM_WORKERS = 64
OPEN_TREES = 24
CHECKPOINT_PAUSE_S: float = ClusterConfig.model_fields["checkpoint_open_trees_s"].default


def make_plan(num_problems: int, shard_size: int) -> StagePlan:
    """Problem ids as long as those of real sources."""
    return StagePlan(
        round=1,
        stage="base",
        tree_index=0,
        problem_ids=tuple(
            f"numina-olympiad-{i:07d}-{i * 7919 % 1000003:06x}" for i in range(num_problems)
        ),
        shard_size=shard_size,
        seed=1,
    )


def make_commit(job: Job) -> Commit:
    """The marker a worker would have written for a whole job."""
    count = len(job.problem_ids)
    return Commit(
        shard=job.id,
        attempt="0123456789abcdef",
        path=f"trajectories/round={job.round}/data/{job.id}-0123456789abcdef.parquet",
        num_rows=300 * count,
        num_bytes=100_000 * count,
        sha256="0" * 64,
        trees=tuple(
            TreeKey(problem_id=problem_id, index=0, solved=i % 4 > 0)
            for i, problem_id in enumerate(job.problem_ids)
        ),
        totals=Totals(
            trees=count,
            solved=count * 3 // 4,
            nodes=300 * count,
            rollouts=16 * count,
            generated_tokens=36_000 * count,
            trees_by_level={"gsm": count // 3, "math": count // 3, "olympiad": count // 3},
            solved_by_level={"gsm": count // 3, "math": count // 4, "olympiad": count // 6},
        ),
        info={"stage": job.stage, "writer": "worker-0-abcdef", "policy": "policy-r1-0123456789"},
    )


# --------------------------------------------------------------------------- actor


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, field: str) -> float:
    """Resident memory of a process: VmRSS now, VmHWM at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def pin(pid: int, cores: set[int]) -> None:
    """Every thread of a process; new ones follow the thread that starts them."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


async def work(name: str, coordinator: RemoteCoordinator) -> int:
    """Lease, renew and complete until nothing is left; returns the problems done."""
    done = 0
    while True:
        leases = []
        for _ in range(JOBS_HELD):
            lease = await coordinator.grant(name)
            if lease is not None:
                leases.append(lease)
        if not leases:
            return done
        held = [(lease.job.id, lease.id) for lease in leases]
        dropped = await coordinator.renew(name, held, WorkerProgress(open_trees=64))
        assert not dropped, dropped
        for lease in leases:
            assert await coordinator.complete(lease.job.id, lease.id)
            done += len(lease.job.problem_ids)


def actor_figures(num_problems: int, shard_size: int) -> dict[str, float]:
    cores = sorted(os.sched_getaffinity(0))
    ray.init(
        address="local",
        namespace="bench",
        num_cpus=len(cores),
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        with tempfile.TemporaryDirectory() as root:
            actor: Any = CoordinatorActor.remote(root, QueueConfig(lease_s=600.0))
            pid: Any = ray.get(actor.pid.remote())
            if len(cores) > 1:
                pin(pid, {cores[0]})
                pin(os.getpid(), set(cores[1:]))
            empty_mib = memory_mib(pid, "VmRSS")
            began_s = time.perf_counter()
            plan = make_plan(num_problems, shard_size)
            ray.get(actor.plan.remote(plan))
            plan_s = time.perf_counter() - began_s
            write_markers(root, plan, plan_jobs(plan))
            coordinator = RemoteCoordinator(actor)

            async def everybody() -> int:
                workers = (work(f"worker-{i}", coordinator) for i in range(NUM_WORKERS))
                return sum(await asyncio.gather(*workers))

            began_s, began_cpu_s = time.perf_counter(), cpu_s(pid)
            done = asyncio.run(everybody())
            wall_s, spent_s = time.perf_counter() - began_s, cpu_s(pid) - began_cpu_s
            status: Any = ray.get(actor.status.remote(1))
            assert done == num_problems and status.finished, (done, status)
            return {
                "problems_per_s": done / wall_s,
                "problems_per_cpu_s": done / spent_s,
                "coordinator_mib": memory_mib(pid, "VmHWM"),
                "coordinator_after_mib": memory_mib(pid, "VmRSS"),
                "coordinator_empty_mib": empty_mib,
                "plan_s": plan_s,
            }
    finally:
        ray.shutdown()
        os.sched_setaffinity(0, set(cores))


# --------------------------------------------------------------------------- rebuild


def write_markers(root: str, plan: StagePlan, jobs: Sequence[Job]) -> None:
    """The plan of a stage and the markers of some of its jobs, as if workers had written them."""
    TrajectoryStore(RunStore(root), plan.round).create_plan(plan.stage, plan.to_json())
    folder = Path(root, "trajectories/round=1/commits")
    folder.mkdir()
    for job in jobs:
        (folder / f"{job.id}.json").write_bytes(make_commit(job).to_json())


def rebuild_figures(num_problems: int, shard_size: int) -> dict[str, float]:
    plan = make_plan(num_problems, shard_size)
    jobs = plan_jobs(plan)
    with tempfile.TemporaryDirectory() as root:
        # All but the last, so that something is left to do.
        write_markers(root, plan, jobs[:-1])
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        coordinator = Coordinator(root)
        wall_s, spent_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        lease = coordinator.grant("worker")
        assert lease is not None and lease.job == jobs[-1] and coordinator.grant("worker") is None
    return {
        "rebuild_25k_markers_s": wall_s,
        "rebuild_cpu_s": spent_s,
        "rebuild_markers": len(jobs) - 1,
    }


# --------------------------------------------------------------------------- seal


def seal_figures(num_problems: int, shard_size: int) -> dict[str, float]:
    plan = make_plan(num_problems, shard_size)
    with tempfile.TemporaryDirectory() as root:
        write_markers(root, plan, plan_jobs(plan))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(seal, root, num_problems).result()


def seal(root: str, num_problems: int) -> dict[str, float]:
    """Rebuild and seal a round in this process, whose memory is measured."""
    coordinator = Coordinator(root)
    rebuilt_mib = memory_mib(os.getpid(), "VmHWM")
    began_s = time.perf_counter()
    manifest = coordinator.seal(1)
    seal_s = time.perf_counter() - began_s
    assert manifest.totals.trees == num_problems
    return {
        "seal_s": seal_s,
        "sealing_mib": memory_mib(os.getpid(), "VmHWM"),
        "rebuilt_mib": rebuilt_mib,
    }


# --------------------------------------------------------------------------- checkpoint


def checkpoint_figures() -> dict[str, float]:
    problems, _ = load_problems(None, OPEN_TREES)
    trees = asyncio.run(make_trees(problems[:OPEN_TREES], OPEN_TREES, related=True))
    with tempfile.TemporaryDirectory() as root:
        store = OpenTreeStore(RunStore(root), 1)
        began_s, loop_s = time.process_time(), 0.0
        for number in range(2):
            loop_began_s = time.process_time()
            table = trees_to_table(trees[number::2])
            loop_s += time.process_time() - loop_began_s
            store.save(f"job-{number}", table)
        all_s = time.process_time() - began_s
        size = sum(path.stat().st_size for path in Path(root).rglob("*.trees"))
    return {
        "checkpoint_loop_s": loop_s,
        "checkpoint_s": all_s,
        "checkpoint_mib": size / 2**20,
        "checkpoint_nodes": sum(len(tree.nodes) for tree in trees),
        "checkpoint_core_share": all_s / CHECKPOINT_PAUSE_S,
    }


# --------------------------------------------------------------------------- simulation


def simulation_figures(config: SimulationConfig, curve: LatencyCurve) -> dict[str, float]:
    began_cpu_s = time.process_time()
    report = Simulation(config, curve).run()
    return {
        "scaling_efficiency": report.scaling_efficiency,
        "efficiency_of_constant": report.efficiency_of_constant,
        "utilisation": report.utilisation,
        "lost": report.lost,
        "doubled": report.doubled,
        "quarantined": report.quarantined,
        "lost_work": report.lost_work,
        "replicas_lost": report.replicas_lost,
        "zombie_commits": report.zombie_commits,
        "races": report.races,
        "commits_refused": report.commits_refused,
        "coordinator_kills": report.coordinator_kills,
        "wait_s": report.wait_s,
        "makespan_s": report.makespan_s,
        "ideal_s": report.ideal_s,
        "round_s": report.round_s,
        "learner_machines": report.learner_machines,
        "learner_idle_share": report.learner_idle_share,
        "engine_dollars": report.engine_dollars,
        "learner_dollars": report.learner_dollars,
        "dollars_per_solved": report.dollars_per_solved,
        "simulation_wall_s": report.wall_s,
        "simulation_cpu_s": time.process_time() - began_cpu_s,
    }


def scenario_figures(name: str, curve: LatencyCurve) -> dict[str, float]:
    figures: dict[str, float] = {}
    for rules, changes in VARIANTS.get(name, {"": {}}).items():
        config = SimulationConfig(**SCENARIOS[name] | changes)
        found = simulation_figures(config, curve)
        figures |= {f"{key}_{name}{rules}": found[key] for key in SCENARIO_KEYS}
    return figures


# --------------------------------------------------------------------------- command


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "ray": version("ray")},
    }


GOALS = {
    "scaling_efficiency": ">= 0.95",
    "scaling_efficiency_short": ">= 0.95",
    "scaling_efficiency_losses": ">= 0.85",
    "scaling_efficiency_zone": ">= 0.95",
    "learner_idle_share": "<= 0.05",
    "learner_idle_share_learner": "<= 0.05",
    **{
        f"{key}{part}": "= 0"
        for key in ("lost", "doubled")
        for part in ("", *(f"_{p}" for p in SCENARIOS))
    },
    "problems_per_s": ">= 20,000",
    "rebuild_25k_markers_s": "<= 5",
    "coordinator_mib": "<= 500",
    "sealing_mib": "<= 500",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.coordinator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--problems", type=int, default=747_000)
    parser.add_argument("--replicas", type=int, default=1024, help="of the simulation")
    parser.add_argument("--shard-size", type=int, default=30, help="of all but the simulation")
    parser.add_argument("--lost-per-hour", type=float, default=0.05, help="of the simulation")
    parser.add_argument("--latency-curve", type=Path, help="JSON file of bench.search")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    options = parser.parse_args(arguments)
    config = SimulationConfig(
        num_problems=options.problems,
        num_replicas=options.replicas,
        lost_per_hour=options.lost_per_hour,
    )
    curve = LatencyCurve.read(options.latency_curve) if options.latency_curve else DEFAULT_CURVE
    parts = (options.only,) if options.only else PARTS
    figures: dict[str, Any] = {}
    if "actor" in parts:
        figures |= actor_figures(options.problems, options.shard_size)
    if "rebuild" in parts:
        figures |= rebuild_figures(options.problems, options.shard_size)
    if "seal" in parts:
        figures |= seal_figures(options.problems, options.shard_size)
    if "checkpoint" in parts:
        figures |= checkpoint_figures()
    if "simulation" in parts:
        figures |= simulation_figures(config, curve)
    for name in SCENARIOS:
        if name in parts:
            figures |= scenario_figures(name, curve)
    for name, value in figures.items():
        shown = f"{value:14,.4f}" if isinstance(value, float) else f"{value:>14,}"
        print(f"{name:32} {shown}   {GOALS.get(name, '')}".rstrip())
    figures |= {"machine": machine(), "problems": options.problems, "replicas": options.replicas}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
