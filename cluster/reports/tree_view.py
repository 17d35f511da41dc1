"""`rstar tree RUN PROBLEM`: one stored search tree, in the terminal or as one HTML page.

    RUN/trajectories --> trees of the problem --> TreeView: the tree and its marks
                                                    |--> rich: the paths rollouts took, folded
                                                    +--> tree_page.html with the data in it

The marks come from the functions that make training data (`learner.select`), with the settings of
the run and all trees of the problem up to the shown round: what is marked is what that round's
dataset takes. Nothing here changes a run.

Whatever a model wrote is untrusted: the terminal gets no control characters, the page holds it as
JSON that cannot end its element, puts it in place as text only, and forbids by policy (CSP) every
script and style but its own, and every request.

Not covered: LaTeX is shown as written; the page needs a browser of 2020 or later with JavaScript.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as RichTree

from cluster.folder.run_folder import RunFolderError, resolve_problem
from learner.pairs import PairKind, PreferencePair
from learner.select import DatasetConfig, choose_of_problem
from rollout.difficulty import Difficulty, difficulty
from rollout.prompt import RSTAR_TEMPLATE, TEMPLATES, PromptTemplate, training_template
from rollout.store import Commit, RunStore, StoreError, TrajectoryStore, stored_rounds
from rollout.table import table_to_trees
from rollout.trajectory import Trajectory
from rollout.tree import Node, Terminal, Tree

MAX_ROWS = 120
"""Lines of the terminal view before deep branches are folded."""
MAX_ANSWERS = 10
_PAGE = Path(__file__).with_name("tree_page.html")
_SNIPPET_CHARS = 300

# ------------------------------------------------------------------------------- finding it


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


# ------------------------------------------------------------------------------------ marks


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


def num_passes(node: Node) -> int:
    """Rollouts that went through a node: its visits without the one a PPM value counts as."""
    counted = node.value is not None and node.discard is None and node.terminal is None
    return node.visit_count - int(counted)


# --------------------------------------------------------------------------------- terminal


def show_tree(
    run: str | Path,
    problem: str,
    console: Console,
    *,
    round: int | None = None,
    tree: int | None = None,
    node: int | None = None,
    depth: int | None = None,
    everything: bool = False,
    page: Path | None = None,
) -> None:
    """Print a stored tree, print one of its nodes in full, or write its page.

    Args:
        run: folder (or fsspec URL) of a run.
        problem: id of the problem, or the beginning of exactly one.
        round, tree: which of its trees; None: see `choose_tree`.
        node: print this node alone.
        depth: fold what is deeper; None: as much as fits into `MAX_ROWS` lines.
        everything: fold nothing, and show candidates that no rollout took or that were left out.
        page: write the HTML page there and print no tree.
    Raises:
        RunFolderError: no such run, problem, tree or node.
        StoreError: the trees cannot be read.
    """
    store = RunStore(run)
    stored = find_trees(store, problem)
    shown = choose_tree(stored, round, tree)
    trees = read_trees(store, [t for t in stored if t.round <= shown.round])
    picked = next(t for t in trees if (t.round, t.index) == (shown.round, shown.index))
    view = view_tree(picked, trees, dataset_config(store))
    if node is not None and not 0 <= node < len(picked.nodes):
        raise RunFolderError(
            f"problem {shown.problem_id}: no node {node} in round {picked.round} tree "
            f"{picked.index}, which has nodes 0 to {len(picked.nodes) - 1}"
        )
    if page is not None:
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(render_page(view), encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{page}: cannot be written: {error.strerror}") from error
        console.print(f"wrote {page}", markup=False, highlight=False, soft_wrap=True)
    elif node is not None:
        print_node(view, node, console)
    else:
        print_tree(view, console, depth=depth, everything=everything)


def print_tree(
    view: TreeView, console: Console, *, depth: int | None = None, everything: bool = False
) -> None:
    """Facts, answers and the tree itself; see `show_tree`."""
    _print_facts(view, console)
    _print_answers(view, console, everything)
    console.print()
    rows = _Rows(view, everything)
    limit = depth
    if limit is None and not everything:
        limit = rows.depth_that_fits(MAX_ROWS)
    root = RichTree(rows.label(view.tree.root), guide_style="bright_black")
    rows.grow(root, view.tree.root, limit)
    console.print(root)
    console.print()
    console.print(Text(_legend(view), style="bright_black"))
    if limit is not None and depth is None and rows.folded_deep:
        note = f"folded below depth {limit}; --depth N or --all shows more"
        console.print(Text(note, style="bright_black"))


class _Rows:
    """Which nodes of a tree are lines of the terminal view, and how they read."""

    def __init__(self, view: TreeView, everything: bool) -> None:
        self.tree = view.tree
        self.view = view
        self.everything = everything
        self.paths = view.chosen_paths()
        self.better = Counter(p.chosen for p in view.pairs)
        self.worse = Counter(p.rejected for p in view.pairs)
        self.folded_deep = False
        self._kept = {
            n.id
            for n in view.tree.nodes
            if everything or num_passes(n) > 0 or n.id in self.better or n.id in self.worse
        }

    def depth_that_fits(self, max_rows: int) -> int | None:
        """The greatest depth whose lines are at most so many; None if all are."""
        per_depth = Counter(self.tree.nodes[i].depth for i in self._kept)
        total = 0
        for depth in sorted(per_depth):
            total += per_depth[depth]
            if total > max_rows:
                return max(1, depth - 1)
        return None

    def grow(self, place: RichTree, node: Node, limit: int | None) -> None:
        """Add the lines below a node."""
        children = [self.tree.nodes[i] for i in node.children]
        deep = limit is not None and node.depth >= limit
        shown = [c for c in children if c.id in self._kept and (not deep or c.id in self.paths)]
        for child in shown:
            self.grow(place.add(self.label(child)), child, limit)
        hidden = [c for c in children if c not in shown]
        if hidden:
            self.folded_deep |= deep and any(c.id in self._kept for c in hidden)
            note = Text(self._folded(hidden), style="bright_black italic")
            if shown:
                place.add(note)
            else:
                assert isinstance(place.label, Text)
                place.label.append(" … ").append_text(note)

    def label(self, node: Node) -> Text:
        """One line: id, Q, visits, value, what it is, the first words, marks."""
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"#{node.id} ", style="bright_black")
        if node.visit_count:
            text.append(f"Q {node.q_value:+.2f} ", style=f"bold {_colour(node.q_value)}")
        else:
            text.append("Q  --   ", style="bright_black")
        text.append(f"N {node.visit_count} ")
        if node.value is not None:
            text.append(f"V {node.value:+.2f} ", style="bright_black")
        for mark, style in self._marks(node):
            text.append(f"{mark} ", style=style)
        state, style = _state(node)
        if state:
            text.append(f"{state} ", style=style)
        text.append(snippet(node), style="dim" if node.discard is not None else "")
        return text

    def _marks(self, node: Node) -> list[tuple[str, str]]:
        marks = []
        if node.id in self.paths:
            marks.append(("★" + ",".join(map(str, self.paths[node.id])), "bold yellow"))
        if self.better[node.id]:
            marks.append((f"+{self.better[node.id]}", f"bold {_colour(1.0)}"))
        if self.worse[node.id]:
            marks.append((f"−{self.worse[node.id]}", f"bold {_colour(-1.0)}"))
        if node.multiplicity > 1:
            marks.append((f"×{node.multiplicity}", "bright_black"))
        return marks

    def _folded(self, hidden: Sequence[Node]) -> str:
        unvisited = sum(n.discard is None and num_passes(n) == 0 for n in hidden)
        reasons = Counter(str(n.discard).replace("_", " ") for n in hidden if n.discard is not None)
        deep = len(hidden) - unvisited - sum(reasons.values())
        parts = [f"{deep} taken further, folded"] * bool(deep)
        parts += [f"{unvisited} not visited"] * bool(unvisited)
        parts += [f"{count} {reason}" for reason, count in sorted(reasons.items())]
        return f"{len(hidden)} more: {', '.join(parts)}"


def _print_facts(view: TreeView, console: Console) -> None:
    tree = view.tree
    problem = tree.problem
    head = Text()
    head.append(visible(problem.id), style="bold")
    head.append(f"  {problem.level}, {visible(problem.source)}", style="bright_black")
    in_round = sum(t.round == tree.round for t in view.others)
    head.append(f"  round {tree.round}, tree {tree.index} ({in_round} in this round)")
    good = {"solved": "bold green", "unlabelled": "bold yellow"}.get(tree.outcome, "bold red")
    head.append(f"  {tree.outcome.replace('_', ' ')}", style=good)
    if tree.outcome != "unlabelled":
        head.append(f"  ({view.difficulty} for this policy)")
    console.print(head)
    console.print(Padding(Text(visible(problem.text)), (0, 0, 0, 2)))
    golds = "  or  ".join(visible(gold) for gold in problem.golds)
    console.print(Text(f"accepted answer: {golds or 'none'}"))
    for line in facts(view):
        console.print(Text(line, style="bright_black"))


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
    use = "held out, judges the models and never trains them" if view.held_out else "training data"
    lines.append(
        f"{use}; chosen trajectories: {here}"
        + (f" here, {all_trees - here} in other trees" if all_trees > here else "")
        + f"; preference pairs: {steps} of steps, {len(view.pairs) - steps} of answers"
    )
    return lines


def _print_answers(view: TreeView, console: Console, everything: bool) -> None:
    """The answers reached, the correct one first, then those reached most often."""
    found: defaultdict[tuple[str, bool | None], list[Node]] = defaultdict(list)
    for node in view.tree.answers():
        if node.visit_count and node.step is not None and node.step.answer is not None:
            found[node.step.answer, node.correct].append(node)
    if not found:
        return
    ordered = sorted(found.items(), key=lambda item: (not item[0][1], -len(item[1])))
    shown = len(ordered) if everything else MAX_ANSWERS
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for name in ("answer", "verdict", "reached", "best Q", "best V", "at nodes"):
        table.add_column(name, overflow="fold")
    for (answer, correct), nodes in ordered[:shown]:
        word, style = _VERDICTS[correct]
        reasons = sorted({node.verdict for node in nodes if node.verdict})
        values = [node.value for node in nodes if node.value is not None]
        table.add_row(
            Text(visible(answer)),
            Text(word + (f" ({', '.join(reasons)})" if reasons else ""), style=style),
            str(len(nodes)),
            f"{max(node.q_value for node in nodes):+.2f}",
            f"{max(values):+.2f}" if values else "-",
            ", ".join(f"#{node.id}" for node in nodes[:8]) + (", ..." if len(nodes) > 8 else ""),
        )
    console.print()
    console.print(table)
    if len(ordered) > shown:
        note = f"and {len(ordered) - shown} other answers; --all shows them"
        console.print(Text(note, style="bright_black"))


_VERDICTS = {
    True: ("✓ correct", "green"),
    False: ("✗ wrong", "red"),
    None: ("? not graded", "yellow"),
}


def _legend(view: TreeView) -> str:
    parts = ["Q value sum / visits", "N visits", "V PPM value"]
    parts += ["★ chosen trajectory"] * bool(view.chosen_here)
    parts += ["+ preferred, − rejected, in so many pairs"] * bool(view.pairs)
    return "; ".join([*parts, "× identical candidates"])


def print_node(view: TreeView, node_id: int, console: Console) -> None:
    """One node in full: counts, code, output, error, marks."""
    tree = view.tree
    node = tree.nodes[node_id]
    rows = _Rows(view, everything=True)
    console.print(rows.label(node))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in node_facts(node):
        table.add_row(name, Text(visible(value)))
    path = " > ".join(f"#{n.id}" for n in tree.path(node))
    table.add_row("path", path)
    if node.children:
        table.add_row("candidates", ", ".join(f"#{i}" for i in node.children))
    for pair in view.pairs:
        if node_id == pair.chosen:
            table.add_row(f"{pair.kind} pair", f"preferred to #{pair.rejected}, {_margin(pair)}")
        elif node_id == pair.rejected:
            table.add_row(f"{pair.kind} pair", f"rejected for #{pair.chosen}, {_margin(pair)}")
    console.print(table)
    step = node.step
    sections: list[tuple[str, str]] = []
    if step is not None:
        code = step.code
        sections = [("code", code)] if code else [("text", step.text)]
    sections += [("stdout", node.stdout), ("error", node.execution_error)]
    for title, content in sections:
        if content:
            console.rule(title, align="left", style="bright_black")
            text = Text(visible(content))
            if title == "code":
                text.highlight_regex(r"(?m)^\s*#.*$", "green")
            console.print(text)


def _margin(pair: PairMark) -> str:
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
        ("verdict", f"{_VERDICTS[node.correct][0]} {node.verdict}" if node.verdict else None),
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


def _state(node: Node) -> tuple[str, str]:
    """What ended a node, with a style; empty for one that goes on."""
    if node.discard is not None:
        return f"[{str(node.discard).replace('_', ' ')}]", "yellow"
    if node.terminal is Terminal.ANSWER:
        word, style = _VERDICTS[node.correct]
        return word, style
    if node.terminal is not None:
        return f"✗ {str(node.terminal).replace('_', ' ')}", "red"
    return "", ""


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


_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters as backslash escapes."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_STOPS = ((-1.0, (217, 119, 38)), (0.0, (136, 136, 136)), (1.0, (64, 140, 235)))
"""Orange, grey, blue: told apart with every kind of colour blindness, on dark and on light."""


def _colour(q: float) -> str:
    """Of a Q-value, as #rrggbb."""
    q = min(1.0, max(-1.0, q)) if math.isfinite(q) else 0.0
    low, high = (_STOPS[0], _STOPS[1]) if q < 0 else (_STOPS[1], _STOPS[2])
    share = (q - low[0]) / (high[0] - low[0])
    mixed = (round(a + share * (b - a)) for a, b in zip(low[1], high[1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


# ------------------------------------------------------------------------------------- page


def render_page(view: TreeView) -> str:
    """The tree as one self-contained HTML page."""
    page = _PAGE.read_text(encoding="utf-8")
    style, script = _between(page, "<style>", "</style>"), _between(page, "<script>", "</script>")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    tree = view.tree
    title = f"{tree.problem.id}, round {tree.round}, tree {tree.index}"
    fillings = {
        "POLICY": html.escape(policy),
        "TITLE": html.escape(visible(title)),
        "DATA": _json_in_html(page_data(view)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fillings[match[1]], page)


def page_data(view: TreeView) -> dict[str, Any]:
    """What the page's script reads; empty fields of nodes are left out."""
    tree, problem = view.tree, view.tree.problem
    return {
        "problem": {
            "id": problem.id,
            "source": problem.source,
            "level": str(problem.level),
            "text": problem.text,
            "answers": list(problem.golds),
        },
        "round": tree.round,
        "tree": tree.index,
        "outcome": str(tree.outcome),
        "difficulty": str(view.difficulty),
        "facts": facts(view),
        "config": json.loads(tree.search_config or "{}"),
        "others": [
            {"round": t.round, "tree": t.index, "outcome": str(t.outcome)} for t in view.others
        ],
        "chosen": [
            {
                "rank": rank,
                "round": t.round,
                "tree": t.tree_index,
                "node": t.node,
                "mean_q": t.mean_q,
                "here": (t.round, t.tree_index) == (tree.round, tree.index),
            }
            for rank, t in enumerate(view.chosen, start=1)
        ],
        "pairs": [
            {
                "kind": str(pair.kind),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "text": _margin(pair),
            }
            for pair in view.pairs
        ],
        "nodes": [_page_node(node) for node in tree.nodes],
    }


def _page_node(node: Node) -> dict[str, Any]:
    step = node.step
    record: dict[str, Any] = {
        "parent": node.parent,
        "q": node.q_value if node.visit_count else None,
        "visits": node.visit_count,
        "passes": num_passes(node),
        "value": node.value,
        "label": snippet(node),
        "code": step.code if step else None,
        "text": step.text if step else None,
        "stdout": node.stdout,
        "error": node.execution_error,
        "discard": node.discard,
        "terminal": node.terminal,
        "correct": node.correct,
        "multiplicity": node.multiplicity if node.multiplicity > 1 else None,
        "facts": node_facts(node),
    }
    return {name: value for name, value in record.items() if value is not None and value != ""}


def _json_in_html(record: Mapping[str, Any]) -> str:
    """JSON for a `script` element: without any character that could end it."""
    text = json.dumps(_finite(record), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """The same with NaN and infinities as None, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _between(page: str, start: str, stop: str) -> str:
    at = page.index(start) + len(start)
    return page[at : page.index(stop, at)]


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
