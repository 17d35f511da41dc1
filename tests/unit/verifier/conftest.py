"""One warm sandbox for all sandbox tests of a run; each test gets a tree of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.sandbox_backends import Backend, start_backend
from verifier.sandbox import SandboxLimits, StepResult

_numbers = itertools.count()


class OpenTree:
    """A tree that a test plays with; `run` from the root unless told otherwise."""

    def __init__(self, sandbox: Backend) -> None:
        self.sandbox = sandbox
        self.problem_id = f"test-{next(_numbers)}"
        self.root = sandbox.open(self.problem_id)

    def run(
        self, *codes: str, state: str | None = None, limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        return self.sandbox.run(state or self.root, codes, limits)

    def one(
        self, code: str, state: str | None = None, limits: SandboxLimits | None = None
    ) -> StepResult:
        return self.run(code, state=state, limits=limits)[0]

    def path(self, *codes: str) -> StepResult:
        """Run codes one after another; all but the last must be ok."""
        state = self.root
        for code in codes[:-1]:
            result = self.one(code, state)
            assert result.state is not None, result
            state = result.state
        return self.one(codes[-1], state)


@pytest.fixture(scope="session")
def strict_sandbox() -> Iterator[Backend]:
    """Of the form named by RSTAR_SANDBOX_BACKEND, the blocking one by default."""
    limits = SandboxLimits(wall_s=20.0, memory_mib=512, output_accepted_kib=1024)
    sandbox = start_backend(os.environ.get("RSTAR_SANDBOX_BACKEND", "blocking"), limits, "strict")
    yield sandbox
    sandbox.shutdown()


@pytest.fixture
def tree(strict_sandbox: Backend) -> Iterator[OpenTree]:
    opened = OpenTree(strict_sandbox)
    yield opened
    strict_sandbox.close(opened.problem_id)
