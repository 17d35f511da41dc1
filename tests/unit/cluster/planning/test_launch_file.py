"""Launch files, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.folder.config_file import ConfigError
from cluster.planning.launch_file import read_launch

ROOT = Path(__file__).parents[4]


def test_manifest_and_other_files_are_refused_by_name(tmp_path: Path) -> None:
    manifest = tmp_path / "pod.yaml"
    manifest.write_text("apiVersion: v1\nkind: Pod\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pod.yaml: a Kubernetes manifest"):
        read_launch(manifest)
    with pytest.raises(ConfigError, match="is it for ray up"):
        read_launch(ROOT / "deploy" / "gpus.yaml")
