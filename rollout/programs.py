"""When two solutions are one program: the same code, comments and layout left out.

A policy writes one program in many wordings. Each of them as a solution of its own would fill a
vote, or both sides of a comparison, with copies of one idea.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rollout.prompt import Step

T = TypeVar("T")


def program_key(codes: Iterable[str]) -> str:
    """The code of some steps without comments and layout; "" if there is none.

    Steps are parsed together; code that does not parse is compared as text without comment-only
    and blank lines.
    """
    code = "\n".join(code for code in codes if code)
    try:
        return ast.dump(ast.parse(code)) if code else ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        lines = (line.strip() for line in code.splitlines())
        return "\n".join(line for line in lines if line and not line.startswith("#"))


def program_of(steps: Sequence[Step]) -> str:
    """`program_key` of some steps."""
    return program_key(step.code for step in steps)


def same_program(left: Sequence[Step], right: Sequence[Step]) -> bool:
    """True if both hold code, and it differs in comments or layout only, with one final answer."""
    key = program_of(left)
    answers = [step.answer for step in left], [step.answer for step in right]
    return key != "" and key == program_of(right) and answers[0] == answers[1]


def one_per_program(solutions: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """The first solution of each program, in their order; those without code all stay.

    Args:
        key: the program of a solution, see `program_key`.
    """
    seen: set[str] = set()
    kept = []
    for solution in solutions:
        program = key(solution)
        if program not in seen:
            kept.append(solution)
        if program:
            seen.add(program)
    return kept
