r"""Splitting an answer into tokens: LaTeX commands, letters and words, numbers, operators.

Letters are decided here: `xsinx` is x sin x, `abc` three symbols, `pi` a constant, `miles` a word.
The inside of `\text{...}` is split by the same scanner in a mode where runs of letters stay words.
One pass, no backtracking beyond a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from verifier.answer_words import (
    CALL_ONLY,
    CARVED_FUNCTIONS,
    COMMAND_TOKENS,
    CONSTANTS,
    CONSTRUCTORS,
    FUNCTIONS,
    GREEK,
    LATEX_ACCENTS,
    LATEX_IGNORED,
    LATEX_KNOWN,
    LATEX_TEXT,
    OPERATOR_WORDS,
    UNIT_OF,
)

MAX_NUMBER_DIGITS = 1000


class AnswerSyntaxError(ValueError):
    """The text is not one complete answer in either notation."""


class AnswerTooLarge(AnswerSyntaxError):
    """The text nests too deeply or holds a number with too many digits."""


_TOKEN = re.compile(
    r"(?P<space>[\s~]+)"
    r"|(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\d])|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<name>[A-Za-z]+)"
    r"|(?P<operator>\*\*|<=|>=|!=|==|:=|\+/-|[-+*/^_()\[\]{}|,;:=<>!'&%$£€¥₹])",
    re.DOTALL,
)
_QUOTED = re.compile(
    r"(?<=Decimal\()'([-+]?[\d.]+(?:[eE][+-]?\d+)?)'(?=\))|(?<=mpf\()'([-+]?[\d.]+(?:[eE][+-]?\d+)?)'(?=\))"
    r"|(?:(?<=[\[{( ,])|^)(['\"])([A-Za-z]\w{0,20}|[-+]?\d+(?:[./]\d+)?)\3(?=[:,\])}]|$)"
)
_DOTTED = re.compile(
    r"\b(?:np|numpy|sp|sympy|sym|math|S|fractions|decimal|mp|mpmath)\.(?=[A-Za-z])"
)
_NUMPY_SCALAR = re.compile(r"\b(float|int)(?:32|64)\(")
_INTERVAL_KIND = re.compile(r"\bInterval\.(open|Lopen|Ropen)\b")
_GROUPED = re.compile(
    r"(?<![\d.])\d{1,3}"
    r"(?:(?:\s?\{\s*,\s*\}\s*(?:\\!)?|,\s*\\!|\\!\s*,\s*|\\!|\\[,; ])(?:\s|\\!)*\d{3}"
    r"|,\d{3}(?=,\\!))+(?!\d)"
)
r"""Thousands parted by what LaTeX has for it: `1{,}000`, `1,\! 000`, `1\,000`."""
_SYSTEM = re.compile(
    r"(?<![=\s])\s*(?:\\left\s*\\\{\s*)?\\begin\{(cases|array|aligned|matrix)\}(?:\s*\{[lcr]+\})?"
    r"((?:(?!\\begin).)*?)\\end\{\1\}(?:\s*\\right\s*\.)?",
    re.DOTALL,
)
"""Rows under a brace, unless an equals sign before it makes them a definition by cases."""
_PERCENT_WORDS = re.compile(
    r"(?<![A-Za-z])(?:per[\s~-]*cents?|pct|percentage)(?:[\s~]+points?)?(?![A-Za-z])\.?",
    re.IGNORECASE,
)
THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?![\d])(?!,\d)")
_GROUPED_NUMBER = re.compile(THOUSANDS.pattern + r"(?:\.\d+)?")
_UNIT_FRACTION = re.compile(
    r"\\[dt]?frac\{\\(?:text|mathrm)\{\s*([A-Za-z]+)\s*\}\}\{\\(?:text|mathrm)\{\s*([A-Za-z]+)\s*\}\}"
)
_PLAIN_SPEED = re.compile(
    r"(?<=[\d})])\s*(m|km|cm|ft|mi|mm|in)\s*/\s*(s|h|hr|min|sec)(?:\^\{?2\}?)?$"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?! ?[\d/])")
_LOG_CALL = re.compile(r"log(?:2|10)(?=\()")
_POWER_OF_TEN = re.compile(r"\s*10\s*(?:\^|\*\*)")
_DIGITS = re.compile(r"\d+(?![\d.])")
_ROW_GAP = re.compile(r"\s*\[-?[\d.]+\s*(?:pt|em|ex|mm|cm)\]")
_BEFORE_A_NAME = frozenset(("{", "(", "|", "lbar", "/", ":", ",", ";", "=", "≈", "and", "or"))
"""Behind these, `CM` is a segment; behind a number it is a unit."""
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    """number, symbol, constant, function, constructor, word, set, operator, command or end."""
    value: str
    spaced: bool
    """White space came before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Which of two honest readings to take where notation leaves both open."""

    thousands: bool = True
    wide_slash: bool = False
    scientific: bool = True


END = Token("end", "", False)


def tokenize(text: str, reading: Reading) -> list[Token]:
    """Split an answer into tokens; letters are split into functions, constants, single symbols and
    words.

    Raises:
        AnswerSyntaxError: a character that belongs to neither notation.
    """
    if text.startswith("~"):
        raise AnswerSyntaxError("an approximate answer")
    text = _INTERVAL_KIND.sub(r"Interval\1", text)
    text = _NUMPY_SCALAR.sub(
        lambda match: "Float(" if match[1] == "float" else "Integer(", _DOTTED.sub("", text)
    )
    if "\\begin" in text:
        text = _SYSTEM.sub(_rows_of_system, text)
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    if " " in text and "[" not in text:
        text = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    if "/" in text or "frac" in text:
        text = _UNIT_FRACTION.sub(r"\\text{ \1/\2}", text)
        text = _PLAIN_SPEED.sub(lambda match: "\\text{ " + match[0].strip() + "}", text)
    text = _REPEATING.sub(_repeating_decimal, text)
    if "'" in text or '"' in text:
        text = _QUOTED.sub(lambda match: match[1] or match[2] or match[4], text)
    if "p" in text or "P" in text:
        text = _PERCENT_WORDS.sub("percent", text)
    return _Tokenizer(text, reading).run()


def _rows_of_system(match: re.Match[str]) -> str:
    """Equations one below the other as equations in a row."""
    rows = [row.strip(" ,;.\n") for row in re.sub(r"&\s*=", "=", match[2]).split("\\\\")]
    rows = [row for row in rows if row]
    systems = all("=" in row and "&" not in row for row in rows)
    return ", ".join([*rows, ""]) if rows and systems else match[0]


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, cycle = match.groups()
    whole, fixed = whole or "0", fixed or ""
    if len(whole + fixed + cycle) > 60:
        return match[0]
    shift = 10 ** len(fixed)
    value = Fraction(int(whole + fixed), shift) + Fraction(
        int(cycle), shift * (10 ** len(cycle) - 1)
    )
    return f"({value.numerator}/{value.denominator})"


class _Tokenizer:
    def __init__(self, text: str, reading: Reading) -> None:
        self.text = text
        self.reading = reading
        self.tokens: list[Token] = []
        self.depth = 0
        self.spaced = False

    def run(self) -> list[Token]:
        self._scan(0, len(self.text), as_text=False)
        return self.tokens

    def _add(self, kind: str, value: str) -> None:
        self.tokens.append(Token(kind, value, self.spaced))
        self.spaced = False

    def _scan(self, position: int, end: int, *, as_text: bool) -> None:
        text = self.text
        while position < end:
            if (
                self.reading.thousands
                and self.depth == 0
                and text[position].isdigit()
                and (match := _GROUPED_NUMBER.match(text, position))
            ):
                self._add("number", match[0].replace(",", ""))
                position = match.end()
                continue
            if as_text and text[position] == ".":
                position += 1
                continue
            found = _TOKEN.match(text, position)
            if not found:
                raise AnswerSyntaxError(f"unexpected character {text[position]!r}")
            kind, value = found.lastgroup, found[0]
            position = found.end()
            if kind == "space":
                self.spaced = True
            elif kind == "number":
                position = self._number(value, position)
            elif kind == "operator":
                if value in "([{":
                    self.depth += 1
                elif value in ")]}":
                    self.depth -= 1
                self._add("operator", {"==": "=", ":=": "=", "+/-": "±"}.get(value, value))
            elif kind == "name":
                if as_text:
                    self._text_word(value)
                else:
                    position = self._name(value, position)
            else:
                position = self._command(value[1:], position)

    def _number(self, value: str, position: int) -> int:
        if not self.reading.scientific and (match := re.match(r"(\d+)e(-\d+)$", value)):
            self._add("number", match[1])
            self._add("constant", "e")
            return position - len(match[2])
        self._add("number", value)
        if (
            self.text.startswith("j", position)
            and not self.text[position + 1 : position + 2].isalnum()
        ):
            self._add("constant", "i")
            return position + 1
        return position

    def _text_word(self, word: str) -> None:
        if operator := self._operator_word(word):
            self._add("operator", operator)
        elif word in ("i", "e", "pi") or (
            len(word) == 1 and word.isupper() and not self._after_number()
        ):
            self._add("constant" if word in CONSTANTS and word not in "IE" else "symbol", word)
        elif word in FUNCTIONS and word not in ("min", "sec", "sign", "max"):
            self._add("function", word)
        else:
            self._add("word", word)

    def _operator_word(self, word: str) -> str | None:
        """What a word joins; "approximately" joins only what stands on both its sides."""
        operator = OPERATOR_WORDS.get(word.lower())
        return None if operator == "≈" and not self.tokens else operator

    def _after_number(self) -> bool:
        return bool(self.tokens) and self.tokens[-1].kind == "number"

    def _name(self, run: str, position: int) -> int:
        text = self.text
        follow = text[position : position + 1]
        called = text[position:].lstrip(" ")[:1] == "("
        lowered = run.lower()
        before = self.tokens[-1] if self.tokens else END
        if called and (run in CONSTRUCTORS):
            self._add("constructor", run)
        elif run in ("EmptySet", "Reals"):
            self._add("set", "empty" if run == "EmptySet" else "R")
        elif operator := self._operator_word(run):
            self._add("operator", operator)
        elif (
            run in ("U", "u", "union")
            and before.value in (")", "]", "}", "\\}")
            and text[position:].lstrip()[:1] in ("(", "[", "{", "\\")
        ):
            self._add("operator", "∪")
        elif run == "in" and before.kind == "symbol":
            self._add("operator", "in")
        elif (
            run in ("x", "X")
            and self.spaced
            and before.kind == "number"
            and _POWER_OF_TEN.match(text, position)
        ):
            self._add("operator", "*")
        elif follow.isdigit() and (match := _LOG_CALL.match(text, position - len(run))):
            self._add("function", match[0])
            return match.end()
        elif run in FUNCTIONS and (
            called or not (run in CALL_ONLY or (run == "sec" and before.kind == "number"))
        ):
            self._add("function", run)
        elif run in CONSTANTS:
            self._add("constant", run)
        elif run in GREEK:
            self._add("symbol", run)
        elif len(run) == 1:
            if match := _DIGITS.match(text, position):
                self._add("symbol", f"{run}_{match[0]}")
                return match.end()
            self._add("symbol", run)
        elif (self.tokens and not (run.isupper() and before.value in _BEFORE_A_NAME)) and (
            run in ("per", "square", "sq", "cubic", "squared", "cubed")
            or (
                not called
                and (run in UNIT_OF or lowered in UNIT_OF or lowered.removesuffix("s") in UNIT_OF)
            )
        ):
            self._add("word", run)
        else:
            self._carve(run)
        return position

    def _carve(self, run: str) -> None:
        """Split a run of letters: `xsinx` -> x sin x; a long run with nothing to find is a word."""
        pieces: list[tuple[str, str]] = []
        index = 0
        found = False
        while index < len(run):
            name = next((name for name in CARVED_FUNCTIONS if run.startswith(name, index)), None)
            if name is not None:
                found = True
                pieces.append(("constant" if name == "pi" else "function", name))
                index += len(name)
            else:
                pieces.append(("constant" if run[index] in CONSTANTS else "symbol", run[index]))
                index += 1
        joiner = next((word for word in ("and", "or") if run.startswith(word)), None)
        if joiner and not found and len(run) - len(joiner) <= 2 and self._after_number():
            self._add("operator", joiner)
            for letter in run[len(joiner) :]:
                self._add("constant" if letter in CONSTANTS else "symbol", letter)
            return
        product = len(run) <= 6 and self.tokens and not self.spaced
        if len(run) >= 4 and (not found or len(pieces) > 5) and not product:
            self._add("word", run)
            return
        for kind, value in pieces:
            self._add(kind, value)

    def _command(self, name: str, position: int) -> int:
        text = self.text
        if not name[0].isalpha():
            return self._escaped(name, position)
        if name not in LATEX_KNOWN:
            prefixes = (name[:size] for size in range(len(name) - 1, 1, -1))
            prefix = next((one for one in prefixes if one in LATEX_KNOWN), None)
            if prefix is None:
                raise AnswerSyntaxError(f"unknown command \\{name}")
            position -= len(name) - len(prefix)
            name = prefix
        if name in ("left", "right", "middle"):
            rest = text[position : position + 1]
            if rest == "|":
                self._add("operator", {"left": "lbar", "right": "rbar", "middle": "|"}[name])
                return position + 1
            return position + 1 if rest == "." else position
        if name in LATEX_TEXT:
            return self._text_group(name, position)
        if name in LATEX_IGNORED:
            self.spaced = True
            return position
        if name in ("hspace", "phantom"):
            return self._group_end(position)
        if name == "mathbb":
            stop = self._group_end(position)
            self._add("set", re.sub(r"[\s{}]", "", text[position:stop]))
            return stop
        if name in LATEX_ACCENTS:
            stop = self._group_end(position)
            inner = re.sub(r"[\s{}\\]", "", text[position:stop])
            if not inner:
                raise AnswerSyntaxError(f"\\{name} over nothing")
            self._add("symbol", f"{'vec' if name == 'overrightarrow' else name}:{inner}")
            return stop
        self._add(*COMMAND_TOKENS.get(name, ("command", name)))
        return position

    def _escaped(self, char: str, position: int) -> int:
        if char in ",;:! >()[]":
            self.spaced = True
        elif char in "{}":
            self.depth += 1 if char == "{" else -1
            self._add("operator", "\\" + char)
        elif char in "%$&_#|":
            self._add("operator", char)
        elif char == "\\":
            self._add("operator", "\\\\")
            if match := _ROW_GAP.match(self.text, position):
                return match.end()
        else:
            raise AnswerSyntaxError(f"unknown command \\{char}")
        return position

    def _text_group(self, name: str, position: int) -> int:
        opening = re.compile(r"\s*\{").match(self.text, position)
        if not opening:
            self.spaced = True
            return position
        stop = self._group_end(position)
        inner = self.text[opening.end() : stop - 1]
        bold = name in ("mathbf", "boldsymbol", "pmb", "bm")
        if bold and len(inner.strip()) == 1 and inner.strip().islower():
            self._add("symbol", f"vec:{inner.strip()}")
            return stop
        if not re.fullmatch(r"\s*(?:\\[a-z]+\s*)?[-\w.,:\s(){}\\^%$/~'°+&!]*", inner):
            raise AnswerSyntaxError("text that is neither words nor mathematics")
        self.spaced = self.spaced or inner[:1] in (" ", "~")
        base = len(self.tokens)
        self._scan(opening.end(), stop - 1, as_text=True)
        if len(self.tokens) > base and inner[-1:] in (" ", "~"):
            self.spaced = True
        return stop

    def _group_end(self, position: int) -> int:
        """Position after the brace group (or the one token) that starts at `position`."""
        text = self.text
        while position < len(text) and text[position] in " ~":
            position += 1
        if position >= len(text):
            raise AnswerSyntaxError("a command without its argument")
        if text[position] != "{":
            match = re.compile(r"\\[A-Za-z]+|.", re.DOTALL).match(text, position)
            return match.end() if match else position + 1
        depth = 0
        for index in range(position, len(text)):
            if text[index] == "{" and text[index - 1 : index] != "\\":
                depth += 1
            elif text[index] == "}" and text[index - 1 : index] != "\\":
                depth -= 1
                if depth == 0:
                    return index + 1
        raise AnswerSyntaxError("an open brace is not closed")
