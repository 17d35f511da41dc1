"""Trees in, training files out: which trajectories and pairs a round trains on.

    trees of `sft_rounds`  --> per problem: correct trajectories, one per program, best mean Q first
                             --> `trajectories_per_problem` of them  --> sft_{train,validation}
    trees of `pair_rounds` --> preference pairs of each tree         --> pairs_{train,validation}
    demonstrations         --> repeated                              --> sft_train

Which rounds matters more than how they are ranked. Q-values of two rounds do not compare: without
a PPM every step of a path that was tried once and was right has Q = 1, with one it is (PPM + 1) / 2
(Eq. 3), so by mean Q alone what round 1 found would be trained on for ever. The paper's later
rounds are better because they train on what a better search found; therefore a problem's
trajectories are those of the newest round that solved it. Pairs are those of this round:
they show what the present policy gets wrong, judged by as many rollouts as this round has.

The split is by problem: a hash of its id says "validation", the same in every round. A variation of
another problem (a rewording) goes where that one goes. A validation problem is neither in the
policy's nor in the PPM's training data, so a PPM whose trunk is that policy is judged on problems
its weights never met. (A trunk that was fine-tuned on the accepted solutions of the same problems
ranks their steps by memory.)

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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from learner.dataset import Demonstration, SFTExample, unusable, writing_dataset
from learner.pairs import (
    PairConfig,
    PairKind,
    PreferencePair,
    ValuedNode,
    tree_pairs,
    valued_nodes,
)
from learner.spill import SortedSpill
from rollout.difficulty import difficulty_of, right_share
from rollout.problem import Problem
from rollout.programs import program_of
from rollout.prompt import PromptTemplate, Step, render_segments
from rollout.trajectory import Trajectory, trajectories
from rollout.tree import Node, Tree

_MANY_VISITS = 5
"""Nodes with so many visits are counted together."""

Rounds = Literal["all", "newest_solved", "this"]


class DatasetConfig(BaseModel):
    """How trees become training data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trajectories_per_problem: int = Field(
        2, ge=1, description="Correct trajectories kept per problem, highest mean Q first."
    )
    sft_rounds: Rounds = Field(
        "newest_solved",
        description="Rounds whose trajectories the policy is trained on. newest_solved: of each "
        "problem the newest round that solved it; this: the newest round alone; all: every round "
        "so far, though their Q-values do not compare.",
    )
    pair_rounds: Rounds = Field(
        "this",
        description="Rounds whose trees give the PPM its pairs; as sft_rounds. all: more pairs, "
        "of earlier policies too, where a round has few.",
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
        description="Problems of synthetic sources that the policy answers right less often than "
        "this, in the newest round with an answer, are left out as mislabelled.",
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
    nodes: list[ValuedNode]
    """For a PPM that learns Q-values; none of a held-out problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one tree may give."""

    problem: Problem
    round: int
    tree_index: int
    answered: int
    correct: int
    right_share: float | None
    programs: dict[bytes, Trajectory]
    """Digest of a program -> the tree's best correct trajectory that holds it."""
    pairs: tuple[PreferencePair, ...]
    nodes: tuple[ValuedNode, ...]
    visits: Counter[str]
    """Rollouts that went through an inner node ("1" to "4", or "5+") -> how many such nodes."""
    excluded: Counter[str]
    """Reason -> correct trajectories that no dataset can hold."""
    excluded_pairs: Counter[str]


def is_validation(original: str, config: DatasetConfig) -> bool:
    """True if a problem is held out from all training.

    Args:
        original: `Problem.original`; beside it the result depends on `split_seed` only.
    """
    digest = hashlib.sha256(f"{config.split_seed}:{original}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < config.validation_share


def select_dataset(
    trees: Iterable[Tree],
    directory: str | Path,
    *,
    template: PromptTemplate,
    config: DatasetConfig,
    demonstrations: Sequence[Demonstration] = (),
    valued_steps: bool = False,
    info: Mapping[str, Any] | None = None,
    memory_bytes: int = 64 << 20,
) -> dict[str, Any]:
    """Write what to train on as a dataset; what was there before is replaced.

    Args:
        trees: finished trees of one or several rounds, each once, in any order; the files do not
            depend on the order. The newest round among them is "this" one.
        directory: gets the dataset; meanwhile its disk holds what all trees may give as well.
        valued_steps: also write every step of `pair_rounds` with its Q-value, for objective
            q_regression: about as much again as all the rest.
        memory_bytes: held at a time of what trees may give.
    Returns:
        The manifest. Its `counts` are level (and "all") -> name -> count, of problems, solved,
        trees, trajectories_correct, trajectories_kept, sft_train, sft_validation, demonstrations,
        pairs_train, pairs_validation, steps_train; its `excluded` are level -> reason -> count: of
        problems unsolved, solved_earlier (but not in `sft_rounds`), low_accuracy; of correct
        trajectories other_round, same_program, beyond_top; of these and of demonstrations empty,
        unrenderable (a lone surrogate, which no file can hold); of pairs other_round_pair,
        duplicate_pair, contradicted_pair, low_accuracy_pair, empty_pair, unrenderable_pair.
        `origins` are file -> round -> rows that its trees gave, demonstrations left out;
        `newest_round_share` the share of this round in those of sft_train, None if there are none;
        `difficulty` is level -> class -> problems, as this round's trees found them; `shape` is
        `step_pairs` (round -> shared steps -> step pairs taken) and `node_visits` (round -> visits
        -> inner nodes below the root of all trees given).
    Raises:
        DatasetError: the disk is full.
    """
    directory = Path(directory)
    with writing_dataset(directory) as writer:
        with SortedSpill[_Found](directory, memory_bytes=memory_bytes) as spill:
            newest = -1
            for tree in trees:
                found = _found(tree, template, config, valued_steps=valued_steps)
                newest = max(newest, tree.round)
                spill.add((tree.problem.id, *_tree_order(found)), found)
            selection = _Selection(config, newest)
            for _, members in groupby(spill, key=lambda found: found.problem.id):
                chosen = selection.choose(list(members))
                split = "validation" if chosen.held_out else "train"
                for trajectory in chosen.trajectories:
                    writer.add(f"sft_{split}", _example(trajectory, template))
                for pair in chosen.pairs:
                    writer.add(f"pairs_{split}", pair)
                for node in chosen.nodes:
                    writer.add("steps_train", node)
        for example in selection.demonstrations(demonstrations, template):
            writer.add("sft_train", example)
        return writer.commit(
            template=template.name,
            counts=_with_total(selection.counts),
            excluded=_with_total(selection.excluded),
            facts=selection.rounds() | {"shape": selection.shape()},
            info=info,
        )


def choose_of_problem(
    trees: Iterable[Tree], *, template: PromptTemplate, config: DatasetConfig
) -> Chosen:
    """What `select_dataset` takes of one problem, given all its trees (at least one)."""
    found = sorted((_found(tree, template, config) for tree in trees), key=_tree_order)
    return _Selection(config, found[-1].round).choose(found)


def _found(
    tree: Tree, template: PromptTemplate, config: DatasetConfig, *, valued_steps: bool = False
) -> _Found:
    """What a tree may give, before the other trees of its problem are known."""
    judged = [t for t in trajectories(tree) if t.correct is not None]
    correct = [t for t in judged if t.correct]
    excluded: Counter[str] = Counter()
    excluded_pairs: Counter[str] = Counter()
    programs: dict[bytes, Trajectory] = {}
    for trajectory in correct:
        reason = _unusable(tree.problem.text, trajectory.steps, template)
        if reason is not None:
            excluded[reason] += 1
            continue
        key = hashlib.sha256(program_of(trajectory.steps).encode(errors="replace")).digest()
        programs[key] = min(programs.get(key, trajectory), trajectory, key=_rank)
    pairs = []
    for pair in tree_pairs(tree, template=template, config=config.pairs):
        sides = pair.chosen, pair.rejected
        reason = unusable([pair.prefix, *sides], trained=sides)
        if reason is None:
            pairs.append(pair)
        else:
            excluded_pairs[f"{reason}_pair"] += 1
    nodes: list[ValuedNode] = []
    for node in valued_nodes(tree, template=template, config=config.pairs) if valued_steps else ():
        texts = [step.text for step in node.steps]
        if unusable([node.prefix, *texts], trained=texts) is None:
            nodes.append(node)
    return _Found(
        problem=tree.problem,
        round=tree.round,
        tree_index=tree.index,
        answered=len(judged),
        correct=len(correct),
        right_share=right_share(tree),
        programs=programs,
        pairs=tuple(pairs),
        nodes=tuple(nodes),
        visits=Counter(
            _visits(node) for node in tree.nodes[1:] if node.expanded and node.num_passes
        ),
        excluded=excluded,
        excluded_pairs=excluded_pairs,
    )


def _visits(node: Node) -> str:
    count = node.num_passes
    return str(count) if count < _MANY_VISITS else f"{_MANY_VISITS}+"


def _unusable(question: str, steps: Sequence[Step], template: PromptTemplate) -> str | None:
    """As `unusable`, of a solution."""
    segments = render_segments(question, steps, template)
    written = "".join(segment.text for segment in segments if segment.trained)
    return unusable([segment.text for segment in segments], trained=[written])


def _tree_order(found: _Found) -> tuple[int, int]:
    return found.round, found.tree_index


class _Selection:
    """Chooses among what the trees of a problem may give, one problem after the other."""

    def __init__(self, config: DatasetConfig, newest: int) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.excluded: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.difficulty: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.origins: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.step_pairs: defaultdict[int, Counter[int]] = defaultdict(Counter)
        """Round -> shared steps -> step pairs taken."""
        self.node_visits: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._config = config
        self._newest = newest

    def choose(self, members: Sequence[_Found]) -> Chosen:
        """What to take of the problem of some trees, which are all it has, in `_tree_order`."""
        config, problem = self._config, members[0].problem
        level = problem.level.value
        counts, excluded = self.counts[level], self.excluded[level]
        held_out = is_validation(problem.original, config)
        split = "validation" if held_out else "train"
        counts["problems"] += 1
        counts["trees"] += len(members)
        self._classify(members)
        for found in members:
            self.node_visits[found.round].update(found.visits)
        of_sft = self._of_rounds(members, config.sft_rounds)
        everywhere = sum(found.correct for found in members)
        correct = sum(found.correct for found in of_sft)
        # The best trajectory of each program over all trees.
        programs: dict[bytes, Trajectory] = {}
        for found in of_sft:
            excluded.update(found.excluded)
            for key, trajectory in found.programs.items():
                programs[key] = min(programs.get(key, trajectory), trajectory, key=_rank)
        if everywhere:
            counts["trajectories_correct"] += everywhere
        if everywhere > correct:
            excluded["other_round"] += everywhere - correct
        usable = correct - sum(f.excluded["empty"] + f.excluded["unrenderable"] for f in of_sft)
        if usable > len(programs):
            excluded["same_program"] += usable - len(programs)
        kept: list[Trajectory] = []
        # A made problem answered right so rarely that its reference must be wrong.
        mislabelled = (
            everywhere > 0
            and problem.source in config.synthetic_sources
            and _accuracy(members) < config.min_synthetic_accuracy
        )
        if everywhere:
            counts["solved"] += 1
        if mislabelled:
            excluded["low_accuracy"] += 1
        elif programs:
            kept = sorted(programs.values(), key=_rank)[: config.trajectories_per_problem]
            counts["trajectories_kept"] += len(kept)
            excluded["beyond_top"] += len(programs) - len(kept)
            counts[f"sft_{split}"] += len(kept)
            self.origins[f"sft_{split}"].update(t.round for t in kept)
        elif not everywhere:
            excluded["unsolved"] += 1
        elif not correct:
            excluded["solved_earlier"] += 1
        of_pairs = self._of_rounds(members, config.pair_rounds)
        for found in of_pairs:
            excluded.update(found.excluded_pairs)
        found_pairs = [pair for found in of_pairs for pair in found.pairs]
        left_out = sum(len(found.pairs) for found in members) - len(found_pairs)
        if left_out:
            excluded["other_round_pair"] += left_out
        pairs = _consistent(found_pairs, excluded)
        if pairs and mislabelled:
            excluded["low_accuracy_pair"] += len(pairs)
            pairs = []
        if pairs:
            counts[f"pairs_{split}"] += len(pairs)
            self.origins[f"pairs_{split}"].update(pair.round for pair in pairs)
            for pair in pairs:
                if pair.kind is PairKind.STEP:
                    self.step_pairs[pair.round][pair.shared_steps] += 1
        trains = not held_out and not mislabelled
        nodes = [node for found in of_pairs for node in found.nodes if trains]
        if nodes:
            counts["steps_train"] += sum(len(node.steps) for node in nodes)
            for node in nodes:
                self.origins["steps_train"][node.round] += 1
        return Chosen(held_out=held_out, trajectories=kept, pairs=pairs, nodes=nodes)

    def _of_rounds(self, members: Sequence[_Found], rounds: Rounds) -> Sequence[_Found]:
        """The trees of a problem that may be used."""
        if rounds == "all":
            return members
        number = self._newest
        if rounds == "newest_solved":
            number = max((found.round for found in members if found.correct), default=-1)
        return [found for found in members if found.round == number]

    def _classify(self, members: Sequence[_Found]) -> None:
        """Count how hard the problem of some trees was in the newest round."""
        problem = members[0].problem
        of_round = [
            (found.tree_index, found.correct, found.answered)
            for found in members
            if found.round == self._newest
        ]
        if of_round and problem.golds:
            self.difficulty[problem.level.value][difficulty_of(of_round).value] += 1

    def rounds(self) -> dict[str, Any]:
        """What the manifest says of the rounds."""
        sft = self.origins["sft_train"]
        return {
            "newest_round_share": sft[self._newest] / sft.total() if sft.total() else None,
            "origins": {
                name: {str(number): count for number, count in sorted(rows.items())}
                for name, rows in sorted(self.origins.items())
                if rows.total()
            },
            "difficulty": _with_total(self.difficulty),
        }

    def shape(self) -> dict[str, Any]:
        """What the manifest says of the form of the trees."""
        return {
            "step_pairs": _by_round(self.step_pairs),
            "node_visits": _by_round(self.node_visits),
        }

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


def _accuracy(members: Sequence[_Found]) -> float:
    """How often the policy is right in the newest round with an answer: the mean over its trees."""
    graded = [(found.round, found.right_share) for found in members]
    newest = max(number for number, share in graded if share is not None)
    shares = [share for number, share in graded if number == newest and share is not None]
    return sum(shares) / len(shares)


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


def _consistent(pairs: Sequence[PreferencePair], excluded: Counter[str]) -> list[PreferencePair]:
    """Pairs of a problem in a fixed order, without repetitions and without those another tree
    turned round."""
    ordered = sorted(
        pairs, key=lambda p: (p.problem_id, p.round, p.tree_index, p.kind, p.node, -p.margin)
    )
    known = {(p.problem_id, p.prefix, p.chosen, p.rejected) for p in ordered}
    kept, seen = [], set()
    for pair in ordered:
        key = (pair.problem_id, pair.prefix, pair.chosen, pair.rejected)
        if (pair.problem_id, pair.prefix, pair.rejected, pair.chosen) in known:
            excluded["contradicted_pair"] += 1
        elif key in seen:
            excluded["duplicate_pair"] += 1
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


def _by_round(
    counts: Mapping[int, Counter[int]] | Mapping[int, Counter[str]],
) -> dict[str, dict[str, int]]:
    """As JSON has it, in order."""
    return {
        str(round_): {str(key): count for key, count in sorted(counts[round_].items())}
        for round_ in sorted(counts)
    }
