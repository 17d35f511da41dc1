"""A search tree as plain data: a flat list of nodes with integer parents, `nodes[0]` the root.

Only `expand` and `backup` change the counts and shape of a tree. Every candidate is kept, valid or
not: an invalid one is a node with a `discard` reason and no visits, never selected.

    expand: OPEN -> EXPANDED with children, or -> TERMINAL when no valid child came
    backup: N += 1, q += reward along a root-to-terminal path  (arXiv 2501.04519, Eq. 2)

A search that was interrupted goes on from its tree alone: the tree changes by whole expansions and
whole backups, and says what it was searched with.

A node that was given a PPM value starts at N = 1, q = value (Eq. 3: q(s)^0 = PPM(s); counting it as
one visit keeps Q = q/N inside [-1, 1], as the released code does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from rollout.problem import Problem
from rollout.prompt import Step, StepKind


class Terminal(StrEnum):
    """Why no step can follow a node."""

    ANSWER = "answer"
    TOO_DEEP = "too_deep"
    NO_VALID_CHILD = "no_valid_child"
    PROMPT_TOO_LONG = "prompt_too_long"
    CODE_ERROR = "code_error"
    """Only with the released rule that keeps failing candidates as leaves."""


class Outcome(StrEnum):
    """What a search found, for counts and reports."""

    SOLVED = "solved"
    """Some answer that a rollout reached was judged correct."""
    UNSOLVED = "unsolved"
    """It reached answers, none of them correct."""
    NO_ANSWER = "no_answer"
    """No rollout reached an answer."""
    UNLABELLED = "unlabelled"
    """The problem has no accepted answer to compare with."""


class Discard(StrEnum):
    """Why a candidate did not become a selectable child."""

    UNFINISHED = "unfinished"
    """No end marker: cut by length or end of sequence."""
    EMPTY = "empty"
    CODE_FAILED = "code_failed"
    """Its code raised, timed out or broke a limit; see `execution_status`."""
    NO_ANSWER = "no_answer"
    """An answer step without a readable answer."""
    OUT_OF_PLACE = "out_of_place"
    """It does not open as the grammar asks: `<code>` the first step, `<answer>` an answer; or it is
    code after the code was closed, where only the answer can follow."""
    REPETITIVE = "repetitive"
    """Its text ends in the same passage over and over."""
    NOT_KEPT = "not_kept"
    """Dropped by the released rule that keeps only the first answer of an expansion."""


@dataclass(slots=True)
class Node:
    """One candidate step and what became of it. `nodes[0]` is the root and has no step.

    May be given by position, for `rollout.table`: millions are read, and names cost half of it.
    """

    id: int
    parent: int
    """-1 for the root."""
    depth: int
    """Number of steps from the root; 0 for the root."""
    step: Step | None
    multiplicity: int = 1
    """How many candidates of the expansion this node stands for: identical ones, and answers that
    say the same."""
    num_tokens: int = 0
    """Generated tokens of all these candidates together."""
    logprob: float | None = None
    rollout: int = -1
    """Rollout (0-based) in which the node was created; -1 for the root."""
    discard: Discard | None = None
    """None: valid."""
    terminal: Terminal | None = None
    execution_status: str = ""
    """Status of the sandbox ("ok", "error", ...); "" where no code ran."""
    execution_error: str = ""
    stdout: str = ""
    value: float | None = None
    """PPM value in [-1, 1]; None: not scored."""
    reward: float | None = None
    """Of a terminal: what `backup` gives to its path."""
    correct: bool | None = None
    """Verdict on the answer; None: no answer, or not graded."""
    verdict: str = ""
    """The grader's reason."""
    visit_count: int = 0
    value_sum: float = 0.0
    children: tuple[int, ...] = ()
    """Ids of all candidates of this node's expansion, discarded ones included, ascending."""
    expanded: bool = False
    exhausted: bool = False
    """True: no unvisited terminal and no open node is left below; never selected again."""

    @property
    def q_value(self) -> float:
        """Q = q / N; 0 for an unvisited node."""
        return self.value_sum / self.visit_count if self.visit_count else 0.0

    @property
    def num_passes(self) -> int:
        """Rollouts that went through the node: its visits without the one a PPM value counts as."""
        if self.value is None or self.terminal is Terminal.ANSWER:
            return self.visit_count
        return self.visit_count - 1


@dataclass(slots=True, kw_only=True)
class Tree:
    """All candidates of one search of one problem, and what it cost."""

    problem: Problem
    round: int
    index: int = 0
    """Number of this tree among the trees of the problem in the round (escalation adds trees)."""
    seed: int = 0
    policy_version: str = ""
    preference_version: str = ""
    grader_version: str = ""
    nodes: list[Node] = field(default_factory=list)
    num_rollouts: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    scored_tokens: int = 0
    num_requests: int = 0
    """Requests to the policy; one carries all candidates of an expansion."""
    num_executions: int = 0
    """Step codes sent to the sandbox, identical siblings counted once, replays left out."""
    generate_s: float = 0.0
    """Seconds awaited for the policy, summed over expansions, which may overlap; so the next."""
    execute_s: float = 0.0
    """For the sandbox, replays included."""
    grade_s: float = 0.0
    """For verdicts on answers."""
    evaluate_s: float = 0.0
    """For the PPM."""
    seconds: float = 0.0
    """From the start of the search to its end, interruptions left out."""
    search_config: str = ""
    """The effective `SearchConfig` as JSON, its budgets included; of the last search of several."""
    note: str = ""
    """Why the search ended early, if it did; "" otherwise."""

    def __post_init__(self) -> None:
        if not self.nodes:
            self.nodes.append(Node(id=0, parent=-1, depth=0, step=None))

    @property
    def root(self) -> Node:
        return self.nodes[0]

    def valid_children(self, node: Node) -> list[Node]:
        """Children a search may select, in generation order."""
        nodes = self.nodes
        return [nodes[i] for i in node.children if nodes[i].discard is None]

    def path(self, node: Node) -> list[Node]:
        """Nodes from the root (included) to `node` (included)."""
        nodes = [node]
        while nodes[-1].parent >= 0:
            nodes.append(self.nodes[nodes[-1].parent])
        nodes.reverse()
        return nodes

    def steps(self, node: Node) -> list[Step]:
        """Steps from the root to `node`."""
        return [n.step for n in self.path(node) if n.step is not None]

    def answers(self) -> Iterator[Node]:
        """Terminal nodes that hold an answer, in creation order."""
        return (n for n in self.nodes if n.terminal is Terminal.ANSWER)

    def reached_answers(self) -> Iterator[Node]:
        """Answers that a rollout ended at, in creation order; the others were never tried."""
        return (n for n in self.answers() if n.visit_count)

    @property
    def solved(self) -> bool:
        """True if the search found a right answer: what coverage, escalation, difficulty and
        training data go by."""
        return self.outcome is Outcome.SOLVED

    @property
    def outcome(self) -> Outcome:
        """What the search found."""
        if not self.problem.golds:
            return Outcome.UNLABELLED
        return outcome_of(n.correct for n in self.reached_answers())


def outcome_of(verdicts: Iterable[bool | None]) -> Outcome:
    """What the search of a labelled problem found.

    Args:
        verdicts: on the answers that rollouts reached.
    """
    found = list(verdicts)
    if any(found):
        return Outcome.SOLVED
    return Outcome.UNSOLVED if found else Outcome.NO_ANSWER


def expand(tree: Tree, node: Node, candidates: Iterable[Node]) -> None:
    """Attach all candidates of one expansion and set their ids.

    Candidates come with parent, depth and id unset (-1); a candidate with a PPM `value` and no
    `reward` starts at N = 1, q = value (Eq. 3).

    Raises:
        ValueError: the node is terminal, discarded or already expanded.
    """
    if node.terminal is not None or node.discard is not None or node.expanded:
        raise ValueError(f"node {node.id} of problem {tree.problem.id} cannot be expanded")
    first = len(tree.nodes)
    for child in candidates:
        child.id = len(tree.nodes)
        child.parent = node.id
        child.depth = node.depth + 1
        if child.value is not None and child.discard is None and child.terminal is None:
            child.visit_count, child.value_sum = 1, child.value
        tree.nodes.append(child)
    node.children = tuple(range(first, len(tree.nodes)))
    node.expanded = True


def backup(tree: Tree, leaf: Node, reward: float, *, leaf_only: bool = False) -> None:
    """Add a terminal's reward to its path: q += reward, N += 1 (Eq. 2).

    Args:
        leaf: a terminal node.
        reward: +1 or -1 from the verifier, or the PPM value at test time.
        leaf_only: the released rule for failures: ancestors do not learn of them.
    Raises:
        ValueError: the leaf is not terminal, or the reward is not in [-1, 1].
    """
    if leaf.terminal is None:
        raise ValueError(f"node {leaf.id} of problem {tree.problem.id} is not terminal")
    if not -1.0 <= reward <= 1.0 or math.isnan(reward):
        raise ValueError(f"reward must be in [-1, 1], got {reward} (problem {tree.problem.id})")
    leaf.reward = reward
    for node in [leaf] if leaf_only else tree.path(leaf):
        node.visit_count += 1
        node.value_sum += reward
    leaf.exhausted = True
    _spread_exhaustion(tree, leaf)


def _spread_exhaustion(tree: Tree, node: Node) -> None:
    """Mark each ancestor exhausted while all its valid children are."""
    while node.parent >= 0:
        node = tree.nodes[node.parent]
        for i in node.children:
            if not tree.nodes[i].exhausted and tree.nodes[i].discard is None:
                return
        node.exhausted = True


def mean_q(nodes: Sequence[Node]) -> float:
    """Mean Q-value over the steps of a path (the root has none)."""
    values = [node.q_value for node in nodes if node.step is not None]
    return sum(values) / len(values) if values else 0.0


def own_tokens(nodes: Sequence[Node]) -> int:
    """Generated tokens of a path, a step counted once where it stands for several."""
    return sum(node.num_tokens // max(node.multiplicity, 1) for node in nodes)


def solution_shares(tree: Tree, answers: Sequence[Node]) -> dict[int, float]:
    """How often the policy ends in each of some answers, as the tree lets it be told: node id ->
    share, 1 in all.

    At each node the children that have one of them at or below them are weighed as often as they
    were sampled: a step that 14 of 16 candidates agreed on weighs 14, though it is one node, and a
    branch weighs no more for having been searched more.
    """
    leads, sampled = [False] * len(tree.nodes), [0] * len(tree.nodes)
    for node in answers:
        leads[node.id] = True
    for node in reversed(tree.nodes[1:]):
        if leads[node.id]:
            leads[node.parent] = True
            sampled[node.parent] += node.multiplicity
    shares = [1.0] + [0.0] * (len(tree.nodes) - 1)
    for node in tree.nodes[1:]:
        if leads[node.id]:
            shares[node.id] = shares[node.parent] * node.multiplicity / sampled[node.parent]
    return {node.id: shares[node.id] for node in answers}


def is_answer(node: Node) -> bool:
    """True if the node's step is an answer."""
    return node.step is not None and node.step.kind is StepKind.ANSWER
