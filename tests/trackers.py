"""Trackers' own packages for tests, in a folder beside the environment; and a run to tell of."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.folder.run_folder import CONFIG, RunFolder

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements" / "trackers.txt"


def packages() -> Path:
    """Folder for PYTHONPATH with what requirements/trackers.txt names; skips the test where it
    cannot be had."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    target = Path(sys.prefix) / f"trackers-{digest}"
    if not target.exists():
        hidden = target.with_name(f".{target.name}-{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        made = subprocess.run(
            [*pip, "--no-deps", "--target", hidden, "-r", REQUIREMENTS],
            capture_output=True,
            text=True,
        )
        if made.returncode != 0:
            pytest.skip(f"the trackers cannot be had here: {made.stderr.strip()[-300:]}")
        hidden.rename(target)
    return target


def make_run(root: str | Path, *, name: str = "demo") -> RunFolder:
    """A run that has a config and nothing else."""
    folder = RunFolder(root)
    text = f"name: {name}\nseed: 3\nsearch: {{top_p: 0.9, stops: [a, b]}}\n"
    folder.write_bytes(CONFIG, text.encode())
    return folder


def add_steps(folder: RunFolder, kind: str, round: int, steps: range, loss: float = 1.0) -> None:
    """Have a fit do these steps, at this loss."""
    name = f"checkpoints/round={round}/{kind}/metrics.jsonl"
    rows = [{"step": n, "loss": loss, "gradient_norm": n / 2} for n in steps]
    text = folder.read_bytes(name) or b""
    folder.write_bytes(name, text + "".join(json.dumps(row) + "\n" for row in rows).encode())


def add_round(folder: RunFolder, round: int, *, right: int) -> None:
    """Have a round end, with so many of four held-out problems right."""
    folder.record_stage(round, "rollout", 12.5, totals={"trees": 36}, deaths={}, told="text")
    problems: list[dict[str, Any]] = [
        {"problem_id": str(n), "level": "gsm", "greedy": n < right, "majority": None}
        for n in range(4)
    ]
    folder.write(folder.evaluation_name(round), {"round": round, "problems": problems})
    folder.write(folder.ruler_name(round), {"rankings": {"ppm": {"mean": 0.6}}, "problems": []})


def live(folder: RunFolder, state: str) -> None:
    """Have the driver's account say this."""
    account = {
        **{"state": state, "time_unix_s": 0.0, "started_unix_s": 0.0, "seconds_total": 1.0},
        **{"host": "h", "pid": 1, "command": "rstar", "cwd": "/", "error": "", "progress": {}},
    }
    folder.write("live.json", account)
