"""`rstar why RUN`: why it does not move, on one screen.

    RUN/live.json (the driver's account of its fleet) --> suspects --> a look at them on their nodes
    RUN/logs, the disk of RUN ------------------------------------+--> culprits, the worst first

A culprit is judged (`culprits`, plain data in, plain data out) by how far up the chain it stands: a
full disk stops whoever commits, a missing node its actors, a stopped actor those that wait for it.
Without Ray the account and the folder have to do, and suspects on this machine are looked at from
here. Nothing is written, and nobody is asked to do anything (`cluster.watch.probe`).

Not covered: an engine that answers, makes steps and is wrong; a network that is slow.
"""

from __future__ import annotations

import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.folder.run_folder import RunFolder
from cluster.telemetry import logs
from cluster.telemetry.live import (
    ActorAccount,
    FleetAccount,
    Live,
    NodeAccount,
    WaitAccount,
    read_live,
)
from cluster.telemetry.logs import LogLine
from cluster.telemetry.progress import duration
from cluster.watch.probe import MachineLook, ProcessLook, RayLook, ask_ray, how_full, look_at
from cluster.watch.status import run_folder, runs, state_text

SILENT_S = 5.0
"""An actor, looked at every second, that said nothing for so long."""

STILL_S = 15.0
"""Work in hand and no progress for so long."""

STAGE_STILL_S = 120.0
"""A stage without progress for so long is told even if there is nobody to blame."""

STARVED = 0.5
"""Cores that a process was ready for and did not get."""

LOSS_S = 3600.0
"""Deaths are told for so long."""

ERRORS_S = 900.0
NUM_ERRORS = 5
NUM_SUSPECTS = 6
STACK_LINES = 14
FULL_DISK = ("no space left", "enospc", "disk quota exceeded")

KINDS = {
    "policy": "policy replica",
    "ppm": "PPM replica",
    "sandbox": "sandbox worker",
    "worker": "rollout worker",
}
"""Pools for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """Something a run may hang on."""

    kind: str
    """run | driver | disk | node | actor | starved | slow | store | pool | stage"""
    name: str
    """Of it: an actor's, a node's id, a folder."""
    host: str
    """Of its machine; "" where it has none."""
    for_s: float
    """Since when, in seconds."""
    text: str
    """A sentence for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Everything that is shown."""

    run: str
    state: str
    alive: bool
    """Whether the driver told of itself lately."""
    live: Live | None
    culprits: Sequence[Culprit] = ()
    """The worst first."""
    slowest: Mapping[str, ActorAccount] = field(default_factory=dict)
    """By pool, of those that have work."""
    machines: Mapping[str, MachineLook] = field(default_factory=dict)
    """Of the suspects, by node; "" for this one without Ray."""
    errors: Sequence[LogLine] = ()
    """The last warnings and errors, the newest last."""
    ray: str = ""
    """How Ray took part, for people."""


def read_why(run: str | Path, *, now_s: float, offline: bool = False) -> Why:
    """Find out why a run does not move.

    Args:
        now_s: seconds since 1970.
        offline: do not try to reach Ray.
    Raises:
        RunFolderError: there is no such run.
    """
    folder = run_folder(run)
    live = read_live(folder.store)
    alive = runs(live, now_s)
    fleet = live.fleet if live is not None and live.claims_to_run else None
    slowest = _slowest(fleet)
    suspects = _suspects(fleet, slowest)
    local = folder.store.local
    folders = [str(local)] if local is not None else []
    machines, ray, said = _look(live, suspects, folders, offline=offline)
    full = dict(pair for machine in machines.values() for pair in machine.full.items())
    if local is not None and (left := how_full(local)):
        full[str(local)] = left
    errors = last_errors(folder, now_s)
    return Why(
        run=str(run),
        state=state_text(live, now_s),
        alive=alive,
        live=live,
        culprits=culprits(live, alive, now_s, machines, ray.nodes, full, errors),
        slowest=slowest,
        machines=machines,
        errors=errors,
        ray=said,
    )


def last_errors(folder: RunFolder, now_s: float) -> list[LogLine]:
    """What processes of the run complained of lately."""
    wanted = logs.LogFilter(level=30, since_unix_s=now_s - ERRORS_S)
    return list(logs.select(logs.read_ends(folder.store), wanted))[-NUM_ERRORS:]


# ------------------------------------------------------------------------------- whom to look at


def _slowest(fleet: FleetAccount | None) -> dict[str, ActorAccount]:
    """Of each pool the member with work that is worst off."""
    found: dict[str, ActorAccount] = {}
    if fleet is None:
        return found
    # One that is stopped told of its work for the last time before it got it.
    awaited = {wait.on for wait in fleet.waits}
    for actor in fleet.actors:
        if actor.pool not in KINDS or not (actor.open or actor.name in awaited):
            continue
        best = found.get(actor.pool)
        if best is None or _worse(actor, best):
            found[actor.pool] = actor
    return found


def _worse(one: ActorAccount, other: ActorAccount) -> bool:
    def quiet_s(actor: ActorAccount) -> float:
        quiet_s = max(actor.still_s, actor.silent_s)
        return quiet_s if quiet_s >= SILENT_S else 0.0

    if quiet_s(one) != quiet_s(other):
        return quiet_s(one) > quiet_s(other)
    return (one.speed or 0.0) < (other.speed or 0.0)


def _suspects(
    fleet: FleetAccount | None, slowest: Mapping[str, ActorAccount]
) -> list[ActorAccount]:
    """Who is worth a look: the silent, those that are waited for longest, the slowest."""
    if fleet is None:
        return []
    by_name = {actor.name: actor for actor in fleet.actors}
    silent = [a for a in fleet.actors if a.silent_s >= SILENT_S or a.still_s >= STILL_S]
    awaited = [by_name[wait.on] for wait in fleet.waits if wait.on in by_name]
    found = {a.name: a for a in (*silent, *awaited, *slowest.values()) if a.pid}
    return list(found.values())[:NUM_SUSPECTS]


def _look(
    live: Live | None, suspects: Sequence[ActorAccount], folders: Sequence[str], *, offline: bool
) -> tuple[dict[str, MachineLook], RayLook, str]:
    """Look at suspects on their machines, the driver included where it is on this one."""
    pids: defaultdict[str, list[int]] = defaultdict(list)
    for actor in suspects:
        pids[actor.node].append(actor.pid)
    here = socket.gethostname()
    ray = RayLook(problem="not asked")
    address = live.fleet.address if live is not None and live.fleet is not None else ""
    if address and not offline:
        ray = ask_ray(address, pids, folders)
    machines = dict(ray.machines)
    mine = [a.pid for a in suspects if a.host == here and a.node not in machines]
    if live is not None and live.host == here and live.claims_to_run:
        mine.append(live.pid)
    if mine or not machines:
        machines[""] = MachineLook.from_json(look_at(mine, folders))
    if not address:
        return machines, ray, "Ray: the account names none; only the folder was read"
    if ray.problem:
        return machines, ray, f"Ray at {address}: {ray.problem}; the account and the folder tell"
    living = sum(ray.nodes.values())
    text = f"Ray at {address}: {living} of {len(ray.nodes)} nodes live"
    for node, why in ray.silent.items():
        text += f"; node {node[:8]} said nothing: {why}"
    return machines, ray, text


# ------------------------------------------------------------------------------- judgement


def culprits(
    live: Live | None,
    alive: bool,
    now_s: float,
    machines: Mapping[str, MachineLook],
    nodes: Mapping[str, bool],
    full: Mapping[str, str],
    errors: Sequence[LogLine],
) -> list[Culprit]:
    """What a run may hang on, the worst first.

    Args:
        alive: whether the driver told of itself lately.
        machines: see `Why`.
        nodes: whether each node lives, as Ray says; {}: it was not asked.
        full: folder -> what is left, of disks that are as good as full.
        errors: the last ones.
    """
    found = _disks(live, now_s, full, errors)
    if live is None:
        return [*found, Culprit(kind="run", name="", host="", for_s=0, text="it never started")]
    looks = {pid: look for m in machines.values() for pid, look in m.processes.items()}
    age_s = max(0.0, now_s - live.time_unix_s)
    if not alive:
        return [*found, _driver(live, age_s, looks.get(live.pid), bool(found))]
    fleet = live.fleet or FleetAccount()
    if fleet.loop_still_s > SILENT_S:
        found.append(_driver(live, fleet.loop_still_s, looks.get(live.pid), bool(found)))
    gone = _nodes(fleet, nodes, age_s)
    lost = {culprit.name for culprit in gone}
    found += gone
    hosts = {pid: machine for machine in machines.values() for pid in machine.processes}
    waits = defaultdict(list)
    for wait in fleet.waits:
        waits[wait.on].append(wait)
    actors = [
        culprit
        for actor in fleet.actors
        if actor.node not in lost
        and (
            culprit := _actor(
                actor, looks.get(actor.pid), hosts.get(actor.pid), waits[actor.name], age_s
            )
        )
    ]
    pids = {actor.name: actor.pid for actor in fleet.actors}

    def worst(culprit: Culprit) -> tuple[int, float]:
        if culprit.kind == "starved":  # on a busy machine many are
            look = looks[pids[culprit.name]]
            return 1, look.cpu / look.delayed
        return (0 if culprit.kind == "actor" else 2), -culprit.for_s

    found += sorted(actors, key=worst)
    for part in fleet.parts:
        if part.part == "commit" and not any(c.kind == "disk" for c in found):
            text = (
                f"the store takes no commit: {part.open} finished shards wait for it, for "
                f"{duration(part.for_s)}; last error: {live.progress.last_error or 'none'}"
            )
            found.append(Culprit(kind="store", name="", host="", for_s=part.for_s, text=text))
    if fleet.short and not gone:
        found.append(Culprit(kind="pool", name="", host="", for_s=0.0, text=fleet.short))
    now = live.progress
    if not found and now.total and now.stage_still_s >= STAGE_STILL_S:
        still_s = now.stage_still_s + age_s
        text = (
            f"{now.label} has not moved for {duration(still_s)}, and nobody is seen to hold it up"
        )
        found.append(Culprit(kind="stage", name="driver", host=live.host, for_s=still_s, text=text))
    return found


def _disks(
    live: Live | None, now_s: float, full: Mapping[str, str], errors: Sequence[LogLine]
) -> list[Culprit]:
    told = [(e.unix_s, f"{e.process}: {e.text}") for e in errors]
    if live is not None and live.progress.last_error:
        told.append((live.time_unix_s, live.progress.last_error))
    said = [(t, text) for t, text in told if any(words in text.lower() for words in FULL_DISK)]
    found = []
    for folder, left in full.items():
        since_s = min((t for t, _ in said), default=now_s)
        text = f"the disk of {folder} is full ({left}): what has to be written there waits"
        found.append(
            Culprit(kind="disk", name=folder, host="", for_s=max(0.0, now_s - since_s), text=text)
        )
    if said and not full:
        time_s, words = max(said)
        if now_s - time_s < 60.0:
            text = f"a disk is full, though not as seen from here: {words}"
            found.append(Culprit(kind="disk", name="", host="", for_s=now_s - time_s, text=text))
    return found


def _driver(live: Live, for_s: float, look: ProcessLook | None, full: bool) -> Culprit:
    who, ago = f"the driver (process {live.pid} on {live.host})", duration(for_s)
    if not live.claims_to_run:
        text = f"the run {live.state} {ago} ago" + (f": {live.error}" if live.error else "")
        return Culprit(kind="run", name="", host=live.host, for_s=for_s, text=text)
    if look is None:
        text = f"{who} told nothing for {ago}; its machine cannot be looked at from here"
    elif look.state == "gone":
        text = f"{who} is dead, last heard of {ago} ago; start its command again: {live.command}"
    elif look.state == "stopped":
        text = f"{who} is stopped (SIGSTOP), last heard of {ago} ago; kill -CONT {live.pid}"
    elif full:
        text = f"{who} lives ({look.state}), but could not write its account for {ago}"
    elif live.fleet is not None and live.fleet.loop_still_s > SILENT_S:
        text = f"{who} hears nobody: its event loop stands still for {ago}; see its stack"
    else:
        text = f"{who} lives ({look.state}), but told nothing for {ago}: it hangs, or its store "
        text += "does; see its stack"
    return Culprit(kind="driver", name="driver", host=live.host, for_s=for_s, text=text)


def _nodes(fleet: FleetAccount, nodes: Mapping[str, bool], age_s: float) -> list[Culprit]:
    """Nodes that went and are missed; those on which nobody answers, while others do."""
    known = {node.node: node for node in fleet.nodes if node.state == "gone"}
    by_node: defaultdict[str, list[ActorAccount]] = defaultdict(list)
    for actor in fleet.actors:
        if actor.node:
            by_node[actor.node].append(actor)
    for node, on_it in by_node.items():
        if node in known:
            continue
        silent_s = min(actor.silent_s for actor in on_it)
        if nodes.get(node) is False or (
            len(on_it) > 1 and silent_s >= SILENT_S and len(by_node) > 1
        ):
            known[node] = NodeAccount(node=node, host=on_it[0].host, state="silent", for_s=silent_s)
    found = []
    for node, told in known.items():
        lost = [loss for loss in fleet.losses if loss.node == node and loss.ago_s < LOSS_S]
        names = [loss.name for loss in lost] + [a.name for a in by_node[node]]
        if not names or (lost and not by_node[node] and not fleet.short):
            continue  # it is not missed
        for_s = told.for_s + age_s
        what = "is gone" if told.state == "gone" else "does not answer"
        text = f"node {told.host} ({node[:8]}) {what} since {duration(for_s)}"
        text += f" ({told.reason})" if told.reason else ""
        text += f"; {', '.join(sorted(names))} {'were' if lost else 'are'} on it"
        text += f"; {fleet.short}" if fleet.short else ""
        found.append(Culprit(kind="node", name=node, host=told.host, for_s=for_s, text=text))
    return sorted(found, key=lambda culprit: -culprit.for_s)


def _actor(
    actor: ActorAccount,
    look: ProcessLook | None,
    machine: MachineLook | None,
    waits: Sequence[WaitAccount],
    age_s: float,
) -> Culprit | None:
    """What is wrong with an actor; None: nothing that is seen."""
    who = f"{actor.name} (process {actor.pid} on {actor.host})"
    waited = ""
    if waits:
        oldest_s = max(wait.for_s for wait in waits) + age_s
        count = sum(wait.count for wait in waits)
        waited = f"; {_number(count, 'request')} wait for it, the oldest {duration(oldest_s)}"
    for_s, kind = max(actor.silent_s, actor.still_s) + age_s, "actor"
    if look is not None and look.state == "stopped":
        text = f"{who} is stopped (SIGSTOP), silent for {duration(for_s)}{waited}"
        text += f"; kill -CONT {actor.pid}, or kill it: it is replaced"
    elif look is not None and look.stopped:
        text = f"{who} hangs on {', '.join(look.stopped[:3])}, stopped (SIGSTOP){waited}"
    elif look is not None and look.state == "gone" and actor.silent_s >= SILENT_S:
        text = f"{who} has died, and is not replaced yet{waited}"
    elif (
        look is not None
        and (actor.open or waits)
        and look.delayed >= STARVED
        and look.cpu < 0.25 * look.delayed
    ):
        kind = "starved"
        text = f"{who} gets no CPU: it used {look.cpu:.2f} cores and was ready for "
        text += f"{look.cpu + look.delayed:.2f}{waited}"
        if machine is not None:
            text += f"; load {machine.load:.0f} on {_number(machine.cores, 'core')}"
            text += f", taken by {', '.join(machine.hogs)}" if machine.hogs else ""
    elif actor.state in ("ready", "syncing") and actor.silent_s >= SILENT_S:
        text = f"{who} says nothing for {duration(actor.silent_s + age_s)}{waited}"
    elif actor.state == "ready" and actor.still_s >= STILL_S and actor.pool != "worker":
        kind = "slow"
        text = (
            f"{who} has {actor.open} open and finished none for {duration(actor.still_s)}{waited}"
        )
    else:
        return None
    return Culprit(kind=kind, name=actor.name, host=actor.host, for_s=for_s, text=text)


def _number(count: int, of: str) -> str:
    return f"{count} {of}{'s' * (count != 1)}"


# ------------------------------------------------------------------------------- for people


def show_why(
    run: str | Path, console: Console, *, as_json: bool = False, offline: bool = False
) -> None:
    """Print why a run does not move.

    Raises:
        RunFolderError: there is no such run.
    """
    why = read_why(run, now_s=time.time(), offline=offline)
    if as_json:
        console.file.write(json.dumps(asdict(why), indent=1) + "\n")
    else:
        console.print(why_view(why))


def why_view(why: Why) -> RenderableType:
    """One screen."""
    parts: list[RenderableType] = [Text(f"{why.run}  {why.state}", style="bold")]
    live = why.live
    now = live.progress if live is not None and why.alive else None
    if now is not None and now.stage:
        of = f"{now.done:,} of {now.total:,}" if now.total else "it counts nothing"
        moved = f"{now.label}: {of}, last change {duration(now.stage_still_s)} ago"
        parts.append(Text(moved))
    parts.append(Text(""))
    for place, culprit in enumerate(why.culprits[:4]):
        style = "bold red" if not place else "yellow"
        parts.append(Text(("" if place else "why: ") + culprit.text, style=style))
    if not why.culprits:
        parts.append(Text("why: nothing stands still that can be seen", style="green"))
    fleet = live.fleet if live is not None and why.alive else None
    if fleet is not None:
        parts += [Text(""), *_wait_lines(fleet), *_slowest_lines(why)]
    if why.errors:
        parts.append(Text("last errors", style="bold"))
        parts += [
            Text(
                f"  {time.strftime('%H:%M:%S', time.localtime(e.unix_s))} {e.process}: {_first(e)}"
            )
            for e in why.errors
        ]
    parts += _stack_lines(why)
    parts.append(Text(why.ray, style="dim"))
    return Group(*parts)


def _first(line: LogLine) -> str:
    return (line.text.splitlines() or [""])[0][:160]


def _wait_lines(fleet: FleetAccount) -> Iterable[RenderableType]:
    lines = [
        f"  {part.part} ({part.open} open) has stood still for {duration(part.for_s)}"
        + (f", waits on {part.waits_on}" if part.waits_on else "")
        for part in fleet.parts
    ]
    by_target: defaultdict[str, list[WaitAccount]] = defaultdict(list)
    for wait in fleet.waits:
        by_target[wait.on or f"any {KINDS.get(wait.pool, wait.pool)}"].append(wait)
    for target, waits in list(by_target.items())[:5]:
        oldest = max(waits, key=lambda wait: wait.for_s)
        count = _number(sum(wait.count for wait in waits), "request")
        who = oldest.who if len(waits) == 1 else f"{len(waits)} rollout workers"
        lines.append(f"  {count} of {who} on {target}, the oldest for {duration(oldest.for_s)}")
    return [Text("who waits for whom", style="bold"), *map(Text, lines)] if lines else []


def _slowest_lines(why: Why) -> Iterable[RenderableType]:
    if not why.slowest:
        return []
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("slowest", "name", "node", "process", "open", "still", "silent", "state", "CPU"):
        table.add_column(title, no_wrap=True)
    looks = {pid: look for m in why.machines.values() for pid, look in m.processes.items()}
    for pool, actor in why.slowest.items():
        look = looks.get(actor.pid)
        table.add_row(
            KINDS[pool],
            actor.name,
            actor.host,
            str(actor.pid),
            str(actor.open),
            duration(actor.still_s),
            duration(actor.silent_s),
            actor.state if look is None else look.state,
            "" if look is None else f"{look.cpu:.1f} of {look.cpu + look.delayed:.1f}",
        )
    return [table, Text("")]


def _stack_lines(why: Why) -> Iterable[RenderableType]:
    """The stack of the first culprit that has a process, else of the slowest replica."""
    named = {actor.name: actor.pid for actor in why.slowest.values()}
    live = why.live
    if live is not None and live.fleet is not None:
        named |= {actor.name: actor.pid for actor in live.fleet.actors}
        named["driver"] = live.pid
    looks = {pid: look for m in why.machines.values() for pid, look in m.processes.items()}
    shown = [c.name for c in why.culprits if named.get(c.name) in looks]
    shown += [actor.name for actor in why.slowest.values() if actor.pid in looks]
    for name in shown[:1]:
        look = looks[named[name]]
        if not look.stack:
            return [Text(f"no stack of {name}: {look.no_stack}", style="yellow")]
        lines = look.stack.splitlines()
        threads = ("Thread", "Current thread")
        lines = lines[next((i for i, t in enumerate(lines) if t.startswith(threads)), 0) :]
        more = len(lines) - STACK_LINES
        text = [*lines[:STACK_LINES], *([f"... {more} more lines with --json"] if more > 0 else [])]
        title = Text(f"stack of {name} (process {look.pid})", style="bold")
        return [title, *(Text(f"  {line}", style="dim") for line in text)]
    return []
