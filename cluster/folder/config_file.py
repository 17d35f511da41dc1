"""Config files: YAML into a checked record, and nothing that it does not know.

    file or preset --+-- --set a.b=c --> record --> stored beside the run as config.yaml

A preset is a config that is shipped; its name is enough, as in `rstar evolve demo`.

An unknown key is an error that names the file, the key and the nearest valid one; a wrong value is
an error with field, rule and value. All errors of a file are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from rollout.run_store import address_of


class ConfigError(ValueError):
    """A config file or override cannot be used; the message says where and what is right."""


Place = Annotated[
    Path, PlainSerializer(lambda p: address_of(p) or str(p), return_type=str, when_used="json")
]
"""A path, or an address (s3://bucket/x) in its stead; `rollout.run_store.address_of` tells."""


class Config(BaseModel):
    """A part of a config; keys it does not have are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def effective(self) -> dict[str, Any]:
        """The whole config as plain data, defaults included; reading it back gives an equal one."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=BaseModel)


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type[C],
    given: Mapping[str, Any] | None = None,
) -> C:
    """Read a config and apply `a.b=c` overrides (values are YAML).

    Args:
        path: a file, or the name of a preset (`find_config`).
        kind: as `RunConfig` or `RolloutConfig`.
        given: top-level values from the command line; they win over the file.
    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), wrong value.
    """
    path = find_config(path, kind=kind)
    return make_config(read_yaml(path) | dict(given or {}), overrides, kind=kind, source=str(path))


def find_config(path: str | Path, *, kind: type[BaseModel]) -> Path:
    """The file a config argument means: itself, or the preset of that name.

    Args:
        kind: of the config, for the names an error lists.
    Raises:
        ConfigError: there is no such file, and no such preset.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = presets(kind)
    if path.parent == Path() and path.suffix in ("", ".yaml"):
        if path.stem in shipped:
            return shipped[path.stem]
        near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(shipped) or "none found"
        raise ConfigError(f"{path}: no such config file; {hint}presets: {names}")
    raise ConfigError(f"{path}: no such config file")


def presets(kind: type[BaseModel]) -> dict[str, Path]:
    """The shipped configs of a kind by name: file name without .yaml."""
    package = Path(__file__).parents[1]
    # In an installed package they lie inside it, in a checkout beside it.
    folders = (package / "presets", package.parent / "deploy" / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder is not None else []
    has_rounds = "rounds" in kind.model_fields
    return {f.stem: f for f in files if ("rounds" in read_yaml(f)) == has_rounds}


def table(name: str) -> Path:
    """A shipped table of prices or GPUs, by the name of its file."""
    package = Path(__file__).parents[1]
    inside = package / "tables" / name
    return inside if inside.exists() else package.parent / "deploy" / name


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a config file, unchecked.

    Raises:
        ConfigError: unreadable file, or no mapping.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a YAML mapping, got {type(data).__name__}")
    return data


def make_config(
    data: dict[str, Any], overrides: Sequence[str] = (), *, kind: type[C], source: str
) -> C:
    """Apply `a.b=c` overrides to plain data and check it.

    Args:
        source: where the data comes from, for messages.
    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong value.
    """
    for override in overrides:
        _apply(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{source}: {explain(kind, item)}" for item in error.errors())
        ) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, as in search.num_rollouts=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    names = key.strip().split(".")
    place: Any = data
    for depth, name in enumerate(names):
        at: Any = name
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                where = ".".join(names[:depth])
                raise ConfigError(
                    f"--set {override}: {where} is a list of {len(place)}, {name!r} is no index"
                )
            at = int(name)
        if depth == len(names) - 1:
            place[at] = value
            return
        if isinstance(place, dict) and not isinstance(place.get(at), (dict, list)):
            place[at] = {}
        place = place[at]


def explain(kind: type[BaseModel], item: Any) -> str:
    """For people: one of the errors of a `ValidationError` of a kind of config."""
    location = item["loc"]
    name = ".".join(str(part) for part in location) or "config"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = _fields_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(sorted(valid))}"
        return f"unknown key {name!r}; {hint}"
    if item["type"] == "missing":
        return f"{name!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = item.get("input")
    # What stands there in place of a variable's name or in an address may be a key.
    secret = location in (("endpoint", "api_key_env"), ("endpoint", "base_url"))
    given = "" if secret or isinstance(shown, dict) else f" (got {shown!r})"
    return f"{name!r}: {message}{given}"


def _fields_at(section: Any, location: Sequence[Any]) -> list[str]:
    """Valid keys of the section found by walking `location` from another one."""
    for part in location:
        if isinstance(part, int):
            continue
        found, _ = section_in(typing.get_type_hints(section).get(str(part)))
        if found is None:
            return []
        section = found
    if issubclass(section, BaseModel):
        return list(section.model_fields)
    return [field.name for field in dataclasses.fields(section)]


def section_in(annotation: Any) -> tuple[Any, bool]:
    """The model or dataclass inside an annotation such as `X | None` or `list[X]`.

    Returns:
        It (None if there is none) and whether it stands in a list.
    """
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        known = issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
        return (annotation if known else None), False
    for argument in typing.get_args(annotation):
        found, in_list = section_in(argument)
        if found is not None:
            return found, in_list or typing.get_origin(annotation) is list
    return None, False
