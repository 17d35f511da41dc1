"""The typed tree an answer is parsed into: plain frozen records, no behaviour beyond small
predicates.

Two families share one tree. *Expressions* (`Number` .. `PlusMinus`) have a value once their letters
have one. *Objects* (`Sequence` .. `Label`) are what answers are made of besides: lists, intervals,
matrices, relations, quantities, words. Notation is kept only where it carries meaning: bracket
kinds, the base of a numeral, printed digits of a decimal. Fields that only record notation do not
take part in equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    significant_digits: int = field(default=0, compare=False)
    """Printed significant digits of a decimal literal; 0 for integers and fractions."""


@dataclass(frozen=True, slots=True)
class Constant:
    name: str
    """One of pi, e, i, oo."""


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str


@dataclass(frozen=True, slots=True)
class Add:
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mul:
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Power:
    base: Node
    exponent: Node
    principal: bool = field(default=False, compare=False)
    """Written with Python's `**`: a negative base has its principal root, not the real odd root."""


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class PlusMinus:
    operand: Node
    inverted: bool = False
    """True for the minus-plus sign, which takes the opposite of the plus-minus beside it."""


@dataclass(frozen=True, slots=True)
class Sequence:
    kind: str
    """list (bare commas), set (braces), tuple (parentheses), bracket (square: a list or a closed
    interval)."""
    items: tuple[Node, ...]
    joiner: str = field(default=",", compare=False)
    """What separated the items: a comma, and, or."""


@dataclass(frozen=True, slots=True)
class Interval:
    low: Node
    high: Node
    low_open: bool
    high_open: bool


@dataclass(frozen=True, slots=True)
class SetOperation:
    operator: str
    """union, intersection or difference."""
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    operators: tuple[str, ...]
    """Each of = ≈ < > <= >= != in; one fewer than operands."""
    operands: tuple[Node, ...]

    def links(self) -> Iterator[tuple[str, tuple[Node, Node]]]:
        """Each operator with the operands on its two sides."""
        return zip(self.operators, pairwise(self.operands), strict=True)


@dataclass(frozen=True, slots=True)
class Quantity:
    number: Node
    unit: tuple[tuple[str, int], ...]
    """Sorted (unit word, exponent) pairs."""


@dataclass(frozen=True, slots=True)
class BaseNumeral:
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """What may be a time of day: `7:05`, `7:05:30`, `7:05 PM`."""

    hour: int
    minute: int
    second: int = 0
    half: str = ""
    """am, pm, or nothing where it is not said."""


@dataclass(frozen=True, slots=True)
class Label:
    text: str
    """Lower case, without spaces and punctuation."""


Node: TypeAlias = (
    Number
    | Constant
    | Symbol
    | Add
    | Mul
    | Power
    | Call
    | PlusMinus
    | Sequence
    | Interval
    | SetOperation
    | Matrix
    | Relation
    | Quantity
    | BaseNumeral
    | Ratio
    | Clock
    | Label
)

_EXPRESSIONS = (Number, Constant, Symbol, Add, Mul, Power, Call, PlusMinus)
ZERO = Number(Fraction(0))
MINUS_ONE = Number(Fraction(-1))
INFINITY = Constant("oo")
REALS = Interval(Mul((MINUS_ONE, INFINITY)), INFINITY, True, True)


def is_expression(node: Node) -> bool:
    return isinstance(node, _EXPRESSIONS)


def negate(node: Node) -> Node:
    """-node, folded for numbers so that -3 is one Number."""
    if isinstance(node, Number):
        return Number(-node.value, node.significant_digits)
    return Mul((MINUS_ONE, node))


def children(node: Node) -> tuple[Node, ...]:
    """Direct subtrees, left to right."""
    match node:
        case Add(terms=items) | Mul(factors=items) | Call(args=items) | Sequence(items=items):
            return items
        case Relation(operands=items) | Ratio(parts=items):
            return items
        case Power(base=base, exponent=exponent):
            return (base, exponent)
        case PlusMinus(operand=operand):
            return (operand,)
        case Quantity(number=number):
            return (number,)
        case Interval(low=low, high=high):
            return (low, high)
        case SetOperation(left=left, right=right):
            return (left, right)
        case Matrix(rows=rows):
            return tuple(cell for row in rows for cell in row)
        case _:
            return ()


def map_children(node: Node, change: Callable[[Node], Node]) -> Node:
    """The node with each direct subtree changed, left to right, where it is a sum, product, power,
    call or sequence; others stay."""
    match node:
        case Add(terms=items):
            return Add(tuple(map(change, items)))
        case Mul(factors=items):
            return Mul(tuple(map(change, items)))
        case Power(base=base, exponent=exponent, principal=principal):
            return Power(change(base), change(exponent), principal)
        case Call(name=name, args=items):
            return Call(name, tuple(map(change, items)))
        case Sequence(kind=kind, items=items):
            return Sequence(kind, tuple(map(change, items)))
        case _:
            return node


def walk(node: Node) -> Iterator[Node]:
    """The node and every node below it."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        pending += children(node)


def holds(node: Node, test: Callable[[Node], bool]) -> bool:
    """Whether the test is true of the node or of any node below it."""
    return any(map(test, walk(node)))


def contains(node: Node, kind: type) -> bool:
    return holds(node, lambda one: isinstance(one, kind))


def symbols(node: Node) -> frozenset[str]:
    """Names of the letters in a tree; the bound letter of a sum or product is not one."""
    if isinstance(node, Symbol):
        return frozenset((node.name,))
    names: frozenset[str] = frozenset()
    for child in children(node):
        names |= symbols(child)
    if isinstance(node, Call) and node.name in ("sum", "product") and node.args:
        bound = node.args[1]
        if isinstance(bound, Symbol):
            names -= {bound.name}
    return names


def has_infinity(node: Node) -> bool:
    """Whether infinity occurs as a value; the bounds of a series do not count."""
    if isinstance(node, Constant):
        return node.name == "oo"
    if isinstance(node, Call) and node.name in ("sum", "product"):
        return False
    return any(has_infinity(child) for child in children(node))


def infinite_sign(node: Node) -> int | None:
    """1 or -1 for plus or minus infinity written plainly, None for anything else."""
    if node == INFINITY:
        return 1
    if isinstance(node, Mul) and len(node.factors) == 2 and node.factors[1] == INFINITY:
        first = node.factors[0]
        if isinstance(first, Number) and first.value != 0:
            return 1 if first.value > 0 else -1
    return None


def to_json(node: Node) -> Any:
    """Nested lists for the symbolic worker; expressions, lists of them and equations only.

    Raises:
        TypeError: the tree holds a node that has no value.
    """
    match node:
        case Number(value=value):
            return ["number", str(value.numerator), str(value.denominator)]
        case Constant(name=name) | Symbol(name=name):
            return [type(node).__name__.lower(), name]
        case Add() | Mul() | Power() | Call():
            head = node.name if isinstance(node, Call) else type(node).__name__.lower()
            return ["call", head, [to_json(child) for child in children(node)]]
        case _:
            raise TypeError(f"{type(node).__name__} has no value to hand to sympy")
