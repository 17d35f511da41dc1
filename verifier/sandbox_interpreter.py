"""Starting the fresh interpreters of a sandbox: its supervisor, and the supervisor's zygotes.

Each loads a few modules of this package by path and runs `main()` of the last, which finds the
number of its end of a socket in `sys.argv[1]`. A module that one of them imports from this package
has to stand in the list before it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from verifier.isolation import SINGLE_THREADED

SUPERVISOR = (
    *("isolation", "sandbox_wire", "sandbox_interpreter", "event_loop", "host_gauges"),
    *("tree_records", "state_processes", "eviction", "tree_steps", "fork_tree"),
)
ZYGOTE = ("isolation", "sandbox_wire", "memory_image", "sandbox_warm_up", "sandbox_runner")

# The package is stood up by hand so that nothing of its __init__ is imported there, and the modules
# get builtins of their own (see sandbox_runner).
_BOOTSTRAP = """
import builtins, pathlib, sys, types
folder, names, sys.argv = sys.argv[1], sys.argv[2].split(","), sys.argv[2:]
package = types.ModuleType("verifier")
package.__path__ = []
sys.modules["verifier"] = package
for name in names:
    path = pathlib.Path(folder, name + ".py")
    module = types.ModuleType("verifier." + name)
    module.__dict__.update(__builtins__=dict(vars(builtins)), __file__=str(path))
    sys.modules["verifier." + name] = module
    setattr(package, name, module)
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
module.main()
"""


def start_interpreter(modules: Sequence[str], channel: socket.socket) -> subprocess.Popen[bytes]:
    """Start one over `channel`, which the caller closes afterwards.

    User site-packages and the working folder stay out (-s, -P). Not -I: it would ignore
    PYTHONHASHSEED. The environment has nothing of ours, one thread, fixed hashes.
    """
    folder = str(Path(__file__).resolve().parent)
    options = ["-s", "-P", "-B", "-c", _BOOTSTRAP, folder, ",".join(modules)]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    fixed = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    # symbols bound at the start: a lazy one would be bound again in each state that calls it
    fixed["LD_BIND_NOW"] = "1"
    return subprocess.Popen(
        [sys.executable, *options, str(channel.fileno())],
        pass_fds=[channel.fileno()],
        env={**fixed, **SINGLE_THREADED, **kept},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
