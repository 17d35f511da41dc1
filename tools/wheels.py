"""What a machine without a network lacks, as files of a size that can be carried there.

    python -m tools.wheels pack --python 3.12 --have torch==2.11.0 transformers pyarrow \\
        --pin vllm==0.23.0 --out DIR [--part-mib 60] [--without NAME ...] [--also REQUIREMENT ...]
    python -m tools.wheels unpack DIR [--target FOLDER]

    requirements of the gpu extra --resolve--> wheels - what the machine has --tar, cut--> parts
    parts --digests, join--> wheels --digests, pip --no-index --no-deps--> environment or FOLDER

`pack` resolves for Linux on x86_64 and the Python that is named, on any machine with a network and
pip 23.3 or newer. What the machine has, it has with all that comes with it, so neither is packed;
say the versions, or it may have others than were resolved for. A pin replaces what the project asks
for; what `--also` names is taken without what it asks for. Packages without a wheel are built here,
and must come out as pure Python. `unpack` needs the standard library and pip, but no network: it
refuses a part or wheel that is not the one packed, by name, before anything is installed.

Not covered: whether what is installed there works; other processors; packages that compile.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "requirements" / "gpu.txt"
MANIFEST = "manifest.json"
_BLOCK = 1 << 20


def name_of(requirement: str) -> str:
    """The name of a requirement, as indexes compare it."""
    found = re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", requirement)
    if found is None:
        raise ValueError(f"no name of a package in {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def requirements(extra: str, pins: Iterable[str]) -> list[str]:
    """What the project and one of its extras ask for, with pins in place of what they name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"][extra]]
    pinned = {name_of(pin): pin for pin in pins}
    return [r for r in asked if name_of(r) not in pinned] + list(pinned.values())


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------ pack


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if status := subprocess.run(command).returncode:
        raise SystemExit(f"pip {arguments[0]} ended with status {status}; it says why above")


def for_machine(python: str) -> list[str]:
    """What tells pip which machine is meant."""
    tags = [*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)), "manylinux2014_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    return ["--only-binary=:all:", "--python-version", python, *platforms]


def resolve(
    wanted: Sequence[str], python: str, constraints: Sequence[str], links: Path
) -> dict[str, Mapping[str, Any]]:
    """Name -> metadata of all that an installation on that machine would hold."""
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        limits.write_text("\n".join(constraints) + "\n")
        pip(
            *("install", "--quiet", "--dry-run", "--ignore-installed", "--target", folder),
            *("--report", str(report), "--constraint", str(limits), "--find-links", str(links)),
            *for_machine(python),
            *wanted,
        )
        installed = json.loads(report.read_text())["install"]
    entries = [entry["metadata"] for entry in installed]
    return {name_of(entry["name"]): entry for entry in entries}


_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w.-]+)['\"]")


def with_companions(
    requirements: Iterable[str], known: Mapping[str, Mapping[str, Any]]
) -> set[str]:
    """Names of packages and of all that comes with them, by the metadata of a resolution.

    Markers but those of extras are not read: what they exclude is not in a resolution either.
    """
    found: set[tuple[str, str]] = set()
    waiting = [(name_of(r), extra) for r in requirements for extra in ("", *extras_of(r))]
    while waiting:
        name, extra = one = waiting.pop()
        if one in found or name not in known:
            continue
        found.add(one)
        for line in known[name].get("requires_dist", ()):
            asked = _EXTRA.search(line)
            if extra == (asked[1] if asked else ""):
                waiting += [(name_of(line), more) for more in ("", *extras_of(line))]
    return {name for name, _ in found}


def extras_of(requirement: str) -> list[str]:
    """The extras that a requirement asks for."""
    found = re.match(r"[\w.-]+\s*\[([^]]*)\]", requirement)
    return [extra.strip() for extra in found[1].split(",")] if found else []


def constraints_of(file: Path, but: Iterable[str]) -> list[str]:
    """The lines of a constraints file, without those of packages that are named."""
    left_out = {name_of(one) for one in but}
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and name_of(line) not in left_out]


def build(requirement: str, folder: Path) -> None:
    """Build a wheel of a package that has none; refuses one for this machine alone."""
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), requirement)
    for wheel in folder.glob("*.whl"):
        if not wheel.name.endswith("-none-any.whl"):
            raise SystemExit(f"{wheel.name}: built for this machine; it cannot be taken to another")


def pack(wheels: Sequence[Path], out: Path, part_bytes: int, about: Mapping[str, Any]) -> None:
    """Write wheels as parts of one tar archive, and the manifest that knows their digests."""
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("part-*"), out / MANIFEST]:
        old.unlink(missing_ok=True)
    writer = _Parts(out, part_bytes)
    with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for wheel in wheels:
            archive.add(wheel, arcname=wheel.name)
    writer.close()
    found = {
        **about,
        "parts": [_described(path) for path in writer.paths],
        "wheels": [_described(path) for path in wheels],
    }
    (out / MANIFEST).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _described(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


class _Parts(io.RawIOBase):
    """A stream that is cut into files of at most so many bytes."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder, self._part_bytes = folder, part_bytes
        self.paths: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data)
        while left:
            full = not self.paths or self.paths[-1].stat().st_size >= self._part_bytes
            if full:
                self.paths.append(self._folder / f"part-{len(self.paths):03d}")
                self.paths[-1].touch()
            room = self._part_bytes - self.paths[-1].stat().st_size
            with self.paths[-1].open("ab") as stream:
                stream.write(left[:room])
            left = left[room:]
        return len(data)


# ------------------------------------------------------------------------ unpack


def check(folder: Path, described: Iterable[Mapping[str, Any]]) -> None:
    """Refuse files that are not those of the manifest, all of them by name."""
    wrong = []
    for entry in described:
        path = folder / entry["name"]
        if not path.is_file():
            wrong.append(f"{entry['name']} is missing")
        elif path.stat().st_size != entry["bytes"] or digest(path) != entry["sha256"]:
            wrong.append(f"{entry['name']} is damaged")
    if wrong:
        raise SystemExit(f"{folder}: {', '.join(wrong)}; copy it again")


class _Joined(io.RawIOBase):
    """Files one after the other, as one stream."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._blocks = self._read(paths)
        self._left = b""

    @staticmethod
    def _read(paths: Sequence[Path]) -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    yield block

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._blocks, b"")
        taken = min(len(buffer), len(self._left))
        buffer[:taken], self._left = self._left[:taken], self._left[taken:]
        return taken


def join(folder: Path, target: Path) -> list[Path]:
    """The wheels in a folder of parts, checked before and after; written to `target`."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    check(folder, manifest["parts"])
    paths = [folder / entry["name"] for entry in manifest["parts"]]
    with tarfile.open(fileobj=io.BufferedReader(_Joined(paths)), mode="r|") as archive:
        archive.extractall(target, filter="data")
    check(target, manifest["wheels"])
    return [target / entry["name"] for entry in manifest["wheels"]]


# ------------------------------------------------------------------------ the command


def _pack(options: argparse.Namespace) -> None:
    part_bytes = int(options.part_mib * 2**20)
    with tempfile.TemporaryDirectory(prefix="wheels-") as name:
        built, chosen = Path(name) / "built", Path(name) / "chosen"
        built.mkdir()
        pinned = constraints_of(CONSTRAINTS, [])
        for name in options.build:
            build(next((one for one in pinned if name_of(one) == name_of(name)), name), built)
        wanted = [*requirements("gpu", options.pin), *options.have]
        limits = constraints_of(CONSTRAINTS, [*options.pin, *options.have, *options.build])
        all_of_it = resolve(wanted, options.python, [*limits, *options.pin], built)
        there = with_companions(options.have, all_of_it)
        left_out = {*there, *map(name_of, options.without)}
        taken = [f"{n}=={all_of_it[n]['version']}" for n in sorted(all_of_it.keys() - left_out)]
        taken += options.also
        pip(
            *("download", "--quiet", "--no-deps", "--dest", str(chosen)),
            *("--find-links", str(built), *for_machine(options.python), *taken),
        )
        wheels = sorted(chosen.glob("*.whl"))
        versions = {name: all_of_it[name]["version"] for name in sorted(there)}
        about = {"python": options.python, "have": versions, "without": options.without}
        pack(wheels, options.out, part_bytes, about)
    for wheel in json.loads((options.out / MANIFEST).read_text())["wheels"]:
        print(f"{wheel['bytes'] / 2**20:8.1f} MiB  {wheel['name']}")
    sizes = [path.stat().st_size for path in options.out.glob("part-*")]
    print(f"{len(wheels)} wheels, {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} parts")


def _unpack(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="wheels-") as name:
        wheels = join(options.parts, Path(name))
        where = ["--target", str(options.target)] if options.target else []
        names = [str(wheel) for wheel in wheels]
        pip("install", "--quiet", "--no-index", "--find-links", name, "--no-deps", *where, *names)
    print(f"{len(wheels)} wheels installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="where there is a network")
    packing.add_argument("--python", required=True, help="of the machine, as 3.12")
    for option, default, said in (
        ("--have", [], "what the machine has, with all that comes with it"),
        ("--pin", [], "instead of what the project asks for"),
        ("--also", [], "besides, without what it asks for"),
        ("--without", [], "names of what is left out"),
        ("--build", ["deepspeed"], "names of packages that have no wheel [deepspeed]"),
    ):
        packing.add_argument(option, nargs="+", default=default, metavar="PACKAGE", help=said)
    packing.add_argument("--out", type=Path, required=True, help="folder of the parts")
    packing.add_argument("--part-mib", type=float, default=60, help="most of one part [60]")
    packing.set_defaults(run=_pack)
    unpacking = commands.add_parser("unpack", help="where there is none")
    unpacking.add_argument("parts", type=Path, help="folder of the parts")
    unpacking.add_argument("--target", type=Path, help="for PYTHONPATH [this Python's environment]")
    unpacking.set_defaults(run=_unpack)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
