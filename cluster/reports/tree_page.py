"""A search tree as one HTML page that holds its data and a script which draws it.

Whatever a model wrote is untrusted: the page holds it as JSON that cannot end its element, puts it
in place as text only, and forbids by policy (CSP) every script and style but its own, and every
request.

Not covered: LaTeX is shown as written; the page needs a browser of 2020 or later with JavaScript.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.reports.marked_tree import (
    TreeView,
    facts,
    margin,
    node_facts,
    snippet,
)
from cluster.reports.page import escape, fill
from rollout.tree import Node

_PAGE = Path(__file__).with_name("tree_page.html")


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
    return fill(
        page,
        POLICY=html.escape(policy),
        TITLE=escape(title),
        DATA=_json_in_html(page_data(view)),
    )


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
                "text": margin(pair),
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
        "passes": node.num_passes,
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
