from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.programs import _parsed, one_per_program, program_key

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
    "x = 2 \\\n# a comment\n",
    "f(1, *[2])",
    "f(*[1], a=2)",
    "f(a=2, *[1])",
    "f(a=1, *[2])",
    "x = (3 +\n# 4\n5)\ny = 6",
    "x = (3 +\n# 7\n5)\n\n\ny = 6",
    "x = 2j + 1",
    "x = 1 + 0j",
    "x = 0 + 1j",
    "x = 1_0 + 0x1 + 1e5 + 1. + .5 + 00 + 10",
    "x = 10 + 1 + 100000.0 + 1.0 + 0.5 + 0 + 10",
    "x = 1if 2else 3",
    "x = 1 if 2 else 3",
    "x = 3 if 2 else 1",
    "x = 01",
    "x = " + "1" * 20,
    "x = [" + "1, " * 40 + "]",
    "x = 1000000000000000000000000 # 1",
    'y = """\n# 1\nx = 1\n"""',
    'y = """\nx = 1\n"""',
    "y = '''",
    "'''",
    "# a\rx = 1",
    "# b\rx = 1",
    "for k in x:\n    y = 1\n\n    z = 2\nprint(3)",
    "for k in x:\n    y = 1\n    z = 2\nelse:\n    y = 3",
    "for k in x:\n    y = 1\n    # so\n    z = 2\n\nelse:\n    y = 3",
    "match x:\n    case 1: pass\n    case -1 + 2j: pass",
    "match x:\n    case 1 + 2: pass",
    "elsewhere = 1",
    "\x0c    y = 2",
    "\x0cy = 2",
    "x = 1; y = 2",
    "x\u00b2 = 1",
    "x = \u0661",
    "\u00a0# no space",
    "1 = x",
    "x.1",
    "x = 'so' '1'",
    "x = 'so1'",
    "(\n)",
    "if x: pass",
    "else: pass",
)


def parsed_together(codes: list[str]) -> str:
    """What tells programs apart, by the standard library alone."""
    code = "\n".join(code for code in codes if code)
    try:
        return ast.dump(ast.parse(code)) if code else ""
    except SyntaxError:
        lines = (line.strip() for line in code.splitlines())
        return "\n".join(line for line in lines if line and not line.startswith("#"))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.sampled_from(STEPS), max_size=4)] * 2)
def test_programs_are_one_exactly_if_their_steps_parse_to_one_tree(one, other):
    same = parsed_together(one) == parsed_together(other)
    assert (program_key(one) == program_key(other)) is same
    assert (program_key(one) == "") is (parsed_together(one) == "")


PIECES = st.text(alphabet="x1.j0 \n\r\t#\\'\"()[]=:,;ef", max_size=12)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(max_examples=200, deadline=None)
@given(PIECES, PIECES, st.sampled_from(STEPS))
def test_no_code_is_another_program_for_how_it_is_cut_or_for_its_numbers(one, other, step):
    for code in (one, other, f"{one}\n{step}", f"{step}\n{one}"):
        for rival in (code.replace("1", "0"), code.replace("#", "x"), other):
            same = parsed_together([code]) == parsed_together([rival])
            assert (program_key([code]) == program_key([rival])) is same


def test_what_differs_in_numbers_only_is_parsed_once():
    _parsed.cache_clear()
    keys = {program_key([f"total = {n} + 2 * count\nprint({n})"]) for n in range(100)}
    assert len(keys) == 100
    assert _parsed.cache_info().misses == 2


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
