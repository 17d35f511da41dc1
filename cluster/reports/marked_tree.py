"""A stored search tree, what training takes from it, and how its nodes are told.

    RUN/trajectories --find_trees, choose_tree, read_trees--> trees of a problem
                     --view_tree--> TreeView: the tree and its marks

The marks come from the functions that make training data (`learner.select`), with the settings of
the run and all trees of the problem up to the shown round: what is marked is what that round's
dataset takes. Nothing here changes a run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import yaml
from pydantic import ValidationError

from cluster.folder.run_folder import RunFolderError, resolve_problem
from cluster.reports.page import visible
from learner.pairs import PairKind, PreferencePair
from learner.select import DatasetConfig, choose_of_problem
from rollout.difficulty import Difficulty, difficulty
from rollout.prompt import RSTAR_TEMPLATE, TEMPLATES, PromptTemplate, training_template
from rollout.store import Commit, RunStore, StoreError, TrajectoryStore, stored_rounds
from rollout.table import table_to_trees
from rollout.trajectory import Trajectory
from rollout.tree import Node, Tree

_SNIPPET_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTree:
    """Where a tree of some problem lies."""

    problem_id: str
    round: int
    index: int
    solved: bool
    commit: Commit


def find_trees(store: RunStore, problem: str) -> list[StoredTree]:
    """All stored trees of a problem, by round and index.

    Args:
        problem: an id, or the beginning of exactly one.
    Raises:
        RunFolderError: nothing is stored, no such problem (with the nearest ids), or several.
    """
    found: defaultdict[str, list[StoredTree]] = defaultdict(list)
    for round_ in stored_rounds(store):
        trees = TrajectoryStore(store, round_)
        commits = trees.commits()
        manifest = trees.manifest()
        if manifest is not None:
            commits = {file.shard: commits[file.shard] for file in manifest.files}
        for commit in commits.values():
            for key in commit.trees:
                found[key.problem_id].append(
                    StoredTree(
                        problem_id=key.problem_id,
                        round=round_,
                        index=key.index,
                        solved=key.solved,
                        commit=commit,
                    )
                )
    if not found:
        raise RunFolderError(f"{store.root}: no search tree is stored here")
    problem_id = resolve_problem(problem, found, store.root)
    return sorted(found[problem_id], key=lambda t: (t.round, t.index))


def choose_tree(
    stored: Sequence[StoredTree], round: int | None = None, index: int | None = None
) -> StoredTree:
    """Which tree to show: of the last round unless told, the first that solved it, else the last.

    Raises:
        RunFolderError: there is no such tree; says which there are.
    """
    wanted = max(t.round for t in stored) if round is None else round
    of_round = [t for t in stored if t.round == wanted]
    fitting = of_round if index is None else [t for t in of_round if t.index == index]
    if not fitting:
        there = ", ".join(f"round {t.round} tree {t.index}" for t in stored)
        asked = f"round {wanted}" + ("" if index is None else f" tree {index}")
        raise RunFolderError(f"problem {stored[0].problem_id}: no {asked}; there is {there}")
    return next((t for t in fitting if t.solved), fitting[-1])


def read_trees(store: RunStore, stored: Sequence[StoredTree]) -> list[Tree]:
    """The trees themselves, in the order given.

    Raises:
        StoreError: a file is missing, changed, or of another schema version.
    """
    trees: dict[tuple[int, int], Tree] = {}
    for shard in {t.commit.path: t for t in stored}.values():
        table = TrajectoryStore(store, shard.round).read_table(shard.commit)
        table = table.filter(pc.field("problem_id") == shard.problem_id)
        try:
            for tree in table_to_trees(table):
                trees[tree.round, tree.index] = tree
        except ValueError as error:
            raise StoreError(f"data file {shard.commit.path} cannot be read: {error}") from error
    return [trees[t.round, t.index] for t in stored]


def dataset_config(store: RunStore) -> DatasetConfig:
    """How the run chooses training data; the defaults where it does not say.

    Raises:
        RunFolderError: its config.yaml cannot be read.
    """
    try:
        data = yaml.safe_load(store.read("config.yaml"))
        return DatasetConfig.model_validate((data or {}).get("dataset") or {})
    except FileNotFoundError:
        return DatasetConfig()
    except (yaml.YAMLError, ValidationError, AttributeError) as error:
        raise RunFolderError(f"{store.root}/config.yaml: cannot be read: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMark:
    """A preference pair, by the nodes it compares."""

    kind: PairKind
    chosen: int
    """A child of the shared prefix; of an answer pair: the answer that ends the trajectory."""
    rejected: int
    chosen_q: float
    rejected_q: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeView:
    """A tree and what training takes from it."""

    tree: Tree
    others: tuple[Tree, ...]
    """All trees of the problem up to this round, this one included."""
    chosen: tuple[Trajectory, ...]
    """Trajectories kept for the policy, best first; some may lie in other trees."""
    pairs: tuple[PairMark, ...]
    held_out: bool
    """True: the problem judges the models and never trains them."""
    ppm_only: bool
    """True: the policy is not trained on the problem."""

    @property
    def difficulty(self) -> Difficulty:
        """Class of the problem in this round."""
        return difficulty([t for t in self.others if t.round == self.tree.round])

    @property
    def chosen_here(self) -> dict[int, int]:
        """Answer node -> rank from 1, of the chosen trajectories in this tree."""
        return {
            t.node: rank
            for rank, t in enumerate(self.chosen, start=1)
            if (t.round, t.tree_index) == (self.tree.round, self.tree.index)
        }

    def chosen_paths(self) -> dict[int, list[int]]:
        """Node -> ranks of the chosen trajectories through it."""
        ranks: defaultdict[int, list[int]] = defaultdict(list)
        for answer, rank in self.chosen_here.items():
            for node in self.tree.path(self.tree.nodes[answer])[1:]:
                ranks[node.id].append(rank)
        return dict(ranks)


def view_tree(tree: Tree, trees: Sequence[Tree], config: DatasetConfig) -> TreeView:
    """Mark what training takes from a tree.

    Args:
        trees: all trees of the problem up to this round, this one included.
    """
    chosen = choose_of_problem(trees, template=_template(tree), config=config)
    here = [p for p in chosen.pairs if (p.round, p.tree_index) == (tree.round, tree.index)]
    return TreeView(
        tree=tree,
        others=tuple(trees),
        chosen=tuple(chosen.trajectories),
        pairs=_pair_marks(tree, here),
        held_out=chosen.held_out,
        ppm_only=chosen.ppm_only,
    )


def _template(tree: Tree) -> PromptTemplate:
    """The template the tree's steps are trained under; it does not change which are chosen."""
    name = json.loads(tree.search_config or "{}").get("template")
    return training_template(TEMPLATES.get(name, RSTAR_TEMPLATE))


def _pair_marks(tree: Tree, pairs: Sequence[PreferencePair]) -> tuple[PairMark, ...]:
    """Find the nodes of pairs by their texts, which differ among siblings and among paths."""
    answers = {
        "".join(step.rendered for step in tree.steps(node)): node.id for node in tree.answers()
    }
    marks = []
    for pair in pairs:
        if pair.kind is PairKind.ANSWER:
            ids = answers
        else:
            children = tree.valid_children(tree.nodes[pair.node])
            ids = {c.step.rendered: c.id for c in children if c.step is not None}
        marks.append(
            PairMark(
                kind=pair.kind,
                chosen=ids[pair.chosen],
                rejected=ids[pair.rejected],
                chosen_q=pair.chosen_q,
                rejected_q=pair.rejected_q,
                weight=pair.weight,
            )
        )
    return tuple(marks)


def facts(view: TreeView) -> list[str]:
    """What the search cost and what made it, in words."""
    tree = view.tree
    stages = ", ".join(
        f"{name} {seconds:.1f}"
        for name, seconds in (
            ("generate", tree.generate_s),
            ("execute", tree.execute_s),
            ("grade", tree.grade_s),
            ("evaluate", tree.evaluate_s),
        )
        if seconds
    )
    lines = [
        f"{tree.num_rollouts} rollouts, {len(tree.nodes):,} nodes, "
        f"{tree.generated_tokens:,} generated tokens in {tree.num_requests:,} requests, "
        f"{tree.num_executions:,} codes run"
        + (f", {tree.seconds:.1f} s" if tree.seconds else "")
        + (f" (awaited: {stages})" if stages else "")
        + (f"; ended early: {visible(tree.note)}" if tree.note else ""),
        f"policy {visible(tree.policy_version) or '-'}, "
        f"PPM {visible(tree.preference_version) or 'none'}, "
        f"grader {visible(tree.grader_version) or '-'}, seed {tree.seed}",
    ]
    steps = sum(pair.kind is PairKind.STEP for pair in view.pairs)
    here, all_trees = len(view.chosen_here), len(view.chosen)
    use = "training data of the PPM alone" if view.ppm_only else "training data"
    if view.held_out:
        use = "held out, judges the models and never trains them"
    lines.append(
        f"{use}; chosen trajectories: {here}"
        + (f" here, {all_trees - here} in other trees" if all_trees > here else "")
        + f"; preference pairs: {steps} of steps, {len(view.pairs) - steps} of answers"
    )
    return lines


VERDICTS = {
    True: ("✓ correct", "green"),
    False: ("✗ wrong", "red"),
    None: ("? not graded", "yellow"),
}


def margin(pair: PairMark) -> str:
    return f"Q {pair.chosen_q:+.2f} against {pair.rejected_q:+.2f}, weight {pair.weight:.2f}"


def node_facts(node: Node) -> list[tuple[str, str]]:
    """Name and value of what is known of a node, empty things left out."""
    facts: list[tuple[str, Any]] = [
        ("kind", node.step.kind if node.step else "root"),
        ("Q", f"{node.q_value:+.4f}" if node.visit_count else None),
        ("visits", f"{node.visit_count}, value sum {node.value_sum:+.4f}"),
        ("PPM value", None if node.value is None else f"{node.value:+.4f}"),
        ("terminal", node.terminal),
        ("answer", node.step.answer if node.step else None),
        ("verdict", f"{VERDICTS[node.correct][0]} {node.verdict}" if node.verdict else None),
        ("reward", None if node.reward is None else f"{node.reward:+.4f}"),
        ("left out", node.discard),
        ("status", node.execution_status or None),
        ("identical", node.multiplicity if node.multiplicity > 1 else None),
        ("tokens", node.num_tokens or None),
        ("logprob", None if node.logprob is None else f"{node.logprob:.3f}"),
        ("made in", f"rollout {node.rollout}" if node.rollout >= 0 else None),
        ("exhausted", "yes" if node.exhausted else None),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def snippet(node: Node) -> str:
    """The first words of a step: its answer, its first comment, or its first line."""
    step = node.step
    if step is None:
        return "question"
    if step.answer is not None:
        return visible(step.answer)[:_SNIPPET_CHARS]
    lines = [line.strip() for line in (step.code or step.text).splitlines() if line.strip()]
    comment = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    rest = next((line for line in lines if not line.startswith("#")), "")
    joined = f"{comment}  {rest}" if comment else rest
    return visible(joined)[:_SNIPPET_CHARS]
