"""What README and docs/ show must be true of the code: commands parse, links and paths exist.

    `rstar ...`             parsed by the real command line, its --set against the real config
    `python -m bench.x`     the module is there and knows the options
    `make x`                the Makefile has it
    ```yaml                 loads, and its keys are keys of the configuration
    [text](file#anchor)     file and heading are there
    `cluster/x.py`          is there

What the commands print is not compared; benchmarks and demo are run elsewhere.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from cluster.cli import app
from cluster.folder.config_file import ConfigError, load_config
from cluster.runs.config import RolloutConfig, RunConfig

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "deploy/acceptance.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("rstar ", "python -m ", "make ")
PACKAGES = (
    *("bench", "cluster", "deploy", "docs", "learner", "rollout", "tests", "tools", "verifier"),
)


class Shown(NamedTuple):
    """A command as a page shows it."""

    page: str
    line: int
    text: str


def _shown_in(page: Path) -> Iterator[Shown]:
    """Commands in blocks (indented or fenced) and in `code`; continued lines are joined."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fence, number = "", 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith("```"):
            fence = "" if fence else line[3:].strip() or "text"
            continue
        at = number
        in_block = bool(fence) or line.startswith("    ")
        if in_block:
            text = line.strip().removeprefix("$ ")
            while text.endswith("\\") and number < len(lines):
                text = text[:-1] + " " + lines[number].strip()
                number += 1
            if text.startswith(COMMANDS) and fence not in ("python", "sql"):
                yield Shown(page.name, at, text)
            continue
        paragraph = line
        if paragraph.count("`") % 2 and number < len(lines):  # code broken over two lines
            paragraph += " " + lines[number]
        for code in re.findall(r"`([^`]+)`", paragraph):
            if code.startswith(COMMANDS):
                yield Shown(page.name, at, code)


SHOWN = [shown for page in PAGES for shown in _shown_in(page)]


def _of(program: str) -> list[Any]:
    found = [shown for shown in SHOWN if shown.text.startswith(program)]
    return [pytest.param(shown, id=f"{shown.page}:{shown.line}") for shown in found]


def _words(text: str) -> list[str]:
    """Arguments as a shell would see them, up to a comment, pipe or next command."""
    words = shlex.split(text, comments=True)
    ends = [words.index(end) for end in ("|", "&&", ";", ">", "&") if end in words]
    return words[: min(ends)] if ends else words


def test_there_are_commands_to_check() -> None:
    assert len(_of("rstar ")) > 10
    assert len(_of("python -m ")) > 5


@pytest.mark.parametrize("shown", _of("rstar "))
def test_the_command_line_takes_what_is_shown(shown: Shown) -> None:
    words = [word for word in _words(shown.text)[1:] if word not in ("...", "…")]
    command: Any = typer.main.get_command(app)
    name, where = "rstar", f"{shown.page}:{shown.line}"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"{where}: no {name!r} in {sorted(command.commands)}"
        command = command.commands[name]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    used = [word.split("=")[0] for word in words if word.startswith("--")]
    unknown = [option for option in used if option not in options]
    assert not unknown, f"{where}: `{name}` has no {unknown}"
    if not words or len(words) == len(used):
        return  # talked about, not shown: its arguments are left out
    try:
        command.make_context(name, list(words))
    except typer.Exit:
        pass
    except Exception as error:
        raise AssertionError(f"{where}: {getattr(error, 'message', error)}") from error


_CONFIG_OF = {"evolve": RunConfig, "rollout": RolloutConfig}


@pytest.mark.parametrize("shown", [p for p in _of("rstar ") if "--set" in p.values[0].text])
def test_what_is_set_is_a_key_with_a_fitting_value(shown: Shown) -> None:
    words = _words(shown.text)
    if words[1] not in _CONFIG_OF:
        return
    sets = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--set"]
    settled = [pair for pair in sets if "=" in pair and not pair.split("=")[1].isupper()]
    given: dict[str, Any] = {}
    if words[1] == "rollout":
        given = {"problems": Path("p.jsonl"), "policy": Path("p"), "run_dir": Path("r")}
        preset = "rollout"
    elif (ROOT / f"deploy/configs/{words[2]}.yaml").exists():
        preset = words[2]
    else:  # a config of the reader's, as for models and problems of his own
        preset = "cluster"
    try:
        load_config(Path(preset), settled, kind=_CONFIG_OF[words[1]], given=given)
    except ConfigError as error:
        raise AssertionError(f"{shown.page}:{shown.line}: {error}") from error


@pytest.mark.parametrize("shown", _of("python -m "))
def test_a_module_that_is_run_is_there_and_knows_its_options(shown: Shown) -> None:
    words = _words(shown.text)
    module = words[2]
    if module.split(".")[0] not in PACKAGES:
        return
    place = ROOT / module.replace(".", "/")
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    assert path.exists(), f"{shown.page}:{shown.line}: no {module}"
    source = path.read_text(encoding="utf-8")
    for word in words[3:]:
        option = word.split("=")[0]
        if option.startswith("--"):
            assert f'"{option}"' in source, f"{shown.page}:{shown.line}: {module} has no {option}"


@pytest.mark.parametrize("shown", _of("make "))
def test_the_makefile_has_the_target(shown: Shown) -> None:
    target = _words(shown.text)[1]
    if not re.fullmatch(r"[a-z][a-z-]*", target):
        return
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.M), f"{shown.page}:{shown.line}: make {target}"


def _links() -> list[Any]:
    found = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                found.append(pytest.param(page, target, id=f"{page.name}-{target}"))
    return found


@cache
def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize(("page", "target"), _links())
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    there = (page.parent / file).resolve() if file else page
    assert there.exists(), f"{page.name}: {target}"
    if anchor and there.suffix == ".md":
        assert anchor in _anchors(there), f"{page.name}: {there.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        rf"`((?:{'|'.join(PACKAGES)})/[\w./-]+\.(?:py|md|yaml|yml|sh|json|html))`", text
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page.name}: {missing}"


def _yaml_blocks() -> list[Any]:
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for number, block in enumerate(blocks, start=1):
            found.append(pytest.param(page, block, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize(("page", "block"), _yaml_blocks())
def test_yaml_that_is_shown_loads(page: Path, block: str) -> None:
    yaml.safe_load(block)


def test_docs_speak_of_no_machine_of_ours() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/(?:work|root|tmp/w)/", text), page.name
