"""The child of `verifier.symbolic`: reads pairs of trees as JSON lines, answers true, false or
null.

    python -m verifier.symbolic_worker ADDRESS_SPACE_BYTES

Run it only through `verifier.symbolic`, which keeps the deadline. It sets its own memory and CPU
limits first.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

CPU_S = 120


def main() -> None:
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    import sympy

    # The first sum and simplification import and cache much; that belongs to starting.
    letter = sympy.Symbol("n", integer=True)
    sympy.simplify(sympy.Sum(sympy.Rational(1, 3) ** letter, (letter, 0, sympy.oo)).doit())
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        left, right = json.loads(line)
        try:
            reply = judge(sympy, left, right)
        except (
            ArithmeticError,
            AttributeError,
            MemoryError,
            NotImplementedError,
            RecursionError,
            TypeError,
            ValueError,
        ):
            reply = None
        print(json.dumps(reply), flush=True)


def judge(sympy: Any, left: Any, right: Any) -> bool | None:
    """True or false when sympy shows the trees equal or different, None when it cannot tell."""
    one, two = build(sympy, left).doit(), build(sympy, right).doit()
    difference = sympy.simplify(one - two)
    if difference == 0:
        return True
    if difference.is_zero is False or difference.is_nonzero:
        return False
    verdict = difference.equals(0)
    return bool(verdict) if verdict is not None else None


def build(sympy: Any, tree: Any) -> Any:
    """A sympy object from nested lists; only the names below exist."""
    match tree:
        case ["number", str(top), str(bottom)]:
            return sympy.Rational(int(top), int(bottom))
        case ["constant", str(name)]:
            return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[name]
        case ["symbol", str(name)]:
            if name[0] in "nkmN":
                return sympy.Symbol(name, integer=True, positive=True)
            return sympy.Symbol(name)
        case ["call", ("sum" | "product") as name, [body, letter, low, high]]:
            series = sympy.Sum if name == "sum" else sympy.Product
            return series(
                build(sympy, body), (build(sympy, letter), build(sympy, low), build(sympy, high))
            )
        case ["call", str(name), list(args)]:
            return functions(sympy)[name](*(build(sympy, arg) for arg in args))
    raise ValueError(f"not a tree: {tree!r:.80}")


def functions(sympy: Any) -> dict[str, Callable[..., Any]]:
    named = (
        "sin cos tan cot sec csc sinh cosh tanh coth sech csch asin acos atan acot asec acsc asinh "
        "acosh atanh factorial factorial2 binomial floor gamma sign re im conjugate gcd lcm"
    )
    return {name: getattr(sympy, name) for name in named.split()} | {
        "add": sympy.Add,
        "mul": sympy.Mul,
        "power": sympy.Pow,
        "ln": sympy.log,
        "log": sympy.log,
        "abs": sympy.Abs,
        "ceil": sympy.ceiling,
        "max": sympy.Max,
        "min": sympy.Min,
        "mod": sympy.Mod,
        "percent": lambda value: value / 100,
        "degree": lambda value: value * sympy.pi / 180,
    }


if __name__ == "__main__":
    main()
