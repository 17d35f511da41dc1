"""A driver for tests of jobs: `python -m tests.job_driver FOLDER [ARGUMENTS OF THE COMMAND]`.

As `rstar evolve --restarts` it is started again by a process of its own. Each start writes a file
named after its number in FOLDER; it works until it is told to stop, and then takes `DRAIN_S` to
save what it has, in the file `drained`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import typer

from cluster import cli
from cluster.runs.restarts import VARIABLE, run_again

DRAIN_S = 5.0
"""Longer than Ray gives a job by itself, and than two signals count as one."""


async def work(folder: Path) -> None:
    """Until it is cancelled."""
    given = {name: os.environ.get(name, "") for name in (VARIABLE, "COLOUR", "RAY_ADDRESS")}
    facts = f"{os.getpid()} {given} {sorted(p.name for p in Path.cwd().iterdir())}"
    (folder / given[VARIABLE]).write_text(facts)
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        await asyncio.sleep(DRAIN_S)
        (folder / "drained").touch()
        raise


if __name__ == "__main__":
    if VARIABLE in os.environ:
        try:
            cli._run(work(Path(sys.argv[1])), again="the same")
        except typer.Exit as ended:
            sys.exit(ended.exit_code)
    else:
        sys.exit(
            run_again(
                [sys.executable, "-m", "tests.job_driver", *sys.argv[1:]],
                restarts=3,
                tell=print,
                first_pause_s=0.5,
            )
        )
