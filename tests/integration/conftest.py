"""S3 servers, and a bucket of one's own in each: moto's, and LocalBucket, of another author; a file
system that is soon full.

A module that says `S3_SERVERS = ("moto", "localbucket")` is run on both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from localbucket import S3Handler

from tests.s3 import moto_server, new_bucket
from tests.saboteur import can_mount, small_disk


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames and (names := getattr(metafunc.module, "S3_SERVERS", ())):
        metafunc.parametrize("server", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    if getattr(request, "param", "moto") == "moto":
        with moto_server() as url:
            yield url
        return

    class Handler(S3Handler):
        data_root = tmp_path_factory.mktemp("localbucket")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_port}"
        other.shutdown()
        thread.join()


@pytest.fixture
def root(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run's folder in a bucket of its own; how it is reached is in the environment."""
    monkeypatch.setenv("RSTAR_STAGE", str(tmp_path / "staged"))
    return f"{new_bucket(server, monkeypatch)}/run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if not can_mount():
        pytest.skip("no file system can be mounted here")
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, mib=4):
        yield folder
