"""Are two expressions equal as numbers: exact rationals, 60 digits, or values at test points?

A numeric difference is certain; agreement counts as equality when at least 40 digits survive
cancellation, which is measured relative to the values and never absolutely, so `1/2004!` and
`1/2006!` differ. A decimal is exact unless it is printed like a double (15 or more digits), or
agrees in all of at least seven digits with an irrational value.

None, where a function may return it, means that arithmetic cannot tell.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, TypeGuard

from verifier.answer_tree import (
    Call,
    Mul,
    Node,
    Number,
    Power,
    has_infinity,
    holds,
    infinite_sign,
    is_expression,
    map_children,
    symbols,
)
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
from verifier.finding import Finding, Reason, different, equal

MIN_IRRATIONAL_DIGITS = 7
MIN_DOUBLE_DIGITS = 12
MAX_RETRY_DIGITS = 1500


def open_values(left: Node, right: Node, letters: frozenset[str]) -> Finding | None:
    """Compare two expressions with letters, at test points."""
    if has_infinity(left) or has_infinity(right):
        return different("infinity")
    whole = needs_whole_numbers(left) or needs_whole_numbers(right)
    whole_letters = (
        {name for name in letters if name[0] in WHOLE_LETTERS} or letters if whole else frozenset()
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


def constant_ratio_sign(left: Node, right: Node) -> int | None:
    """1 or -1, the sign of the constant c with left = c * right at every test point, of which every
    second one is negative; None when there is none or it is zero."""
    letters = symbols(left) | symbols(right)
    if not letters:
        return None
    first: Any = None
    tops: list[Any] = []
    with Numeric(complex_mode=is_complex(left) or is_complex(right)) as numeric:
        for place in range(8):
            sign = -1 if place % 2 else 1
            environment = {name: sign * sample_point(name, place, False) for name in letters}
            try:
                top = numeric.value(left, environment)
                bottom = numeric.value(right, environment)
            except (Undefined, NotExact):
                continue
            if top == 0 or bottom == 0:
                if top != bottom:
                    return None
                continue
            tops.append(top)
            ratio = top / bottom
            if first is None:
                first = ratio
            elif abs(ratio - first) > abs(first) * numeric.ctx.mpf(10) ** (-40):
                return None
            if len(tops) == 5:
                break
        varies = any(top != tops[0] for top in tops)
        if len(tops) < 3 or not varies or not isinstance(first, numeric.ctx.mpf):
            return None
        return 1 if first > 0 else -1


def _exact_points(left: Node, right: Node, points: list[dict[str, Fraction]]) -> Finding | None:
    agreed = 0
    try:
        for place in (0, 5, 1, 6):
            try:
                if exact_value(left, points[place]) != exact_value(right, points[place]):
                    return different("points")
            except Undefined:
                continue
            agreed += 1
            if agreed == 3:
                return equal(Reason.NUMERIC, "points")
    except (NotExact, BeyondBudget):
        pass
    return None


def _numeric_points(left: Node, right: Node, points: list[dict[str, Fraction]]) -> Finding | None:
    complex_tree = is_complex(left) or is_complex(right)
    loose = has_long_decimal(left) or has_long_decimal(right)
    for complex_mode in (True,) if complex_tree else (False, True):
        agreed = lopsided = 0
        with Numeric(complex_mode=complex_mode) as numeric:
            tolerance = numeric.ctx.mpf(10) ** (-13 if loose else -40)
            for place in (0, 1, 2, 5, 6, 7, 3, 4, 8, 9, 10, 11):
                one = _value_or_none(numeric, left, points[place])
                two = _value_or_none(numeric, right, points[place])
                if one is None or two is None:
                    lopsided += (one is None) != (two is None)
                    continue
                gap, size = abs(one - two), max(abs(one), abs(two))
                if gap > tolerance * size and (
                    gap > tolerance * numeric.ctx.mpf(2) ** numeric.largest
                    or size > numeric.ctx.mpf(10) ** (-25)
                ):
                    return different("points")
                agreed += 1
                if agreed >= 6:
                    break
        if agreed >= 3:
            return equal(Reason.NUMERIC, "points")
        if complex_mode and not agreed and lopsided >= 4:
            return different("undefined")
    return None


def _value_or_none(numeric: Numeric, node: Node, point: dict[str, Fraction]) -> Any:
    try:
        return numeric.value(node, point)
    except Undefined:
        return None


def closed_values(left: Node, right: Node) -> Finding | None:
    """Compare two expressions without letters."""
    infinite = has_infinity(left), has_infinity(right)
    if any(infinite):
        signs = [infinite_sign(node) for node in (left, right)]
        if all(infinite) and None not in signs and signs[0] == signs[1]:
            return equal(Reason.EXACT, "infinity")
        return different("infinity")
    values: list[Fraction | None] = []
    for node in (left, right):
        try:
            values.append(exact_value(node))
        except Undefined:
            return different("undefined")
        except (NotExact, BeyondBudget):
            values.append(None)
    if values[0] is not None and values[1] is not None:
        return _rationals(left, right, values[0], values[1])
    return _irrationals(left, right, values)


def _rationals(left: Node, right: Node, one: Fraction, two: Fraction) -> Finding:
    if one == two:
        return equal(Reason.EXACT, "rational")
    for node, value, other in ((left, one, two), (right, two, one)):
        printed = isinstance(node, Number) and node.significant_digits >= MIN_DOUBLE_DIGITS
        if printed and value.denominator != 1 and _same_double(value, other):
            return equal(Reason.NUMERIC, "double")
        if isinstance(node, Number) and node.significant_digits >= MAX_DOUBLE_DIGITS:
            if value.denominator == 1 == other.denominator:
                continue
            if abs(value - other) <= _printed_tolerance(node, other):
                return equal(Reason.NUMERIC, "double")
        elif has_long_decimal(node) and abs(value - other) <= abs(other) * Fraction(1, 10**14):
            return equal(Reason.NUMERIC, "double")
    return different("rational")


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
                    return different("undefined")
                complex_mode = True
                continue
            except NotExact:
                return None
            ctx = numeric.ctx
            gap, size = abs(one - two), max(abs(one), abs(two))
            for node, value, other in ((left, values[0], two), (right, values[1], one)):
                if value is not None and _decimal_agrees(node, value, other, numeric):
                    return equal(Reason.NUMERIC, "decimal")
            if has_long_decimal(left) or has_long_decimal(right):
                agrees = gap <= size * ctx.mpf(10) ** -14
                return equal(Reason.NUMERIC, "double") if agrees else different("numeric")
            scale = max(size, ctx.mpf(2) ** numeric.largest if numeric.largest else size)
            if size == 0:
                return equal(Reason.NUMERIC, "digits")
            if gap > scale * ctx.mpf(10) ** (10 - digits):
                return different("numeric")
            if gap <= size * ctx.mpf(10) ** -40 and size > scale * ctx.mpf(10) ** (50 - digits):
                return equal(Reason.NUMERIC, "digits")
            if size <= scale * ctx.mpf(10) ** (15 - digits) and digits > DIGITS:
                return equal(Reason.NUMERIC, "zero")
            if digits > DIGITS:
                return different("numeric")
            digits = DIGITS + 20 + int(float(ctx.log10(scale / size)))
            if digits > MAX_RETRY_DIGITS:
                raise BeyondBudget


def rounds_to(exact: Node, rounded: Node) -> bool:
    """Whether a closed value agrees with a rounded number in all its printed digits, rounded or,
    for a decimal, cut off; a number without printed digits has to be equal."""
    found = _printed(rounded)
    try:
        if found is None:
            finding = closed_values(exact, rounded)
            return finding is not None and finding.equal
        number, scale = found
        place = scale * (_last_place(number) if number.significant_digits else Fraction(1))
        with Numeric() as numeric:
            value, printed = numeric.value(exact), numeric.rational(number.value * scale)
            if not isinstance(value, numeric.ctx.mpf):
                return False
            gap, unit = abs(value - printed), numeric.rational(place)
            if gap <= unit * numeric.ctx.mpf("0.5000001"):
                return True
            cut_off = number.significant_digits > 0 and abs(value) >= abs(printed)
            return bool(cut_off and gap < unit * numeric.ctx.mpf("0.9999999"))
    except ArithmeticError:
        return False


def _printed(node: Node) -> tuple[Number, Any] | None:
    """A decimal or whole number and the factor it is written with: a percent or degree sign, a
    power of ten."""
    match node:
        case Number(value=value, significant_digits=digits) if digits or value.denominator == 1:
            return node, Fraction(1)
        case Call(name="percent", args=(Number() as number,)):
            return number, Fraction(1, 100)
        case Mul(factors=(Number() as number, Power(base=Number(value=ten), exponent=exponent))):
            if ten == 10 and isinstance(exponent, Number) and abs(exponent.value) < 1000:
                return number, exact_value(node) / number.value if number.value else Fraction(1)
    return None


def _decimal_agrees(node: Node, value: Fraction, other: Any, numeric: Numeric) -> bool:
    """Whether a printed decimal agrees in all its digits, at least seven, with an irrational
    value."""
    ctx = numeric.ctx
    if (
        not isinstance(node, Number)
        or node.significant_digits < MIN_IRRATIONAL_DIGITS
        or value == 0
        or not isinstance(other, ctx.mpf)
    ):
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


def has_plain_log(node: Node) -> bool:
    return holds(node, _is_plain_log)


def _is_plain_log(node: Node) -> TypeGuard[Call]:
    return isinstance(node, Call) and node.name == "log" and len(node.args) == 1


def common_logs(node: Node) -> Node:
    """The tree with every log of unnamed base read as base 10."""
    node = map_children(node, common_logs)
    return Call("log", (node.args[0], Number(Fraction(10)))) if _is_plain_log(node) else node


def logarithms_equal(left: Node, right: Node) -> bool:
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
            return sum((_logarithm(factor, numeric) for factor in factors), numeric.ctx.zero)
        case _:
            value = numeric.value(node)
            if not isinstance(value, numeric.ctx.mpf) or value <= 0:
                raise Undefined
            return numeric.ctx.log(value)


def exact_key(node: Node) -> Fraction | None:
    if not is_expression(node):
        return None
    try:
        return exact_value(node)
    except ArithmeticError:
        return None


def far_apart(one: complex | None, two: complex | None) -> bool:
    return one is not None and two is not None and abs(one - two) > 1e-6 * max(abs(one), abs(two))


def rough(node: Node) -> complex | None:
    """A float approximation of a closed expression, to pair up long lists; None for anything
    else, and for what no float holds."""
    percent = isinstance(node, Call) and node.name == "percent"
    if percent or not is_expression(node) or symbols(node):
        return None
    try:
        with Numeric(complex_mode=True, digits=15) as numeric:
            value = complex(numeric.value(node))
        return value if math.isfinite(abs(value)) else None
    except (ArithmeticError, OverflowError):
        return None
