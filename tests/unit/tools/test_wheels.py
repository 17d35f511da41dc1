"""Wheels cut into parts and put together again; made ones of a few bytes, nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import wheels

ROOT = Path(__file__).parents[3]


def make_wheel(folder: Path, name: str, size: int) -> Path:
    """A wheel of one module, which holds its name and so many bytes that do not compress."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\n# {'x' * size}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    made = [make_wheel(tmp_path / "made", name, size) for name, size in (("ab", 9000), ("cd", 10))]
    wheels.pack(made, tmp_path / "parts", 4000, {"python": "3.12"})
    return tmp_path / "parts"


def unpack(parts: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.wheels", "unpack", parts, "--target", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_parts_are_small_enough_and_what_was_packed_is_installed(
    parts: Path, tmp_path: Path
) -> None:
    manifest = json.loads((parts / wheels.MANIFEST).read_text())
    sizes = [entry["bytes"] for entry in manifest["parts"]]
    assert len(sizes) > 4 and max(sizes) == 4000 and sizes[:-1] == [4000] * (len(sizes) - 1)
    done = unpack(parts, tmp_path / "there")
    assert (done.returncode, done.stdout) == (0, "2 wheels installed\n"), done.stderr
    code = "import ab, cd; print(ab.NAME, cd.NAME)"
    environment = {"PYTHONPATH": str(tmp_path / "there")}
    said = subprocess.check_output([sys.executable, "-S", "-c", code], env=environment, text=True)
    assert said == "ab cd\n"


def test_damaged_and_missing_parts_are_named_and_nothing_is_installed(
    parts: Path, tmp_path: Path
) -> None:
    data = bytearray((parts / "part-001").read_bytes())
    data[17] ^= 1
    (parts / "part-001").write_bytes(data)
    (parts / "part-003").unlink()
    done = unpack(parts, tmp_path / "there")
    assert done.returncode == 1 and not (tmp_path / "there").exists()
    said = f"{parts}: part-001 is damaged, part-003 is missing; copy it again\n"
    assert done.stderr == said


def test_a_wheel_that_is_not_the_one_packed_is_named(parts: Path, tmp_path: Path) -> None:
    manifest = json.loads((parts / wheels.MANIFEST).read_text())
    manifest["wheels"][1]["sha256"] = "0" * 64
    (parts / wheels.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match=r"cd-1\.0-py3-none-any\.whl is damaged"):
        wheels.join(parts, tmp_path / "joined")


def test_packing_again_leaves_no_part_of_before(parts: Path, tmp_path: Path) -> None:
    before = len([*parts.glob("part-*")])
    wheels.pack([make_wheel(tmp_path / "made", "cd", 10)], parts, 4000, {})
    assert len([*parts.glob("part-*")]) < before
    assert [p.name for p in wheels.join(parts, tmp_path / "j")] == ["cd-1.0-py3-none-any.whl"]


def test_a_pin_replaces_what_the_project_asks_for() -> None:
    asked = wheels.requirements("gpu", ["vllm==0.23.0", "Prometheus_Client==1.0"])
    assert "vllm==0.23.0" in asked and not any(r.startswith("vllm==0.32") for r in asked)
    assert [r for r in asked if wheels.name_of(r) == "prometheus-client"] == [
        "Prometheus_Client==1.0"
    ]
    assert any(r.startswith("ray[default]") for r in asked)


def test_constraints_are_the_lines_of_a_file_without_packages_that_are_named(
    tmp_path: Path,
) -> None:
    (tmp_path / "c.txt").write_text("# of a GPU\nvllm==0.32.0\nray==2.60.0 # why\n\n")
    assert wheels.constraints_of(tmp_path / "c.txt", ["VLLM==0.23.0"]) == ["ray==2.60.0"]


def test_what_a_machine_has_it_has_with_all_that_came_with_it() -> None:
    known = {
        "torch": {"requires_dist": ['toolkit[blas, rt]==13; platform_system == "Linux"', "sympy"]},
        "toolkit": {
            "requires_dist": ['n-blas; extra == "blas"', "n-rt; extra=='rt'", "n-nvcc; extra=='cc'"]
        },
        "n-blas": {},
        "n-rt": {"requires_dist": ["torch"]},
        "n-nvcc": {},
        "sympy": {"requires_dist": ["mpmath<2", "pytest; extra == 'dev'", "not-here"]},
        "mpmath": {},
        "pytest": {},
    }
    found = wheels.with_companions(["Torch==2.11.0"], known)
    assert found == {"torch", "toolkit", "n-blas", "n-rt", "sympy", "mpmath"}


def test_unpacking_needs_the_standard_library_alone() -> None:
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            "import sys; sys.path.insert(0, '.'); import tools.wheels",
        ],
        cwd=ROOT,
        check=True,
    )
