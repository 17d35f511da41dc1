"""Figures of the step sandbox, beside plain re-implementations of what it replaces.

    python -m bench.sandbox [--json FILE] [--repeats N] [--soak N] [--isolation strict|best_effort]

Three ways run the same tree of steps in the same run, in turns, and must print the same:
* tree: the sandbox, one forked state per kept step, each step runs its own code only;
* pools: as the released rStar-Math does it, a fresh process pool for each expansion, whose worker
  runs
  all ancestors' code and the candidate's for every candidate, in one process with no isolation;
* worker: the same concatenation in one warm process that lives through the whole tree.
Both comparisons fork from a parent that has sympy loaded, which favours them.

Machines differ and are noisy: read the ratios. The sandbox spreads siblings over the cores it may
use, as its users would; ratios ending in _cpu compare CPU time instead (the sandbox's with all its
processes, the others' without their start), which other load disturbs less. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from verifier.sandbox import Sandbox, SandboxLimits, StepStatus

LEVELS, SIBLINGS = 16, 12

# One step per level; {k} differs between siblings and passes, so no two are equal.
SYMPY_STEPS = (
    "from sympy import *\nx, y, n = symbols('x y n')\np = expand((x - {k})*(x + 2))\nprint(p)",
    "r = solve(x**2 - {k}*x + 6, x)\nprint(r)",
    "f1 = factor(x**3 - {k}*x**2 + 2*x)\nprint(f1)",
    "s1 = simplify((x**2 - {k}**2)/(x - {k}))\nprint(s1)",
    "i1 = integrate(x**2 + {k}*x, (x, 0, 1))\nprint(i1)",
    "l1 = limit(sin({k}*x)/x, x, 0)\nprint(l1)",
    "m = Matrix([[1, {k}], [3, 4]])\nprint(m.det(), m.inv())",
    "d1 = diff(sin({k}*x)*exp(x), x)\nprint(d1)",
    "q = solve([x + y - {k}, x - y - 1], [x, y])\nprint(q)",
    "c = summation(n**2 + {k}, (n, 1, 20))\nprint(c)",
    "t = series(exp({k}*x), x, 0, 4)\nprint(t)",
    "a1 = apart({k}/(x*(x + 1)), x)\nprint(a1)",
    "e = Eq(2**x, 2**{k})\nprint(solve(e, x))",
    "w = factorint({k} * 360), divisors({k} + 24)\nprint(w)",
    "g = sqrt({k} * 50).evalf(20)\nprint(g)",
    "h = integrate(x*exp({k}*x), x)\nprint(h)",
)
LIGHT_STEPS = tuple(
    f"v{level} = {{k}} * {level + 3} + 1\nprint(v{level})" for level in range(LEVELS)
)

Expansion = tuple[list[str], list[str]]
"""Codes of the path so far and of the candidates below it."""


def expansions(steps: Sequence[str], pass_number: int) -> list[Expansion]:
    """A tree of 16 levels with 12 siblings each; the first sibling is the one that goes on."""
    path: list[str] = []
    tree: list[Expansion] = []
    for level, step in enumerate(steps):
        first = 2 + pass_number * SIBLINGS * 7 + level
        candidates = [step.format(k=first + sibling) for sibling in range(SIBLINGS)]
        tree.append((list(path), candidates))
        path.append(candidates[0])
    return tree


Outcome = tuple[float, float, list[list[str]]]
"""Seconds, CPU seconds, and what each candidate printed."""


# --------------------------------------------------------------------------- comparisons


def run_concatenated(path: list[str], candidates: list[str]) -> tuple[list[str], float]:
    """Each candidate after all code of its path, here; what the candidates printed, CPU seconds."""
    outputs, started = [], time.process_time()
    for candidate in candidates:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        with contextlib.redirect_stdout(io.StringIO()):
            for code in path:
                exec(compile(code, "<path>", "exec"), namespace)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(candidate, "<candidate>", "exec"), namespace)
        outputs.append(printed.getvalue())
    return outputs, time.process_time() - started


def serve_comparisons(connection: Connection) -> None:
    """Runs in a process of its own, warm and with one thread, as a fork needs."""
    import numpy
    import sympy

    assert sympy and numpy
    context = multiprocessing.get_context("fork")
    worker = ProcessPoolExecutor(1, mp_context=context)
    worker.submit(
        run_concatenated, [], ["from sympy import *\nsolve(symbols('x')**2 - 1)"]
    ).result()
    while True:
        mode, tree = connection.recv()
        if mode == "end":
            worker.shutdown()
            return
        started, outputs, cpu_s = time.perf_counter(), [], 0.0
        for path, candidates in tree:
            if mode == "pools":
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    printed, spent = pool.submit(run_concatenated, path, candidates).result()
            else:
                printed, spent = worker.submit(run_concatenated, path, candidates).result()
            outputs.append(printed)
            cpu_s += spent
        connection.send((time.perf_counter() - started, cpu_s, outputs))


class Comparisons:
    def __enter__(self) -> Comparisons:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve_comparisons, args=(theirs,))
        self._process.start()
        return self

    def run(self, mode: str, tree: list[Expansion]) -> Outcome:
        self._connection.send((mode, tree))
        return self._connection.recv()

    def __exit__(self, *_: object) -> None:
        self._connection.send(("end", []))
        self._process.join(10)


def settled_cpu_s(sandbox: Sandbox) -> float:
    """CPU seconds of supervisor and ended processes, once the ends of closed trees are counted."""
    last = -1.0
    while True:
        stats = sandbox.stats()
        total = stats["supervisor_cpu_s"] + stats["ended_processes_cpu_s"]
        if stats["unreaped_processes"] == 0 and total - last < 0.005:
            return total
        last = total
        time.sleep(0.3)


def run_tree(sandbox: Sandbox, name: str, tree: list[Expansion]) -> Outcome:
    cpu_before = settled_cpu_s(sandbox)
    started, outputs = time.perf_counter(), []
    state = sandbox.open(name)
    for _, candidates in tree:
        results = sandbox.run(state, candidates)
        assert results[0].state is not None, results[0]
        state = results[0].state
        outputs.append([result.stdout for result in results])
    seconds = time.perf_counter() - started
    sandbox.close(name)
    return seconds, settled_cpu_s(sandbox) - cpu_before, outputs


def compare(sandbox: Sandbox, repeats: int) -> dict[str, Any]:
    """Milliseconds per execution of each way, heavy and light, and their ratios."""
    figures: dict[str, Any] = {}
    with Comparisons() as comparisons:
        for kind, steps in (("sympy", SYMPY_STEPS), ("light", LIGHT_STEPS)):
            seconds: dict[str, list[float]] = {"tree": [], "pools": [], "worker": []}
            cpu_seconds: dict[str, list[float]] = {name: [] for name in seconds}
            for number in range(repeats):
                tree = expansions(steps, number)
                outputs = []
                for name in seconds:
                    if name == "tree":
                        spent, cpu_s, printed = run_tree(sandbox, f"{kind}-{number}", tree)
                    else:
                        spent, cpu_s, printed = comparisons.run(name, tree)
                    cpu_seconds[name].append(cpu_s)
                    seconds[name].append(spent)
                    outputs.append(printed)
                if not outputs[0] == outputs[1] == outputs[2]:
                    raise AssertionError(
                        f"the three ways print differently on {kind} pass {number}"
                    )
            executions = LEVELS * SIBLINGS
            medians = {name: statistics.median(spent) for name, spent in seconds.items()}
            cpu = {name: statistics.median(spent) for name, spent in cpu_seconds.items()}
            for name in medians:
                figures[f"{kind}_{name}_ms_per_step"] = medians[name] / executions * 1e3
                figures[f"{kind}_{name}_cpu_ms_per_step"] = cpu[name] / executions * 1e3
            prefix = "tree" if kind == "sympy" else "light_tree"
            figures[f"{prefix}_vs_pools"] = medians["pools"] / medians["tree"]
            figures[f"{prefix}_vs_warm_worker"] = medians["worker"] / medians["tree"]
            figures[f"{prefix}_vs_pools_cpu"] = cpu["pools"] / cpu["tree"]
            figures[f"{prefix}_vs_warm_worker_cpu"] = cpu["worker"] / cpu["tree"]
    return figures


# --------------------------------------------------------------------------- the sandbox alone


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def overhead(sandbox: Sandbox, samples: int) -> dict[str, float]:
    """Reply minus in-step time, one step at a time, depth 1 and depth 16 in turns."""
    root = sandbox.open("overhead")
    deep = root
    for level in range(LEVELS - 1):
        deep = str(sandbox.run(deep, [f"v{level} = {level}"])[0].state)
    spent: dict[str, list[float]] = {root: [], deep: []}
    for number in range(samples):
        for parent in (root, deep):
            started = time.perf_counter()
            result = sandbox.run(parent, [f"z = {number}\nprint(z)"])[0]
            seconds = time.perf_counter() - started
            assert result.state is not None
            spent[parent].append((seconds - result.exec_s) * 1e3)
            sandbox.evict(result.state)
    sandbox.close("overhead")
    both = spent[root] + spent[deep]
    shallow, below = statistics.median(spent[root]), statistics.median(spent[deep])
    return {
        "overhead_p50_ms": quantile(both, 0.5),
        "overhead_p99_ms": quantile(both, 0.99),
        "overhead_depth1_p50_ms": shallow,
        "overhead_depth16_p50_ms": below,
        "depth16_over_depth1": below / shallow,
    }


def page_faults(sandbox: Sandbox, samples: int) -> dict[str, float]:
    """Pages that a light step's process asked of the kernel from its fork to its answer."""
    root = sandbox.open("faults")
    supervisor = sandbox.stats()["supervisor_pid"]
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    faults = []
    for number in range(samples):
        before = set(children.read_text().split())
        result = sandbox.run(root, [f"z = {number}\nprint(z)"])[0]
        (made,) = set(children.read_text().split()) - before
        fields = Path(f"/proc/{made}/stat").read_text().rsplit(")", 1)[1].split()
        faults.append(int(fields[7]))
        sandbox.evict(str(result.state))
    sandbox.close("faults")
    return {"step_page_faults": statistics.median(faults)}


def light_rate(isolation: Any, batches: int) -> float:
    """Light steps per second with client, supervisor and states all on one core, 12 at a time."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(allowed)])
    try:
        with Sandbox(SandboxLimits(live_states_per_tree=64), isolation) as sandbox:
            root = sandbox.open("rate")
            rates = []
            for batch in range(batches):
                codes = [f"x = {batch * SIBLINGS + n}\nprint(x)" for n in range(SIBLINGS)]
                started = time.perf_counter()
                results = sandbox.run(root, codes)
                rates.append(SIBLINGS / (time.perf_counter() - started))
                assert all(result.ok for result in results)
            return statistics.median(rates)
    finally:
        os.sched_setaffinity(0, allowed)


def available_mib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


def state_memory(sandbox: Sandbox, steps: Sequence[str], repeats: int) -> float:
    """MemAvailable lost per kept state over two trees of 16 x 12, median of several takes."""
    takes = []
    for take in range(repeats):
        names = [f"memory-{take}-{half}" for half in range(2)]
        states = [sandbox.open(name) for name in names]
        time.sleep(0.3)
        before = available_mib()
        kept = 0
        for half, state in enumerate(states):
            for _, candidates in expansions(steps, 100 + 2 * take + half):
                results = sandbox.run(state, candidates)
                kept += sum(result.ok for result in results)
                state = str(results[0].state)
        time.sleep(0.3)
        assert kept == 2 * LEVELS * SIBLINGS
        takes.append((before - available_mib()) / kept)
        for name in names:
            sandbox.close(name)
        time.sleep(0.5)
    return statistics.median(takes)


def overrun(sandbox: Sandbox, samples: int) -> dict[str, float]:
    """How late a hung step is answered, and how long a sibling waits meanwhile."""
    root = sandbox.open("overrun")
    limits = SandboxLimits(wall_s=0.2)
    late, siblings = [], []
    for number in range(samples):
        hung, quick = sandbox.run(
            root, [f"while True: pass  # {number}", f"print({number})"], limits
        )
        assert hung.status is StepStatus.TIMEOUT or hung.status is StepStatus.INFRA_ERROR
        late.append((hung.wall_s - limits.wall_s) * 1e3)
        siblings.append(quick.wall_s * 1e3)
    sandbox.close("overrun")
    return {"timeout_overrun_max_ms": max(late), "sibling_of_hung_max_ms": max(siblings)}


SOAK_ATTACKS = (
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "while True: pass",
    "x = []\nwhile True: x.append(bytes(1 << 20))",
    "while True: print('x' * 1000)",
    "import os\nos._exit(0)",
    "import ctypes\nctypes.string_at(0)",
    "import socket\nsocket.socket(fileno=63).send(b'forged' * 20)",
    "import os\nos.close(63)\nwhile True: pass",
    "import os\nos.kill(os.getppid(), 9)",
    "open('/tmp/soak', 'w')",
)


def soak(isolation: Any, steps: int) -> dict[str, Any]:
    """Many steps, 1 % of them attacks: each answered once, nothing left over."""
    rng = random.Random(1)
    limits = SandboxLimits(wall_s=0.3, memory_mib=256, live_states_per_tree=64, live_states=128)
    answers: dict[str, int] = {}
    ends: dict[str, int] = {}
    wrong = 0
    with Sandbox(limits, isolation) as sandbox:
        sandbox.open("first")
        sandbox.close("first")
        time.sleep(1.0)
        before = sandbox.stats()
        children = Path(
            f"/proc/{before['supervisor_pid']}/task/{before['supervisor_pid']}/children"
        )
        sent = tree = 0
        while sent < steps:
            tree += 1
            state = sandbox.open(f"soak-{tree}")
            for depth in range(8):
                codes = []
                for number in range(SIBLINGS):
                    attack = number > 0 and rng.random() < 0.01 * SIBLINGS / (SIBLINGS - 1)
                    mark = f"\n# {sent + number}"
                    codes.append(
                        rng.choice(SOAK_ATTACKS) + mark
                        if attack
                        else f"v{depth} = {sent + number}\nprint(v{depth})"
                    )
                results = sandbox.run(state, codes)
                for offset, (code, result) in enumerate(zip(codes, results, strict=True)):
                    answers[result.status] = answers.get(result.status, 0) + 1
                    if code.startswith(f"v{depth}") and result.stdout != f"{sent + offset}\n":
                        wrong += 1
                        ends[result.status] = ends.get(result.status, 0) + 1
                sent += SIBLINGS
                if results[0].state is None:
                    break
                state = results[0].state
            sandbox.close(f"soak-{tree}")
        time.sleep(1.0)
        after = sandbox.stats()
        left = len(children.read_text().split()) - 1
    return {
        "soak_steps": sent,
        "soak_answers": answers,
        "soak_wrong_honest_answers": wrong,
        "soak_wrong_honest_statuses": ends,
        "soak_leftover_processes": left,
        "soak_descriptor_growth": after["descriptors"] - before["descriptors"],
        "soak_supervisor_mib_growth": after["supervisor_mib"] - before["supervisor_mib"],
        "soak_restarts": after.get("restarts", 0),
    }


def machine() -> dict[str, Any]:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20),
        "kernel": platform.release(),
        "load_average_1min": os.getloadavg()[0],
        "user": os.geteuid(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("sympy", "numpy", "mpmath")},
        },
    }


GOALS = {
    "overhead_p50_ms": "<= 1.2",
    "overhead_p99_ms": "<= 10",
    "depth16_over_depth1": "<= 1.15",
    "light_steps_per_s_core": ">= 350",
    "tree_vs_pools": ">= 4",
    "tree_vs_warm_worker": ">= 2",
    "light_state_mib": "<= 1",
    "sympy_state_mib": "<= 6",
    "timeout_overrun_max_ms": "<= 100",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sandbox", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each comparison")
    parser.add_argument("--soak", type=int, default=0, help="steps of the soak; 0 leaves it out")
    parser.add_argument("--isolation", default="strict", choices=("strict", "best_effort"))
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.soak < 0:
        parser.error("--repeats must be at least 1 and --soak at least 0")
    figures: dict[str, Any] = {}
    with Sandbox(SandboxLimits(wall_s=60.0), options.isolation) as sandbox:
        capabilities = dict(sandbox.capabilities())
        figures |= overhead(sandbox, 100 * options.repeats)
        figures |= page_faults(sandbox, 5)
        figures |= compare(sandbox, options.repeats)
        figures |= overrun(sandbox, 5)
        figures["light_state_mib"] = state_memory(sandbox, LIGHT_STEPS, options.repeats)
        figures["sympy_state_mib"] = state_memory(sandbox, SYMPY_STEPS, options.repeats)
    figures["light_steps_per_s_core"] = light_rate(options.isolation, 40 * options.repeats)
    if options.soak:
        figures |= soak(options.isolation, options.soak)
    figures |= {"machine": machine(), "isolation": capabilities}
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:32} {value:10.3f}   {GOALS.get(name, '')}")
        elif not isinstance(value, dict):
            print(f"{name:32} {value:>10}")
    faster = 1 / figures["light_tree_vs_warm_worker"]
    print(
        f"\nLight steps: an unisolated warm worker that runs all ancestors again is {faster:.1f} "
        "times as fast\nas a fork per step; the fork buys isolation and a cost that does not grow "
        "with depth, not\nspeed on trivial arithmetic."
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.flush()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
