"""What runs inside the sandbox: the warm zygote, the tree roots and the states forked from them.

    zygote  --fork-->  root (locks itself)  --fork-->  state  --fork-->  state ...
                             each one: wait for a spawn order, fork; the child runs one step,
                             replies, waits

This file is the main program of a fresh interpreter (`sandbox_interpreter`). It holds no secret
and is not trusted after the first user step: user code shares its address space and may rewrite any
of it. All it could gain is to lie about its own node and its descendants; limits, exits and forks
are judged by the supervisor and the kernel.

Care taken so that honest programs behave as one long program would:
* functions here look up builtins in a private copy, so `builtins.len = None` breaks only its
  author;
* one writer object serves a whole lineage, so a reference to `sys.stdout` kept from an earlier step
  works;
* no at-fork hook runs (see `isolation.sibling_fork`): random state carries over, siblings start
  equal.

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
from pathlib import Path

from verifier import isolation, memory_image, sandbox_warm_up
from verifier.sandbox_wire import (
    DENIED,
    ERROR,
    FRAME_BYTES,
    HELLO,
    MEMORY,
    NO_FORK,
    OK,
    OUTPUT_LIMIT,
    READY,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    ROOT_HELLO,
    SPAWN,
    TWIN,
)

REHEARSALS = 40
"""CPython 3.11 specialises a function after 8 calls, and its instructions after a few more."""


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

    def __init__(
        self, channel: socket.socket, parent: int, namespace: dict, may_write: bool
    ) -> None:
        self.channel = channel
        self.parent = parent
        self.namespace = namespace
        # where seccomp alone guards files, it refuses every open for writing, this one too
        self.null_flags = os.O_RDWR if may_write else os.O_RDONLY
        self.fork = isolation.sibling_fork()
        self.writer = BoundedWriter(self._flood)
        self.errors = BoundedWriter(self._flood)
        self.nonce = 0
        self.started = 0.0
        self.kept = self.error_bytes = 0
        self.soft_limits = (0, 0)
        # bound now: user code may replace them in their modules
        self._exit = os._exit
        self._leave_parent = isolation.leave_parent
        self._clock = time.perf_counter
        self._freeze = gc.freeze
        self._setitimer = signal.setitimer
        self._settrace, self._setprofile = sys.settrace, sys.setprofile
        self._set_soft_limits = isolation.set_soft_limits
        self._sys = sys
        self._linecache = linecache.cache
        self._rights_space = socket.CMSG_SPACE(4)

    def serve(self) -> None:
        """Answer spawn orders for ever; a child returns here as a state of its own."""
        channel, fork, exit_now = self.channel, self.fork, self._exit
        leave_parent, run_step = self._leave_parent, self.run_step
        null_flags, parent, rights_space = self.null_flags, self.parent, self._rights_space
        while True:
            order, ancillary, _, _ = channel.recvmsg(16, rights_space)
            if not order:
                exit_now(0)
            if order != SPAWN or not ancillary:
                exit_now(3)
            descriptor = ancillary[0][2][0]  # below the limit of descriptors, which is one byte
            pid = fork()
            if pid == 0:
                # the parent's channel goes first of all
                if not leave_parent(descriptor, null_flags, parent):
                    exit_now(1)
                channel.send(HELLO)
                run_step()
            else:
                if pid < 0:
                    channel.send(NO_FORK)
                os.close(descriptor)

    def _read_request(self) -> tuple[tuple, str]:
        request = self.channel.recv(FRAME_BYTES + 4096)
        header = REQUEST.unpack_from(request)
        while len(request) < REQUEST.size + header[8]:
            request += self.channel.recv(FRAME_BYTES + 4096)
        return header, request[REQUEST.size :].decode("utf-8", "surrogatepass")

    def run_step(self) -> None:
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


def _new_main() -> dict:
    """The namespace of a fresh `__main__`."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = module
    return module.__dict__


def _seed_random(problem_id: str, seed: int) -> None:
    name = f"{problem_id.partition(TWIN)[0]}/{seed}"
    random.seed(name)
    numpy_seed = random.Random(f"numpy/{name}").getrandbits(32)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(numpy_seed)
    else:
        sys.meta_path.insert(0, _SeededNumpyRandom(numpy_seed))


_close_range_call = isolation.HELD_SYSCALL


def _close_range(first: int, end: int) -> None:
    """Close descriptors first..end-1 in one call."""
    _close_range_call(436, first, end - 1, 0)


class _SeededNumpyRandom:
    """An import hook: numpy.random (ten libraries per fork) is loaded and seeded on demand."""

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


def _preload(flavour: str) -> tuple[list[str], list[str]]:
    """Import and warm up; the modules that are not installed and the warm-up lines that failed."""
    missing, failed = [], []
    left_out = sandbox_warm_up.LEFT_OUT if flavour == "base" else ()  # scipy cannot do without
    for name in left_out:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in sandbox_warm_up.FLAVOUR_MODULES[flavour]:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    scripts = []
    if "sympy" in sys.modules and "numpy" in sys.modules:
        scripts.append(sandbox_warm_up.BASE)
    if flavour == "scipy" and "scipy.stats" in sys.modules:
        scripts.append(sandbox_warm_up.SCIPY)
    for script in scripts:
        scope: dict[str, object] = {"__name__": "warm_up"}
        for line in script.strip().splitlines():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(line, scope)
            except Exception as error:
                failed.append(f"{line}: {error!r}")
    for name in left_out:
        del sys.modules[name]
    return missing, failed


def _rehearse() -> None:
    """Run the way of a step in the zygote, until nothing about it is new.

    The interpreter notes in its own memory what it learns of code that it runs: specialised
    instructions, attribute caches, bound symbols. States find that in the image instead of
    learning it again, each on a copied page.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = b"x = 6 * 7\nprint(x)"
    request = REQUEST.pack(b"", 0, 0, 1024, 1024, 1024, 0, 0, len(code)) + code
    standard = sys.stdout, sys.stderr
    with ours, theirs:
        runner = _Runner(theirs, 0, {"__builtins__": sys.modules["builtins"]}, may_write=True)
        for _ in range(REHEARSALS):
            ours.send(request)
            runner.run_step()
            ours.recv(FRAME_BYTES)
    sys.stdout, sys.stderr = standard
    linecache.cache.clear()


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
    runner = _Runner(channel, parent, _new_main(), may_write=bool(locks.landlock_abi))
    _seed_random(order["problem_id"], order["seed"])
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
    # a step's own limits bound long conversions; the guard of 4,300 digits would end honest ones
    sys.set_int_max_str_digits(0)
    # an editable install puts its project folder here; states read only the interpreter's own
    homes = (sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr/lib", "/usr/local/lib")
    sys.path[:] = [path for path in sys.path if path.startswith(tuple(f"{h}/" for h in homes))]
    missing, failed = _preload(config["flavour"])
    isolation.join_library_mappings()
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
    # a numerical library that a step loads must not try to start threads: it would end the process
    os.environ.update(isolation.SINGLE_THREADED)
    for name in [name for name in sys.modules if name.split(".")[0] == "verifier"]:
        del sys.modules[name]
    fork = isolation.sibling_fork()
    gc.collect()
    _rehearse()
    gc.freeze()
    image_bytes = 0
    if "memory_image" not in config["withheld"]:
        image_bytes = memory_image.share_memory_image(mappings_fd)
    os.close(mappings_fd)
    announcement = {
        "missing": missing,
        "failed": failed,
        "namespaces": f"off: {reason}" if reason else "on",
        "landlock_abi": locks.landlock_abi,
        "memory_image_mib": image_bytes >> 20,
        "prefix_open": _prefix_open(),
        "threads": len(os.listdir(threads_fd)),  # noqa: PTH208 - a descriptor, not a path
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
    return all(folder.stat().st_mode & 1 for folder in Path(os.__file__).parents)
