"""`rstar tree RUN PROBLEM`: one stored search tree, in the terminal or as one HTML page.

    RUN/trajectories --> trees of the problem --> TreeView: the tree and its marks
                                                    |--> rich: the paths rollouts took, folded
                                                    +--> tree_page: HTML

What a model wrote is untrusted: the terminal gets no control characters.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as RichTree

from cluster.folder.run_folder import RunFolderError
from cluster.reports.marked_tree import (
    VERDICTS,
    TreeView,
    choose_tree,
    dataset_config,
    facts,
    find_trees,
    margin,
    node_facts,
    read_trees,
    snippet,
    view_tree,
)
from cluster.reports.page import visible, write_page
from cluster.reports.tree_page import render_page
from rollout.store import RunStore
from rollout.tree import Node, Terminal

MAX_ROWS = 120
"""Lines of the terminal view before deep branches are folded."""
MAX_ANSWERS = 10


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
        write_page(page, render_page(view))
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
            if everything or n.num_passes > 0 or n.id in self.better or n.id in self.worse
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
        unvisited = sum(n.discard is None and n.num_passes == 0 for n in hidden)
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


def _print_answers(view: TreeView, console: Console, everything: bool) -> None:
    """The answers reached, the correct one first, then those reached most often."""
    found: defaultdict[tuple[str, bool | None], list[Node]] = defaultdict(list)
    for node in view.tree.reached_answers():
        if node.step is not None and node.step.answer is not None:
            found[node.step.answer, node.correct].append(node)
    if not found:
        return
    ordered = sorted(found.items(), key=lambda item: (not item[0][1], -len(item[1])))
    shown = len(ordered) if everything else MAX_ANSWERS
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for name in ("answer", "verdict", "reached", "best Q", "best V", "at nodes"):
        table.add_column(name, overflow="fold")
    for (answer, correct), nodes in ordered[:shown]:
        word, style = VERDICTS[correct]
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
            table.add_row(f"{pair.kind} pair", f"preferred to #{pair.rejected}, {margin(pair)}")
        elif node_id == pair.rejected:
            table.add_row(f"{pair.kind} pair", f"rejected for #{pair.chosen}, {margin(pair)}")
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


def _state(node: Node) -> tuple[str, str]:
    """What ended a node, with a style; empty for one that goes on."""
    if node.discard is not None:
        return f"[{str(node.discard).replace('_', ' ')}]", "yellow"
    if node.terminal is Terminal.ANSWER:
        word, style = VERDICTS[node.correct]
        return word, style
    if node.terminal is not None:
        return f"✗ {str(node.terminal).replace('_', ' ')}", "red"
    return "", ""


_STOPS = ((-1.0, (217, 119, 38)), (0.0, (136, 136, 136)), (1.0, (64, 140, 235)))
"""Orange, grey, blue: told apart with every kind of colour blindness, on dark and on light."""


def _colour(q: float) -> str:
    """Of a Q-value, as #rrggbb."""
    q = min(1.0, max(-1.0, q)) if math.isfinite(q) else 0.0
    low, high = (_STOPS[0], _STOPS[1]) if q < 0 else (_STOPS[1], _STOPS[2])
    share = (q - low[0]) / (high[0] - low[0])
    mixed = (round(a + share * (b - a)) for a, b in zip(low[1], high[1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
