"""Preference pairs of one finished tree: which siblings, which margin. Pure.

Source: rStar-Math (arXiv 2501.04519) section 3.3. At each expanded node

    positives = children with a correct answer at or below them, the `best` highest by Q
    negatives = children with a wrong or failed outcome at or below them, the `worst` lowest by Q
    pairs     = positives x negatives, Q(positive) > Q(negative), weight 1 / (pos * neg)

All four share the identical prefix. For the answer step siblings rarely disagree, so it compares
whole trajectories instead: the `best` correct ones of highest mean Q against the `worst` incorrect
ones of lowest mean Q, one of each distinct program. A tree without both outcomes gives nothing.

What keeps a pair clean, beyond the paper:
- only siblings that a rollout passed through count (an unvisited one has Q = 0 and says nothing;
  a PPM prior alone is no outcome);
- two steps that differ in comments or layout only are one program: such a pair is noise;
- `q_source="terminal"` ranks by the mean reward of the outcomes at or below a child, without the
  PPM prior that Eq. 3 adds, so that a new PPM does not learn the old one's opinion;
- `min_margin=2` with `q_source="terminal"` keeps only "always right" against "always wrong".

Not taken from the released code: four pairs where one side has a single node, and its comparison
of best and worst continuations.

A PPM that learns the Q-values themselves (PQM, Table 8) needs no pairs: `valued_nodes` gives it
every step that a rollout passed through, of every tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rollout.programs import one_per_program, program_of, same_program
from rollout.prompt import PromptTemplate, Step, render_prompt
from rollout.trajectory import Trajectory, trajectories
from rollout.tree import Node, Terminal, Tree

DEEP_STEPS = 2
"""Shared steps from which a pair is deep: its texts have three steps or more."""


class PairKind(StrEnum):
    """What a pair compares."""

    STEP = "step"
    """Two siblings after one shared prefix."""
    ANSWER = "answer"
    """Two whole trajectories of one problem; the prefix is the question."""


class PairConfig(BaseModel):
    """Which siblings and trajectories become preference pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    best: int = Field(2, ge=1, description="Positives per node, highest Q first.")
    worst: int = Field(2, ge=1, description="Negatives per node, lowest Q first.")
    min_margin: float = Field(
        0.0,
        ge=0.0,
        le=2.0,
        description="Least Q(chosen) - Q(rejected); 0 still asks for a difference.",
    )
    min_edit_distance: int = Field(
        0, ge=0, description="Least character edit distance of the two texts after the prefix."
    )
    min_visits: int = Field(
        1, ge=1, description="Least number of outcomes at or below each of the two siblings."
    )
    q_source: Literal["search", "terminal"] = Field(
        "search",
        description="search: Q as the search left it; terminal: mean reward of the outcomes only.",
    )
    distinct_code: bool = Field(
        True, description="Refuse pairs whose code differs in comments or layout only."
    )
    answer_pairs: bool = Field(True, description="Also compare whole trajectories.")


PAIR_PRESETS = {
    "paper": PairConfig(),
    "released": PairConfig(min_margin=0.5, min_edit_distance=20, distinct_code=False),
    "clean": PairConfig(min_margin=1.0, q_source="terminal"),
}
"""Named settings: the paper's text, the released script's thresholds, and a stricter one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """`prefix + chosen` is preferred to `prefix + rejected`."""

    problem_id: str
    level: str
    round: int
    tree_index: int
    node: int
    """Id of the node whose children are compared; 0 for whole trajectories. All pairs of one
    (problem, round, tree, kind, node) share the prefix."""
    kind: PairKind
    shared_steps: int
    """Steps in the prefix; 0 for whole trajectories."""
    prefix: str
    """Rendered question and shared steps."""
    chosen: str
    rejected: str
    chosen_q: float
    rejected_q: float
    weight: float
    """1 / (positives * negatives) of the node, counted before the pair filters."""

    @property
    def margin(self) -> float:
        """Q(chosen) - Q(rejected), in (0, 2]."""
        return self.chosen_q - self.rejected_q


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuedStep:
    """A step and what the search found it to be worth."""

    text: str
    """What follows the prefix of its node."""
    q: float
    """In [-1, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuedNode:
    """The steps after one prefix that rollouts passed through."""

    problem_id: str
    level: str
    round: int
    tree_index: int
    node: int
    prefix: str
    """Rendered question and shared steps."""
    steps: tuple[ValuedStep, ...]


@dataclass(slots=True, kw_only=True)
class _Outcomes:
    """What the terminals at or below a node said."""

    correct: int = 0
    wrong: int = 0
    visits: int = 0
    reward_sum: float = 0.0


def tree_pairs(
    tree: Tree,
    *,
    template: PromptTemplate,
    config: PairConfig,
    ranked: Sequence[Trajectory] | None = None,
) -> list[PreferencePair]:
    """All preference pairs of one tree, in node order; empty without mixed outcomes.

    Args:
        ranked: `trajectories` of the tree, where they are known already.
    """
    below = _outcomes(tree)
    if not below[0].correct or not below[0].wrong:
        return []
    pairs = []
    for node in tree.nodes:
        if node.expanded and below[node.id].correct and below[node.id].wrong:
            pairs += _sibling_pairs(tree, node, below, template, config)
    if config.answer_pairs:
        pairs += _answer_pairs(
            tree, trajectories(tree) if ranked is None else ranked, template, config
        )
    return pairs


def valued_nodes(tree: Tree, *, template: PromptTemplate, config: PairConfig) -> list[ValuedNode]:
    """Every step of a tree with at least `min_visits` outcomes at or below it, by node.

    The Q-value is that of `q_source`, of an answer its reward. Empty where nothing was labelled.
    """
    if not tree.problem.golds:
        return []
    below = _outcomes(tree)
    nodes = []
    for node in tree.nodes:
        steps = tuple(
            ValuedStep(text=child.step.rendered, q=_q_value(child, below, config))
            for child in tree.valid_children(node)
            if child.step is not None and below[child.id].visits >= config.min_visits
        )
        if steps:
            nodes.append(
                ValuedNode(
                    problem_id=tree.problem.id,
                    level=tree.problem.level.value,
                    round=tree.round,
                    tree_index=tree.index,
                    node=node.id,
                    prefix=render_prompt(tree.problem.text, tree.steps(node), template),
                    steps=steps,
                )
            )
    return nodes


def _q_value(child: Node, below: Sequence[_Outcomes], config: PairConfig) -> float:
    if config.q_source == "search":
        return child.q_value
    return below[child.id].reward_sum / below[child.id].visits


def _outcomes(tree: Tree) -> list[_Outcomes]:
    """Outcome counts per node id; children have larger ids than their parents."""
    below = [_Outcomes() for _ in tree.nodes]
    for node in reversed(tree.nodes):
        own = below[node.id]
        if node.terminal is not None and node.discard is None and node.reward is not None:
            own.visits += 1
            own.reward_sum += node.reward
            if node.terminal is not Terminal.ANSWER or node.correct is False:
                own.wrong += 1
            elif node.correct:
                own.correct += 1
        if node.parent >= 0:
            above = below[node.parent]
            above.correct += own.correct
            above.wrong += own.wrong
            above.visits += own.visits
            above.reward_sum += own.reward_sum
    return below


def _sibling_pairs(
    tree: Tree,
    node: Node,
    below: Sequence[_Outcomes],
    template: PromptTemplate,
    config: PairConfig,
) -> list[PreferencePair]:
    def q(child: Node) -> float:
        return _q_value(child, below, config)

    visited = [c for c in tree.valid_children(node) if below[c.id].visits >= config.min_visits]
    best = sorted((c for c in visited if below[c.id].correct), key=lambda c: (-q(c), c.id))
    worst = sorted((c for c in visited if below[c.id].wrong), key=lambda c: (q(c), c.id))
    steps = tree.steps(node)
    prefix = render_prompt(tree.problem.text, steps, template)
    return _cross(
        tree,
        node=node.id,
        kind=PairKind.STEP,
        shared_steps=len(steps),
        prefix=prefix,
        positives=[((c.step,), q(c)) for c in best[: config.best] if c.step is not None],
        negatives=[((c.step,), q(c)) for c in worst[: config.worst] if c.step is not None],
        config=config,
    )


def _answer_pairs(
    tree: Tree, ranked: Sequence[Trajectory], template: PromptTemplate, config: PairConfig
) -> list[PreferencePair]:
    def program(trajectory: Trajectory) -> str:
        return program_of(trajectory.steps)

    correct = one_per_program((t for t in ranked if t.correct), program, config.best)
    wrong = (t for t in reversed(ranked) if t.correct is False)
    incorrect = one_per_program(wrong, program, config.worst)
    return _cross(
        tree,
        node=0,
        kind=PairKind.ANSWER,
        shared_steps=0,
        prefix=render_prompt(tree.problem.text, (), template),
        positives=[(t.steps, t.mean_q) for t in correct],
        negatives=[(t.steps, t.mean_q) for t in incorrect],
        config=config,
    )


def _cross(
    tree: Tree,
    *,
    node: int,
    kind: PairKind,
    shared_steps: int,
    prefix: str,
    positives: Sequence[tuple[tuple[Step, ...], float]],
    negatives: Sequence[tuple[tuple[Step, ...], float]],
    config: PairConfig,
) -> list[PreferencePair]:
    """Every positive against every negative that passes the filters."""
    pairs = []
    for chosen_steps, chosen_q in positives:
        for rejected_steps, rejected_q in negatives:
            margin = chosen_q - rejected_q
            if margin <= 0.0 or margin < config.min_margin:
                continue
            chosen = "".join(step.rendered for step in chosen_steps)
            rejected = "".join(step.rendered for step in rejected_steps)
            if not edit_distance_at_least(chosen, rejected, max(config.min_edit_distance, 1)):
                continue
            if config.distinct_code and same_program(chosen_steps, rejected_steps):
                continue
            pairs.append(
                PreferencePair(
                    problem_id=tree.problem.id,
                    level=tree.problem.level.value,
                    round=tree.round,
                    tree_index=tree.index,
                    node=node,
                    kind=kind,
                    shared_steps=shared_steps,
                    prefix=prefix,
                    chosen=chosen,
                    rejected=rejected,
                    chosen_q=chosen_q,
                    rejected_q=rejected_q,
                    weight=1.0 / (len(positives) * len(negatives)),
                )
            )
    return pairs


def deep_share(step_pairs: Mapping[str, int]) -> float | None:
    """Share of step pairs behind two or more shared steps; None where there is no pair.

    Args:
        step_pairs: shared steps -> pairs, as a dataset's manifest counts them.
    """
    total = sum(step_pairs.values())
    deep = sum(count for steps, count in step_pairs.items() if int(steps) >= DEEP_STEPS)
    return deep / total if total else None


def edit_distance_at_least(left: str, right: str, bound: int) -> bool:
    """True if the Levenshtein distance of two texts is >= `bound`; O(bound * length)."""
    if abs(len(left) - len(right)) >= bound:
        return True
    if bound <= 1:
        return left != right
    left, right = _without_common_ends(left, right)
    if not left or not right:
        return max(len(left), len(right)) >= bound
    # Only a band of cells around the diagonal can hold a distance below the bound.
    width = bound - 1
    above = [min(j, bound) for j in range(len(right) + 1)]
    for i, char in enumerate(left, start=1):
        first, last = max(1, i - width), min(len(right), i + width)
        row = [bound] * (len(right) + 1)
        row[0] = min(i, bound)
        for j in range(first, last + 1):
            best = above[j - 1] + (char != right[j - 1])
            if above[j] < best:
                best = above[j] + 1
            if row[j - 1] < best:
                best = row[j - 1] + 1
            row[j] = best
        if min(row[first - 1 : last + 1]) >= bound:
            return True
        above = row
    return above[len(right)] >= bound


def _without_common_ends(left: str, right: str) -> tuple[str, str]:
    """Both texts without their common prefix and suffix, which cost no edits."""
    start = 0
    limit = min(len(left), len(right))
    while start < limit and left[start] == right[start]:
        start += 1
    stop = 0
    while stop < limit - start and left[-1 - stop] == right[-1 - stop]:
        stop += 1
    return left[start : len(left) - stop], right[start : len(right) - stop]
