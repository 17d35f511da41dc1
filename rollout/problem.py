"""The `Problem` record: what a search starts from, and what its answers are graded against."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """Difficulty class of a problem, as in the paper's Table 2."""

    GSM = "gsm"
    MATH = "math"
    OLYMPIAD = "olympiad"


class DecontaminationRule(StrEnum):
    """Which training problems that meet a benchmark are taken out."""

    ANY = "any"
    """Every one."""
    SAME_ANSWER = "same-answer"
    """Only those with the same text, or with the benchmark's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One math problem with a final answer that can be checked."""

    id: str
    source: str
    level: Level
    text: str
    answer: str = ""
    """The accepted final answer; "" where it is unknown (a question to be solved)."""
    answers_alt: tuple[str, ...] = ()
    """Further accepted answers; a candidate equal to any of them is correct."""
    rewording_of: str = ""
    """Id of the problem this is a variation of, whether that is at hand or not; "" for none."""

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            if not getattr(self, name).strip():
                raise ValueError(f"Problem.{name} is empty (id={self.id!r})")

    @property
    def original(self) -> str:
        """Id of the problem it varies, else its own: what all variations have in common."""
        return self.rewording_of or self.id

    @property
    def golds(self) -> tuple[str, ...]:
        """Every accepted answer, the published one first."""
        return (self.answer, *self.answers_alt) if self.answer else ()
