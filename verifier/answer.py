"""The cheap text work done on an answer before it is parsed."""

from __future__ import annotations

import re
import unicodedata

from verifier.boxes import BOX_COMMANDS, balanced_boxes, inside

_COMMAND_OF = (
    "× times ≠ ne ≈ approx ∞ infty ∪ cup ∩ cap ∖ setminus ∅ emptyset ∈ in √ sqrt ± pm ∓ mp "
    "⌊ lfloor ⌋ rfloor ⌈ lceil ⌉ rceil ⟨ langle ⟩ rangle … ldots α alpha β beta γ gamma δ delta "
    "Δ Delta ε epsilon θ theta λ lambda μ mu π pi ρ rho σ sigma τ tau φ phi ϕ phi ω omega"
)
_COMMANDS = _COMMAND_OF.split()
_CHARACTERS = {
    **dict.fromkeys("−–—‐‑﹣", "-"),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("°º˚", r"^{\circ}"),
    **dict.fromkeys("′’‘", "'"),
    **dict.fromkeys("“”«»", '"'),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2061\u2062\u2064", ""),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u2005\u3000", " "),
    **{char: rf"\{name} " for char, name in zip(_COMMANDS[::2], _COMMANDS[1::2], strict=True)},
    **{char: rf"\mathbb{{{unicodedata.normalize('NFKC', char)}}}" for char in "ℝℤℚℕℂ"},
    **{
        char: r"\frac{" + unicodedata.normalize("NFKC", char).replace("\u2044", "}{") + "}"
        for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    },
    "∗": "*",
    "÷": "/",
    "\u2044": "/",
    "∕": "/",
    "∛": r"\sqrt[3] ",
    "∣": "|",
    "、": ",",
}
_TRANSLATION = str.maketrans(_CHARACTERS)
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎"
_PLAIN = "0123456789+-()n"
_UNRAISE = str.maketrans(_RAISED, _PLAIN)
_UNLOWER = str.maketrans(_LOWERED, _PLAIN[: len(_LOWERED)])
_RAISED_RUN = re.compile(f"[{_RAISED}]+")
_LOWERED_RUN = re.compile(f"[{_LOWERED}]+")

_UNESCAPED_DOLLAR = re.compile(r"(?<!\\)\$")
_LEAD = re.compile(
    r"(?:\\text\s*\{\s*)?(?:(?:the|my|final|correct|solution|so|therefore|thus|hence)[\s,]+)*"
    r"(?:(?:answer|solution|ans)(?:\s+is\b|\s*:|\s*=)|solutionis:)[\s:]*\}?|\\approx(?![A-Za-z])",
    re.IGNORECASE,
)
_FOR_ALL_WORDS = r"for\s+(?:all|any|every)(?:\s+real(?:\s+numbers?)?)?"
_FOR_ALL = re.compile(
    r"(?:\\[ ,;:!]|\\q?quad|[,\s])*(?:"
    rf"\\(?:text|mathrm)\s*\{{\s*,?\s*{_FOR_ALL_WORDS}\s*\}}"
    rf"|\\(?:text|mathrm)\s*\{{\s*\}}\s*\\forall|\\forall|\b{_FOR_ALL_WORDS}\s)"
    r"\s*\$?\s*[A-Za-z]\s*(?:(?:\\in|∈|\bin\b)\s*(?:\\mathbb\s*\{?\s*)?[RQZNC]\s*\}?)?\s*\$?$"
)
# Possessive, and from the start of a run only: a long run of backslashes can be read in more ways
# than can be tried.
_TRAILING_SPACE = re.compile(r"(?<![\\~\s])(?:\\[,;:! ]|\\q?quad|\\|~|\s)++$")
_LEADING_SPACE = re.compile(r"^(?:\\\\|\\[,;:! ]|\\q?quad(?![A-Za-z])|\s)+")


def normalise(text: str) -> str:
    """Strip what decorates an answer without changing its meaning.

    Unicode symbols become their LaTeX names; box, dollar and display delimiters, quotation marks,
    lead-ins ("The answer is"), a trailing full stop, and a trailing "for all x" go. Brackets,
    subscripts, percent and plus-minus signs carry meaning and stay.
    """
    if not text.isascii():
        text = _RAISED_RUN.sub(lambda run: "^{" + run[0].translate(_UNRAISE) + "}", text)
        text = _LOWERED_RUN.sub(lambda run: "_{" + run[0].translate(_UNLOWER) + "}", text)
        text = text.translate(_TRANSLATION)
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
    if "``" in text:
        text = text.replace("``", '"').replace("''", '"')
    if "frac" in text:
        text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for _ in range(8):
        before = text
        text = text.strip()
        if text.isdigit():
            return text
        text = _strip_ends(_strip_delimiters(text))
        if text == before:
            break
    return text


def _strip_ends(text: str) -> str:
    if "\\" in text:
        text = _TRAILING_SPACE.sub("", _LEADING_SPACE.sub("", text))
    while text and text[-1] in ".,;:" and not text.endswith((r"\,", r"\;", r"\:", "..")):
        text = text[:-1].rstrip()
    if text.startswith("="):
        text = text.lstrip("= ")
    if text[:1].isalpha() or text.startswith(("\\text", "\\approx")):
        text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    if "for" in text:
        text = _FOR_ALL.sub("", text)
    return text


_ENCLOSING = (
    *((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")),
    *(("`", "`"), ("`", "'"), ('"', '"'), ("'", "'")),
)


def _strip_delimiters(text: str) -> str:
    for opening, closing in _ENCLOSING:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner:
                return inner
    if "$" in text:
        count = len(_UNESCAPED_DOLLAR.findall(text))
        if count and count % 2 == 0:
            return _UNESCAPED_DOLLAR.sub(" ", text)
    if text.startswith(BOX_COMMANDS):
        boxes = balanced_boxes(text)
        if 0 in boxes and boxes[0][1] == len(text) - 1:
            return inside(text, 0, boxes)
    return text
