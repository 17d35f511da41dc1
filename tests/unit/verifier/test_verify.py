"""What a school grader accepts and refuses, and what hostile answers may not do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier import GRADER_VERSION, answers_match, verify_answer
from verifier.equivalence import Reason

EQUAL = r"""
2516_8 | 2516_{\text{8}}
413_5 | 413_{\text{five}}
1A3_{16} | 1a3_{16}
\text{(C)} | C
D | D)
D | D. 5
A,C,F | ACF
1 - 12i | 1 - 12*I
\frac{1}{5}+\frac{3}{5}i | (0.2+0.6j)
i | \sqrt{-1}
1,-1,i,-i | \pm 1, \pm i
-\frac12+\frac{\sqrt3}{2}i | (-0.4999999999999998+0.8660254037844387j)
72^\circ | 72°
\cos 58^\circ | \sin 32^\circ
y=2x+3 | 2x - y + 3 = 0
x=9 | 9
f(x)=x+1 | 1 + x
(2,-1) | {x: 2, y: -1}
(2,-1) | y = -1, x = 2
2^{2000} | 4^{1000}
9^{9^9} | 9**9**9
10^{10^{10}} | 100^{5\cdot 10^9}
\binom{2n}{n} | \frac{(2n)!}{(n!)^2}
\left\lfloor \frac{n-1}{2} \right\rfloor | \left\lceil \frac{n}{2} \right\rceil - 1
\frac{5}{13} | Fraction(5, 13)
-2 \le x \le 7 | [-2,7]
x<1 \text{ or } x>3 | (-\infty,1)\cup(3,\infty)
(1,3) | (1 < x) & (x < 3)
(-\infty,3)\cup(3,\infty) | \mathbb{R}\setminus\{3\}
[0,1) | Interval.Ropen(0, 1)
|x|<3 | -3<x<3
b>a>c | c<a<b
\infty | oo
1000000 | 1{,}000{,}000
1,625 | 1625
27,54,108 | 108, 54, 27
\frac23 | 0.6666666666666666
\pi | 3.1415927
0.3 | 0.30000000000000004
-6\frac23 | -\frac{20}{3}
1\frac{12}{13} | 1 12/13
\$1,250 | \$1250.00
\$0.75 | 75 cents
\sqrt{2+\sqrt{3}} | \frac{\sqrt{6}+\sqrt{2}}{2}
\sqrt{5+2\sqrt6}-\sqrt3-\sqrt2 | 0
\sqrt[3]{-8} | -2
60\% | 3/5
33\frac13\% | 1/3
1\pm\sqrt{19} | {1 - sqrt(19), 1 + sqrt(19)}
\pm\sqrt{2}\pm1 | \sqrt2+1,\sqrt2-1,-\sqrt2+1,-\sqrt2-1
3x^2+6x-1 | 3*x**2 + 6*x - 1
0.00001 | 1e-05
0.0014 | 1.4e-3
4.8\times10^8 | 4.8 x 10^8
\begin{pmatrix}1&2\\3&4\end{pmatrix} | Matrix([[1, 2], [3, 4]])
\begin{bmatrix} 1 \\ 2 \end{bmatrix} | (1,2)
69,84 | [69, 84]
\emptyset | \varnothing
\text{NoSolution} | No solution
\text{4:30 p.m.} | 4:30 PM
\sin^2 x | 1-\cos^2 x
\ln x^2 | 2\ln x
\log_4 8 | 1.5
\log 100 | 2
5\cost+63\sint | 5*cos(t) + 63*sin(t)
2 \text{ hours and } 13 \text{ minutes} | 133 minutes
45\text{ units}^2 | 45 square units
60 \text{ mph} | 60 miles per hour
12:1 | 24:2
0.1\overline{6} | \frac16
\sum_{n=1}^{10} n | 55
2e-1 | 2*E - 1
"""

DIFFERENT = r"""
25_6 | 25_7
D | A. 5
D | D or E
A,C,F | A, C
72^\circ | 73°
\cos 58^\circ | \cos 32^\circ
x=9 | y=9
(2,-1) | x=-1, y=2
\frac{1}{2^{99}} | \frac{1}{2^{98}}
\frac{1}{2004!} | \frac{1}{2006!}
\frac{2^{2005}+1}{3\cdot 2^{2006}} | \frac{1}{6}
\frac{1+\sqrt2}{10^{300}} | \frac{1+\sqrt2}{10^{301}}
\sqrt{5+2\sqrt6}-\sqrt3-\sqrt2 | 10^{-30}
-2 \le x \le 7 | [-2,7)
x>2 | x >= 2
t<5 | x<5
123456789012345678 | 123456789012345679
9007199254740993 | 9007199254740992.0
\frac13 | 0.333
\frac13 | 0.33333333
\pi | 3.14159
\pi | 22/7
\sqrt3 | 1.7320509
102.3 | 102.34
\sqrt{10001} | 100
1\frac{12}{13} | 12/13
6\frac23 | 4
|x-3| | |x|-3
\sqrt{x^2} | x
\frac{1}{1-x} | 1-x
(1,2) | (2,1)
(1,2) | \{1,2\}
50 | 0.5
10\% | 0.1\%
1\pm\sqrt{19} | 1+\sqrt{19}
3x^2+6x-1 | 3t^2+6t-1
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
69,84 | 69
3 | [3, 3]
\text{Yes} | No
\log_2 3 | \log_3 2
5\text{ cm} | 5\text{ m}
12\text{ ft}^2 | 12\text{ ft}
3:4 | 4:3
"""

NEVER_FIVE = [
    *("", "   ", "None", "nan", "5 or 6", "5, 6", "maybe 5", "5 maybe", "about 5", "not 5", "~5"),
    *("5 5", "1 2 3 4 5 6", "5/0", "5*", "5^", "5_", "5=6", "\\frac{}{}", "\\", "\x00", "5\x00"),
    *("\ud800", "5!!!!", "10//2", "5 # five", "5 if True else 6", "Error: 5", "(" * 300 + "5"),
    *("9**9**9", "10**10**10", "(((3!)!)!)!", "1e308*10", "1e99999999", "2**(10**9)"),
    *("factorial(10**9)", "nextprime(10**4000)", "sum(range(10**12))", "x**x**x**x"),
    *("1+" * 50_000 + "1", "(" * 100_000, "\\frac{" * 20_000, "5" * 100_000, "-" * 1900 + "5"),
    *("\\sqrt" * 300 + "4", "2^" * 900 + "2", "[" * 60 + "5, 5" + "]" * 60, "|" * 1900),
    *("\\pm " * 40 + "5", "+".join(["\\pm 1"] * 30), "sin(x)*" * 250 + "1", "e^{e^{e^{e^{10}}}}"),
    "\\sum_{n=0}^{300}\\sum_{m=0}^{300}\\sum_{k=0}^{300} k",
    "(sin(x)**2+cos(x)**2)**200 - tan(x)**17/sec(x)**31 + x",
    ",".join(f"sqrt({index})" for index in range(2, 200)),
]


def rows(table: str) -> list[tuple[str, str]]:
    pairs = [line.split(" | ", 1) for line in table.strip().splitlines()]
    return [(left, right) for left, right in pairs]


@pytest.mark.parametrize(("gold", "candidate"), rows(EQUAL))
def test_other_notation_for_the_same_object_is_equal(gold: str, candidate: str) -> None:
    assert verify_answer(gold, candidate).equal
    assert verify_answer(candidate, gold).equal


@pytest.mark.parametrize(("gold", "candidate"), rows(DIFFERENT))
def test_near_misses_are_different_whichever_side_is_gold(gold: str, candidate: str) -> None:
    assert not verify_answer(gold, candidate).equal
    assert not verify_answer(candidate, gold).equal


@pytest.mark.parametrize("candidate", NEVER_FIVE, ids=range(len(NEVER_FIVE)))
def test_hostile_and_hedged_answers_are_never_equal(candidate: str) -> None:
    assert not answers_match("5", candidate)
    assert not answers_match(candidate, "5")


@pytest.mark.parametrize("value", [None, 5, 5.0, b"5", [], object()])
def test_what_is_not_text_is_different_from_everything(value: object) -> None:
    verdict = verify_answer("5", value)  # type: ignore[arg-type]
    assert (verdict.equal, verdict.reason, verdict.path) == (False, Reason.DIFFERENT, "gate")
    assert not answers_match(value, value)  # type: ignore[arg-type]


def test_no_candidate_is_executed(tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for code in (
            "__import__('pathlib').Path('canary').touch()",
            "open('canary', 'w')",
            "\\pi + open('canary', 'w')",
            "Matrix([[open('canary', 'w')]])",
            "{open('canary', 'w')}",
            "exec(\"open('canary', 'w')\")",
        ):
            for gold in ("5", "\\pi", "\\{1\\}"):
                assert not answers_match(gold, code)
    finally:
        os.chdir(before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gold", "candidate", "reason"),
    [
        ("5", "5", Reason.EXACT),
        ("0.5", "1/2", Reason.EXACT),
        (r"\sqrt 8", r"2\sqrt 2", Reason.NUMERIC),
        ("(x+1)^2", "x^2+2x+1", Reason.NUMERIC),
        ("5", "6", Reason.DIFFERENT),
        ("5", "9**9**9", Reason.LIMIT),
        ("5", "5" * 3000, Reason.LIMIT),
    ],
)
def test_verdict_says_why(gold: str, candidate: str, reason: Reason) -> None:
    verdict = verify_answer(gold, candidate)
    assert verdict.reason is reason
    assert verdict.grader_version == GRADER_VERSION


RUNS = (r"\ ", "\\", r"\quad ", r"\,", "~", "_", "X_", "'", "{", r"\text{", r"\in")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", RUNS)
def test_what_a_small_model_repeats_without_end_is_read_at_once(part: str) -> None:
    """No pattern may try all the ways to cut a run: it would hold all other threads."""
    for text in ("3" + 60 * part + "x!", 2000 * part, "x" + 60 * part + "x"):
        for gold in ("38", "X_1 = 2", "angle ABC"):
            assert not answers_match(gold, text)


@pytest.mark.parametrize("candidate", [r"x \in x \in x", r"2 \in |x| \in x", r"|x| \in x"])
def test_membership_in_a_number_is_no_set(candidate: str) -> None:
    assert verify_answer("12", candidate).reason is Reason.DIFFERENT


def test_long_answers_are_equal_only_as_the_same_text() -> None:
    assert answers_match("x+" * 2000 + "1", " " + "x+" * 2000 + "1")
    assert not answers_match("x+" * 2000 + "1", "1+" + "x+" * 1999 + "x")


def test_what_sympy_cannot_settle_in_time_is_undecided() -> None:
    verdict = verify_answer("5", r"\sum_{n=1}^{\infty} \sin(n^2)/n^{1.5}")
    assert (verdict.equal, verdict.reason) == (False, Reason.UNDECIDED)


def test_many_threads_agree() -> None:
    pairs = rows(EQUAL)[:40]
    verdicts: list[list[bool]] = []

    def grade() -> None:
        verdicts.append([answers_match(left, right) for left, right in pairs])

    threads = [threading.Thread(target=grade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [[True] * len(pairs)] * 4


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=60),
    st.text(alphabet="0123456789xyi+-*/^_(){}[]|,.=<>\\ $%!fracsqrt", max_size=40),
)
def test_any_two_strings_get_the_same_verdict_either_way_round(left: str, right: str) -> None:
    assert verify_answer(left, right) == verify_answer(right, left)
    assert verify_answer(right, "5").equal == verify_answer("5", right).equal


@settings(max_examples=60, deadline=None)
@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_rationals_are_equal_exactly_when_their_values_are(one: object, two: object) -> None:
    left, right = str(one), str(two).replace("/", "}{")
    right = f"\\frac{{{right}}}" if "}" in right else right
    right = right.replace("\\frac{-", "-\\frac{")
    assert answers_match(left, right) == (one == two)


@pytest.mark.parametrize(
    ("gold", "candidate"),
    [
        (r"2^{4027}, 3", r"2^{4028}, 4"),
        (r"1.7\cdot10^{308}+1.7\cdot10^{308}i, 2", "3, 4"),
        (r"\{2^{4027}, 2^{4026}\}", r"\{2^{4026}, 2^{4028}\}"),
    ],
)
def test_lists_of_numbers_that_no_float_holds_are_compared(gold: str, candidate: str) -> None:
    assert not verify_answer(gold, candidate).equal
    assert verify_answer(gold, gold).equal
