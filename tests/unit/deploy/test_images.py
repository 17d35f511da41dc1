"""The Dockerfiles: linted, pinned, without root, and installing what deploy/install.sh installs."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
IMAGES = {"gpu": ROOT / "deploy" / "Dockerfile", "cpu": ROOT / "deploy" / "cpu.Dockerfile"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) with continued lines joined and comments gone."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def pip_lines(text: str) -> list[str]:
    """What is given to `pip install`, whatever the interpreter is called."""
    joined = re.sub(r"\\\n\s*", " ", text)
    pattern = r"(?:-m pip|\"\$\{pip\[@\]\}\") install (.+?)(?=\s*(?:&&|#|\n|$))"
    return [match.replace('-e "', '"').strip() for match in re.findall(pattern, joined)]


@pytest.mark.parametrize("image", IMAGES)
def test_image_passes_hadolint(image: str) -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([hadolint, str(IMAGES[image])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_image_stands_on_a_pinned_base_and_runs_without_root(image: str) -> None:
    steps = instructions(IMAGES[image].read_text(encoding="utf-8"))
    bases = [rest.partition("=")[2] for name, rest in steps if name == "ARG" and "_IMAGE=" in rest]
    assert bases and all(":" in base and not base.endswith(":latest") for base in bases)
    users = [rest for name, rest in steps if name == "USER"]
    assert users == ["1000:1000"]
    last_stage = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    late = [rest for name, rest in steps[last_stage:] if name == "RUN"]
    assert not any("pip install" in rest or "apt-get" in rest for rest in late)
    assert any(name == "COPY" and "--from=build" in rest for name, rest in steps[last_stage:])


def test_images_share_one_release_of_ubuntu_and_so_one_python() -> None:
    """Ray refuses nodes of another Python."""
    releases = {"ubuntu24.04": "noble", "noble": "noble"}
    found = set()
    for file in IMAGES.values():
        text = file.read_text(encoding="utf-8")
        base = re.search(r"^ARG \w+_IMAGE=(\S+)", text, re.MULTILINE)
        assert base is not None
        found |= {release for name, release in releases.items() if name in base[1]}
    assert found == {"noble"}


def test_images_install_what_the_installer_installs() -> None:
    installer = pip_lines((ROOT / "deploy" / "install.sh").read_text(encoding="utf-8"))
    pip, gpu, *cpu = (line.replace("-e .", ".").replace("-e '.", "'.") for line in installer)
    cpu_image = pip_lines(IMAGES["cpu"].read_text(encoding="utf-8"))
    for_clouds = "-r requirements/clouds.txt -c requirements/cpu.txt"
    assert cpu_image == [*cpu[:2], for_clouds, *cpu[2:]]
    gpu_image = pip_lines(IMAGES["gpu"].read_text(encoding="utf-8"))
    gpu_image[0] = gpu_image[0].removeprefix("--no-cache-dir ")
    assert gpu_image == [pip, gpu.replace("[gpu,dev]", "[gpu,s3,gcs,azure]"), "--no-deps ."]


def test_image_holds_what_the_launcher_of_ray_needs_in_a_container() -> None:
    """It copies files with rsync, asks for HOME, and runs commands in login shells."""
    for file in IMAGES.values():
        text = file.read_text(encoding="utf-8")
        assert re.search(r"apt-get install .*?\brsync\b", text, re.DOTALL)
        assert "HOME=/home/rstar" in text and "/etc/profile.d/rstar.sh" in text
        assert "RSTAR_COMMIT=${COMMIT}" in text


def test_clients_of_buckets_in_the_images_are_those_of_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = (ROOT / "requirements" / "clouds.txt").read_text(encoding="utf-8").splitlines()
    for extra in ("s3", "gcs", "azure"):
        assert set(project["optional-dependencies"][extra]) <= set(wanted)


def test_wheel_holds_the_presets_and_the_tables_and_works_without_a_checkout(
    tmp_path: Path,
) -> None:
    copied = ("cluster", "deploy", "learner", "rollout", "verifier")
    for name in copied:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert not (installed / "deploy").exists()
    for command in (
        ["plan", "--gpus", "8", "--gpu-kind", "h100-80gb"],
        ["cluster", "check", str(ROOT / "ray_cluster.yaml"), "--config", "cluster"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *command],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_user_of_the_images_is_the_one_of_the_pods() -> None:
    cluster = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "raycluster.yaml").read_text())
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    for file in IMAGES.values():
        assert f"--uid {pod['runAsUser']} " in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("secret", [".git", ".env", "runs", ".venv", "auth_token", "tests"])
def test_nothing_unlisted_enters_the_build(secret: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    ignored = False
    for rule in rules:
        if fnmatch.fnmatch(secret, rule.lstrip("!")):
            ignored = not rule.startswith("!")
    assert ignored
