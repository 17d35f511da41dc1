r"""The boxes of a solution, and which of them are its answer.

    "... \boxed{1} ... so x is $\boxed{2}$ or $\boxed{3}$."
          stated        `--------- stated together ------`  -> the last statement is the answer

Boxes with nothing between them but a comma, a semicolon, "and" or "or" are stated together: layout
does not count, the sign or unit behind a box is passed over, and the next box may have its name
before it (`y = \boxed{3}`). Whatever else stands between two boxes ("no:", "so", an equals sign, a
full stop) makes the later one a statement of its own, which replaces the earlier. So boxes of two
sentences are never one answer.

A last box that is never closed says that the text was cut off while its answer was being given, or
given anew: then there is none.

One pass over the text; the patterns see at most a hundred characters at a time, so 100,000
characters of `\boxed{` cost milliseconds.

Not covered: answers announced in prose ("the answer is 5") are not searched for, nor whether boxes
one below the other, without a comma, are one answer. A solution without a box has no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from verifier.answer_words import UNIT_NAMES

BOX_COMMANDS = ("\\boxed", "\\fbox", "\\framebox")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]+)")
_BEGUN_BOX = re.compile(r"\\(?:box(?:ed?)?|fbox|framebox)\s*$")
"""Cut off before its brace."""
_MAX_JOINT = 100
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox|hbox)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(
    r"\\\\|\\[()\[\],;:!$ ]|\\(?:q?quad|left|right|displaystyle)(?![A-Za-z])|[\s$&~*]"
)
_UNITS = "|".join(sorted({word for names in UNIT_NAMES.values() for word in names.split()}))
_NAME = r"(?:[A-Za-z]{1,2}|\\[A-Za-z]+)(?: ?_ ?(?:\w|\{ ?\w+ ?\}))?(?: ?\( ?\w+ ?\))? ?="
_JOINT = re.compile(
    rf"(?:(?:\^? ?\{{? ?(?:\\circ|°) ?\}}?|\\?%|(?:{_UNITS})s?(?![A-Za-z])) ?)?"
    rf"(?P<joins>(?:(?:[,;，；、和或]|(?i:and|or)(?![A-Za-z])) ?)+)(?P<name>{_NAME})?"
)
"""Perhaps a unit, then what joins, then perhaps a name."""
_NAME_BEFORE = re.compile(rf"(?:^|(?<=[ ,;(]))({_NAME})$")
_OPENING = re.compile(r"(?:[(\[]|\\\{)$")
_CLOSING = re.compile(r"[)\]]|\\\}")


@dataclass(frozen=True, slots=True)
class Statement:
    """One box, or several that are stated together."""

    start: int
    """Where in the text its first box begins."""
    end: int
    """Where its last box ends."""
    parts: tuple[str, ...]
    """What each box holds, stripped and unwrapped, `y = ` before it where each has such a name of
    its own."""
    answer: str
    """The answer that the boxes give together."""


def extract_answer(text: str | None) -> str | None:
    r"""The answer of a solution: what its last box holds, or its last boxes if stated together.

    A box inside a box yields the inner text when the outer holds nothing else. `\boxed 7` counts
    behind the other boxes only where it holds a number.

    Returns:
        The answer text, possibly empty for `\boxed{}`; None when there is no box, the last one is
        not closed, or `text` is not a string.
    """
    statements = read_statements(text)
    return statements[-1].answer if statements else None


def read_statements(text: str | None) -> list[Statement]:
    """What a solution states in boxes, in order; empty when its last box is not closed."""
    if not isinstance(text, str) or "\\" not in text:
        return []
    boxes = balanced_boxes(text)
    begun = [match.start() for match in _BOX.finditer(text)]
    if (begun and begun[-1] not in boxes) or _BEGUN_BOX.search(text, max(0, len(text) - 20)):
        return []
    bare = {match.start(): match for match in _BARE_BOX.finditer(text)}
    outer: list[tuple[int, int, str]] = []
    """(begin, end, what it holds) of each box that is in no other."""
    for start in sorted({*boxes, *bare}):
        if outer and start < outer[-1][1]:
            continue
        if start in boxes:
            outer.append((start, boxes[start][1] + 1, inside(text, start, boxes)))
        elif not boxes or bare[start][1].lstrip("-+.")[:1].isdigit():
            outer.append((start, bare[start].end(), bare[start][1]))
    groups: list[list[tuple[int, int, str]]] = []
    joints: list[list[re.Match[str]]] = []
    for box in outer:
        joint = _joint(text[groups[-1][-1][1] : box[0]]) if groups else None
        if joint is None:
            groups.append([box])
            joints.append([])
        else:
            groups[-1].append(box)
            joints[-1].append(joint)
    return [_statement(text, *group) for group in zip(groups, joints, strict=True)]


def join_answers(parts: Sequence[str]) -> str:
    """Several answers as the text of one: a list, its parts in their order."""
    several = any("=" in part and re.search(r"[,;]", part) for part in parts)
    return ("; " if several and len(parts) > 1 else ", ").join(parts)


def balanced_boxes(text: str) -> dict[int, tuple[int, int]]:
    """Where each balanced box begins -> (start, end) of what it holds; one pass."""
    begins = {match.end() - 1: match.start() for match in _BOX.finditer(text)}
    boxes: dict[int, tuple[int, int]] = {}
    if not begins:
        return boxes
    stack: list[int] = []
    position, size = min(begins), len(text)
    while position < size:
        char = text[position]
        if char == "\\":
            position += 2
            continue
        if char == "{":
            stack.append(position)
        elif char == "}" and stack:
            opened = stack.pop()
            if opened in begins:
                boxes[begins[opened]] = (opened + 1, position)
        position += 1
    return boxes


def inside(text: str, box: int, boxes: dict[int, tuple[int, int]]) -> str:
    """What a box holds, going inwards while that is another box and nothing else."""
    start, end = boxes[box]
    while True:
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if start not in boxes or boxes[start][1] != end - 1:
            return text[start:end]
        start, end = boxes[start]


def _plain(text: str) -> str:
    """Some text without layout, every run of it a blank."""
    return " ".join(_LAYOUT.sub(" ", _TEXT.sub(r" \1 ", text)).split())


def _joint(between: str) -> re.Match[str] | None:
    """How the text between two boxes joins them; None: it does not."""
    return _JOINT.fullmatch(_plain(between)) if len(between) <= _MAX_JOINT else None


def _statement(
    text: str, boxes: Sequence[tuple[int, int, str]], joints: Sequence[re.Match[str]]
) -> Statement:
    start, end = boxes[0][0], boxes[-1][1]
    parts = tuple(box[2] for box in boxes)
    if not joints:
        return Statement(start, end, parts, parts[0])
    parts = tuple(part.rstrip(" ,;.") for part in parts)
    before, behind = _plain(text[max(0, start - _MAX_JOINT) : start]), text[end : end + 20]
    opening, closing = _OPENING.search(before), _CLOSING.match(_plain(behind))
    if opening and closing and all("," in joint["joins"] for joint in joints):
        return Statement(start, end, parts, f"{opening[0]}{', '.join(parts)}{closing[0]}")
    first = _NAME_BEFORE.search(before)
    names = [first[1] if first else None, *(joint["name"] for joint in joints)]
    if all(names) and len(set(names)) > 1 and not any("=" in part for part in parts):
        parts = tuple(f"{name} {part}" for name, part in zip(names, parts, strict=True))
    distinct: dict[str, str] = {}
    for part in parts:
        distinct.setdefault(_key(part), part)
    parts = tuple(distinct.values())
    return Statement(start, end, parts, join_answers(parts))


def _key(part: str) -> str:
    return "".join(part.split()).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
