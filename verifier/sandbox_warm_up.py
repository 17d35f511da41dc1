"""What a warm interpreter has already done before its first fork.

Sympy fills its caches and imports lazily; a first call costs 5 to 40 ms that every branch would
pay again. The statements below are the common calls of school and competition solutions. Each
line runs by itself, so a library that renames one call costs its warmth and not the start; how many
failed is reported by `Sandbox.capabilities`.
"""

from __future__ import annotations

BASE_MODULES = (
    *("math", "cmath", "itertools", "functools", "operator", "fractions", "decimal"),
    *("collections", "statistics", "random", "re", "string", "heapq", "bisect", "copy", "time"),
    *("datetime", "json", "typing", "dataclasses", "enum", "abc", "numbers", "textwrap", "pprint"),
    *("array", "inspect", "traceback", "warnings", "contextlib", "types", "calendar"),
    *("mpmath", "numpy", "numpy.linalg", "numpy.polynomial", "sympy"),
    *("sympy.abc", "sympy.ntheory", "sympy.combinatorics", "sympy.geometry", "sympy.stats"),
    *("sympy.solvers.inequalities", "sympy.solvers.diophantine", "sympy.functions.combinatorial"),
)
SCIPY_MODULES = ("scipy", "scipy.optimize", "scipy.special", "scipy.integrate", "scipy.stats")
FLAVOUR_MODULES = {"base": BASE_MODULES, "scipy": BASE_MODULES + SCIPY_MODULES}

# Every library is paid for at every fork. These come with `shutil` (through sympy) for archives;
# code that wants them itself still imports them.
LEFT_OUT = ("_lzma", "_bz2", "zlib")

BASE = """
from sympy import *
x, y, z = symbols('x y z'); n, k = symbols('n k', integer=True, positive=True)
a = symbols('a', real=True); f = Function('f'); r = Rational(1, 2)
solve(x**2 - 5*x + 6, x); solve([x + y - 3, x - y - 1], [x, y])
solve(x**3 - 6*x**2 + 11*x - 6); solve(Eq(2**x, 8), x); solve(Eq(sqrt(x + 1), 3), x)
solve(x**2 + 1, x); solve(a**2 - 2, a, dict=True); solve(sin(x) - r, x); solve(log(x) - 1, x)
solveset(x**2 - 4, x, S.Reals); linsolve([x + y - 2, x - y], x, y); nsolve(cos(x) - x, 1)
solve([x**2 + y**2 - 25, x - y - 1], [x, y])
solve_univariate_inequality(x**2 - 4 < 0, x); reduce_inequalities([x > 1, x < 3], x)
factor(x**4 - 1); expand((x + y)**4); simplify((x**2 - 1)/(x - 1)); apart(1/(x*(x + 1)))
cancel((x**2 - 1)/(x + 1)); together(1/x + 1/y); collect(x*y + x, x)
trigsimp(sin(x)**2 + cos(x)**2); radsimp(1/(sqrt(2) + 1)); nsimplify(0.5); expand_trig(sin(2*x))
sqrtdenest(sqrt(3 + 2*sqrt(2))); powsimp(x**2*x**3); logcombine(log(x) + log(y))
diff(sin(x)*exp(x), x); integrate(x**2, (x, 0, 1)); integrate(x*exp(x), x)
integrate(1/(1 + x**2), x); limit(sin(x)/x, x, 0); limit((1 + 1/x)**x, x, oo)
series(exp(x), x, 0, 4); summation(k**2, (k, 1, n)); summation(k, (k, 1, 10))
Sum(1/k**2, (k, 1, oo)).doit(); product(k, (k, 1, 5))
m = Matrix([[1, 2], [3, 4]]); m.det(); m.inv(); m.eigenvals(); m.rref(); m.rank()
m.eigenvects(); m.charpoly(x)
isprime(97); factorint(360); divisors(36); gcd(12, 18); lcm(4, 6); totient(36); nextprime(7)
list(primerange(1, 30)); mod_inverse(3, 7); binomial(10, 3); factorial(10); fibonacci(10)
sqrt(50); Rational(1, 3); pi.evalf(30); N(sqrt(2), 20); latex(x/y); str(sqrt(2)/2)
Point(0, 0).distance(Point(3, 4)); Circle(Point(0, 0), 2).area
Triangle(Point(0, 0), Point(3, 0), Point(0, 4)).area
sympify('x**2 + 1'); Poly(x**2 + 2*x + 1, x).nroots(); Poly(x**3 - 2*x + 1).all_coeffs()
roots(x**3 - 1, x); real_roots(x**3 - x); resultant(x**2 - 1, x - 2, x)
groebner([x*y - 1, x - y]); Piecewise((x, x > 0), (0, True)).subs(x, 2)
Abs(-3); floor(Rational(7, 2)); ceiling(2.5); re(1 + I); expand((1 + I)**4)
cos(pi/3); tan(pi/4); asin(r); rsolve(f(n) - f(n - 1) - 1, f(n))
Interval(0, 1).union(Interval(2, 3)); FiniteSet(1, 2).intersect(FiniteSet(2))
lambdify(x, x**2, 'math')(3); diophantine(x**2 - y**2 - 3); (x**2 + 3*x).subs(x, 2).evalf()
minimum(x**2, x, Interval(-1, 1)); maximum(-x**2 + x, x, S.Reals); srepr(x + 1)
import numpy as np
np.linalg.solve(np.array([[1., 2.], [3., 4.]]), np.array([1., 2.])); np.roots([1, -3, 2])
np.arange(9).reshape(3, 3) @ np.eye(3); np.linalg.det(np.eye(3)); np.linalg.eigvals(np.eye(2))
np.linspace(0, 1, 5).sum(); str(np.array([1.5, 2])); np.gcd(4, 6)
from fractions import Fraction; str(Fraction(1, 3) + Fraction(1, 6)); float(Fraction(1, 3))
from decimal import Decimal, getcontext; str(Decimal(1) / Decimal(3))
import statistics; statistics.mean([1, 2, 3])
import itertools, math, re as regex; list(itertools.permutations(range(3))); math.comb(5, 2)
regex.findall('[0-9]+', 'a1b22')
from collections import Counter, defaultdict; Counter('abca').most_common(1); f'{math.pi:.4f}'
print(x**2 + 1, m, [sqrt(2)])
"""

SCIPY = """
from scipy import optimize, integrate, special, stats
optimize.brentq(lambda t: t * t - 2, 0, 2); optimize.fsolve(lambda t: t * t - 2, 1.0)
optimize.minimize(lambda t: (t[0] - 1) ** 2, [0.0])
integrate.quad(lambda t: t, 0, 1); special.comb(5, 2)
stats.norm.cdf(0); stats.binom.pmf(2, 5, 0.5)
"""
