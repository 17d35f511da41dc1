"""One form for what can be written in several ways, before two answers are compared.

Plus-minus signs are written out, solutions of one letter merged, several letters put in one order,
inequalities turned into `tree > 0`, units converted, lists of one unwrapped. Nothing here says
whether two answers are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, reduce
from itertools import chain
from itertools import product as combinations_of

from verifier.answer_tree import (
    Add,
    Matrix,
    Node,
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
    walk,
)
from verifier.definitions import cases_of, definition, without_rounded
from verifier.evaluation import BeyondBudget
from verifier.real_sets import real_set
from verifier.units import in_base_units

MAX_SIGNS = 5


def prepare(node: Node) -> Node:
    """Write out plus-minus signs, merge solutions, and unwrap lists of one."""
    match node:
        case Sequence():
            return _prepare_sequence(node)
        case Relation(operators=operators) if "≈" in operators:
            exact = without_rounded(node)
            return node if exact is None else prepare(exact)
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
    """`x = 1, x = 2` and `x = 1, 2` give x one list; `x = 1, y = 2` gives the letters a tuple, and
    `p = 5, q = 2, p = 7, q = 2` a list of tuples."""
    relations = [item for item in items if isinstance(item, Relation)]
    if len(relations) == len(items) and any(set(item.operators) != {"="} for item in relations):
        return _merge_inequalities(relations, joiner)
    definitions = [defined for relation in relations if (defined := definition(relation))]
    if len(definitions) != len(relations) or not isinstance(items[0], Relation):
        return None
    if len(relations) == 1:
        name, value = definitions[0]
        definitions += [(name, item) for item in items[1:]]
    elif len(relations) != len(items):
        return None
    merged = cases_of(definitions)
    if merged is None:
        return None
    name, value = merged
    if joiner == "or" and isinstance(name, Sequence) and name.kind == "list":
        return None
    if isinstance(name, Symbol) and isinstance(value, Sequence):
        values = _flat(value.items)
        value = Sequence("list", values, joiner) if len(values) > 1 else values[0]
    return Relation(("=",), (name, value))


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


def difference(relation: Relation) -> Node:
    return Add((relation.operands[0], negate(relation.operands[1])))


def half_spaces(relation: Relation) -> list[tuple[str, Node]] | None:
    """A chain as (operator, tree) pairs meaning tree > 0, tree >= 0, tree != 0 or tree = 0."""
    pairs: list[tuple[str, Node]] = []
    for operator, (left, right) in relation.links():
        if operator in ("in", "≈") or not is_expression(left) or not is_expression(right):
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
