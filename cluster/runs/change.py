"""`rstar set RUN key=value ...`: change a run while it goes on, or before its next start.

The new config is checked as a whole, as that of a start is, before a word of it is written
(`cluster.folder.changes`). A driver that runs takes it over at its next look; what cannot be
changed so is refused with the reason and what to do instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from cluster.evaluation.config import EvaluateConfig
from cluster.fleet.config import ServingConfig
from cluster.folder.changes import Change, Changes, live_key, live_values, with_values
from cluster.folder.config_file import ConfigError, explain, make_config
from cluster.folder.run_folder import RESUMABLE, RunFolder, RunFolderError
from cluster.machines.prices import read_prices
from cluster.runs.config import RolloutConfig, RunConfig
from cluster.telemetry.live import Live, read_live
from cluster.telemetry.progress import say

WAIT_S = 15.0
"""How long a running driver is waited for to take a change over."""


def set_run(run: str | Path, assignments: Sequence[str], console: Console) -> None:
    """Change a run's config, and say when it is taken over.

    Args:
        assignments: as "cluster.policy.replicas=8".
    Raises:
        ConfigError: unknown key, wrong value, or one that cannot be changed so; nothing is changed.
        RunFolderError: there is no such run, or it cannot be written.
    """
    folder = RunFolder(run)
    began_s = time.monotonic()
    change = record_change(folder, assignments)
    for key, value in change.values.items():
        say(console, f"{key} = {value!r}, before {change.before.get(key)!r}")
    live = read_live(folder.store)
    if live is None or not live.claims_to_run or not live.fresh(time.time()):
        say(console, "no driver runs; the next start takes it over")
        return
    while time.monotonic() - began_s < WAIT_S:
        now = read_live(folder.store)
        if now is not None and now.progress.change >= change.number:
            say(console, f"taken over after {time.monotonic() - began_s:.1f} s")
            return
        time.sleep(0.2)
    say(console, f"written; not taken over within {WAIT_S:.0f} s (`rstar status {run}` says when)")


def record_change(folder: RunFolder, assignments: Sequence[str]) -> Change:
    """Check a change and write it down.

    Raises:
        ConfigError, RunFolderError: see `set_run`.
    """
    changes = Changes(folder)
    config = present_config(folder, changes)
    live = read_live(folder.store)
    keys = [_live(a.partition("=")[0].strip(), config, live, a) for a in assignments]
    source = f"rstar set {folder.store.root}"
    wanted = make_config(
        config.effective(), [_with_file(a) for a in assignments], kind=type(config), source=source
    )
    before, after = live_values(config), live_values(wanted)
    # What is written is taken from the whole, which was checked.
    return changes.record({key: after[key] for key in keys}, {key: before[key] for key in keys})


def present_config(folder: RunFolder, changes: Changes) -> ServingConfig:
    """The config of the last start, with what was changed since.

    Raises:
        RunFolderError: there is no such run, or it is of a command that takes no changes.
    """
    data = folder.config()
    if data is None:
        raise RunFolderError(f"{folder.store.root}: not a run: it has no config.yaml")
    kinds: dict[str, type[ServingConfig]] = {
        "rounds": RunConfig,
        "benchmarks": EvaluateConfig,
        "problems": RolloutConfig,
    }
    kind = next((kind for key, kind in kinds.items() if key in data), None)
    if kind is None:
        raise RunFolderError(
            f"{folder.store.root}: not a run of `rstar evolve`, `rollout` or `evaluate`; others "
            "are started again with --set"
        )
    try:
        config = kind.model_validate(data)
        values: dict[str, Any] = {}
        for change in changes.known:
            values |= change.values
        own = live_values(config)
        return with_values(config, {k: v for k, v in values.items() if k in own})
    except ValidationError as error:
        raise RunFolderError(
            f"{folder.at('config.yaml')}: of another version: {explain(kind, error.errors()[0])}"
        ) from None


def _live(key: str, config: ServingConfig, live: Live | None, assignment: str) -> str:
    """The key that is changed.

    Raises:
        ConfigError: it cannot be changed while the run goes on; says what to do.
    """
    own, found = live_values(config), live_key(key)
    if found is not None and found in own:
        section, _, pool = found.removesuffix(".replicas").partition(".")
        if section == "cluster" and pool in config.cluster.autoscale:
            raise ConfigError(
                f"{key}: the pool follows its work; set cluster.autoscale.{pool}.min_replicas and "
                "max_replicas"
            )
        return found
    if found is not None:  # of a pool that is not there
        pool = key.split(".")[2]
        raise ConfigError(f"{key}: the pool does not scale; set cluster.{pool}.replicas")
    below = [name for name in own if name.startswith(f"{key}.")]
    if below and key != "cluster":
        raise ConfigError(f"{key}: name the values one by one, as {below[0]}")
    # An unknown key, or one that stands for a wrong value, is told as everywhere.
    make_config(config.effective(), [assignment], kind=type(config), source="rstar set")
    if any(key == name or key.startswith(f"{name}.") for name in RESUMABLE):
        again = f": {live.command} --set {assignment}" if live is not None else ""
        raise ConfigError(
            f"{key} is read when the actors start, so it cannot be changed while they run; stop "
            f"the run (Ctrl-C) and go on with the new value{again}"
        )
    raise ConfigError(
        f"{key} decides what the run makes, so it stays as the run was started; begin another one "
        f"(--set run_dir=...) with --set {assignment}"
    )


def _with_file(assignment: str) -> str:
    """An assignment with the price table that it names as @FILE in the file's place."""
    key, _, value = assignment.partition("=")
    if key.strip() != "cost.prices" or not value.startswith("@"):
        return assignment
    rows = read_prices(value[1:]).by_kind
    wanted = {kind: row.model_dump(include={"on_demand", "spot"}) for kind, row in rows.items()}
    return f"{key}={json.dumps(wanted)}"
