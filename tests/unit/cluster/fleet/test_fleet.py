from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from cluster.fleet.fleet import Fleet
from cluster.folder.run_folder import RunFolder
from cluster.runs.config import RolloutConfig
from rollout.engine import EngineError


def test_dashboard_port_in_use_is_named_before_ray_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = RolloutConfig.model_validate(
            {
                "problems": "p.jsonl",
                "policy": "x",
                "run_dir": tmp_path,
                "cluster": {"dashboard_port": port},
            }
        )
        fleet = Fleet(config, RunFolder(tmp_path))
        with pytest.raises(EngineError, match=f"port {port} of cluster.dashboard_port is in use"):
            asyncio.run(fleet.start(tmp_path))
