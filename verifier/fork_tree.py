"""The supervisor of a sandbox: a tree of live forked interpreters, judged from outside.

    sandbox_client --JSON frames--> supervisor --orders--> zygote, roots, states (sandbox_runner)

One process, one thread, one epoll loop. It is the parent of every zygote, root and state, so the
kernel tells it alone how each one ended and what it used; nothing a state says about limits or
exits is believed.

Life of a step:   QUEUED -launch-> SPAWNING -hello-> RUNNING -reply-> IDLE (kept as a state)
                                       |                |----reply not ok, limit, death----> reaped
                                       |---- no hello: the parent is gone --> queued again

Fork permission: the supervisor sends a spawn order to the parent state and expects one `clone` from
exactly that pid; the kernel holds each clone of a tree until the supervisor answers. The hello of a
child carries its pid by kernel credentials. Where notification is missing (`best_effort`) a
watchdog kills every child of the supervisor that it did not order.

A state's channel is a SOCK_SEQPACKET pair made here; the child's end travels with the spawn order
and already holds the code, so a parent never sees what its children run. Whatever breaks the fixed
reply format is a `protocol_error`. No pickle anywhere.

Eviction: least recently used first, states without live children before others. A node keeps its
code and the hash of its output; replay runs the path from the nearest live ancestor and compares
each hash.

Scheduling: a step counts against the cores for its first 25 ms; after that only while it burns CPU,
and then against three times the cores, so a few hung steps never hold back their siblings. A step
at its deadline that stood ready without a core for most of its time gets that time back.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verifier import isolation
from verifier.sandbox_client import interpreter_command, interpreter_environment

# The wire format towards the states; the other end is sandbox_runner.
REQUEST = struct.Struct("<4sIIIIIIQI")
REPLY = struct.Struct("<4sIBBdQIII")
REQUEST_MAGIC, REPLY_MAGIC = b"RSQ1", b"RSA1"
HELLO, ROOT_HELLO, SPAWN, NO_FORK, READY = b"H", b"L", b"S", b"N", b"READY"
FRAME_BYTES = 60_000
ZYGOTE_MODULES = ("isolation", "memory_image", "sandbox_warm_up", "sandbox_runner")
REPLY_STATUSES = ("ok", "error", "memory", "output_limit", "denied")

FAST_S = 0.025
TICK_S = 0.05
SPAWN_TIMEOUT_S = 20.0
EOF_GRACE_S = 0.25
FOREIGN_WINDOW_S = 2.0
"""After a kill from outside, children lost before their first word count as victims this long."""
MAX_ATTEMPTS = 3
MAX_STRETCH = 10
MAX_RUNNING = 64
MAX_QUEUE = 20_000
MAX_ZYGOTE_STARTS = 5
PAGE = resource.getpagesize()
_CREDENTIALS_SPACE = socket.CMSG_SPACE(12)
_HELLO_SPACE = _CREDENTIALS_SPACE + socket.CMSG_SPACE(4)

SELF_CHECK = (
    ("import socket\nsocket.socket()", ("denied", "error")),
    ("import os\nos.fork()", ("denied", "error")),
    ("import os\nos.execv('/bin/true', ['true'])", ("denied", "error")),
    ("open('/etc/passwd').read()", ("denied", "error")),
    ("print(6 * 7)", ("ok",)),
)
"""What every sandbox tries on itself before it says it is ready."""


class _Request:
    """One client request for sibling steps, answered when its last step is."""

    __slots__ = ("answer", "remaining", "results")

    def __init__(self, count: int, answer: Callable[[list[dict[str, Any]]], None]) -> None:
        self.results: list[dict[str, Any]] = [{}] * count
        self.remaining = count
        self.answer = answer

    def put(self, index: int, result: dict[str, Any]) -> None:
        self.results[index] = result
        self.remaining -= 1
        if self.remaining == 0:
            self.answer(self.results)


class _Tree:
    __slots__ = (
        *("base_resident", "base_space", "flavour", "live", "nodes", "on_open", "problem_id"),
        *("root", "seed", "uid"),
    )

    def __init__(self, problem_id: str, flavour: str, seed: int, uid: int | None) -> None:
        self.problem_id, self.flavour, self.seed, self.uid = problem_id, flavour, seed, uid
        self.nodes: dict[str, _Node] = {}
        self.live = 0
        # bytes of the warm interpreter itself, which no step is charged for
        self.base_space = self.base_resident = 0
        self.root: _Node
        self.on_open: Callable[[str], None] | None = None


class _Node:
    """A state the client may name: how to make it, and its process while it lives."""

    __slots__ = (
        *("busy", "cached", "code", "depth", "digest", "evict_when_free", "id", "limits"),
        *(
            "live_children",
            "own_end",
            "parent",
            "poisoned",
            "process",
            "running",
            "tree",
            "waiting",
        ),
    )

    def __init__(self, state: str, tree: _Tree, parent: _Node | None, code: str) -> None:
        self.id, self.tree, self.parent, self.code = state, tree, parent, code
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.digest = ""
        self.limits: dict[str, Any] = {}
        self.process: _Process | None = None
        self.live_children = 0
        self.busy = 0
        self.evict_when_free = False
        self.poisoned = False
        self.own_end = ""
        self.cached: dict[tuple, dict[str, Any]] = {}
        self.running: dict[tuple, _Job] = {}
        self.waiting: list[_Job] = []


class _Job:
    """One execution of one code on one parent, for all who asked for it."""

    __slots__ = (
        *("attempts", "blameless", "code", "key", "limits", "parent", "replay_of", "replayed"),
        *("waiters",),
    )

    def __init__(self, parent: _Node, code: str, key: tuple, limits: dict[str, Any]) -> None:
        self.parent, self.code, self.key, self.limits = parent, code, key, limits
        self.waiters: list[tuple[_Request, int]] = []
        self.attempts = 0
        self.replayed = 0
        self.blameless = False
        self.replay_of: _Node | None = None


SPAWNING, RUNNING, IDLE, ENDING = "spawning", "running", "idle", "ending"


class _Process:
    """A root or state process, from the order that makes it to its reaping."""

    __slots__ = (
        *("burning", "channel", "cpu_s", "deadline", "eof_at", "granted", "job", "kill_reason"),
        *("listener",),
        *("node", "nonce", "parent", "parts", "permits", "phase", "pid", "received", "refusals"),
        *("running_since", "started", "tree"),
    )

    def __init__(self, channel: socket.socket, tree: _Tree, job: _Job | None, now: float) -> None:
        self.channel, self.tree, self.job = channel, tree, job
        self.phase = SPAWNING
        self.pid = 0
        self.nonce = 0
        self.node: _Node | None = None
        self.parent: _Process | None = None
        self.listener: int | None = None
        self.permits = self.refusals = 0
        self.granted: deque[float] = deque()
        self.started = self.running_since = now
        self.deadline = now + SPAWN_TIMEOUT_S
        self.kill_reason = ""
        self.eof_at = 0.0
        self.burning = True
        self.cpu_s = 0.0
        self.parts: list[bytes] = []
        self.received = 0


class _Zygote:
    __slots__ = ("control", "info", "orders", "process", "ready")

    def __init__(self, process: subprocess.Popen, control: socket.socket) -> None:
        self.process, self.control = process, control
        self.ready = False
        self.info: dict[str, Any] = {}
        self.orders: list[_Node] = []


class Supervisor:
    """The loop and everything it knows. Its methods are called by the loop only."""

    def __init__(self, client: socket.socket, settings: dict[str, Any]) -> None:
        self.client = client
        self.settings = settings
        self.limits: dict[str, Any] = settings["limits"]
        self.strict = settings["isolation"] == "strict"
        self.cores = settings["cores"] or len(os.sched_getaffinity(0))
        self.pid = os.getpid()
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.zygotes: dict[str, _Zygote] = {}
        self.zygote_starts = 0
        self.trees: dict[str, _Tree] = {}
        self.nodes: dict[str, _Node] = {}
        self.queue: deque[_Job] = deque()
        self.active: set[_Process] = set()
        self.by_pid: dict[int, _Process] = {}
        self.early_exits: dict[int, tuple[int, Any]] = {}
        self.lru: OrderedDict[str, _Node] = OrderedDict()
        self.live = 0
        self.next_number = 1
        self.next_nonce = 1
        self.counts: Counter[str] = Counter()
        self.capabilities: dict[str, Any] = {}
        self.layers: dict[str, str] = {}
        self.supervised = True
        self.stopping = False
        self.next_memory_check = 0.0
        self.next_watch = 0.0
        self.last_foreign_s = -FOREIGN_WINDOW_S
        self.uid_base, self.uid_count = _uid_range()
        self.live_cap = _live_cap(self.limits["live_states"])

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Start the base zygote, try the sandbox on itself, then serve until the client is gone."""
        self._watch_children()
        self._watch_owner()
        self._start_zygote("base")
        probe = self._open_tree("", "base", 0)
        probe.on_open = self._self_check
        while not self.stopping:
            self._turn()
        self._end_everything()

    def _turn(self) -> None:
        timeout = self._next_timeout()
        try:
            events = self.epoll.poll(timeout)
        except InterruptedError:
            events = []
        for descriptor, mask in events:
            handler = self.handlers.get(descriptor)
            if handler is not None:
                handler(mask)
        now = time.monotonic()
        self._tick(now)
        if self.queue:
            self._pump(now)

    def _next_timeout(self) -> float:
        if not self.active and not self.queue:
            return 1.0 if self.supervised else TICK_S
        now = time.monotonic()
        soonest = now + TICK_S
        for process in self.active:
            soonest = min(soonest, process.deadline)
            if self.queue and process.started + FAST_S > now:
                soonest = min(soonest, process.started + FAST_S)
        return max(soonest - now, 0.0) + 0.0005

    def _register(self, descriptor: int, handler: Callable[[int], None]) -> None:
        self.handlers[descriptor] = handler
        self.epoll.register(descriptor, select.EPOLLIN)

    def _unregister(self, descriptor: int) -> None:
        if self.handlers.pop(descriptor, None) is not None:
            self.epoll.unregister(descriptor)

    def _watch_children(self) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

        def on_signal(_: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
            self._reap()

        self._register(reader, on_signal)

    def _watch_owner(self) -> None:
        self.client.setblocking(False)
        self._register(self.client.fileno(), self._on_client)
        # the socket alone is not enough: a fork of the client could hold it open
        with contextlib.suppress(OSError):
            self._register(os.pidfd_open(os.getppid()), lambda _: self._stop())

    def _stop(self) -> None:
        self.stopping = True

    # ------------------------------------------------------------------ the client

    def _on_client(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._flush()
        if not mask & ~select.EPOLLOUT:
            return
        try:
            data = self.client.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._stop()
            return
        self.incoming += data
        while len(self.incoming) >= 4:
            size = int.from_bytes(self.incoming[:4], "little")
            if len(self.incoming) < 4 + size:
                return
            message = json.loads(self.incoming[4 : 4 + size])
            del self.incoming[: 4 + size]
            self._on_message(message)

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode("ascii")
        self.outgoing += len(body).to_bytes(4, "little") + body
        self._flush()

    def _flush(self) -> None:
        try:
            sent = self.client.send(self.outgoing)
            del self.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._stop()
            return
        wanted = select.EPOLLIN | (select.EPOLLOUT if self.outgoing else 0)
        with contextlib.suppress(OSError):
            self.epoll.modify(self.client.fileno(), wanted)

    def _on_message(self, message: dict[str, Any]) -> None:
        number = message["id"]
        try:
            operation = getattr(self, "_op_" + message["op"])
            operation(number, message)
        except _Refused as refusal:
            self._send({"id": number, "value_error": str(refusal)})

    def _op_open(self, number: int, message: dict[str, Any]) -> None:
        problem_id = message["problem_id"]
        if problem_id in self.trees:
            raise _Refused(f"problem {problem_id!r} is already open in this sandbox")
        tree = self._open_tree(problem_id, message["flavour"], message["seed"])

        def opened(failure: str) -> None:
            if failure:
                self._drop_tree(tree)
                self._send({"id": number, "failed": f"no root for {problem_id!r}: {failure}"})
            else:
                self._send({"id": number, "state": tree.root.id})

        tree.on_open = opened

    def _op_run(self, number: int, message: dict[str, Any]) -> None:
        node = self._known(message["state"])
        codes = message["codes"]
        limits = message["limits"] or self.limits

        def answer(results: list[dict[str, Any]]) -> None:
            self._send({"id": number, "results": results})

        if not codes:
            answer([])
            return
        request = _Request(len(codes), answer)
        for index, code in enumerate(codes):
            self._place(request, index, node, code, limits)
        self._pump(time.monotonic())

    def _op_evict(self, number: int, message: dict[str, Any]) -> None:
        node = self._known(message["state"])
        if node.busy:
            node.evict_when_free = True
        else:
            self._evict(node)
        self._send({"id": number})

    def _op_close(self, number: int, message: dict[str, Any]) -> None:
        tree = self.trees.get(message["problem_id"])
        if tree is None:
            raise _Refused(f"problem {message['problem_id']!r} is not open in this sandbox")
        self._drop_tree(tree)
        self._send({"id": number})

    def _op_stats(self, number: int, _: dict[str, Any]) -> None:
        self._send({"id": number, **self.stats()})

    def _op_restore(self, _: int, message: dict[str, Any]) -> None:
        """Take over the trees of a supervisor that died, all states evicted."""
        self.next_number = message["next_number"]
        for entry in message["trees"]:
            tree = _Tree(entry["problem_id"], entry["flavour"], entry["seed"], self._uid())
            tree.root = self._add_node(entry["root"], tree, None, "")
            self.trees[tree.problem_id] = tree
        for entry in message["states"]:
            parent = self.nodes.get(entry["parent"])
            if parent is not None:
                node = self._add_node(entry["state"], parent.tree, parent, entry["code"])
                node.digest = entry["digest"]
                node.limits = entry["limits"] or self.limits
        self.counts["restarts"] += 1

    def stats(self) -> dict[str, Any]:
        """Counters since the start (`steps/<status>`, forks, evictions, ...) and gauges of now."""
        return {
            **{name: self.counts[name] for name in sorted(self.counts)},
            "trees": len(self.trees) - ("" in self.trees),
            "states": len(self.nodes),
            "live_processes": self.live,
            "zygotes": len(self.zygotes),
            "unreaped_processes": len(self.by_pid),
            "running": len(self.active),
            "queued": len(self.queue),
            "live_cap": self.live_cap,
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "supervisor_mib": _resident_bytes(self.pid) / 2**20,
            "supervisor_pid": self.pid,
            "supervisor_cpu_s": time.process_time(),
            "ended_processes_cpu_s": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
        }

    def _known(self, state: str) -> _Node:
        node = self.nodes.get(state)
        if node is None:
            raise _Refused(f"unknown state {state!r}: never made here, or its problem was closed")
        return node

    # ------------------------------------------------------------------ trees and zygotes

    def _uid(self) -> int | None:
        if not self.uid_count:
            return None
        self.counts["roots"] += 1
        return self.uid_base + self.counts["roots"] % self.uid_count

    def _add_node(self, state: str, tree: _Tree, parent: _Node | None, code: str) -> _Node:
        node = _Node(state, tree, parent, code)
        tree.nodes[state] = node
        self.nodes[state] = node
        return node

    def _new_state_id(self, tree: _Tree) -> str:
        number = self.next_number
        self.next_number += 1
        return f"{tree.problem_id}:{number}"

    def _open_tree(self, problem_id: str, flavour: str, seed: int) -> _Tree:
        tree = _Tree(problem_id, flavour, seed, self._uid())
        tree.root = self._add_node(self._new_state_id(tree), tree, None, "")
        self.trees[problem_id] = tree
        self._order_root(tree.root)
        return tree

    def _drop_tree(self, tree: _Tree) -> None:
        """Kill and forget a tree; steps still waiting are answered `infra_error`."""
        self.trees.pop(tree.problem_id, None)
        closed = _result("infra_error", error_type="Closed", error_message="the problem was closed")
        for node in tree.nodes.values():
            self.nodes.pop(node.id, None)
            self.lru.pop(node.id, None)
            for job in list(node.running.values()):
                self._deliver(job, dict(closed))
            node.running.clear()
            node.waiting.clear()
        self.queue = deque(job for job in self.queue if job.parent.tree is not tree)
        for process in [p for p in self.by_pid.values() if p.tree is tree]:
            self._kill(process, "closed")
        for process in [p for p in self.active if p.tree is tree]:
            self._kill(process, "closed")

    def _start_zygote(self, flavour: str) -> _Zygote:
        self.zygote_starts += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [
                    *interpreter_command(*ZYGOTE_MODULES),
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                env=interpreter_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        config = {"flavour": flavour, "withheld": self.settings["withheld"]}
        ours.send(json.dumps(config).encode())
        ours.setblocking(False)
        zygote = self.zygotes[flavour] = _Zygote(process, ours)
        self._register(ours.fileno(), lambda _: self._on_zygote(flavour, zygote))
        return zygote

    def _on_zygote(self, flavour: str, zygote: _Zygote) -> None:
        try:
            message = zygote.control.recv(FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message.startswith(READY):
            self._on_zygote_end(flavour, zygote)
            return
        zygote.ready = True
        zygote.info = json.loads(message[len(READY) :])
        if zygote.info["threads"] != 1:
            self._fail_orders(zygote, f"the zygote has {zygote.info['threads']} threads")
            return
        if flavour in zygote.info["missing"]:
            self._fail_orders(zygote, f"flavour {flavour!r} needs the library {flavour}")
            return
        orders, zygote.orders = zygote.orders, []
        for node in orders:
            self._order_root(node)

    def _on_zygote_end(self, flavour: str, zygote: _Zygote) -> None:
        """Start another one; live trees do not need it."""
        self._unregister(zygote.control.fileno())
        zygote.control.close()
        self.zygotes.pop(flavour, None)
        self.counts["zygote_deaths"] += 1
        if self.zygote_starts > MAX_ZYGOTE_STARTS + self.counts["steps/ok"] // 1000:
            self._fail_orders(zygote, "the zygote keeps dying")
            return
        for process in [p for p in self.active if p.phase == SPAWNING and p.job is None]:
            if process.node is not None and process.tree.flavour == flavour:
                zygote.orders.append(process.node)
                self._detach(process)
        orders = [node for node in zygote.orders if node.id in self.nodes]
        for node in orders:
            self._order_root(node)

    def _fail_orders(self, zygote: _Zygote, reason: str) -> None:
        orders, zygote.orders = zygote.orders, []
        for node in orders:
            self._root_failed(node, reason)

    def _order_root(self, node: _Node) -> None:
        tree = node.tree
        zygote = self.zygotes.get(tree.flavour) or self._start_zygote(tree.flavour)
        if not zygote.ready:
            zygote.orders.append(node)
            return
        self._make_room(tree)
        uid = tree.uid
        if uid is not None and not (
            zygote.info["prefix_open"] or zygote.info["namespaces"] == "on"
        ):
            # no other user could read the interpreter: stay this user, without capabilities
            uid = None
            self.layers["uid"] = "off: the interpreter lies where only this user can read"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        tree.base_space = zygote.info["address_space"]
        order = {
            "problem_id": tree.problem_id,
            "seed": tree.seed,
            "uid": uid,
            "address_space": tree.base_space + (self.limits["memory_mib"] << 20),
            "cpu_s": int(self.limits["cpu_s"]) + 2,
        }
        process = _Process(ours, tree, None, time.monotonic())
        process.node = node
        self._register(ours.fileno(), lambda mask: self._on_channel(process, mask))
        self.active.add(process)
        self.live += 1
        tree.live += 1
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("<i", theirs.fileno()))]
        # if that fails its end is seen on the control socket, which orders this root again
        with contextlib.suppress(OSError):
            zygote.control.sendmsg([json.dumps(order).encode()], rights)
        theirs.close()

    def _on_root_hello(self, process: _Process, report: dict[str, str]) -> None:
        node = process.node
        assert node is not None
        missing = [
            f"{layer} ({report.get(layer, 'off')})"
            for layer in isolation.REQUIRED_LAYERS
            if report.get(layer) != "on"
        ]
        self.layers = {**self.layers, **report}
        if self.strict and missing:
            self._kill(process, "layers")
            self._root_failed(node, "missing isolation layers: " + ", ".join(missing))
            return
        self.supervised = self.supervised and process.listener is not None
        self.active.discard(process)
        node.tree.base_resident = _resident_bytes(process.pid)
        self._keep(process, node)
        if node.tree.on_open is not None:
            on_open, node.tree.on_open = node.tree.on_open, None
            on_open("")
        self._wake_waiting(node, 1)

    def _root_failed(self, node: _Node, reason: str) -> None:
        if node.tree.on_open is not None:
            on_open, node.tree.on_open = node.tree.on_open, None
            on_open(reason)
        self._fail_waiting(node, _result("infra_error", error_type="Root", error_message=reason))

    # ------------------------------------------------------------------ start-up check

    def _self_check(self, failure: str) -> None:
        if failure:
            self._refuse_to_start(failure)
            return
        tree = self.trees[""]
        codes = [code for code, _ in SELF_CHECK]

        def answer(results: list[dict[str, Any]]) -> None:
            wrong = [
                f"{code!r} ended {result['status']}"
                for (code, expected), result in zip(SELF_CHECK, results, strict=True)
                if result["status"] not in expected
            ]
            self._drop_tree(tree)
            if wrong and (self.strict or results[-1]["status"] != "ok"):
                self._refuse_to_start("the sandbox failed its own check: " + "; ".join(wrong))
                return
            self.counts.clear()
            self._announce(wrong)

        request = _Request(len(codes), answer)
        for index, code in enumerate(codes):
            self._place(request, index, tree.root, code, {**self.limits, "wall_s": 30.0})

    def _refuse_to_start(self, reason: str) -> None:
        self._send({"failed": f"isolation={self.settings['isolation']!r} cannot start: {reason}"})
        self._stop()

    def _announce(self, wrong: list[str]) -> None:
        info = self.zygotes["base"].info
        layers = {**self.layers, "namespaces": info["namespaces"]}
        layers["file_system_view"] = info["namespaces"]
        if self.uid_count == 0:
            layers["uid"] = "off: not started as root with CAP_SETUID, CAP_SETGID and CAP_KILL"
        if not self.supervised:
            layers["fork_supervision"] += "; unordered children are found and killed instead"
        self.capabilities = {
            "isolation": self.settings["isolation"],
            "layers": dict(sorted(layers.items())),
            "required": list(isolation.REQUIRED_LAYERS),
            "complete": all(layers.get(name) == "on" for name in isolation.REQUIRED_LAYERS),
            "self_check": wrong or "passed",
            "landlock_abi": info["landlock_abi"],
            "memory_image_mib": info["memory_image_mib"],
            "not_preloaded": info["missing"],
            "warm_up_failures": info["failed"],
            "fixed_addresses": self.settings["fixed_addresses"],
            "cores": self.cores,
            "live_cap": self.live_cap,
        }
        self._send({"capabilities": self.capabilities})

    # ------------------------------------------------------------------ placing and launching

    def _place(
        self, request: _Request, index: int, node: _Node, code: str, limits: dict[str, Any]
    ) -> None:
        """Answer without running if possible, join an equal step, or queue a new one."""
        text = code.encode("utf-8", "surrogatepass")
        if len(text) > limits["code_kib"] * 1024:
            message = f"the code is {len(text)} bytes, at most {limits['code_kib']} KiB are run"
            self._put(request, index, _result("denied", "CodeSize", message))
            return
        if _is_empty(code):
            self._put(request, index, _result("ok", state=node.id))
            return
        if node.depth >= self.limits["depth"]:
            message = f"depth {node.depth + 1} is above the limit of {self.limits['depth']}"
            self._put(request, index, _result("denied", "Depth", message))
            return
        if node.poisoned:
            self._put(request, index, _result("protocol_error", "ParentState", _POISONED))
            return
        key = (hashlib.sha256(text.rstrip()).digest(), *(limits[name] for name in _STEP_LIMITS))
        cached = node.cached.get(key)
        if cached is not None:
            self.counts["shared_results"] += 1
            self._put(request, index, dict(cached))
            return
        job = node.running.get(key)
        if job is None:
            if len(self.queue) >= MAX_QUEUE:
                message = f"{len(self.queue)} steps are waiting"
                self._put(request, index, _result("pool_overloaded", "Queue", message))
                return
            job = _Job(node, code, key, limits)
            node.running[key] = job
            self.queue.append(job)
        else:
            self.counts["shared_results"] += 1
        job.waiters.append((request, index))

    def _put(self, request: _Request, index: int, result: dict[str, Any]) -> None:
        self.counts["steps/" + result["status"]] += 1
        request.put(index, result)

    def _may_launch(self, now: float) -> bool:
        if len(self.active) < self.cores:
            return True
        if len(self.active) >= MAX_RUNNING:
            return False
        fast = burning = 0
        for process in self.active:
            if now - process.started < FAST_S:
                fast += 1
            elif process.burning:
                burning += 1
        return fast < self.cores and fast + burning < 3 * self.cores

    def _pump(self, now: float) -> None:
        waiting: list[_Job] = []
        while self.queue and self._may_launch(now) and len(waiting) < MAX_RUNNING:
            job = self.queue.popleft()
            if job.parent.id in self.nodes and not self._launch(job, now):
                waiting.append(job)
        self.queue.extendleft(reversed(waiting))

    def _launch(self, job: _Job, now: float) -> bool:
        """Order the fork for a step; False if it must wait until running steps make room."""
        node = job.parent
        parent = node.process
        if parent is None or parent.phase != IDLE:
            self._restore(job)
            return True
        if not self._make_room(node.tree, spare=node):
            if self.active:
                return False
            message = f"no room for a state: {node.tree.live} live in the tree, {self.live} in all"
            self._finish(job, _result("pool_overloaded", "LiveStates", message), None)
            return True
        job.attempts += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        process = _Process(ours, node.tree, job, now)
        process.parent = parent
        process.listener = parent.listener
        process.nonce = self.next_nonce = (self.next_nonce + 1) & 0xFFFFFFFF
        text = job.code.encode("utf-8", "surrogatepass")
        limits = job.limits
        header = REQUEST.pack(
            REQUEST_MAGIC,
            process.nonce,
            node.depth + 1,
            limits["output_kib"] * 1024,
            limits["output_accepted_kib"] * 1024,
            limits["error_kib"] * 1024,
            int(limits["cpu_s"]) + 2,
            node.tree.base_space + (limits["memory_mib"] << 20),
            len(text),
        )
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("<i", theirs.fileno()))]
        self._register(ours.fileno(), lambda mask: self._on_channel(process, mask))
        self.active.add(process)
        self.live += 1
        node.tree.live += 1
        node.busy += 1
        self.counts["forks"] += 1
        self._touch(node)
        try:
            ours.send(header + text[: FRAME_BYTES - REQUEST.size])
            for start in range(FRAME_BYTES - REQUEST.size, len(text), FRAME_BYTES):
                ours.send(text[start : start + FRAME_BYTES])
            parent.permits += 1
            parent.channel.sendmsg([SPAWN], rights)
        except OSError:
            self._kill(parent, "channel")
            theirs.close()
            self._spawn_failed(process)
            return True
        theirs.close()
        return True

    def _restore(self, job: _Job) -> None:
        """Put a job aside until its parent lives again, and see to that."""
        node = job.parent
        node.waiting.append(job)
        if len(node.waiting) > 1:
            return
        self.counts["replays"] += 1
        if node.parent is None:
            self._order_root(node)
            return
        replay = _Job(node.parent, node.code, ("replay", node.id), node.limits)
        replay.replay_of = node
        self.queue.appendleft(replay)

    def _wake_waiting(self, node: _Node, replayed: int) -> None:
        waiting, node.waiting = node.waiting, []
        for job in waiting:
            job.replayed += replayed
            self.queue.appendleft(job)

    def _fail_waiting(self, node: _Node, result: dict[str, Any]) -> None:
        waiting, node.waiting = node.waiting, []
        for job in waiting:
            self._finish(job, dict(result), None)

    # ------------------------------------------------------------------ listening to processes

    def _on_listener(self, listener: int, mask: int) -> None:
        if not mask & select.EPOLLIN:
            self._unregister(listener)
            os.close(listener)
            return
        buffer = bytearray(isolation.NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, isolation.NOTIFICATION_RECEIVE, buffer)
        except OSError:
            return
        number, pid, _, call, _, _, flags, *_ = isolation.NOTIFICATION.unpack(buffer)
        process = self.by_pid.get(pid)
        allowed = (
            process is not None
            and process.permits > 0
            and call == 56
            and flags == isolation.FORK_FLAGS
        )
        if allowed:
            assert process is not None
            process.permits -= 1
            process.granted.append(time.monotonic())
            reply = isolation.NOTIFICATION_REPLY.pack(number, 0, 0, isolation.NOTIFICATION_CONTINUE)
        else:
            self.counts["forks_refused"] += 1
            reply = isolation.NOTIFICATION_REPLY.pack(number, 0, -1, 0)
        with contextlib.suppress(OSError):
            fcntl.ioctl(listener, isolation.NOTIFICATION_SEND, reply)

    def _on_channel(self, process: _Process, mask: int) -> None:
        if process.phase == SPAWNING:
            self._on_hello(process)
            return
        try:
            data = process.channel.recv(FRAME_BYTES + 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._on_eof(process)
        elif process.phase == RUNNING:
            self._on_reply_part(process, data)
        elif process.phase == IDLE:
            if data == NO_FORK and process.node is not None and process.node.busy:
                process.refusals += 1
                return
            if process.node is not None:
                process.node.poisoned = True
            self._kill(process, "spoke while idle")

    def _on_hello(self, process: _Process) -> None:
        try:
            data, ancillary, _, _ = process.channel.recvmsg(FRAME_BYTES, _HELLO_SPACE)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        pid, rights = 0, []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid = struct.unpack("<iII", content)[0]
            elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights += list(
                    struct.unpack(f"<{len(content) // 4}i", content[: len(content) & ~3])
                )
        is_root = process.job is None
        if is_root and rights:
            process.listener = rights.pop(0)
        for descriptor in rights:
            os.close(descriptor)
        if not data:
            self._spawn_failed(process)
            return
        if pid <= 0 or pid in self.by_pid or data[:1] != (ROOT_HELLO if is_root else HELLO):
            # only a parent that user code has taken over can get here
            parent = process.parent
            if parent is not None and parent.node is not None:
                parent.node.poisoned = True
                self._release(parent.node)
                self._kill(parent, "forged hello")
            self._give_up(process, "protocol_error", "Hello", "forged by the parent state")
            return
        process.pid = pid
        self.by_pid[pid] = process
        parent, process.parent = process.parent, None
        if parent is not None and parent.granted:
            process.started = parent.granted.popleft()
        else:
            process.started = time.monotonic()
        if parent is not None and parent.node is not None:
            self._release(parent.node)
        if is_root:
            process.phase = RUNNING
            if process.listener is not None:
                listener = process.listener
                self._register(listener, lambda mask: self._on_listener(listener, mask))
            self._on_root_hello(process, json.loads(data[1:]))
        else:
            assert process.job is not None
            process.phase = RUNNING
            # from its first word on: before that it was its parent that waited for a core
            process.running_since = time.monotonic()
            process.deadline = process.running_since + process.job.limits["wall_s"]
        exited = self.early_exits.pop(pid, None)
        if exited is not None:
            self._on_exit(process, *exited)

    def _release(self, node: _Node) -> None:
        node.busy -= 1
        if node.busy == 0 and node.evict_when_free:
            node.evict_when_free = False
            self._evict(node)

    def _on_reply_part(self, process: _Process, data: bytes) -> None:
        job = process.job
        assert job is not None
        process.parts.append(data)
        process.received += len(data)
        head = process.parts[0]
        if len(head) < REPLY.size:
            self._broke_protocol(process, "short reply")
            return
        magic, nonce, status, truncated, exec_s, printed, *lengths = REPLY.unpack_from(head)
        limits = job.limits
        expected = REPLY.size + sum(lengths)
        if (
            magic != REPLY_MAGIC
            or nonce != process.nonce
            or status >= len(REPLY_STATUSES)
            or lengths[0] > limits["output_kib"] * 1024
            or lengths[1] > 1024
            or lengths[2] > limits["error_kib"] * 1024
            or process.received > expected
            or not 0.0 <= exec_s < 1e6
        ):
            self._broke_protocol(process, "malformed reply")
            return
        if process.received < expected:
            return
        body = head if len(process.parts) == 1 else b"".join(process.parts)
        process.parts = []
        start = REPLY.size
        middle, end = start + lengths[0], start + lengths[0] + lengths[1]
        output = body[start:middle]
        name = REPLY_STATUSES[status]
        result = _result(
            name,
            body[middle:end].decode("utf-8", "replace") if status else "",
            body[end:expected].decode("utf-8", "replace") if status else "",
            stdout=output.decode("utf-8", "replace"),
            truncated=bool(truncated),
            exec_s=exec_s,
            **self._usage(process),
        )
        if name == "output_limit":
            result["error_type"] = "OutputLimit"
            result["error_message"] = f"printed over {limits['output_accepted_kib']} KiB"
        self.active.discard(process)
        process.job = None
        if name == "ok":
            digest = hashlib.sha256(output + printed.to_bytes(8, "little")).hexdigest()
            self._finish(job, result, process, digest)
        else:
            self._kill(process, "failed")
            self._finish(job, result, None)

    def _usage(self, process: _Process) -> dict[str, float]:
        usage = {"wall_s": time.monotonic() - process.started, "cpu_s": 0.0, "memory_mib": 0.0}
        with contextlib.suppress(OSError):
            usage["cpu_s"] = _cpu_seconds(process.pid)
            usage["memory_mib"] = _resident_bytes(process.pid) / 2**20
        return usage

    def _broke_protocol(self, process: _Process, what: str) -> None:
        self._kill(process, "protocol")
        self._give_up(process, "protocol_error", "Protocol", what)

    def _on_eof(self, process: _Process) -> None:
        """The channel closed: normally the process is dying; if not, `_tick` kills it."""
        self._unregister(process.channel.fileno())
        process.eof_at = time.monotonic()
        self.active.add(process)

    # ------------------------------------------------------------------ the end of a step

    def _give_up(
        self, process: _Process, status: str, kind: str, message: str, **usage: Any
    ) -> None:
        """End a step whose process is dead or condemned with a verdict of our own."""
        job, process.job = process.job, None
        self.active.discard(process)
        if process.phase == SPAWNING:
            self._detach(process)
        if job is not None:
            self._finish(job, _result(status, kind, message, **usage), None)

    def _spawn_failed(self, process: _Process) -> None:
        """No child came of an order: the parent is gone or could not fork."""
        job, parent, node = process.job, process.parent, process.node
        self._detach(process)
        self.counts["spawn_failures"] += 1
        if job is None:
            if node is not None and node.id in self.nodes:
                self._root_failed(node, "the root ended before it was ready")
            return
        if parent is not None and parent.node is not None:
            if parent.phase == IDLE:
                self._on_channel(parent, 0)
            if parent.refusals:
                parent.refusals -= 1
                job.blameless = True
            if parent.permits:
                # the order was taken without a fork
                parent.permits -= 1
            self._release(parent.node)
        self._retry(job, "no fork of the parent state")

    def _retry(self, job: _Job, reason: str) -> None:
        self.counts["retries"] += 1
        if job.parent.id not in self.nodes:
            return
        if job.parent.poisoned:
            self._finish(job, _result("protocol_error", "ParentState", _POISONED), None)
        elif job.attempts < MAX_ATTEMPTS:
            if job.parent.process is not None:
                # the parent lives but could not fork: make room before the next try
                self._evict_some(4, job.parent)
            self.queue.append(job)
        elif job.blameless or time.monotonic() - self.last_foreign_s < FOREIGN_WINDOW_S:
            self._finish(job, _result("infra_error", "Infrastructure", reason), None)
        else:
            end = job.parent.own_end or "its children end before their first word"
            message = f"the parent state does not survive its own step: {end}"
            self._finish(job, _result("died", "ParentState", message), None)

    def _finish(
        self, job: _Job, result: dict[str, Any], process: _Process | None, digest: str = ""
    ) -> None:
        if job.replay_of is not None:
            self._finish_replay(job, job.replay_of, result, process, digest)
            return
        parent = job.parent
        result["replayed"], result["attempts"] = job.replayed, max(job.attempts, 1)
        if parent.id not in self.nodes:
            if process is not None:
                self._kill(process, "closed")
            return
        if process is not None:
            node = self._add_node(self._new_state_id(parent.tree), parent.tree, parent, job.code)
            node.digest, node.limits = digest, job.limits
            result["state"] = node.id
            result["journal"] = {
                "state": node.id,
                "digest": digest,
                "problem_id": parent.tree.problem_id,
            }
            self._keep(process, node)
        parent.running.pop(job.key, None)
        if result["status"] not in _NOT_ABOUT_THE_CODE:
            parent.cached[job.key] = result
        self._deliver(job, result)

    def _deliver(self, job: _Job, result: dict[str, Any]) -> None:
        waiters, job.waiters = job.waiters, []
        for request, index in waiters:
            self._put(request, index, dict(result))

    def _finish_replay(
        self,
        job: _Job,
        node: _Node,
        result: dict[str, Any],
        process: _Process | None,
        digest: str,
    ) -> None:
        if node.id not in self.nodes:
            if process is not None:
                self._kill(process, "closed")
            return
        if process is not None and digest == node.digest:
            self._keep(process, node)
            self._wake_waiting(node, 1 + job.replayed)
            return
        if process is not None:
            self._kill(process, "diverged")
        if result["status"] in _NOT_ABOUT_THE_CODE or result["error_type"] == "ParentState":
            self._fail_waiting(node, result)
            return
        self.counts["divergences"] += 1
        what = "printed something else" if process is not None else f"ended {result['status']}"
        message = f"step {node.depth} of the path ({node.id}) {what} when run again"
        self._fail_waiting(node, _result("replay_diverged", "Replay", message))

    # ------------------------------------------------------------------ keeping and evicting

    def _keep(self, process: _Process, node: _Node) -> None:
        process.phase = IDLE
        process.node = node
        node.process = process
        if node.parent is not None:
            node.parent.live_children += 1
        self._touch(node)

    def _touch(self, node: _Node) -> None:
        self.lru[node.id] = node
        self.lru.move_to_end(node.id)

    def _evict(self, node: _Node) -> None:
        if node.process is not None:
            self.counts["evictions"] += 1
            self._kill(node.process, "evicted")

    def _make_room(self, tree: _Tree, spare: _Node | None = None) -> bool:
        """Bring tree and pool below their limits of live processes; False if nothing can go."""
        while tree.live >= self.limits["live_states_per_tree"]:
            if not self._evict_one(tree, spare):
                return False
        while self.live >= self.live_cap:
            if not self._evict_one(None, spare):
                return False
        now = time.monotonic()
        if now >= self.next_memory_check:
            self.next_memory_check = now + 0.1
            if _memory_is_short():
                self.counts["memory_pressure"] += 1
                self._evict_some(max(4, len(self.lru) // 10), spare)
        return True

    def _evict_some(self, count: int, spare: _Node | None = None) -> None:
        for _ in range(count):
            if not self._evict_one(None, spare):
                return

    def _evict_one(self, tree: _Tree | None, spare: _Node | None) -> bool:
        fallback = None
        for node in self.lru.values():
            if node.busy or node is spare or (tree is not None and node.tree is not tree):
                continue
            if node.live_children == 0 and node.parent is not None:
                self._evict(node)
                return True
            fallback = fallback or node
        if fallback is None:
            return False
        self._evict(fallback)
        return True

    # ------------------------------------------------------------------ killing and reaping

    def _kill(self, process: _Process, reason: str) -> None:
        """Condemn a process: no longer live, its channel closed; the reaper does the rest."""
        if process.phase == ENDING:
            return
        was_spawning = process.phase == SPAWNING
        self._detach(process)
        process.kill_reason = reason
        # not if it was reaped meanwhile: the number may be another process's by now
        if not was_spawning and self.by_pid.get(process.pid) is process:
            os.kill(process.pid, signal.SIGKILL)

    def _detach(self, process: _Process) -> None:
        if process.phase == ENDING:
            return
        process.phase = ENDING
        self.live -= 1
        process.tree.live -= 1
        self.active.discard(process)
        self._unregister(process.channel.fileno())
        process.channel.close()
        node = process.node
        if node is not None and node.process is process:
            node.process = None
            self.lru.pop(node.id, None)
            if node.parent is not None:
                node.parent.live_children -= 1

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self.by_pid.get(pid)
            if process is not None:
                self._on_exit(process, status, usage)
            elif not any(zygote.process.pid == pid for zygote in self.zygotes.values()):
                if len(self.early_exits) > 1000:
                    self.early_exits.clear()
                self.early_exits[pid] = (status, usage)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                    self.last_foreign_s = time.monotonic()

    def _on_exit(self, process: _Process, status: int, usage: Any) -> None:
        self.by_pid.pop(process.pid, None)
        if process.phase == RUNNING:
            self._drain(process)
        if process.phase == ENDING:
            return
        node, job = process.node, process.job
        code = os.waitstatus_to_exitcode(status)
        end = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        running = process.phase == RUNNING
        self._detach(process)
        if not running:
            self.counts["idle_deaths"] += 1
            if code == -signal.SIGKILL:
                self.last_foreign_s = time.monotonic()
            elif node is not None:
                node.own_end = end
            return
        process.job = None
        if job is None:
            if node is not None and node.id in self.nodes:
                self._root_failed(node, f"the root ended with {end}")
            return
        cost = {
            "wall_s": time.monotonic() - process.started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory_mib": usage.ru_maxrss / 1024,
        }
        if code == -signal.SIGXCPU:
            self._finish(job, _result("timeout", "CpuLimit", "over the CPU limit", **cost), None)
        elif code == -signal.SIGSYS:
            message = "a system call of another architecture"
            self._finish(job, _result("denied", end, message, **cost), None)
        elif code == -signal.SIGKILL and process.kill_reason != "lived on":
            # nobody here sent it: the kernel's out-of-memory killer, or someone outside
            base_mib = process.tree.base_resident / 2**20
            if cost["memory_mib"] - base_mib > 0.5 * job.limits["memory_mib"]:
                message = "killed by the kernel for memory"
                self._finish(job, _result("memory", end, message, **cost), None)
            else:
                self.counts["foreign_kills"] += 1
                job.blameless = True
                self._retry(job, "killed from outside the sandbox")
        elif process.kill_reason == "lived on":
            message = "closed its channel and went on running"
            self._finish(job, _result("protocol_error", "Protocol", message, **cost), None)
        else:
            message = f"the process ended without an answer: {end}"
            self._finish(job, _result("died", end, message, **cost), None)

    def _drain(self, process: _Process) -> None:
        """Take in what a dead process had still sent."""
        while process.phase == RUNNING and not process.eof_at:
            try:
                data = process.channel.recv(FRAME_BYTES + 4096)
            except OSError:
                return
            if not data:
                return
            self._on_reply_part(process, data)
        if process.phase == IDLE:
            # it answered and then ended: the answer stands, the state comes back by replay
            self._detach(process)

    # ------------------------------------------------------------------ the clock

    def _tick(self, now: float) -> None:
        for process in list(self.active):
            if process.phase == ENDING:
                continue
            if process.eof_at:
                if now - process.eof_at > EOF_GRACE_S and process.kill_reason != "lived on":
                    process.kill_reason = "lived on"
                    os.kill(process.pid, signal.SIGKILL)
            elif process.phase == SPAWNING:
                if now >= process.deadline:
                    parent = process.parent
                    if parent is not None:
                        self._kill(parent, "no hello")
                    self._spawn_failed(process)
            elif process.job is not None:
                self._check_limits(process, process.job, now)
        if not self.supervised and now >= self.next_watch:
            self.next_watch = now + TICK_S
            self._kill_unordered()

    def _check_limits(self, process: _Process, job: _Job, now: float) -> None:
        age = now - process.running_since
        if age < FAST_S and now < process.deadline:
            return
        limits = job.limits
        try:
            cpu_s = _cpu_seconds(process.pid)
            resident = _resident_bytes(process.pid)
        except OSError:
            return
        process.burning = cpu_s - process.cpu_s > 0 and cpu_s > 0.2 * age
        usage = {"wall_s": age, "cpu_s": cpu_s, "memory_mib": resident / 2**20}
        if now >= process.deadline:
            waited = _run_delay_seconds(process.pid)
            if cpu_s < 0.3 * age and waited > 0.3 * age:
                self._extend(process, job, age, waited)
                return
            self._kill(process, "wall")
            message = f"no answer within {limits['wall_s']:g} s"
            self._give_up(process, "timeout", "WallLimit", message, **usage)
        elif cpu_s > limits["cpu_s"]:
            self._kill(process, "cpu")
            message = f"used more than {limits['cpu_s']:g} s of CPU"
            self._give_up(process, "timeout", "CpuLimit", message, **usage)
        elif resident > process.tree.base_resident + limits["memory_mib"] * 2**20:
            self._kill(process, "memory")
            message = f"used more than {limits['memory_mib']} MiB"
            self._give_up(process, "memory", "MemoryLimit", message, **usage)

    def _extend(self, process: _Process, job: _Job, age: float, waited: float) -> None:
        """The machine, not the step, used up the time: give it back, up to ten times the limit."""
        if age < MAX_STRETCH * job.limits["wall_s"]:
            self.counts["contended_extensions"] += 1
            due_s = max(job.limits["wall_s"] + waited, age + FAST_S)
            process.deadline = process.running_since + due_s
            return
        self._kill(process, "contended")
        process.job = None
        job.blameless = True
        self._retry(job, f"no core was free for it within {age:.1f} s")

    def _kill_unordered(self) -> None:
        """Without fork supervision: end every child that no order of ours explains."""
        expected = sum(1 for process in self.active if process.phase == SPAWNING)
        children = Path(f"/proc/self/task/{self.pid}/children").read_text().split()
        known = {zygote.process.pid for zygote in self.zygotes.values()} | self.by_pid.keys()
        strangers = [int(pid) for pid in children if int(pid) not in known]
        if len(strangers) > expected:
            for pid in strangers:
                self.counts["unordered_children"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _end_everything(self) -> None:
        children = Path(f"/proc/self/task/{self.pid}/children")
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            try:
                left = [int(pid) for pid in children.read_text().split()]
            except OSError:
                left = [*self.by_pid, *(zygote.process.pid for zygote in self.zygotes.values())]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while True:
                    os.wait4(-1, 0)
            except ChildProcessError:
                return


class _Refused(Exception):
    """The client's own mistake; becomes its ValueError."""


_STEP_LIMITS = (
    *(
        "wall_s",
        "cpu_s",
        "memory_mib",
        "output_kib",
        "output_accepted_kib",
        "error_kib",
        "code_kib",
    ),
)
_POISONED = "the parent state broke the protocol while it waited"
_NOT_ABOUT_THE_CODE = frozenset({"replay_diverged", "pool_overloaded", "infra_error"})


def _result(
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


def _is_empty(code: str) -> bool:
    """Whether the code has no statement at all: only blank lines and comments."""
    if "\0" in code:
        return False
    for line in code.replace("\r", "\n").split("\n"):
        stripped = line.strip(" \t\f")
        if stripped and (stripped[0] != "#" or not stripped.isprintable()):
            return False
    return True


def _cpu_seconds(pid: int) -> float:
    """CPU time of another process, by the kernel's clock of that process."""
    return time.clock_gettime((~pid << 3) | 2)


def _resident_bytes(pid: int) -> int:
    descriptor = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 200).split()[1]) * PAGE
    finally:
        os.close(descriptor)


def _run_delay_seconds(pid: int) -> float:
    """Time a process stood ready without getting a core; 0 where the kernel does not count it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _number_in(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
        return int(text) if text.isdigit() else None
    except OSError:
        return None


def _memory_is_short() -> bool:
    """Less than 5 % (at least 256 MiB) of the machine's or the container's memory is left."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            values[name] = int(rest.split()[0]) * 1024
    if values["MemAvailable"] < max(256 << 20, values["MemTotal"] // 20):
        return True
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, used = _number_in(limit_path), _number_in(used_path)
        if limit and used and limit < values["MemTotal"]:
            return limit - used < max(128 << 20, limit // 20)
    return False


def _live_cap(wanted: int) -> int:
    """Live processes this machine allows: half of the pids, the descriptors, 5 MiB each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    caps = [wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100]
    for path in (
        "/proc/sys/kernel/pid_max",
        "/sys/fs/cgroup/pids.max",
        "/sys/fs/cgroup/pids/pids.max",
    ):
        limit = _number_in(path)
        if limit:
            caps.append(limit // 2)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY and os.geteuid() != 0:
        caps.append(processes // 2)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            caps.append(int(line.split()[1]) // (5 * 1024))
    return max(min(caps), 4)


def _uid_range() -> tuple[int, int]:
    """First of, and how many, user ids for trees; (0, 0) when this process may not switch users."""
    needed = (isolation.CAP_SETUID, isolation.CAP_SETGID, isolation.CAP_KILL)
    capabilities = isolation.effective_capabilities()
    if os.geteuid() != 0 or not all(capabilities >> bit & 1 for bit in needed):
        return 0, 0
    ranges = []
    for name in ("uid_map", "gid_map"):
        lines = Path(f"/proc/self/{name}").read_text().splitlines()
        ranges.append([(int(line.split()[0]), int(line.split()[2])) for line in lines])
    for first, count in ((200_000, 10_000), (60_000, 5_000), (65_534, 1)):
        if all(any(a <= first and first + count <= a + n for a, n in kind) for kind in ranges):
            return first, count
    return 0, 0


def main() -> None:
    """Entry point of the supervisor: settings come as the first frame on the client's socket."""
    unsupported = isolation.machine_supported()
    client = socket.socket(fileno=int(sys.argv[1]))
    size = int.from_bytes(client.recv(4, socket.MSG_WAITALL), "little")
    settings = json.loads(client.recv(size, socket.MSG_WAITALL))
    if unsupported:
        body = json.dumps({"failed": f"the sandbox {unsupported}"}).encode()
        client.sendall(len(body).to_bytes(4, "little") + body)
        return
    isolation.become_subreaper()
    settings["fixed_addresses"] = isolation.fixed_addresses()
    Supervisor(client, settings).run()
