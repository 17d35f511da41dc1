r"""Are two parsed answers the same mathematical object?

Types first, then members. Each question goes down this ladder and stops at the first rung that
knows:

    same tree -> structure (sets, tuples, intervals, relations, units) -> exact rationals
    -> 60 digits (closed) or fixed test points (letters) -> sympy in another process

A numeric difference is certain; agreement counts as equality when at least 40 digits survive
cancellation, which is measured relative to the values and never absolutely, so `1/2004!` and
`1/2006!` differ. Comparison is symmetric and deterministic: budgets count work, not time.

Conventions. Lists and sets ignore order but count repeats; tuples, intervals and matrices keep
order; a bare `a, b` matches `(a, b)` in that order; a list of one is its member. `x =` is dropped
when the other side names nothing. Units, currency, degree and percent signs may be dropped on one
side; two different units are converted or differ. A percentage also equals its hundredth. A decimal
is exact unless it is printed like a double (15 or more digits), or agrees in all of at least seven
digits with an irrational value.

Not covered: solution sets of equations that are not written out, renamed bound letters, piecewise
functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise
from itertools import product as combinations_of
from typing import Any

from verifier.answer_tree import (
    MINUS_ONE,
    Add,
    BaseNumeral,
    Call,
    Interval,
    Label,
    Matrix,
    Mul,
    Node,
    Number,
    PlusMinus,
    Power,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    children,
    contains,
    has_infinity,
    infinite_sign,
    is_expression,
    negate,
    symbols,
)
from verifier.answer_words import UNIT_OF
from verifier.evaluation import (
    DIGITS,
    MAX_DOUBLE_DIGITS,
    WHOLE_LETTERS,
    BeyondBudget,
    NotExact,
    Numeric,
    Undefined,
    exact_value,
    has_long_decimal,
    is_complex,
    needs_whole_numbers,
    sample_point,
)
from verifier.real_sets import RealSet, real_set

MIN_IRRATIONAL_DIGITS = 7
MIN_DOUBLE_DIGITS = 12
MAX_COMPARISONS = 400
MAX_UNMATCHED = 12
MAX_SIGNS = 5
MAX_RETRY_DIGITS = 1500

SymbolicJudge = Callable[[Node, Node], bool | None]


class Reason(StrEnum):
    """Why a verdict came out as it did."""

    EXACT = "exact"
    """Equal by text, structure or rational arithmetic."""
    NUMERIC = "numeric"
    """Equal to 60 digits, or at every test point."""
    SYMBOLIC = "symbolic"
    """Equal by sympy."""
    DIFFERENT = "different"
    UNDECIDED = "undecided"
    """Not shown equal: neither arithmetic nor sympy could tell in the time allowed."""
    LIMIT = "limit"
    """Refused: too long, too deep or too large to compute."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one comparison; `path` names the rung that decided."""

    equal: bool
    reason: Reason
    path: str


def _equal(reason: Reason, path: str) -> Finding:
    return Finding(True, reason, path)


def _different(path: str) -> Finding:
    return Finding(False, Reason.DIFFERENT, path)


SAME = _equal(Reason.EXACT, "tree")
_STRENGTH = {Reason.EXACT: 0, Reason.NUMERIC: 1, Reason.SYMBOLIC: 2}

# Units that convert: unit -> (base unit of its kind, factor to it).
_UNITS: dict[str, tuple[str, Fraction]] = {
    **{
        unit: ("mm", Fraction(size))
        for unit, size in (("mm", "1"), ("cm", "10"), ("m", "1000"), ("km", "1000000"))
    },
    **{
        unit: ("in", Fraction(size))
        for unit, size in (("in", "1"), ("ft", "12"), ("yd", "36"), ("mi", "63360"))
    },
    **{
        unit: ("s", Fraction(size))
        for unit, size in (("s", "1"), ("min", "60"), ("h", "3600"), ("day", "86400"))
    },
    **{
        unit: ("mg", Fraction(size))
        for unit, size in (("mg", "1"), ("g", "1000"), ("kg", "1000000"))
    },
    **{unit: ("ml", Fraction(size)) for unit, size in (("ml", "1"), ("l", "1000"))},
    **{unit: ("cent", Fraction(size)) for unit, size in (("cent", "1"), ("dollar", "100"))},
    "week": ("s", Fraction(604800)),
}


def compare_readings(
    lefts: Iterable[Node], rights: Iterable[Node], symbolic: SymbolicJudge | None = None
) -> Finding:
    """Compare every reading of one answer with every reading of the other; equal when any pair is.

    Args:
        symbolic: judge of last resort, True or False or None for "cannot tell"; None leaves such
        pairs undecided.
    """
    worst: Finding | None = None
    rights = tuple(rights)
    for left in lefts:
        for right in rights:
            finding = _Comparison(symbolic).run(left, right)
            if finding.equal:
                return finding
            if worst is None or worst.reason is Reason.DIFFERENT:
                worst = finding
    return worst or _different("unparsed")


class _Comparison:
    """One pair of trees and the work budget spent on it."""

    def __init__(self, symbolic: SymbolicJudge | None) -> None:
        self.symbolic = symbolic
        self.remaining = MAX_COMPARISONS

    def run(self, left: Node, right: Node) -> Finding:
        try:
            return self.compare(prepare(left), prepare(right))
        except BeyondBudget:
            return Finding(False, Reason.LIMIT, "budget")

    def compare(self, left: Node, right: Node) -> Finding:
        self.remaining -= 1
        if self.remaining < 0:
            raise BeyondBudget
        if left == right:
            return SAME
        if isinstance(left, Relation) or isinstance(right, Relation):
            return self.relations(left, right)
        if isinstance(left, Label) or isinstance(right, Label):
            return _different("label")
        if isinstance(left, BaseNumeral) or isinstance(right, BaseNumeral):
            return _different("base")
        if is_expression(left) and is_expression(right):
            return self.expressions(left, right)
        if isinstance(left, Quantity) or isinstance(right, Quantity):
            return self.quantities(left, right)
        if isinstance(left, Ratio) or isinstance(right, Ratio):
            return self.ratios(left, right)
        if isinstance(left, (Interval, SetOperation)) or isinstance(
            right, (Interval, SetOperation)
        ):
            return self.real_sets(real_set(left), real_set(right))
        if isinstance(left, Matrix) or isinstance(right, Matrix):
            return self.matrices(left, right)
        if isinstance(left, Sequence) and isinstance(right, Sequence):
            return self.sequences(left, right)
        return _different("type")

    # Relations

    def relations(self, left: Node, right: Node) -> Finding:
        if not (isinstance(left, Relation) and isinstance(right, Relation)):
            relation, other = (left, right) if isinstance(left, Relation) else (right, left)
            assert isinstance(relation, Relation)
            return self.relation_and_value(relation, other)
        first, second = definition(left), definition(right)
        if first is not None and second is not None:
            if same_name(first[0], second[0]):
                return self.compare(first[1], second[1])
            reordered = reorder(first, second)
            if reordered is not None:
                return self.compare(*reordered)
        if set(left.operators) == {"="} == set(right.operators):
            return self.equations(left, right)
        one, two = real_set(left), real_set(right)
        if one is not None and two is not None:
            if one.letter != two.letter:
                return _different("letter")
            return self.real_sets(one, two)
        return self.inequalities(left, right)

    def relation_and_value(self, relation: Relation, other: Node) -> Finding:
        defined = definition(relation)
        if defined is not None:
            return self.compare(defined[1], other)
        if relation.operators == ("in",):
            return self.compare(relation.operands[1], other)
        own = real_set(relation)
        return self.real_sets(own, real_set(other)) if own is not None else _different("relation")

    def equations(self, left: Relation, right: Relation) -> Finding:
        if len(left.operands) != 2 or len(right.operands) != 2:
            if len(left.operands) != len(right.operands):
                return _different("equation")
            return self.in_order(left.operands, right.operands, "equation")
        if not all(is_expression(side) for side in (*left.operands, *right.operands)):
            return self.in_order(left.operands, right.operands, "equation")
        ratio = self.constant_ratio(_difference(left), _difference(right))
        return _equal(Reason.NUMERIC, "equation") if ratio is not None else _different("equation")

    def inequalities(self, left: Relation, right: Relation) -> Finding:
        first, second = _half_spaces(left), _half_spaces(right)
        if first is None or second is None or len(first) != len(second):
            return _different("inequality")
        unmatched = list(second)
        for operator, tree in first:
            for place, (other_operator, other) in enumerate(unmatched):
                if operator != other_operator:
                    continue
                ratio = self.constant_ratio(tree, other)
                if ratio is not None and (ratio > 0 or operator == "!="):
                    del unmatched[place]
                    break
            else:
                return _different("inequality")
        return _equal(Reason.NUMERIC, "inequality")

    def constant_ratio(self, left: Node, right: Node) -> float | None:
        """The constant c with left = c * right at every test point; None when there is none or it
        is zero."""
        self.remaining -= 1
        letters = symbols(left) | symbols(right)
        if not letters:
            return None
        first: Any = None
        seen: Any = None
        varies = False
        agreed = 0
        with Numeric(complex_mode=is_complex(left) or is_complex(right)) as numeric:
            for place in range(8):
                environment = {name: sample_point(name, place, False) for name in letters}
                try:
                    top, bottom = (
                        numeric.value(left, environment),
                        numeric.value(right, environment),
                    )
                except (Undefined, NotExact):
                    continue
                if top == 0 or bottom == 0:
                    if top != bottom:
                        return None
                    continue
                varies = varies or (seen is not None and top != seen)
                seen = top
                ratio = top / bottom
                if first is None:
                    first = ratio
                elif abs(ratio - first) > abs(first) * numeric.ctx.mpf(10) ** (-40):
                    return None
                agreed += 1
                if agreed == 5:
                    break
            if agreed < 3 or not varies or not isinstance(first, numeric.ctx.mpf):
                return None
            return 1.0 if first > 0 else -1.0

    # Sets of reals

    def real_sets(self, left: RealSet | None, right: RealSet | None) -> Finding:
        if left is None or right is None:
            return _different("type")
        if len(left.pieces) != len(right.pieces):
            return _different("interval")
        findings = []
        for one, two in zip(left.pieces, right.pieces, strict=True):
            if (one.low_open, one.high_open) != (two.low_open, two.high_open):
                return _different("interval ends")
            for end, other in ((one.low, two.low), (one.high, two.high)):
                findings.append(self.compare(end, other))
                if not findings[-1].equal:
                    return findings[-1]
        return _weakest(findings, "interval")

    # Collections

    def sequences(self, left: Sequence, right: Sequence) -> Finding:
        kinds = {left.kind, right.kind}
        nested = as_matrix(left), as_matrix(right)
        if len(left.items) != len(right.items):
            return _different("length")
        if nested[0] is not None and nested[1] is not None and kinds == {"bracket"}:
            return self.matrices(nested[0], nested[1])
        if "tuple" in kinds and kinds & {"set", "bracket"}:
            return _different("brackets")
        if "tuple" in kinds or (kinds == {"bracket"} and len(left.items) == 2):
            return self.in_order(left.items, right.items, "tuple")
        return self.in_any_order(list(left.items), list(right.items))

    def in_order(self, left: tuple[Node, ...], right: tuple[Node, ...], path: str) -> Finding:
        findings = []
        for one, two in zip(left, right, strict=True):
            findings.append(self.compare(one, two))
            if not findings[-1].equal:
                return findings[-1]
        return _weakest(findings, path)

    def in_any_order(self, left: list[Node], right: list[Node]) -> Finding:
        left, right = _without_common(left, right)
        if not left:
            return _equal(Reason.EXACT, "list")
        sizes = [_rough(node) for node in right]
        if len(left) > MAX_UNMATCHED and (
            None in sizes or any(_rough(node) is None for node in left)
        ):
            raise BeyondBudget
        findings = []
        for node in left:
            size = _rough(node)
            for place, other in enumerate(right):
                if _far_apart(size, sizes[place]):
                    continue
                finding = self.compare(node, other)
                if finding.equal:
                    findings.append(finding)
                    del right[place], sizes[place]
                    break
            else:
                return _different("list")
        return _weakest(findings, "list")

    def matrices(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Matrix) and isinstance(right, Matrix):
            if (len(left.rows), len(left.rows[0])) != (len(right.rows), len(right.rows[0])):
                return _different("shape")
            cells = [tuple(cell for row in matrix.rows for cell in row) for matrix in (left, right)]
            return self.in_order(cells[0], cells[1], "matrix")
        matrix, other = (left, right) if isinstance(left, Matrix) else (right, left)
        assert isinstance(matrix, Matrix)
        if not isinstance(other, Sequence) or other.kind == "set":
            return _different("type")
        nested = as_matrix(other)
        if nested is not None:
            return self.matrices(matrix, nested)
        vector = tuple(cell for row in matrix.rows for cell in row)
        if min(len(matrix.rows), len(matrix.rows[0])) != 1 or len(vector) != len(other.items):
            return _different("shape")
        return self.in_order(vector, other.items, "vector")

    # Quantities and ratios

    def quantities(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Quantity) and isinstance(right, Quantity):
            if left.unit == right.unit or not (_bare(left) and _bare(right)):
                return self.compare(left.number, right.number)
            one, two = _converted(left), _converted(right)
            if one is None or two is None or one.unit != two.unit:
                return _different("unit")
            return self.compare(one.number, two.number)
        quantity, other = (left, right) if isinstance(left, Quantity) else (right, left)
        assert isinstance(quantity, Quantity)
        if isinstance(other, Mul) and isinstance(other.factors[-1], Symbol):
            letter = UNIT_OF.get(other.factors[-1].name)
            if quantity.unit == ((letter, 1),):
                factors = other.factors[:-1]
                other = factors[0] if len(factors) == 1 else Mul(factors)
        return self.compare(quantity.number, other)

    def ratios(self, left: Node, right: Node) -> Finding:
        if isinstance(left, Ratio) and isinstance(right, Ratio):
            if len(left.parts) != len(right.parts):
                return _different("length")
            findings = []
            for one, two in zip(left.parts[1:], right.parts[1:], strict=True):
                findings.append(self.compare(Mul((one, right.parts[0])), Mul((two, left.parts[0]))))
                if not findings[-1].equal:
                    return findings[-1]
            return _weakest(findings, "ratio")
        ratio, other = (left, right) if isinstance(left, Ratio) else (right, left)
        assert isinstance(ratio, Ratio)
        if len(ratio.parts) != 2 or not is_expression(other):
            return _different("type")
        return self.compare(Mul((ratio.parts[0], Power(ratio.parts[1], MINUS_ONE))), other)

    # Expressions

    def expressions(self, left: Node, right: Node) -> Finding:
        percents = [isinstance(node, Call) and node.name == "percent" for node in (left, right)]
        finding = self.values(left, right)
        if finding.equal:
            return finding
        if percents[0] != percents[1]:
            bare = [
                node.args[0] if isinstance(node, Call) and node.name == "percent" else node
                for node in (left, right)
            ]
            return self.values(bare[0], bare[1])
        logs = [_has_plain_log(node) for node in (left, right)]
        if logs[0] != logs[1]:
            return self.values(_common_logs(left), _common_logs(right))
        return finding

    def values(self, left: Node, right: Node) -> Finding:
        letters = symbols(left) | symbols(right)
        try:
            finding = (
                self.open_values(left, right, letters) if letters else closed_values(left, right)
            )
        except NotExact:
            finding = None
        except BeyondBudget:
            if _log_equal(left, right):
                return _equal(Reason.NUMERIC, "logarithm")
            return Finding(False, Reason.LIMIT, "magnitude")
        except RecursionError:
            return Finding(False, Reason.LIMIT, "depth")
        if finding is not None:
            return finding
        judged = self.symbolic(left, right) if self.symbolic is not None else None
        if judged is None:
            return Finding(False, Reason.UNDECIDED, "symbolic")
        return _equal(Reason.SYMBOLIC, "sympy") if judged else _different("sympy")

    def open_values(self, left: Node, right: Node, letters: frozenset[str]) -> Finding | None:
        if has_infinity(left) or has_infinity(right):
            return _different("infinity")
        whole = needs_whole_numbers(left) or needs_whole_numbers(right)
        whole_letters = (
            {name for name in letters if name[0] in WHOLE_LETTERS} or letters
            if whole
            else frozenset()
        )
        points = [
            {name: sample_point(name, place, name in whole_letters) for name in letters}
            for place in range(12)
        ]
        if not has_long_decimal(left) and not has_long_decimal(right):
            finding = _exact_points(left, right, points)
            if finding is not None:
                return finding
        return _numeric_points(left, right, points)


def _exact_points(left: Node, right: Node, points: list[dict[str, Fraction]]) -> Finding | None:
    agreed = 0
    try:
        for place in (0, 5, 1, 6):
            try:
                if exact_value(left, points[place]) != exact_value(right, points[place]):
                    return _different("points")
            except Undefined:
                continue
            agreed += 1
            if agreed == 3:
                return _equal(Reason.NUMERIC, "points")
    except (NotExact, BeyondBudget):
        pass
    return None


def _numeric_points(left: Node, right: Node, points: list[dict[str, Fraction]]) -> Finding | None:
    complex_tree = is_complex(left) or is_complex(right)
    loose = has_long_decimal(left) or has_long_decimal(right)
    for complex_mode in (False, True):
        if complex_tree and not complex_mode:
            continue
        agreed = lopsided = 0
        with Numeric(complex_mode=complex_mode) as numeric:
            tolerance = numeric.ctx.mpf(10) ** (-13 if loose else -40)
            for place in (0, 1, 2, 5, 6, 7, 3, 4, 8, 9, 10, 11):
                one, two = (
                    _value_or_none(numeric, left, points[place]),
                    _value_or_none(numeric, right, points[place]),
                )
                if one is None or two is None:
                    lopsided += (one is None) != (two is None)
                    continue
                if abs(one - two) > tolerance * max(abs(one), abs(two)):
                    if abs(one - two) > tolerance * numeric.ctx.mpf(2) ** numeric.largest:
                        return _different("points")
                    if max(abs(one), abs(two)) > numeric.ctx.mpf(10) ** (-25):
                        return _different("points")
                agreed += 1
                if agreed >= 6:
                    break
        if agreed >= 3:
            return _equal(Reason.NUMERIC, "points")
        if complex_mode and not agreed and lopsided >= 4:
            return _different("undefined")
    return None


def _value_or_none(numeric: Numeric, node: Node, point: dict[str, Fraction]) -> Any:
    try:
        return numeric.value(node, point)
    except Undefined:
        return None


def closed_values(left: Node, right: Node) -> Finding | None:
    """Compare two expressions without letters; None when neither arithmetic can tell."""
    infinite = has_infinity(left), has_infinity(right)
    if any(infinite):
        signs = [infinite_sign(node) for node in (left, right)]
        if all(infinite) and None not in signs and signs[0] == signs[1]:
            return _equal(Reason.EXACT, "infinity")
        return _different("infinity")
    values: list[Fraction | None] = []
    for node in (left, right):
        try:
            values.append(exact_value(node))
        except Undefined:
            return _different("undefined")
        except (NotExact, BeyondBudget):
            values.append(None)
    if values[0] is not None and values[1] is not None:
        return _rationals(left, right, values[0], values[1])
    return _irrationals(left, right, values)


def _rationals(left: Node, right: Node, one: Fraction, two: Fraction) -> Finding:
    if one == two:
        return _equal(Reason.EXACT, "rational")
    for node, value, other in ((left, one, two), (right, two, one)):
        printed = isinstance(node, Number) and node.significant_digits >= MIN_DOUBLE_DIGITS
        if printed and value.denominator != 1 and _same_double(value, other):
            return _equal(Reason.NUMERIC, "double")
        if isinstance(node, Number) and node.significant_digits >= MAX_DOUBLE_DIGITS:
            if value.denominator == 1 == other.denominator:
                continue
            if abs(value - other) <= _printed_tolerance(node, other):
                return _equal(Reason.NUMERIC, "double")
        elif has_long_decimal(node) and abs(value - other) <= abs(other) * Fraction(1, 10**14):
            return _equal(Reason.NUMERIC, "double")
    return _different("rational")


def _same_double(one: Fraction, two: Fraction) -> bool:
    """Whether both round to the same double: a decimal may print one in fewer than 15 digits."""
    try:
        return float(one) == float(two) != 0.0
    except OverflowError:
        return False


def _printed_tolerance(decimal: Number, other: Fraction) -> Fraction:
    """What a correctly printed double may miss its value by: two units of rounding, or half a
    printed place."""
    return max(abs(other) * Fraction(4, 2**53), _last_place(decimal) * Fraction(51, 100))


def _last_place(decimal: Number) -> Fraction:
    """The value of one unit in the last printed digit."""
    value = abs(decimal.value)
    if value == 0:
        return Fraction(0)
    exponent = len(str(value.numerator)) - len(str(value.denominator))
    while Fraction(10) ** exponent > value:
        exponent -= 1
    while Fraction(10) ** (exponent + 1) <= value:
        exponent += 1
    return Fraction(10) ** (exponent - decimal.significant_digits + 1)


def _irrationals(left: Node, right: Node, values: list[Fraction | None]) -> Finding | None:
    digits = DIGITS
    complex_mode = is_complex(left) or is_complex(right)
    while True:
        with Numeric(complex_mode=complex_mode, digits=digits) as numeric:
            try:
                one, two = numeric.value(left), numeric.value(right)
            except Undefined:
                if complex_mode:
                    return _different("undefined")
                complex_mode = True
                continue
            except NotExact:
                return None
            ctx = numeric.ctx
            gap, size = abs(one - two), max(abs(one), abs(two))
            for node, value, other in ((left, values[0], two), (right, values[1], one)):
                if value is not None and _decimal_agrees(node, value, other, numeric):
                    return _equal(Reason.NUMERIC, "decimal")
            if has_long_decimal(left) or has_long_decimal(right):
                agrees = gap <= size * ctx.mpf(10) ** -14
                return _equal(Reason.NUMERIC, "double") if agrees else _different("numeric")
            scale = max(size, ctx.mpf(2) ** numeric.largest if numeric.largest else size)
            if size == 0:
                return _equal(Reason.NUMERIC, "digits")
            if gap > scale * ctx.mpf(10) ** (10 - digits):
                return _different("numeric")
            if gap <= size * ctx.mpf(10) ** -40 and size > scale * ctx.mpf(10) ** (50 - digits):
                return _equal(Reason.NUMERIC, "digits")
            if size <= scale * ctx.mpf(10) ** (15 - digits) and digits > DIGITS:
                return _equal(Reason.NUMERIC, "zero")
            if digits > DIGITS:
                return _different("numeric")
            digits = DIGITS + 20 + int(float(ctx.log10(scale / size)))
            if digits > MAX_RETRY_DIGITS:
                raise BeyondBudget


def _decimal_agrees(node: Node, value: Fraction, other: Any, numeric: Numeric) -> bool:
    """Whether a printed decimal agrees in all its digits, at least seven, with an irrational
    value."""
    if (
        not isinstance(node, Number)
        or node.significant_digits < MIN_IRRATIONAL_DIGITS
        or value == 0
    ):
        return False
    ctx = numeric.ctx
    if not isinstance(other, ctx.mpf):
        return False
    gap = abs(numeric.rational(value) - other)
    place = numeric.rational(_last_place(node))
    if node.significant_digits >= MAX_DOUBLE_DIGITS:
        return bool(gap <= max(abs(other) * 4 / 2**53, place))
    rounded = gap <= place * ctx.mpf("0.5000001")
    truncated = gap < place and abs(other) >= abs(numeric.rational(value))
    if not (rounded or truncated):
        return False
    nearest = Fraction(int(ctx.nint(other * 5040)), 5040)
    return bool(abs(numeric.rational(nearest) - other) > abs(other) * ctx.mpf(10) ** -40)


# Normal forms


def prepare(node: Node) -> Node:
    """Write out plus-minus signs, merge solutions, and unwrap lists of one."""
    match node:
        case Sequence():
            return _prepare_sequence(node)
        case Relation(operators=operators, operands=operands):
            sides = tuple(prepare(operand) for operand in operands)
            return Relation(operators, sides)
        case Quantity(number=number, unit=unit):
            inner = prepare(number)
            if isinstance(inner, Sequence):
                return Sequence(inner.kind, tuple(Quantity(item, unit) for item in inner.items))
            return Quantity(inner, unit)
        case Interval() | SetOperation() | Matrix() | Label() | BaseNumeral() | Ratio():
            return node
        case _:
            if contains(node, PlusMinus):
                variants = _write_out_signs(node)
                return Sequence("list", variants) if len(variants) > 1 else variants[0]
            return node


def _write_out_signs(node: Node) -> tuple[Node, ...]:
    """Every choice of signs; plus-minus and minus-plus together share one choice."""
    count, linked = _count_signs(node)
    if count > MAX_SIGNS:
        raise BeyondBudget
    choices: Iterable[tuple[int, ...]] = (
        ((1,) * count, (-1,) * count) if linked else combinations_of((1, -1), repeat=count)
    )
    return tuple(dict.fromkeys(_with_signs(node, list(signs)) for signs in choices))


def _count_signs(node: Node) -> tuple[int, bool]:
    count, linked = 0, False
    stack: list[Node] = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, PlusMinus):
            count += 1
            linked = linked or current.inverted
        stack.extend(children(current))
    return count, linked


def _with_signs(node: Node, signs: list[int]) -> Node:
    match node:
        case PlusMinus(operand=operand, inverted=inverted):
            sign = -signs.pop() if inverted else signs.pop()
            inner = _with_signs(operand, signs)
            return inner if sign > 0 else negate(inner)
        case Add(terms=terms):
            return Add(tuple(_with_signs(term, signs) for term in terms))
        case Mul(factors=factors):
            return Mul(tuple(_with_signs(factor, signs) for factor in factors))
        case Power(base=base, exponent=exponent, principal=principal):
            return Power(_with_signs(base, signs), _with_signs(exponent, signs), principal)
        case Call(name=name, args=args):
            return Call(name, tuple(_with_signs(arg, signs) for arg in args))
        case Sequence(kind=kind, items=items):
            return Sequence(kind, tuple(_with_signs(item, signs) for item in items))
        case _:
            return node


def _prepare_sequence(node: Sequence) -> Node:
    if node.kind == "tuple":
        if contains(node, PlusMinus):
            variants = _write_out_signs(node)
            return Sequence("list", tuple(prepare(variant) for variant in variants))
        items = tuple(prepare(item) for item in node.items)
        return items[0] if len(items) == 1 else Sequence("tuple", items)
    items = ()
    for item in node.items:
        ready = prepare(item)
        if isinstance(ready, Sequence) and ready.kind == "list":
            items += ready.items
        else:
            items += (ready,)
    if len(items) == 1:
        return items[0]
    if items and any(isinstance(item, Relation) for item in items):
        merged = _merge_solutions(items, node.joiner)
        if merged is not None:
            return merged
    if node.joiner == "and" and items and all(isinstance(item, Quantity) for item in items):
        total = _add_quantities([item for item in items if isinstance(item, Quantity)])
        if total is not None:
            return total
    return Sequence(node.kind, items, node.joiner)


def _merge_solutions(items: tuple[Node, ...], joiner: str) -> Node | None:
    """`x = 1, x = 2` and `x = 1, 2` give x one list; `x = 1, y = 2` gives (x, y) a tuple in the
    letters' order."""
    relations = [item for item in items if isinstance(item, Relation)]
    if len(relations) == len(items) and any(set(item.operators) != {"="} for item in relations):
        return _merge_inequalities(relations, joiner)
    definitions = [definition(item) if isinstance(item, Relation) else None for item in items]
    first = definitions[0]
    if first is None or not isinstance(first[0], Symbol):
        return None
    if all(other is None for other in definitions[1:]) and not any(
        isinstance(item, Relation) for item in items[1:]
    ):
        return Relation(("=",), (first[0], _flat_list([first[1], *items[1:]])))
    if any(defined is None or not isinstance(defined[0], Symbol) for defined in definitions):
        return None
    pairs = [
        (defined[0].name, defined[1])
        for defined in definitions
        if defined and isinstance(defined[0], Symbol)
    ]
    names = [name for name, _ in pairs]
    if len(set(names)) == 1:
        return Relation(("=",), (first[0], _flat_list([value for _, value in pairs])))
    if len(set(names)) == len(names):
        pairs.sort(key=lambda pair: pair[0])
        letters = Sequence("tuple", tuple(Symbol(name) for name, _ in pairs))
        return Relation(("=",), (letters, Sequence("tuple", tuple(value for _, value in pairs))))
    return None


def _flat_list(values: list[Node]) -> Node:
    flat: list[Node] = []
    for value in values:
        flat.extend(
            value.items if isinstance(value, Sequence) and value.kind == "list" else (value,)
        )
    return Sequence("list", tuple(flat))


def _merge_inequalities(relations: list[Relation], joiner: str) -> Node | None:
    sets = [real_set(relation) for relation in relations]
    if any(found is None for found in sets) or len({found.letter for found in sets if found}) != 1:
        return None
    merged: Node = relations[0].operands[0]
    nodes = [found.as_node() for found in sets if found]
    letter = sets[0].letter if sets[0] else None
    if joiner == ",":
        overlap = nodes[0]
        for node in nodes[1:]:
            overlap = SetOperation("intersection", overlap, node)
        met = real_set(overlap)
        joiner = "and" if met is not None and met.pieces else "or"
    merged = nodes[0]
    for node in nodes[1:]:
        merged = SetOperation("union" if joiner == "or" else "intersection", merged, node)
    return Relation(("in",), (Symbol(letter), merged)) if letter else merged


def _add_quantities(quantities: list[Quantity]) -> Node | None:
    """`2 hours and 13 minutes`: one quantity, when the units convert and get smaller."""
    converted = [_converted(quantity) for quantity in quantities]
    units = [quantity.unit for quantity in quantities]
    if len(set(units)) != len(units) or any(part is None for part in converted):
        return None
    if len({part.unit for part in converted if part}) != 1:
        return None
    first = converted[0]
    assert first is not None
    return Quantity(Add(tuple(part.number for part in converted if part)), first.unit)


def _converted(quantity: Quantity) -> Quantity | None:
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


def _bare(quantity: Quantity) -> bool:
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
    if len(operands) > 1:
        for one, two in pairwise(operands):
            if not is_expression(one) or not is_expression(two):
                return None
            try:
                if symbols(one) or symbols(two):
                    continue
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


def _difference(relation: Relation) -> Node:
    return Add((relation.operands[0], negate(relation.operands[1])))


def _half_spaces(relation: Relation) -> list[tuple[str, Node]] | None:
    """A chain as (operator, tree) pairs meaning tree > 0, tree >= 0, tree != 0 or tree = 0."""
    pairs: list[tuple[str, Node]] = []
    for place, operator in enumerate(relation.operators):
        left, right = relation.operands[place], relation.operands[place + 1]
        if operator == "in" or not is_expression(left) or not is_expression(right):
            return None
        if operator in ("<", "<="):
            left, right = right, left
        pairs.append((operator.replace("<", ">"), Add((left, negate(right)))))
    return pairs


# Small helpers


def as_matrix(node: Sequence) -> Matrix | None:
    """`[[1, 2], [3, 4]]` as a matrix; None for other sequences."""
    if node.kind != "bracket" or not node.items:
        return None
    rows = []
    for item in node.items:
        if not (isinstance(item, Sequence) and item.kind == "bracket" and item.items):
            return None
        rows.append(item.items)
    if len({len(row) for row in rows}) != 1 or not all(
        is_expression(cell) for row in rows for cell in row
    ):
        return None
    return Matrix(tuple(rows))


def _weakest(findings: list[Finding], path: str) -> Finding:
    reason = max(
        (finding.reason for finding in findings),
        key=lambda one: _STRENGTH[one],
        default=Reason.EXACT,
    )
    return _equal(reason, path)


def _without_common(left: list[Node], right: list[Node]) -> tuple[list[Node], list[Node]]:
    """Drop members whose exact values occur on both sides."""
    keys = [[_exact_key(node) for node in nodes] for nodes in (left, right)]
    common = Counter(key for key in keys[0] if key is not None) & Counter(
        key for key in keys[1] if key is not None
    )
    remaining: list[list[Node]] = []
    for nodes, names in zip((left, right), keys, strict=True):
        budget = common.copy()
        kept: list[Node] = []
        for node, key in zip(nodes, names, strict=True):
            if key is not None and budget[key] > 0:
                budget[key] -= 1
            else:
                kept.append(node)
        remaining.append(kept)
    return remaining[0], remaining[1]


def _exact_key(node: Node) -> Fraction | None:
    if not is_expression(node):
        return None
    try:
        return exact_value(node)
    except ArithmeticError:
        return None


def _far_apart(one: complex | None, two: complex | None) -> bool:
    return one is not None and two is not None and abs(one - two) > 1e-6 * max(abs(one), abs(two))


def _rough(node: Node) -> complex | None:
    """A float approximation of a closed expression, to pair up long lists; None for anything
    else."""
    if (
        not is_expression(node)
        or symbols(node)
        or (isinstance(node, Call) and node.name == "percent")
    ):
        return None
    try:
        with Numeric(complex_mode=True, digits=15) as numeric:
            return complex(numeric.value(node))
    except (ArithmeticError, OverflowError):
        return None


def _has_plain_log(node: Node) -> bool:
    if isinstance(node, Call) and node.name == "log" and len(node.args) == 1:
        return True
    return any(_has_plain_log(child) for child in children(node))


def _common_logs(node: Node) -> Node:
    """The tree with every log of unnamed base read as base 10."""
    match node:
        case Call(name="log", args=(argument,)):
            return Call("log", (_common_logs(argument), Number(Fraction(10))))
        case Call(name=name, args=args):
            return Call(name, tuple(_common_logs(arg) for arg in args))
        case Add(terms=terms):
            return Add(tuple(_common_logs(term) for term in terms))
        case Mul(factors=factors):
            return Mul(tuple(_common_logs(factor) for factor in factors))
        case Power(base=base, exponent=exponent, principal=principal):
            return Power(_common_logs(base), _common_logs(exponent), principal)
        case _:
            return node


def _log_equal(left: Node, right: Node) -> bool:
    """Whether two positive products of powers, too large to compute, have equal logarithms to 40
    digits."""
    if symbols(left) or symbols(right):
        return False
    try:
        with Numeric() as numeric:
            one, two = _logarithm(left, numeric), _logarithm(right, numeric)
            if max(abs(one), abs(two)) > numeric.ctx.mpf(10) ** 30:
                return False
            return bool(abs(one - two) <= numeric.ctx.mpf(10) ** -20)
    except ArithmeticError:
        return False


def _logarithm(node: Node, numeric: Numeric) -> Any:
    match node:
        case Power(base=base, exponent=exponent):
            return numeric.value(exponent) * _logarithm(base, numeric)
        case Mul(factors=factors):
            total = numeric.ctx.zero
            for factor in factors:
                total += _logarithm(factor, numeric)
            return total
        case _:
            value = numeric.value(node)
            if not isinstance(value, numeric.ctx.mpf) or value <= 0:
                raise Undefined
            return numeric.ctx.log(value)
