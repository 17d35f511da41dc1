from __future__ import annotations

import ast

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.programs import one_per_program, program_key

STEPS = (
    "x = 1",
    "x  =  1",
    "x = 1  # why",
    "x = (1)",
    "# only a comment",
    "",
    "if x:\n    y = 2",
    "if x:",
    "    y = 2",
    "else:\n    y = 3",
    "y = 'a b'",
    "y = 'a' 'b'",
    "y = (",
    "del x",
    "for x in y: pass",
    '"""text',
    "print(f'{x}')",
    "x = 1 \\",
)


def parsed_together(codes: list[str]) -> str:
    """What tells programs apart, by the standard library alone."""
    code = "\n".join(code for code in codes if code)
    try:
        return ast.dump(ast.parse(code)) if code else ""
    except SyntaxError:
        lines = (line.strip() for line in code.splitlines())
        return "\n".join(line for line in lines if line and not line.startswith("#"))


@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.sampled_from(STEPS), max_size=4)] * 2)
def test_programs_are_one_exactly_if_their_steps_parse_to_one_tree(one, other):
    same = parsed_together(one) == parsed_together(other)
    assert (program_key(one) == program_key(other)) is same
    assert (program_key(one) == "") is (parsed_together(one) == "")


def test_steps_may_be_cut_anywhere():
    whole = program_key(["if x:\n    y = 2\nelse:\n    y = 3"])
    assert program_key(["if x:\n    y = 2", "else:\n    y = 3  # so"]) == whole


def test_no_more_solutions_are_looked_at_than_are_wanted():
    seen = []

    def key(solution: str) -> str:
        seen.append(solution)
        return solution.lower()

    assert one_per_program("aAbBc", key, limit=2) == ["a", "b"]
    assert seen == ["a", "A", "b"]
    assert one_per_program("aAbBc", key) == ["a", "b", "c"]
