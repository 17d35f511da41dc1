"""Families of the miniature whose question says all: 12 kinds of problems, four per level.

    Draw (seeded names, nouns, numbers) --family--> Draft (five phrasings, steps, answer)

The five phrasings of a family differ in the order of quantities, voice and place of the question,
so that the position of a number alone does not tell what it means. The answer is worked out beside
the written steps, not by running them.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import comb, gcd, lcm

from rollout.problem import Level
from rollout.problems.miniature_draft import Draft, Draw, Family

# --- gsm: two or three short arithmetic steps -------------------------------------------------


def _buy(draw: Draw) -> Draft:
    name = draw.name()
    x, y = draw.two_objects()
    a, b = draw.number(2, 20), draw.number(2, 20)
    p, q = draw.number(2, 30), draw.number(2, 30)
    return Draft(
        phrasings=(
            f"{name} buys {a} {x} for {p} dollars each and {b} {y} for {q} dollars each. "
            f"How many dollars does {name} spend?",
            f"How much does {name} pay for {a} {x} and {b} {y} if the {x} cost {p} dollars each "
            f"and the {y} cost {q} dollars each?",
            f"At {p} dollars each, {a} {x} were bought by {name}. At {q} dollars each, {b} {y} "
            f"were bought too. What was the total cost in dollars?",
            f"One of the {x} costs {p} dollars and one of the {y} costs {q} dollars. {name} "
            f"takes {b} {y} and {a} {x}. What is the bill in dollars?",
            f"Find the total price when {q} dollars is paid for each of {b} {y} and {p} dollars "
            f"for each of {a} {x} by {name}.",
        ),
        steps=(
            (f"Cost of the {x}", f"first = {a} * {p}"),
            (f"Cost of the {y}", f"second = {b} * {q}"),
            (f"Total cost for {name}", "total = first + second"),
        ),
        answer=a * p + b * q,
    )


def _gain_lose(draw: Draw) -> Draft:
    name, x = draw.name(), draw.objects()
    a, b = draw.number(20, 99), draw.number(2, 60)
    c = draw.number(2, min(99, a + b - 1))
    return Draft(
        phrasings=(
            f"{name} has {a} {x}, gets {b} more and then loses {c}. How many {x} does {name} "
            f"have now?",
            f"There are {a} {x} in a box. {name} puts in {b} more and takes out {c}. How many "
            f"{x} are left in the box?",
            f"How many {x} remain if {name} gave away {c} after adding {b} to the {a} already "
            f"there?",
            f"After {b} {x} were given to {name}, who had {a} before, {c} were stolen. What "
            f"number of {x} is left?",
            f"{name} lost {c} {x} today. Before that, {b} were found, and at the start of the "
            f"day there were {a}. Count the {x} now.",
        ),
        steps=(
            (f"The {x} after the gain", f"count = {a} + {b}"),
            (f"The {x} after the loss", f"left = count - {c}"),
        ),
        answer=a + b - c,
    )


def _share(draw: Draw) -> Draft:
    name, x = draw.name(), draw.objects()
    a, c = draw.number(2, 20), draw.number(2, 12)
    b = c * draw.number(1, 90 // c)
    return Draft(
        phrasings=(
            f"{name} has {a} boxes with {b} {x} in each and shares all of them equally among "
            f"{c} friends. How many {x} does each friend get?",
            f"{c} friends share the {x} of {name} equally. There are {a} bags with {b} {x} each. "
            f"How many {x} per friend?",
            f"Equal parts for {c} people are made by {name} from {a} baskets, each holding {b} "
            f"{x}. How large is one part?",
            f"If {b} {x} are in each of {a} packs, how many {x} does each of {c} children "
            f"receive from {name}?",
            f"What is the share of one of {c} teams when {name} divides {b} {x} from every one "
            f"of {a} crates?",
        ),
        steps=(
            (f"All the {x}", f"total = {a} * {b}"),
            (f"The {x} of each one", f"each = total // {c}"),
        ),
        answer=a * b // c,
    )


def _times(draw: Draw) -> Draft:
    first, second = draw.two_names()
    x = draw.objects()
    a, k = draw.number(3, 60), draw.number(2, 12)
    return Draft(
        phrasings=(
            f"{first} has {a} {x} and {second} has {k} times as many. How many {x} do they have "
            f"together?",
            f"{second} owns {k} times as many {x} as {first}, who owns {a}. How many {x} are "
            f"there in total?",
            f"How many {x} do {first} and {second} have in all if {second} has {k} times the {a} "
            f"of {first}?",
            f"{a} {x} belong to {first}. The number that belongs to {second} is {k} times as "
            f"large. Find the sum.",
            f"Multiply what {first} has by {k} to get what {second} has. With {a} {x} for "
            f"{first}, what do both have?",
        ),
        steps=(
            (f"The {x} of {second}", f"more = {a} * {k}"),
            (f"The {x} of both", f"total = {a} + more"),
        ),
        answer=a + a * k,
    )


# --- math: three steps, exact fractions, an equation -------------------------------------------


def _discount(draw: Draw) -> Draft:
    name, x = draw.name(), draw.objects()
    p, d, s = draw.number(10, 199), draw.number(5, 60), draw.number(2, 30)
    return Draft(
        phrasings=(
            f"A set of {x} costs {p} dollars. {name} gets {d} percent off and pays {s} dollars "
            f"for shipping. What is the total price in dollars?",
            f"{name} orders {x} for {p} dollars with a discount of {d} percent. Shipping costs "
            f"{s} dollars. How many dollars does {name} pay?",
            f"With {s} dollars for shipping and {d} percent taken off the price of {p} dollars, "
            f"what do the {x} cost {name}?",
            f"What does {name} pay if shipping is {s} dollars and the {x}, usually {p} dollars, "
            f"are reduced by {d} percent?",
            f"The shop takes {d} percent off for {name}. Without that the {x} are {p} dollars. "
            f"Add {s} dollars for shipping and give the sum.",
        ),
        steps=(
            (
                "The part of the price that is paid",
                f"from fractions import Fraction\npart = Fraction(100 - {d}, 100)",
            ),
            (f"The price of the {x}", f"price = {p} * part"),
            ("Add the shipping", f"total = price + {s}"),
        ),
        answer=p * Fraction(100 - d, 100) + s,
    )


def _gcd_lcm(draw: Draw) -> Draft:
    a, b = draw.two_numbers(4, 75)
    return Draft(
        phrasings=(
            f"What is the least common multiple of {a} and {b} minus their greatest common "
            f"divisor?",
            f"Find the difference between the least common multiple and the greatest common "
            f"divisor of {a} and {b}.",
            f"Subtract the greatest common divisor of {a} and {b} from their least common "
            f"multiple.",
            f"For the numbers {a} and {b}, by how much is the least common multiple larger than "
            f"the greatest common divisor?",
            f"The greatest common divisor of {a} and {b} is taken away from the smallest number "
            f"that both divide. What is left?",
        ),
        steps=(
            ("The least common multiple", f"from math import gcd, lcm\nmultiple = lcm({a}, {b})"),
            ("The greatest common divisor", f"divisor = gcd({a}, {b})"),
            ("The difference", "difference = multiple - divisor"),
        ),
        answer=lcm(a, b) - gcd(a, b),
    )


def _linear(draw: Draw) -> Draft:
    root, a = draw.number(2, 30), draw.number(2, 12)
    b, d = draw.number(1, 60), draw.number(1, 40)
    c = a * root + b
    return Draft(
        phrasings=(
            f"If {a}x + {b} = {c}, what is x + {d}?",
            f"Find x + {d} when {a}x + {b} = {c}.",
            f"Solve {c} = {a}x + {b} and add {d} to the solution.",
            f"What is {d} more than the number x for which {b} + {a}x equals {c}?",
            f"A number times {a} plus {b} gives {c}. Increase that number by {d}. What is the "
            f"result?",
        ),
        steps=(
            ("The unknown", "from sympy import symbols, solve\nx = symbols('x')"),
            ("Solve the equation", f"root = solve({a} * x + {b} - {c}, x)[0]"),
            (f"Add {d}", f"value = root + {d}"),
        ),
        answer=root + d,
    )


def _average(draw: Draw) -> Draft:
    a, b = draw.number(2, 99), draw.number(2, 99)
    c, d = draw.number(2, 99), draw.number(2, 99)
    return Draft(
        phrasings=(
            f"What is the average of {a}, {b}, {c} and {d}?",
            f"Find the mean of the four numbers {a}, {b}, {c} and {d}.",
            f"The sum of {a}, {b}, {c} and {d} is divided by 4. What is the result?",
            f"Four children are {a}, {b}, {c} and {d} months old. How many months old are they on "
            f"average?",
            f"With {a}, {b}, {c} and {d} points in four games, what is the mean number of points?",
        ),
        steps=(
            ("Add the first two", f"first = {a} + {b}"),
            ("Add the other two", f"total = first + {c} + {d}"),
            (
                "Divide by 4",
                "from fractions import Fraction\nmean = Fraction(total, 4)",
            ),
        ),
        answer=Fraction(a + b + c + d, 4),
    )


# --- olympiad: four or five steps, number theory, counting, nested operations -------------------


def _power(draw: Draw) -> Draft:
    a, c = draw.two_numbers(2, 30)
    b, d = draw.number(3, 60), draw.number(3, 60)
    m = draw.number(5, 60)
    return Draft(
        phrasings=(
            f"What is the remainder when {a}^{b} + {c}^{d} is divided by {m}?",
            f"Find {a}^{b} + {c}^{d} modulo {m}.",
            f"Modulo {m}, what is the sum of {a}^{b} and {c}^{d}?",
            f"Divide by {m} the number {a} to the power {b} plus {c} to the power {d}. What is "
            f"the remainder?",
            f"When the sum of the power of {a} with exponent {b} and the power of {c} with "
            f"exponent {d} is reduced modulo {m}, what remains?",
        ),
        steps=(
            ("The first power", f"first = pow({a}, {b}, {m})"),
            ("The second power", f"second = pow({c}, {d}, {m})"),
            ("The sum", "total = first + second"),
            (f"Remainder modulo {m}", f"rest = total % {m}"),
        ),
        answer=(pow(a, b, m) + pow(c, d, m)) % m,
    )


def _committee(draw: Draw) -> Draft:
    a, b = draw.number(5, 12), draw.number(5, 12)
    i, j = draw.number(2, 4), draw.number(2, 4)
    return Draft(
        phrasings=(
            f"A club has {a} men and {b} women. How many ways are there to choose a committee of "
            f"{i} men and {j} women and one of its members as leader?",
            f"From {a} men and {b} women, a team of {i} men and {j} women with a leader is "
            f"chosen. In how many ways can this be done?",
            f"In how many ways can {i} of {a} men and {j} of {b} women form a group in which one "
            f"person leads?",
            f"How many committees with {j} women and {i} men and a leader can be formed in a town "
            f"of {b} women and {a} men?",
            f"A leader stands before a group of {j} women, out of {b}, and {i} men, out of {a}, "
            f"being one of the group. Count the possible choices.",
        ),
        steps=(
            ("Ways to choose the men", f"from math import comb\nmen = comb({a}, {i})"),
            ("Ways to choose the women", f"women = comb({b}, {j})"),
            ("Ways to choose the leader", f"leader = {i} + {j}"),
            ("All ways", "total = men * women * leader"),
        ),
        answer=comb(a, i) * comb(b, j) * (i + j),
    )


def _vieta(draw: Draw) -> Draft:
    first, second = draw.two_numbers(1, 30)
    s, p = first + second, first * second
    return Draft(
        phrasings=(
            f"What is the sum of the squares of the roots of x^2 - {s}x + {p} = 0?",
            f"Find the sum of the squares of the solutions of x^2 - {s}x + {p} = 0.",
            f"The roots of x^2 + {p} = {s}x are squared and added. What is the result?",
            f"Square both numbers x for which x^2 + {p} - {s}x is zero and give the sum.",
            f"Two numbers have product {p} and sum {s}. Add their squares.",
        ),
        steps=(
            ("The unknown", "from sympy import symbols, solve\nx = symbols('x')"),
            ("Find the roots", f"roots = solve(x**2 - {s} * x + {p}, x)"),
            ("Square the roots", "squares = [r**2 for r in roots]"),
            ("Add the squares", "total = sum(squares)"),
        ),
        answer=first**2 + second**2,
    )


def _compose(draw: Draw) -> Draft:
    """Inner (4) x middle (3) x outer (2); demonstrations show the twelve of even parity."""
    while True:
        inner, middle, outer = draw.number(0, 3), draw.number(0, 2), draw.number(0, 1)
        if not draw.demonstration or (inner + middle + outer) % 2 == 0:
            break
    a, b = draw.number(3, 15), draw.number(3, 15)
    if inner == 2:
        a, b = draw.number(4, 12), draw.number(2, 4)
    c, d, m = draw.number(2, 60), draw.number(2, 20), draw.number(5, 60)

    inner_text, inner_step, value = (
        (
            f"the least common multiple of {a} and {b}",
            ("The least common multiple", f"from math import lcm\ninner = lcm({a}, {b})"),
            lcm(a, b),
        ),
        (f"the product of {a} and {b}", ("The product", f"inner = {a} * {b}"), a * b),
        (
            f"the number of ways to choose {b} of {a} things",
            ("The number of ways", f"from math import comb\ninner = comb({a}, {b})"),
            comb(a, b),
        ),
        (
            f"the sum of the squares of {a} and {b}",
            ("The sum of the squares", f"inner = {a}**2 + {b}**2"),
            a**2 + b**2,
        ),
    )[inner]

    middle_text, middle_step, value = (
        (
            "the digit sum of {}",
            ("The digit sum", "middle = sum(int(i) for i in str(inner))"),
            sum(int(digit) for digit in str(value)),
        ),
        (
            "the number of divisors of {}",
            (
                "The number of divisors",
                "from sympy import divisors\nmiddle = len(divisors(inner))",
            ),
            sum(value % divisor == 0 for divisor in range(1, value + 1)),
        ),
        (f"the sum of {c} and {{}}", (f"Add {c}", f"middle = inner + {c}"), value + c),
    )[middle]

    outer_text, outer_steps, value = (
        (
            f"the remainder of {d} times {{}} modulo {m}",
            (
                (f"Multiply by {d}", f"outer = middle * {d}"),
                (f"Remainder modulo {m}", f"result = outer % {m}"),
            ),
            value * d % m,
        ),
        (
            f"the square of {{}} minus {d}",
            (
                ("The square", "outer = middle**2"),
                (f"Subtract {d}", f"result = outer - {d}"),
            ),
            value**2 - d,
        ),
    )[outer]

    return Draft(
        phrasings=(
            f"Let A be {inner_text} and let B be {middle_text.format('A')}. What is "
            f"{outer_text.format('B')}?",
            f"What is {outer_text.format(middle_text.format(inner_text))}?",
            f"What is {outer_text.format('B')}, where B is {middle_text.format('A')} and A is "
            f"{inner_text}?",
            f"Take {inner_text}. Then take {middle_text.format('it')}. Find "
            f"{outer_text.format('the last number')}.",
            f"Find {outer_text.format('C')} if C stands for {middle_text.format('D')} and D for "
            f"{inner_text}.",
        ),
        steps=(inner_step, middle_step, *outer_steps),
        answer=value,
    )


FAMILIES: Mapping[str, Family] = {
    draft.__name__.removeprefix("_"): Family(level=level, draft=draft)
    for level, drafts in (
        (Level.GSM, (_buy, _gain_lose, _share, _times)),
        (Level.MATH, (_discount, _gcd_lcm, _linear, _average)),
        (Level.OLYMPIAD, (_power, _committee, _vieta, _compose)),
    )
    for draft in drafts
}
"""Every family by the name of its function, in level order."""
