"""The world of structure: problems whose mistakes are a phrase taken for another.

    Story (persons, changes, order, ...) --Draw--> Draft (five phrasings, steps, misreadings)

Every problem tells how a number of things changes. What has to be calculated is decided by cues,
each with two meanings: does the number rise or fall (`direction`), by an amount or by a factor
(`measure`), whose number is it (`whose`), what came first (`order`), is the number at the start
meant or the one there is by then (`moment`). Names, nouns, ranges of numbers and the text around a
cue are the same for all stories and meanings, and so is the program but for one sign or letter:
nothing but the phrase tells. All numbers are written down once, in the order of the text, by the
first step; later steps name them by letter, so a wrong structure is not a wrong number.

A cue has a few phrases that demonstrations use and many that they never show. Phrasings 0 and 1 of
a problem hold known phrases only; 2, 3 and 4 hold one, two and three unknown ones.

Of every problem each misreading of one cue makes sense as well: positive whole numbers, divisions
without a rest, and another answer. So neither the form of a solution nor its numbers say that it is
wrong, and no misreading is right by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout.problem import Level
from rollout.problems.miniature_draft import NUM_PARAPHRASES, Draft, Draw, Family, Misreading

LARGEST = 999
"""No number of a solution or a misreading is larger."""

_DRAWS_OF_NUMBERS = 200
"""After so many draws without sense the cues are drawn again."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """How one meaning of a cue is said."""

    known: tuple[str, ...]
    rare: tuple[str, ...]
    """Absent from the demonstrations."""


def _phrases(known: str, rare: str, form: str = "{}") -> Phrases:
    """Of words with commas between them, each put into `form`."""
    first, second = (
        tuple(form.format(word.strip()) for word in words.split(",")) for words in (known, rare)
    )
    return Phrases(first, second)


PHRASES: Mapping[str, tuple[Phrases, Phrases]] = {
    "direction": (
        _phrases(
            "rose, grew",
            "climbed, swelled, expanded, soared, mounted, surged, jumped, advanced, inflated, "
            "widened, escalated, ballooned, leapt, bloomed, flourished, thickened, spiked, "
            "sprouted, accrued, boomed, strengthened, broadened, ascended, thrived",
        ),
        _phrases(
            "fell, shrank",
            "dropped, sank, contracted, dwindled, slumped, waned, plunged, receded, deflated, "
            "narrowed, declined, collapsed, tumbled, withered, eroded, thinned, dipped, "
            "faded, crumbled, melted, weakened, shriveled, descended, subsided",
        ),
    ),
    "measure": (
        _phrases(
            "sum, count",
            "margin, batch, lot, heap, stack, step, bunch, supply, group, load, bundle, pile, "
            "crop, portion, quantity, block",
            "a {} of",
        ),
        _phrases(
            "factor, ratio",
            "multiple, scale, rate, quotient, proportion, coefficient, fold, relation, power, "
            "gear, multiplier, degree, scope, grade, leverage, magnitude",
            "a {} of",
        ),
    ),
    "whose": (
        _phrases(
            "former, first child",
            "foremost one, opening name, leading one, primary child, initial one, upper name, "
            "front one, elder, head name, senior, lead player, top name",
            "of the {}",
        ),
        _phrases(
            "latter, second child",
            "hindmost one, closing name, trailing one, other child, final one, lower name, "
            "back one, younger, tail name, junior, rear player, bottom name",
            "of the {}",
        ),
    ),
    "order": (
        _phrases(
            "then, after that",
            "next, subsequently, thereafter, later, afterwards, in turn, following this, as a "
            "result, in consequence, in succession, as a sequel, in its wake",
        ),
        _phrases(
            "before that, ahead of that",
            "previously, beforehand, formerly, earlier, prior to it, in advance, preceding "
            "this, as a prelude, up front, foregoing it, in preparation, sooner than that",
        ),
    ),
    "moment": (
        _phrases(
            "at the start, in the beginning",
            "originally, initially, at first, at the outset, at dawn, long ago, at the "
            "origin, at birth, at the opening, in the past, on day one, at sunrise",
        ),
        _phrases(
            "at the end, by now",
            "finally, eventually, at last, at the close, at dusk, recently, ultimately, "
            "lately, at the finish, in the present, on the last day, at sunset",
        ),
    ),
}
"""Of each cue its two meanings."""

_ORDINALS = ("first", "second", "third", "fourth")

_Reading = tuple[tuple[tuple[str, str], ...], int]
"""Steps and answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What a family tells."""

    changes: int
    two_persons: bool = False
    """Which one's number changes is a cue."""
    reordered: bool = False
    """Which of the first two changes came first is a cue."""
    more: bool = False
    """In the end as many come as there were at some moment, which is a cue."""

    @property
    def cues(self) -> tuple[str, ...]:
        """The names of its cues, in the order of the text."""
        found = ["whose"] if self.two_persons else []
        found += ["direction", "measure"]
        found += ["order"] if self.reordered else []
        found += ["direction", "measure"] * (self.changes - 1)
        return tuple(found + (["moment"] if self.more else []))

    def draft(self, draw: Draw) -> Draft:
        """Draw meanings and numbers until every reading makes sense."""
        cues = self.cues
        while True:
            meanings = [draw.number(0, 1) for _ in cues]
            if self.reordered:
                # Of two sums, or two products, the order would not matter.
                measures = [place for place, cue in enumerate(cues) if cue == "measure"]
                meanings[measures[1]] = 1 - meanings[measures[0]]
            for _ in range(_DRAWS_OF_NUMBERS):
                numbers = [6 * draw.number(2, 16) for _ in range(1 + self.two_persons)]
                numbers += [draw.number(2, 6) for _ in range(self.changes)]
                readings = self._readings(meanings, numbers)
                if readings is not None:
                    (steps, answer), misreadings = readings[0], readings[1:]
                    return Draft(
                        phrasings=self._phrasings(draw, meanings, numbers),
                        steps=steps,
                        answer=answer,
                        misreadings=tuple(
                            Misreading(cue=cue, steps=wrong, answer=value)
                            for cue, (wrong, value) in zip(cues, misreadings, strict=True)
                        ),
                    )

    def _readings(self, meanings: Sequence[int], numbers: Sequence[int]) -> list[_Reading] | None:
        """As meant, then with each cue misread; None if one makes no sense."""
        found: list[_Reading] = []
        for misread in range(-1, len(meanings)):
            taken = [m ^ (place == misread) for place, m in enumerate(meanings)]
            reading = self._solve(taken, numbers)
            if reading is None or (found and reading[1] == found[0][1]):
                return None
            found.append(reading)
        return found

    def _solve(self, meanings: Sequence[int], numbers: Sequence[int]) -> _Reading | None:
        by_cue: dict[str, list[int]] = {cue: [] for cue in PHRASES}
        for cue, meaning in zip(self.cues, meanings, strict=True):
            by_cue[cue].append(meaning)
        letters = "abcdefg"[: len(numbers)]
        start = by_cue["whose"][0] if self.two_persons else 0
        changes = list(
            zip(by_cue["direction"], by_cue["measure"], range(self.changes), strict=True)
        )
        if self.reordered and by_cue["order"][0]:
            changes[:2] = changes[1::-1]
        steps = [("The numbers", f"{', '.join(letters)} = {', '.join(map(str, numbers))}")]
        before, value = letters[start], numbers[start]
        values = [value]

        def step(thought: str, sign: str, operand: str) -> None:
            nonlocal before
            name = _ORDINALS[len(steps) - 1]
            steps.append((thought, f"{name} = {before} {sign} {operand}"))
            before = name

        for direction, measure, told in changes:
            place = 1 + self.two_persons + told
            number = numbers[place]
            if direction and measure and value % number:
                return None
            sign, value = (
                (("+", value + number), ("*", value * number)),
                (("-", value - number), ("//", value // number)),
            )[direction][measure]
            step("A change", sign, letters[place])
            values.append(value)
        if self.more:
            now = by_cue["moment"][0]
            step("As many more", "+", before if now else letters[start])
            value += values[-1] if now else values[0]
            values.append(value)
        return (tuple(steps), value) if all(0 < v <= LARGEST for v in values) else None

    def _phrasings(
        self, draw: Draw, meanings: Sequence[int], numbers: Sequence[int]
    ) -> tuple[str, str, str, str, str]:
        phrases = [PHRASES[cue][meaning] for cue, meaning in zip(self.cues, meanings, strict=True)]
        known = [draw.choice(phrase.known) for phrase in phrases]
        rare = [draw.choice(phrase.rare) for phrase in phrases]
        order = draw.sample(range(len(phrases)), len(phrases))
        names, noun = draw.two_names(), draw.objects()
        first, second, third, fourth, fifth = (
            self._tell(
                [
                    rare[place] if place in order[: max(0, phrasing - 1)] else known[place]
                    for place in range(len(phrases))
                ],
                numbers,
                names,
                noun,
                phrasing % 2,
            )
            for phrasing in range(NUM_PARAPHRASES)
        )
        return first, second, third, fourth, fifth

    def _tell(
        self,
        phrases: Sequence[str],
        numbers: Sequence[int],
        names: tuple[str, str],
        noun: str,
        opening: int,
    ) -> str:
        said = iter(phrases)
        changed = iter(numbers[1 + self.two_persons :])

        def change() -> str:
            return f"{next(said)} by {next(said)} {next(changed)}"

        if self.two_persons:
            text = (
                f"{names[0]} had {numbers[0]} {noun} and {names[1]} had {numbers[1]}. ",
                f"The {noun} of {names[0]} were {numbers[0]}, those of {names[1]} {numbers[1]}. ",
            )[opening]
            text += f"The number {next(said)} {change()}"
        else:
            text = (f"{names[0]} had {numbers[0]} {noun}. ", f"{numbers[0]} {noun} were there. ")[
                opening
            ]
            text += f"The number {change()}"
        for index in range(1, self.changes):
            if index == 1 and self.reordered:
                text += f"; {next(said)} it {change()}"
            else:
                text += (". After both it " if self.reordered else ", and it ") + change()
        text += ". "
        if self.more:
            text += f"As many as there were {next(said)} came in addition. "
        return text + "How many is that?"


STORIES: Mapping[str, tuple[Level, Story]] = {
    prefix + name: (
        level,
        Story(
            changes=changes,
            two_persons=bool(prefix),
            reordered=bool(reordered),
            more=bool(more),
        ),
    )
    for level, stories in (
        (Level.GSM, {"once": (1, 0, 0), "twice": (2, 0, 0), "more": (1, 0, 1)}),
        (Level.MATH, {"thrice": (3, 0, 0), "order": (2, 1, 0), "twice_more": (2, 0, 1)}),
        (
            Level.OLYMPIAD,
            {"order_more": (2, 1, 1), "order_thrice": (3, 1, 0), "thrice_more": (3, 0, 1)},
        ),
    )
    for prefix in ("", "whose_")
    for name, (changes, reordered, more) in stories.items()
}

FAMILIES: Mapping[str, Family] = {
    name: Family(level=level, draft=story.draft) for name, (level, story) in STORIES.items()
}
"""Every story by name, in level order."""
