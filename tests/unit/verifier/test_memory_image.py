"""The machine code routine, in a process of its own, which is all that a mistake could end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from verifier import memory_image

SCRIPT = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("memory_image", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
table = {n: str(n) * 10 for n in range(50_000)}
big = bytearray(os.urandom(1 << 20))
copy = bytes(big)
smaps = os.open("/proc/self/smaps", os.O_RDONLY)
size = module.share_memory_image(smaps)
os.close(smaps)
assert size > 1 << 20, size
assert all(table[n] == str(n) * 10 for n in range(50_000)) and big == copy
for n in range(50_000, 150_000):
    table[n] = [n]
del table
anonymous = [line for line in open("/proc/self/maps") if "rw-p" in line and "image" in line]
assert anonymous, "nothing was mapped from the image"
big[0] ^= 255
child = os.fork()
if child == 0:
    big[1] ^= 255
    os._exit(0 if big[2:] == copy[2:] else 1)
_, status = os.waitpid(child, 0)
assert status == 0 and big[1] == copy[1]
print("same", size >> 20)
"""


def test_process_goes_on_unchanged_over_its_image():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(memory_image.__file__))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("same ")


def test_sandbox_states_stand_on_the_image(tree):
    assert tree.sandbox.capabilities()["memory_image_mib"] > 10
    code = "import sympy\nx = sympy.Symbol('x')\nprint(sympy.factor(x**2 - 1))"
    assert tree.one(code).stdout == "(x - 1)*(x + 1)\n"


def test_every_warm_up_line_runs(tree):
    assert tree.sandbox.capabilities()["warm_up_failures"] == []
    assert tree.sandbox.capabilities()["not_preloaded"] == []
