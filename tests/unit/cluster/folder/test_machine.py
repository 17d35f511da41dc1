from __future__ import annotations

import sys
from pathlib import Path

from cluster.folder import machine
from cluster.folder.machine import source_digest, versions


def test_versions_name_python_and_the_packages_that_are_here() -> None:
    found = versions()
    assert {"python", "ray", "torch", "transformers"} <= found.keys()


def test_digest_of_source_follows_what_a_module_uses_and_nothing_else(
    tmp_path: Path, monkeypatch
) -> None:
    package = tmp_path / "cluster"
    (package / "folder").mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(package / "folder" / "machine.py"))
    texts = {
        "used": "x = 1",
        "named": "y = 1",
        "lazy": "z = 1",
        "other": "w = 1",
        "root": "from cluster import used\nname = 'cluster.named.Thing'\n"
        "def f():\n    import cluster.lazy\n    import json",
    }

    def digest(**changed: str) -> str:
        for name, text in (texts | changed).items():
            (package / f"{name}.py").write_text(text)
        source_digest.cache_clear()
        machine._source.cache_clear()
        return source_digest("cluster.root")

    try:
        before = digest()
        assert digest() == before == digest(other="w = 2")
        assert len({before, *(digest(**{n: "v = 2"}) for n in ("used", "named", "lazy"))}) == 4
        assert "cluster.root" not in sys.modules
    finally:
        source_digest.cache_clear()
        machine._source.cache_clear()


def test_code_of_engines_is_not_that_of_pages() -> None:
    source_digest("cluster.engines.replica")
    root = Path(machine.__file__).parents[2]
    known = machine._source("cluster.engines.replica")
    assert known is not None and "cluster.engines.lifecycle" in known[1]
    assert known[0] == (root / "cluster/engines/replica.py").read_bytes()
