"""Sets of real numbers as sorted disjoint pieces: intervals, unions, complements and solved
inequalities.

`[-2, 7]`, `-2 <= x <= 7`, `x >= -2 and x <= 7` and sympy's `Interval(-2, 7)` all become one piece,
so they compare equal end by end. Inequalities are solved when they are linear with rational
coefficients, or such inside an absolute value; a set with letters in its ends is kept as one piece
and cannot be merged with others.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial, reduce
from typing import Any

from verifier.answer_tree import (
    INFINITY,
    REALS,
    Add,
    Call,
    Interval,
    Node,
    Number,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    has_infinity,
    infinite_sign,
    is_expression,
    negate,
    symbols,
)
from verifier.evaluation import NotExact, Numeric, Undefined, exact_value


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval or point of a set of reals; values are exact or 60-digit ends used for
    ordering."""

    low: Node
    high: Node
    low_open: bool
    high_open: bool
    low_value: Any
    high_value: Any


@dataclass(frozen=True, slots=True)
class RealSet:
    pieces: tuple[Piece, ...]
    letter: str | None
    """The letter of the inequality it came from; None for intervals."""

    def as_node(self) -> Node:
        parts: list[Node] = [
            Interval(piece.low, piece.high, piece.low_open, piece.high_open)
            for piece in self.pieces
        ]
        return reduce(partial(SetOperation, "union"), parts or [Sequence("set", ())])


def real_set(node: Node) -> RealSet | None:
    """The set of reals a node denotes, as sorted disjoint pieces; None when it denotes none."""
    try:
        if isinstance(node, Relation):
            return _solution_set(node)
        pieces = _pieces(node)
        return None if pieces is None else RealSet(tuple(pieces), None)
    except (Undefined, NotExact):
        return None


def _pieces(node: Node) -> list[Piece] | None:
    match node:
        case Interval(low=low, high=high, low_open=low_open, high_open=high_open):
            return _one_piece(low, high, low_open, high_open)
        case Sequence(kind=("tuple" | "bracket") as kind, items=(low, high)) if is_expression(
            low
        ) and is_expression(high):
            return _one_piece(low, high, kind == "tuple", kind == "tuple")
        case Sequence(kind="set", items=items) if all(map(is_expression, items)):
            return _merge(
                [piece for item in items for piece in _one_piece(item, item, False, False)]
            )
        case SetOperation(operator=operator, left=left, right=right):
            one, two = _pieces(left), _pieces(right)
            if one is None or two is None:
                return None
            if operator == "union":
                return _merge(one + two)
            return _intersection(one, two if operator == "intersection" else _complement(two))
        case Relation():
            found = _solution_set(node)
            return None if found is None else list(found.pieces)
        case _ if is_expression(node) and not has_infinity(node):
            return _one_piece(node, node, False, False)
        case _:
            return None


def _one_piece(low: Node, high: Node, low_open: bool, high_open: bool) -> list[Piece]:
    if symbols(low) or symbols(high):
        return [Piece(low, high, low_open, high_open, None, None)]
    low_value, high_value = _end_value(low), _end_value(high)
    if low_value > high_value:
        raise NotExact
    if low_value == high_value and (low_open or high_open):
        return []
    low_open = low_open or low_value == float("-inf")
    high_open = high_open or high_value == float("inf")
    return [Piece(low, high, low_open, high_open, low_value, high_value)]


def _from_to(one: Piece, two: Piece) -> Piece:
    """From the low end of one piece to the high end of another."""
    return Piece(one.low, two.high, one.low_open, two.high_open, one.low_value, two.high_value)


def _end_value(node: Node) -> Any:
    if has_infinity(node):
        sign = infinite_sign(node)
        if sign is None:
            raise Undefined
        return sign * float("inf")
    try:
        return exact_value(node)
    except NotExact:
        with Numeric() as numeric:
            value = numeric.value(node)
            return Fraction(int(numeric.ctx.nint(value * 10**50)), 10**50)


def _merge(pieces: list[Piece]) -> list[Piece]:
    if any(piece.low_value is None for piece in pieces):
        if len(pieces) > 1:
            raise NotExact
        return pieces
    ordered = sorted(pieces, key=lambda piece: (piece.low_value, piece.low_open))
    merged: list[Piece] = []
    for piece in ordered:
        if merged:
            last = merged[-1]
            touching = piece.low_value == last.high_value and not (
                piece.low_open and last.high_open
            )
            if piece.low_value < last.high_value or touching:
                end = max(last, piece, key=lambda one: (one.high_value, not one.high_open))
                merged[-1] = _from_to(last, end)
                continue
        merged.append(piece)
    return merged


def _intersection(left: list[Piece], right: list[Piece]) -> list[Piece]:
    if any(piece.low_value is None for piece in left + right):
        raise NotExact
    found: list[Piece] = []
    for one in left:
        for two in right:
            low = max(one, two, key=lambda piece: (piece.low_value, piece.low_open))
            high = min(one, two, key=lambda piece: (piece.high_value, not piece.high_open))
            touching = low.low_value == high.high_value and not (low.low_open or high.high_open)
            if touching or low.low_value < high.high_value:
                found.append(_from_to(low, high))
    return _merge(found)


def _complement(pieces: list[Piece]) -> list[Piece]:
    infinity = float("inf")
    low, low_value, low_open = REALS.low, -infinity, True
    gaps: list[Piece] = []
    for piece in pieces:
        if piece.low_value is None:
            raise NotExact
        if low_value < piece.low_value or (
            low_value == piece.low_value and not low_open and piece.low_open
        ):
            gaps.append(
                Piece(low, piece.low, low_open, not piece.low_open, low_value, piece.low_value)
            )
        low, low_value, low_open = piece.high, piece.high_value, not piece.high_open
    if low_value < infinity:
        gaps.append(Piece(low, INFINITY, low_open, True, low_value, infinity))
    return gaps


def _solution_set(relation: Relation) -> RealSet | None:
    """An inequality, a chain of them, or a membership, in one letter."""
    if relation.operators == ("in",):
        member, container = relation.operands
        pieces = _pieces(container)
        if pieces is None or not isinstance(member, Symbol):
            return None
        return RealSet(tuple(pieces), member.name)
    letters = symbols(relation)
    pieces = _one_piece(REALS.low, REALS.high, True, True)
    letter = _bare_letter(relation) or (next(iter(letters)) if len(letters) == 1 else None)
    if letter is None:
        return None
    for operator, (left, right) in relation.links():
        if operator not in _FLIPPED or not is_expression(left) or not is_expression(right):
            return None
        solved = _solve(letter, left, operator, right)
        if solved is None:
            return None
        pieces = solved if len(relation.operators) == 1 else _intersection(pieces, solved)
    return RealSet(tuple(pieces), letter)


def _bare_letter(relation: Relation) -> str | None:
    """The letter that stands alone in an inequality whose ends may hold other letters: x in `x >
    a`."""
    alone = [operand.name for operand in relation.operands if isinstance(operand, Symbol)]
    if len(relation.operands) == 2 and len(alone) == 1 and len(symbols(relation)) > 1:
        other = next(operand for operand in relation.operands if not isinstance(operand, Symbol))
        return None if alone[0] in symbols(other) else alone[0]
    return None


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _solve(letter: str, left: Node, operator: str, right: Node) -> list[Piece] | None:
    """The pieces where `left operator right`, for a bare letter or a linear rational inequality."""
    if isinstance(right, Symbol) and right.name == letter:
        left, operator, right = right, _FLIPPED[operator], left
    if isinstance(right, Call) and right.name == "abs":
        left, operator, right = right, _FLIPPED[operator], left
    if isinstance(left, Call) and left.name == "abs" and letter not in symbols(right):
        inner = left.args[0]
        above = _solve(letter, inner, operator, right)
        below_mirror = _solve(letter, inner, _FLIPPED[operator], negate(right))
        if above is None or below_mirror is None or operator in ("=", "!="):
            return None
        if operator in ("<", "<="):
            return _intersection(above, below_mirror)
        return _merge(above + below_mirror)
    if not (isinstance(left, Symbol) and left.name == letter and letter not in symbols(right)):
        tree = Add((left, negate(right)))
        if symbols(tree) != {letter}:
            return None
        try:
            values = [exact_value(tree, {letter: Fraction(place)}) for place in (0, 1, 2, 7)]
        except ArithmeticError:
            return None
        slope = values[1] - values[0]
        if slope == 0 or values[2] - values[1] != slope or values[3] - values[0] != 7 * slope:
            return None
        right = Number(-values[0] / slope)
        operator = operator if slope > 0 else _FLIPPED[operator]
    match operator:
        case "<" | "<=":
            return _one_piece(REALS.low, right, True, operator == "<")
        case ">" | ">=":
            return _one_piece(right, INFINITY, operator == ">", True)
        case "!=":
            below = _one_piece(REALS.low, right, True, True)
            return below + _one_piece(right, INFINITY, True, True)
        case _:
            return _one_piece(right, right, False, False)
