"""Families of the miniature that leave one thing open, which only the result decides.

    Open (two readings, five phrasings) --Draw--> Draft (phrasings, steps, answer, misreading)

    Anna has 6 boxes with 9 cups in each. 14 cups are added or taken away. The result is no multiple
    of 4. How many cups are there now?

Which operation, which order or which quantity is meant cannot be read off the question: both
readings have to be calculated to see which result is a multiple and which is not, and exactly one
fits. A policy that writes its program before anything has run can only guess; the program prints
its check beside the result, so whoever reads question and output together sees which guess was
right. That is the gap between proposing and judging a solution that a search with a process
preference model lives on. Training more does not close it.

Of two readings either is right as often, and a multiple is asked for as often as none: neither the
form of a solution nor its output says without the question that it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd, lcm

from rollout.problem import Level
from rollout.problems.miniature_draft import Draft, Draw, Family, Misreading


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """One draw of a family, before it is known which reading is meant."""

    told: tuple[str, str, str, str, str]
    """Five phrasings of what happens."""
    asked: str
    steps: tuple[tuple[str, str], ...]
    """(thought, code) of the steps that both readings share."""
    readings: tuple[tuple[str, int], tuple[str, int]]
    """Expression and value of each."""


def _signed(draw: Draw) -> Open:
    name, x = draw.name(), draw.objects()
    a, b = draw.number(3, 9), draw.number(3, 9)
    total, c = a * b, draw.number(2, 8)
    return Open(
        told=(
            f"{name} has {a} boxes with {b} {x} in each. {c} {x} are added or taken away.",
            f"There are {b} {x} in each of {a} bags of {name}, then {c} more or {c} fewer.",
            f"{c} {x} come or go after {name} has filled {a} baskets with {b} each.",
            f"With {b} {x} in every one of {a} crates, {name} wins or loses {c}.",
            f"Up or down by {c} goes the number of {x} that {name} keeps in {a} packs of {b}.",
        ),
        asked=f"How many {x} are there now?",
        steps=((f"All the {x}", f"total = {a} * {b}"),),
        readings=((f"total + {c}", total + c), (f"total - {c}", total - c)),
    )


def _either(draw: Draw) -> Open:
    first, second = draw.two_names()
    x = draw.objects()
    a, b = draw.two_numbers(2, 9)
    c, k = draw.number(2, 9), draw.number(2, 9)
    return Open(
        told=(
            f"{first} has {a} {x} and gets {c} more, {second} has {b}. One of them then gets {k} "
            f"times as many.",
            f"{second} owns {b} {x}, {first} {a} and {c} new ones. Either number grows to {k} "
            f"times as much.",
            f"After {c} {x} were given to {first}, who had {a}, and with {b} for {second}, one "
            f"number is multiplied by {k}.",
            f"Multiply by {k} what {first} or {second} has: {b} {x} belong to {second}, to {first} "
            f"{a} and then {c} more.",
            f"{k} times as many become the {x} of one of two: {first} with {a} plus {c}, {second} "
            f"with {b}.",
        ),
        asked="How many do both have together?",
        steps=((f"The {x} of {first}", f"more = {a} + {c}"),),
        readings=(
            (f"more * {k} + {b}", (a + c) * k + b),
            (f"more + {b} * {k}", a + c + b * k),
        ),
    )


def _order(draw: Draw) -> Open:
    a, b = draw.number(2, 9), draw.number(2, 9)
    c, k = draw.number(2, 9), draw.number(2, 9)
    return Open(
        told=(
            f"To the sum of {a} and {b} two things are done in some order: {c} is added and it is "
            f"multiplied by {k}.",
            f"Multiply by {k} and add {c}, in one order or the other, starting from {a} plus {b}.",
            f"{a} and {b} are summed. What follows is a factor of {k} and an increase of {c}, one "
            f"of them first.",
            f"An increase of {c} before or after a factor of {k} changes the sum of {b} and {a}.",
            f"Start with {b} more than {a}. Then apply, whichever is first, times {k} and plus "
            f"{c}.",
        ),
        asked="What number comes out?",
        steps=((f"The sum of {a} and {b}", f"start = {a} + {b}"),),
        readings=(
            (f"(start + {c}) * {k}", (a + b + c) * k),
            (f"start * {k} + {c}", (a + b) * k + c),
        ),
    )


def _part(draw: Draw) -> Open:
    name, x = draw.name(), draw.objects()
    p = draw.number(2, 4)
    q = p + draw.number(1, 2)
    n = draw.number(1, 3)
    b = lcm(p, q)
    a, c = n * b, draw.number(2, 9)
    return Open(
        told=(
            f"{name} has {c} shelves with {a} {x} each. One part in {p} or one part in {q} of all "
            f"is sold.",
            f"Of {a} {x} on each of {c} tables, {name} gives away one in {p} or one in {q}.",
            f"One in {p} or else one in {q} breaks when {name} carries {c} trays of {a} {x}.",
            f"From {c} rows with {a} {x}, every {p}th or every {q}th is removed by {name}.",
            f"Either one of each {p} or one of each {q} is lost to {name}, who kept {x} in {c} "
            f"piles of {a}.",
        ),
        asked=f"How many {x} are left?",
        steps=((f"All the {x}", f"total = {c} * {a}"),),
        readings=(
            (f"total - total // {p}", a * c - a * c // p),
            (f"total - total // {q}", a * c - a * c // q),
        ),
    )


def _common(draw: Draw) -> Open:
    a, b = draw.two_numbers(2, 9)
    c, k = draw.number(2, 9), draw.number(2, 9)
    return Open(
        told=(
            f"Take the greatest common divisor or the least common multiple of {a} and {b}. Add "
            f"{c} times {k}.",
            f"{c} times {k} is added to the least common multiple or to the greatest common "
            f"divisor of {a} and {b}.",
            f"The product of {c} and {k} is put to what {a} and {b} have in common: the largest "
            f"divisor or the smallest multiple.",
            f"For {a} and {b} find the smallest shared multiple or the largest shared divisor, "
            f"and {c} times {k} on top.",
            f"With {c} times {k} as an extra, give lcm or gcd of {b} and {a}.",
        ),
        asked="What is the sum?",
        steps=(
            ("The product", f"extra = {c} * {k}"),
            ("What is needed", "from math import gcd, lcm"),
        ),
        readings=(
            (f"gcd({a}, {b}) + extra", gcd(a, b) + c * k),
            (f"lcm({a}, {b}) + extra", lcm(a, b) + c * k),
        ),
    )


def _powers(draw: Draw) -> Open:
    a, b = draw.number(2, 9), draw.number(2, 9)
    c, n = draw.number(2, 9), draw.number(11, 19)
    base = a + b
    return Open(
        told=(
            f"Raise the sum of {a} and {b} to the power 2 or 3 and add {c}. Take the remainder "
            f"modulo {n}.",
            f"The remainder modulo {n} is taken of {c} plus the second or third power of the sum "
            f"of {a} and {b}.",
            f"{a} plus {b} is squared or cubed, then {c} is added, and all is reduced modulo {n}.",
            f"Modulo {n}, add {c} to the square or the cube of {b} plus {a}.",
            f"Reduce by {n} what {c} and a power of {b} and {a} together give; the exponent is 2 "
            f"or 3.",
        ),
        asked="What remains?",
        steps=(("The sum", f"base = {a} + {b}"),),
        readings=(
            (f"(base**2 + {c}) % {n}", (base**2 + c) % n),
            (f"(base**3 + {c}) % {n}", (base**3 + c) % n),
        ),
    )


def _decided(open_: Callable[[Draw], Open], draw: Draw) -> Draft:
    """Draw until exactly one reading is a multiple, and the meant one is as was drawn."""
    meant, multiple = draw.number(0, 1), bool(draw.number(0, 1))
    while True:
        drawn, m = open_(draw), draw.number(3, 7)
        values = [value for _, value in drawn.readings]
        if [value % m == 0 for value in values] == [(i == meant) == multiple for i in (0, 1)]:
            break

    def steps(reading: int) -> tuple[tuple[str, str], ...]:
        code = f"result = {drawn.readings[reading][0]}\nprint(result, result % {m} == 0)"
        return (*drawn.steps, ("One of two, with a check", code))

    clue = f"The result is {'a' if multiple else 'no'} multiple of {m}."
    one, two, three, four, five = (f"{told} {clue} {drawn.asked}" for told in drawn.told)
    return Draft(
        phrasings=(one, two, three, four, five),
        steps=steps(meant),
        answer=values[meant],
        check=multiple,
        misreadings=(
            Misreading(steps=steps(1 - meant), answer=values[1 - meant], check=not multiple),
        ),
    )


def _family(level: Level, open_: Callable[[Draw], Open]) -> Family:
    return Family(level=level, draft=lambda draw: _decided(open_, draw), weight=4)


FAMILIES: Mapping[str, Family] = {
    open_.__name__.removeprefix("_"): _family(level, open_)
    for level, both in (
        (Level.GSM, (_signed, _either)),
        (Level.MATH, (_order, _part)),
        (Level.OLYMPIAD, (_common, _powers)),
    )
    for open_ in both
}
"""Every family by the name of its function, in level order."""
