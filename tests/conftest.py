"""The whole suite holds many libraries with threads of their own (torch, Ray, Arrow) in a process.

Python ended in a segmentation fault while it took them down, after every test had passed: the
process ends here instead, with the status of the tests.
"""

from __future__ import annotations

import os
import sys

import pytest

_status = 0


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
