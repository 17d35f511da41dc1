"""Trees in, training files out: which trajectories and pairs a round trains on.

    trees (any rounds) --> per problem: correct trajectories, one per program, best mean Q first
                       |     --> `trajectories_per_problem` of them  --> sft_{train,validation}
                       +-> preference pairs of each tree             --> pairs_{train,validation}
    demonstrations     --> repeated                                  --> sft_train

The split is by problem: a hash of the problem id says "validation", the same in every round. A
validation problem is neither in the policy's nor in the PPM's training data, so a PPM whose trunk
is that policy is judged on problems its weights never met. (A trunk that was fine-tuned on the
accepted solutions of the same problems ranks their steps by memory.)

A round is never held in memory. `select_dataset` streams trees, keeps what each may give in a sort
on disk (`learner.spill`) and then sees one problem after the other, all its trees together:

    trees --candidates of each--> sorted by problem id on disk --one problem--> row groups

Not covered: one problem whose trees do not fit into memory; demonstrations are held.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from learner.dataset import Demonstration, SFTExample, unusable, writing_dataset
from learner.pairs import PairConfig, PreferencePair, program_key, tree_pairs
from learner.spill import SortedSpill
from rollout.problem import Problem
from rollout.prompt import PromptTemplate, Step, render_segments
from rollout.trajectory import Trajectory, trajectories
from rollout.tree import Tree


class DatasetConfig(BaseModel):
    """How trees become training data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trajectories_per_problem: int = Field(
        2, ge=1, description="Correct trajectories kept per problem, highest mean Q first."
    )
    validation_share: float = Field(
        0.05, ge=0.0, lt=1.0, description="Share of the problems no model is trained on."
    )
    split_seed: int = Field(0, description="Which problems those are; keep it for a whole run.")
    synthetic_sources: tuple[str, ...] = Field(
        (), description="Problem sources whose reference answers may be wrong."
    )
    min_synthetic_accuracy: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Problems of synthetic sources answered right less often than this are left "
        "out as mislabelled.",
    )
    demonstration_repeat: int = Field(
        1, ge=0, description="How often each demonstration enters the policy's data."
    )
    pairs: PairConfig = Field(default_factory=PairConfig, description="Preference pairs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What training takes of one problem."""

    held_out: bool
    """True: the problem judges the models and never trains them."""
    trajectories: list[Trajectory]
    """For the policy, best first; none where no answer is correct, or the problem is left out as
    mislabelled."""
    pairs: list[PreferencePair]
    """For the PPM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one tree may give."""

    problem: Problem
    round: int
    tree_index: int
    answered: int
    correct: int
    programs: dict[bytes, Trajectory]
    """Digest of a program -> the tree's best correct trajectory that holds it."""
    pairs: tuple[PreferencePair, ...]
    excluded: Counter[str]
    """Reason -> correct trajectories and pairs that no dataset can hold."""


def is_validation(problem_id: str, config: DatasetConfig) -> bool:
    """True if a problem is held out from all training; depends on the id and `split_seed` only."""
    digest = hashlib.sha256(f"{config.split_seed}:{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < config.validation_share


def select_dataset(
    trees: Iterable[Tree],
    directory: str | Path,
    *,
    template: PromptTemplate,
    config: DatasetConfig,
    demonstrations: Sequence[Demonstration] = (),
    info: Mapping[str, Any] | None = None,
    memory_bytes: int = 64 << 20,
) -> dict[str, Any]:
    """Write what to train on as a dataset; what was there before is replaced.

    Args:
        trees: finished trees of one or several rounds, each once, in any order; the files do not
            depend on the order.
        directory: gets the dataset; meanwhile its disk holds what all trees may give as well.
        memory_bytes: held at a time of what trees may give.
    Returns:
        The manifest. Its `counts` are level (and "all") -> name -> count, of problems, solved,
        trees, trajectories_correct, trajectories_kept, sft_train, sft_validation, demonstrations,
        pairs_train, pairs_validation; its `excluded` are level -> reason -> count: of problems
        unsolved, low_accuracy; of correct trajectories and demonstrations empty, unrenderable (a
        lone surrogate, which no file can hold), of trajectories same_program, beyond_top; of pairs
        empty_pair, unrenderable_pair, duplicate_pair, contradicted_pair, low_accuracy_pair.
    Raises:
        DatasetError: the disk is full.
    """
    directory = Path(directory)
    selection = _Selection(config)
    with writing_dataset(directory) as writer:
        with SortedSpill[_Found](directory, memory_bytes=memory_bytes) as spill:
            for tree in trees:
                found = _found(tree, template, config)
                spill.add((tree.problem.id, *_tree_order(found)), found)
            for _, members in groupby(spill, key=lambda found: found.problem.id):
                chosen = selection.choose(list(members))
                split = "validation" if chosen.held_out else "train"
                for trajectory in chosen.trajectories:
                    writer.add(f"sft_{split}", _example(trajectory, template))
                for pair in chosen.pairs:
                    writer.add(f"pairs_{split}", pair)
        for example in selection.demonstrations(demonstrations, template):
            writer.add("sft_train", example)
        return writer.commit(
            template=template.name,
            counts=_with_total(selection.counts),
            excluded=_with_total(selection.excluded),
            info=info,
        )


def choose_of_problem(
    trees: Iterable[Tree], *, template: PromptTemplate, config: DatasetConfig
) -> Chosen:
    """What `select_dataset` takes of one problem, given all its trees (at least one)."""
    found = (_found(tree, template, config) for tree in trees)
    return _Selection(config).choose(sorted(found, key=_tree_order))


def _found(tree: Tree, template: PromptTemplate, config: DatasetConfig) -> _Found:
    """What a tree may give, before the other trees of its problem are known."""
    judged = [t for t in trajectories(tree) if t.correct is not None]
    correct = [t for t in judged if t.correct]
    excluded: Counter[str] = Counter()
    programs: dict[bytes, Trajectory] = {}
    for trajectory in correct:
        reason = _unusable(tree.problem.text, trajectory.steps, template)
        if reason is not None:
            excluded[reason] += 1
            continue
        key = hashlib.sha256(program_key(trajectory.steps).encode(errors="replace")).digest()
        programs[key] = min(programs.get(key, trajectory), trajectory, key=_rank)
    pairs = []
    for pair in tree_pairs(tree, template=template, config=config.pairs):
        sides = pair.chosen, pair.rejected
        reason = unusable([pair.prefix, *sides], trained=sides)
        if reason is None:
            pairs.append(pair)
        else:
            excluded[f"{reason}_pair"] += 1
    return _Found(
        problem=tree.problem,
        round=tree.round,
        tree_index=tree.index,
        answered=len(judged),
        correct=len(correct),
        programs=programs,
        pairs=tuple(pairs),
        excluded=excluded,
    )


def _unusable(question: str, steps: Sequence[Step], template: PromptTemplate) -> str | None:
    """As `unusable`, of a solution."""
    segments = render_segments(question, steps, template)
    written = "".join(segment.text for segment in segments if segment.trained)
    return unusable([segment.text for segment in segments], trained=[written])


def _tree_order(found: _Found) -> tuple[int, int]:
    return found.round, found.tree_index


class _Selection:
    """Chooses among what the trees of a problem may give, one problem after the other."""

    def __init__(self, config: DatasetConfig) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.excluded: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._config = config

    def choose(self, members: Sequence[_Found]) -> Chosen:
        """What to take of the problem of some trees, which are all it has, in `_tree_order`."""
        config, problem = self._config, members[0].problem
        level = problem.level.value
        counts, excluded = self.counts[level], self.excluded[level]
        held_out = is_validation(problem.id, config)
        split = "validation" if held_out else "train"
        counts["problems"] += 1
        counts["trees"] += len(members)
        answered = sum(found.answered for found in members)
        correct = sum(found.correct for found in members)
        # The best trajectory of each program over all trees.
        programs: dict[bytes, Trajectory] = {}
        for found in members:
            excluded.update(found.excluded)
            for key, trajectory in found.programs.items():
                programs[key] = min(programs.get(key, trajectory), trajectory, key=_rank)
        if correct:
            counts["trajectories_correct"] += correct
        usable = correct - sum(f.excluded["empty"] + f.excluded["unrenderable"] for f in members)
        if usable > len(programs):
            excluded["same_program"] += usable - len(programs)
        kept: list[Trajectory] = []
        # A made problem answered right so rarely that its reference must be wrong.
        mislabelled = (
            bool(programs)
            and problem.source in config.synthetic_sources
            and correct < config.min_synthetic_accuracy * answered
        )
        if correct:
            counts["solved"] += 1
        else:
            excluded["unsolved"] += 1
        if mislabelled:
            excluded["low_accuracy"] += 1
        elif programs:
            kept = sorted(programs.values(), key=_rank)[: config.trajectories_per_problem]
            counts["trajectories_kept"] += len(kept)
            excluded["beyond_top"] += len(programs) - len(kept)
            counts[f"sft_{split}"] += len(kept)
        pairs = []
        for pair in _consistent([p for found in members for p in found.pairs], self.excluded):
            if mislabelled:
                self.excluded[pair.level]["low_accuracy_pair"] += 1
            else:
                pairs.append(pair)
                self.counts[pair.level][f"pairs_{split}"] += 1
        return Chosen(held_out=held_out, trajectories=kept, pairs=pairs)

    def demonstrations(
        self, demonstrations: Iterable[Demonstration], template: PromptTemplate
    ) -> Iterator[SFTExample]:
        """Each as often as it is to be repeated."""
        repeat = self._config.demonstration_repeat
        for demonstration in demonstrations:
            counts = self.counts[demonstration.level]
            counts["demonstrations"] += 1
            reason = _unusable(demonstration.problem, demonstration.steps, template)
            if reason is not None:
                self.excluded[demonstration.level][reason] += 1
                continue
            counts["sft_train"] += repeat
            segments = render_segments(demonstration.problem, demonstration.steps, template)
            example = SFTExample(
                problem_id=demonstration.id,
                level=demonstration.level,
                origin="demonstration",
                round=-1,
                mean_q=1.0,
                segments=tuple(segments),
            )
            yield from [example] * repeat


def _rank(trajectory: Trajectory) -> tuple[float, float, int, int, int]:
    """Best first: mean Q, then min Q, then the later round; the rest makes the order total."""
    return (
        -trajectory.mean_q,
        -trajectory.min_q,
        -trajectory.round,
        trajectory.tree_index,
        trajectory.node,
    )


def _example(trajectory: Trajectory, template: PromptTemplate) -> SFTExample:
    return SFTExample(
        problem_id=trajectory.problem.id,
        level=trajectory.problem.level.value,
        origin="tree",
        round=trajectory.round,
        mean_q=trajectory.mean_q,
        segments=tuple(render_segments(trajectory.problem.text, trajectory.steps, template)),
    )


def _consistent(
    pairs: Sequence[PreferencePair], excluded: Mapping[str, Counter[str]]
) -> list[PreferencePair]:
    """Pairs in a fixed order, without repetitions and without those another tree turned round."""
    ordered = sorted(
        pairs, key=lambda p: (p.problem_id, p.round, p.tree_index, p.kind, p.node, -p.margin)
    )
    known = {(p.problem_id, p.prefix, p.chosen, p.rejected) for p in ordered}
    kept, seen = [], set()
    for pair in ordered:
        key = (pair.problem_id, pair.prefix, pair.chosen, pair.rejected)
        if (pair.problem_id, pair.prefix, pair.rejected, pair.chosen) in known:
            excluded[pair.level]["contradicted_pair"] += 1
        elif key in seen:
            excluded[pair.level]["duplicate_pair"] += 1
        else:
            seen.add(key)
            kept.append(pair)
    return kept


def _with_total(counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    total: Counter[str] = Counter()
    for level in counts.values():
        total.update(level)
    return {
        **{level: dict(sorted(counts[level].items())) for level in sorted(counts)},
        "all": dict(sorted(total.items())),
    }
