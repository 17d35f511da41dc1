"""What the page of a run is made of, read from what the stages committed.

    RUN/report.json, stages/, checkpoints/*/metrics.jsonl, trajectories/ --> RunFacts

Of a large round at most `MAX_FILES` data files, evenly spread, are read for the charts of trees;
the page says so. Coverage, accuracy, cost and lost work are of all of it.

Throughput over time comes from the times of the data files: of a run that was copied without them
the chart is left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.evaluation.reliability import Bins, BinSums
from cluster.folder.run_folder import RunFolder
from rollout.self_correction import corrections
from rollout.store import Commit, ManifestFile, StoreError, TrajectoryStore
from rollout.table import table_to_trees
from rollout.trajectory import Trajectory, trajectories
from rollout.tree import Outcome, Terminal, Tree

MAX_SAMPLE_FILES = 4
"""Data files of the last round whose texts are read."""

MAX_CORRECTIONS = 3
"""Self-correcting trajectories that are shown."""

MAX_FILES = 64
"""Data files of a round that charts are made of."""

Q_EDGES = tuple(round(-1.0 + 0.1 * n, 1) for n in range(21))

_COLUMNS = (
    *("problem_id", "tree", "node", "parent", "terminal", "discard", "multiplicity"),
    *("correct", "value", "visit_count", "value_sum", "execution_status"),
)


@dataclass(slots=True, kw_only=True)
class RoundFacts:
    """What the trees of one round say."""

    files_read: int = 0
    files: int = 0
    terminals: Counter[str] = field(default_factory=Counter)
    discards: Counter[str] = field(default_factory=Counter)
    """Candidates left out by reason, identical ones counted each."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Step codes that did not end well, by sandbox status."""
    q_right: list[int] = field(default_factory=list)
    """Visited steps with a right answer below, by bin of Q; `q_wrong`: without."""
    q_wrong: list[int] = field(default_factory=list)
    answer_bins: Bins = field(default_factory=list)
    step_bins: Bins = field(default_factory=list)
    commits: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since 1970, generated tokens) of each commit, by time."""
    quarantined: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Corrected:
    """Trajectories with a step that takes back an earlier one, in the trees that were read."""

    trajectories: int = 0
    """All, with a right answer or a wrong one."""
    correcting: int = 0
    correcting_right: int = 0
    """Of these, with a right answer."""
    examples: list[Trajectory] = field(default_factory=list)
    """A few, right ones first."""

    def add(self, tree: Tree) -> None:
        """Count the trajectories of a tree."""
        for trajectory in trajectories(tree):
            self.trajectories += 1
            if corrections(trajectory.steps):
                self.correcting += 1
                self.correcting_right += bool(trajectory.correct)
                self.examples.append(trajectory)
        self.examples.sort(key=lambda t: (not t.correct, len(t.steps), t.problem.id, t.node))
        del self.examples[MAX_CORRECTIONS:]


@dataclass(slots=True, kw_only=True)
class RunFacts:
    """Everything the page is made of."""

    report: Mapping[str, Any]
    stages: Mapping[tuple[int, str], Mapping[str, Any]]
    rounds: dict[int, RoundFacts] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """Kind of model -> name of the round -> (step, loss)."""
    samples: list[tuple[str, Tree]] = field(default_factory=list)
    """(why it is shown, tree)."""
    corrected: Corrected = field(default_factory=Corrected)
    """In the last round."""


def read_run(folder: RunFolder, report: Mapping[str, Any]) -> RunFacts:
    """Read what a finished run committed.

    Raises:
        StoreError: a data file is missing or changed.
    """
    store = folder.store
    facts = RunFacts(report=report, stages=folder.stages())
    for entry in report["rounds"]:
        trees = TrajectoryStore(store, entry["round"])
        if trees.manifest() is not None:
            facts.rounds[entry["round"]] = read_round(trees)
    for kind in ("policy", "ppm"):
        facts.curves[kind] = {
            f"round {number}": curve
            for number in folder.rounds("checkpoints")
            if (curve := read_curve(folder.training_log(kind, number)))
        }
    if facts.rounds:
        facts.samples, facts.corrected = sample_trees(TrajectoryStore(store, max(facts.rounds)))
    return facts


def read_curve(log: bytes, num_points: int = 120) -> list[tuple[float, float]]:
    """(step, loss) of a training run's log, each the mean of its neighbours; [] if it is empty."""
    rows = []
    for line in log.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a last line that was cut off
            continue
        if isinstance(row, dict) and "step" in row and math.isfinite(row.get("loss", math.nan)):
            rows.append((float(row["step"]), float(row["loss"])))
    size = max(math.ceil(len(rows) / num_points), 1)
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [
        (sum(step for step, _ in g) / len(g), sum(loss for _, loss in g) / len(g)) for g in groups
    ]


def read_round(trees: TrajectoryStore, *, max_files: int = MAX_FILES) -> RoundFacts:
    """What the trees of a sealed round say, from at most `max_files` of its files.

    Raises:
        StoreError: a file is missing or changed.
    """
    manifest = trees.manifest()
    assert manifest is not None
    files = [file for file in manifest.files if file.num_rows]
    chosen = _spread(files, max_files)
    facts = RoundFacts(files_read=len(chosen), files=len(files), quarantined=manifest.failed)
    facts.commits = _commit_times(trees, {file.shard for file in files})
    bins = {"answers": BinSums(), "steps": BinSums()}
    right, wrong = np.zeros(len(Q_EDGES) - 1, int), np.zeros(len(Q_EDGES) - 1, int)
    for file in chosen:
        table = trees.read_table(file, _COLUMNS)
        _count(table, facts)
        below, right_below = answers_below(table)
        visits = _numbers(table, "visit_count")
        visited = (visits > 0) & (_numbers(table, "node") > 0)
        q = np.divide(
            _numbers(table, "value_sum"), visits, where=visits > 0, out=np.zeros(len(visits))
        )
        for counts, which in ((right, right_below > 0), (wrong, right_below == 0)):
            counts += np.histogram(q[visited & which], bins=np.array(Q_EDGES))[0]
        value = _numbers(table, "value")
        is_answer = np.array([t == Terminal.ANSWER for t in table["terminal"].to_pylist()], bool)
        told = np.isfinite(value) & (below > 0)
        share = np.divide(right_below, below, where=below > 0, out=np.zeros(len(below)))
        for name, which in (("answers", told & is_answer), ("steps", told & ~is_answer)):
            bins[name].add(value[which], share[which])
    facts.q_right, facts.q_wrong = right.tolist(), wrong.tolist()
    facts.answer_bins, facts.step_bins = bins["answers"].bins(), bins["steps"].bins()
    return facts


def answers_below(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of each node: visited answers at or below it, and how many of them are right, `[rows]`."""
    terminal = table["terminal"].to_pylist()
    visits = _numbers(table, "visit_count")
    correct = table["correct"].to_pylist()
    nodes, parents = _numbers(table, "node"), _numbers(table, "parent")
    rows = np.arange(len(nodes))
    parent_rows = (rows - nodes + parents).astype(int)
    below, right = np.zeros(len(rows), int), np.zeros(len(rows), int)
    for row in range(len(rows) - 1, -1, -1):
        # A parent stands before its children, so theirs are complete here.
        if terminal[row] == Terminal.ANSWER and visits[row] > 0 and correct[row] is not None:
            below[row] += 1
            right[row] += bool(correct[row])
        if nodes[row] > 0:
            below[parent_rows[row]] += below[row]
            right[parent_rows[row]] += right[row]
    return below, right


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, null as NaN."""
    return table[name].combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False)


def _count(table: pa.Table, facts: RoundFacts) -> None:
    facts.terminals.update(t for t in table["terminal"].to_pylist() if t)
    pairs = zip(table["discard"].to_pylist(), table["multiplicity"].to_pylist(), strict=True)
    for reason, count in pairs:
        if reason:
            facts.discards[reason] += count
    facts.statuses.update(
        status for status in table["execution_status"].to_pylist() if status not in ("", "ok")
    )


def _spread(files: Sequence[ManifestFile], most: int) -> list[ManifestFile]:
    if len(files) <= most:
        return list(files)
    return [files[round(n * (len(files) - 1) / (most - 1))] for n in range(most)]


def _commit_times(trees: TrajectoryStore, shards: set[str]) -> list[tuple[float, int]]:
    found = []
    commit: Commit
    for name, commit in trees.commits(trees=False).items():
        if name in shards:
            try:
                when = trees.store.modified_unix_s(commit.path)
            except FileNotFoundError:
                continue
            found.append((when, commit.totals.generated_tokens))
    return sorted(found)


def rate_over_time(
    commits: Sequence[tuple[float, int]], num_points: int = 24
) -> list[tuple[float, float]]:
    """(minutes since the first commit, tokens per second); [] if the times tell nothing.

    Each point is the tokens committed in its share of the time; what was committed first was made
    before that, so it is left out.
    """
    if len(commits) < 4:
        return []
    began_s, ended_s = commits[0][0], commits[-1][0]
    span_s = ended_s - began_s
    if span_s < 2.0:
        return []
    count = min(num_points, max(len(commits) // 4, 2))
    tokens = [0] * count
    for when_s, made in commits[1:]:
        tokens[min(int((when_s - began_s) / span_s * count), count - 1)] += made
    width_s = span_s / count
    return [((n + 0.5) * width_s / 60, tokens[n] / width_s) for n in range(count)]


def sample_trees(trees: TrajectoryStore) -> tuple[list[tuple[str, Tree]], Corrected]:
    """A few trees that show how the search went, with the reason each is shown; and what was
    corrected in those read.

    Raises:
        StoreError: a file cannot be read.
    """
    manifest = trees.manifest()
    assert manifest is not None
    best: dict[str, tuple[float, Tree]] = {}
    corrected = Corrected()
    for file in _spread([f for f in manifest.files if f.num_rows], MAX_SAMPLE_FILES):
        try:
            found = table_to_trees(trees.read_table(file))
        except ValueError as error:
            raise StoreError(f"data file {file.path} cannot be read: {error}") from error
        for tree in found:
            corrected.add(tree)
            for why, worth in _worth_showing(tree):
                if worth > best.get(why, (0.0, tree))[0]:
                    best[why] = (worth, tree)
    shown: list[tuple[str, Tree]] = []
    for why, (_, tree) in best.items():
        if all(tree is not other for _, other in shown):
            shown.append((why, tree))
    return shown, corrected


def _worth_showing(tree: Tree) -> Iterator[tuple[str, float]]:
    answers = list(tree.reached_answers())
    right = sum(bool(node.correct) for node in answers)
    # Large enough to show something, small enough to read.
    size = 1.0 / (1.0 + abs(len(tree.nodes) - 24))
    if right and right < len(answers):
        yield "solved, after wrong answers too", size
    if tree.outcome is Outcome.UNSOLVED:
        yield "answered, but never rightly", size
    if tree.outcome is Outcome.NO_ANSWER:
        yield "no rollout reached an answer", size
    if right and right == len(answers):
        yield "every answer right", 0.5 * size
