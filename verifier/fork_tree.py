"""The supervisor of a sandbox: a tree of live forked interpreters, judged from outside.

    sandbox_client --JSON frames--> supervisor --orders--> zygote, roots, states (sandbox_runner)

One process, one thread, one epoll loop. Here: what the client may ask, the zygotes and the roots
they fork, and the check that the sandbox makes of itself before it says it is ready. Below it:

    tree_steps       the life of a step: queue, launch, replay, answer
    eviction         which kept state goes when there is no room
    state_processes  what processes say, what they may use, how they ended
    tree_records     the records of all that; event_loop, host_gauges, sandbox_wire: what carries it

A state's channel is a SOCK_SEQPACKET pair made here; the child's end travels with the spawn order
and already holds the code, so a parent never sees what its children run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from verifier import isolation
from verifier.event_loop import ClientLine, EventLoop
from verifier.eviction import Eviction
from verifier.host_gauges import resident_bytes, uid_range, usable_cores
from verifier.sandbox_interpreter import ZYGOTE, start_interpreter
from verifier.sandbox_wire import FRAME_BYTES, READY, frame
from verifier.state_processes import FAST_S, TICK_S, Processes
from verifier.tree_records import (
    SPAWNING,
    Forest,
    Job,
    Node,
    Process,
    Refused,
    Request,
    Tree,
    Zygote,
    step_result,
)
from verifier.tree_steps import Steps

MAX_ZYGOTE_STARTS = 5

SELF_CHECK = (
    ("import socket\nsocket.socket()", ("denied", "error")),
    ("import os\nos.fork()", ("denied", "error")),
    ("import os\nos.execv('/bin/true', ['true'])", ("denied", "error")),
    ("open('/etc/passwd').read()", ("denied", "error")),
    ("print(6 * 7)", ("ok",)),
)
"""What every sandbox tries on itself before it says it is ready."""


class Supervisor:
    """Ties the parts together; its methods are called by the loop only."""

    def __init__(self, client: socket.socket, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.limits: dict[str, Any] = settings["limits"]
        self.strict = settings["isolation"] == "strict"
        self.counts: Counter[str] = Counter()
        self.loop = EventLoop()
        self.line = ClientLine(client, self.loop, self._on_message, self._stop)
        self.forest = Forest()
        self.processes = Processes(self.loop, self.counts, self)
        share = settings["share"]
        cores = settings["cores"] or max(1, int(usable_cores() * share))
        self.eviction = Eviction(self.processes, self.limits, cores=cores, share=share)
        self.steps = Steps(
            self.limits, cores, self.forest, self.processes, self.eviction, self._order_root
        )
        self.zygotes: dict[str, Zygote] = {}
        self.zygote_starts = 0
        self.layers: dict[str, str] = {}
        self.stopping = False
        self.uid_base, self.uid_count = uid_range()

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Start the base zygote, try the sandbox on itself, then serve until the client is gone."""
        self._watch_children()
        self._watch_owner()
        self._start_zygote("base")
        probe = self._open_tree("", "base", 0)
        probe.on_open = self._self_check
        while not self.stopping:
            self.loop.turn(self._next_timeout())
            now = time.monotonic()
            self.processes.tick(now)
            if self.steps.queue:
                self.steps.pump(now)
        self.processes.end_everything()

    def _next_timeout(self) -> float:
        if not self.processes.active and not self.steps.queue:
            return 1.0 if self.processes.supervised else TICK_S
        now = time.monotonic()
        soonest = now + TICK_S
        for process in self.processes.active:
            soonest = min(soonest, process.deadline)
            if self.steps.queue and process.started + FAST_S > now:
                soonest = min(soonest, process.started + FAST_S)
        return max(soonest - now, 0.0) + 0.0005

    def _watch_children(self) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

        def on_signal(_: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
            self.processes.reap()

        self.loop.register(reader, on_signal)

    def _watch_owner(self) -> None:
        # the client's socket alone is not enough: a fork of the client could hold it open
        with contextlib.suppress(OSError):
            self.loop.register(os.pidfd_open(os.getppid()), lambda _: self._stop())

    def _stop(self) -> None:
        self.stopping = True

    # ------------------------------------------------------------------ the client

    def _on_message(self, message: dict[str, Any]) -> None:
        number = message["id"]
        try:
            operation = getattr(self, "_op_" + message["op"])
            operation(number, message)
        except Refused as refusal:
            self.line.send({"id": number, "value_error": str(refusal)})

    def _op_open(self, number: int, message: dict[str, Any]) -> None:
        problem_id = message["problem_id"]
        if problem_id in self.forest.trees:
            raise Refused(f"problem {problem_id!r} is already open in this sandbox")
        tree = self._open_tree(problem_id, message["flavour"], message["seed"])

        def opened(failure: str) -> None:
            if failure:
                self._drop_tree(tree)
                self.line.send({"id": number, "failed": f"no root for {problem_id!r}: {failure}"})
            else:
                self.line.send({"id": number, "state": tree.root.id})

        tree.on_open = opened

    def _op_run(self, number: int, message: dict[str, Any]) -> None:
        node = self._known(message["state"])
        codes = message["codes"]
        limits = message["limits"] or self.limits

        def answer(results: list[dict[str, Any]]) -> None:
            self.line.send({"id": number, "results": results})

        if not codes:
            answer([])
            return
        request = Request(len(codes), answer)
        for index, code in enumerate(codes):
            self.steps.place(request, index, node, code, limits)
        self.steps.pump(time.monotonic())

    def _op_evict(self, number: int, message: dict[str, Any]) -> None:
        node = self._known(message["state"])
        if node.busy:
            node.evict_when_free = True
        else:
            self.processes.evict(node)
        self.line.send({"id": number})

    def _op_close(self, number: int, message: dict[str, Any]) -> None:
        tree = self.forest.trees.get(message["problem_id"])
        if tree is None:
            raise Refused(f"problem {message['problem_id']!r} is not open in this sandbox")
        self._drop_tree(tree)
        self.line.send({"id": number})

    def _op_stats(self, number: int, _: dict[str, Any]) -> None:
        self.line.send({"id": number, **self.stats()})

    def _op_restore(self, _: int, message: dict[str, Any]) -> None:
        """Take over the trees of a supervisor that died, all states evicted."""
        self.forest.next_number = message["next_number"]
        for entry in message["trees"]:
            tree = Tree(entry["problem_id"], entry["flavour"], entry["seed"], self._uid())
            tree.root = self.forest.add(entry["root"], tree, None, "")
            self.forest.trees[tree.problem_id] = tree
        for entry in message["states"]:
            parent = self.forest.nodes.get(entry["parent"])
            if parent is not None:
                node = self.forest.add(entry["state"], parent.tree, parent, entry["code"])
                node.digest = entry["digest"]
                node.limits = entry["limits"] or self.limits
        self.counts["restarts"] += 1

    def stats(self) -> dict[str, Any]:
        """Counters since the start (`steps/<status>`, forks, evictions, ...) and gauges of now."""
        return {
            **{name: self.counts[name] for name in sorted(self.counts)},
            "trees": len(self.forest.trees) - ("" in self.forest.trees),
            "states": len(self.forest.nodes),
            "live_processes": self.processes.live,
            "zygotes": len(self.zygotes),
            "unreaped_processes": len(self.processes.by_pid),
            "running": len(self.processes.active),
            "queued": len(self.steps.queue),
            "live_cap": self.eviction.live_cap,
            "cores": self.steps.cores,
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "supervisor_mib": resident_bytes(os.getpid()) / 2**20,
            "supervisor_pid": os.getpid(),
            "supervisor_cpu_s": time.process_time(),
            "ended_processes_cpu_s": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
        }

    def _known(self, state: str) -> Node:
        node = self.forest.nodes.get(state)
        if node is None:
            raise Refused(f"unknown state {state!r}: never made here, or its problem was closed")
        return node

    # ------------------------------------------------------------------ trees and zygotes

    def _uid(self) -> int | None:
        if not self.uid_count:
            return None
        self.counts["roots"] += 1
        return self.uid_base + self.counts["roots"] % self.uid_count

    def _open_tree(self, problem_id: str, flavour: str, seed: int) -> Tree:
        tree = Tree(problem_id, flavour, seed, self._uid())
        tree.root = self.forest.add_new(tree, None, "")
        self.forest.trees[problem_id] = tree
        self._order_root(tree.root)
        return tree

    def _drop_tree(self, tree: Tree) -> None:
        """Kill and forget a tree; steps still waiting are answered `infra_error`."""
        self.forest.trees.pop(tree.problem_id, None)
        closed = step_result("infra_error", "Closed", "the problem was closed")
        for node in tree.nodes.values():
            self.forest.nodes.pop(node.id, None)
            self.processes.idle.pop(node.id, None)
            for job in list(node.running.values()):
                self.steps.deliver(job, dict(closed))
            node.running.clear()
            node.waiting.clear()
        self.steps.queue = deque(job for job in self.steps.queue if job.parent.tree is not tree)
        for process in [p for p in self.processes.by_pid.values() if p.tree is tree]:
            self.processes.kill(process)
        for process in [p for p in self.processes.active if p.tree is tree]:
            self.processes.kill(process)

    def _start_zygote(self, flavour: str) -> Zygote:
        self.zygote_starts += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = start_interpreter(ZYGOTE, theirs)
        config = {"flavour": flavour, "withheld": self.settings["withheld"]}
        ours.send(json.dumps(config).encode())
        ours.setblocking(False)
        zygote = self.zygotes[flavour] = Zygote(process, ours)
        self.processes.zygote_pids.add(process.pid)
        self.loop.register(ours.fileno(), lambda _: self._on_zygote(flavour, zygote))
        return zygote

    def _on_zygote(self, flavour: str, zygote: Zygote) -> None:
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

    def _on_zygote_end(self, flavour: str, zygote: Zygote) -> None:
        """Start another one; live trees do not need it."""
        self.loop.unregister(zygote.control.fileno())
        zygote.control.close()
        self.zygotes.pop(flavour, None)
        self.processes.zygote_pids.discard(zygote.process.pid)
        self.counts["zygote_deaths"] += 1
        if self.zygote_starts > MAX_ZYGOTE_STARTS + self.counts["steps/ok"] // 1000:
            self._fail_orders(zygote, "the zygote keeps dying")
            return
        for process in [p for p in self.processes.active if p.phase == SPAWNING and p.job is None]:
            if process.node is not None and process.tree.flavour == flavour:
                zygote.orders.append(process.node)
                self.processes.detach(process)
        orders = [node for node in zygote.orders if node.id in self.forest.nodes]
        for node in orders:
            self._order_root(node)

    def _fail_orders(self, zygote: Zygote, reason: str) -> None:
        orders, zygote.orders = zygote.orders, []
        for node in orders:
            self._root_failed(node, reason)

    def _order_root(self, node: Node) -> None:
        tree = node.tree
        zygote = self.zygotes.get(tree.flavour) or self._start_zygote(tree.flavour)
        if not zygote.ready:
            zygote.orders.append(node)
            return
        self.eviction.make_room(tree)
        uid = tree.uid
        if uid is not None and not (
            zygote.info["prefix_open"] or zygote.info["namespaces"] == "on"
        ):
            # no other user could read the interpreter: stay this user, without capabilities
            uid = None
            self.layers["uid"] = "off: the interpreter lies where only this user can read"
        tree.base_space = zygote.info["address_space"]
        order = {
            "problem_id": tree.problem_id,
            "seed": tree.seed,
            "uid": uid,
            "address_space": tree.base_space + (self.limits["memory_mib"] << 20),
            "cpu_s": int(self.limits["cpu_s"]) + 2,
        }
        process, theirs = self.processes.expect(tree, None, time.monotonic())
        process.node = node
        # if that fails its end is seen on the control socket, which orders this root again
        with contextlib.suppress(OSError):
            socket.send_fds(zygote.control, [json.dumps(order).encode()], [theirs.fileno()])
        theirs.close()

    def root_ready(self, process: Process, report: dict[str, str]) -> None:
        node = process.node
        assert node is not None
        missing = [
            f"{layer} ({report.get(layer, 'off')})"
            for layer in isolation.REQUIRED_LAYERS
            if report.get(layer) != "on"
        ]
        self.layers = {**self.layers, **report}
        if self.strict and missing:
            self.processes.kill(process)
            self._root_failed(node, "missing isolation layers: " + ", ".join(missing))
            return
        self.processes.supervised = self.processes.supervised and process.listener is not None
        self.processes.active.discard(process)
        node.tree.base_resident = resident_bytes(process.pid)
        self.processes.keep(process, node)
        if node.tree.on_open is not None:
            on_open, node.tree.on_open = node.tree.on_open, None
            on_open("")
        self.steps.wake_waiting(node, 1)

    def finish(
        self, job: Job, result: dict[str, Any], process: Process | None, digest: str = ""
    ) -> None:
        self.steps.finish(job, result, process, digest)

    def retry(self, job: Job, reason: str) -> None:
        self.steps.retry(job, reason)

    def root_lost(self, node: Node, reason: str) -> None:
        if node.id in self.forest.nodes:
            self._root_failed(node, reason)

    def _root_failed(self, node: Node, reason: str) -> None:
        if node.tree.on_open is not None:
            on_open, node.tree.on_open = node.tree.on_open, None
            on_open(reason)
        self.steps.fail_waiting(node, step_result("infra_error", "Root", reason))

    # ------------------------------------------------------------------ start-up check

    def _self_check(self, failure: str) -> None:
        if failure:
            self._refuse_to_start(failure)
            return
        tree = self.forest.trees[""]
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

        request = Request(len(codes), answer)
        for index, code in enumerate(codes):
            self.steps.place(request, index, tree.root, code, {**self.limits, "wall_s": 30.0})

    def _refuse_to_start(self, reason: str) -> None:
        wanted = self.settings["isolation"]
        self.line.send({"failed": f"isolation={wanted!r} cannot start: {reason}"})
        self._stop()

    def _announce(self, wrong: list[str]) -> None:
        info = self.zygotes["base"].info
        layers = {**self.layers, "namespaces": info["namespaces"]}
        layers["file_system_view"] = info["namespaces"]
        if self.uid_count == 0:
            layers["uid"] = "off: not started as root with CAP_SETUID, CAP_SETGID and CAP_KILL"
        if not self.processes.supervised:
            layers["fork_supervision"] += "; unordered children are found and killed instead"
        capabilities = {
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
            "cores": self.steps.cores,
            "live_cap": self.eviction.live_cap,
        }
        self.line.send({"capabilities": capabilities})


def main() -> None:
    """Entry point of the supervisor: settings come as the first frame on the client's socket."""
    unsupported = isolation.machine_supported()
    client = socket.socket(fileno=int(sys.argv[1]))
    size = int.from_bytes(client.recv(4, socket.MSG_WAITALL), "little")
    settings = json.loads(client.recv(size, socket.MSG_WAITALL))
    if unsupported:
        client.sendall(frame({"failed": f"the sandbox {unsupported}"}))
        return
    isolation.become_subreaper()
    settings["fixed_addresses"] = isolation.fixed_addresses()
    Supervisor(client, settings).run()
