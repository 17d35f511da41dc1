"""A Hugging Face hub of this machine: models and datasets, as `huggingface_hub` reads them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories as folders: ROOT/models/ORG/NAME, ROOT/datasets/ORG/NAME; one revision each."""

    def __init__(self, root: Path, *, gated: tuple[str, ...] = ()) -> None:
        self.root = root
        self.gated = gated
        """Repositories that ask for a token nobody has."""
        self.asked: list[str] = []
        """Path of every request."""

    def answer(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for a request."""
        self.asked.append(path)
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        api = parts[0] == "api"
        kind = parts.pop(0) if parts[int(api)] == "datasets" and not api else "models"
        if api:
            kind = parts[1]
            del parts[:2]
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.root / kind / name
        if not folder.is_dir():
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if name in self.gated:
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        what = rest[0] if rest else "revision"
        if what == "resolve":
            return self._file(folder / "/".join(rest[2:]))
        if what == "tree":
            deep = parse_qs(urlsplit(path).query).get("recursive") == ["true"]
            below = folder / "/".join(rest[2:])
            if not below.is_dir():
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            found = sorted(below.rglob("*") if deep else below.glob("*"))
            return _json([self._entry(folder, path) for path in found])
        if what == "paths-info":
            names = parse_qs(body.decode())["paths"]
            found = [folder / name for name in names if (folder / name).exists()]
            return _json([self._entry(folder, path) for path in found])
        return _json({"id": name, "sha": self.commit, "siblings": [], "private": False})

    commit = "0123456789abcdef0123456789abcdef01234567"

    def _file(self, path: Path) -> tuple[int, bytes, dict[str, str]]:
        if not path.is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        data = path.read_bytes()
        return 200, data, {"X-Repo-Commit": self.commit, "ETag": f'"{_oid(data)}"'}

    @staticmethod
    def _entry(folder: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": _oid(name.encode()), "size": 0, "path": name}
        data = path.read_bytes()
        return {"type": "file", "oid": _oid(data), "size": len(data), "path": name}


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(record: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(record).encode(), {"Content-Type": "application/json"}


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The hub's address while it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, data, headers = hub.answer(self.path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
