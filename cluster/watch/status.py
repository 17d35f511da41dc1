"""`rstar status`: how a run stands, read from its folder by anybody at any time.

    RUN/config.yaml, stages, plans, markers, manifests, checkpoints, lineage --\\
    RUN/live.json (what the driver does now) -----------------------------------+--> RunStatus

Nothing is asked of a process and nothing is written, so it works from another machine, while the
run goes on, after it has ended and after everything was killed. What is done is judged as the
driver judges it: by the products that are there. Only what runs now comes from the driver's own
account, and an old account is no account (`cluster.telemetry.live`).

Files of one moment are not read at one moment: a run that goes on may be a few seconds further than
what is shown. All markers of a round are read until it is sealed, most out of the files into
which the coordinator gathers them; one record afterwards.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.evaluation.shares import problems_by_level, with_all
from cluster.folder.changes import Change, Changes
from cluster.folder.lineage import lineage_name
from cluster.folder.run_folder import (
    CONFIG,
    REPORT,
    RunFolder,
    RunFolderError,
    suspects_name,
)
from cluster.jobs.queue import StagePlan
from cluster.machines.cost import run_cost
from cluster.telemetry.live import INTERVAL_S, LIVE_FILE, Live, read_live
from cluster.telemetry.progress import duration, eta_text
from cluster.telemetry.tracking import links
from rollout.store import Commit, Totals, TrajectoryStore

DONE, RUNNING, STOPPED, PENDING = "done", "running", "stopped", "pending"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """One stage of a round."""

    state: str
    """done | running | stopped (begun, and nobody is at it) | pending"""
    seconds: float | None = None
    """It took, once it is done; None: not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPass:
    """One pass over problems in a round, as "base" or "escalation-1"."""

    name: str
    planned: int
    """Problems."""
    committed: int
    """Trees."""
    solved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """A checkpoint that serves a round."""

    version: str
    path: str
    """Under the run."""
    sha256: str
    held: str = ""
    """Why the round's own one was not promoted, and an earlier one serves; "" if it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """One round; round 0 is the cold start."""

    round: int
    stages: Mapping[str, StageState]
    passes: Sequence[PlannedPass] = ()
    sealed: bool = False
    commits: int = 0
    """Shards whose marker is there."""
    searched: Mapping[str, int] = field(default_factory=dict)
    """Problems with a committed tree, by level and "all"; levels are absent where unknown."""
    solved: Mapping[str, int] = field(default_factory=dict)
    trees: int = 0
    generated_tokens: int = 0
    lost: int | None = None
    """Trees that were leased and are in no commit; None: not audited yet, likewise below."""
    doubled: int | None = None
    """Trees that are in two commits."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Problem id -> error."""
    suspects: Sequence[Mapping[str, Any]] = ()
    """Unsolved problems whose searches agree on another answer than the accepted one."""
    checkpoints: Mapping[str, CheckpointState] = field(default_factory=dict)
    """By kind, "policy" and "ppm"."""
    ruler: Mapping[str, Any] = field(default_factory=dict)
    """What its PPM ranks right (`cluster.evaluation.ruler`), single problems left out."""
    lineage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """How a run stands."""

    run: str
    """Its folder."""
    name: str
    kind: str
    """evolve | rollout"""
    state: str
    """running | stopping | finished | stopped | failed | killed | unknown"""
    explanation: str
    """The state for people."""
    rounds: Sequence[RoundState]
    problems: Mapping[str, int]
    """To search, by level and "all"; {} before they are read."""
    generated_tokens: int
    seconds_total: float | None
    """Of all starts together; None: unknown."""
    num_starts: int
    cost: Mapping[str, Any]
    """See `cluster.machines.cost.run_cost`; {}: nothing was booked."""
    budget_usd: float | None
    """None: no limit."""
    changes: Sequence[Change]
    """What was changed since the first start, in order."""
    live: Live | None
    """The driver's last account; None: there is none."""
    tracked: Mapping[str, Mapping[str, str]]
    """By tracker: link, and error, why it could not be told last ("")."""
    go_on: str
    """Command that goes on with the run; "" while it runs and when it is finished."""


def read_status(run: str | Path, *, now_unix_s: float, host: str | None = None) -> RunStatus:
    """Read a run's folder.

    Args:
        now_unix_s: seconds since 1970, against which the driver's account is judged.
        host: of the reader, None: this one. The account of another machine that looks old is
            looked at a second time, since clocks differ.
    Raises:
        RunFolderError, StoreError, CheckpointError: there is no such run, or something of it cannot
            be read; names it.
    """
    folder = RunFolder(run)
    config = run_config(folder)
    live = read_live(folder.store)
    alive = live is not None and _alive(folder, live, now_unix_s, host or socket.gethostname())
    if alive:
        live = read_live(folder.store) or live
    levels = folder.problem_levels()
    is_evolve = "rounds" in config
    first = 0 if is_evolve and config.get("cold_start") is not None else 1
    numbers = range(first, len(config["rounds"]) + 1) if is_evolve else [1]
    rounds = [_round(folder, config, number, levels, live, alive) for number in numbers]
    finished = all(s.state == DONE for round in rounds for s in round.stages.values())
    state, explanation = _state(live, alive, finished, now_unix_s)
    report = folder.read(REPORT) or {} if live is None else {}
    seconds = live.seconds_total if live is not None else report.get("seconds_total")
    changes = [change for change in Changes(folder).known if change.before]
    budget = (config.get("cost") or {}).get("budget_usd")
    for change in changes:
        budget = change.values.get("cost.budget_usd", budget)
    return RunStatus(
        run=str(run),
        name=str(config.get("name") or f"rollout of {Path(str(config.get('problems'))).name}"),
        kind="evolve" if is_evolve else "rollout",
        state=state,
        explanation=explanation,
        rounds=rounds,
        problems=with_all(Counter(levels.values())) if levels else {},
        generated_tokens=sum(round.generated_tokens for round in rounds),
        seconds_total=seconds,
        num_starts=len((folder.read("versions.json") or {"starts": []})["starts"]),
        cost=run_cost(folder, {r.round: r.solved.get("all", 0) for r in rounds}, finished=finished),
        budget_usd=budget,
        changes=changes,
        live=live,
        tracked=links(folder),
        go_on="" if alive or finished else _go_on(folder, live, is_evolve),
    )


# --------------------------------------------------------------------------------- reading


def run_folder(run: str | Path) -> RunFolder:
    """The folder of a run.

    Raises:
        RunFolderError: it is none.
    """
    folder = RunFolder(run)
    if not folder.store.exists(LIVE_FILE):  # a training run alone has no config.yaml
        run_config(folder)
    return folder


def run_config(folder: RunFolder) -> dict[str, Any]:
    """The config a run was started with, unchecked.

    Raises:
        RunFolderError: there is no such run, or its config cannot be read.
    """
    config = folder.config()
    if config is not None:
        return config
    what = "not a run: it has no config.yaml" if folder.store.exists("") else "no such folder"
    beside = folder.store.local
    near = sorted(str(p.parent) for p in beside.parent.glob("*/config.yaml")) if beside else []
    hint = f"; runs there: {', '.join(near[:8])}" if near else ""
    raise RunFolderError(f"{folder.store.root}: {what}{hint}")


def _alive(folder: RunFolder, live: Live, now_unix_s: float, host: str) -> bool:
    if not live.claims_to_run:
        return False
    if live.fresh(now_unix_s):
        return True
    if live.host == host:
        return False
    time.sleep(1.5 * INTERVAL_S)
    again = read_live(folder.store)
    return again is not None and again.time_unix_s != live.time_unix_s


def _state(live: Live | None, alive: bool, finished: bool, now_unix_s: float) -> tuple[str, str]:
    if live is None:
        return ("finished", "finished") if finished else ("unknown", "not running, it seems")
    where = f"process {live.pid} on {live.host}"
    if alive:
        since = _moment(live.started_unix_s)
        age = max(now_unix_s - live.time_unix_s, 0.0)
        return live.state, f"{live.state} since {since} ({where}, seen {age:.0f} s ago)"
    when = _moment(live.time_unix_s)
    error = f": {live.error}" if live.error else ""
    if finished:
        return "finished", f"finished {when}"
    doing = f" in {live.progress.label!r}" if live.progress.label else ""
    if live.state == "failed":
        return "failed", f"failed {when}{doing}{error}"
    if live.claims_to_run:
        return "killed", f"not running since {when}{doing} (no sign of life from {where})"
    return "stopped", f"stopped {when}{doing}{error}"


def runs(live: Live | None, now_s: float) -> bool:
    """True if the driver told of itself lately."""
    return live is not None and live.claims_to_run and live.fresh(now_s)


def state_text(live: Live | None, now_s: float) -> str:
    """How a run stands, in a line for people."""
    if live is None:
        return "never started"
    ago = duration(now_s - live.time_unix_s)
    if not live.claims_to_run:
        return f"{live.state} {ago} ago" + (f": {live.error}" if live.error else "")
    if not live.fresh(now_s):
        return f"not running: last seen {ago} ago in {live.progress.label or 'no stage'}"
    now = live.progress
    parts = [live.state, now.label]
    if now.total:
        parts.append(f"{now.done:,}/{now.total:,}")
    if now.stage:
        parts.append(f"stage ETA {eta_text(now.stage_eta_s)}, run ETA {eta_text(now.run_eta_s)}")
    return ", ".join(filter(None, parts))


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _go_on(folder: RunFolder, live: Live | None, is_evolve: bool) -> str:
    if live is not None:
        if live.command.startswith("rstar submit "):  # typed on another machine
            return live.command
        return f"cd {shlex.quote(live.cwd)} && {live.command}"
    if not is_evolve:
        return "the `rstar rollout` command it was started with"
    run_dir = f"run_dir={folder.store.root}"
    return shlex.join(["rstar", "evolve", folder.at(CONFIG), "--set", run_dir])


def _round(
    folder: RunFolder,
    config: Mapping[str, Any],
    number: int,
    levels: Mapping[str, str],
    live: Live | None,
    alive: bool,
) -> RoundState:
    trees = TrajectoryStore(folder.store, number)
    manifest = trees.manifest() if number > 0 else None
    record = folder.stage(number, "rollout") if manifest is not None else {}
    counted = "solved_by_level" in record
    commits = trees.commits() if number > 0 and not counted else {}
    counts: Mapping[str, Any] = record if counted else problems_by_level(commits, levels)
    totals = (
        manifest.totals if manifest is not None else Totals.sum(c.totals for c in commits.values())
    )
    quarantined = dict(manifest.failed) if manifest is not None else {}
    if manifest is None:
        for commit in commits.values():
            quarantined.update(commit.failed)
    checkpoints = _checkpoints(folder, number)
    ruler = folder.read(folder.ruler_name(number))
    done = _done(folder, config, number, manifest is not None, checkpoints)
    return RoundState(
        round=number,
        stages={
            name: _stage(folder, number, name, is_done, trees, live, alive)
            for name, is_done in done.items()
        },
        passes=_passes(trees, commits) if manifest is None and number > 0 else (),
        sealed=manifest is not None,
        commits=len(manifest.files) if manifest is not None else len(commits),
        searched=counts["searched_by_level"] if number > 0 else {},
        solved=counts["solved_by_level"] if number > 0 else {},
        trees=totals.trees,
        generated_tokens=totals.generated_tokens,
        lost=record.get("lost"),
        doubled=record.get("doubled"),
        quarantined=quarantined,
        suspects=folder.read_lines(suspects_name(number)),
        checkpoints=checkpoints,
        ruler={k: v for k, v in (ruler or {}).items() if k != "problems"},
        lineage=folder.read(lineage_name(number)) or {},
    )


def _done(
    folder: RunFolder,
    config: Mapping[str, Any],
    number: int,
    sealed: bool,
    checkpoints: Mapping[str, CheckpointState],
) -> dict[str, bool]:
    """Stages of a round, and whether their product is there."""
    if "rounds" not in config:
        return {"rollout": sealed}
    done = {
        "rollout": sealed,
        "select": folder.dataset_manifest(number) is not None,
        "train policy": "policy" in checkpoints,
        "train ppm": "ppm" in checkpoints,
    }
    if "min_pair_accuracy" in (config.get("evaluation") or {}):  # not before there were rulers
        done["ruler"] = folder.store.exists(folder.ruler_name(number))
    problems = config.get("problems") or {}
    if problems.get("test") or problems.get("miniature"):
        done["evaluate"] = folder.store.exists(folder.evaluation_name(number))
    if number == 0:
        return {name: done[name] for name in ("train policy", "evaluate") if name in done}
    return done


def _stage(
    folder: RunFolder,
    number: int,
    name: str,
    is_done: bool,
    trees: TrajectoryStore,
    live: Live | None,
    alive: bool,
) -> StageState:
    if is_done:
        return StageState(
            state=DONE, seconds=folder.stage(number, name.replace(" ", "_")).get("seconds")
        )
    if live is not None and _is_at(live, number, name):
        return StageState(state=RUNNING if alive else STOPPED)
    begun = name == "rollout" and bool(trees.plans())
    return StageState(state=STOPPED if begun else PENDING)


def _is_at(live: Live, number: int, stage: str) -> bool:
    """True if the driver is, or was last, at this stage."""
    if number == 0:
        names = {"train policy": "cold start", "evaluate": "evaluate"}
        return live.progress.round is None and live.progress.stage == names[stage]
    return live.progress.round == number and live.progress.stage == stage


def _passes(trees: TrajectoryStore, commits: Mapping[str, Commit]) -> list[PlannedPass]:
    plans = [StagePlan.from_json(data) for data in trees.plans().values()]
    passes = []
    for plan in sorted(plans, key=lambda plan: plan.tree_index):
        keys = [k for c in commits.values() for k in c.trees if k.index == plan.tree_index]
        passes.append(
            PlannedPass(
                name=plan.stage,
                planned=len(plan.problem_ids),
                committed=len(keys),
                solved=sum(key.solved for key in keys),
            )
        )
    return passes


def _checkpoints(folder: RunFolder, number: int) -> dict[str, CheckpointState]:
    found = {}
    for kind in ("policy", "ppm"):
        name = f"checkpoints/round={number}/{kind}/CURRENT.json"
        record = folder.read(name)
        if record is None:
            continue
        try:
            found[kind] = CheckpointState(
                version=f"{kind}-r{number}-{record['digest'][:8]}",
                path=f"checkpoints/round={number}/{kind}/{record['path']}",
                sha256=record["digest"],
                held=(record.get("held") or {}).get("reason", ""),
            )
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{folder.at(name)}: not a checkpoint: {error!r}") from error
    return found
