"""A driver that is started again when it dies: `rstar evolve --restarts`.

    this process --starts--> driver --ends: 0, stopped, wrong command--> ends, too
         ^                      `----died, failed--> pause, 10 s to 10 minutes --+
         +-----------------------------------------------------------------------+

What is committed stands in the run's folder, so a new driver goes on where the last one was. A
driver that worked for `GOOD_S` clears the count: a run of weeks is not given up for deaths that lie
days apart, and one that fails at once is, after minutes.

It needs nothing of Ray or of the cluster, so it helps in a job (`rstar submit`), in a pod and in a
shell alike. Not covered: its own death, with which the job, pod or unit it is in ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

VARIABLE = "RSTAR_START"
"""Number of the start, from 1, in the environment of a driver that is started again."""

FIRST_PAUSE_S = 10.0
"""Before the second start; doubled each time."""

LONGEST_PAUSE_S = 600.0

GOOD_S = 600.0
"""A driver that lived so long was no failure in a row."""

WRONG_COMMAND = 2
STOPPED = 130
"""Exit statuses of a driver that another start would only repeat, or that was told to end."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_again(
    command: Sequence[str],
    *,
    restarts: int,
    tell: Callable[[str], None],
    first_pause_s: float = FIRST_PAUSE_S,
    good_s: float = GOOD_S,
) -> int:
    """Run a command until it ends by itself or is told to; from the main thread.

    Signals are passed on, also where the command got them itself; an interrupt as SIGTERM, of which
    a second one, however late a busy machine passes it on, does not have a driver end at once.

    Args:
        restarts: starts after failures in a row, besides the first.
        tell: takes a line for people.
    Returns:
        Its exit status; 128 and the signal's number where one ended it.
    """
    stopped = threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        stopped.set()
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    failures = 0
    start = 0
    try:
        while True:
            start += 1
            began_s = time.monotonic()
            child = subprocess.Popen(command, env={**os.environ, VARIABLE: str(start)})
            if stopped.is_set():  # told while it was started
                child.terminate()
            status = child.wait()
            child = None
            asked = -status in SIGNALS or status in (0, WRONG_COMMAND, STOPPED)
            if asked or stopped.is_set():
                return status if status >= 0 else 128 - status
            lived_s = time.monotonic() - began_s
            failures = 1 if lived_s >= good_s else failures + 1
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            what = f"the driver ended after {lived_s:.0f} s ({how})"
            if failures > restarts:
                tell(f"{what}; given up after {failures} in a row (--restarts {restarts})")
                return status if status >= 0 else 128 - status
            pause_s = min(first_pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S)
            tell(f"{what}; started again in {pause_s:.0f} s ({failures} of {restarts} in a row)")
            if stopped.wait(pause_s):
                return STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
