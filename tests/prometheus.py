"""A real Prometheus for tests: Debian's package, in a folder of the test, ended with it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

MISSING = "needs the Debian package prometheus (deploy/test_tools.sh)"


def has_prometheus() -> bool:
    return bool(shutil.which("prometheus") and shutil.which("promtool"))


class Prometheus:
    """A server that scrapes the targets of one file every second."""

    def __init__(self, folder: Path, targets: Path, rules: Path) -> None:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {
                    "job_name": "rstar",
                    "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}],
                }
            ],
        }
        folder.mkdir(parents=True)
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def wait_ready(self, limit_s: float = 60) -> None:
        give_up_s = time.monotonic() + limit_s
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < give_up_s, "Prometheus did not become ready"
                time.sleep(0.1)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The present result; AssertionError if Prometheus calls the expression wrong."""
        text = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{text}", timeout=10) as reply:
                data = json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        assert data["resultType"] == "vector", expression
        return data["result"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()
