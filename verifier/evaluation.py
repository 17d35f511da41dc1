r"""Values of answer trees: exact rationals first, then 60 decimal digits.

`exact_value` computes with `Fraction` under a bit budget; `Numeric.value` with mpmath under a
budget of function calls and a bound on magnitudes, so a tower such as `9**9**9` is refused from its
logarithm and never computed. Both are deterministic: a budget counts work, not seconds.

Real mode answers school questions: an odd root of a negative number is real, and a square root or
logarithm of one is undefined. Complex mode takes principal values. Letters take their values from
`environment`.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import MPContext

from verifier.answer_tree import (
    Add,
    Call,
    Constant,
    Mul,
    Node,
    Number,
    Power,
    Symbol,
    contains,
    holds,
)

MAX_INTEGER_BITS = 65_000
MAX_RATIONAL_BITS = 20_000
"""Fractions get less: adding two of them costs a greatest common divisor, quadratic in the bits."""
MAX_TERMS = 400
MAX_NESTED_TERMS = 12
DIGITS = 60
MAX_LOG2_MAGNITUDE = 70_000
MAX_WORK = 6_000
MAX_DOUBLE_DIGITS = 15
_FACTORIAL_LIMIT = 6_000
_TRIGONOMETRIC_LIMIT = 10**30


class Undefined(ArithmeticError):
    """The tree has no value here: division by zero, or outside a function's real domain."""


class BeyondBudget(ArithmeticError):
    """The value exists, perhaps, but is too large or too costly to compute."""


class NotExact(ArithmeticError):
    """The value is not a rational that plain arithmetic reaches."""


Environment = Mapping[str, Fraction]
_NOTHING: dict[str, Fraction] = {}


def exact_value(node: Node, environment: Environment = _NOTHING) -> Fraction:
    """The rational value of a tree.

    Raises:
        NotExact: a root, a transcendental function, a letter without a value or an object.
        Undefined: division by zero.
        BeyondBudget: an intermediate integer over 65,000 bits, or fraction over 20,000.
    """
    match node:
        case Number(value=value):
            return value
        case Add(terms=terms):
            total = Fraction(0)
            for term in terms:
                total += exact_value(term, environment)
            return _sized(total)
        case Mul(factors=factors):
            result = Fraction(1)
            for factor in factors:
                result = _sized(result * exact_value(factor, environment))
            return result
        case Power(base=base, exponent=exponent):
            return _exact_power(base, exponent, environment)
        case Call(name=name, args=args):
            return _exact_call(name, args, environment)
        case Symbol(name=name):
            if name in environment:
                return environment[name]
            raise NotExact
        case _:
            raise NotExact


def _sized(value: Fraction) -> Fraction:
    limit = MAX_INTEGER_BITS if value.denominator == 1 else MAX_RATIONAL_BITS
    if value.numerator.bit_length() > limit or value.denominator.bit_length() > limit:
        raise BeyondBudget
    return value


def _exact_power(base: Node, exponent: Node, environment: Environment) -> Fraction:
    power = exact_value(exponent, environment)
    root = exact_value(base, environment)
    if root in (0, 1) and power > 0:
        return root
    if power.denominator != 1:
        return _exact_root(root, power)
    if root == 0:
        if power < 0:
            raise Undefined
        return Fraction(1)
    if abs(root) == 1:
        return root if power.numerator % 2 else Fraction(1)
    size = max(root.numerator.bit_length(), root.denominator.bit_length()) - 1
    if abs(power.numerator) * max(size, 1) > MAX_INTEGER_BITS:
        raise BeyondBudget
    return _sized(root**power.numerator)


def _exact_root(root: Fraction, power: Fraction) -> Fraction:
    """root ** power when the result is rational and small enough to find by integer square or cube
    roots."""
    if root < 0 or power.denominator not in (2, 3) or abs(power.numerator) > 64:
        raise NotExact
    degree = power.denominator
    if max(root.numerator.bit_length(), root.denominator.bit_length()) > 512:
        raise NotExact
    top, bottom = _integer_root(root.numerator, degree), _integer_root(root.denominator, degree)
    if top is None or bottom is None:
        raise NotExact
    if top == 0 and power < 0:
        raise Undefined
    return Fraction(top, bottom) ** power.numerator


def _integer_root(value: int, degree: int) -> int | None:
    guess = math.isqrt(value) if degree == 2 else round(value ** (1 / 3)) if value < 2**150 else -1
    return guess if guess >= 0 and guess**degree == value else None


def _exact_call(name: str, args: tuple[Node, ...], environment: Environment) -> Fraction:
    if name in ("sum", "product"):
        return _series(name, args, environment, exact_value)
    if name not in _EXACT_CALLS:
        raise NotExact
    return _EXACT_CALLS[name](*(exact_value(arg, environment) for arg in args))


def _series(
    name: str, args: tuple[Node, ...], environment: Environment, evaluate: Callable[..., Any]
) -> Any:
    body, letter, low, high = args
    first, last = exact_value(low, environment), exact_value(high, environment)
    if first.denominator != 1 or last.denominator != 1 or not isinstance(letter, Symbol):
        raise NotExact
    nested = holds(body, _is_series)
    if last - first > (MAX_NESTED_TERMS if nested else MAX_TERMS):
        raise BeyondBudget
    total: Any = Fraction(0) if name == "sum" else Fraction(1)
    for index in range(int(first), int(last) + 1):
        term = evaluate(body, {**environment, letter.name: Fraction(index)})
        total = total + term if name == "sum" else total * term
        if isinstance(total, Fraction):
            _sized(total)
    return total


def _is_series(node: Node) -> bool:
    return isinstance(node, Call) and node.name in ("sum", "product")


def _whole(value: Fraction, limit: int = 10**9) -> int:
    if value.denominator != 1:
        raise NotExact
    if abs(value.numerator) > limit:
        raise BeyondBudget
    return value.numerator


def _exact_factorial(value: Fraction, step: int = 1) -> Fraction:
    """number (number - step) (number - 2 step) ... of positive factors."""
    number = _whole(value)
    if number < 0:
        raise Undefined
    if number > _FACTORIAL_LIMIT:
        raise BeyondBudget
    product = math.factorial(number) if step == 1 else math.prod(range(number, 0, -step))
    return _sized(Fraction(product))


def _exact_binomial(top: Fraction, bottom: Fraction) -> Fraction:
    number, chosen = _whole(top), _whole(bottom)
    if number < 0 <= chosen:
        raise NotExact
    if not 0 <= chosen <= number:
        return Fraction(0)
    if min(chosen, number - chosen) * max(1, number.bit_length()) > MAX_INTEGER_BITS:
        raise BeyondBudget
    return _sized(Fraction(math.comb(number, chosen)))


def _exact_mod(value: Fraction, modulus: Fraction) -> Fraction:
    if modulus == 0:
        raise Undefined
    return value - modulus * math.floor(value / modulus)


_EXACT_CALLS: dict[str, Callable[..., Fraction]] = {
    "percent": lambda value: value / 100,
    "abs": abs,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "sign": lambda value: Fraction((value > 0) - (value < 0)),
    "factorial": _exact_factorial,
    "factorial2": lambda value: _exact_factorial(value, 2),
    "binomial": _exact_binomial,
    "mod": _exact_mod,
    "gcd": lambda *values: Fraction(math.gcd(*map(_whole, values))),
    "lcm": lambda *values: Fraction(math.lcm(*map(_whole, values))),
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "re": lambda value: value,
    "im": lambda value: Fraction(0),
    "conjugate": lambda value: value,
    "det": lambda *cells: _exact_determinant(cells),
}


def _exact_determinant(cells: tuple[Fraction, ...]) -> Fraction:
    size = math.isqrt(len(cells))
    if size * size != len(cells):
        raise Undefined
    if size > 8:
        raise BeyondBudget
    rows = [list(cells[place * size : (place + 1) * size]) for place in range(size)]
    result = Fraction(1)
    for column in range(size):
        pivot = next((place for place in range(column, size) if rows[place][column] != 0), None)
        if pivot is None:
            return Fraction(0)
        if pivot != column:
            rows[column], rows[pivot] = rows[pivot], rows[column]
            result = -result
        result *= rows[column][column]
        for place in range(column + 1, size):
            ratio = rows[place][column] / rows[column][column]
            rows[place] = [
                left - ratio * right for left, right in zip(rows[place], rows[column], strict=True)
            ]
    return _sized(result)


_CONTEXT = MPContext()
_CONTEXT_LOCK = threading.Lock()
"""mpmath keeps its working precision in the context and caches constants globally: one thread at a
time."""

_INVERSES = {"acot": "atan", "asec": "acos", "acsc": "asin"}


class Numeric:
    """Evaluates trees to mpmath numbers; one instance is one comparison's budget.

    Use it as a context manager: it holds the lock on the mpmath context meanwhile.
    """

    def __init__(self, *, complex_mode: bool = False, digits: int = DIGITS) -> None:
        self.complex_mode = complex_mode
        self.digits = digits
        self.work = 0
        self.largest = 0
        """Largest binary exponent met: how many digits cancellation may have cost."""
        self.ctx = _CONTEXT

    def __enter__(self) -> Numeric:
        _CONTEXT_LOCK.acquire()
        self.ctx.dps = self.digits + 10
        return self

    def __exit__(self, *exception: object) -> None:
        _CONTEXT_LOCK.release()

    def value(self, node: Node, environment: Environment = _NOTHING) -> Any:
        """The value as an mpf or mpc.

        Raises:
            Undefined: no value here, in this mode.
            BeyondBudget: too large or too costly.
            NotExact: an object, or a letter without a value.
        """
        self.work += 1
        if self.work > MAX_WORK:
            raise BeyondBudget
        ctx = self.ctx
        match node:
            case Number(value=number):
                return self.rational(number)
            case Symbol(name=name):
                if name not in environment:
                    raise NotExact
                return self.rational(environment[name])
            case Constant(name="pi" | "e" as name):
                return +getattr(ctx, name)
            case Constant(name="i") if self.complex_mode:
                return ctx.mpc(0, 1)
            case Constant():
                raise Undefined
            case Add(terms=terms):
                total = ctx.zero
                for term in terms:
                    item = self.value(term, environment)
                    if (size := self._log2(item)) > self.largest:
                        self.largest = int(size)
                    total = total + item
                return total
            case Mul(factors=factors):
                result = ctx.one
                for factor in factors:
                    result = result * self.value(factor, environment)
                return self._checked(result)
            case Power(base=base, exponent=exponent, principal=principal):
                return self._power(base, exponent, principal, environment)
            case Call(name=name, args=args):
                return self._call(name, args, environment)
            case _:
                raise NotExact

    def rational(self, number: Fraction) -> Any:
        """A fraction at working precision."""
        if number.denominator == 1:
            return self.ctx.mpf(number.numerator)
        return self.ctx.mpf(number.numerator) / number.denominator

    def _log2(self, value: Any) -> float:
        """Binary exponent of a value's magnitude; -inf for zero."""
        return float(self.ctx.mag(value))

    def _checked(self, value: Any) -> Any:
        if value != 0 and abs(self._log2(value)) > MAX_LOG2_MAGNITUDE:
            raise BeyondBudget
        return value

    def _is_real(self, value: Any) -> bool:
        return not isinstance(value, self.ctx.mpc)

    def _power(self, base: Node, exponent: Node, principal: bool, environment: Environment) -> Any:
        ctx = self.ctx
        root = self.value(base, environment)
        power = self.value(exponent, environment)
        if root == 0:
            if power == 0:
                return ctx.one
            if ctx.re(power) > 0:
                return ctx.zero
            raise Undefined
        log_size = self._log2(power) if power != 0 else 0
        if log_size < -40:
            return ctx.one if log_size < -400 else root**power
        if log_size > 40:
            raise BeyondBudget
        magnitude = abs(float(ctx.re(power))) * (abs(self._log2(root)) + 1)
        if magnitude > 2 * MAX_LOG2_MAGNITUDE:
            raise BeyondBudget
        if not self._is_real(root) or not self._is_real(power):
            return self._checked(root**power)
        if power == ctx.floor(power):
            return self._checked(root ** int(power))
        if root < 0:
            odd_root = None if principal else self._odd_root(exponent, environment)
            if odd_root is not None:
                result = (-root) ** power
                return self._checked(-result if odd_root else result)
            if not self.complex_mode:
                raise Undefined
            return self._checked(ctx.mpc(root) ** power)
        return self._checked(root**power)

    def _odd_root(self, exponent: Node, environment: Environment) -> bool | None:
        """For p/q with q odd: whether p is odd; None for other exponents."""
        try:
            value = exact_value(exponent, environment)
        except ArithmeticError:
            return None
        return bool(value.numerator % 2) if value.denominator % 2 else None

    def _call(self, name: str, args: tuple[Node, ...], environment: Environment) -> Any:
        if name in ("sum", "product"):
            return _series(name, args, environment, self.value)
        self.work += 4
        values = [self.value(arg, environment) for arg in args]
        if name in _EXACT_CALLS and name not in ("abs", "percent", "re", "im", "conjugate"):
            return self._discrete(name, args, values, environment)
        ctx = self.ctx
        first = values[0]
        for value in values:
            if value != 0 and self._log2(value) > MAX_LOG2_MAGNITUDE:
                raise BeyondBudget
        match name:
            case "degree":
                return first * ctx.pi / 180
            case "percent":
                return first / 100
            case "abs":
                return abs(first)
            case "re" | "im" | "conjugate":
                return {"re": ctx.re, "im": ctx.im, "conjugate": ctx.conj}[name](first)
            case "ln" | "log":
                result = self._logarithm(first)
                if len(values) == 2:
                    below = self._logarithm(values[1])
                    if below == 0:
                        raise Undefined
                    result = result / below
                return result
            case "gamma":
                return self._gamma(first)
        return self._elementary(name, first)

    def _logarithm(self, value: Any) -> Any:
        if value == 0 or (not self.complex_mode and value < 0):
            raise Undefined
        return self.ctx.log(value)

    def _gamma(self, value: Any) -> Any:
        self.work += 40
        if self._is_real(value) and value <= 0 and value == self.ctx.floor(value):
            raise Undefined
        if abs(value) > _FACTORIAL_LIMIT:
            raise BeyondBudget
        return self.ctx.gamma(value)

    def _elementary(self, name: str, value: Any) -> Any:
        ctx = self.ctx
        if name in _INVERSES:
            if name == "acot":
                return ctx.pi / 2 - ctx.atan(value)
            if value == 0:
                raise Undefined
            return self._elementary(_INVERSES[name], 1 / value)
        if name in ("asin", "acos") and not self.complex_mode and abs(value) > 1:
            raise Undefined
        if name == "acosh" and not self.complex_mode and value < 1:
            raise Undefined
        if name == "atanh" and (abs(value) == 1 or (not self.complex_mode and abs(value) > 1)):
            raise Undefined
        if name[0] != "a" and abs(value) > (40_000 if name.endswith("h") else _TRIGONOMETRIC_LIMIT):
            raise BeyondBudget
        function = getattr(ctx, name, None)
        if function is None:
            raise NotExact
        if name in ("tan", "sec", "cot", "csc", "coth", "csch") and self._at_pole(name, value):
            raise Undefined
        return function(value)

    def _at_pole(self, name: str, value: Any) -> bool:
        ctx = self.ctx
        below = {"tan": ctx.cos, "sec": ctx.cos, "cot": ctx.sin, "csc": ctx.sin}
        zero = below.get(name, ctx.sinh)(value)
        return zero == 0 or self._log2(zero) < -3 * self.digits

    def _discrete(
        self, name: str, args: tuple[Node, ...], values: list[Any], environment: Environment
    ) -> Any:
        """Functions of whole numbers; floors of irrational values."""
        ctx = self.ctx
        try:
            return self.rational(
                _EXACT_CALLS[name](*(exact_value(arg, environment) for arg in args))
            )
        except NotExact:
            pass
        real = [self._real(value) for value in values]
        match name:
            case "floor" | "ceil":
                nearest = ctx.nint(real[0])
                if real[0] != 0 and self._log2(real[0]) > 3 * self.digits:
                    raise BeyondBudget
                if abs(real[0] - nearest) < ctx.mpf(10) ** (-self.digits // 2):
                    return nearest
                return ctx.floor(real[0]) if name == "floor" else ctx.ceil(real[0])
            case "max" | "min":
                return max(real) if name == "max" else min(real)
            case "sign":
                return ctx.sign(real[0])
            case "factorial":
                return self._gamma(real[0] + 1)
            case "binomial":
                top, bottom = real
                return self._gamma(top + 1) / (
                    self._gamma(bottom + 1) * self._gamma(top - bottom + 1)
                )
            case "mod":
                if real[1] == 0:
                    raise Undefined
                return real[0] - real[1] * ctx.floor(real[0] / real[1])
            case "det":
                size = math.isqrt(len(values))
                if size * size != len(values) or size > 6:
                    raise Undefined
                return ctx.det(
                    ctx.matrix([values[row * size : (row + 1) * size] for row in range(size)])
                )
        raise NotExact

    def _real(self, value: Any) -> Any:
        if self._is_real(value):
            return value
        if abs(self.ctx.im(value)) > abs(value) * self.ctx.mpf(10) ** (-self.digits + 10):
            raise Undefined
        return self.ctx.re(value)


def has_long_decimal(node: Node) -> bool:
    """Whether a decimal with the digits of a printed double occurs: such a tree is known to a
    double's precision."""
    return holds(
        node,
        lambda one: isinstance(one, Number) and one.significant_digits >= MAX_DOUBLE_DIGITS,
    )


def is_complex(node: Node) -> bool:
    return holds(node, lambda one: isinstance(one, Constant) and one.name == "i")


def needs_whole_numbers(node: Node) -> bool:
    """Whether letters are read as whole numbers: factorials, floors, and powers such as (-1)^n."""
    return holds(node, _is_of_whole_numbers)


def _is_of_whole_numbers(node: Node) -> bool:
    match node:
        case Call(name=name) if name in _WHOLE_CALLS:
            return contains(node, Symbol)
        case Power(
            base=Number(value=value) | Mul(factors=(Number(value=value), *_)), exponent=exponent
        ):
            return value < 0 and contains(exponent, Symbol)
    return False


_WHOLE_CALLS = ("factorial", "factorial2", "binomial", "floor", "ceil", "gcd", "lcm", "mod")
WHOLE_LETTERS = frozenset("nkmNMKpqrsjl")
_SCALES = (
    (Fraction(1, 10), 1),
    (Fraction(1), 3),
    (Fraction(5), 60),
    (Fraction(1, 3), 2),
    (Fraction(2), 9),
)


@lru_cache(maxsize=4096)
def sample_point(name: str, place: int, whole: bool) -> Fraction:
    """The value of a letter at the place-th test point: fixed by its name, so verdicts are
    reproducible.

    Places 0..4 are positive at several scales; later places have either sign.
    """
    rng = random.Random(f"{name}/{place}/{whole}")
    if whole:
        return Fraction(rng.randrange(1, 8) if place % 2 else rng.randrange(4, 25))
    low, high = _SCALES[place % len(_SCALES)]
    value = Fraction(rng.randrange(int(low * 10**6), high * 10**6) | 1, 10**6)
    return value if place < 5 or rng.random() < 0.4 else -value
