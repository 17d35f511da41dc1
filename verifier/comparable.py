"""Can a machine compare this published answer with another one?

Some benchmark answers are whole sentences (with their blanks removed, in three of the released
tables): the grader then says "not equal" to everything but the same text. A report has to say how
many such rows there are, because they bound what any system can reach.
"""

from __future__ import annotations

from verifier.answer import normalise
from verifier.answer_parser import parse_answer
from verifier.answer_tokens import AnswerTooLarge
from verifier.answer_tree import Label, Node, children
from verifier.verify import MAX_CHARACTERS

MAX_WORD_CHARACTERS = 16
"""A word longer than this is taken for a sentence without blanks ("parallelogram" has 13)."""


def is_comparable(gold: str) -> bool:
    """Whether the grader reads a published answer as something other than a sentence.

    Single words ("even", a name) are comparable: they are compared as text.
    """
    if not gold.strip() or len(gold) > MAX_CHARACTERS:
        return False
    try:
        readings = parse_answer(normalise(gold.strip()))
    except (AnswerTooLarge, RecursionError):
        return False
    return any(not _has_sentence(reading) for reading in readings)


def _has_sentence(node: Node) -> bool:
    if isinstance(node, Label):
        return len(node.text) > MAX_WORD_CHARACTERS
    return any(map(_has_sentence, children(node)))
