"""The records of a sandbox's supervisor: trees, nodes, jobs, and the processes behind them.

    Forest --1:n--> Tree --1:n--> Node --0..1--> Process (while it lives)
                                  Node --1:n--> Job (a step that runs or waits on it) --> Request

A node is what the client may name. It keeps its code and the hash of its output, so that it can be
made again when its process has gone. Each answer is a `StepResult` in wire form, see `step_result`.
"""

from __future__ import annotations

import socket
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SPAWN_TIMEOUT_S = 20.0

NOT_ABOUT_THE_CODE = frozenset({"replay_diverged", "pool_overloaded", "infra_error"})
"""Statuses that another try may change: their results are not kept."""

SPAWNING, RUNNING, IDLE, ENDING = "spawning", "running", "idle", "ending"
"""Phases of a process."""


class Refused(Exception):
    """The client's own mistake; becomes its ValueError."""


def step_result(
    status: str, error_type: str = "", error_message: str = "", **more: Any
) -> dict[str, Any]:
    """A `StepResult` in wire form."""
    return {
        "status": status,
        "state": None,
        "error_type": error_type,
        "error_message": error_message,
        "replayed": 0,
        "attempts": 1,
        **more,
    }


@dataclass(slots=True, eq=False)
class Request:
    """One client request for sibling steps, answered when its last step is."""

    remaining: int
    answer: Callable[[list[dict[str, Any]]], None]
    results: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.results = [{}] * self.remaining

    def put(self, index: int, step_result: dict[str, Any]) -> None:
        self.results[index] = step_result
        self.remaining -= 1
        if self.remaining == 0:
            self.answer(self.results)


@dataclass(slots=True, eq=False)
class Tree:
    problem_id: str
    flavour: str
    seed: int
    uid: int | None
    """The user its processes become; None: they stay the supervisor's."""
    root: Node = field(init=False)
    nodes: dict[str, Node] = field(default_factory=dict)
    live: int = 0
    base_space: int = 0
    """Bytes of address space of the warm interpreter itself, which no step is charged for."""
    base_resident: int = 0
    """The same of resident memory."""
    on_open: Callable[[str], None] | None = None
    """To be told once: the root is ready (empty text), or why there is none."""


@dataclass(slots=True, eq=False)
class Node:
    """A state the client may name: how to make it, and its process while it lives."""

    id: str
    tree: Tree
    parent: Node | None
    code: str
    depth: int = field(init=False)
    digest: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    process: Process | None = None
    live_children: int = 0
    busy: int = 0
    """Children ordered whose first word has not come yet."""
    evict_when_free: bool = False
    poisoned: bool = False
    own_end: str = ""
    """How its process ended while it waited, if it did so by itself."""
    cached: dict[tuple, dict[str, Any]] = field(default_factory=dict)
    running: dict[tuple, Job] = field(default_factory=dict)
    waiting: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1


@dataclass(slots=True, eq=False)
class Job:
    """One execution of one code on one parent, for all who asked for it."""

    parent: Node
    code: str
    key: tuple
    limits: dict[str, Any]
    waiters: list[tuple[Request, int]] = field(default_factory=list)
    attempts: int = 0
    replayed: int = 0
    blameless: bool = False
    """Something else than its parent's code kept it from running."""
    replay_of: Node | None = None


@dataclass(slots=True, eq=False)
class Process:
    """A root or state process, from the order that makes it to its reaping."""

    channel: socket.socket
    tree: Tree
    job: Job | None
    """The step it runs; None for a root, and once the step is answered."""
    started: float
    node: Node | None = None
    parent: Process | None = None
    listener: int | None = None
    nonce: int = 0
    phase: str = SPAWNING
    pid: int = 0
    permits: int = 0
    """Forks ordered of it and not yet made."""
    refusals: int = 0
    granted: deque[float] = field(default_factory=deque)
    running_since: float = field(init=False)
    deadline: float = field(init=False)
    eof_at: float = 0.0
    """When its channel closed; 0 while it is open."""
    lived_on: bool = False
    """It went on running after that, and was killed for it."""
    burning: bool = True
    cpu_s: float = 0.0
    parts: list[bytes] = field(default_factory=list)
    received: int = 0

    def __post_init__(self) -> None:
        self.running_since = self.started
        self.deadline = self.started + SPAWN_TIMEOUT_S


@dataclass(slots=True, eq=False)
class Zygote:
    """A warm interpreter, and the roots that wait for it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    ready: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    orders: list[Node] = field(default_factory=list)


class Forest:
    """All trees of a sandbox and all states the client may name."""

    def __init__(self) -> None:
        self.trees: dict[str, Tree] = {}
        self.nodes: dict[str, Node] = {}
        self.next_number = 1

    def add(self, state: str, tree: Tree, parent: Node | None, code: str) -> Node:
        node = Node(state, tree, parent, code)
        tree.nodes[state] = self.nodes[state] = node
        return node

    def add_new(self, tree: Tree, parent: Node | None, code: str) -> Node:
        """A node under a name that was never given before."""
        number = self.next_number
        self.next_number += 1
        return self.add(f"{tree.problem_id}:{number}", tree, parent, code)
