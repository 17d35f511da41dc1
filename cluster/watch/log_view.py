"""`rstar logs RUN`: what the processes of a run logged; with `--problem`, what became of it.

plans, commit markers --> which jobs had the problem, who wrote them, with which models
traces, if it was sampled --> the spans of its searches, indented, with their seconds
logs --> the lines about the problem, or about one of its jobs as a whole
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cluster.folder.run_folder import RunFolder, RunFolderError, resolve_problem
from cluster.jobs.queue import Job, StagePlan, plan_jobs
from cluster.telemetry import logs, tracing
from cluster.telemetry.logs import LogFilter, LogLine
from rollout.store import Commit, RunStore, TrajectoryStore, stored_rounds

_SINCE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red", "DEBUG": "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHistory:
    """A job that had the problem, and the marker that ended it."""

    job: Job
    commit: Commit | None
    """None: not committed."""


def job_history(store: RunStore, problem_id: str) -> list[JobHistory]:
    """Every job that ever had a problem, in order of round and stage, parts after their parent."""
    found = []
    for round in stored_rounds(store):
        trees = TrajectoryStore(store, round)
        plans = [StagePlan.from_json(data) for data in trees.plans().values()]
        for plan in sorted(plans, key=lambda plan: plan.tree_index):
            waiting = [job for job in plan_jobs(plan) if problem_id in job.problem_ids]
            while waiting:
                job = waiting.pop(0)
                try:
                    commit = trees.read_commit(job.id)
                except FileNotFoundError:
                    commit = None
                found.append(JobHistory(job=job, commit=commit))
                if commit is not None:
                    waiting += [job.child(g) for g in commit.remaining if problem_id in g]
    return found


def _planned_problems(store: RunStore) -> set[str]:
    return {
        problem_id
        for round in stored_rounds(store)
        for data in TrajectoryStore(store, round).plans().values()
        for problem_id in StagePlan.from_json(data).problem_ids
    }


def describe(history: JobHistory, problem_id: str) -> str:
    """For people: what became of the problem in this job."""
    job, commit = history.job, history.commit
    text = f"round {job.round}, stage {job.stage}, job {job.id}: "
    if commit is None:
        return text + "not committed"
    info = commit.info
    if problem_id in commit.failed:
        outcome = f"quarantined: {commit.failed[problem_id]}"
    elif any(problem_id in group for group in commit.remaining):
        outcome = "handed back" + (f" ({info['ended']})" if info.get("ended") else "")
    else:
        solved = [key.solved for key in commit.trees if key.problem_id == problem_id]
        outcome = "no tree" if not solved else "solved" if any(solved) else "not solved"
    models = [f"{name} {info[name]}" for name in ("policy", "ppm", "grader") if info.get(name)]
    by = f", by {info['writer']}" if info.get("writer") else ""
    return text + outcome + by + (f", with {', '.join(models)}" if models else "")


def show_logs(
    run: Path,
    console: Console,
    *,
    problem: str | None = None,
    job: str | None = None,
    lease: str | None = None,
    process: str | None = None,
    level: str = "info",
    since: str | None = None,
    last: int | None = None,
    follow: bool = False,
    as_json: bool = False,
) -> None:
    """Print the wanted lines of a run's processes, oldest first.

    Args:
        problem: an id, or the beginning of exactly one; its history is printed above its lines.
        job, lease: their ids.
        process: beginning of a name, as "policy" or "worker-0".
        since: a time ago, as "10m".
        last: only so many lines; None: all of them.
    Raises:
        RunFolderError: no run, no logs or no such problem there, or an option cannot be read.
    """
    store = RunFolder(run).store
    if not store.exists(""):
        raise RunFolderError(f"{run}: no such folder")
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise RunFolderError(f"--level {level!r}: expected debug, info, warning or error")
    problem_id, jobs = "", frozenset({job} if job else ())
    if problem is not None:
        problem_id = resolve_problem(problem, _planned_problems(store), str(run))
        history = job_history(store, problem_id)
        jobs = jobs or frozenset(entry.job.id for entry in history)
        if not as_json:
            console.print(Text(f"problem {problem_id}", style="bold"))
            for entry in history:
                console.print(Text(f"  {describe(entry, problem_id)}"), soft_wrap=True)
            console.print()
            _print_spans(read_spans(store, problem_id), console)
    elif not store.exists(logs.FOLDER):
        raise RunFolderError(f"{run}: no logs here; runs keep them in {logs.FOLDER}/")
    wanted = LogFilter(
        problem=problem_id,
        jobs=jobs,
        lease=lease or "",
        process=process or "",
        level=levels[level.upper()],
        since_unix_s=_since(since, time.time()),
    )
    lines = list(logs.select(logs.read(store), wanted))
    shown = lines if last is None else lines[len(lines) - min(last, len(lines)) :]
    _print_lines(shown, console, as_json)
    if not shown and not follow and not as_json:
        console.print("no line matches", style="dim")
    if follow:
        _print_lines(logs.select(logs.follow(store), wanted), console, as_json)


def _since(text: str | None, now_unix_s: float) -> float:
    if text is None:
        return 0.0
    found = _SINCE.fullmatch(text.strip())
    if found is None:
        raise RunFolderError(f"--since {text!r}: expected a number and s, m, h or d, as 10m")
    return now_unix_s - float(found[1]) * _SECONDS[found[2]]


def _print_lines(lines: Iterable[LogLine], console: Console, as_json: bool) -> None:
    for line in lines:
        if as_json:
            console.file.write(line.to_json() + "\n")
            console.file.flush()
            continue
        clock = time.strftime("%H:%M:%S", time.localtime(line.unix_s))
        missing = {name: value for name, value in line.ids.items() if f"{name}=" not in line.text}
        text = Text(f"{clock}.{int(line.unix_s % 1 * 1000):03d} ", style="dim")
        text.append(f"{line.level:<7} ", style=_COLOURS.get(line.level, ""))
        text.append(f"{line.process:<14} ", style="cyan")
        text.append(line.text)
        text.append("".join(f" {name}={value}" for name, value in missing.items()), style="dim")
        console.print(text, soft_wrap=True)


# ------------------------------------------------------------------------------- spans


def read_spans(store: RunStore, problem_id: str) -> list[dict[str, Any]]:
    """Spans of all traces of a problem, as `telemetry.tracing` writes them, in order of time."""
    spans: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    wanted = set()
    for data in store.read_many(store.files(tracing.FOLDER)).values():
        for line in data.decode(errors="replace").splitlines():
            try:
                span = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            spans[span["trace"]].append(span)
            if span["attributes"].get("problem") == problem_id:
                wanted.add(span["trace"])
    return sorted(
        (span for trace in wanted for span in spans[trace]), key=lambda span: span["start_unix_s"]
    )


def _print_spans(spans: Sequence[dict[str, Any]], console: Console) -> None:
    if not spans:
        return
    known = {span["span"] for span in spans}
    children: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for span in spans:
        children[span["parent"] if span["parent"] in known else ""].append(span)
    for span, depth in _walk(children, "", 0):
        facts = {k: v for k, v in span["attributes"].items() if k != "problem"}
        text = Text(f"  {'  ' * depth}{span['name']}")
        text.append(f"  {1000 * span['seconds']:,.1f} ms", style="cyan")
        text.append("".join(f" {name}={value}" for name, value in facts.items()), style="dim")
        if span["error"]:
            text.append(f" {span['error']}", style="red")
        console.print(text, soft_wrap=True)
    console.print()


def _walk(
    children: dict[str, list[dict[str, Any]]], parent: str, depth: int
) -> Iterator[tuple[dict[str, Any], int]]:
    for span in children.get(parent, ()):
        yield span, depth
        yield from _walk(children, span["span"], depth + 1)
