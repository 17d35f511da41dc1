"""The seccomp program, instruction by instruction, and the list of readable paths."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path

import pytest

from verifier import isolation

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, NOTIFY, KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
EPERM, ENOSYS, EACCES = (0x50000 | n for n in (errno.EPERM, errno.ENOSYS, errno.EACCES))


def _verdict(program: bytes, number: int, *arguments: int, arch: int = X86_64) -> int:
    """Run the filter as the kernel would on one system call."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *padded)
    code = [struct.unpack_from("<HBBI", program, offset) for offset in range(0, len(program), 8)]
    accumulator, position = 0, 0
    while True:
        operation, if_true, if_false, value = code[position]
        position += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x06:
            return value
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[operation]
            position += if_true if holds else if_false


STRICT = isolation.seccomp_program(supervised=True, writes_confined=True)
PLAIN = isolation.seccomp_program(supervised=False, writes_confined=False)


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (0, (), ALLOW),  # read
        (1, (), ALLOW),  # write
        (257, (0, 0, os.O_RDONLY), ALLOW),  # openat
        (41, (), EPERM),  # socket
        (53, (), EPERM),  # socketpair
        (42, (), EPERM),  # connect
        (59, (), EPERM),  # execve
        (57, (), EPERM),  # fork
        (58, (), EPERM),  # vfork
        (62, (), EPERM),  # kill
        (101, (), EPERM),  # ptrace
        (90, (), EPERM),  # chmod
        (22, (), EPERM),  # pipe
        (317, (), EPERM),  # seccomp
        (425, (), EPERM),  # io_uring_setup
        (999, (), EPERM),  # not yet invented
        (-1, (), EPERM),
        (56, (isolation.FORK_FLAGS,), NOTIFY),
        (56, (isolation.FORK_FLAGS | 1 << 32,), EPERM),
        (56, (17,), EPERM),  # glibc fork without CLONE_PARENT
        (56, (0x3D0F00,), EPERM),  # a thread
        (435, (), ENOSYS),  # clone3
        (437, (), ENOSYS),  # openat2
        (9, (0, 0, 3, 0x22), ALLOW),  # private anonymous
        (9, (0, 0, 3, 0x21), EPERM),  # shared anonymous
        (9, (0, 0, 1, 0x03), EPERM),  # shared, validated
        (302, (0, 7), ALLOW),  # prlimit64 of oneself
        (302, (1234, 7), EPERM),
        (16, (0, 0x5401), ALLOW),  # TCGETS
        (16, (0, 0x5412), EPERM),  # TIOCSTI
        (72, (0, 3), ALLOW),  # F_GETFL
        (72, (0, 8), EPERM),  # F_SETOWN
        (157, (1, 9), ALLOW),  # PR_SET_PDEATHSIG, SIGKILL
        (157, (1, 0), EPERM),  # clearing it
        (157, (4, 1), EPERM),  # PR_SET_DUMPABLE
        (157, (39,), ALLOW),  # PR_GET_NO_NEW_PRIVS
        (0x40000000 + 41, (), EPERM),  # x32
    ],
)
def test_strict_program_judges_each_call(number, arguments, expected):
    assert _verdict(STRICT, number, *arguments) == expected


def test_other_architectures_are_killed():
    assert _verdict(STRICT, 0, arch=I386) == KILL


def test_program_without_landlock_refuses_to_open_for_writing():
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_TRUNC):
        assert _verdict(PLAIN, 257, 0, 0, flags) == EACCES
        assert _verdict(PLAIN, 2, 0, flags) == EACCES
    assert _verdict(PLAIN, 257, 0, 0, os.O_RDONLY) == ALLOW
    assert _verdict(PLAIN, 85) == EPERM  # creat


def test_program_without_supervision_lets_through_only_forks_with_our_parent():
    assert _verdict(PLAIN, 56, isolation.FORK_FLAGS) == ALLOW
    assert _verdict(PLAIN, 56, 17) == EPERM


def test_readable_paths_hold_the_interpreter_and_no_home_or_project():
    paths = isolation.readable_paths([*sys.path[1:], ""])
    stdlib = str(Path(os.__file__).parent)
    assert any(stdlib == path or stdlib.startswith(path + "/") for path in paths)
    assert "/" not in paths
    assert all(path.startswith("/") and Path(path).exists() for path in paths)
    nested = [p for p in paths if any(p.startswith(q + "/") for q in paths)]
    assert nested == []


def test_machine_is_named_when_it_is_not_supported(monkeypatch):
    monkeypatch.setattr(isolation.platform, "machine", lambda: "riscv64")
    assert "riscv64" in isolation.machine_supported()
