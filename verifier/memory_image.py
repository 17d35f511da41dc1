"""Turns a warm process's private memory into a shared image that its forks need not copy.

A fork copies one page table entry for every private page its parent has touched, 15,000 for a warm
interpreter, and enters the child in the reverse map of every mapping and every living ancestor.
Pages of a file are not copied: they are looked up when touched. So the zygote, once warm, writes
its data pages to an anonymous file and maps that file over them, private and copy-on-write: the
same bytes at the same addresses. A fork is then paid by the pages a lineage has really changed.

Between the copy and the mapping nothing may write to that memory, and an interpreter writes always
(reference counts). Both are therefore done by one short routine of machine code, which touches only
registers and the stack; the stack is left as it is.

Not covered: other machines than x86_64, and hosts that forbid making memory executable; there
nothing is changed and forks cost what they cost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

# long image(const struct {u64 address, length, offset;} *entries, u64 count, u64 fd):
#   for each entry: pwrite64(fd, address, length, offset), or return its number + 1 if short;
#   for each entry: mmap(address, length, READ|WRITE, PRIVATE|FIXED, fd, offset), or ud2;
#   return 0.
_ROUTINE = bytes.fromhex(
    "5355415441554156"  # push rbx, rbp, r12, r13, r14
    "4989fc4989f54989d631db"  # r12 = entries, r13 = count, r14 = fd, rbx = 0
    "4c39eb7329"  # 1: while rbx < r13
    "488d2c5b498d2cec"  # rbp = r12 + 24 * rbx
    "b8120000004c89f7488b7500488b55084c8b55100f05"  # rax = pwrite64(r14, [rbp], [rbp+8], [rbp+16])
    "483b4508754048ffc3ebd2"  # if rax != [rbp+8] goto 4; rbx += 1
    "31db4c39eb733a"  # rbx = 0; 3: while rbx < r13
    "488d2c5b498d2cec"  # rbp = r12 + 24 * rbx
    "b809000000488b7d00488b7508ba0300000041ba120000004d89f04c8b4d100f05"  # rax = mmap(...)
    "483b4500751648ffc3ebc7"  # if rax != [rbp] goto 6; rbx += 1
    "488d4301eb0231c0"  # 4: rax = rbx + 1, goto 7; 5: rax = 0
    "415e415d415c5d5bc3"  # 7: pop r14, r13, r12, rbp, rbx; ret
    "0f0b"  # 6: ud2
)
_LEAST_TOUCHED = 0.25
"""Mappings of which less is in use stay as they are: reserved, not worth writing out."""


def _data_mappings(smaps_fd: int) -> list[tuple[int, int]]:
    """Address and length of each writable private mapping that is in use, the stack excepted."""
    found = []
    start = end = 0
    writable = False
    with open(smaps_fd, encoding="utf-8", errors="replace", closefd=False) as smaps:
        for line in smaps:
            words = line.split()
            if not words[0].endswith(":"):
                first, _, last = words[0].partition("-")
                start, end = int(first, 16), int(last, 16)
                writable = words[1] == "rw-p" and words[-1] not in ("[stack]", "[vvar]")
            elif words[0] == "Anonymous:" and writable:
                touched = int(words[1]) * 1024
                if touched >= _LEAST_TOUCHED * (end - start):
                    found.append((start, end - start))
    return found


def share_memory_image(smaps_fd: int) -> int:
    """Put this single-threaded process's data pages into a shared image; returns its size in bytes.

    0 means that nothing was changed, because the host refused a step on the way.
    Args:
        smaps_fd: this process's /proc/self/smaps, unread.
    """
    try:
        descriptor = os.memfd_create("image", os.MFD_CLOEXEC)
    except OSError:
        return 0
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        code.write(_ROUTINE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        protect = ctypes.CDLL(None).mprotect
        executable = ctypes.c_int(mmap.PROT_READ | mmap.PROT_EXEC)
        if protect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), executable) != 0:
            return 0
        # PYFUNCTYPE keeps the interpreter lock: nothing of the interpreter runs during the call
        routine = ctypes.PYFUNCTYPE(
            ctypes.c_long, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64
        )(address)
        mappings = _data_mappings(smaps_fd)
        entries = bytearray()
        offset = 0
        for start, length in mappings:
            entries += struct.pack("<QQQ", start, length, offset)
            offset += length
        os.ftruncate(descriptor, offset)
        buffer = (ctypes.c_char * len(entries)).from_buffer(entries)
        failed = routine(ctypes.addressof(buffer), len(mappings), descriptor)
        return 0 if failed else offset
    finally:
        os.close(descriptor)
