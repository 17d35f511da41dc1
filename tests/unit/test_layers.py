"""Who imports whom: verifier <- rollout <- learner <- cluster, and light packages stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("verifier", "rollout", "learner", "cluster")


def test_verifier_and_rollout_import_no_heavy_package() -> None:
    code = """
import importlib, pkgutil, sys
for package in ("verifier", "rollout"):
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        if module.name.endswith("__main__"):
            continue
        importlib.import_module(module.name)
heavy = {"ray", "vllm", "torch", "deepspeed", "transformers"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_packages_import_only_from_the_layers_below() -> None:
    wrong = []
    for rank, package in enumerate(ORDER):
        above = set(ORDER[rank + 1 :])
        for path in (ROOT / package).rglob("*.py"):
            wrong += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in _imported(path)
                if name.split(".")[0] in above
            ]
    assert wrong == []


def test_only_cluster_imports_ray_and_only_the_optimiser_imports_deepspeed() -> None:
    wrong = []
    for package in ORDER[:-1]:
        for path in (ROOT / package).rglob("*.py"):
            for name in _imported(path):
                optimiser = path.name == "optimiser.py" and package == "learner"
                if name.split(".")[0] in ("ray", "deepspeed") and not optimiser:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names
