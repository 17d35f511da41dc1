r"""Is this answer right? `verify_answer` says so with a reason; `answers_match` is its yes or no.

    gate -> same text -> normalise -> choice letter -> parse (both notations) -> equivalence ->
    sympy, out of process

A verdict becomes the reward of a rollout, so grading is treated as untrusted work: nothing here
evaluates text, raises on any input, installs a signal handler, or takes longer than the stated
limits. It works in any thread. The pair is put in one order before it is compared, so swapping gold
and candidate cannot change the verdict.

Verdicts are cached by pair. One that rests on a timeout is not: asking again may find the worker
idle.

What it accepts and refuses is written down in `verifier.equivalence`; `GRADER_VERSION` changes
whenever a verdict may, and is stored with every row so that data can be graded again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from verifier.answer import normalise
from verifier.answer_parser import parse_answer
from verifier.answer_tokens import AnswerTooLarge
from verifier.answer_tree import Node
from verifier.equivalence import compare_readings
from verifier.finding import Finding, Reason, different, equal
from verifier.symbolic import SymbolicWorker, Timeout

GRADER_VERSION = "answers-2"
MAX_CHARACTERS = 2_000
MAX_NESTING = 64
CACHED_PAIRS = 16_384

_CHOICE = re.compile(r"\(?([A-Ja-j])\)?[.):]?|\(?([A-E])\s*[.):](?=\s*\S)(?!.*\bor\b).*", re.DOTALL)
_CHOICES = re.compile(r"\(?[A-H]\)?(?:(?:,|;|and|&)?\(?[A-H]\)?){1,7}")
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|textrm|textit|operatorname|mathsf|mbox|bf|rm)(?![A-Za-z])"
    r"|[{}$\s~*]|\\[,;:! ]"
)
_SAME_TEXT = equal(Reason.EXACT, "text")
_worker = SymbolicWorker()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a candidate equals the gold answer, and how that was found."""

    equal: bool
    reason: Reason
    path: str
    """The rung that decided: gate, text, choice, tree, rational, digits, points, sympy, ..."""
    grader_version: str = GRADER_VERSION


class _NotCached(Exception):
    """Carries a finding past the cache: exceptions are not kept by lru_cache."""


def verify_answer(gold: str | None, candidate: str | None) -> Verdict:
    r"""Compare a candidate answer (the inside of `\boxed{}`, or printed text) with the ground
    truth.

    Never raises. Anything but two non-empty strings is "different". Text over 2,000 characters,
    brackets deeper than 64, numbers over 1,000 digits and values over 10^20000 are refused with the
    reason "limit", unless both sides are the same text.
    """
    if type(gold) is not str or type(candidate) is not str:
        if not isinstance(gold, str) or not isinstance(candidate, str):
            return _verdict(different("gate"))
        gold, candidate = str(gold), str(candidate)
    return _verify_pair(gold, candidate) if gold <= candidate else _verify_pair(candidate, gold)


def answers_match(gold: str | None, candidate: str | None) -> bool:
    """Whether the candidate equals the gold answer; the yes or no of `verify_answer`, and as
    safe."""
    return verify_answer(gold, candidate).equal


def clear_caches() -> None:
    """Forget verdicts and parsed answers, as measurements without a cache need."""
    _cached_verdict.cache_clear()
    _parsed.cache_clear()


def start_symbolic_worker() -> bool:
    """Start the sympy process now instead of at its first question; True when it is ready."""
    return _worker.start()


def stop_symbolic_worker() -> None:
    """End the sympy process; the next question starts a new one."""
    _worker.stop()


def _verify_pair(first: str, second: str) -> Verdict:
    if max(len(first), len(second)) > MAX_CHARACTERS:
        same = first.strip() == second.strip()
        return _verdict(_SAME_TEXT if same else Finding(False, Reason.LIMIT, "gate"))
    try:
        return _cached_verdict(first, second)
    except _NotCached as carried:
        return _verdict(*carried.args)


@lru_cache(maxsize=CACHED_PAIRS)
def _cached_verdict(first: str, second: str) -> Verdict:
    return _verdict(_decide(first, second))


def _verdict(finding: Finding) -> Verdict:
    return Verdict(equal=finding.equal, reason=finding.reason, path=finding.path)


def _decide(first: str, second: str) -> Finding:
    first, second = first.strip(), second.strip()
    if not first or not second:
        return different("gate")
    if first == second:
        return _SAME_TEXT
    if _nesting(first) > MAX_NESTING or _nesting(second) > MAX_NESTING:
        return Finding(False, Reason.LIMIT, "gate")
    first, second = normalise(first), normalise(second)
    if not first or not second:
        return different("gate")
    if first == second:
        return _SAME_TEXT
    if (same_choice := _compare_choices(first, second)) is not None:
        return equal(Reason.EXACT, "choice") if same_choice else different("choice")
    late = False

    def judge(left: Node, right: Node) -> bool | None:
        nonlocal late
        try:
            return _worker.equal(left, right)
        except Timeout:
            late = True
            return None

    try:
        finding = compare_readings(_parsed(first), _parsed(second), judge)
    except AnswerTooLarge:
        return Finding(False, Reason.LIMIT, "size")
    except RecursionError:
        return Finding(False, Reason.LIMIT, "depth")
    if late and not finding.equal:
        raise _NotCached(finding)
    return finding


@lru_cache(maxsize=CACHED_PAIRS)
def _parsed(text: str) -> tuple[Node, ...]:
    return parse_answer(text)


def _nesting(text: str) -> int:
    """How deep brackets of any kind go, escapes ignored."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            if depth > deepest:
                deepest = depth
        elif char in ")]}" and depth:
            depth -= 1
    return deepest


def _compare_choices(first: str, second: str) -> bool | None:
    """Compare multiple-choice letters; None unless both are such letters and one is plainly a
    choice."""
    if len(first) > 200 or len(second) > 200:
        return None
    one, two = _choice_letters(first), _choice_letters(second)
    if one is None or two is None or not (one.isupper() or two.isupper()):
        return None
    return one.upper() == two.upper()


def _choice_letters(text: str) -> str | None:
    if text[0].isdigit() or text[0] == "-":
        return None
    bare = _WRAPPERS.sub("", text)
    if match := _CHOICE.fullmatch(bare if len(bare) < 5 else _WRAPPERS.sub(" ", text).strip()):
        return match[1] or match[2]
    if _CHOICES.fullmatch(bare):
        letters = sorted(char for char in bare if char.isupper())
        return "".join(letters) if len(set(letters)) == len(letters) else None
    return None
