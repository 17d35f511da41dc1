r"""Ground truths as data sets give them: an answer column, or a solution that ends in one.

    given      text, a number (145.0 is 145), a list of one; `9 (apples)` is 9; of a solution what
               stands behind its last `####`
    solution   its boxes, else what stands behind its last `####`

An answer that is wrong punishes right solutions for ever, so where it is not clear which text is
the answer the row says so (`Gold.doubt`) and is set aside. A solution with several boxes is clear
when they are stated together (`verifier.boxes`), when all earlier ones are among them, or when only
the last is called the answer.

Not covered: a single box that holds a step instead of the answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rollout.problems.rows import RowError, kind_of_value
from verifier import answers_match
from verifier.answer_words import FUNCTIONS, GREEK, UNIT_NAMES
from verifier.boxes import Statement, join_answers, read_statements

SEVERAL_BOXES = "several boxes in the solution, not clear which are the answer"
SEVERAL_ANSWERS = "several answers in a list, not said whether all are meant or any"


@dataclass(frozen=True, slots=True)
class Gold:
    """What a row gives as its answer."""

    answer: str | None
    """None: nothing, or it is not clear what."""
    also: tuple[str, ...] = ()
    """Further accepted answers."""
    joined: bool = False
    """It was put together from several boxes of a solution."""
    doubt: str | None = None
    """Why it is not clear which text is the answer; None: it is."""


NO_GOLD = Gold(None)
_THOUSANDS = re.compile(r"-?\$?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NUMBER_AND_UNIT = re.compile(r"([-+]?\$?\d[\d,.:/ ]*?)\s*\(\s*([A-Za-z][A-Za-z .²³/%'-]*)\)")
_UNITS = frozenset(word for names in UNIT_NAMES.values() for word in names.split()) | {"am", "pm"}
_NO_UNITS = frozenset({"mod", "base", "approx", "approximately"}) | GREEK | FUNCTIONS.keys()
_HALF_OF_DAY = re.compile(r"[ap]\.? ?m\.?", re.IGNORECASE)
_TEXT_OF_LIST = re.compile(r"\[\s*(?:'.*'|\".*\")\s*\]", re.DOTALL)
_SENTENCE_END = re.compile(r"(?:[.!?。]|\\\])\s")
_SEPARATOR = re.compile(r"[,;]|\\text\s*\{\s*(?:and|or)\s*\}")
_CALLED_ANSWER = re.compile(r"\banswers?\b|答案", re.IGNORECASE)


def answer_of_solution(solution: str) -> Gold:
    r"""What the boxes of a solution state, else what is behind its last `####`."""
    statements = read_statements(solution)
    if not statements or not statements[-1].answer:
        return Gold(after_hashes(solution))
    last = statements[-1]
    others = [earlier for earlier in statements[:-1] if not _among(earlier, last)]
    if others:
        called = {s: _is_called_answer(solution, before, s) for before, s in pairwise(statements)}
        called[statements[0]] = _is_called_answer(solution, None, statements[0])
        if not called[last] or any(called[earlier] for earlier in others):
            return Gold(None, doubt=SEVERAL_BOXES)
    if len(last.parts) > 1 and last.answer == join_answers(last.parts) and _are_forms(last.parts):
        return Gold(last.parts[0])
    return Gold(last.answer, joined=len(last.parts) > 1)


def _are_forms(parts: Sequence[str]) -> bool:
    """Whether all are one answer in several forms, as 1/2 and 0.5; x=1 and y=1 are two."""
    return not any("=" in part for part in parts) and all(
        answers_match(parts[0], part) for part in parts[1:]
    )


def _is_called_answer(solution: str, before: Statement | None, statement: Statement) -> bool:
    """Whether the sentence of a statement, up to it, speaks of the answer."""
    lead = solution[before.end if before else 0 : statement.start]
    return bool(_CALLED_ANSWER.search(_SENTENCE_END.split(lead)[-1]))


def _among(earlier: Statement, last: Statement) -> bool:
    """Whether what was stated earlier is, or is part of, what is stated last."""
    whole = (last.answer, *last.parts, *map(str.strip, _SEPARATOR.split(last.answer)))
    return all(
        part in whole or any(answers_match(other, part) for other in whole)
        for part in earlier.parts
    )


def after_hashes(solution: str) -> str | None:
    """What stands behind the last `####`, to the end of the line."""
    _, mark, rest = solution.rpartition("####")
    if not mark:
        return None
    line = rest.strip().split("\n", 1)[0].strip().lstrip("$").strip()
    return without_thousands(line) or None


def without_thousands(answer: str) -> str:
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def given(value: Any) -> Gold:
    """The answer in a column.

    Raises:
        RowError: neither text, a number, nor a list of them.
    """
    if is_blank(value):
        return NO_GOLD
    if isinstance(value, str) and _TEXT_OF_LIST.fullmatch(value.strip()):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"answer is a list written as text: {value[:60]!r}") from error
    if isinstance(value, list):
        golds = [gold for item in value if (gold := given(item)) != NO_GOLD]
        return Gold(None, doubt=SEVERAL_ANSWERS) if len(golds) > 1 else [*golds, NO_GOLD][0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"answer is {kind_of_value(value)}, not text or a number")
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    if "####" in text:
        return Gold(after_hashes(text))
    if text.startswith("\\boxed") and len(stated := read_statements(text)) == 1:
        rest = text[stated[0].end :].strip(" .")
        text = text if rest else stated[0].answer
    return Gold(_without_units(text) or None)


def is_blank(value: Any) -> bool:
    """Whether a cell is empty; some tables write "not a number" for that."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def all_of(value: Any) -> Gold:
    """The answer in a column whose lists hold the parts of one answer."""
    if not isinstance(value, list):
        return given(value)
    parts = [answer for item in value if (answer := given(item).answer) is not None]
    return Gold(join_answers(parts)) if parts else NO_GOLD


def _without_units(answer: str) -> str:
    """`9 (apples)` -> `9`, also of several: ASDiv's way to give units. A time keeps its half."""
    numbers = []
    for part in answer.split(";"):
        found = _NUMBER_AND_UNIT.fullmatch(part.strip())
        words = found[2].split() if found else []
        if not found or _NO_UNITS & set(words) or not (len(words[0]) > 2 or words[0] in _UNITS):
            return answer
        numbers.append(f"{found[1]} {found[2]}" if _HALF_OF_DAY.fullmatch(found[2]) else found[1])
    return "; ".join(numbers)


def alternatives(value: Any) -> tuple[str, ...]:
    """Further accepted answers of a column: a list, or a JSON list as text."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"answers_alt is not a JSON list: {error}") from error
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(f"answers_alt is {kind_of_value(value)}, not a list")
    return tuple(str(item) for item in value)


def any_of(truth: Any) -> Gold:
    """A ground truth that is text, a number, a list of accepted answers, or such a list as text."""
    if isinstance(truth, str) and truth.lstrip().startswith("["):
        try:
            parsed = json.loads(truth)
        except ValueError:
            parsed = None
        # [1, 2] is an interval or a pair; ["34"] is a list of accepted answers.
        if isinstance(parsed, list) and parsed and all(isinstance(item, str) for item in parsed):
            truth = parsed
    items = truth if isinstance(truth, list) else [truth]
    answers = [answer for item in items if (answer := given(item).answer) is not None]
    return Gold(answers[0], tuple(answers[1:])) if answers else NO_GOLD
