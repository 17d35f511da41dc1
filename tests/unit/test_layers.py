"""Who imports whom: verifier <- rollout <- learner <- cluster, and light packages stay light.

Inside cluster/ the same holds of its rooms, and nowhere do modules import each other in a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("verifier", "rollout", "learner", "cluster")
ROOMS = (
    "folder",
    "telemetry",
    "jobs",
    "engines",
    "machines",
    "fleet",
    "evaluation",
    "runs",
    "watch",
    "reports",
    "serve",
    "planning",
)
"""Of cluster/, from the ground up: a room imports only from itself and from those below."""

MAX_FILES = 15
"""In one room."""


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


def test_rooms_of_cluster_import_only_from_the_rooms_below() -> None:
    assert _upward(ROOT) == []


def test_an_arrow_back_up_is_seen(tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / "cluster" / room).mkdir(parents=True)
    fleet, runs = tmp_path / "cluster" / "fleet", tmp_path / "cluster" / "runs"
    (runs / "evolve.py").write_text("from cluster.fleet.keeper import PoolKeeper\n")
    assert _upward(tmp_path) == []
    (fleet / "keeper.py").write_text("def late():\n    from cluster.runs import evolve\n")
    (fleet / "actors.py").write_text("import cluster.cli\n")
    assert _upward(tmp_path) == [
        "cluster/fleet/actors.py: cluster.cli",
        "cluster/fleet/keeper.py: cluster.runs",
    ]


def test_every_folder_of_cluster_is_a_room_with_few_files() -> None:
    folders = {p.name for p in (ROOT / "cluster").iterdir() if p.is_dir()} - {"__pycache__"}
    assert folders == set(ROOMS)
    counts = {room: len(list((ROOT / "cluster" / room).glob("*.py"))) for room in ROOMS}
    assert {room: n for room, n in counts.items() if n > MAX_FILES + 1} == {}  # and __init__.py
    assert {p.name for p in (ROOT / "cluster").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "cli.py",
        "errors.py",
    }


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"]) - {"cluster.presets", "cluster.tables"}
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ORDER
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == there


def test_a_config_is_read_without_ray_and_vllm() -> None:
    code = """
import sys
import cluster.evaluation.config, cluster.runs.config
heavy = {"ray", "vllm", "torch", "deepspeed", "transformers"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: {_module(target) for target in targets} - {name}
        for name, targets in _top_imports(ROOT).items()
    }
    assert _circle(graph) is None


def test_a_circle_is_seen() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}) is None
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def _upward(root: Path) -> list[str]:
    """Imports of a room of cluster/ from one above it, or from the command."""
    found = []
    for rank, room in enumerate(ROOMS):
        below = {f"cluster.{name}" for name in ROOMS[: rank + 1]}
        for path in sorted((root / "cluster" / room).rglob("*.py")):
            for name in sorted(_imported(path)):
                if name.startswith("cluster") and ".".join(name.split(".")[:2]) not in below:
                    found.append(f"{path.relative_to(root)}: {name}")
    return found


def _module(name: str) -> str:
    """The module that a name of an import stands in: `a.b` of `from a.b import c`, or `a.b.c`."""
    path = ROOT.joinpath(*name.split("."))
    return name if path.with_suffix(".py").is_file() else name.rpartition(".")[0]


def _top_imports(root: Path) -> dict[str, set[str]]:
    """What each module of the product imports of it as it is loaded; late imports do not count."""
    found: dict[str, set[str]] = {}
    for package in ORDER:
        for path in (root / package).rglob("*.py"):
            if path.name == "__init__.py":
                continue
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[name] = {
                f"{node.module}.{alias.name}"
                for node in tree.body
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ORDER
                for alias in node.names
            }
    return found


def _circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first named again at the end; None: none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names
