"""Multiple choice as data sets hold it: options in a column of their own, and the right one.

    options   a list, texts by letter, or one text "A) 3 B) 4"
    answer    a letter, an option's text, or (a number) its place in the list, from 0

The options go under the question, a letter each, and the answer is the letter; the option's text is
accepted too.

Not covered: places counted from 1; options in pictures; options that the question itself lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rollout.problems.rows import RowError, WholeFileError, kind_of_value

LETTERS = "ABCDEFGHIJ"
_OWN_LETTER = re.compile(r"\s*\(?([A-Ja-j])\s*[).:]\s*(?=\S)")
_LETTER = re.compile(r"\(?([A-Ja-j])\)?[.):]?")
_SEVERAL = re.compile(r"[A-J](?:\s*(?:,|;|and)?\s*[A-J])+")


def read_options(value: Any) -> tuple[Any, ...]:
    """The options of a row as they stand, without letters of their own; empty: it has none.

    Raises:
        RowError: they cannot be told apart.
    """
    if isinstance(value, str):
        value = _of_text(value) if value.strip() else ()
    if isinstance(value, Mapping):
        named = [(str(key).upper(), text) for key, text in value.items() if text is not None]
        if "".join(key for key, _ in named) != LETTERS[: len(named)]:
            raise RowError(f"options are named {', '.join(map(str, value))}, not A, B, C, ...")
        return tuple(text for _, text in named)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or any(
        isinstance(item, bool) or not isinstance(item, str | int | float) for item in value
    ):
        raise RowError("options are neither a list of texts nor texts by letter")
    if len(value) > len(LETTERS) or len(value) == 1:
        raise RowError(f"{len(value)} options; expected 2 to {len(LETTERS)}")
    own = [_OWN_LETTER.match(item) if isinstance(item, str) else None for item in value]
    if value and "".join(m[1].upper() if m else "-" for m in own) == LETTERS[: len(value)]:
        return tuple(item[m.end() :] for item, m in zip(value, own, strict=True) if m)
    return tuple(value)


def list_options(options: Sequence[Any]) -> str:
    """The options below each other, a letter before each."""
    return "\n".join(
        f"({x}) {str(text).strip()}" for x, text in zip(LETTERS, options, strict=False)
    )


def chosen(answer: Any, options: Sequence[Any]) -> tuple[str, tuple[str, ...]]:
    """The letter of the right option, or letters; and its text where that may stand for it.

    Raises:
        RowError: the answer is no option, or could be two of them.
        WholeFileError: a place that is not in the list, so that all may be counted otherwise.
    """
    if isinstance(answer, list) and answer:
        letters = {chosen(item, options)[0] for item in answer}
        return chosen(answer[0], options) if len(answer) == 1 else (", ".join(sorted(letters)), ())
    if isinstance(answer, str) and _SEVERAL.fullmatch(answer.strip()):
        return chosen(re.findall("[A-J]", answer), options)
    places = {place for place, option in enumerate(options) if _same(option, answer)}
    if isinstance(answer, str):
        places |= _places_of_letter(answer.strip(), options)
    elif isinstance(answer, bool) or not isinstance(answer, int | float):
        raise RowError(f"answer is {kind_of_value(answer)}, neither an option nor its letter")
    elif answer in range(len(options)):
        places.add(int(answer))
    elif not places:
        raise WholeFileError(
            f"answer {answer} is no place in a list of {len(options)} options counted from 0; "
            "give letters"
        )
    if len(places) != 1:
        what = "may be two" if places else "is none"
        raise RowError(f"answer {answer!r} {what} of the {len(options)} options")
    (place,) = places
    text = str(options[place]).strip()
    alone = sum(_same(option, options[place]) for option in options) == 1
    plain = text and not _LETTER.fullmatch(text) and not _SEVERAL.fullmatch(text)
    return LETTERS[place], (text,) if plain and alone else ()


def _places_of_letter(answer: str, options: Sequence[Any]) -> set[int]:
    """Where an answer "B", or "B) its text", points to."""
    letter, marked = _LETTER.fullmatch(answer), _OWN_LETTER.match(answer)
    if not (letter or marked):
        return set()
    place = LETTERS.index((letter or marked)[1].upper())  # type: ignore[index]
    rest = "" if letter else answer[marked.end() :]  # type: ignore[union-attr]
    there = place < len(options) and (not rest or _same(str(options[place]), rest))
    return {place} if there else set()


def _same(option: Any, answer: Any) -> bool:
    if isinstance(option, str) and isinstance(answer, str):
        return option.split() == answer.split()
    return type(option) is type(answer) and bool(option == answer)


def _of_text(text: str) -> Any:
    """Options written as one text: JSON, or a letter before each."""
    if text.lstrip()[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError:
            pass
    else:
        marks: list[re.Match[str]] = []
        for letter in LETTERS:
            mark = re.compile(
                rf"(?:^|(?<=[\s,;]))\(?[{letter}{letter.lower()}]\s*[).:]\s*(?=\S)"
            ).search(text, marks[-1].end() if marks else 0)
            if mark is None:
                break
            marks.append(mark)
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        if len(marks) > 1 and not text[: marks[0].start()].strip():
            return [
                text[m.end() : end].strip().rstrip(",;").strip()
                for m, end in zip(marks, ends, strict=True)
            ]
    raise RowError(f"options cannot be told apart: {text[:60]!r}")
