"""What candidates for training cost a worker, and what selecting from a round of them takes.

    commit_extra_ms_per_tree       CPU to make and compress what stands beside a shard
    commit_extra_bytes_per_tree    of it on disk
    select_s_747k                  CPU of one process, from candidates to a dataset
    select_two_wall_s_747k         by the clock, two processes reading
    select_mib                     most memory of that one process
    pairs_per_tree, nodes_per_tree

A few trees are made (`bench.scale.made`) and their candidates written again and again under other
problem ids, in shuffled order, as the shards of a sealed round; only candidates are read, as in a
run whose workers left them. The files are in the page cache.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa

from bench.scale.made import made_trees
from cluster.runs.select import RoundSelection
from learner.candidates import SCHEMA, candidates, candidates_file, table_to_bytes
from learner.select import DatasetConfig, recipe_of
from rollout.programs import _parsed, _statements
from rollout.prompt import RSTAR_TEMPLATE
from rollout.store import RunStore, TrajectoryStore
from rollout.tree import Tree

ROUND_TREES = 747_000
MADE = 128
SHARD_TREES = 16
CONFIG = DatasetConfig()
RECIPE = recipe_of(CONFIG, RSTAR_TEMPLATE)


def measure(num_trees: int = 50_000) -> dict[str, float]:
    """The figures above."""
    trees = made_trees(MADE)
    figures = {"nodes_per_tree": sum(len(tree.nodes) for tree in trees) / len(trees)}
    figures |= commit_figures(trees)
    table = candidates(trees, RECIPE)
    figures["pairs_per_tree"] = sum(table["num_pairs"].to_pylist()) / len(table)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_trees = write_round(folder / "run", table, num_trees)
        scale = ROUND_TREES / num_trees
        cpu_s, wall_s, mib = in_a_process(folder / "run", folder / "one", 1)
        figures |= {"select_s_747k": scale * cpu_s, "select_wall_s_747k": scale * wall_s}
        figures["select_mib"] = mib
        _, wall_s, _ = in_a_process(folder / "run", folder / "two", 2)
        figures["select_two_wall_s_747k"] = scale * wall_s
    return figures | {"select_trees": float(num_trees)}


def commit_figures(trees: Sequence[Tree]) -> dict[str, float]:
    """Of the shards that these trees make; what a process imports for its first is left out."""
    size = 0
    candidates_file(trees[:1], RECIPE)
    _statements.cache_clear()
    _parsed.cache_clear()
    begun = time.process_time()
    for start in range(0, len(trees), SHARD_TREES):
        size += len(candidates_file(trees[start : start + SHARD_TREES], RECIPE))
    spent = time.process_time() - begun
    return {
        "commit_extra_ms_per_tree": 1000 * spent / len(trees),
        "commit_extra_bytes_per_tree": size / len(trees),
    }


def write_round(root: Path, table: pa.Table, num_trees: int) -> int:
    """A sealed round of at least so many trees; returns how many."""
    trees = TrajectoryStore(RunStore(root), 1)
    copies = -(-num_trees // len(table))
    names = [f"problem-{number:07d}" for number in range(copies * len(table))]
    random.Random(0).shuffle(names)
    at = SCHEMA.get_field_index("problem_id")
    for copy in range(copies):
        own = pa.array(names[copy * len(table) : (copy + 1) * len(table)])
        renamed = table.set_column(at, SCHEMA.field("problem_id"), own)
        renamed = renamed.set_column(at + 1, SCHEMA.field("original"), own)
        for start in range(0, len(table), SHARD_TREES):
            data = table_to_bytes(renamed.slice(start, SHARD_TREES).combine_chunks())
            trees.commit(f"base-{copy:05d}-{start:04d}", [], derived={RECIPE.name: data})
    trees.seal()
    return len(names)


def in_a_process(run: Path, data: Path, num_processes: int) -> tuple[float, float, float]:
    """CPU and wall seconds and MiB of a selection in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_select, run, data, num_processes).result()


def _select(run: Path, data: Path, num_processes: int) -> tuple[float, float, float]:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    selection = RoundSelection(RunStore(run), 1, num_processes=num_processes)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    selection.select(data, template=RSTAR_TEMPLATE, config=CONFIG)
    assert not selection.notes(), selection.notes()
    spent = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return *spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
