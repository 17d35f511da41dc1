"""What runs inside the sandbox: the warm zygote, the tree roots and the states forked from them.

    zygote  --fork-->  root (locks itself)  --fork-->  state  --fork-->  state ...
                             each one: wait for a spawn order, fork; the child runs one step, replies, waits

This file is executed by `fork_tree` as the main program of a fresh interpreter. It holds no
secret and is not trusted after the first user step: user code shares its address space and may rewrite
any of it. All it could gain is to lie about its own node and its descendants; limits, exits and forks are
judged by the supervisor and the kernel.

Care taken so that honest programs behave as one long program would:
* functions here look up builtins in a private copy, so `builtins.len = None` breaks only its author;
* one writer object serves a whole lineage, so a reference to `sys.stdout` kept from an earlier step works;
* no at-fork hook runs (see `isolation.SiblingFork`): random state carries over, siblings start equal.

Open files do not outlive a step: descriptors are closed in each new state, because siblings would
share their offsets. Output written to descriptors 1 and 2 directly is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.machinery
import io
import json
import linecache
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable

from verifier import isolation, memory_image

REQUEST = struct.Struct("<4sIIIIIIQI")
"""magic, nonce, step number, bytes kept, characters accepted, error bytes, CPU s, address space in
bytes, bytes of code."""
REPLY = struct.Struct("<4sIBBdQIII")
"""magic, nonce, status, truncated, seconds in the step, characters printed, three text lengths."""
REQUEST_MAGIC, REPLY_MAGIC = b"RSQ1", b"RSA1"
HELLO, ROOT_HELLO, SPAWN, NO_FORK = b"H", b"L", b"S", b"N"
FRAME_BYTES = 60_000
"""Larger messages travel as several frames of at most this size."""
OK, ERROR, MEMORY, OUTPUT_LIMIT, DENIED = range(5)
READY = b"READY"

BASE_MODULES = (
    *("math", "cmath", "itertools", "functools", "operator", "fractions", "decimal", "collections"),
    *("statistics", "random", "re", "string", "heapq", "bisect", "copy", "time", "datetime", "json"),
    *("typing", "dataclasses", "enum", "abc", "numbers", "textwrap", "pprint", "array"),
    *("inspect", "traceback", "warnings", "contextlib", "types", "calendar"),
    *("mpmath", "numpy", "numpy.linalg", "numpy.polynomial", "sympy"),
    *("sympy.abc", "sympy.ntheory", "sympy.combinatorics", "sympy.geometry", "sympy.stats"),
    *("sympy.solvers.inequalities", "sympy.solvers.diophantine", "sympy.functions.combinatorial"),
)
SCIPY_MODULES = ("scipy", "scipy.optimize", "scipy.special", "scipy.integrate", "scipy.stats")
FLAVOUR_MODULES = {"base": BASE_MODULES, "scipy": BASE_MODULES + SCIPY_MODULES}

# Every library is paid for at every fork. These come along with `shutil` (through sympy) for archive
# formats; code that wants them itself still imports them.
LEFT_OUT = ("_lzma", "_bz2", "zlib")

# Sympy fills its caches and imports lazily; a first call costs 5 to 40 ms that every branch would pay
# again. These calls are the common ones of school and competition solutions.
WARM_UP = """
from sympy import *
x, y, z = symbols('x y z'); n, k = symbols('n k', integer=True, positive=True); a = symbols('a', real=True)
solve(x**2 - 5*x + 6, x); solve([x + y - 3, x - y - 1], [x, y]); solve(x**3 - 6*x**2 + 11*x - 6)
solve(Eq(2**x, 8), x); solve(Eq(sqrt(x + 1), 3), x); solve(x**2 + 1, x); solve(a**2 - 2, a, dict=True)
solveset(x**2 - 4, x, S.Reals); linsolve([x + y - 2, x - y], x, y); nsolve(cos(x) - x, 1)
solve([x**2 + y**2 - 25, x - y - 1], [x, y]); solve(sin(x) - Rational(1, 2), x); solve(log(x) - 1, x)
solve_univariate_inequality(x**2 - 4 < 0, x); reduce_inequalities([x > 1, x < 3], x)
factor(x**4 - 1); expand((x + y)**4); simplify((x**2 - 1)/(x - 1)); apart(1/(x*(x + 1))); cancel((x**2-1)/(x+1))
together(1/x + 1/y); collect(x*y + x, x); trigsimp(sin(x)**2 + cos(x)**2); radsimp(1/(sqrt(2) + 1))
nsimplify(0.5); expand_trig(sin(2*x)); sqrtdenest(sqrt(3 + 2*sqrt(2))); powsimp(x**2*x**3); logcombine(log(x) + log(y))
diff(sin(x)*exp(x), x); integrate(x**2, (x, 0, 1)); integrate(x*exp(x), x); integrate(1/(1 + x**2), x)
limit(sin(x)/x, x, 0); limit((1 + 1/x)**x, x, oo); series(exp(x), x, 0, 4)
summation(k**2, (k, 1, n)); Sum(1/k**2, (k, 1, oo)).doit(); product(k, (k, 1, 5)); summation(k, (k, 1, 10))
m = Matrix([[1, 2], [3, 4]]); m.det(); m.inv(); m.eigenvals(); m.rref(); m.rank(); m.eigenvects(); m.charpoly(x)
isprime(97); factorint(360); divisors(36); gcd(12, 18); lcm(4, 6); totient(36); primerange(1, 20); nextprime(7)
list(primerange(1, 30)); mod_inverse(3, 7); binomial(10, 3); factorial(10); fibonacci(10); sqrt(50); Rational(1, 3)
Point(0, 0).distance(Point(3, 4)); Triangle(Point(0, 0), Point(3, 0), Point(0, 4)).area; Circle(Point(0, 0), 2).area
pi.evalf(30); N(sqrt(2), 20); latex(x/y); str(sqrt(2)/2); sympify('x**2 + 1'); Poly(x**2 + 2*x + 1, x).nroots()
roots(x**3 - 1, x); real_roots(x**3 - x); Poly(x**3 - 2*x + 1).all_coeffs(); resultant(x**2 - 1, x - 2, x); groebner([x*y - 1, x - y])
Piecewise((x, x > 0), (0, True)).subs(x, 2); Abs(-3); floor(Rational(7, 2)); ceiling(2.5); re(1 + I); (1 + I)**4
expand((1 + I)**4); cos(pi/3); tan(pi/4); asin(Rational(1, 2)); rsolve(Function('f')(n) - Function('f')(n - 1) - 1, Function('f')(n))
Interval(0, 1).union(Interval(2, 3)); FiniteSet(1, 2).intersect(FiniteSet(2)); lambdify(x, x**2, 'math')(3); diophantine(x**2 - y**2 - 3)
(x**2 + 3*x).subs(x, 2).evalf(); minimum(x**2, x, Interval(-1, 1)); maximum(-x**2 + x, x, S.Reals); srepr(x + 1)
import numpy as np
np.linalg.solve(np.array([[1., 2.], [3., 4.]]), np.array([1., 2.])); np.roots([1, -3, 2]); np.arange(9).reshape(3, 3) @ np.eye(3)
np.linalg.det(np.eye(3)); np.linalg.eigvals(np.eye(2)); np.linspace(0, 1, 5).sum(); str(np.array([1.5, 2])); np.gcd(4, 6)
from fractions import Fraction; str(Fraction(1, 3) + Fraction(1, 6)); float(Fraction(1, 3))
from decimal import Decimal, getcontext; str(Decimal(1) / Decimal(3)); import statistics; statistics.mean([1, 2, 3])
import itertools, math, re as _re; list(itertools.permutations(range(3))); math.comb(5, 2); _re.findall(r'\\d+', 'a1b22')
from collections import Counter, defaultdict; Counter('abca').most_common(1); f'{math.pi:.4f}'; print(x**2 + 1, m, [sqrt(2)])
"""

WARM_UP_SCIPY = """
from scipy import optimize, integrate, special, stats
optimize.brentq(lambda t: t * t - 2, 0, 2); optimize.fsolve(lambda t: t * t - 2, 1.0)
optimize.minimize(lambda t: (t[0] - 1) ** 2, [0.0]); integrate.quad(lambda t: t, 0, 1); special.comb(5, 2)
stats.norm.cdf(0); stats.binom.pmf(2, 5, 0.5)
"""


class _Bytes(io.RawIOBase):
    """The `.buffer` of the bounded writer."""

    def __init__(self, writer: BoundedWriter) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        raw = bytes(data)
        self._writer.write(raw.decode("utf-8", "replace"))
        return len(raw)


class BoundedWriter(io.TextIOBase):
    """A text stream that keeps what is written, up to a number of characters, in this process."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, on_flood: Callable[[], None]) -> None:
        self._parts: list[str] = []
        self._room = 0
        self._on_flood = on_flood
        self.buffer = _Bytes(self)

    def start(self, accepted: int) -> None:
        """Forget what was written and accept this many characters from now on."""
        self._parts = []
        self._room = accepted

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        """Keep working: the step after the one that closed it prints to it again."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        size = len(text)
        self._room -= size
        if self._room < 0:
            self._on_flood()
        self._parts.append(text)
        return size

    def text(self) -> str:
        return "".join(self._parts)


class _Runner:
    """The loop of one process in the tree; a fork of it is the next state."""

    def __init__(self, channel: socket.socket, parent: int, order: dict, may_write: bool) -> None:
        self.channel = channel
        self.parent = parent
        # where seccomp alone guards files, it refuses every open for writing, this one too
        self.null_flags = os.O_RDWR if may_write else os.O_RDONLY
        problem_id, seed = order["problem_id"], order["seed"]
        self.fork = isolation.SiblingFork()
        self.writer = BoundedWriter(self._flood)
        self.errors = BoundedWriter(self._flood)
        self.nonce = 0
        self.started = 0.0
        self.kept = self.error_bytes = 0
        self.soft_limits = (0, 0)
        module = types.ModuleType("__main__")
        self.namespace = module.__dict__
        self.namespace["__builtins__"] = sys.modules["builtins"]
        sys.modules["__main__"] = module
        random.seed(f"{problem_id}/{seed}")
        numpy_seed = random.Random(f"numpy/{problem_id}/{seed}").getrandbits(32)
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(numpy_seed)
        else:
            sys.meta_path.insert(0, _SeededNumpyRandom(numpy_seed))
        # bound now: user code may replace them in their modules
        self._exit = os._exit
        self._close_range = _close_range
        self._dup2, self._dup, self._open = os.dup2, os.dup, os.open
        self._clock = time.perf_counter
        self._freeze = gc.freeze
        self._setitimer = signal.setitimer
        self._settrace, self._setprofile = sys.settrace, sys.setprofile
        self._die_with_parent = isolation.die_with_parent
        self._set_soft_limits = isolation.set_soft_limits
        self._sys = sys
        self._linecache = linecache.cache
        self._rights_space = socket.CMSG_SPACE(4)

    def serve(self) -> None:
        """Answer spawn orders for ever; a child returns here as a state of its own."""
        channel, fork, exit_now = self.channel, self.fork, self._exit
        rights_space = self._rights_space
        while True:
            order, ancillary, _, _ = channel.recvmsg(16, rights_space)
            if not order:
                exit_now(0)
            if order != SPAWN or not ancillary:
                exit_now(3)
            descriptor = int.from_bytes(ancillary[0][2][:4], "little")
            pid = fork()
            if pid == 0:
                self._become_child(descriptor)
                self._run_step()
            else:
                if pid < 0:
                    channel.send(NO_FORK)
                os.close(descriptor)

    def _become_child(self, descriptor: int) -> None:
        """Give up everything of the parent's before any user code: its channel first."""
        self._dup2(descriptor, isolation.CHANNEL_FD, False)
        self._close_range(0, isolation.CHANNEL_FD)
        self._open("/dev/null", self.null_flags)
        self._dup(0)
        self._dup(0)
        self._die_with_parent(self.parent)
        self.channel.send(HELLO)

    def _read_request(self) -> tuple[tuple, str]:
        first = self.channel.recv(FRAME_BYTES + 4096)
        header = REQUEST.unpack_from(first)
        size = header[8]
        body = [first[REQUEST.size :]]
        received = len(body[0])
        while received < size:
            part = self.channel.recv(FRAME_BYTES + 4096)
            body.append(part)
            received += len(part)
        return header, b"".join(body).decode("utf-8", "surrogatepass")

    def _run_step(self) -> None:
        header, text = self._read_request()
        _, self.nonce, number, self.kept, accepted, self.error_bytes, cpu_s, space, _ = header
        if (cpu_s, space) != self.soft_limits:
            self._set_soft_limits(cpu_s, space)
            self.soft_limits = (cpu_s, space)
        name = f"<step {number}>"
        self._linecache[name] = (len(text), None, text.splitlines(True), name)
        self.writer.start(accepted)
        self.errors.start(accepted)
        self._sys.stdout, self._sys.stderr = self.writer, self.errors
        status, kind, message = OK, "", ""
        self.started = self._clock()
        try:
            # not inherited: this file's own future statements are none of the user's
            exec(compile(text, name, "exec", dont_inherit=True), self.namespace)
        except BaseException as error:
            self._settrace(None)
            self._setprofile(None)
            status, kind, message = _describe(error, self.error_bytes)
            del error
        seconds = self._clock() - self.started
        if status == MEMORY:
            self.namespace.clear()
        self._reply(status, seconds, kind, message)
        if status != OK:
            self._exit(0)
        # a timer set by this step must not end the state while it waits
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            self._setitimer(timer, 0)
        self._settrace(None)
        self._setprofile(None)
        if self._sys.getrecursionlimit() < 1000:
            self._sys.setrecursionlimit(1000)
        self._freeze()

    def _flood(self) -> None:
        # from inside the write: an exception could be caught and the printing go on
        self._reply(OUTPUT_LIMIT, self._clock() - self.started, "", "")
        self._exit(0)

    def _reply(self, status: int, seconds: float, kind: str, message: str) -> None:
        kept, error_bytes = self.kept, self.error_bytes
        whole = self.writer.text()
        output = whole.encode("utf-8", "replace")
        truncated = len(output) > kept
        if truncated:
            output = _head_and_tail(output, kept)
        kind_bytes = kind.encode("utf-8", "replace")[:200]
        message_bytes = message.encode("utf-8", "replace")[:error_bytes]
        lengths = (len(output), len(kind_bytes), len(message_bytes))
        header = REPLY.pack(
            REPLY_MAGIC, self.nonce, status, truncated, seconds, len(whole), *lengths
        )
        message_to_send = header + output + kind_bytes + message_bytes
        for start in range(0, len(message_to_send), FRAME_BYTES):
            self.channel.send(message_to_send[start : start + FRAME_BYTES])


def _head_and_tail(output: bytes, kept: int) -> bytes:
    """Half from the start, half from the end, never splitting a character."""
    mark = f"\n... [{len(output) - kept} bytes cut] ...\n".encode()
    room = max(kept - len(mark), 0)
    head = output[: room - room // 2].decode("utf-8", "ignore").encode()
    tail = output[len(output) - room // 2 :].decode("utf-8", "ignore").encode()
    return (head + mark + tail)[:kept] if room else output[:kept].decode("utf-8", "ignore").encode()


_TYPE_NAME = type.__dict__["__name__"].__get__


def _describe(error: BaseException, error_bytes: int) -> tuple[int, str, str]:
    """Status, type and text of what a step raised; `str(error)` is user code too."""
    # the slots of `type` and `str` themselves: a subclass may have overridden them
    kind = str.__getitem__(_TYPE_NAME(type(error)), slice(200))
    try:
        message = str.__getitem__(str(error), slice(error_bytes))
    except BaseException as inner:
        message = f"<str() of it raised {_TYPE_NAME(type(inner))}>"
    if isinstance(error, MemoryError):
        return MEMORY, kind, message
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        return DENIED, kind, message
    return ERROR, kind, message


_close_range_call = isolation._HELD_SYSCALL


def _close_range(first: int, end: int) -> None:
    """Close descriptors first..end-1 in one call."""
    _close_range_call(436, first, end - 1, 0)


class _SeededNumpyRandom:
    """An import hook: numpy.random costs ten libraries per fork, so it is loaded and seeded on demand."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find_spec(self, name: str, path=None, target=None):
        if name != "numpy.random":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute, seed = spec.loader.exec_module, self._seed

            def execute_and_seed(module: types.ModuleType) -> None:
                execute(module)
                module.seed(seed)

            spec.loader.exec_module = execute_and_seed  # type: ignore[method-assign]
        return spec


def _preload(flavour: str) -> list[str]:
    missing = []
    for name in LEFT_OUT:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in FLAVOUR_MODULES[flavour]:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    scripts = [WARM_UP] if "sympy" in sys.modules and "numpy" in sys.modules else []
    if flavour == "scipy" and "scipy.stats" in sys.modules:
        scripts.append(WARM_UP_SCIPY)
    for script in scripts:
        scope: dict[str, object] = {"__name__": "warm_up"}
        with contextlib.redirect_stdout(io.StringIO()):
            for line in script.strip().splitlines():
                # a library that changed its names costs warmth, not the start
                with contextlib.suppress(Exception):
                    exec(line, scope)
    for name in LEFT_OUT:
        del sys.modules[name]
    return missing


def _become_root(order: dict, locks: isolation.Locks, channel_fd: int, parent: int) -> None:
    """Turn a fork of the zygote into a locked tree root and serve; never returns."""
    os.dup2(channel_fd, isolation.CHANNEL_FD, False)
    os.closerange(3, isolation.RULESET_FD)
    _close_range(isolation.CHANNEL_FD + 1, 1 << 20)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, isolation.CHANNEL_FD)
    # everything the states need is made before the lock; most of it could not be made after
    runner = _Runner(channel, parent, order, may_write=bool(locks.landlock_abi))
    runner.soft_limits = (order["cpu_s"], order["address_space"])
    report, listener = isolation.lock_process(
        locks,
        uid=order["uid"],
        address_space=order["address_space"],
        cpu_s=order["cpu_s"],
        parent=parent,
    )
    with contextlib.suppress(OSError):
        os.close(isolation.RULESET_FD)
    rights = []
    if listener is not None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("<i", listener))]
    channel.sendmsg([ROOT_HELLO + json.dumps(report).encode()], rights)
    if listener is not None:
        os.close(listener)
    gc.freeze()
    try:
        runner.serve()
    finally:
        os._exit(4)


def main() -> None:
    """Entry point of the zygote: warm up, announce readiness, fork a root for each order."""
    control = socket.socket(fileno=int(sys.argv[1]))
    config = json.loads(control.recv(FRAME_BYTES))
    parent = os.getppid()
    isolation.die_with_parent(parent)
    sys.dont_write_bytecode = True
    # an editable install puts its project folder here; states read the interpreter's own folders only
    homes = (sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr/lib", "/usr/local/lib")
    sys.path[:] = [path for path in sys.path if path.startswith(tuple(f"{h}/" for h in homes))]
    missing = _preload(config["flavour"])
    isolation.join_library_data()
    paths = isolation.readable_paths(sys.path)
    # opened now: the file system view to come has no /proc
    threads_fd = os.open("/proc/self/task", os.O_RDONLY)
    size_fd = os.open("/proc/self/statm", os.O_RDONLY)
    mappings_fd = os.open("/proc/self/smaps", os.O_RDONLY)
    reason = "withheld"
    if "namespaces" not in config["withheld"]:
        reason = isolation.namespaces_allowed(paths)
    if not reason:
        isolation.enter_namespaces(paths)
    locks = isolation.build_locks(paths, config["withheld"])
    sys.argv = [""]
    os.environ.clear()
    os.environ.update({"LC_ALL": "C.UTF-8", "HOME": "/", "PATH": ""})
    for name in [name for name in sys.modules if name.split(".")[0] == "verifier"]:
        del sys.modules[name]
    fork = isolation.SiblingFork()
    gc.collect()
    gc.freeze()
    image_bytes = 0
    if "memory_image" not in config["withheld"]:
        image_bytes = memory_image.share_memory_image(mappings_fd)
    os.close(mappings_fd)
    announcement = {
        "missing": missing,
        "namespaces": f"off: {reason}" if reason else "on",
        "landlock_abi": locks.landlock_abi,
        "memory_image_mib": image_bytes >> 20,
        "prefix_open": _prefix_open(),
        "threads": len(os.listdir(threads_fd)),
        "address_space": int(os.pread(size_fd, 100, 0).split()[0]) * resource.getpagesize(),
    }
    os.close(threads_fd)
    os.close(size_fd)
    control.send(READY + json.dumps(announcement).encode())
    while True:
        message, ancillary, _, _ = control.recvmsg(FRAME_BYTES, socket.CMSG_SPACE(4))
        if not message:
            os._exit(0)
        descriptor = struct.unpack("<i", ancillary[0][2][:4])[0]
        if fork() == 0:
            _become_root(json.loads(message), locks, descriptor, parent)
        os.close(descriptor)


def _prefix_open() -> bool:
    """Whether a user without privileges can reach the standard library."""
    current = os.path.dirname(os.__file__)
    while current != "/":
        if not os.stat(current).st_mode & 1:
            return False
        current = os.path.dirname(current)
    return True
