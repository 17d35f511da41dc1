"""Steps that take back an earlier one: what the paper calls intrinsic self-reflection.

Source: arXiv 2501.04519 section 5 sees policies, never trained to, leave a bad first attempt within
one trajectory. Two signs are looked for, both meant to miss rather than to cry wolf:

    comment    a whole-line comment of a later step says so: "Wait, ...", "the previous equation is
               wrong", "let's try another approach"
    code       a later step assigns a name anew, to another value, although nothing has read what
               an earlier step assigned: that step's work is given up

Not seen: second thoughts that are not said and change no such name, attributes and items, anything
after code that does not parse. Checks ("let's verify") are no correction; a name that a function or
lambda reads is left out. Whether the correction was right is not asked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rollout.prompt import Step

_EARLIER = r"(?:the |my |our |this )?(?:previous|earlier|above|last|first) (?:\w+ )?"
_WORK = r"(?:step|approach|method|attempt|equation|formula|calculation|result|value|code|setup)s?"
_WRONG = r"(?:wrong|incorrect|mistaken|invalid|not (?:right|correct|valid))"
_SAYS = re.compile(
    r"^\W*(?:wait|oops|hold on)\b\s*[,.!:]"
    rf"|\b{_EARLIER}{_WORK} (?:is|was|are|were|seems?|looks?) {_WRONG}\b"
    rf"|\b(?:correct|fix|redo|replace|discard|abandon)(?:ing)? {_EARLIER}{_WORK}\b"
    r"|\b(?:i|we) made an? (?:mistake|error)\b"
    r"|\b(?:let's|let us|let me|i will|we will) (?:start over|start again|try again"
    r"|(?:try|use) (?:another|a different) (?:approach|method|way))\b",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"^\s*#\s*(.*)$", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One step that takes back an earlier one."""

    step: int
    """Place of the later step in the trajectory, from 0."""
    sign: str
    """"comment" or "code"."""
    evidence: str
    """The comment, or the name that was assigned anew."""


def corrections(steps: Sequence[Step]) -> list[Correction]:
    """All corrections of a trajectory, by step; empty for most."""
    found = [*_said(steps), *_assigned_anew(steps)]
    return sorted(found, key=lambda correction: correction.step)


def _said(steps: Sequence[Step]) -> Iterator[Correction]:
    for place, step in enumerate(steps[1:], start=1):
        for comment in _COMMENT.findall(step.code):
            if _SAYS.search(comment):
                yield Correction(step=place, sign="comment", evidence=comment.strip())


def _assigned_anew(steps: Sequence[Step]) -> Iterator[Correction]:
    unread: dict[str, tuple[int, str]] = {}
    """Name -> step that assigned it and the value, while nothing has read it."""
    enclosed: set[str] = set()
    for place, step in enumerate(steps):
        try:
            statements = ast.parse(step.code).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        for statement in statements:
            inside = list(ast.walk(statement))
            names = [node for node in inside if isinstance(node, ast.Name)]
            for definition in (node for node in inside if isinstance(node, _DEFINITIONS)):
                enclosed |= {n.id for n in ast.walk(definition) if isinstance(n, ast.Name)}
            target = _only_target(statement)
            for name in names:
                if name is not target:
                    unread.pop(name.id, None)
            if target is None or not isinstance(statement, ast.Assign):
                continue
            value = ast.dump(statement.value)
            earlier, before = unread.get(target.id, (place, value))
            if earlier < place and before != value and target.id not in enclosed:
                yield Correction(step=place, sign="code", evidence=target.id)
            unread[target.id] = (place, value)


def _only_target(statement: ast.stmt) -> ast.Name | None:
    """The name in `name = value`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target if isinstance(target, ast.Name) else None
    return None
