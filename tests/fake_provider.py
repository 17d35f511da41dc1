"""A cloud on this machine: the autoscaler starts and ends Ray nodes as processes.

`FakeProvider` is what the autoscaler's monitor process loads by name. `AutoscaledCluster` starts a
head with the autoscaler in a process of its own and ends, at the end, that process and all it has
started, and nothing else: not by `ray stop`, which ends every Ray process of the machine.

    test -- Popen --> `ray start --head --block` -- GCS, raylet, monitor (FakeProvider) -- nodes
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)

ROOT = Path(__file__).resolve().parents[1]
OBJECT_STORE_BYTES = 80 * 2**20


class FakeProvider(FakeMultiNodeProvider):
    """Ray's own; only its example config is missing from the wheel."""


class AutoscaledCluster:
    """A head without CPUs and node types the autoscaler may add."""

    def __init__(
        self,
        node_types: Mapping[str, tuple[Mapping[str, float], int]],
        *,
        head: Mapping[str, float],
        idle_s: float = 3.0,
    ) -> None:
        """
        Args:
            node_types: resources of a node and how many there may be, by name.
            head: custom resources of the head.
            idle_s: a node that nobody uses for so long is taken away.
        """
        # As `ray.init` does. A process keeps the mode of its first Ray: a cluster without tokens
        # takes one that has them for dead, and ends all its actors.
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled()
        ip, port = get_node_ip_address(), _free_port()
        self.address = f"{ip}:{port}"
        # A path to a socket must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="fake-", ignore_cleanup_errors=True)
        config = Path(self._folder.name, "autoscaler.json")
        config.write_text(
            json.dumps(_config(node_types, head=head, address=self.address, idle_s=idle_s))
        )
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address", ip, "--port", str(port)),
            *("--temp-dir", self._folder.name, "--include-dashboard", "false"),
            *("--autoscaling-config", str(config), "--num-cpus", "0"),
            *("--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--resources", json.dumps(dict(head)), "--disable-usage-stats"),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--ray-client-server-port", str(_free_port())),
        ]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": self._folder.name,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        self._log = Path(self._folder.name, "start.log").open("wb")  # noqa: SIM115
        self._head = psutil.Popen(
            command,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._wait_until_it_answers(ip, port)
        except BaseException:
            self.shutdown()
            raise

    def _wait_until_it_answers(self, ip: str, port: int, limit_s: float = 180.0) -> None:
        give_up_s = time.monotonic() + limit_s
        log = Path(self._log.name)
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if self._head.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"the head did not start: {log.read_text(errors='replace')}")
            time.sleep(0.1)
        with socket.create_connection((ip, port), timeout=limit_s):
            pass

    def monitor_log(self) -> str:
        """What the autoscaler has said, for a test that fails."""
        logs = Path(self._folder.name).glob("session_*/logs/monitor*")
        return "\n".join(path.read_text(errors="replace") for path in logs if path.is_file())

    def shutdown(self) -> None:
        """End the head and everything that it or its nodes have started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            # A monitor that is stopped starts no further node while the others are counted.
            for process in self._head.children(recursive=True):
                if any("monitor.py" in part for part in process.cmdline()):
                    process.suspend()
        started = [self._head]
        with contextlib.suppress(psutil.NoSuchProcess):
            started += self._head.children(recursive=True)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=15)
        self._log.close()
        self._folder.cleanup()


def _config(
    node_types: Mapping[str, tuple[Mapping[str, float], int]],
    *,
    head: Mapping[str, float],
    address: str,
    idle_s: float,
) -> dict[str, Any]:
    kinds: dict[str, Any] = {
        name: {
            "resources": {**resources, "object_store_memory": OBJECT_STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        }
        for name, (resources, most) in node_types.items()
    }
    kinds["ray.head.default"] = {"resources": dict(head), "node_config": {}, "max_workers": 0}
    lists = (
        *("initialization_commands", "setup_commands", "head_setup_commands"),
        *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
        *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
    )
    return {
        "cluster_name": "fake",
        "max_workers": sum(most for _, most in node_types.values()),
        "upscaling_speed": 10,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": "tests.fake_provider.FakeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        **{name: [] for name in lists},
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
