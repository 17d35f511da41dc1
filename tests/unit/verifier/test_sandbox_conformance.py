"""What every form of the step sandbox must do; the form is the fixtures' choice.

`RSTAR_SANDBOX_BACKEND=blocking|awaiting|actor` chooses it (`tests/sandbox_backends.py`), so that a
further back end shows that it conforms by one more entry there.
"""

from __future__ import annotations

import pickle
import threading
import time

import pytest

from verifier.sandbox import SandboxError, SandboxLimits, StepStatus
from verifier.sandbox_wire import TWIN

QUICK = SandboxLimits(wall_s=0.4, memory_mib=512)


SCIPY_STEPS = [
    (
        "from scipy.optimize import brentq\nprint(round(brentq(lambda x: x*x - 2, 0, 2), 6))",
        "1.414214",
    ),
    ("import scipy.stats\nprint(scipy.stats.norm.cdf(0))", "0.5"),
    ("from scipy import linalg\nprint(round(linalg.det([[1, 2], [3, 4]]), 6))", "-2.0"),
]


def test_siblings_keep_order_and_see_only_their_parent(tree):
    first = tree.one("x = 6*7\nprint(x)")
    assert (first.status, first.stdout) == ("ok", "42\n")
    results = tree.run("x += 1\nprint(x)", "print(x)", "y = x", "print(y)", state=first.state)
    assert [r.status for r in results] == ["ok", "ok", "ok", "error"]
    assert [r.stdout for r in results] == ["43\n", "42\n", "", ""]
    assert results[3].error_type == "NameError"


def test_parent_is_unchanged_by_its_children(tree):
    parent = tree.one("items = [1]")
    for _ in range(3):
        child = tree.one("items.append(2)\nprint(items)", parent.state)
        assert child.stdout == "[1, 2]\n"
    assert tree.one("print(len(items))", parent.state).stdout == "1\n"


def test_error_names_type_and_message_and_leaves_no_state(tree):
    result = tree.one("print('before')\n1/0")
    assert result.status is StepStatus.ERROR
    assert (result.error_type, result.error_message) == ("ZeroDivisionError", "division by zero")
    assert result.stdout == "before\n"
    assert result.state is None


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("def f(:\n", "SyntaxError"),
        ("x = 'a\0b'", "SyntaxError|ValueError"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("import sys\nsys.exit(3)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError"),
        ("raise BaseExceptionGroup('g', [KeyboardInterrupt()])", "BaseExceptionGroup"),
    ],
)
def test_whatever_is_raised_is_an_error_with_its_name(tree, code, kind):
    result = tree.one(code)
    assert result.status == "error"
    assert result.error_type in kind.split("|")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (("import math", "print(math.comb(5, 2))"), "10\n"),
        (("def f(x):\n    return g(x)", "g = lambda x: x * 2", "print(f(4))"), "8\n"),
        (("from sympy import *\nx = symbols('x')", "print(solve(x**2 - 4, x))"), "[-2, 2]\n"),
        (("import random\nrandom.seed(42)", "print(random.randint(0, 10**6))"), "670487\n"),
        (
            ("import numpy as np\nnp.random.seed(1)", "print(np.random.randint(0, 10**6))"),
            "128037\n",
        ),
        (
            ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int", "print(P(3))"),
            "P(x=3)\n",
        ),
        (("from fractions import Fraction as F", "print(F(1, 3) + F(1, 6))"), "1/2\n"),
        (("import sys\nwrite = sys.stdout.write", "n = write('kept\\n')"), "kept\n"),
        (("import sys\nsys.setrecursionlimit(5000)", "print(sys.getrecursionlimit())"), "5000\n"),
        (("print(__name__)",), "__main__\n"),
        (
            ("def f():\n    pass", "import inspect\nprint(inspect.getsource(f))"),
            "def f():\n    pass\n",
        ),
        (("from __future__ import annotations\ndef f(x: nonsense): ...\nprint(1)",), "1\n"),
        (("print('tab\\tand é ∑ 🙂')",), "tab\tand é ∑ 🙂\n"),
        (("print('a\\0b')",), "a\0b\n"),
        (("import sys\nprint(hash('fixed') == hash('fixed'), sys.argv)",), "True ['']\n"),
    ],
)
def test_steps_behave_as_one_program(tree, codes, expected):
    assert tree.path(*codes).stdout == expected


@pytest.mark.parametrize("flavour", ["base", "scipy"])
def test_integers_of_any_length_are_written_and_read_in_every_flavour(strict_sandbox, flavour):
    root = strict_sandbox.open(f"long-{flavour}", flavour=flavour)
    codes = [
        "x = 2**20000\nprint(x)",
        "print(str(3**20000) == f'{3**20000}' == '%d' % 3**20000 == repr(3**20000))",
        "print(int(str(7**9000)) == 7**9000, int('9' * 5000) + 1 == 10**5000)",
        f"print({'9' * 5000} + 1 == 10**5000)",
    ]
    results = strict_sandbox.run(root, codes)
    assert [r.status for r in results] == ["ok"] * 4, results
    digits = results[0].stdout.strip()
    assert len(digits) == 6021 and digits[:6] == "398027" and digits[-6:] == "309376"
    assert [r.stdout for r in results[1:]] == ["True\n", "True True\n", "True\n"]
    strict_sandbox.evict(results[0].state)
    again = strict_sandbox.run(results[0].state, ["print(x)"])[0]
    assert (again.stdout, again.replayed) == (results[0].stdout, 1)
    strict_sandbox.close(f"long-{flavour}")


def test_long_integer_is_cut_like_other_output_and_a_longer_one_meets_the_limits(tree):
    limits = SandboxLimits(wall_s=60.0, output_kib=1, memory_mib=512)
    cut = tree.one("print(2**20000)", limits=limits)
    assert cut.status == "ok" and cut.truncated
    assert cut.stdout.startswith("398027") and cut.stdout.endswith("309376\n")
    # minutes of work in one call of C code: the guard is gone, the limits are not
    endless = tree.one("print(2**(10**9))", limits=QUICK)
    assert endless.status in ("timeout", "infra_error")


def test_step_may_set_the_guard_of_digits_for_itself_and_its_children(tree):
    guarded = tree.one("import sys\nsys.set_int_max_str_digits(4300)")
    refused, free = tree.one("print(2**20000)", guarded.state), tree.one("print(2**20000)")
    assert (refused.status, refused.error_type) == ("error", "ValueError")
    assert free.status == "ok"


def test_random_state_is_shared_by_siblings_and_continues_in_children(tree):
    parent = tree.one("import random\nrandom.seed(7)\na = random.random()")
    left, right = tree.run(
        "print(random.random())  # l", "print(random.random())", state=parent.state
    )
    assert left.stdout == right.stdout
    again = tree.one("import random\nrandom.seed(7)\nrandom.random()\nprint(random.random())")
    assert again.stdout == left.stdout


def test_open_seeds_random_from_problem_and_seed(strict_sandbox):
    seen = []
    for seed in (0, 0, 1):
        root = strict_sandbox.open("seeded", seed=seed)
        seen.append(strict_sandbox.run(root, ["import random\nprint(random.random())"])[0].stdout)
        strict_sandbox.close("seeded")
    assert seen[0] == seen[1] != seen[2]


def test_twins_are_open_at_once_with_the_same_random_state(strict_sandbox):
    code = "import random, numpy\nprint(random.random(), numpy.random.random())"
    names = ["seeded", f"seeded{TWIN}1", f"seeded{TWIN}2", "another"]
    seen = [strict_sandbox.run(strict_sandbox.open(name), [code])[0].stdout for name in names]
    for name in names:
        strict_sandbox.close(name)
    assert seen[0] == seen[1] == seen[2] != seen[3]


@pytest.mark.parametrize("code", ["", "   \n\n", "# only words", "\n  # a\r\n\t# b\r# c\n"])
def test_empty_and_comment_steps_share_the_state_without_a_fork(tree, strict_sandbox, code):
    before = strict_sandbox.stats().get("forks", 0)
    result = tree.one(code)
    assert (result.status, result.state, result.stdout) == ("ok", tree.root, "")
    assert strict_sandbox.stats().get("forks", 0) == before


def test_equal_code_runs_once_within_and_across_calls(tree, strict_sandbox):
    before = strict_sandbox.stats().get("forks", 0)
    results = tree.run(
        "import time\nprint(time.time_ns())", *["import time\nprint(time.time_ns())\n"] * 3
    )
    again = tree.one("import time\nprint(time.time_ns())")
    assert len({r.state for r in [*results, again]}) == 1
    assert len({r.stdout for r in [*results, again]}) == 1
    assert strict_sandbox.stats()["forks"] == before + 1


def test_timeout_ends_a_hung_step_near_its_limit_while_siblings_answer(tree):
    started = time.monotonic()
    codes = ["while True: pass", "import time\ntime.sleep(60)", *[f"print({n})" for n in range(6)]]
    results = tree.run(*codes, limits=QUICK)
    # where other programs keep the cores busy, the loop cannot be blamed and says infra_error
    assert results[0].status in ("timeout", "infra_error")
    assert [r.status for r in results[1:]] == ["timeout"] + ["ok"] * 6
    assert [r.stdout for r in results[2:]] == [f"{n}\n" for n in range(6)]
    assert time.monotonic() - started < 60
    assert tree.one("print('alive')").stdout == "alive\n"


def test_cpu_limit_ends_a_step_before_its_wall_limit(tree):
    limits = SandboxLimits(wall_s=30.0, cpu_s=0.3, memory_mib=512)
    result = tree.one("while True: pass", limits=limits)
    assert (result.status, result.error_type) == ("timeout", "CpuLimit")
    assert result.wall_s < 25


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(4 << 30)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "x = [0] * 10**10",
        "import numpy as np\nx = np.ones((1 << 30,))",
    ],
)
def test_memory_over_the_limit_is_named(tree, code):
    result = tree.one(code)
    assert result.status == "memory"
    assert tree.one("print('alive')").stdout == "alive\n"


def test_memory_limit_of_one_call_is_tighter_than_the_sandbox(tree):
    code = "x = bytearray(200 << 20)\nprint(len(x) >> 20)"
    assert tree.one(code).stdout == "200\n"
    assert tree.one(code, limits=SandboxLimits(memory_mib=64)).status == "memory"
    with pytest.raises((ValueError, SandboxError), match="memory_mib=4096"):
        tree.one(code, limits=SandboxLimits(memory_mib=4096))


def test_long_output_keeps_head_and_tail(tree):
    limits = SandboxLimits(output_kib=1, memory_mib=512)
    result = tree.one("for i in range(2000): print(i)", limits=limits)
    assert result.status == "ok" and result.truncated
    assert len(result.stdout.encode()) <= 1024
    assert result.stdout.startswith("0\n1\n2\n") and result.stdout.endswith("1998\n1999\n")


def test_output_above_the_kept_size_of_many_frames_arrives_whole(tree):
    limits = SandboxLimits(output_kib=512, memory_mib=512)
    result = tree.one("print('é' * 200_000)", limits=limits)
    assert result.stdout == "é" * 200_000 + "\n"
    assert not result.truncated


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 1000)",
        "while True:\n    try: print('x' * 1000)\n    except BaseException: pass",
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        "import sys\nwhile True: sys.stdout.buffer.write(b'x' * 1000)",
        "print('x' * (1 << 24))",
    ],
)
def test_output_flood_is_ended_and_cannot_be_caught(tree, code):
    assert tree.one(code).status == "output_limit"


def test_code_over_its_size_and_depth_is_denied_without_running(tree, strict_sandbox):
    before = strict_sandbox.stats().get("forks", 0)
    big = tree.one("#" * 1025 + "\nprint(1)", limits=SandboxLimits(code_kib=1, memory_mib=512))
    assert (big.status, big.error_type) == ("denied", "CodeSize")
    assert strict_sandbox.stats().get("forks", 0) == before
    state = tree.root
    for depth in range(64):
        state = tree.one(f"d = {depth}", state).state
    deep = tree.one("print(d)", state)
    assert (deep.status, deep.error_type) == ("denied", "Depth")


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import os\nos._exit(0)", "exit status 0"),
        ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
        ("import os\nos.abort()", "SIG"),
    ],
)
def test_death_is_told_by_the_kernel(tree, code, end):
    result = tree.one(code)
    assert result.status == "died"
    assert end in result.error_type


def test_run_of_nothing_is_nothing(tree):
    assert tree.run() == []


def test_evicted_state_comes_back_by_replay(tree):
    states = [tree.root]
    for step in range(4):
        states.append(tree.one(f"v{step} = {step}\nprint('step', {step})", states[-1]).state)
    for state in states:
        tree.sandbox.evict(state)
    result = tree.one("print(v0, v1, v2, v3)", states[-1])
    assert (result.stdout, result.replayed) == ("0 1 2 3\n", 5)
    assert tree.one("print(v3 + 1)", states[-1]).replayed == 0


def test_replay_that_prints_something_else_is_reported_never_mixed(tree):
    state = tree.one("import os\ntoken = os.urandom(8).hex()\nprint(token)").state
    tree.sandbox.evict(state)
    result = tree.one("print('on', token)", state)
    assert (result.status, result.state) == ("replay_diverged", None)
    assert "printed something else" in result.error_message


@pytest.mark.parametrize("codes", ["print(1)", b"print(1)"])
def test_codes_must_be_a_sequence_of_strings(tree, codes):
    with pytest.raises(TypeError, match="sequence of strings"):
        tree.sandbox.run(tree.root, codes)
    with pytest.raises(TypeError, match=r"codes\[1\]"):
        tree.sandbox.run(tree.root, ["1", 2])


def test_results_and_limits_travel_by_pickle(tree):
    result = tree.one("print(1)")
    assert pickle.loads(pickle.dumps(result)) == result
    assert pickle.loads(pickle.dumps(SandboxLimits(wall_s=1))) == SandboxLimits(wall_s=1)
    error = pickle.loads(pickle.dumps(SandboxError("why")))
    assert str(error) == "why"


def test_many_threads_share_one_sandbox(strict_sandbox):
    outputs: dict[int, list[str]] = {}

    def search(number: int) -> None:
        root = strict_sandbox.open(f"thread-{number}")
        state, printed = root, []
        for step in range(4):
            result = strict_sandbox.run(state, [f"x = {number} * 100 + {step}\nprint(x)", "1/0"])[0]
            state = result.state
            printed.append(result.stdout)
        strict_sandbox.close(f"thread-{number}")
        outputs[number] = printed

    threads = [threading.Thread(target=search, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {n: [f"{n * 100 + step}\n" for step in range(4)] for n in range(8)}


@pytest.mark.parametrize("flavour", ["base", "scipy"])
def test_scipy_works_in_its_own_flavour_and_when_a_step_imports_it(strict_sandbox, flavour):
    root = strict_sandbox.open(f"scipy-{flavour}", flavour=flavour)
    results = strict_sandbox.run(root, [code for code, _ in SCIPY_STEPS])
    strict_sandbox.close(f"scipy-{flavour}")
    assert [(r.status, r.stdout.strip()) for r in results] == [
        ("ok", out) for _, out in SCIPY_STEPS
    ]


def test_steps_see_no_environment_but_fixed_settings(tree):
    (result,) = tree.run("import os\nprint(sorted(os.environ))")
    fixed = ["HOME", "LC_ALL", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OMP_NUM_THREADS"]
    assert result.stdout.strip() == str([*fixed, "OPENBLAS_NUM_THREADS", "PATH"])
