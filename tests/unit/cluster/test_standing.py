"""Every actor of the product that may reserve nothing has a place on purpose."""

from __future__ import annotations

import ast
from pathlib import Path

from cluster.fleet.config import ActorConfig
from tests.standing import PLACES

ROOT = Path(__file__).resolve().parents[3]


def remote_classes() -> set[str]:
    """What the product makes actors or tasks of, by `ray.remote`, however it is written."""
    found = set()
    for path in (ROOT / "cluster").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found |= {node.name for part in node.decorator_list if _names_remote(part)}
            elif isinstance(node, ast.Call) and _names_remote(node.func):
                found |= {arg.id for arg in node.args if isinstance(arg, ast.Name)}
    return found


def _names_remote(part: ast.expr) -> bool:
    inner = part.func if isinstance(part, ast.Call) else part
    return ast.unparse(inner) == "ray.remote"


def test_every_remote_class_is_listed_with_its_place() -> None:
    assert remote_classes() == PLACES.keys()


def test_a_pool_that_reserves_nothing_is_spread() -> None:
    assert ActorConfig().ray_options() == {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
    assert "scheduling_strategy" not in ActorConfig(resources={"policy": 1}).ray_options()
