"""When two solutions are one program: the same code, comments and layout left out.

A policy writes one program in many wordings. Each of them as a solution of its own would fill a
vote, or both sides of a comparison, with copies of one idea.
"""

from __future__ import annotations

import ast
import re
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

    Remembered, because the solutions of a tree share their steps; so are pieces of a code, because
    steps share those.
    """
    words: list[str] = []
    for piece in _pieces(code):
        statements = _piece(piece)
        if statements is None:
            whole = _parsed(code)
            return None if whole is None else "".join(whole)
        if statements:
            words.append(statements)
    return " ".join(words)


# Where a line may be something else than it seems: in a string of many lines, after "\\".
_NOT_BY_LINES = re.compile(r"\"{3}|'{3}|\\\n|\r")
_COMMENT_LINE = re.compile(r"^#.*\n?", re.MULTILINE)
_BETWEEN_PIECES = re.compile(r"\n+(?![ \t\f\n)\]}]|(?:else|elif|except|finally)\b|\Z)")


def _pieces(code: str) -> list[str]:
    """Code without comment-only lines, cut wherever a statement may begin.

    Pieces that parse by themselves are the same statements together, as steps are.
    """
    if _NOT_BY_LINES.search(code):
        return [code]
    return _BETWEEN_PIECES.split(_COMMENT_LINE.sub("", code))


_NUMBER = re.compile(r"(?<![\w.])(0|[1-9][0-9]{0,17})(?![\w.])")
_OTHER_NUMBERS = re.compile(r"[\"'#]|[0-9.][jJ]")
_PLACES = [f"{place}j" for place in range(32)]
_WRITTEN_PLACE = re.compile(r"(=None [0-9]+j)")
_PLACE_WRITTEN = {f"=None {place}": number for number, place in enumerate(_PLACES)}


def _piece(code: str) -> str | None:
    """As `_statements`, of a piece: those that differ in whole numbers only are parsed once.

    Imaginary numbers hold their places, unless there are such already, or numbers in strings or
    comments.
    """
    parts = _NUMBER.split(code)
    numbers = parts[1::2]
    if not numbers or len(numbers) > len(_PLACES) or _OTHER_NUMBERS.search(code):
        words = _parsed(code)
        return None if words is None else "".join(words)
    parts[1::2] = _PLACES[: len(numbers)]
    words = _parsed("".join(parts))
    if words is None:
        return None
    filled = list(words)
    filled[1::2] = [f"=None {numbers[_PLACE_WRITTEN[place]]}" for place in words[1::2]]
    return "".join(filled)


@lru_cache(maxsize=8192)
def _parsed(code: str) -> tuple[str, ...] | None:
    """The statements of a code, cut so that each second string is an imaginary number.

    None if it does not parse.
    """
    words: list[str] = []
    try:
        for statement in ast.parse(code).body:
            _write(statement, words)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tuple(_WRITTEN_PLACE.split(" ".join(words)))


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
