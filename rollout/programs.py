"""When two solutions are one program: the same code, comments and layout left out.

A policy writes one program in many wordings. Each of them as a solution of its own would fill a
vote, or both sides of a comparison, with copies of one idea.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import islice
from typing import Any, TypeVar

from rollout.prompt import Step

T = TypeVar("T")


def program_key(codes: Iterable[str]) -> str:
    """The code of some steps without comments and layout; "" if there is none.

    Code that does not parse, its steps taken together, is compared as text without comment-only and
    blank lines.
    """
    parts = [code for code in codes if code]
    if not parts:
        return ""
    # A step that parses by itself is the same statements wherever it stands.
    statements: list[str | None] = [_statements(part) for part in parts]
    if None in statements:
        statements = [_statements("\n".join(parts))]
    if statements[0] is not None:
        return " ".join(["program", *filter(None, statements)])
    lines = (line.strip() for part in parts for line in part.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("#"))


@lru_cache(maxsize=4096)
def _statements(code: str) -> str | None:
    """The statements of a code without layout; None if it does not parse.

    Remembered, because the solutions of a tree share their steps.
    """
    words: list[str] = []
    try:
        for statement in ast.parse(code).body:
            _write(statement, words)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return " ".join(words)


def _write(node: ast.AST, words: list[str]) -> None:
    """All that `ast.dump` says of a node, in a third of its time."""
    if isinstance(node, ast.Name):  # with constants, half of all nodes
        words.append(node.id)
        return
    if isinstance(node, ast.Constant):
        words.append(f"={node.kind} {node.value!r}")
        return
    words.append(f"({node.__class__.__name__}")
    kind: Any = node.__class__  # `AST` itself has no hash for a type checker
    for name in _fields(kind):
        value = getattr(node, name, None)
        if isinstance(value, ast.AST):
            _write(value, words)
        elif isinstance(value, list):
            words.append("[")
            for item in value:
                if isinstance(item, ast.AST):
                    _write(item, words)
                else:
                    words.append(repr(item))
            words.append("]")
        else:
            words.append(repr(value))
    words.append(")")


@cache
def _fields(kind: type[Any]) -> tuple[str, ...]:
    """Of a kind of node; whether a name is read or set follows from where it stands."""
    return tuple(name for name in kind._fields if name != "ctx")


def program_of(steps: Sequence[Step]) -> str:
    """`program_key` of some steps."""
    return program_key(step.code for step in steps)


def same_program(left: Sequence[Step], right: Sequence[Step]) -> bool:
    """True if both hold code, and it differs in comments or layout only, with one final answer."""
    key = program_of(left)
    answers = [step.answer for step in left], [step.answer for step in right]
    return key != "" and key == program_of(right) and answers[0] == answers[1]


def one_per_program(
    solutions: Iterable[T], key: Callable[[T], str], limit: int | None = None
) -> list[T]:
    """The first solution of each program, in their order; those without code all stay.

    Args:
        key: the program of a solution, see `program_key`.
        limit: most that are wanted; further ones are not looked at. None: all.
    """

    def kept() -> Iterator[T]:
        seen: set[str] = set()
        for solution in solutions:
            program = key(solution)
            if program not in seen:
                yield solution
            if program:
                seen.add(program)

    return list(islice(kept(), limit))
