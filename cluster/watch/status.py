"""`rstar status`: how a run stands, read from its folder by anybody at any time.

    RUN/config.yaml, stages, plans, markers, manifests, checkpoints, lineage --\\
    RUN/live.json (what the driver does now) -----------------------------------+--> RunStatus

Nothing is asked of a process and nothing is written, so it works from another machine, while the
run goes on, after it has ended and after everything was killed. What is done is judged as the
driver judges it: by the products that are there. Only what runs now comes from the driver's own
account, and an old account is no account (`cluster.telemetry.live`).

Files of one moment are not read at one moment: a run that goes on may be a few seconds further than
what is shown. All markers of a round are read until it is sealed (25,000 of them, of 747,000
problems, in about 9 s on two busy cores), one record afterwards.
"""

from __future__ import annotations

import json
import shlex
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as Redrawn
from rich.table import Table
from rich.text import Text

from cluster.evaluation.shares import COLUMNS, problems_by_level, with_all
from cluster.folder.lineage import lineage_name
from cluster.folder.run_folder import RunFolder, RunFolderError
from cluster.jobs.queue import StagePlan
from cluster.telemetry.live import INTERVAL_S, Live, read_live
from cluster.telemetry.progress import LEVELS_FACT, cost_usd, duration, eta_text, fact_text
from learner.dataset import read_manifest
from rollout.store import Commit, RunStore, Totals, TrajectoryStore

DONE, RUNNING, STOPPED, PENDING = "done", "running", "stopped", "pending"

_RECORDS = {
    "rollout": "rollout",
    "select": "select",
    "train policy": "train_policy",
    "train ppm": "train_ppm",
    "evaluate": "evaluate",
}
"""Name of each stage's record, by the kind the progress view knows."""

_SHOWN_PROBLEMS = 10
"""Quarantined problems, and suspects, that are shown to people; --json has all."""


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
    cost_usd: float | None
    """None: cost.usd_per_hour is not set."""
    live: Live | None
    """The driver's last account; None: there is none."""
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
    config = _read_config(folder, run)
    live = read_live(folder.root)
    alive = live is not None and _alive(folder, live, now_unix_s, host or socket.gethostname())
    if alive:
        live = read_live(folder.root) or live
    levels = folder.problem_levels()
    store = RunStore(folder.root)
    is_evolve = "rounds" in config
    first = 0 if is_evolve and config.get("cold_start") is not None else 1
    numbers = range(first, len(config["rounds"]) + 1) if is_evolve else [1]
    rounds = [_round(folder, store, config, number, levels, live, alive) for number in numbers]
    finished = all(s.state == DONE for round in rounds for s in round.stages.values())
    state, explanation = _state(live, alive, finished, now_unix_s)
    seconds = live.seconds_total if live is not None else _reported_seconds(folder)
    price = live.progress.usd_per_hour if live is not None else None
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
        cost_usd=cost_usd(seconds, price) if price is not None and seconds is not None else None,
        live=live,
        go_on="" if alive or finished else _go_on(folder, live, is_evolve),
    )


# --------------------------------------------------------------------------------- reading


def _read_config(folder: RunFolder, run: str | Path) -> dict[str, Any]:
    path = folder.root / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no such folder" if not folder.root.is_dir() else "not a run: it has no config.yaml"
        near = sorted(str(p.parent) for p in Path(run).parent.glob("*/config.yaml"))
        hint = f"; runs there: {', '.join(near[:8])}" if near else ""
        raise RunFolderError(f"{run}: {what}{hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path}: expected a YAML mapping, got {type(config).__name__}")
    return config


def _alive(folder: RunFolder, live: Live, now_unix_s: float, host: str) -> bool:
    if not live.claims_to_run:
        return False
    if live.fresh(now_unix_s):
        return True
    if live.host == host:
        return False
    time.sleep(1.5 * INTERVAL_S)
    again = read_live(folder.root)
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
    if finished:
        return "finished", f"finished {when}"
    doing = f" in {live.progress.label!r}" if live.progress.label else ""
    if live.state == "failed":
        return "failed", f"failed {when}{doing}: {live.error}"
    if live.claims_to_run:
        return "killed", f"not running since {when}{doing} (no sign of life from {where})"
    return "stopped", f"stopped {when}{doing}"


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _reported_seconds(folder: RunFolder) -> float | None:
    return (folder.read("report.json") or {}).get("seconds_total")


def _go_on(folder: RunFolder, live: Live | None, is_evolve: bool) -> str:
    if live is not None:
        return f"cd {shlex.quote(live.cwd)} && {live.command}"
    if not is_evolve:
        return "the `rstar rollout` command it was started with"
    config = folder.root / "config.yaml"
    return shlex.join(["rstar", "evolve", str(config), "--set", f"run_dir={folder.root}"])


def _round(
    folder: RunFolder,
    store: RunStore,
    config: Mapping[str, Any],
    number: int,
    levels: Mapping[str, str],
    live: Live | None,
    alive: bool,
) -> RoundState:
    trees = TrajectoryStore(store, number)
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
        suspects=_suspects(folder, number),
        checkpoints=checkpoints,
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
        "select": read_manifest(folder.dataset(number)) is not None,
        "train policy": "policy" in checkpoints,
        "train ppm": "ppm" in checkpoints,
    }
    problems = config.get("problems") or {}
    if problems.get("test") or problems.get("miniature"):
        done["evaluate"] = (folder.root / folder.evaluation_name(number)).exists()
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
        return StageState(state=DONE, seconds=folder.stage(number, _RECORDS[name]).get("seconds"))
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


def _suspects(folder: RunFolder, number: int) -> list[dict[str, Any]]:
    path = folder.root / f"suspects/round={number}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error


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
            raise RunFolderError(f"{folder.root / name}: not a checkpoint: {error!r}") from error
    return found


# --------------------------------------------------------------------------------- showing


def show_status(
    run: str | Path, console: Console, *, as_json: bool = False, watch: bool = False
) -> None:
    """Print how a run stands; with `watch` again and again, until it does not run any more.

    Raises:
        RunFolderError, StoreError, CheckpointError: as `read_status`.
    """
    if as_json and not watch:
        console.file.write(json.dumps(_plain(_read_now(run)), indent=1) + "\n")
        return
    if not watch:
        console.print(status_view(_read_now(run)))
        return
    status = _read_now(run)
    if as_json or not console.is_terminal:
        while True:
            if as_json:
                console.file.write(json.dumps(_plain(status)) + "\n")
                console.file.flush()
            else:
                console.print(status_view(status))
            if status.state not in ("running", "stopping"):
                return
            status = _wait_and_read(run)
    with Redrawn(status_view(status), console=console, auto_refresh=False) as redrawn:
        while status.state in ("running", "stopping"):
            status = _wait_and_read(run)
            redrawn.update(status_view(status), refresh=True)


def _read_now(run: str | Path) -> RunStatus:
    return read_status(run, now_unix_s=time.time())


def _wait_and_read(run: str | Path) -> RunStatus:
    """Read at most a quarter of the time, however large the run is."""
    began_s = time.monotonic()
    status = _read_now(run)
    pause_s = max(INTERVAL_S, 3 * (time.monotonic() - began_s))
    time.sleep(pause_s)
    return status


def _plain(status: RunStatus) -> dict[str, Any]:
    return asdict(status)


def status_view(status: RunStatus) -> RenderableType:
    """What is shown in the terminal, within 80 columns."""
    parts: list[RenderableType] = [
        Text.assemble((status.name, "bold"), f"  {status.run}"),
        Text(status.explanation, style=_STYLES.get(status.state, "")),
    ]
    if status.state in ("running", "stopping") and status.live is not None:
        parts += _now_lines(status.live)
    parts += ["", _stages_table(status), ""]
    searched = [round for round in status.rounds if round.trees or round.quarantined]
    if searched:
        parts += [_problems_table(status, searched), ""]
    for round in status.rounds:
        parts += _round_lines(round, status.state)
    parts += _lineage_lines(status)
    parts.append(Text(_totals_line(status), style="cyan"))
    if status.go_on:
        parts.append(Text(f"to go on: {status.go_on}", style="bold"))
    return Group(*parts)


_STYLES = {"running": "green", "finished": "green", "failed": "red", "killed": "yellow"}


def _now_lines(live: Live) -> list[RenderableType]:
    now = live.progress
    if not now.stage:
        return []
    count = f" {now.done:,}/{now.total:,}" if now.total else ""
    facts = ", ".join(fact_text(k, v) for k, v in now.facts.items() if k != LEVELS_FACT)
    lines = [
        Text(f"now: {now.label}{count}" + (f"; {facts}" if facts else "")),
        Text(
            f"stage {duration(now.stage_elapsed_s)}, ETA {eta_text(now.stage_eta_s)}; "
            f"run ETA {eta_text(now.run_eta_s)}"
        ),
    ]
    if now.last_error:
        lines.append(Text(f"last error: {now.last_error}", style="yellow"))
    return list(lines)


def _stages_table(status: RunStatus) -> Table:
    names = [n for n in _RECORDS if any(n in round.stages for round in status.rounds)]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("round")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for round in status.rounds:
        cells = [_stage_cell(round.stages.get(name)) for name in names]
        table.add_row(_round_name(round.round), *cells)
    return table


def _stage_cell(stage: StageState | None) -> Text:
    if stage is None:
        return Text("")
    if stage.state == DONE:
        took = f" {duration(stage.seconds)}" if stage.seconds is not None else ""
        return Text(f"done{took}", style="green")
    return Text(stage.state, style={RUNNING: "bold", STOPPED: "yellow"}.get(stage.state, "dim"))


def _problems_table(status: RunStatus, rounds: Sequence[RoundState]) -> Table:
    of = f", of {status.problems['all']:,} problems" if status.problems else ""
    table = Table(
        title=f"problems solved / searched{of}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("round")
    names = [c for c in COLUMNS if any(c in round.searched for round in rounds)]
    for name in (*names, "trees", "commits", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for round in rounds:
        cells = [
            f"{round.solved.get(c, 0):,}/{round.searched[c]:,}" if c in round.searched else ""
            for c in names
        ]
        sums = (f"{round.trees:,}", f"{round.commits:,}", short(round.generated_tokens))
        table.add_row(_round_name(round.round), *cells, *sums)
    return table


def _round_lines(round: RoundState, state: str) -> list[Text]:
    lines = []
    name = f"round {round.round}"
    if round.passes and round.stages["rollout"].state != DONE:
        told = ", ".join(
            f"{p.name} {p.committed:,} of {p.planned:,} committed, {p.solved:,} solved"
            for p in round.passes
        )
        lines.append(Text(f"{name}: {told}"))
    if round.quarantined:
        lines.append(
            Text(f"{name}: quarantined problems: {len(round.quarantined):,}", style="yellow")
        )
        shown = list(round.quarantined.items())[:_SHOWN_PROBLEMS]
        lines += [Text(f"  {problem}: {error}", overflow="ellipsis") for problem, error in shown]
        lines += _more(len(round.quarantined))
    if round.suspects:
        lines.append(Text(f"{name}: suspect labels: {len(round.suspects):,}", style="yellow"))
        lines += [
            Text(
                f"  {s['problem_id']}: label {s['gold']}, {s['votes']} of {s['num_answers']} "
                f"answers say {s['answer']}"
            )
            for s in round.suspects[:_SHOWN_PROBLEMS]
        ]
        lines += _more(len(round.suspects))
    for checkpoint in round.checkpoints.values():
        if checkpoint.held:
            lines.append(
                Text(f"{name}: {checkpoint.version} still serves: {checkpoint.held}", "yellow")
            )
    return lines


def _more(count: int) -> list[Text]:
    left = count - _SHOWN_PROBLEMS
    return [Text(f"  and {left:,} more (--json names all)", style="dim")] if left > 0 else []


def _lineage_lines(status: RunStatus) -> list[Text]:
    lines = []
    for round in status.rounds:
        found = " -> ".join(filter(None, _lineage_parts(round)))
        if found:
            lines.append(Text(f"{_round_name(round.round)}: {found}", style="dim"))
    return [Text("lineage"), *lines] if lines else []


def _lineage_parts(round: RoundState) -> list[str]:
    lineage = round.lineage
    by = lineage.get("searched_by", {})
    models = [m["version"] for kind in ("policy", "ppm") for m in by.get(kind, [])]
    trees = lineage.get("trajectories")
    dataset = lineage.get("dataset")
    made = [f"{c.version}{' (held)' if c.held else ''}" for c in round.checkpoints.values()]
    return [
        " + ".join(filter(None, [*models, *by.get("grader", [])])),
        f"{trees['trees']:,} trees {trees['sha256'][:8]}" if trees else "",
        f"dataset {dataset['sha256'][:8]}" if dataset else "",
        ", ".join(made),
    ]


def _totals_line(status: RunStatus) -> str:
    parts = [f"{short(status.generated_tokens)} tokens generated"]
    if status.seconds_total is not None:
        starts = f" in {status.num_starts} starts" if status.num_starts > 1 else ""
        parts.insert(0, f"elapsed {duration(status.seconds_total)}{starts}")
    if status.cost_usd is not None:
        parts.append(f"${status.cost_usd:,.2f} so far")
    audited = [round for round in status.rounds if round.lost is not None]
    if audited:
        lost = sum(round.lost or 0 for round in audited)
        parts.append(f"trees lost {lost}, doubled {sum(r.doubled or 0 for r in audited)}")
    return "; ".join(parts)


def _round_name(number: int) -> str:
    return str(number) if number else "cold"


def short(count: int) -> str:
    """A large number in a few characters: 371672 -> 372k, 2100000 -> 2.1M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.1f}{letter}"
    return str(count)
