"""What locks a tree root before untrusted code runs: raw system calls of Linux on x86_64.

Two moments, both before user code:

    zygote, once:      enter_namespaces()  own mount, network, IPC and host name; only the
    interpreter
                                           and its libraries are left in the file system
                       build_locks()       Landlock rules and the seccomp program, built once
    tree root, once:   lock_process()      session, rlimits, uid and capabilities, no_new_privs,
                                           Landlock, seccomp; every state of the tree inherits them

Nothing is done per step: Landlock stacks 16 layers at most, and seccomp programs add up.

The seccomp program is an allow-list. Processes can be made only by `clone` with exactly the flags
of `sibling_fork`, and that call is held by the kernel until the supervisor permits it (user
notification); every other form of fork, vfork, clone, clone3 and every thread is refused in the
kernel. CLONE_PARENT makes each state a child of the supervisor, so its exit status, CPU time
and memory come from `wait4` in the supervisor, and no state can have children of its own.

Not covered: bugs of the kernel itself; time, `os.urandom` and object addresses stay visible; `stat`
on paths when neither namespaces nor Landlock's hidden files apply (a path's existence shows, never
its content); CPU and cache side channels; the total memory of many states (the supervisor evicts,
the kernel does not cap it). For hostile code run the pod itself without network, secrets and root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import resource
import struct
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SINGLE_THREADED = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
"""Environment that keeps numerical libraries from starting threads, which states may not have."""

# fork, seccomp notification and the allow-list are written for this machine's system call numbers
SUPPORTED_MACHINE = "x86_64"

RULESET_FD = 62
CHANNEL_FD = 63
"""The one descriptor of a state besides 0, 1, 2; also the soft limit on descriptors less one."""

REQUIRED_LAYERS = (
    "rlimits",
    "capabilities",
    "no_new_privs",
    "landlock",
    "seccomp",
    "fork_supervision",
)
"""Without one of these `strict` refuses to start."""

_LIBC = ctypes.CDLL(None, use_errno=True)
# PyDLL keeps the interpreter lock over the call, so that a fork never copies a released one
HELD_SYSCALL = ctypes.PyDLL(None).syscall
HELD_SYSCALL.restype = ctypes.c_long

_SYS_CLONE = 56
_SYS_PIVOT_ROOT = 155
_SYS_SECCOMP = 317
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_SYS_CAPSET = 126

_SIGCHLD = 17
_CLONE_PARENT, _CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = 0x8000, 0x200000, 0x1000000
FORK_FLAGS = _CLONE_PARENT | _CLONE_CHILD_CLEARTID | _CLONE_CHILD_SETTID | _SIGCHLD

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_NO_NEW_PRIVS, _PR_GET_TID_ADDRESS, _PR_CAP_AMBIENT = 38, 40, 47
_ADDR_NO_RANDOMIZE = 0x0040000

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 32, 4096
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_MNT_DETACH = 2


class LayerError(OSError):
    """A layer could not be set up; the message names the system call."""


def _call(name: str, *arguments: object, label: str = "") -> int:
    """Call a function of the C library; whole numbers go as the 64 bits of a register.

    Raises:
        LayerError: it returned less than 0; the message begins with label or name.
    """
    function = getattr(_LIBC, name)
    function.restype = ctypes.c_long
    result = function(*(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise LayerError(number, f"{label or name}: {os.strerror(number)}")
    return int(result)


def _syscall(label: str, number: int, *arguments: object) -> int:
    return _call("syscall", number, *arguments, label=label)


def _prctl(option: int, *arguments: int) -> int:
    return _call("prctl", option, *(*arguments, 0, 0, 0, 0)[:4])


# --------------------------------------------------------------------------- fork


_DEAD_CELL = ctypes.c_int(0)


def sibling_fork() -> Callable[[], int]:
    """What forks this single-threaded process into a sibling: the child of our parent, not of us.

    The raw call skips CPython's at-fork hooks on purpose: with one thread there is nothing to
    repair, the `random` module is not reseeded (a seed set in step 1 still holds in step 2), and
    hooks registered by user code do not run. The kernel writes the child's thread id to where glibc
    keeps it, as glibc's own fork does.

    Returns:
        To be called for the child's pid in the parent, 0 in the child, -1 when the kernel refused.
    """
    tid_address = ctypes.c_ulong(0)
    with contextlib.suppress(LayerError):
        _call("prctl", _PR_GET_TID_ADDRESS, ctypes.byref(tid_address))
    if not tid_address.value:
        # without CONFIG_CHECKPOINT_RESTORE the address is unknown: write it to a dead cell
        tid_address.value = ctypes.addressof(_DEAD_CELL)
    return functools.partial(HELD_SYSCALL, _SYS_CLONE, FORK_FLAGS, 0, 0, tid_address, 0)


_OPEN_CALL, _DUP_CALL, _GETPPID_CALL, _PRCTL_CALL, _DUP3_CALL = 2, 32, 110, 157, 292
_CLOSE_RANGE_CALL = 436
_NULL_DEVICE = ctypes.c_char_p(b"/dev/null")


def leave_parent(descriptor: int, null_flags: int, parent: int, _call=HELD_SYSCALL) -> bool:
    """In a new state, before any user code: give up what it has of the state it was forked from.

    Its own channel and /dev/null stay open, nothing else, and it ends when the supervisor does.
    Raw calls on whole numbers, because every Python object that is touched here costs every step
    the copy of a page.
    Args:
        descriptor: the state's channel, to become `CHANNEL_FD`.
        null_flags: /dev/null is opened with these. parent: pid of the supervisor.
    Returns:
        Whether all of it was done; if not, the state must end.
    """
    return (
        _call(_DUP3_CALL, descriptor, CHANNEL_FD, os.O_CLOEXEC) == CHANNEL_FD
        and _call(_CLOSE_RANGE_CALL, 0, CHANNEL_FD - 1, 0) == 0
        and _call(_OPEN_CALL, _NULL_DEVICE, null_flags) == 0
        and _call(_DUP_CALL, 0) == 1
        and _call(_DUP_CALL, 0) == 2
        and _call(_PRCTL_CALL, _PR_SET_PDEATHSIG, 9, 0, 0, 0) == 0
        and _call(_GETPPID_CALL) == parent
    )


def die_with_parent(expected_parent: int) -> None:
    """Ask for SIGKILL when our parent ends; end at once if it already has.

    Raises:
        LayerError: prctl refused.
    """
    _prctl(_PR_SET_PDEATHSIG, 9)
    if expected_parent and os.getppid() != expected_parent:
        os._exit(1)


def join_library_mappings() -> None:
    """Leave each library two mappings where it can be: one to write, one to read and execute.

    A fork pays for every mapping, and again for every living ancestor. What the libraries protect
    beyond that (relocations from being overwritten, constants from being executed) is protection
    from a bug, which means nothing where the code may do as it likes with its own memory.
    """
    _join_mappings(("r--p",), ("rw-p",), 3)
    _join_mappings(("r--p", "r-xp"), ("r--p", "r-xp"), 5)


def _join_mappings(left: Sequence[str], right: Sequence[str], protection: int) -> None:
    """Protect neighbours of one file alike, so that the kernel makes them one mapping."""
    previous = None
    with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as maps:
        rows = [line.split(maxsplit=5) for line in maps]
    for row in rows:
        start, end = (int(address, 16) for address in row[0].split("-"))
        name = row[5] if len(row) == 6 else ""
        if previous and name.startswith("/") and row[1] in right:
            first, last, kind, neighbour = previous
            if (last, neighbour) == (start, name) and kind in left:
                # a host may forbid it: then it stays as it is
                with contextlib.suppress(LayerError):
                    _call("mprotect", first, end - first, protection)
        previous = start, end, row[1], name


def fixed_addresses() -> bool:
    """No address randomisation in the programs this process will start; False if refused."""
    try:
        current = _call("personality", 0xFFFFFFFF)
        _call("personality", current | _ADDR_NO_RANDOMIZE)
    except LayerError:
        return False
    return True


def become_subreaper() -> None:
    """Orphans of our descendants become our children, so none can stay behind unseen."""
    _prctl(36, 1)


def effective_capabilities() -> int:
    """The effective capability set of this process as a bit mask; 0 when it cannot be read."""
    with Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 5, 6, 7, 21


# --------------------------------------------------------------------------- seccomp

_LD_WORD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_RET_ALLOW, _RET_NOTIFY, _RET_KILL, _RET_ERRNO = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x00050000
_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000

_ALLOWED = (
    # files that are already open, and reading: Landlock decides which paths
    *(0, 1, 2, 3, 4, 5, 6, 7, 8, 17, 19, 20, 21, 23, 32, 33, 89, 217, 221, 257, 262, 267),
    *(269, 270, 271, 292, 295, 327, 332, 436, 439, 78, 79, 80, 81, 95, 137, 138),
    # own memory
    *(10, 11, 12, 25, 26, 27, 28),
    # own signals, timers and sleep
    *(13, 14, 15, 34, 35, 36, 37, 38, 127, 128, 130, 131, 219, 230),
    # the channel (no socket can be made, so there is no other)
    *(44, 45, 46, 47, 51, 55),
    # asking about oneself, time and randomness
    *(24, 39, 63, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 111, 115, 118, 120, 121, 124),
    *(140, 143, 145, 158, 160, 186, 201, 202, 204, 218, 228, 229, 273, 309, 318, 334),
    # ending
    *(60, 61, 231, 247),
)
_MMAP, _IOCTL, _FCNTL, _PRCTL, _CLONE, _CLONE3 = 9, 16, 72, 157, 56, 435
_OPEN, _OPENAT, _OPENAT2, _PRLIMIT = 2, 257, 437, 302
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
_FCNTLS = (0, 1, 2, 3, 4, 1030)
_PRCTL_READS = (2, 3, 15, 16, 21, 23, 39)
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Instruction = tuple[int, int, int, int]


def _argument(index: int, high: bool = False) -> Instruction:
    return (_LD_WORD, 0, 0, 16 + 8 * index + (4 if high else 0))


def _errno(number: int) -> Instruction:
    return (_RET, 0, 0, _RET_ERRNO | number)


_ALLOW: Instruction = (_RET, 0, 0, _RET_ALLOW)
_REFUSE = _errno(errno.EPERM)


def _only_if_one_of(index: int, values: Iterable[int]) -> list[Instruction]:
    block = [_argument(index)]
    for value in values:
        block += [(_JEQ, 0, 1, value), _ALLOW]
    return [*block, _REFUSE]


def seccomp_program(supervised: bool, writes_confined: bool) -> bytes:
    """The filter as an array of `struct sock_filter`.

    Args:
        supervised: hold permitted forks for the supervisor; otherwise let them through.
        writes_confined: Landlock stands behind `open`; otherwise refuse any `open` for writing.
    """
    fork_verdict: Instruction = (_RET, 0, 0, _RET_NOTIFY if supervised else _RET_ALLOW)
    special: dict[int, list[Instruction]] = {
        _CLONE: [
            _argument(0, high=True),
            (_JEQ, 1, 0, 0),
            _REFUSE,
            _argument(0),
            (_JEQ, 0, 1, FORK_FLAGS),
            fork_verdict,
            _REFUSE,
        ],
        # ENOSYS, not EPERM: the C library then falls back to calls whose flags can be seen
        _CLONE3: [_errno(errno.ENOSYS)],
        _OPENAT2: [_errno(errno.ENOSYS)],
        # MAP_SHARED (bit 0 of every shared kind) would let siblings share memory
        _MMAP: [_argument(3), (_JSET, 0, 1, 1), _REFUSE, _ALLOW],
        _IOCTL: _only_if_one_of(1, _IOCTLS),
        _FCNTL: _only_if_one_of(1, _FCNTLS),
        # on another process it would change that process's limits
        _PRLIMIT: [_argument(0), (_JEQ, 0, 1, 0), _ALLOW, _REFUSE],
        _PRCTL: [
            _argument(0),
            (_JEQ, 0, 4, _PR_SET_PDEATHSIG),
            _argument(1),
            (_JEQ, 0, 1, 9),
            _ALLOW,
            _REFUSE,
            *_only_if_one_of(0, _PRCTL_READS),
        ],
    }
    if not writes_confined:
        no_writing = (_JSET, 0, 1, _WRITE_FLAGS)
        special[_OPEN] = [_argument(1), no_writing, _errno(errno.EACCES), _ALLOW]
        special[_OPENAT] = [_argument(2), no_writing, _errno(errno.EACCES), _ALLOW]
    program: list[Instruction] = [
        (_LD_WORD, 0, 0, 4),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        (_RET, 0, 0, _RET_KILL),
        (_LD_WORD, 0, 0, 0),
        (_JGE, 0, 1, _X32_BIT),
        _REFUSE,
    ]
    for number, block in special.items():
        program += [(_JEQ, 0, len(block), number), *block]
    for number in _ALLOWED:
        if number not in special:
            program += [(_JEQ, 0, 1, number), _ALLOW]
    program.append(_REFUSE)
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _install_filter(code: bytes, listener: bool) -> int | None:
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    flags = 8 if listener else 0
    result = _syscall("seccomp", _SYS_SECCOMP, 1, flags, ctypes.byref(program))
    return result if listener else None


NOTIFICATION = struct.Struct("<QIIiIQ6Q")
"""struct seccomp_notif: id, pid, flags, nr, arch, instruction pointer, six arguments."""
NOTIFICATION_REPLY = struct.Struct("<QqiI")
NOTIFICATION_RECEIVE, NOTIFICATION_SEND = 0xC0502100, 0xC0182101
NOTIFICATION_CONTINUE = 1


# --------------------------------------------------------------------------- Landlock

_FS_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_FS_READ_FILE, _FS_READ_DIR, _FS_WRITE_FILE = 4, 8, 2


def landlock_abi() -> int:
    """The Landlock version of this kernel; 0 when it is missing or refused."""
    try:
        return _syscall("landlock", _SYS_LANDLOCK_CREATE, None, 0, 1)
    except LayerError:
        return 0


def _landlock_ruleset(readable: Sequence[str], abi: int) -> int:
    file_rights = _FS_RIGHTS_BY_ABI[max(known for known in _FS_RIGHTS_BY_ABI if known <= abi)]
    attributes = struct.pack("<QQQ", file_rights, 3, 3)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _syscall("landlock_create_ruleset", _SYS_LANDLOCK_CREATE, attributes, size, 0)
    rules = [(path, _FS_READ_FILE | _FS_READ_DIR) for path in readable]
    rules += [("/dev/null", _FS_READ_FILE | _FS_WRITE_FILE), ("/dev/urandom", _FS_READ_FILE)]
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if not Path(path).is_dir():
                rights &= ~_FS_READ_DIR
            rule = struct.pack("<Qi", rights, descriptor)
            _syscall("landlock_add_rule", _SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
        finally:
            os.close(descriptor)
    return ruleset


# --------------------------------------------------------------------------- namespaces


def readable_paths(search_path: Sequence[str]) -> list[str]:
    """What user code may read: the interpreter, its libraries, the C libraries, time zones.

    Args:
        search_path: `sys.path` of the interpreter that will run the code.
    """
    candidates = [path for path in search_path if path]
    candidates += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")]
    library = sysconfig.get_config_var("LIBDIR")
    if library and sysconfig.get_config_var("Py_ENABLE_SHARED"):
        name = sysconfig.get_config_var("INSTSONAME") or ""
        candidates.append(f"{library}/{name}")
    candidates += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    candidates += ["/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    # os.access: a path we may not even look at is none for the code either
    existing = {path for path in candidates if path.startswith("/") and os.access(path, os.F_OK)}
    existing |= {os.path.realpath(path) for path in existing}
    kept: list[str] = []
    for path in sorted(existing - {"/"}, key=lambda name: (len(name), name)):
        if not any(path.startswith(parent + "/") for parent in kept):
            kept.append(path)
    return kept


def _bind_read_only(source: str, target: str) -> None:
    _call("mount", source.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)
    held = os.statvfs(target).f_flag
    flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | (held & (2 | 4 | 8 | 1024 | 2048))
    if held & 4096:
        flags |= 1 << 21
    if not source.endswith("/dev/null"):
        flags |= _MS_NOSUID
    _call("mount", None, target.encode(), None, flags, None)


def _replace_file_system(paths: Sequence[str]) -> None:
    """Leave only `paths` and three devices visible, all of it read-only."""
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    base = "/tmp"
    flags = _MS_NOSUID | _MS_NODEV
    _call("mount", b"tmpfs", base.encode(), b"tmpfs", flags, b"size=1m,mode=755")
    Path(base, ".host").mkdir()
    os.chdir(base)
    _syscall("pivot_root", _SYS_PIVOT_ROOT, b".", b".host")
    os.chdir("/")
    os.umask(0o022)
    for path in (*paths, "/dev/null", "/dev/urandom"):
        # a link's target is bound too, so the old root never shows through it
        source = "/.host" + os.path.realpath(path) if path.startswith("/dev") else "/.host" + path
        if Path("/.host" + path).is_symlink():
            source = _resolve_below("/.host", path)
        if Path(source).is_dir():
            Path(path).mkdir(parents=True, exist_ok=True)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch(0o644)
        _bind_read_only(source, path)
    _call("umount2", b"/.host", _MNT_DETACH)
    Path("/.host").rmdir()
    _call("mount", None, b"/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None)


def _resolve_below(root: str, path: str, depth: int = 16) -> str:
    """Follow links of `path` as they read from inside `root`."""
    parts = [part for part in path.split("/") if part]
    resolved = ""
    while parts:
        part = parts.pop(0)
        current = os.path.normpath(f"{resolved}/{part}")
        if Path(root + current).is_symlink():
            if depth == 0:
                raise LayerError(errno.ELOOP, f"too many links in {path}")
            depth -= 1
            target = str(Path(root + current).readlink())
            parts = [piece for piece in target.split("/") if piece] + parts
            resolved = "" if target.startswith("/") else resolved
        else:
            resolved = "" if current == "/" else current
    return root + resolved


def enter_namespaces(paths: Sequence[str]) -> None:
    """Own network, IPC and host name, and a file system of only `paths`, for us and our kin.

    As an ordinary user a user namespace comes first; it maps only that user to itself.
    Raises:
        LayerError, OSError: the host does not allow it; the process may then be half changed, so
            try in a child first (`namespaces_allowed`).
    """
    flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if effective_capabilities() >> CAP_SYS_ADMIN & 1:
        _call("unshare", flags)
    elif user == 0:
        # a user namespace would map root only, and trees could no longer become other users
        raise LayerError(errno.EPERM, "root without CAP_SYS_ADMIN")
    else:
        _call("unshare", flags | _CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    _replace_file_system(paths)


def namespaces_allowed(paths: Sequence[str]) -> str:
    """Try `enter_namespaces` in a child: an empty string when it works, else the reason."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        reason = "unknown"
        try:
            enter_namespaces(paths)
            reason = ""
        except OSError as error:
            reason = str(error)
        finally:
            os.write(writer, reason.encode()[:500])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        reason_text = stream.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return reason_text or ("" if status == 0 else f"the trial ended with status {status}")


# --------------------------------------------------------------------------- the lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Locks:
    """What `build_locks` prepared in the zygote for every tree root."""

    ruleset_fd: int | None
    landlock_abi: int
    supervised_program: bytes
    plain_program: bytes
    withheld: frozenset[str]
    """Layers left out on purpose, to test what happens where a host lacks them."""


def build_locks(readable: Sequence[str], withheld: Iterable[str] = ()) -> Locks:
    """Landlock rules and seccomp programs, made once in the zygote."""
    left_out = frozenset(withheld)
    abi = 0 if "landlock" in left_out else landlock_abi()
    ruleset = None
    if abi:
        try:
            ruleset = _landlock_ruleset(readable, abi)
            os.dup2(ruleset, RULESET_FD, False)
            os.close(ruleset)
            ruleset = RULESET_FD
        except LayerError:
            abi = 0
    return Locks(
        ruleset_fd=ruleset,
        landlock_abi=abi,
        supervised_program=seccomp_program(supervised=True, writes_confined=bool(abi)),
        plain_program=seccomp_program(supervised=False, writes_confined=bool(abi)),
        withheld=left_out,
    )


def set_resource_limits(address_space: int, cpu_s: int) -> None:
    """The kernel's own limits of a state; the supervisor's deadlines come first.

    Args:
        address_space: bytes, hard. cpu_s: whole seconds, soft.
    """
    hard_limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: CHANNEL_FD + 1,
        resource.RLIMIT_AS: address_space,
        resource.RLIMIT_STACK: 64 << 20,
    }
    for kind, value in hard_limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    set_soft_limits(cpu_s, address_space)


def set_soft_limits(cpu_s: int, address_space: int) -> None:
    """Set this process's soft limits of CPU (whole seconds) and address space (bytes)."""
    for kind, value in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, address_space)):
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (soft, hard))


def _drop_capabilities(uid: int | None) -> None:
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except LayerError:
            break
    with contextlib.suppress(LayerError):
        _prctl(_PR_CAP_AMBIENT, 4)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("<Ii", 0x20080522, 0)
    _syscall("capset", _SYS_CAPSET, header, bytes(24))


def lock_process(
    locks: Locks, *, uid: int | None, address_space: int, cpu_s: int, parent: int
) -> tuple[dict[str, str], int | None]:
    """Lock this process and all it will fork. Call once, in a tree root, before user code.

    Args:
        uid: user and group to become (None keeps the present ones, without capabilities).
        parent: pid of the supervisor, whose end is also ours.
    Returns:
        layer -> "on" or the reason it is off, and the fork listener to hand to the supervisor.
    """
    report: dict[str, str] = {}

    def attempt(layer: str, action, *arguments):
        if layer in locks.withheld:
            report[layer] = "off: withheld"
            return None
        try:
            result = action(*arguments)
        except (OSError, ValueError) as error:
            report[layer] = f"off: {error}"
            return None
        report[layer] = "on"
        return result

    attempt("session", os.setsid)
    attempt("rlimits", set_resource_limits, address_space, cpu_s)
    attempt("capabilities", _drop_capabilities, uid)
    if uid is not None:
        report["uid"] = "on" if os.getuid() == uid else "off: " + report["capabilities"]
    _prctl(_PR_SET_DUMPABLE, 0)
    die_with_parent(parent)
    attempt("no_new_privs", _prctl, _PR_SET_NO_NEW_PRIVS, 1)
    if locks.ruleset_fd is None:
        report["landlock"] = "off: " + (
            "withheld" if "landlock" in locks.withheld else "not in this kernel"
        )
    else:
        restrict = ("landlock_restrict_self", _SYS_LANDLOCK_RESTRICT, locks.ruleset_fd, 0)
        attempt("landlock", _syscall, *restrict)
    listener = None
    if "seccomp" not in locks.withheld:
        listener = attempt("fork_supervision", _install_filter, locks.supervised_program, True)
    else:
        report["fork_supervision"] = "off: needs seccomp"
    if listener is not None:
        report["seccomp"] = "on"
    else:
        attempt("seccomp", _install_filter, locks.plain_program, False)
    return report, listener


def machine_supported() -> str:
    """An empty string where the sandbox can run, else the reason why not."""
    if platform.system() != "Linux" or platform.machine() != SUPPORTED_MACHINE:
        return f"needs Linux on {SUPPORTED_MACHINE}, not {platform.system()} {platform.machine()}"
    return ""
