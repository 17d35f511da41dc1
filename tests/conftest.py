"""The whole suite in several processes: what is long begins first, a file stays together.

`make test` starts `pytest -n ... --dist loadfile --no-loadscope-reorder`: a file goes to one
process, files in the order of collection. With `make test MINUTES=...` tests that would begin later
than that are skipped and counted.

The suite holds many libraries with threads of their own (torch, Ray, Arrow) in a process. Python
ended in a segmentation fault while it took them down, after every test had passed: the process
ends here instead, with the status of the tests.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOMS = ("slow", "integration", "unit")
LONGEST = (
    "slow/test_evolve.py",
    "slow/test_silence.py",  # it waits, while the one before it works
    "integration/test_store_faults.py",
    "slow/test_learner_group.py",
    "slow/test_faults.py",
    "slow/test_serve_vllm.py",
    "slow/test_pretrained.py",
)
"""First of all, so that nothing has to wait for one of them at the end."""

UNTIL_UNIX_S = float(os.environ.get("RSTAR_TESTS_UNTIL") or "inf")
"""No test begins after it; set by `make test MINUTES=...`."""

os.environ.setdefault("RAY_worker_niceness", "0")
"""Of 15, Ray's own, an actor hardly runs beside the tests of another process."""

_status = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> tuple[int, int]:
        path = item.path.relative_to(HERE)
        long = LONGEST.index(path.as_posix()) if path.as_posix() in LONGEST else len(LONGEST)
        return long, ROOMS.index(path.parts[0])

    items.sort(key=turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL_UNIX_S:
        pytest.skip("the time of this run of the suite is over (make test MINUTES=...)")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    global _status
    _status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:
        return
    reporter.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)
