"""The conformance suite of the sandbox against its other forms, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "unit" / "verifier" / "test_sandbox_conformance.py"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["awaiting", "actor"])
def test_other_forms_of_the_sandbox_conform(backend):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)],
        env={**os.environ, "RSTAR_SANDBOX_BACKEND": backend},
        cwd=SUITE.parents[3],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
