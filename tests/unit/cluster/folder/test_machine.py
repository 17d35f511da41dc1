from __future__ import annotations

from cluster.folder.machine import versions


def test_versions_name_python_and_the_packages_that_are_here() -> None:
    found = versions()
    assert {"python", "ray", "torch", "transformers"} <= found.keys()
