"""docs/configuration.md, made from the config models, so that it cannot differ from them.

python -m tools.config_reference [--check]     (tools.generated)
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.evaluation.config import EvaluateConfig
from cluster.fleet.config import ServingConfig
from cluster.folder.config_file import presets, section_in
from cluster.runs.config import RolloutConfig, RunConfig, SolveConfig
from cluster.runs.synthesize import SynthesizeConfig
from cluster.serve.config import ServeConfig
from tools.generated import main

PATH = Path(__file__).parents[1] / "docs" / "configuration.md"

COMMANDS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("rstar evolve", RunConfig),
    ("rstar rollout", RolloutConfig),
    ("rstar solve", SolveConfig),
    ("rstar serve", ServeConfig),
    ("rstar evaluate", EvaluateConfig),
    ("rstar problems synthesize", SynthesizeConfig),
)

_HEAD = """\
# Configuration

One YAML file is one run. This page is made by `python -m tools.config_reference` from the config
models and a test fails when it is out of date: change the models, not the page.

    rstar evolve my.yaml --set search.num_rollouts=8 --set rounds.0.temperature=0.7

- `--set KEY=VALUE` overrides a value; it is YAML, and entries of a list are numbers, as in
  `rounds.0.trees`.
- An unknown key is refused with the nearest valid one, a wrong value with its field and rule; all
  errors of a file are reported together.
- `RUN/config.yaml` is the effective config, defaults included. A run is continued with an equal
  config; only what says where it runs may differ (`cluster`, the engines, `sandbox`, `name`,
  `run_dir`, `cost` and the limits of `endpoint`).
- The name of a shipped preset stands for its file: `rstar evolve demo`.
"""


def reference() -> str:
    """The whole page."""
    parts = [_HEAD, "\n".join(_presets()), "\n".join(_commands())]
    models = _models()
    parts.append("## Sections\n")
    for model, places in models.items():
        parts.append("\n".join(_section(model, places)))
    return "\n".join(parts).rstrip() + "\n"


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    yield "| name | command | for |"
    yield "|---|---|---|"
    for command, kind in COMMANDS[:2]:
        for name, path in presets(kind).items():
            yield f"| `{name}` | `{command}` | {_cell(_first_comment(path))} |"
    yield ""


def _first_comment(path: Path) -> str:
    """The first paragraph of a preset's leading comment."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words.append(line.removeprefix("# "))
    return " ".join(words)


def _commands() -> Iterator[str]:
    common = ServingConfig.model_fields
    yield "## Keys of every command that starts machines\n"
    yield from _table(ServingConfig)
    for command, kind in COMMANDS:
        further = "Further keys" if issubclass(kind, ServingConfig) else "Keys"
        yield f"## {further} of `{command}`\n"
        own = [n for n, f in kind.model_fields.items() if n not in common or _differ(f, common[n])]
        yield from _table(kind, only=own)


def _differ(one: FieldInfo, other: FieldInfo) -> bool:
    return (_type(one), _default(one), one.description) != (
        _type(other),
        _default(other),
        other.description,
    )


def _models() -> dict[type, list[str]]:
    """Every section below the commands' configs, with the keys it stands at, as they appear."""
    found: dict[type, list[str]] = {}

    def visit(model: type, prefix: str) -> None:
        for name, annotation in _annotations(model).items():
            child, is_list = section_in(annotation)
            if child is None:
                continue
            key = f"{prefix}{name}" + (".N" if is_list else "")
            places = found.setdefault(child, [])
            if key not in places:
                places.append(key)
                visit(child, f"{key}.")

    for _, kind in COMMANDS:
        visit(kind, "")
    return found


def _annotations(model: type) -> dict[str, Any]:
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return typing.get_type_hints(model)


def _section(model: type, places: list[str]) -> Iterator[str]:
    yield f"### {', '.join(f'`{place}`' for place in places)}\n"
    text = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    if text:
        yield f"{text}\n"
    if issubclass(model, BaseModel):
        yield from _table(model)
    else:
        yield from _dataclass_table(model)


def _table(model: type[BaseModel], only: list[str] | None = None) -> Iterator[str]:
    yield from _rows(
        (name, _type(field), _default(field), field.description or "")
        for name, field in model.model_fields.items()
        if only is None or name in only
    )


def _dataclass_table(model: Any) -> Iterator[str]:
    """As `_table`; a description is the string below its field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    told: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words))):
                    told[field.target.id] = " ".join(words.split())
    hints = typing.get_type_hints(model)
    yield from _rows(
        (f.name, type_text(hints[f.name]), f"`{_plain(f.default)}`", told.get(f.name, ""))
        for f in dataclasses.fields(model)
    )


def _rows(rows: Iterator[tuple[str, str, str, str]]) -> Iterator[str]:
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for name, kind, default, description in rows:
        # One style for sentences and fragments alike.
        text = description.rstrip(".")
        yield f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(text)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    text = type_text(field.annotation)
    bounds = _bounds(field)
    return f"{text}, {bounds}" if bounds else text


def type_text(annotation: Any) -> str:
    """A type for people: `int or null`, `list of section`, `"a", "b"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        # Null last, wherever it stands.
        ordered = sorted(arguments, key=lambda a: a is type(None))
        return " or ".join(type_text(argument) for argument in ordered)
    if origin is Literal:
        return ", ".join(_plain(value) for value in arguments)
    if origin in (list, tuple) and arguments:
        if origin is tuple and Ellipsis not in arguments:
            return f"{len(arguments)} x {type_text(arguments[0])}"
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping to {type_text(arguments[1])}"
    if origin is Annotated:
        return type_text(arguments[0])
    if annotation is Any:
        return "any"
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Enum):
            return ", ".join(str(member.value) for member in annotation)
        if section_in(annotation)[0] is not None:
            return "section"
        if issubclass(annotation, Path):
            return "path"
        return {"str": "text"}.get(annotation.__name__, annotation.__name__)
    return str(annotation)


def _bounds(field: FieldInfo) -> str:
    found = []
    for item in field.metadata:
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            value = getattr(item, name, None)
            if value is not None:
                found.append(f"{sign} {_plain(value)}")
        if getattr(item, "min_length", None) == 1:
            found.append("not empty")
    return ", ".join(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if dataclasses.is_dataclass(value):
        return "see below"
    if isinstance(value, BaseModel):
        plain = type(value)()
        changed = {
            name: getattr(value, name)
            for name in type(value).model_fields
            if getattr(value, name) != getattr(plain, name)
        }
        shown = ", ".join(f"{name}: {_plain(v)}" for name, v in changed.items())
        return f"`{{{shown}}}`" if changed else "see below"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """A value as it would stand in the YAML file."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple | list):
        value = [item.value if isinstance(item, enum.Enum) else item for item in value]
    if isinstance(value, float) and value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.4g}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()


if __name__ == "__main__":
    raise SystemExit(main("config_reference", {PATH: reference()}))
