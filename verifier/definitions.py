r"""Answers that say what they are the value of: `x = 3`, `|AB| = 1`, `S_1:S_2 = 7:32`, `x = 5+6 =
11`, `\frac{1}{3} \approx 0.333`.

A name says nothing about the value and is dropped when the other answer names nothing. What counts
as a name: a letter (also e and i left of an equals sign), a function at letters or at a number, a
probability, a segment or a polygon in capital letters, its length in bars, a quotient or a ratio of
such, `dy/dx`, an angle, words. An equation between letters (`2x + z = 1`, `xy = 1`, `|x| = 3`,
`PV = nRT`) is no name with a value, and is never its right side.

A chain counts by its ends and has to hold: its numbers are equal, and so are neighbours in the
same letters. A rounded number behind `\approx` has to agree with the exact one before it in every
printed digit, rounded or cut off; the exact one is the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from typing import TypeGuard

from verifier.answer_tree import (
    MINUS_ONE,
    Call,
    Clock,
    Constant,
    Label,
    Matrix,
    Mul,
    Node,
    Number,
    Power,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    children,
    is_expression,
    map_children,
    symbols,
)
from verifier.answer_words import TRIGONOMETRIC
from verifier.finding import Finding
from verifier.numeric_equality import closed_values, open_values, rounds_to
from verifier.units import DEGREES, in_one_unit

Definition = tuple[Node, Node]
"""What is named, and its value. A name is a `Symbol`, a tuple of them that was written as one, a
list of them that were named one by one, or `Label("")` for none."""

MAX_CHAIN = 12
MAX_CELLS = 16
_POINT = re.compile(r"[A-Z](?:_\w++|')*+")
_CAPITAL_OR_INDEXED = re.compile(r"[A-Z](?:_\w++|')*+|[a-z]_\w+")
_INDEXED = re.compile(r"([A-Za-z])_(\d+)")
_LETTERS_OF_A_FUNCTION = re.compile(r"(.+)\(([A-Za-z]\w*(?:,[A-Za-z]\w*)*)\)")


def definition(relation: Relation) -> Definition | None:
    r"""The name and the value of an equation that gives one; None for any other relation, and for a
    chain that does not hold.

    `x = y = 3` names two; a closed chain such as `5 + 6 = 11` names nothing. `x \in \{1, 2\}` gives
    x the set.
    """
    if relation.operators == ("in",):
        value = relation.operands[1]
        if not isinstance(value, Sequence) or value.kind != "set":
            return None
    elif set(relation.operators) != {"="}:
        return None
    operands = list(relation.operands)
    names: list[Node] = []
    written = operands[0]
    if (
        isinstance(written, Sequence)
        and written.kind in ("tuple", "list")
        and all(isinstance(item, Symbol) for item in written.items)
    ):
        names, operands = [written], operands[1:]
        name: Node = written
    else:
        names, operands = _names_and_values(operands)
        if not names and isinstance(operands[-1], Matrix) and _is_of_matrices(operands[0]):
            names, operands = [Symbol(str(operands[0]))], operands[1:]
        if not names and any(map(symbols, operands)):
            return None
        name = _one_name(names)
    if not _chain_holds(operands):
        return None
    value = operands[-1]
    if isinstance(name, Sequence) and name is not written and symbols(value):
        return None
    for one in names:
        if _is_derivative(one):
            continue
        if symbols(value) and _is_of_letters(one):
            return None
        if any(symbols(one) & symbols(operand) for operand in operands):
            return None
    if isinstance(value, Clock) and any(isinstance(one, Ratio) for one in names):
        value = as_ratio(value)
    if isinstance(name, Sequence) and name is not written:
        value = Sequence("tuple", (value,) * len(name.items))
    return name, value


def _names_and_values(operands: list[Node]) -> tuple[list[Node], list[Node]]:
    """The operands that name, and the rest, of which there is at least one."""
    names: list[Node] = []
    while len(operands) > 1 and name_text(operands[0]) is not None:
        if names and isinstance(operands[0], Constant):
            break
        names, operands = [*names, operands[0]], operands[1:]
    last = operands[-1]
    if not names and len(operands) == 2 and name_text(last) and not isinstance(last, Constant):
        return [last], operands[:1]
    return names, operands


def _one_name(names: list[Node]) -> Node:
    texts: list[Node] = []
    for name in names:
        text = Symbol(name_text(name) or "")
        if not any(same_name(text, other) for other in texts):
            texts.append(text)
    if not texts:
        return Label("")
    return texts[0] if len(texts) == 1 else Sequence("list", tuple(texts))


def name_text(node: Node) -> str | None:
    """What a node names, as text; None for what is more than a name."""
    match node:
        case Symbol(name=name) | Constant(name=("e" | "i") as name):
            return name
        case Ratio(parts=parts):
            texts = [name_text(part) for part in parts]
            return None if None in texts else ":".join(map(str, texts))
        case Sequence(kind="bracket", items=(inner,)):
            points = _points(inner)
            return f"[{points}]" if points and len(points) > 2 else None
        case SetOperation(operator=operator, left=Symbol(name=left), right=Symbol(name=right)):
            return f"{left} {operator} {right}"
        case Call(name=name, args=(Symbol(name=letter),)) if name in TRIGONOMETRIC:
            return f"{name} {letter}" if _POINT.fullmatch(letter) else None
        case Mul(factors=(Symbol(name="Delta"), Symbol(name=name))):
            return f"Delta {name}"
        case Mul(factors=(top, Power(base=bottom, exponent=exponent))) if exponent == MINUS_ONE:
            texts = [_part_of_quotient(part) for part in (top, bottom)]
            return None if None in texts else "/".join(map(str, texts))
    return _points(node)


def _points(node: Node) -> str | None:
    """`AB`, `PF_1` or the length `|AB|`, as text."""
    if isinstance(node, Call) and node.name == "abs":
        (inner,) = node.args
        if isinstance(inner, Symbol) and inner.name.startswith("vec:"):
            return f"|{inner.name}|"
        return _points(inner) if isinstance(inner, Mul) else None
    if not isinstance(node, Mul) or not any(isinstance(one, Symbol) for one in node.factors):
        return None
    letters = [
        factor.name if isinstance(factor, Symbol) else factor.name.upper()
        for factor in node.factors
        if isinstance(factor, Symbol) or factor in (Constant("e"), Constant("i"))
        if isinstance(factor, Symbol | Constant)
    ]
    if len(letters) != len(node.factors) or not all(map(_POINT.fullmatch, letters)):
        return None
    return "".join(letters)


def _part_of_quotient(node: Node) -> str | None:
    if isinstance(node, Symbol):
        return node.name if _CAPITAL_OR_INDEXED.fullmatch(node.name) else None
    if isinstance(node, Mul) and len(node.factors) == 2 and node.factors[0] == Symbol("d"):
        last = node.factors[1]
        return f"d{last.name}" if isinstance(last, Symbol) else None
    return _points(node)


def _is_derivative(name: Node) -> bool:
    return isinstance(name, Mul) and (name_text(name) or "").startswith("d")


def _is_of_letters(name: Node) -> bool:
    """Whether a name is made of letters that may also be numbers: `PV`, `S_1/S_2`."""
    return not isinstance(name, Symbol | Constant | Sequence)


def _is_of_matrices(node: Node) -> bool:
    """Whether an expression in capital letters says what was worked out: `A + B`, `A^{-1}`; of `2A
    = M`, A is the unknown."""
    letters = symbols(node)
    multiple = isinstance(node, Mul) and isinstance(node.factors[0], Number)
    return bool(letters) and not multiple and all(map(_POINT.fullmatch, letters))


def _chain_holds(operands: list[Node]) -> bool:
    """Whether nothing in a chain of equalities contradicts another part of it; a chain of more than
    12 values is not followed."""
    if len(operands) == 1:
        return True
    objects = [one for one in operands if isinstance(one, Matrix | Sequence)]
    if len(objects) == len(operands) <= MAX_CHAIN:
        return all(_equal_members(one, two) for one, two in pairwise(objects))
    if len(operands) > MAX_CHAIN or not all(
        is_expression(one) or isinstance(one, Quantity) for one in operands
    ):
        return False
    closed = [one for one in operands if not symbols(one)]
    lettered = [
        (one, two)
        for one, two in pairwise(operands)
        if symbols(one) and symbols(one) == symbols(two)
    ]
    return all(_equal_values(one, two) for one, two in [*pairwise(closed), *lettered])


def _equal_members(one: Matrix | Sequence, two: Matrix | Sequence) -> bool:
    """Whether two matrices, tuples or lists of one form agree place by place."""
    forms = [
        [*map(len, node.rows)] if isinstance(node, Matrix) else [node.kind, len(node.items)]
        for node in (one, two)
    ]
    members = children(one)
    if forms[0] != forms[1] or len(members) > MAX_CELLS or not all(map(is_expression, members)):
        return False
    return all(map(_equal_values, members, children(two)))


def _equal_values(one: Node, two: Node) -> bool:
    if isinstance(one, Quantity) and isinstance(two, Quantity):
        pair = in_one_unit(one, two)
        if pair is None:
            return False
        one, two = pair
    one, two = _number_of(one), _number_of(two)
    letters = symbols(one) | symbols(two)
    finding: Finding | None = None
    try:
        finding = open_values(one, two, letters) if letters else closed_values(one, two)
    except ArithmeticError:
        return False
    return finding is not None and finding.equal


def _number_of(node: Node) -> Node:
    return node.number if isinstance(node, Quantity) else node


def without_rounded(relation: Relation) -> Node | None:
    r"""A chain with `\approx` reduced to its exact part; None when a rounded number does not agree
    with it.

    `x \approx 11` gives x the value 11.
    """
    operators, operands = list(relation.operators), list(relation.operands)
    if set(operators) - {"=", "≈"} or len(operands) > MAX_CHAIN:
        return None
    place = operators.index("≈")
    if place == 0 and name_text(operands[0]) is not None:
        operators[0] = "="
        place = operators.index("≈") if "≈" in operators else len(operators)
    exact, before = operands[place], operands[place]
    for operator, operand in zip(operators[place:], operands[place + 1 :], strict=True):
        if symbols(operand) or symbols(exact):
            return None
        if operator == "=":
            if not _equal_values(before, operand):
                return None
        elif not _rounds(exact, operand):
            if not (_is_decimal(exact) and not _is_decimal(operand) and _rounds(operand, exact)):
                return None
            exact = operand
        before = operand
    parts = (*operands[:place], exact)
    return exact if len(parts) == 1 else Relation(("=",) * place, parts)


def _is_decimal(node: Node) -> bool:
    number = _number_of(node)
    return isinstance(number, Number) and number.significant_digits > 0


def _rounds(exact: Node, rounded: Node) -> bool:
    units = [node.unit for node in (exact, rounded) if isinstance(node, Quantity)]
    one, two = _number_of(exact), _number_of(rounded)
    if len(set(units)) > 1 or not is_expression(one) or not is_expression(two):
        return False
    in_degrees = Mul((one, Number(Fraction(180)), Power(Constant("pi"), MINUS_ONE)))
    angle = units == [DEGREES] and isinstance(rounded, Quantity)
    return rounds_to(one, two) or (angle and rounds_to(in_degrees, two))


def as_ratio(clock: Clock) -> Ratio:
    """The ratio that is written as a time would be."""
    parts = (clock.hour, clock.minute, clock.second)
    return Ratio(tuple(Number(Fraction(part)) for part in parts[: 3 if clock.second else 2]))


def same_name(left: Node, right: Node) -> bool:
    """Whether two solutions name the same thing; y and f(x) do, and so do AB and |AB|."""
    if left == right:
        return True
    names = [node.name if isinstance(node, Symbol) else "" for node in (left, right)]
    return "y" in names and any(
        name.endswith("(x)") and "'" not in name and "^" not in name for name in names
    )


def values_of_one_name(first: Definition, second: Definition) -> tuple[Node, Node] | None:
    """The values to compare when two definitions are of the same thing; else None.

    `f(x) = x + 1` and `f(t) = t + 1` define one function, `(y, x) = (1, 2)` and `x = 2, y = 1` one
    pair.
    """
    if same_name(first[0], second[0]) or Label("") in (first[0], second[0]):
        return first[1], second[1]
    return _with_one_letter(first, second) or _reordered(first, second)


def _with_one_letter(first: Definition, second: Definition) -> tuple[Node, Node] | None:
    """Two functions of one name in letters of their own, brought to the same letters."""
    heads, values = [], []
    for name, value in (first, second):
        match = _LETTERS_OF_A_FUNCTION.fullmatch(name.name) if isinstance(name, Symbol) else None
        if match is None:
            return None
        letters = match[2].split(",")
        if not set(letters) <= symbols(value):
            return None
        heads.append((match[1], len(letters)))
        places = {letter: Symbol(f"argument {place}") for place, letter in enumerate(letters)}
        values.append(_renamed(value, places))
    return (values[0], values[1]) if heads[0] == heads[1] else None


def _renamed(node: Node, names: dict[str, Symbol]) -> Node:
    if isinstance(node, Symbol):
        return names.get(node.name, node)
    return map_children(node, lambda child: _renamed(child, names))


def in_alphabetical_order(defined: Definition) -> Node:
    """The value of letters that were named one by one, in the order in which `(x, y)` has them."""
    names, values = defined
    assert isinstance(names, Sequence) and isinstance(values, Sequence)
    return _by_name(names, values)[1]


def _by_name(names: Sequence, values: Sequence) -> tuple[list[str], Sequence]:
    texts = [name.name for name in names.items if isinstance(name, Symbol)]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    return sorted(texts), Sequence("tuple", tuple(values.items[place] for place in order))


def _reordered(first: Definition, second: Definition) -> tuple[Node, Node] | None:
    """Bring `(y, x) = (1, 2)` and `(x, y) = (2, 1)`, or several such, into one order of letters."""
    ordered: list[Node] = []
    letters: list[list[str]] = []
    for names, values in (first, second):
        if not isinstance(names, Sequence) or not isinstance(values, Sequence):
            return None
        cases = values.items if values.kind == "list" else (values,)
        found = []
        for case in cases:
            if not _is_case(case, len(names.items)):
                return None
            texts, value = _by_name(names, case)
            letters.append(texts)
            found.append(value)
        ordered.append(Sequence("list", tuple(found)))
    same = all(one == letters[0] for one in letters)
    return (ordered[0], ordered[1]) if same else None


def _is_case(node: Node, size: int) -> TypeGuard[Sequence]:
    """Whether a node gives that many letters a value each."""
    return isinstance(node, Sequence) and node.kind == "tuple" and len(node.items) == size


def cases_of(definitions: Iterable[Definition]) -> Definition | None:
    """Solutions named one by one as one definition; None when they do not give each case the same
    letters.

    `x = 1, x = 2` gives x a list, `x = 1, y = 2` the pair of letters a pair, and `p = 5, q = 2, p =
    7, q = 2` a list of pairs. A letter that comes again begins a new case; pairs are in the order
    in which the first case has its letters.
    """
    flat: list[tuple[str, Node]] = []
    for named, given in definitions:
        names: tuple[Node, ...] = (named,)
        values: tuple[Node, ...] = (given,)
        if isinstance(named, Sequence):
            if not _is_case(given, len(named.items)):
                return None
            names, values = named.items, given.items
        for name, value in zip(names, values, strict=True):
            if not isinstance(name, Symbol):
                return None
            flat.append((name.name, value))
    cases: list[dict[str, Node]] = [{}]
    for letter, value in _without_indices(flat):
        if letter in cases[-1]:
            cases.append({})
        cases[-1][letter] = value
    letters = list(cases[0])
    if any(set(case) != set(letters) for case in cases):
        return None
    if len(letters) == 1:
        distinct = dict.fromkeys(case[letters[0]] for case in cases)
        return Symbol(letters[0]), Sequence("list", tuple(distinct))
    pairs = [Sequence("tuple", tuple(map(case.__getitem__, letters))) for case in cases]
    in_order = tuple(map(Symbol, letters))
    if len(pairs) == 1:
        return Sequence("list", in_order), pairs[0]
    return Sequence("tuple", in_order), Sequence("list", tuple(pairs))


def _without_indices(named: list[tuple[str, Node]]) -> list[tuple[str, Node]]:
    """`x_1 = 1, y_1 = 2, x_2 = 3, y_2 = 4` as two cases of x and y; anything else as it is."""
    matches = [_INDEXED.fullmatch(name) for name, _ in named]
    pairs = [(match[2], match[1]) for match in matches if match]
    letters, indices = {letter for _, letter in pairs}, {index for index, _ in pairs}
    complete = len(letters) * len(indices) == len(set(pairs)) == len(named)
    if not complete or len(letters) < 2 or len(indices) < 2:
        return named
    order = list(dict.fromkeys(index for index, _ in pairs))
    by_case = sorted(zip(pairs, named, strict=True), key=lambda item: order.index(item[0][0]))
    return [(letter, value) for (_, letter), (_, value) in by_case]
