"""The part of the answer parser that reads expressions: whatever has a value.

    sum -> product -> power -> postfix -> atom: number, letter, constant, function, command

One position in a list of tokens, moved forward; the only look back is at the token before. What an
expression may hold in brackets, and what constructors take, is more than expressions: the class on
top of this one (`answer_parser`) reads that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from verifier.answer_build import (
    add,
    decimal_number,
    divide,
    make_call,
    make_matrix,
    matrix_power,
    product,
    scale,
    ungroup,
)
from verifier.answer_tokens import (
    END,
    MAX_NUMBER_DIGITS,
    AnswerSyntaxError,
    AnswerTooLarge,
    Reading,
    Token,
)
from verifier.answer_tree import (
    INFINITY,
    MINUS_ONE,
    BaseNumeral,
    Call,
    Constant,
    Interval,
    Matrix,
    Mul,
    Node,
    Number,
    PlusMinus,
    Power,
    Symbol,
    children,
    is_expression,
    negate,
)
from verifier.answer_words import (
    BASE_WORDS,
    CONSTANTS,
    EMPTY_SET,
    FUNCTIONS,
    NUMBER_SETS,
    TRIGONOMETRIC,
    UNIT_OF,
    words,
)

MAX_DEPTH = 40
MAX_SIGNS = 3

_MATRICES = words("pmatrix bmatrix vmatrix Bmatrix matrix smallmatrix array")
_ATOM_COMMANDS = {"frac", "sqrt", "binom", "begin", "sum", "prod"}


class ExpressionParser(ABC):
    """Reads one expression from a list of tokens, from `position` on."""

    def __init__(self, tokens: list[Token], reading: Reading) -> None:
        self.tokens = tokens
        self.reading = reading
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.bar_stops = False
        self.colon_stops = False

    @abstractmethod
    def delimited(self, opening: str) -> Node:
        """What stands in brackets; the opening one has been passed."""

    @abstractmethod
    def constructor(self, name: str) -> Node:
        """A call of a Python or sympy constructor; its name has been passed."""

    # Token access

    @property
    def token(self) -> Token:
        return self.tokens[self.position] if self.position < len(self.tokens) else END

    def peek(self, ahead: int = 1) -> Token:
        place = self.position + ahead
        return self.tokens[place] if place < len(self.tokens) else END

    def take(self) -> Token:
        """The present token, passed."""
        token = self.token
        self.position += 1
        return token

    def at(self, *values: str) -> bool:
        token = self.token
        return token.kind == "operator" and token.value in values

    def accept(self, *values: str) -> bool:
        if self.at(*values):
            self.position += 1
            return True
        return False

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise AnswerSyntaxError(f"expected {value!r}, found {self.token.value!r}")

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise AnswerTooLarge(f"nested deeper than {MAX_DEPTH} levels")

    # Expressions

    def parse_sum(self) -> Node:
        self.enter()
        inverted_signs = {"±": False, "∓": True}
        sign = self.parse_signs()
        terms = [self.apply_sign(sign, self.parse_product())]
        while self.at("+", "-", "±", "∓"):
            mark = self.take().value
            if mark in inverted_signs:
                terms.append(PlusMinus(self.parse_product(), inverted_signs[mark]))
                continue
            inner = self.parse_signs()
            term = self.apply_sign(inner, self.parse_product())
            terms.append(self.apply_sign("-", term) if mark == "-" else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else add(terms)

    def parse_signs(self) -> str:
        sign = "+"
        start = self.position
        while self.at("+", "-", "±", "∓"):
            if self.position - start == MAX_SIGNS:
                raise AnswerSyntaxError(f"more than {MAX_SIGNS} signs in a row")
            mark = self.take().value
            if mark == "-":
                sign = {"+": "-", "-": "+"}.get(sign, sign)
            elif mark != "+":
                sign = mark
        return sign

    def apply_sign(self, sign: str, node: Node) -> Node:
        if sign == "+":
            return node
        if isinstance(node, Matrix) and sign == "-":
            return scale(MINUS_ONE, node)
        if isinstance(node, BaseNumeral) and sign == "-":
            return BaseNumeral("-" + node.digits, node.base)
        if not is_expression(node):
            raise AnswerSyntaxError("a sign before something that is not a number")
        return negate(node) if sign == "-" else PlusMinus(node, sign == "∓")

    def parse_product(self) -> Node:
        before = self.token
        factors = [self.parse_power()]
        bare_integer = (
            before.kind == "number"
            and isinstance(factors[0], Number)
            and factors[0].value.denominator == 1
        )
        while True:
            token = self.token
            if self.accept("*"):
                factors.append(self.parse_signed_power())
            elif self.accept("/"):
                if self.token.kind == "word":
                    self.position -= 1
                    break
                divisor = self.parse_signed_power()
                while (
                    self.reading.wide_slash
                    and isinstance(divisor, (Number, Mul))
                    and self.starts_factor()
                ):
                    divisor = product([divisor, self.parse_power()])
                factors.append(divide(factors.pop(), divisor))
            elif token.kind == "number" and token.spaced and bare_integer:
                factors = [self.parse_plain_mixed(factors[0])]
            elif self.starts_factor():
                following = self.parse_power()
                whole = factors[-1]
                percent = False
                if isinstance(following, Call) and following.name == "percent":
                    percent, following = True, following.args[0]
                if (
                    bare_integer
                    and token.value == "frac"
                    and isinstance(whole, Number)
                    and isinstance(following, Number)
                    and 0 < following.value < 1
                    and following.value.denominator > 1
                ):
                    mixed = Number(whole.value + following.value)
                    factors = [Call("percent", (mixed,)) if percent else mixed]
                else:
                    factors.append(Call("percent", (following,)) if percent else following)
            else:
                break
            bare_integer = bare_integer and len(factors) == 1 and not self.at("^")
        return product(factors)

    def parse_plain_mixed(self, whole: Node) -> Node:
        top, slash, bottom = self.token, self.peek(), self.peek(2)
        if (
            isinstance(whole, Number)
            and slash.value == "/"
            and bottom.kind == "number"
            and top.value.isdigit()
            and bottom.value.isdigit()
            and 0 < int(top.value) < int(bottom.value)
        ):
            self.position += 3
            return Number(whole.value + Fraction(int(top.value), int(bottom.value)))
        raise AnswerSyntaxError("two numbers side by side")

    def starts_factor(self) -> bool:
        """Whether the next token begins a factor of an implicit product."""
        token = self.token
        match token.kind:
            case "symbol" | "constant" | "function" | "constructor":
                return True
            case "command":
                return token.value in _ATOM_COMMANDS
            case "number":
                return not token.spaced and self.peek(-1).value in ("!", ")", "}")
            case "operator":
                if self.starts_rounded():
                    return False
                if token.value in ("(", "{", "lbar", "⌊", "⌈"):
                    return True
                if token.value == "[":
                    return self.peek().kind != "end" and self.peek(-1).kind != "number"
                return (
                    token.value == "|"
                    and self.bars == 0
                    and not self.bar_stops
                    and not token.spaced
                )
            case _:
                return False

    def starts_rounded(self) -> bool:
        r"""Whether a rounded value in parentheses comes next: `\frac{1}{3} (\approx 0.333)`."""
        return self.at("(") and self.peek().value == "≈"

    def parse_signed_power(self) -> Node:
        sign = self.parse_signs()
        return self.apply_sign(sign, self.parse_power())

    def parse_power(self) -> Node:
        self.enter()
        base = self.postfix(self.parse_atom())
        while self.at("^", "**"):
            python = self.take().value == "**"
            if not python and self.is_degree_mark():
                base = self.degree(base)
                continue
            if not python and self.accept("'"):
                continue
            exponent = self.parse_signed_power() if python else self.parse_exponent()
            if exponent is None:
                continue
            base = ungroup(base)
            if isinstance(base, Matrix):
                base = matrix_power(base, exponent)
                continue
            if not is_expression(base) or not is_expression(exponent):
                raise AnswerSyntaxError("a power of something that is not a number")
            base = self.postfix(Power(base, exponent, python))
        self.depth -= 1
        return base

    def is_degree_mark(self) -> bool:
        if self.accept("°"):
            return True
        if self.at("{") and self.peek().value == "°" and self.peek(2).value == "}":
            self.position += 3
            return True
        return False

    def degree(self, node: Node) -> Node:
        if not is_expression(node):
            raise AnswerSyntaxError("degrees of something that is not a number")
        return Call("degree", (node,))

    def parse_exponent(self) -> Node | None:
        """What `^` raises to; None for an ordinal mark as in 5^{th}."""
        if self.at("{"):
            if (
                self.peek().kind == "word"
                and self.peek().value in ("th", "st", "nd", "rd")
                and self.peek(2).value == "}"
            ):
                self.position += 3
                return None
            return self.parse_group()
        sign = self.parse_signs()
        self.enter()
        node = self.parse_atom()
        while self.accept("^"):
            exponent = self.parse_exponent()
            if exponent is None:
                raise AnswerSyntaxError("an ordinal in an exponent")
            node = Power(node, exponent)
        while self.accept("!"):
            node = Call("factorial", (node,))
        self.depth -= 1
        return self.apply_sign(sign, node)

    def postfix(self, node: Node) -> Node:
        while True:
            if self.accept("!"):
                count = 1
                while self.accept("!"):
                    count += 1
                if count > 2 or not is_expression(node):
                    raise AnswerSyntaxError("more than two factorial signs")
                node = Call("factorial" if count == 1 else "factorial2", (node,))
            elif self.accept("%"):
                if self.token.kind in ("number", "symbol") or self.at("("):
                    raise AnswerSyntaxError("a percent sign between numbers")
                if not is_expression(node):
                    raise AnswerSyntaxError("percent of something that is not a number")
                node = Call("percent", (node,))
            elif self.accept("°"):
                node = self.degree(node)
            elif isinstance(node, Symbol) and self.accept("'"):
                node = Symbol(node.name + "'")
            else:
                return node

    # Atoms

    def parse_atom(self) -> Node:
        token = self.take()
        match token.kind:
            case "number":
                return self.number(token)
            case "symbol":
                return self.symbol(token.value)
            case "constant":
                if token.value == "e" and self.at("_"):
                    return self.symbol(token.value)
                return CONSTANTS[token.value]
            case "function":
                return self.function(FUNCTIONS[token.value])
            case "constructor":
                return self.constructor(token.value)
            case "set":
                return self.named_set(token.value)
            case "command":
                return self.command(token.value)
            case "word":
                if UNIT_OF.get(token.value) is None and token.value.lower() in (
                    "infinity",
                    "infty",
                ):
                    return INFINITY
                raise AnswerSyntaxError(f"a word, {token.value!r}, where a number should be")
            case "operator":
                return self.delimited(token.value)
            case _:
                raise AnswerSyntaxError("the answer ends too early")

    def number(self, token: Token) -> Node:
        if len(token.value) > MAX_NUMBER_DIGITS:
            raise AnswerTooLarge(f"a number has more than {MAX_NUMBER_DIGITS} digits")
        if self.accept("_"):
            return self.based(token.value)
        return decimal_number(token.value)

    def based(self, digits: str) -> BaseNumeral:
        text = self.subscript().lower().removeprefix("base")
        base = int(text) if text.isdigit() and len(text) < 3 else BASE_WORDS.get(text, 0)
        if not 2 <= base <= 36:
            raise AnswerSyntaxError(f"a subscript, {text!r}, that is not a base")
        return BaseNumeral(digits.lstrip("0") or "0", base)

    def subscript(self) -> str:
        if not self.accept("{"):
            if self.token.kind not in ("number", "symbol", "constant", "word"):
                raise AnswerSyntaxError("a subscript is missing")
            return self.take().value
        parts: list[str] = []
        depth = 1
        while depth:
            token = self.take()
            if token is END:
                raise AnswerSyntaxError("a subscript is not closed")
            if token.value == "{":
                depth += 1
            elif token.value == "}":
                depth -= 1
            else:
                parts.append(token.value)
        return "".join(parts)

    def symbol(self, name: str) -> Node:
        if self.accept("_"):
            name = f"{name}_{self.subscript()}"
        return Symbol(name)

    def named_set(self, name: str) -> Node:
        if name == "empty":
            return EMPTY_SET
        if name == "R" and self.at("^"):
            if self.peek().value in ("+", "*"):
                self.position += 2
                return Interval(Number(Fraction(0)), INFINITY, True, True)
            raise AnswerSyntaxError("a power of the reals")
        if name not in NUMBER_SETS:
            raise AnswerSyntaxError(f"unknown set {name!r}")
        return NUMBER_SETS[name]

    def command(self, name: str) -> Node:
        match name:
            case "frac":
                return divide(self.argument(split=True), self.argument(split=True))
            case "sqrt":
                return self.root()
            case "binom":
                return Call("binomial", (self.argument(split=True), self.argument(split=True)))
            case "begin":
                return self.environment()
            case "sum" | "prod":
                return self.series("sum" if name == "sum" else "product")
            case _:
                raise AnswerSyntaxError(f"\\{name} is not supported")

    def argument(self, *, split: bool = False) -> Node:
        """The argument of a command: a brace group, or one token (one digit with `split`)."""
        token = self.token
        if self.at("{"):
            return self.parse_group()
        if split and token.kind == "number" and len(token.value) > 1 and token.value.isdigit():
            self.tokens = list(self.tokens)
            self.tokens[self.position] = Token("number", token.value[1:], False)
            return Number(Fraction(int(token.value[0])))
        self.enter()
        node = self.parse_atom()
        self.depth -= 1
        if not is_expression(node):
            raise AnswerSyntaxError("an argument that is not a number")
        return node

    def parse_group(self) -> Node:
        """`{...}` that LaTeX uses for grouping: exactly one expression."""
        self.expect("{")
        self.enter()
        bars, self.bars = self.bars, 0
        stops = self.bar_stops, self.colon_stops
        self.bar_stops = self.colon_stops = False
        node = self.parse_sum()
        self.expect("}")
        self.bars = bars
        self.bar_stops, self.colon_stops = stops
        self.depth -= 1
        if not is_expression(node):
            raise AnswerSyntaxError("an argument that is not a number")
        return node

    def root(self) -> Node:
        index: Node = Number(Fraction(2))
        if self.accept("["):
            index = self.parse_sum()
            self.expect("]")
        radicand = self.argument()
        return Power(radicand, divide(Number(Fraction(1)), index))

    def series(self, name: str) -> Node:
        low = bound = high = None
        for _ in range(2):
            if self.accept("_"):
                self.expect("{")
                bound = self.parse_atom()
                self.expect("=")
                low = self.parse_sum()
                self.expect("}")
            elif self.accept("^"):
                high = self.parse_exponent()
        if not isinstance(bound, Symbol | Constant) or low is None or high is None:
            raise AnswerSyntaxError("a sum without its bounds")
        letter = bound if isinstance(bound, Symbol) else Symbol(bound.name)
        body = self.parse_product()
        return Call(name, (body, letter, low, high))

    def environment(self) -> Node:
        name = self.environment_name()
        if name == "array" and self.at("{"):
            while not self.accept("}"):
                if self.take() is END:
                    raise AnswerSyntaxError("array columns are not closed")
        if name not in _MATRICES:
            raise AnswerSyntaxError(f"unknown environment {name!r}")
        self.enter()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while not (self.token.kind == "command" and self.token.value == "end"):
            row.append(self.parse_sum())
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.accept("\\\\"):
                break
        if self.take().value != "end":
            raise AnswerSyntaxError("a matrix is not closed")
        if self.environment_name() != name:
            raise AnswerSyntaxError("a matrix is closed by another environment")
        self.depth -= 1
        matrix = make_matrix(rows)
        return Call("det", children(matrix)) if name == "vmatrix" else matrix

    def environment_name(self) -> str:
        self.expect("{")
        parts = []
        while not self.accept("}"):
            if self.token is END:
                raise AnswerSyntaxError("an environment name is not closed")
            parts.append(self.take().value)
        return "".join(parts)

    def function(self, name: str) -> Node:
        power = base = None
        if name == "sqrt" and self.at("["):
            return self.root()
        for _ in range(2):
            if self.accept("^"):
                power = self.parse_exponent()
            elif name in ("log", "ln") and self.accept("_"):
                base = self.argument(split=True)
        arguments = self.function_arguments(name)
        if base is not None:
            arguments.append(base)
        node = make_call(name, arguments)
        if power is None:
            return node
        if power == MINUS_ONE and name in TRIGONOMETRIC:
            return make_call("a" + name, arguments)
        return Power(node, power)

    def function_arguments(self, name: str) -> list[Node]:
        if self.accept("("):
            return self.call_arguments()
        if self.at("{"):
            if self.peek().value != "(":
                return [self.parse_group()]
            self.position += 1
            self.expect("(")
            arguments = self.call_arguments()
            if not self.accept("}"):
                raise AnswerSyntaxError("a function's argument is not closed")
            return arguments
        if name in ("sqrt", "cbrt"):
            return [self.argument()]
        return [self.argument_chain()]

    def call_arguments(self) -> list[Node]:
        self.enter()
        bars, self.bars = self.bars, 0
        arguments: list[Node] = []
        while not self.at(")"):
            arguments.append(self.parse_sum())
            if not self.accept(","):
                break
        self.expect(")")
        self.bars = bars
        self.depth -= 1
        if not all(is_expression(node) for node in arguments):
            raise AnswerSyntaxError("a function of something that is not a number")
        return arguments

    def argument_chain(self) -> Node:
        r"""The argument of a function written without parentheses: `\sin 2x`, `\ln |x|`, `\cos
        58^\circ`."""
        self.enter()
        sign = self.parse_signs()
        first = self.token
        factors = [self.parse_power()]
        closed_by_bars = first.value in ("|", "lbar", "⌊", "⌈") or first.kind == "function"
        seen_letter = first.kind == "symbol"
        while not closed_by_bars and self.starts_factor():
            token = self.token
            if token.kind in ("function", "constructor") or token.value in (
                "|",
                "lbar",
                "begin",
                "sum",
                "prod",
            ):
                break
            if seen_letter and (token.kind == "command" or token.value in ("(", "{", "e")):
                break
            factors.append(self.parse_power())
            seen_letter = seen_letter or token.kind == "symbol"
        node = product(factors)
        has_pi = any(factor == Constant("pi") for factor in factors)
        if self.at("/") and (has_pi or self.reading.wide_slash) and self.peek().kind == "number":
            self.position += 1
            node = divide(node, self.parse_power())
        self.depth -= 1
        return self.apply_sign(sign, node)
