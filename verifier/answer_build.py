"""Nodes put together from parsed parts: products, quotients, calls, matrices, constructor calls.

Each function checks that the parts fit (a sum of sets is no answer) and folds what notation keeps
apart: a quotient of whole numbers is one fraction, a root a power, a scaled matrix a matrix. All of
them raise `AnswerSyntaxError` where the parts do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import partial, reduce
from itertools import chain

from verifier.answer_tokens import AnswerSyntaxError, AnswerTooLarge
from verifier.answer_tree import (
    MINUS_ONE,
    Add,
    Call,
    Constant,
    Interval,
    Matrix,
    Mul,
    Node,
    Number,
    Power,
    Relation,
    Sequence,
    SetOperation,
    is_expression,
    walk,
)
from verifier.answer_words import ARITIES
from verifier.evaluation import exact_value

MAX_EXPONENT_DIGITS = 4
MAX_CELL_PRODUCTS = 216
MAX_CELL_NODES = 400
MAX_MATRIX_POWER = 10
_SET_OPERATORS = {"Union": "union", "Intersection": "intersection", "Complement": "difference"}
_RELATIONS = {"Eq": "=", "Ne": "!=", "Lt": "<", "Le": "<=", "Gt": ">", "Ge": ">="}


def decimal_number(text: str) -> Number:
    if "." not in text and "e" not in text and "E" not in text:
        return Number(Fraction(int(text)))
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-").lstrip("0")) > MAX_EXPONENT_DIGITS:
        raise AnswerTooLarge("a decimal exponent has more than four digits")
    digits = mantissa.lstrip("-").replace(".", "").lstrip("0")
    return Number(Fraction(text), max(1, len(digits)))


def product(factors: Iterable[Node]) -> Node:
    """Product of parsed factors; matrices are multiplied in their order, and scaled by numbers."""
    factors = list(factors)
    if len(factors) == 1:
        return factors[0]
    factors = [ungroup(factor) for factor in factors]
    matrices = [factor for factor in factors if isinstance(factor, Matrix)]
    if matrices:
        others = [factor for factor in factors if not isinstance(factor, Matrix)]
        result = reduce(_matrix_product, matrices)
        return scale(product(others), result) if others else result
    if not all(is_expression(factor) for factor in factors):
        raise AnswerSyntaxError("a product of things that are not numbers")
    parts = (factor.factors if isinstance(factor, Mul) else (factor,) for factor in factors)
    return Mul(tuple(chain.from_iterable(parts)))


def ungroup(node: Node) -> Node:
    """Square brackets around one expression in a product only group."""
    if isinstance(node, Sequence) and node.kind == "bracket" and len(node.items) == 1:
        return node.items[0]
    return node


def scale(factor: Node, matrix: Matrix) -> Matrix:
    if not is_expression(factor):
        raise AnswerSyntaxError("a matrix times something that is not a number")
    return Matrix(tuple(tuple(product([factor, cell]) for cell in row) for row in matrix.rows))


def add(terms: list[Node]) -> Node:
    """Sum of parsed terms; matrices of one shape are added cell by cell."""
    if not all(isinstance(term, Matrix) for term in terms):
        if not all(is_expression(term) for term in terms):
            raise AnswerSyntaxError("a sum of things that are not numbers")
        return Add(tuple(terms))
    matrices = [term for term in terms if isinstance(term, Matrix)]
    if len({(len(matrix.rows), len(matrix.rows[0])) for matrix in matrices}) != 1:
        raise AnswerSyntaxError("a sum of matrices of different shapes")
    rows = zip(*(matrix.rows for matrix in matrices), strict=True)
    return Matrix(tuple(tuple(_sum(cells) for cells in zip(*row, strict=True)) for row in rows))


def _matrix_product(left: Matrix, right: Matrix) -> Matrix:
    if len(left.rows[0]) != len(right.rows):
        raise AnswerSyntaxError("a product of matrices whose shapes do not fit")
    if len(left.rows) * len(right.rows) * len(right.rows[0]) > MAX_CELL_PRODUCTS:
        raise AnswerTooLarge(f"a product of matrices takes over {MAX_CELL_PRODUCTS} products")
    columns = list(zip(*right.rows, strict=True))
    return Matrix(
        tuple(
            tuple(_sum(map(_cell_product, row, column)) for column in columns) for row in left.rows
        )
    )


def _cell_product(left: Node, right: Node) -> Node:
    return _folded(product([left, right]))


def _sum(cells: Iterable[Node]) -> Node:
    return _folded(Add(tuple(cells)))


def _folded(cell: Node) -> Node:
    """One number where plain arithmetic reaches it, so that sums of products stay small."""
    try:
        return Number(exact_value(cell))
    except ArithmeticError:
        pass
    if sum(1 for _ in walk(cell)) > MAX_CELL_NODES:
        raise AnswerTooLarge(f"a cell of a matrix has over {MAX_CELL_NODES} parts")
    return cell


def matrix_power(matrix: Matrix, exponent: Node) -> Matrix:
    """A matrix to a small positive power."""
    power = exponent.value if isinstance(exponent, Number) else None
    if power is None or power.denominator != 1 or not 1 <= power <= MAX_MATRIX_POWER:
        raise AnswerSyntaxError("a power of a matrix that is not a small whole number")
    return reduce(_matrix_product, [matrix] * int(power))


def divide(top: Node, bottom: Node) -> Node:
    top, bottom = ungroup(top), ungroup(bottom)
    if isinstance(top, Matrix) and is_expression(bottom):
        return scale(Power(bottom, MINUS_ONE), top)
    if not is_expression(top) or not is_expression(bottom):
        raise AnswerSyntaxError("a quotient of things that are not numbers")
    match top, bottom:
        case Number(value=one, significant_digits=0), Number(value=two, significant_digits=0):
            if two != 0:
                return Number(one / two)
    return Mul((top, Power(bottom, MINUS_ONE)))


def make_matrix(rows: list[tuple[Node, ...]]) -> Matrix:
    if not rows or len({len(row) for row in rows}) != 1:
        raise AnswerSyntaxError("the rows of a matrix differ in length")
    if not all(is_expression(cell) for row in rows for cell in row):
        raise AnswerSyntaxError("a matrix of things that are not numbers")
    return Matrix(tuple(rows))


def make_call(name: str, arguments: list[Node]) -> Node:
    """A call of a known function with its number of arguments checked; roots and exp become
    powers."""
    fewest, most = ARITIES.get(name, (1, 1))
    if name == "ln" and len(arguments) == 2:
        name = "log"
    elif name == "det":
        raise AnswerSyntaxError("det of something that is not a matrix")
    elif not fewest <= len(arguments) <= most:
        raise AnswerSyntaxError(f"{name} takes {fewest} arguments, found {len(arguments)}")
    match name:
        case "sqrt":
            return Power(arguments[0], Number(Fraction(1, 2)))
        case "cbrt":
            return Power(arguments[0], Number(Fraction(1, 3)))
        case "root":
            return Power(arguments[0], divide(Number(Fraction(1)), arguments[1]))
        case "exp":
            return Power(Constant("e"), arguments[0])
        case "pow":
            return Power(arguments[0], arguments[1])
        case "log2" | "log10":
            return Call("log", (arguments[0], Number(Fraction(int(name[3:])))))
    return Call(name, tuple(arguments))


def construct(name: str, arguments: list[Node], flags: list[bool]) -> Node:
    """What a Python or sympy constructor call denotes.

    Raises:
        AnswerSyntaxError: arguments that the constructor does not take.
    """
    match name:
        case "Fraction" | "Rational" if len(arguments) == 2:
            return divide(arguments[0], arguments[1])
        case "Fraction" | "Rational" | "Integer" | "Float" | "Decimal" | "mpf":
            if len(arguments) == 1 and is_expression(arguments[0]):
                return arguments[0]
        case "complex" if len(arguments) == 2 and all(map(is_expression, arguments)):
            return Add((arguments[0], Mul((arguments[1], Constant("i")))))
        case "Matrix" | "ImmutableMatrix" | "MutableDenseMatrix" | "ImmutableDenseMatrix" | "array":
            if len(arguments) == 1:
                return matrix_of(arguments[0], column=name != "array")
        case "Interval" | "Intervalopen" | "IntervalLopen" | "IntervalRopen":
            if len(arguments) == 2 and all(map(is_expression, arguments)):
                low_open, high_open, *_ = *flags, False, False
                low_open = low_open or name in ("Intervalopen", "IntervalLopen")
                high_open = high_open or name in ("Intervalopen", "IntervalRopen")
                return Interval(arguments[0], arguments[1], low_open, high_open)
        case "Union" | "Intersection" | "Complement" if arguments:
            return reduce(partial(SetOperation, _SET_OPERATORS[name]), arguments)
        case "FiniteSet":
            return Sequence("set", tuple(arguments))
        case "set" | "frozenset" | "list" | "tuple" | "Tuple" | "Point" | "Point2D" | "Point3D":
            if not arguments:
                return Sequence({"list": "bracket", "tuple": "tuple"}.get(name, "set"), ())
            if len(arguments) == 1 and isinstance(arguments[0], Sequence):
                kind = {"set": "set", "frozenset": "set", "list": "bracket"}.get(name, "tuple")
                return Sequence(kind, arguments[0].items)
            if name in ("Tuple", "Point", "Point2D", "Point3D"):
                return Sequence("tuple", tuple(arguments))
        case "Eq" | "Ne" | "Lt" | "Le" | "Gt" | "Ge" if len(arguments) == 2:
            return Relation((_RELATIONS[name],), (arguments[0], arguments[1]))
    raise AnswerSyntaxError(f"{name} with arguments it does not take")


def matrix_of(node: Node, *, column: bool) -> Node:
    """`[[1, 2], [3, 4]]` as a matrix; a flat list is a column for sympy and a plain list for
    numpy."""
    if not isinstance(node, Sequence) or not node.items:
        raise AnswerSyntaxError("a matrix without rows")
    if all(isinstance(item, Sequence) for item in node.items):
        return make_matrix([item.items for item in node.items if isinstance(item, Sequence)])
    if column:
        return make_matrix([(item,) for item in node.items])
    return Sequence("bracket", node.items)
