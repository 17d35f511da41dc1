r"""Which problems cannot be searched and graded, and why.

They are set aside, not thrown away: a person may want to repair them. What is looked for is plain
text, so that a reason can be checked by eye:

    image          a picture is linked or included; `[asy]` code is text and stays
    figure missing the text points to a figure that is not there
    proof          it asks to prove or show and asks for nothing else
    no answer      nothing was given, and none stands in the solution
    unclear        several texts may be the answer (`rollout.problems.golds`)
    answer         longer than a final answer, a sentence, or a letter of choices that are not there

Not covered: an answer that is wrong; a question whose answer is a drawing but reads like a number.
"""

from __future__ import annotations

import re
from enum import StrEnum

MAX_TEXT = 20_000
"""Characters of a problem; longer ones are documents, or files run together."""
MAX_ANSWER = 500
"""Characters; longer final answers cannot be compared by machine."""
MAX_ANSWER_WORDS = 7
MAX_ANSWER_LETTERS = 40
"""Plain words of four letters and more, and the letters in them; from there it is a sentence. Some
sets have lost the spaces between the words of an answer."""


class Reason(StrEnum):
    """Why a problem is set aside."""

    LONG_TEXT = "text is too long"
    IMAGE = "image"
    FIGURE = "figure missing"
    PROOF = "proof"
    NO_ANSWER = "no answer"
    UNCLEAR = "answer is not clear"
    LONG_ANSWER = "answer is too long to be checked"
    SENTENCE = "answer is a sentence"
    CHOICES = "answer is a choice that the text does not offer"
    MARKED = "set aside by the data set's own marks"


_IMAGE = re.compile(
    r"!\[[^\]]*\]\(|<img(?:\b|_)|\\includegraphics|data:image/|<image(?:_?\d+)?>|\[image[^\]]*\]"
    r"|https?://\S+\.(?:png|jpe?g|gif|svg|webp)",
    re.IGNORECASE,
)
_FIGURE = re.compile(
    r"\b(?:(?:as|is|are) (?:shown|depicted|illustrated|pictured|seen)"
    r"|shown) (?:in|on|at|by) (?:the )?"
    r"(?:figure|fig\.|diagram|picture|image|drawing|graph (?:below|above|on the (?:left|right)))"
    r"|\b(?:figure|diagram|picture|drawing|image) (?:below|above|on the (?:left|right)|at right)"
    r"|\bin (?:the )?(?:figure|fig\.) ?\d+",
    re.IGNORECASE,
)
_PROOF = re.compile(
    r"\b(?:prove|disprove|show|demonstrate|verify)\b(?:,? (?:that|the following|by induction))"
    r"|\b(?:prove|disprove)\b",
    re.IGNORECASE,
)
_ASKS = re.compile(
    r"\?|\b(?:find|determine|compute|calculate|evaluate|what|how many|how much|solve|simplify|"
    r"which|express|give|state|enter)\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\(?\s*(?:\\text(?:bf)?\s*\{\s*)?\(?([A-H])\)?\s*\}?\s*\)?\.?")
_OFFERED = re.compile(
    r"\(\s*[A-H]\s*\)|\b[A-H]\s*[.):：]|\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?[A-H]\b"
)
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{4,}")


def screen(problem: str, answer: str | None) -> Reason | None:
    """Why a problem is to be set aside; None: it can be searched and graded."""
    if len(problem) > MAX_TEXT:
        return Reason.LONG_TEXT
    if _IMAGE.search(problem):
        return Reason.IMAGE
    if "[asy]" not in problem and _FIGURE.search(problem):
        return Reason.FIGURE
    if _PROOF.search(problem) and not _ASKS.search(_PROOF.sub("", problem)):
        return Reason.PROOF
    if answer is None or not answer.strip():
        return Reason.NO_ANSWER
    return unchecked(answer, problem)


def unchecked(answer: str, problem: str) -> Reason | None:
    """Why an answer cannot be compared by machine; None: it can."""
    if len(answer) < 12 and not answer.isalpha() and "(" not in answer and "\\" not in answer:
        return None
    if len(answer) > MAX_ANSWER:
        return Reason.LONG_ANSWER
    words = _WORD.findall(_COMMAND.sub(" ", answer))
    if len(words) >= MAX_ANSWER_WORDS or sum(map(len, words)) >= MAX_ANSWER_LETTERS:
        return Reason.SENTENCE
    if (letter := _CHOICE.fullmatch(answer)) and not _offers(problem, letter[1]):
        return Reason.CHOICES
    return None


def _offers(problem: str, letter: str) -> bool:
    """Whether the text has lettered choices, asks for a letter, or speaks of this one."""
    return (
        bool(_OFFERED.search(problem))
        or "letter" in problem
        or bool(re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", problem))
    )
