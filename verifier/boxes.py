r"""The boxes of a solution, and which of them are its answer.

    "... \boxed{1} ... so x is $\boxed{2}$ or $\boxed{3}$."
          stated        `--------- stated together ------`  -> the last statement is the answer

Boxes with nothing between them but a comma, a semicolon, "and" or "or" are stated together: layout
does not count, a unit is passed over where it stands behind each, and the next box may have a name
or a minus sign before it (`x = \boxed{1}, y = \boxed{3}`). Whatever else stands between two boxes
("no:", "so", an equals sign, a full stop, a name where the box before has none) makes the later one
a statement of its own, which replaces the earlier. So boxes of two sentences are never one answer.

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

from verifier.answer_parser import simple_number
from verifier.answer_words import GREEK, TRIGONOMETRIC, UNIT_NAMES

BOX_COMMANDS = ("\\boxed", "\\fbox", "\\framebox")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]+)")
_BEGUN_BOX = re.compile(r"\\(?:box(?:ed?)?|fbox|framebox)\s*$")
"""Cut off before its brace."""
_MAX_JOINT = 100
_LAYOUT = re.compile(
    r"\\\\|\\[()\[\],;:!$ ]|\\(?:text)?color\s*\{\w+\}"
    r"|\\(?:q?quad|left|right|displaystyle|text(?:rm|bf|it)?|math(?:rm|bf)|mbox|hbox)(?![A-Za-z])"
    r"|(?<!\\)[{}]|[\s$&~*]"
)
_UNITS = "|".join(sorted({word for names in UNIT_NAMES.values() for word in names.split()}))
_VARIABLE = r"[A-Za-z]{1,2}(?: ?_ ?\w)? ?="
_COMMANDS = "|".join(sorted({*GREEK, *TRIGONOMETRIC, "angle"}))
_NAMED = (
    rf"[A-Za-z](?: ?\( ?\w+ ?\))?|\\(?:{_COMMANDS})(?: [A-Za-z]{{1,3}})?|\( ?\w+(?: ?, ?\w+)+ ?\)"
)
_NAME = rf"(?:{_VARIABLE}|(?:{_NAMED}) ?(?:=|\\in(?![A-Za-z])))"
_JOINT = re.compile(
    rf"(?:(?P<unit>\^? ?(?:\\circ|°)|\\?%|(?:{_UNITS})s?(?![A-Za-z])) ?)?"
    r"(?:(?:[,;，；、和或]|(?i:and|or)(?![A-Za-z])(?: also)?) ?)+"
    rf"(?P<name>{_NAME})? ?(?P<sign>-)?"
)
"""Perhaps a unit, then what joins, then perhaps a name and a sign."""
_BEFORE = re.compile(rf"(?:^|(?<=[ ,;(]))(?P<name>{_NAME})? ?(?P<sign>-)?$")
_VARIABLES = re.compile(_VARIABLE)
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
        joint = _joint(text, groups[-1][-1], box) if groups else None
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
    return " ".join(_LAYOUT.sub(" ", text).split())


def _joint(
    text: str, before: tuple[int, int, str], box: tuple[int, int, str]
) -> re.Match[str] | None:
    """How the text between two boxes joins them; None: it does not.

    A unit behind the first must stand behind the second too: 3 hours and 20 minutes are no list.
    Where only the second has a name the first may be a step to it: `2x = 4, x = 2`.
    """
    if box[0] - before[1] > _MAX_JOINT:
        return None
    joint = _JOINT.fullmatch(_plain(text[before[1] : box[0]]))
    if joint is None:
        return None
    if joint["name"] and "=" not in before[2]:
        lead = _BEFORE.search(_plain(text[max(0, before[0] - _MAX_JOINT) : before[0]]))
        if lead is None or not lead["name"]:
            return None
    unit = (joint["unit"] or "").replace(" ", "").removesuffix("s")
    behind = _plain(text[box[1] : box[1] + _MAX_JOINT]).replace(" ", "")
    return joint if behind.startswith(unit) else None


def _statement(
    text: str, boxes: Sequence[tuple[int, int, str]], joints: Sequence[re.Match[str]]
) -> Statement:
    start, end = boxes[0][0], boxes[-1][1]
    parts = tuple(box[2] for box in boxes)
    if not joints:
        return Statement(start, end, parts, parts[0])
    before = _plain(text[max(0, start - _MAX_JOINT) : start])
    first = _BEFORE.search(before)
    leads = [(first["name"], first["sign"]) if first else (None, None)]
    leads += [(joint["name"], joint["sign"]) for joint in joints]
    parts = tuple(
        f"-({part})" if sign and re.search(r"[-+]", part) else f"{sign or ''}{part}"
        for part, (_, sign) in zip((part.rstrip(" ,;.") for part in parts), leads, strict=True)
    )
    opening, closing = _OPENING.search(before), _CLOSING.match(_plain(text[end : end + 20]))
    if opening and closing and not any(re.search("[a-z]", joint[0]) for joint in joints):
        return Statement(start, end, parts, f"{opening[0]}{', '.join(parts)}{closing[0]}")
    names = [name for name, _ in leads]
    if len(set(names)) > 1 and all(name and _VARIABLES.fullmatch(name) for name in names):
        parts = tuple(
            part if "=" in part else f"{name} {part}"
            for name, part in zip(names, parts, strict=True)
        )
    distinct: dict[object, str] = {}
    for part in filter(None, parts):
        distinct.setdefault(_key(part), part)
    parts = tuple(distinct.values()) or ("",)
    return Statement(start, end, parts, join_answers(parts))


def _key(part: str) -> object:
    """What equal boxes have in common: a number's value, or the text without layout."""
    text = "".join(part.split()).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return text if (number := simple_number(text)) is None else number
