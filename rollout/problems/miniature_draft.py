"""What the families of the miniature share: seeded draws, and the drafts made of them.

Draw (seeded names, nouns, numbers) --family--> Draft (five phrasings, steps, answer)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from rollout.problem import Level

NUM_PARAPHRASES = 5

T = TypeVar("T")

_NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack",
    "Kate", "Leo", "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
_OBJECTS = (
    "apples", "books", "cards", "coins", "cups", "eggs", "flowers", "hats",
    "marbles", "pears", "pencils", "plates", "shells", "stamps", "stickers", "toys",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Misreading:
    """What is written by who takes what is open in a problem the wrong way."""

    steps: tuple[tuple[str, str], ...]
    answer: int
    check: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One draw of a family, before a phrasing is chosen."""

    phrasings: tuple[str, str, str, str, str]
    steps: tuple[tuple[str, str], ...]
    """(thought, code) of each; the last one assigns the answer, or prints it with its check."""
    answer: int | Fraction
    check: bool | None = None
    """What the last step prints beside the answer; None: a printing step follows."""
    misreadings: tuple[Misreading, ...] = ()
    """Each with another answer; of families that leave something open."""


class Draw:
    """The random choices of one draft."""

    def __init__(self, rng: random.Random, *, demonstration: bool) -> None:
        self._rng = rng
        self.demonstration = demonstration

    def number(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return self._rng.randint(low, high)

    def name(self) -> str:
        return self._rng.choice(_NAMES)

    def two_names(self) -> tuple[str, str]:
        first, second = self._rng.sample(_NAMES, 2)
        return first, second

    def objects(self) -> str:
        return self._rng.choice(_OBJECTS)

    def two_objects(self) -> tuple[str, str]:
        first, second = self._rng.sample(_OBJECTS, 2)
        return first, second

    def choice(self, values: Sequence[T]) -> T:
        return self._rng.choice(values)

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """`count` different ones in random order."""
        return self._rng.sample(values, count)

    def two_numbers(self, low: int, high: int) -> tuple[int, int]:
        """Two different numbers in random order."""
        first, second = self._rng.sample(range(low, high + 1), 2)
        return first, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of problem."""

    level: Level
    draft: Callable[[Draw], Draft]
    weight: int = 3
    """Its share of its level's problems, over the sum of the level's weights."""
