"""One form for what can be written in several ways, before two answers are compared.

Plus-minus signs are written out, solutions of one letter merged, several letters put in one order,
inequalities turned into `tree > 0`, units converted, lists of one unwrapped. Nothing here says
whether two answers are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import partial, reduce
from itertools import chain, pairwise
from itertools import product as combinations_of

from verifier.answer_tree import (
    Add,
    Label,
    Matrix,
    Mul,
    Node,
    Number,
    PlusMinus,
    Quantity,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    contains,
    is_expression,
    map_children,
    negate,
    symbols,
    walk,
)
from verifier.evaluation import BeyondBudget
from verifier.numeric_equality import closed_values
from verifier.real_sets import real_set

MAX_SIGNS = 5

_UNITS = {
    unit: (base, Fraction(size))
    for base, sizes in {
        "mm": {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000},
        "in": {"in": 1, "ft": 12, "yd": 36, "mi": 63_360},
        "s": {"s": 1, "min": 60, "h": 3600, "day": 86_400, "week": 604_800},
        "mg": {"mg": 1, "g": 1000, "kg": 1_000_000},
        "ml": {"ml": 1, "l": 1000},
        "cent": {"cent": 1, "dollar": 100},
    }.items()
    for unit, size in sizes.items()
}
"""Units that convert: unit -> (base unit of its kind, factor to it)."""


def prepare(node: Node) -> Node:
    """Write out plus-minus signs, merge solutions, and unwrap lists of one."""
    match node:
        case Sequence():
            return _prepare_sequence(node)
        case Relation(operators=operators, operands=operands):
            return Relation(operators, tuple(map(prepare, operands)))
        case Quantity(number=number, unit=unit):
            inner = prepare(number)
            if isinstance(inner, Sequence):
                return Sequence(inner.kind, tuple(Quantity(item, unit) for item in inner.items))
            return Quantity(inner, unit)
        case _ if is_expression(node) and contains(node, PlusMinus):
            variants = _write_out_signs(node)
            return Sequence("list", variants) if len(variants) > 1 else variants[0]
        case _:
            return node


def _write_out_signs(node: Node) -> tuple[Node, ...]:
    """Every choice of signs; plus-minus and minus-plus together share one choice."""
    signs = [one for one in walk(node) if isinstance(one, PlusMinus)]
    if len(signs) > MAX_SIGNS:
        raise BeyondBudget
    if any(sign.inverted for sign in signs):
        choices = [(1,) * len(signs), (-1,) * len(signs)]
    else:
        choices = list(combinations_of((1, -1), repeat=len(signs)))
    return tuple(dict.fromkeys(_with_signs(node, list(choice)) for choice in choices))


def _with_signs(node: Node, signs: list[int]) -> Node:
    if isinstance(node, PlusMinus):
        sign = -signs.pop() if node.inverted else signs.pop()
        inner = _with_signs(node.operand, signs)
        return inner if sign > 0 else negate(inner)
    return map_children(node, lambda child: _with_signs(child, signs))


def _prepare_sequence(node: Sequence) -> Node:
    if node.kind == "tuple":
        if contains(node, PlusMinus):
            variants = _write_out_signs(node)
            return Sequence("list", tuple(prepare(variant) for variant in variants))
        items = tuple(prepare(item) for item in node.items)
        return items[0] if len(items) == 1 else Sequence("tuple", items)
    items = _flat(map(prepare, node.items))
    if len(items) == 1:
        return items[0]
    merged = None
    if any(isinstance(item, Relation) for item in items):
        merged = _merge_solutions(items, node.joiner)
    elif node.joiner == "and":
        quantities = [item for item in items if isinstance(item, Quantity)]
        if quantities and len(quantities) == len(items):
            merged = _add_quantities(quantities)
    return merged or Sequence(node.kind, items, node.joiner)


def _merge_solutions(items: tuple[Node, ...], joiner: str) -> Node | None:
    """`x = 1, x = 2` and `x = 1, 2` give x one list; `x = 1, y = 2` gives (x, y) a tuple in the
    letters' order."""
    relations = [item for item in items if isinstance(item, Relation)]
    if len(relations) == len(items) and any(set(item.operators) != {"="} for item in relations):
        return _merge_inequalities(relations, joiner)
    definitions = [definition(relation) for relation in relations]
    pairs = [
        (defined[0].name, defined[1])
        for defined in definitions
        if defined is not None and isinstance(defined[0], Symbol)
    ]
    if len(pairs) != len(relations) or not isinstance(items[0], Relation):
        return None
    names, values = zip(*pairs, strict=True)
    if len(pairs) == 1:
        values += items[1:]
    elif len(pairs) != len(items):
        return None
    if len(set(names)) == 1:
        return Relation(("=",), (Symbol(names[0]), Sequence("list", _flat(values))))
    if len(set(names)) == len(names):
        names, values = zip(*sorted(pairs, key=lambda pair: pair[0]), strict=True)
        letters = Sequence("tuple", tuple(map(Symbol, names)))
        return Relation(("=",), (letters, Sequence("tuple", values)))
    return None


def _flat(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes, with the members of a list in its place."""
    listed = (
        node.items if isinstance(node, Sequence) and node.kind == "list" else (node,)
        for node in nodes
    )
    return tuple(chain.from_iterable(listed))


def _merge_inequalities(relations: list[Relation], joiner: str) -> Node | None:
    sets = [found for relation in relations if (found := real_set(relation))]
    if len(sets) != len(relations) or len({found.letter for found in sets}) != 1:
        return None
    nodes = [found.as_node() for found in sets]
    letter = sets[0].letter
    if joiner == ",":
        met = real_set(reduce(partial(SetOperation, "intersection"), nodes))
        joiner = "and" if met is not None and met.pieces else "or"
    operator = "union" if joiner == "or" else "intersection"
    merged = reduce(partial(SetOperation, operator), nodes)
    return Relation(("in",), (Symbol(letter), merged)) if letter else merged


def _add_quantities(quantities: list[Quantity]) -> Node | None:
    """`2 hours and 13 minutes`: one quantity, when the units convert and get smaller."""
    parts = [part for quantity in quantities if (part := in_base_units(quantity))]
    units = {quantity.unit for quantity in quantities}
    if not len(units) == len(quantities) == len(parts) or len({part.unit for part in parts}) != 1:
        return None
    return Quantity(Add(tuple(part.number for part in parts)), parts[0].unit)


def in_base_units(quantity: Quantity) -> Quantity | None:
    """The quantity in its dimension's base unit; None when a unit does not convert."""
    factor = Fraction(1)
    powers: dict[str, int] = {}
    for unit, power in quantity.unit:
        if unit not in _UNITS:
            if unit == "unit":
                continue
            return None
        dimension, size = _UNITS[unit]
        factor *= size**power
        powers[dimension] = powers.get(dimension, 0) + power
    return Quantity(Mul((quantity.number, Number(factor))), tuple(sorted(powers.items())))


def has_unit(quantity: Quantity) -> bool:
    """Whether the unit says something: "units" and "square units" do not."""
    return any(unit != "unit" for unit, _ in quantity.unit)


def definition(relation: Relation) -> tuple[Node, Node] | None:
    """(what is named, its value) of `x = 3`, `f(x) = x + 1`, `(a, b) = (1, 2)`, `9 = x` or `x = 1/2
    = 0.5`.

    A chain must be consistent in its closed members. A closed chain without a letter names nothing:
    Label("").
    """
    if set(relation.operators) != {"="}:
        return None
    operands = list(relation.operands)
    name: Node | None = None
    first = operands[0]
    if isinstance(first, Symbol) or (
        isinstance(first, Sequence)
        and first.kind == "tuple"
        and all(isinstance(item, Symbol) for item in first.items)
    ):
        name = operands.pop(0)
    elif len(operands) == 2 and isinstance(operands[1], Symbol):
        name = operands.pop(1)
    elif not any(symbols(operand) for operand in operands):
        name = Label("")
    if name is None or any(symbols(name) & symbols(operand) for operand in operands):
        return None
    for one, two in pairwise(operands):
        if not is_expression(one) or not is_expression(two):
            return None
        if symbols(one) or symbols(two):
            continue
        try:
            finding = closed_values(one, two)
        except BeyondBudget:
            return None
        if finding is None or not finding.equal:
            return None
    return name, operands[-1]


def same_name(left: Node, right: Node) -> bool:
    """Whether two solutions name the same thing; y and f(x) do."""
    if left == right:
        return True
    names = [node.name if isinstance(node, Symbol) else "" for node in (left, right)]
    return "y" in names and any(
        name.endswith("(x)") and "'" not in name and "^" not in name for name in names
    )


def reorder(first: tuple[Node, Node], second: tuple[Node, Node]) -> tuple[Node, Node] | None:
    """Bring `(y, x) = (1, 2)` and `(x, y) = (2, 1)` into one order of letters."""
    ordered: list[Node] = []
    letters = []
    for names, values in (first, second):
        if not (isinstance(names, Sequence) and isinstance(values, Sequence)):
            return None
        if values.kind != "tuple" or len(values.items) != len(names.items):
            return None
        pairs = sorted(
            (
                (name.name, value)
                for name, value in zip(names.items, values.items, strict=True)
                if isinstance(name, Symbol)
            ),
            key=lambda pair: pair[0],
        )
        letters.append([name for name, _ in pairs])
        ordered.append(Sequence("tuple", tuple(value for _, value in pairs)))
    return (ordered[0], ordered[1]) if letters[0] == letters[1] else None


def difference(relation: Relation) -> Node:
    return Add((relation.operands[0], negate(relation.operands[1])))


def half_spaces(relation: Relation) -> list[tuple[str, Node]] | None:
    """A chain as (operator, tree) pairs meaning tree > 0, tree >= 0, tree != 0 or tree = 0."""
    pairs: list[tuple[str, Node]] = []
    for operator, (left, right) in relation.links():
        if operator == "in" or not is_expression(left) or not is_expression(right):
            return None
        if operator in ("<", "<="):
            left, right = right, left
        pairs.append((operator.replace("<", ">"), Add((left, negate(right)))))
    return pairs


def as_matrix(node: Sequence) -> Matrix | None:
    """`[[1, 2], [3, 4]]` as a matrix; None for other sequences."""
    if node.kind != "bracket":
        return None
    rows = tuple(
        item.items
        for item in node.items
        if isinstance(item, Sequence) and item.kind == "bracket" and item.items
    )
    even = len(rows) == len(node.items) and len({len(row) for row in rows}) == 1
    return (
        Matrix(rows) if even and all(is_expression(cell) for row in rows for cell in row) else None
    )
