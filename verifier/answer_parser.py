r"""One parser for the two notations answers come in: LaTeX, and what Python and sympy print.

A tokenizer and a precedence parser, both linear in the text, build the typed tree of
`verifier.answer_tree`. Text is never evaluated: no `eval`, no `sympify`, and a name outside the
tables below is a letter, a unit word or a parse error. A tail that does not parse makes the whole
answer unparsed (then it is a `Label`, comparable with the same words only); a prefix is never
accepted.

    text -> tokens -> list of statements -> relation -> set operation -> quantity -> sum -> product
    -> power

Some notation has two honest readings: `1,625` is a number or a list, `1/2x` is x/2 or 1/(2x),
`2e-1` is 0.2 or 2e - 1, `abc` is a word or a product. `parse_answer` returns a tree for each, most
likely first.

Not covered: integrals, derivatives, limits, piecewise definitions, congruences, ellipses, prose.
They stay labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

from verifier.answer_tokens import (
    _THOUSANDS,
    END,
    MAX_NUMBER_DIGITS,
    AnswerSyntaxError,
    AnswerTooLarge,
    Reading,
    Token,
    tokenize,
)
from verifier.answer_tree import (
    INFINITY,
    MINUS_ONE,
    REALS,
    Add,
    BaseNumeral,
    Call,
    Constant,
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
    is_expression,
    negate,
)
from verifier.answer_words import (
    ARITIES,
    BASE_WORDS,
    CONSTANTS,
    CURRENCIES,
    EMPTY_SET,
    FUNCTIONS,
    NOT_UNITS,
    NUMBER_SETS,
    NUMBER_WORDS,
    SPEEDS,
    TRIGONOMETRIC,
    UNIT_OF,
)

MAX_DEPTH = 40
MAX_EXPONENT_DIGITS = 4
MAX_SIGNS = 3

_AMBIGUOUS_SCIENTIFIC = re.compile(r"(?<![\d.])\d+e-\d(?!\d)")
_WIDE_SLASH = re.compile(
    r"/\s*\d+(?:\.\d+)?(?:[A-Za-z(]|\\(?!c?dot|times|cup|text|mathrm|%|,|right|pm|le|ge))|[A-Za-z)}]\s*/\s*\d"
)
_LONG_NUMBER = re.compile(rf"\d{{{MAX_NUMBER_DIGITS + 1}}}")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?([ap])m")
_TEXT_WRAPPER = re.compile(r"\\(?:text|mathrm)\{(\w+)\}")
_BASE_PHRASE = re.compile(r"(-?[0-9a-f]+)\(?(?:in)?base-?(\d{1,2}|[a-z]+)\)?")
_HEX_NUMERAL = re.compile(r"([0-9A-Fa-f]*[A-Fa-f][0-9A-Fa-f]*)_\{?(?:\\text\{)?(1[1-6])\}{0,2}")
_SIMPLE_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?$")
_SIMPLE_FRACTION = re.compile(
    r"(-?)(?:\\[dt]?frac\{(-?\d{1,300})\}\{(\d{1,300})\}|(\d{1,300})/(\d{1,300}))$"
)


def parse_answer(text: str) -> tuple[Node, ...]:
    """All readings of a normalised answer, the likeliest first; never empty.

    Raises:
        AnswerTooLarge: nesting over 40 levels or a number over 1,000 digits.
    """
    if (simple := _simple_number(text)) is not None:
        return (simple,)
    if _LONG_NUMBER.search(text):
        raise AnswerTooLarge(f"a number has more than {MAX_NUMBER_DIGITS} digits")
    readings: list[Node] = []
    label = squash(text)
    whole = _whole_text(text, label)
    if whole is not None:
        return (whole,)
    for reading in _readings(text):
        try:
            node = _Parser(tokenize(text, reading), reading).parse()
        except AnswerTooLarge:
            raise
        except AnswerSyntaxError:
            continue
        if node not in readings:
            readings.append(node)
    if not readings or (len(label) > 1 and label.isalpha() and _is_wordlike(text)):
        readings.append(Label(label))
    return tuple(readings)


def squash(text: str) -> str:
    """Lower case without spaces, punctuation, wrappers and articles: the form words are compared
    in."""
    text = re.sub(
        r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname|mbox|left|right|quad)(?![A-Za-z])",
        " ",
        text,
    )
    text = re.sub(r"\\[,;:! ]|[\s~{}$.\"'`]|\\\\", " ", text).casefold()
    words = text.split()
    if len(words) > 1 and all(word.isalpha() for word in words) and len(words[-1]) > 2:
        words = [word for word in words if word not in ("the", "a", "an")]
    return "".join(words).strip(",;:!?*")


def _simple_number(text: str) -> Node | None:
    if _SIMPLE_NUMBER.match(text):
        return _decimal(text)
    if match := _SIMPLE_FRACTION.match(text):
        sign, top, bottom, plain_top, plain_bottom = match.groups()
        denominator = int(bottom or plain_bottom)
        if denominator:
            value = Fraction(int(top or plain_top), denominator)
            return Number(-value if sign else value)
    return None


def _decimal(text: str) -> Number:
    if "." not in text and "e" not in text and "E" not in text:
        return Number(Fraction(int(text)))
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-").lstrip("0")) > MAX_EXPONENT_DIGITS:
        raise AnswerTooLarge("a decimal exponent has more than four digits")
    digits = mantissa.lstrip("-").replace(".", "").lstrip("0")
    return Number(Fraction(text), max(1, len(digits)))


def _readings(text: str) -> list[Reading]:
    readings = [Reading()]
    if _THOUSANDS.search(text):
        readings += [replace(reading, thousands=False) for reading in readings]
    if "/" in text and _WIDE_SLASH.search(text):
        readings += [replace(reading, wide_slash=True) for reading in readings]
    if "e-" in text and _AMBIGUOUS_SCIENTIFIC.search(text):
        readings += [replace(reading, scientific=False) for reading in readings]
    return readings


def _whole_text(text: str, label: str) -> Node | None:
    """Answers that are recognised as a whole: times of day, words for sets, hexadecimal
    numerals."""
    if label in (
        "nosolution",
        "nosolutions",
        "norealsolution",
        "norealsolutions",
        "emptyset",
        "nosolutionexists",
    ):
        return EMPTY_SET
    if label in (
        "allrealnumbers",
        "allreals",
        "allrealvalues",
        "realnumbers",
        "reals",
        "anyrealnumber",
    ):
        return REALS
    if label in ("undefined", "dne", "doesnotexist", "doesn'texist"):
        return Label("undefined")
    if match := _BASE_PHRASE.fullmatch(label):
        base = int(match[2]) if match[2].isdigit() else BASE_WORDS.get(match[2], 0)
        if 2 <= base <= 36:
            return BaseNumeral(match[1].upper().lstrip("0") or "0", base)
    if label in NUMBER_WORDS:
        return Number(Fraction(NUMBER_WORDS[label]))
    if match := _CLOCK.fullmatch(label):
        hour, minute, half = match.groups()
        return Label(f"{int(hour)}:{minute or '00'}{half}m")
    if (match := _HEX_NUMERAL.fullmatch(_TEXT_WRAPPER.sub(r"\1", text.replace(" ", "")))) and int(
        match[2]
    ) >= 11:
        return BaseNumeral(match[1].upper(), int(match[2]))
    return None


def _is_wordlike(text: str) -> bool:
    return all(char.isalpha() or char in " {}\\.-,'~" for char in text)


_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in"}
_CLOSERS = frozenset([")", "]", "}", "\\}", "⟩", "rbar", "⌋", "⌉"])
_OPENERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "⟨": "⟩", "⌊": "⌋", "⌈": "⌉"}
_SEPARATORS = {",", ";", "and", "or"}
_ATOM_COMMANDS = {"frac", "sqrt", "binom", "begin", "sum", "prod"}


class _Parser:
    def __init__(self, tokens: list[Token], reading: Reading) -> None:
        self.tokens = tokens
        self.reading = reading
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.bar_stops = False
        self.colon_stops = False

    # Token access

    @property
    def token(self) -> Token:
        return self.tokens[self.position] if self.position < len(self.tokens) else END

    def peek(self, ahead: int = 1) -> Token:
        place = self.position + ahead
        return self.tokens[place] if place < len(self.tokens) else END

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

    # Statements and lists

    def parse(self) -> Node:
        node = self.parse_list()
        if self.token is not END:
            raise AnswerSyntaxError(f"unexpected {self.token.value!r}")
        return node

    def parse_list(self) -> Node:
        items, joiner = self.parse_items()
        return items[0] if len(items) == 1 else Sequence("list", tuple(items), joiner)

    def parse_items(self) -> tuple[list[Node], str]:
        items = [self.parse_item()]
        joiner = ","
        while self.at(*_SEPARATORS):
            while self.at(*_SEPARATORS):
                if self.token.value in ("and", "or"):
                    joiner = self.token.value
                self.position += 1
            if self.token is END or (
                self.token.kind == "operator" and self.token.value in _CLOSERS
            ):
                break
            items.append(self.parse_item())
        return items, joiner

    def parse_item(self) -> Node:
        start = self.position
        try:
            node = self.parse_statement()
            if self.token is END or self.at(*_SEPARATORS, *_CLOSERS, "&", "\\\\", "|", ":"):
                return node
            if self.at("[") and self.peek().kind == "end":
                return node
            raise AnswerSyntaxError(f"unexpected {self.token.value!r}")
        except AnswerTooLarge:
            raise
        except AnswerSyntaxError:
            self.position = start
            return self.parse_words()

    def parse_words(self) -> Node:
        words = []
        while self.token.kind in ("word", "symbol", "constant", "number") or self.at("-"):
            words.append(self.token)
            self.position += 1
        if not (self.token is END or self.at(*_SEPARATORS, *_CLOSERS)):
            raise AnswerSyntaxError(f"unexpected {self.token.value!r}")
        if not any(token.kind == "word" for token in words) or words[0].kind == "number":
            raise AnswerSyntaxError("not a word")
        return Label(squash(" ".join(token.value for token in words)))

    def parse_statement(self) -> Node:
        left: Node
        if head := self.function_head():
            left = head
        else:
            left = self.parse_set()
        operators: list[str] = []
        operands = [left]
        while self.token.kind == "operator" and self.token.value in _RELATIONS:
            operators.append(self.token.value)
            self.position += 1
            operands.append(self.parse_set())
        node = Relation(tuple(operators), tuple(operands)) if operators else left
        while self.at("&") and isinstance(node, Relation) and self.bars == 0:
            self.position += 1
            other = self.parse_statement()
            node = Sequence("list", (node, other), "and")
        if self.at("|") and isinstance(node, Relation) and not self.bars and not self.bar_stops:
            self.position += 1
            node = Sequence("list", (node, self.parse_statement()), "or")
        return node

    def function_head(self) -> Symbol | None:
        """`f(x) =` names a function; it is not the product of f and x."""
        if self.token.kind != "symbol":
            return None
        place = self.position + 1
        tokens = self.tokens
        name = self.token.value
        primes = ""

        def is_operator(index: int, value: str) -> bool:
            return (
                index < len(tokens)
                and tokens[index].kind == "operator"
                and tokens[index].value == value
            )

        while is_operator(place, "'"):
            primes += "'"
            place += 1
        if [token.value for token in tokens[place : place + 5]] == ["^", "{", "-", "1", "}"]:
            primes += "^-1"
            place += 5
        if not is_operator(place, "("):
            return None
        place += 1
        arguments = []
        while place + 1 < len(tokens) and tokens[place].kind == "symbol":
            arguments.append(tokens[place].value)
            place += 1
            if is_operator(place, ","):
                place += 1
            else:
                break
        if not arguments or not is_operator(place, ")") or not is_operator(place + 1, "="):
            return None
        self.position = place + 1
        return Symbol(f"{name}{primes}({','.join(arguments)})")

    def parse_set(self) -> Node:
        left = self.parse_quantity()
        while self.at("∪", "∩", "∖"):
            operator = {"∪": "union", "∩": "intersection", "∖": "difference"}[self.token.value]
            self.position += 1
            left = SetOperation(operator, left, self.parse_quantity())
        return left

    # Quantities

    def parse_quantity(self) -> Node:
        negative = self.at("-") and self.peek().value in CURRENCIES
        if negative:
            self.position += 1
        if self.at(*CURRENCIES):
            currency = CURRENCIES[self.token.value]
            self.position += 1
            amount = self.parse_sum()
            unit = self.parse_unit()
            if unit and unit[0][0] not in (currency, "cent"):
                currency = unit[0][0]
            return Quantity(negate(amount) if negative else amount, ((currency, 1),))
        if self.token.kind == "word" and UNIT_OF.get(self.token.value.lower()) in (
            "dollar",
            "euro",
        ):
            currency = UNIT_OF[self.token.value.lower()]
            self.position += 1
            return Quantity(self.parse_sum(), ((currency, 1),))
        node = self.parse_sum()
        if self.at(":") and not self.colon_stops and is_expression(node):
            parts = [node]
            while self.accept(":"):
                parts.append(self.parse_sum())
            return Ratio(tuple(parts))
        if self.accept("$", "€", "£", "¥"):
            return Quantity(node, ((CURRENCIES[self.tokens[self.position - 1].value], 1),))
        if isinstance(node, Call) and node.name == "degree":
            if self.token.kind in ("symbol", "word") and self.token.value in ("C", "F"):
                self.position += 1
            return Quantity(node.args[0], (("degree", 1),))
        if (
            self.token.kind == "word"
            and self.token.value.lower() == "base"
            and isinstance(node, Number)
        ):
            return self.parse_base_words(node)
        unit = self.parse_unit()
        if unit is None:
            return node
        if unit == (("percent", 1),):
            return Call("percent", (node,))
        if not is_expression(node) and not isinstance(node, Sequence):
            raise AnswerSyntaxError("a unit after something that is not a number")
        return Quantity(node, unit)

    def parse_base_words(self, node: Number) -> Node:
        self.position += 1
        token = self.token
        self.position += 1
        base = int(token.value) if token.value.isdigit() else BASE_WORDS.get(token.value.lower(), 0)
        if not 2 <= base <= 36 or node.value.denominator != 1:
            raise AnswerSyntaxError("a base that is not a number")
        return BaseNumeral(str(node.value.numerator), base)

    def parse_unit(self) -> tuple[tuple[str, int], ...] | None:
        if self.token.kind != "word":
            return None
        powers: dict[str, int] = {}
        direction = 1
        prefix_power = 0
        while True:
            token = self.token
            if token.kind not in ("word", "symbol", "function") or len(token.value) > 24:
                raise AnswerSyntaxError("expected a unit word")
            word = token.value.lower()
            self.position += 1
            if word == "per":
                direction = -1
                continue
            if word in ("square", "sq", "cubic", "squared", "cubed"):
                prefix_power = 2 if word.startswith("sq") else 3
                if word in ("squared", "cubed") and powers:
                    last = next(reversed(powers))
                    powers[last] *= prefix_power
                    prefix_power = 0
            elif (
                word in NOT_UNITS and not (word == "in" and self.token.kind != "word")
            ) or word.startswith("forall"):
                raise AnswerSyntaxError(f"{word!r} is not a unit")
            else:
                unit = _unit_of(token.value)
                power = (prefix_power or 1) * direction
                prefix_power = 0
                if self.at("^") or self.at("**"):
                    power *= self.parse_unit_power()
                for part, factor in SPEEDS.get(unit, {unit: 1}).items():
                    powers[part] = powers.get(part, 0) + factor * power
            if self.at("/"):
                self.position += 1
                direction = -1
                continue
            if self.at("-", "*", ".") and self.peek().kind == "word":
                self.position += 1
            if self.token.kind == "word":
                continue
            break
        if prefix_power:
            raise AnswerSyntaxError("a unit is missing after square or cubic")
        return tuple(sorted(powers.items()))

    def parse_unit_power(self) -> int:
        self.position += 1
        braced = self.accept("{")
        negative = self.accept("-")
        token = self.token
        if token.kind != "number" or token.value not in ("1", "2", "3", "4"):
            raise AnswerSyntaxError("expected the power of a unit")
        self.position += 1
        if braced:
            self.expect("}")
        return -int(token.value) if negative else int(token.value)

    # Expressions

    def parse_sum(self) -> Node:
        self.enter()
        terms: list[Node] = []
        inverted_signs = {"±": False, "∓": True}
        sign = self.parse_signs()
        terms.append(self.apply_sign(sign, self.parse_product()))
        while self.at("+", "-", "±", "∓"):
            mark = self.token.value
            self.position += 1
            if mark in inverted_signs:
                terms.append(PlusMinus(self.parse_product(), inverted_signs[mark]))
                continue
            inner = self.parse_signs()
            term = self.apply_sign(inner, self.parse_product())
            terms.append(negate(term) if mark == "-" else term)
        self.depth -= 1
        if len(terms) == 1:
            return terms[0]
        if not all(is_expression(term) for term in terms):
            raise AnswerSyntaxError("a sum of things that are not numbers")
        return Add(tuple(terms))

    def parse_signs(self) -> str:
        sign = "+"
        start = self.position
        while self.at("+", "-", "±", "∓"):
            if self.position - start == MAX_SIGNS:
                raise AnswerSyntaxError(f"more than {MAX_SIGNS} signs in a row")
            mark = self.token.value
            if mark == "-":
                sign = {"+": "-", "-": "+"}.get(sign, sign)
            elif mark != "+":
                sign = mark
            self.position += 1
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
            if self.at("*"):
                self.position += 1
                factors.append(self.parse_signed_power())
            elif self.at("/"):
                self.position += 1
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
                last = factors.pop()
                factors.append(divide(last, divisor))
            elif token.kind == "number" and token.spaced and bare_integer and len(factors) == 1:
                factors = [self.parse_plain_mixed(factors[0])]
            elif self.starts_factor():
                following = self.parse_power()
                whole = factors[-1]
                percent = isinstance(following, Call) and following.name == "percent"
                if percent and isinstance(following, Call):
                    following = following.args[0]
                if (
                    bare_integer
                    and len(factors) == 1
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
            bare_integer = (
                bare_integer
                and len(factors) == 1
                and factors[0] == factors[-1]
                and not self.at("^")
            )
        return product(factors)

    def parse_plain_mixed(self, whole: Node) -> Node:
        top, slash, bottom = self.token, self.peek(), self.peek(2)
        if (
            (
                slash.value == "/"
                and bottom.kind == "number"
                and top.value.isdigit()
                and bottom.value.isdigit()
            )
            and 0 < int(top.value) < int(bottom.value)
            and isinstance(whole, Number)
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

    def parse_signed_power(self) -> Node:
        sign = self.parse_signs()
        return self.apply_sign(sign, self.parse_power())

    def parse_power(self) -> Node:
        self.enter()
        base = self.parse_postfix()
        while self.at("^", "**"):
            python = self.token.value == "**"
            self.position += 1
            if not python and self.is_degree_mark():
                base = self.degree(base)
                continue
            if not python and self.accept("'"):
                continue
            exponent = self.parse_signed_power() if python else self.parse_exponent()
            if exponent is None:
                continue
            base = _ungroup(base)
            if not is_expression(base) or not is_expression(exponent):
                raise AnswerSyntaxError("a power of something that is not a number")
            base = Power(base, exponent, python)
            base = self.postfix(base)
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
        while self.at("^"):
            self.position += 1
            exponent = self.parse_exponent()
            if exponent is None:
                raise AnswerSyntaxError("an ordinal in an exponent")
            node = Power(node, exponent)
        while self.at("!"):
            self.position += 1
            node = Call("factorial", (node,))
        self.depth -= 1
        return self.apply_sign(sign, node)

    def parse_postfix(self) -> Node:
        return self.postfix(self.parse_atom())

    def postfix(self, node: Node) -> Node:
        while True:
            if self.at("!"):
                count = 0
                while self.accept("!"):
                    count += 1
                if count > 2 or not is_expression(node):
                    raise AnswerSyntaxError("more than two factorial signs")
                node = Call("factorial" if count == 1 else "factorial2", (node,))
            elif self.at("%"):
                self.position += 1
                if self.token.kind in ("number", "symbol") or self.at("("):
                    raise AnswerSyntaxError("a percent sign between numbers")
                if not is_expression(node):
                    raise AnswerSyntaxError("percent of something that is not a number")
                node = Call("percent", (node,))
            elif self.at("°"):
                self.position += 1
                node = self.degree(node)
            elif self.at("'") and isinstance(node, Symbol):
                self.position += 1
                node = Symbol(node.name + "'")
            else:
                return node

    # Atoms

    def parse_atom(self) -> Node:
        token = self.token
        self.position += 1
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
        if self.at("_"):
            return self.based(token.value)
        return _decimal(token.value)

    def based(self, digits: str) -> BaseNumeral:
        self.position += 1
        text = self.subscript().lower().removeprefix("base")
        base = int(text) if text.isdigit() and len(text) < 3 else BASE_WORDS.get(text, 0)
        if not 2 <= base <= 36:
            raise AnswerSyntaxError(f"a subscript, {text!r}, that is not a base")
        return BaseNumeral(digits.lstrip("0") or "0", base)

    def subscript(self) -> str:
        if not self.accept("{"):
            token = self.token
            if token.kind not in ("number", "symbol", "constant", "word"):
                raise AnswerSyntaxError("a subscript is missing")
            self.position += 1
            return token.value
        parts: list[str] = []
        depth = 1
        while depth:
            token = self.token
            if token is END:
                raise AnswerSyntaxError("a subscript is not closed")
            self.position += 1
            if token.value == "{":
                depth += 1
            elif token.value == "}":
                depth -= 1
            else:
                parts.append(token.value)
        return "".join(parts)

    def symbol(self, name: str) -> Node:
        if self.at("_"):
            self.position += 1
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
        if name in NUMBER_SETS:
            return NUMBER_SETS[name]
        raise AnswerSyntaxError(f"unknown set {name!r}")

    def command(self, name: str) -> Node:
        match name:
            case "frac":
                top, bottom = self.argument(split=True), self.argument(split=True)
                return divide(top, bottom)
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
        if self.at("["):
            self.position += 1
            index = self.parse_sum()
            self.expect("]")
        radicand = self.argument()
        return Power(radicand, divide(Number(Fraction(1)), index))

    def series(self, name: str) -> Node:
        low: Node | None = None
        bound: Node | None = None
        high: Node | None = None
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
                if self.token is END:
                    raise AnswerSyntaxError("array columns are not closed")
                self.position += 1
        if name not in (
            "pmatrix",
            "bmatrix",
            "vmatrix",
            "Bmatrix",
            "matrix",
            "smallmatrix",
            "array",
        ):
            raise AnswerSyntaxError(f"unknown environment {name!r}")
        self.enter()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            if self.token.kind == "command" and self.token.value == "end":
                break
            row.append(self.parse_sum())
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.accept("\\\\"):
                break
        if self.token.value != "end":
            raise AnswerSyntaxError("a matrix is not closed")
        self.position += 1
        if self.environment_name() != name:
            raise AnswerSyntaxError("a matrix is closed by another environment")
        self.depth -= 1
        matrix = make_matrix(rows)
        return (
            Call("det", tuple(cell for line in matrix.rows for cell in line))
            if name == "vmatrix"
            else matrix
        )

    def environment_name(self) -> str:
        self.expect("{")
        parts = []
        while not self.at("}"):
            if self.token is END:
                raise AnswerSyntaxError("an environment name is not closed")
            parts.append(self.token.value)
            self.position += 1
        self.position += 1
        return "".join(parts)

    def function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        if name == "sqrt" and self.at("["):
            return self.root()
        for _ in range(2):
            if self.at("^"):
                self.position += 1
                power = self.parse_exponent()
            elif self.at("_") and name in ("log", "ln"):
                self.position += 1
                base = self.argument(split=True)
        arguments = self.function_arguments(name)
        if base is not None:
            arguments = [*arguments, base]
        node = make_call(name, arguments)
        if power is None:
            return node
        if power == MINUS_ONE and name in TRIGONOMETRIC:
            return make_call("a" + name, arguments)
        return Power(node, power)

    def function_arguments(self, name: str) -> list[Node]:
        if self.at("("):
            self.position += 1
            return self.call_arguments()
        if self.at("{"):
            if self.peek().value == "(":
                self.position += 1
                self.expect("(")
                arguments = self.call_arguments()
                if self.accept("}"):
                    return arguments
                raise AnswerSyntaxError("a function's argument is not closed")
            return [self.parse_group()]
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

    # Brackets

    def delimited(self, opening: str) -> Node:
        self.enter()
        outer = (self.bars, self.bar_stops, self.colon_stops)
        if opening not in ("|", "lbar"):
            self.bars, self.bar_stops, self.colon_stops = 0, False, False
        match opening:
            case "(":
                node = self.parenthesis()
            case "[":
                node = self.square_bracket()
            case "]":
                node = self.reversed_interval()
            case "{":
                node = self.brace("}")
            case "\\{":
                node = self.brace("\\}")
            case "⟨":
                items, _ = self.parse_items()
                self.expect("⟩")
                node = Sequence("tuple", tuple(items))
            case "⌊" | "⌈":
                node = self.rounded(opening)
            case "|" | "lbar":
                node = self.absolute(opening)
            case _:
                raise AnswerSyntaxError(f"unexpected {opening!r}")
        self.bars, self.bar_stops, self.colon_stops = outer
        self.depth -= 1
        return node

    def rounded(self, opening: str) -> Node:
        inner = self.parse_sum()
        for closing, name in (("⌋", "floor"), ("⌉", "ceil")):
            if self.accept(closing):
                if (opening == "⌊") != (name == "floor"):
                    break
                return Call(name, (inner,))
        raise AnswerSyntaxError("a floor or ceiling is not closed")

    def absolute(self, opening: str) -> Node:
        self.bars += 1
        inner = self.parse_sum()
        if not self.accept("rbar" if opening == "lbar" else "|"):
            raise AnswerSyntaxError("an absolute value is not closed")
        if isinstance(inner, Matrix):
            return Call("det", tuple(cell for row in inner.rows for cell in row))
        if not is_expression(inner):
            raise AnswerSyntaxError("the absolute value of something that is not a number")
        return Call("abs", (inner,))

    def parenthesis(self) -> Node:
        if self.accept(")"):
            return Sequence("tuple", ())
        items, joiner = self.parse_items()
        trailing_comma = self.tokens[self.position - 1].value == ","
        if self.accept("]"):
            return self.interval(items, True, False)
        if self.at("[") and len(items) == 2 and self.peek().kind == "end":
            self.position += 1
            return self.interval(items, True, True)
        self.expect(")")
        if len(items) == 1:
            return Sequence("tuple", (items[0],)) if trailing_comma else items[0]
        if joiner != ",":
            return Sequence("list", tuple(items), joiner)
        return Sequence("tuple", tuple(items))

    def square_bracket(self) -> Node:
        if self.accept("]"):
            return Sequence("bracket", ())
        if self.token.kind == "number" and self.peek().kind == "number" and self.peek().spaced:
            return self.spaced_array()
        items, _ = self.parse_items()
        if self.accept(")"):
            return self.interval(items, False, True)
        if self.accept("["):
            return self.interval(items, False, True)
        self.expect("]")
        return Sequence("bracket", tuple(items))

    def spaced_array(self) -> Node:
        """`[1 2 3]`, as numpy prints arrays."""
        items: list[Node] = []
        while not self.accept("]"):
            sign = self.parse_signs()
            items.append(self.apply_sign(sign, self.parse_atom()))
        return Sequence("bracket", tuple(items))

    def reversed_interval(self) -> Node:
        items, _ = self.parse_items()
        if self.accept("["):
            return self.interval(items, True, True)
        self.expect("]")
        return self.interval(items, True, False)

    def interval(self, items: list[Node], low_open: bool, high_open: bool) -> Node:
        if len(items) != 2 or not all(is_expression(item) for item in items):
            raise AnswerSyntaxError("an interval needs two ends")
        return Interval(items[0], items[1], low_open, high_open)

    def brace(self, closing: str) -> Node:
        if self.accept(closing):
            if closing == "}":
                raise AnswerSyntaxError("an empty group")
            return EMPTY_SET
        self.bar_stops = self.colon_stops = True
        first = self.parse_item()
        if self.at("|", ":"):
            is_dictionary = self.at(":") and closing == "}" and isinstance(first, Symbol)
            self.position += 1
            self.bar_stops = self.colon_stops = False
            if is_dictionary:
                return self.dictionary(first, closing)
            return self.set_builder(first, closing)
        items = [first]
        while self.accept(",", ";"):
            if self.at(closing):
                break
            items.append(self.parse_item())
        self.expect(closing)
        if len(items) == 1 and closing == "}":
            return items[0]
        return Sequence("set", tuple(items))

    def dictionary(self, key: Node, closing: str) -> Node:
        pairs: list[Node] = []
        while True:
            pairs.append(Relation(("=",), (key, self.parse_sum())))
            if not self.accept(","):
                break
            key = self.parse_atom()
            self.expect(":")
        self.expect(closing)
        return pairs[0] if len(pairs) == 1 else Sequence("list", tuple(pairs))

    def set_builder(self, member: Node, closing: str) -> Node:
        """`{x | x > 2}`: the condition, when it is about the member alone."""
        conditions, joiner = self.parse_items()
        self.expect(closing)
        if (
            isinstance(member, Relation)
            and member.operators == ("in",)
            and member.operands[1] == REALS
        ):
            member = member.operands[0]
        conditions = [
            condition
            for condition in conditions
            if not (
                isinstance(condition, Relation)
                and condition.operators == ("in",)
                and condition.operands[1] == REALS
            )
        ]
        if not isinstance(member, Symbol) or not all(
            isinstance(condition, Relation) for condition in conditions
        ):
            raise AnswerSyntaxError("a set defined by more than conditions on its member")
        if not conditions:
            return REALS
        if len(conditions) == 1:
            return conditions[0]
        return Sequence("list", tuple(conditions), "and" if joiner == "," else joiner)

    def constructor(self, name: str) -> Node:
        self.expect("(")
        self.enter()
        arguments: list[Node] = []
        flags: list[bool] = []
        while not self.at(")"):
            if self.token.kind == "word" and self.token.value in ("True", "False"):
                flags.append(self.token.value == "True")
                self.position += 1
            elif self.token.kind == "word" and self.peek().value == "=":
                while not (self.at(",", ")") or self.token is END):
                    self.position += 1
            else:
                arguments.append(self.parse_statement())
            if not self.accept(","):
                break
        self.expect(")")
        self.depth -= 1
        return construct(name, arguments, flags)


def _unit_of(word: str) -> str:
    lowered = word.lower()
    for form in (word, lowered, lowered.removesuffix("s"), lowered.removesuffix("es")):
        if form in UNIT_OF:
            return UNIT_OF[form]
    return lowered.removesuffix("s") if len(lowered) > 3 else lowered


def product(factors: Iterable[Node]) -> Node:
    """Product of parsed factors; a number times a matrix scales it."""
    factors = list(factors)
    if len(factors) == 1:
        return factors[0]
    factors = [_ungroup(factor) for factor in factors]
    matrices = [factor for factor in factors if isinstance(factor, Matrix)]
    if len(matrices) == 1:
        others = [factor for factor in factors if not isinstance(factor, Matrix)]
        return scale(product(others), matrices[0])
    if not all(is_expression(factor) for factor in factors):
        raise AnswerSyntaxError("a product of things that are not numbers")
    flat: list[Node] = []
    for factor in factors:
        flat.extend(factor.factors if isinstance(factor, Mul) else (factor,))
    return Mul(tuple(flat))


def _ungroup(node: Node) -> Node:
    """Square brackets around one expression in a product only group."""
    if isinstance(node, Sequence) and node.kind == "bracket" and len(node.items) == 1:
        return node.items[0]
    return node


def scale(factor: Node, matrix: Matrix) -> Matrix:
    if not is_expression(factor):
        raise AnswerSyntaxError("a matrix times something that is not a number")
    return Matrix(tuple(tuple(product([factor, cell]) for cell in row) for row in matrix.rows))


def divide(top: Node, bottom: Node) -> Node:
    top, bottom = _ungroup(top), _ungroup(bottom)
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
                low_open = name in ("Intervalopen", "IntervalLopen") or (bool(flags) and flags[0])
                high_open = name in ("Intervalopen", "IntervalRopen") or (
                    len(flags) > 1 and flags[1]
                )
                low, high = arguments
                return Interval(low, high, low_open, high_open)
        case "Union" | "Intersection" | "Complement":
            if arguments:
                operator = {
                    "Union": "union",
                    "Intersection": "intersection",
                    "Complement": "difference",
                }[name]
                node = arguments[0]
                for other in arguments[1:]:
                    node = SetOperation(operator, node, other)
                return node
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
            operator = {"Eq": "=", "Ne": "!=", "Lt": "<", "Le": "<=", "Gt": ">", "Ge": ">="}[name]
            return Relation((operator,), (arguments[0], arguments[1]))
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
