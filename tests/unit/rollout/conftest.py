"""The stores that tests of `RunStore` and of what is built on it run on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rollout.run_store import RunStore


class _RemoteMemory(MemoryFileSystem):
    """A remote store in this process."""

    protocol = "remotememory"


fsspec.register_implementation(_RemoteMemory.protocol, _RemoteMemory, clobber=True)


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunStore]:
    if request.param == "local":
        yield RunStore(tmp_path / "run", backoff_s=0)
    else:
        yield RunStore(f"remotememory://{uuid.uuid4().hex}/run", backoff_s=0)
