r"""One parser for the two notations answers come in: LaTeX, and what Python and sympy print.

A tokenizer and a precedence parser, both linear in the text, build the typed tree of
`verifier.answer_tree`. Text is never evaluated: no `eval`, no `sympify`, and a name outside the
tables below is a letter, a unit word or a parse error. A tail that does not parse makes the whole
answer unparsed (then it is a `Label`, comparable with the same words only); a prefix is never
accepted.

    text -> tokens -> list of statements -> relation -> set operation -> quantity -> sum -> product
    -> power

What an answer only names (`f(2) =`, `P(A|B) =`, `AB/CD =`, words) is read as one name, and
arithmetic on matrices is done at once.

Some notation has two honest readings: `1,625` is a number or a list, `1/2x` is x/2 or 1/(2x),
`2e-1` is 0.2 or 2e - 1, `abc` is a word or a product. `parse_answer` returns a tree for each, most
likely first.

Not covered: integrals, derivatives, limits, piecewise definitions, congruences, ellipses, prose.
They stay labels.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import TypeGuard

from verifier.answer_build import construct, decimal_number, divide
from verifier.answer_expressions import ExpressionParser
from verifier.answer_tokens import (
    END,
    MAX_NUMBER_DIGITS,
    THOUSANDS,
    AnswerSyntaxError,
    AnswerTooLarge,
    Reading,
    Token,
    tokenize,
)
from verifier.answer_tree import (
    REALS,
    BaseNumeral,
    Call,
    Clock,
    Interval,
    Label,
    Matrix,
    Mul,
    Node,
    Number,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    children,
    is_expression,
    negate,
)
from verifier.answer_words import (
    BASE_WORDS,
    CURRENCIES,
    EMPTY_SET,
    GREEK,
    NOT_UNITS,
    NUMBER_WORDS,
    SPEEDS,
    TRIGONOMETRIC,
    UNIT_OF,
    words,
)

_AMBIGUOUS_SCIENTIFIC = re.compile(r"(?<![\d.])\d+e-\d(?!\d)")
_WIDE_SLASH = re.compile(
    r"/\s*\d+(?:\.\d+)?(?:[A-Za-z(]|\\(?!c?dot|times|cup|text|mathrm|%|,|right|pm|le|ge))|[A-Za-z)}]\s*/\s*\d"
)
_PADDED_GROUP = re.compile(r"\d,0\d\d(?!\d)")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_NUMBER_DIGITS + 1}}}")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\(?([ap]m)\)?")
_TIMES = {"noon": Clock(12, 0, 0, "pm"), "midnight": Clock(12, 0, 0, "am")}
_TEXT_WRAPPER = re.compile(r"\\(?:text|mathrm)\{(\w+)\}")
_BASE_PHRASE = re.compile(r"(-?[0-9a-f]+)\(?(?:in)?base-?(\d{1,2}|[a-z]+)\)?")
_HEX_NUMERAL = re.compile(r"([0-9A-Fa-f]*[A-Fa-f][0-9A-Fa-f]*)_\{?(?:\\text\{)?(1[1-6])\}{0,2}")
_EMPTY = words("nosolution nosolutions norealsolution norealsolutions emptyset nosolutionexists")
_ALL_REALS = words("allrealnumbers allreals allrealvalues realnumbers reals anyrealnumber")
_SIMPLE_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?$")
_SIMPLE_FRACTION = re.compile(
    r"(-?)(?:\\[dt]?frac\{(-?\d{1,300})\}\{(\d{1,300})\}|(\d{1,300})/(\d{1,300}))$"
)


def parse_answer(text: str) -> tuple[Node, ...]:
    """All readings of a normalised answer, the likeliest first; never empty.

    Raises:
        AnswerTooLarge: nesting over 40 levels or a number over 1,000 digits.
    """
    if (simple := simple_number(text)) is not None:
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
        if not reading.thousands and _repeats(node):
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
    text = re.sub(r"\\[,;:! ]|[\s~{}$.]|(?<![\d'\"])[\"'`]|\\\\", " ", text).casefold()
    words = text.split()
    if len(words) > 1 and all(word.isalpha() for word in words) and len(words[-1]) > 2:
        words = [word for word in words if word not in ("the", "a", "an")]
    return "".join(words).strip(",;:!?*")


def simple_number(text: str) -> Node | None:
    """An integer, a decimal or a fraction of integers; None for any other text."""
    if _SIMPLE_NUMBER.match(text):
        return decimal_number(text)
    if match := _SIMPLE_FRACTION.match(text):
        sign, top, bottom, plain_top, plain_bottom = match.groups()
        denominator = int(bottom or plain_bottom)
        if denominator:
            value = Fraction(int(top or plain_top), denominator)
            return Number(-value if sign else value)
    return None


def _readings(text: str) -> list[Reading]:
    readings = [Reading()]
    if THOUSANDS.search(text) and not _PADDED_GROUP.search(text):
        readings += [replace(reading, thousands=False) for reading in readings]
    if "/" in text and _WIDE_SLASH.search(text):
        readings += [replace(reading, wide_slash=True) for reading in readings]
    if "e-" in text and _AMBIGUOUS_SCIENTIFIC.search(text):
        readings += [replace(reading, scientific=False) for reading in readings]
    return readings


def _repeats(node: Node) -> bool:
    """Whether a list names a member twice: then `111,111` is a number and no list."""
    return isinstance(node, Sequence) and len(set(node.items)) < len(node.items)


def _whole_text(text: str, label: str) -> Node | None:
    """Answers that are recognised as a whole: times of day, words for sets, hexadecimal
    numerals."""
    if label in _EMPTY:
        return EMPTY_SET
    if label in _ALL_REALS:
        return REALS
    if label in ("undefined", "dne", "doesnotexist", "doesn'texist"):
        return Label("undefined")
    if match := _BASE_PHRASE.fullmatch(label):
        base = int(match[2]) if match[2].isdigit() else BASE_WORDS.get(match[2], 0)
        if 2 <= base <= 36:
            return BaseNumeral(match[1].upper().lstrip("0") or "0", base)
    if label in NUMBER_WORDS:
        return Number(Fraction(NUMBER_WORDS[label]))
    if (time := label.removeprefix("12").removeprefix(":00")) in _TIMES:
        return _TIMES[time]
    if match := _CLOCK.fullmatch(label):
        hour, minute, second = (int(part or 0) for part in match.groups()[:3])
        if 1 <= hour <= 12 and max(minute, second) < 60:
            return Clock(hour, minute, second, match[4])
        return Label(label)
    if (match := _HEX_NUMERAL.fullmatch(_TEXT_WRAPPER.sub(r"\1", text.replace(" ", "")))) and int(
        match[2]
    ) >= 11:
        return BaseNumeral(match[1].upper(), int(match[2]))
    return None


def _is_wordlike(text: str) -> bool:
    return all(char.isalpha() or char in " {}\\.-,'~" for char in text)


_RELATIONS = {"=", "≈", "<", ">", "<=", ">=", "!=", "in"}
_CLOSERS = frozenset([")", "]", "}", "\\}", "⟩", "rbar", "⌋", "⌉"])
_SEPARATORS = {",", ";", "and", "or"}
MAX_NAME_WORDS = 4
MAX_NAME_CHARACTERS = 12
_FUNCTION_LETTERS = frozenset("fghFGHpq")
_PROBABILITIES = frozenset(("P", "E", "Var"))
_NAMING_WORDS = words("of the for in number numbers with least greatest possible")
"""Words that are no units, but may be in a name: `number of ways = 24`."""


class _Parser(ExpressionParser):
    """Reads a whole answer: statements, lists, quantities with units, brackets of every kind."""

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
                separator = self.take().value
                if separator in ("and", "or"):
                    joiner = separator
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
            words.append(self.take())
        if not (self.token is END or self.at(*_SEPARATORS, *_CLOSERS)):
            raise AnswerSyntaxError(f"unexpected {self.token.value!r}")
        if not any(token.kind == "word" for token in words) or words[0].kind == "number":
            raise AnswerSyntaxError("not a word")
        return Label(squash(" ".join(token.value for token in words)))

    def parse_statement(self) -> Node:
        name = self.name_head()
        left: Node = name or self.parse_set()
        operators: list[str] = []
        operands = [left]
        if name and self.accept(":"):
            operators.append("=")
            operands.append(self.parse_set())
        while True:
            if self.token.kind == "operator" and self.token.value in _RELATIONS:
                operators.append(self.take().value)
                operands.append(self.parse_set())
            elif self.starts_rounded():
                self.position += 2
                operators.append("≈")
                operands.append(self.parse_set())
                self.expect(")")
            elif self.at(",", "or") and (place := self.place_of_rounded()):
                self.position += place
            else:
                break
        node = Relation(tuple(operators), tuple(operands)) if operators else left
        while isinstance(node, Relation) and not self.bars and self.accept("&"):
            node = Sequence("list", (node, self.parse_statement()), "and")
        if isinstance(node, Relation) and not (self.bars or self.bar_stops) and self.accept("|"):
            node = Sequence("list", (node, self.parse_statement()), "or")
        return node

    def place_of_rounded(self) -> int:
        """How far `≈` is behind a comma or "or" that says the same once more, rounded; else 0."""
        place = 1
        while self.peek(place).value in (",", "or"):
            place += 1
        return place if self.peek(place).value == "≈" else 0

    def name_head(self) -> Node | None:
        r"""What stands left of `=` and only names: `f(x)`, `f(2)`, `P(A|B)`, `\angle ABC`,
        `AB/CD`, words; it is not the product of its letters."""
        head = self.tokens[self.position : self.end_of_name()]
        if not head:
            return None
        name = _name_of(head) or _function_name(head) or _quotient_name(head)
        if name is not None:
            self.position += len(head)
        return name

    def end_of_name(self) -> int:
        """Where the next `=` stands outside brackets, if that comes before the statement ends."""
        depth = 0
        for place in range(self.position, len(self.tokens)):
            value = self.tokens[place].value
            if value in ("(", "[", "{"):
                depth += 1
            elif value in _CLOSERS or (depth == 0 and value in _SEPARATORS):
                depth -= 1
                if depth < 0:
                    break
            elif depth == 0 and (value in ("=", "≈") or (value == ":" and self.is_heading(place))):
                return place
        return self.position

    def is_heading(self, end: int) -> bool:
        """Whether words with a colon behind them say what follows: `Area: 5`."""
        heading = self.tokens[self.position : end]
        return not self.colon_stops and all(token.kind == "word" for token in heading)

    def parse_set(self) -> Node:
        left = self.parse_quantity()
        while self.at("∪", "∩", "∖"):
            operator = {"∪": "union", "∩": "intersection", "∖": "difference"}[self.take().value]
            left = SetOperation(operator, left, self.parse_quantity())
        return left

    # Quantities

    def word(self) -> str:
        """The present token in lower case if it is a word; else nothing."""
        return self.token.value.lower() if self.token.kind == "word" else ""

    def parse_quantity(self) -> Node:
        negative = self.peek().value in CURRENCIES and self.accept("-")
        if self.at(*CURRENCIES):
            currency = CURRENCIES[self.take().value]
            amount = self.parse_sum()
            unit = self.parse_unit()
            if unit and unit[0][0] not in (currency, "cent"):
                currency = unit[0][0]
            return Quantity(negate(amount) if negative else amount, ((currency, 1),))
        if (currency := UNIT_OF.get(self.word(), "")) in ("dollar", "euro"):
            self.position += 1
            return Quantity(self.parse_sum(), ((currency, 1),))
        start = self.position
        node = self.parse_sum()
        if self.at(":") and not self.colon_stops and is_expression(node):
            parts = [node]
            while self.accept(":"):
                parts.append(self.parse_sum())
            return _time_of_day(self.tokens[start : self.position]) or Ratio(tuple(parts))
        if self.accept("$", "€", "£", "¥"):
            return Quantity(node, ((CURRENCIES[self.tokens[self.position - 1].value], 1),))
        if isinstance(node, Call) and node.name == "degree":
            if self.token.kind in ("symbol", "word") and self.token.value in ("C", "F"):
                self.position += 1
            return Quantity(node.args[0], (("degree", 1),))
        if self.word() == "base" and isinstance(node, Number):
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
        token = self.take()
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
            token = self.take()
            if token.kind not in ("word", "symbol", "function") or len(token.value) > 24:
                raise AnswerSyntaxError("expected a unit word")
            word = token.value.lower()
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
                if self.accept("^", "**"):
                    power *= self.parse_unit_power()
                for part, factor in SPEEDS.get(unit, {unit: 1}).items():
                    powers[part] = powers.get(part, 0) + factor * power
            if self.accept("/"):
                direction = -1
                continue
            if self.peek().kind == "word":
                self.accept("-", "*", ".")
            if self.token.kind != "word":
                break
        if prefix_power:
            raise AnswerSyntaxError("a unit is missing after square or cubic")
        return tuple(sorted(powers.items()))

    def parse_unit_power(self) -> int:
        braced = self.accept("{")
        negative = self.accept("-")
        token = self.take()
        if token.kind != "number" or token.value not in ("1", "2", "3", "4"):
            raise AnswerSyntaxError("expected the power of a unit")
        if braced:
            self.expect("}")
        return -int(token.value) if negative else int(token.value)

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
        if not self.accept("⌋" if opening == "⌊" else "⌉"):
            raise AnswerSyntaxError("a floor or ceiling is not closed")
        return Call("floor" if opening == "⌊" else "ceil", (inner,))

    def absolute(self, opening: str) -> Node:
        self.bars += 1
        inner = self.parse_sum()
        if not self.accept("rbar" if opening == "lbar" else "|"):
            raise AnswerSyntaxError("an absolute value is not closed")
        if isinstance(inner, Matrix):
            return Call("det", children(inner))
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
        if len(items) == 2 and self.peek().kind == "end" and self.accept("["):
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
        if self.accept(")", "["):
            return self.interval(items, False, True)
        self.expect("]")
        return Sequence("bracket", tuple(items))

    def spaced_array(self) -> Node:
        """`[1 2 3]`, as numpy prints arrays."""
        items: list[Node] = []
        while not self.accept("]"):
            items.append(self.apply_sign(self.parse_signs(), self.parse_atom()))
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
        pairs: list[Node] = [Relation(("=",), (key, self.parse_sum()))]
        while self.accept(","):
            key = self.parse_atom()
            self.expect(":")
            pairs.append(Relation(("=",), (key, self.parse_sum())))
        self.expect(closing)
        return pairs[0] if len(pairs) == 1 else Sequence("list", tuple(pairs))

    def set_builder(self, member: Node, closing: str) -> Node:
        """`{x | x > 2}`: the condition, when it is about the member alone."""
        conditions, joiner = self.parse_items()
        self.expect(closing)
        if _is_real(member):
            member = member.operands[0]
        conditions = [condition for condition in conditions if not _is_real(condition)]
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
                flags.append(self.take().value == "True")
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


def _is_real(node: Node) -> TypeGuard[Relation]:
    """Whether a node says no more than that something is a real number."""
    return isinstance(node, Relation) and node.operators == ("in",) and node.operands[1] == REALS


def _time_of_day(tokens: list[Token]) -> Clock | None:
    """`7:05` and `7:05:30`: an hour up to 24, and two digits below 60 behind each colon."""
    hour, *rest = (token.value for token in tokens[::2])
    if len(rest) > 2 or len(tokens) != 2 * len(rest) + 1 or len(hour) > 2:
        return None
    digits = hour.isdigit() and all(len(part) == 2 and part.isdigit() for part in rest)
    if not digits or int(hour) > 24 or any(int(part) > 59 for part in rest):
        return None
    minute, second = int(rest[0]), int(rest[1]) if len(rest) == 2 else 0
    return Clock(int(hour), minute, second)


def _name_of(head: list[Token]) -> Node | None:
    r"""A name in words or by a mark: `\text{Area}`, `\overline{AB}`, `m\angle ABC`, `[ABC]/[DEF]`,
    `\min f(x)`."""
    values = [token.value for token in head]
    marked = [token for token in head if token.value not in ("{", "}", "(", ")")]
    prefix = values[0] if values[0] in TRIGONOMETRIC else ""
    if values[0] == "m" or prefix:
        marked = marked[1:]
    if len(marked) > 1 and marked[0].value in ("angle", "triangle"):
        if all(token.kind in ("symbol", "constant", "word", "number") for token in marked[1:]):
            return Symbol(prefix + "".join(token.value for token in marked))
        return None
    if values[0] == "overline" and len(head) > 4 and all(map(_is_point, values[2:-1])):
        return Mul(tuple(map(Symbol, values[2:-1])))
    if values[0] in ("max", "min") and values[1:2] not in (["("], ["\\{"]):
        return Symbol("".join(values))
    if "[" in values and len([*filter(_is_point, values)]) > 2:
        marks = ("[", "]", "{", "}", "/", ":", "frac", "triangle")
        areas = all(_is_point(value) or value in marks for value in values)
        return Symbol("".join(values)) if areas else None
    if len(head) > MAX_NAME_WORDS or any(token.kind != "word" for token in head):
        return None
    if len(head) == 1 and 1 < len(values[0]) < 4 and values[0].isupper():
        return Mul(tuple(map(Symbol, values[0])))
    return Symbol(" ".join(values).lower()) if all(map(_is_naming, values)) else None


def _is_naming(word: str) -> bool:
    """Whether a word may be in a name: it denies nothing, and no sentence was run together."""
    return word.lower() not in NOT_UNITS - _NAMING_WORDS and len(word) <= MAX_NAME_CHARACTERS


def _function_name(head: list[Token]) -> Symbol | None:
    """A function at letters, at a number or at another's value, or a probability of anything."""
    values = [token.value for token in head]
    extreme = values[-2] if values[-4:-2] == ["_", "{"] and values[-2] in ("max", "min") else ""
    if extreme:
        head, values = head[:-4], values[:-4]
    opened = next((place for place, value in enumerate(values) if value in ("(", "[")), 0)
    first, inside = head[0], head[opened + 1 : -1]
    if not opened or not inside or values[-1] not in (")", "]"):
        return None
    depth = 0
    for token in inside:
        depth += (token.value in ("(", "[")) - (token.value in (")", "]"))
        if depth < 0:
            return None
    name = "".join(value for value in values[:opened] if value not in ("{", "}"))
    text = Symbol(f"{extreme}{name}({''.join(token.value for token in inside)})")
    if name in _PROBABILITIES or (first.kind == "word" and opened == 1 and _is_naming(name)):
        return text
    plain = name.rstrip("'").removesuffix("^-1")
    if values[opened] != "(" or (plain != first.value and not plain.startswith(f"{first.value}_")):
        return None
    lettered = all(token.kind == "symbol" for token in inside[::2]) and all(
        token.value == "," for token in inside[1::2]
    )
    if first.kind == "symbol" and lettered:
        return text
    named = first.value in _FUNCTION_LETTERS
    inner = inside[0].value in _FUNCTION_LETTERS and inside[1].value == "(" if inside[1:] else False
    kinds = {"number", "constant", "operator", "command", *(("symbol",) if inner else ())}
    named = named or (first.kind == "symbol" and not first.value.islower()) or first.value in GREEK
    return text if named and all(token.kind in kinds for token in inside) else None


def _quotient_name(head: list[Token]) -> Node | None:
    """`AB/CD` written with a slash: one segment over another."""
    values = [token.value for token in head]
    if values.count("/") != 1 or not all(value == "/" or _is_point(value) for value in values):
        return None
    top, bottom = values[: values.index("/")], values[values.index("/") + 1 :]
    if len(top) < 2 or len(bottom) < 2:
        return None
    return divide(Mul(tuple(map(Symbol, top))), Mul(tuple(map(Symbol, bottom))))


def _is_point(value: str) -> bool:
    return len(value) == 1 and value.isupper()


def _unit_of(word: str) -> str:
    lowered = word.lower()
    for form in (word, lowered, lowered.removesuffix("s"), lowered.removesuffix("es")):
        if form in UNIT_OF:
            return UNIT_OF[form]
    return lowered.removesuffix("s") if len(lowered) > 3 else lowered
