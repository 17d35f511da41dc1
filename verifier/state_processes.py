"""The live processes of a sandbox: what each says, what it may use, how it ended.

    SPAWNING -hello-> RUNNING -reply-> IDLE (kept as a state)
       |                |----reply not ok, limit, death----> ENDING -> reaped
       |---- no hello: the parent is gone

The supervisor is the parent of every root and state, so the kernel tells it alone how each one
ended and what it used; nothing a state says about limits or exits is believed. Whatever breaks the
fixed reply format is a `protocol_error`.

Fork permission: a spawn order goes to the parent state and one `clone` is expected from exactly
that pid; the kernel holds each clone of a tree until the supervisor answers. The hello of a child
carries its pid by kernel credentials. Where notification is missing (`best_effort`) a watchdog
kills every child of the supervisor that it did not order.

A step at its deadline that stood ready without a core for most of its time gets that time back,
up to the limit's own `wall_stretch`; what it could not finish by then says nothing about its code.

What comes of it is told to `Outcomes`: nothing here knows requests, queues or replay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import struct
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from verifier import isolation
from verifier.event_loop import EventLoop
from verifier.host_gauges import cpu_seconds, resident_bytes, run_delay_seconds
from verifier.sandbox_wire import (
    FRAME_BYTES,
    HELLO,
    NO_FORK,
    REPLY,
    REPLY_MAGIC,
    REPLY_STATUSES,
    ROOT_HELLO,
)
from verifier.tree_records import (
    ENDING,
    IDLE,
    RUNNING,
    SPAWNING,
    Job,
    Node,
    Process,
    Tree,
    step_result,
)

FAST_S = 0.025
"""Steps younger than this are not looked at."""
TICK_S = 0.05
EOF_GRACE_S = 0.25
FOREIGN_WINDOW_S = 2.0
"""After a kill from outside, children lost before their first word count as victims this long."""
_HELLO_SPACE = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4)


def starved(age_s: float, cpu_s: float, waited_s: float) -> bool:
    """Whether the machine, not the step, used up its time: it stood ready without a core."""
    return cpu_s < 0.3 * age_s and waited_s > 0.3 * age_s


def due_seconds(age_s: float, cpu_s: float, waited_s: float, limits: Mapping[str, Any]) -> float:
    """The age at which a step has to have answered.

    That is `wall_s`, and for a starved step what it waited more, up to `wall_stretch` times that.
    """
    wall_s = limits["wall_s"]
    if not starved(age_s, cpu_s, waited_s):
        return wall_s
    return min(wall_s + waited_s, wall_s * limits["wall_stretch"])


class Outcomes(Protocol):
    """Who is told what became of steps and roots."""

    def finish(
        self, job: Job, result: dict[str, Any], process: Process | None, digest: str = ""
    ) -> None:
        """The step is over; with a process, that is its new state."""

    def retry(self, job: Job, reason: str) -> None:
        """The step was lost before it could answer."""

    def root_ready(self, process: Process, report: dict[str, str]) -> None:
        """A root has locked itself; `report` has its layers."""

    def root_lost(self, node: Node, reason: str) -> None:
        """A root has ended."""


def _receive_hello(channel: socket.socket) -> tuple[bytes, int, list[int]]:
    """A child's first word, its process id (0: not told), and the descriptors it handed over."""
    data, ancillary, _, _ = channel.recvmsg(FRAME_BYTES, _HELLO_SPACE)
    pid = 0
    rights: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = struct.unpack("<iII", content)[0]
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            rights += struct.unpack(f"<{len(content) // 4}i", content[: len(content) & ~3])
    return data, pid, rights


class Processes:
    """All roots and states that live or are about to; its methods are called by the loop only."""

    def __init__(self, loop: EventLoop, counts: Counter[str], outcomes: Outcomes) -> None:
        self.loop, self.counts, self.outcomes = loop, counts, outcomes
        self.active: set[Process] = set()
        """Those that spawn, run, or have closed their channel and not ended yet."""
        self.idle: OrderedDict[str, Node] = OrderedDict()
        """Kept states by node id, the least recently used first."""
        self.by_pid: dict[int, Process] = {}
        self.zygote_pids: set[int] = set()
        self.live = 0
        self.supervised = True
        """Whether the kernel holds every fork until it is allowed here."""
        self.last_foreign_s = -FOREIGN_WINDOW_S
        self._early_exits: dict[int, tuple[int, Any]] = {}
        self._next_watch = 0.0

    # ------------------------------------------------------------------ making, keeping, evicting

    def expect(self, tree: Tree, job: Job | None, now: float) -> tuple[Process, socket.socket]:
        """A process that is about to be ordered, and its own end of its channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        process = Process(ours, tree, job, now)
        self.loop.register(ours.fileno(), lambda mask: self._on_channel(process, mask))
        self.active.add(process)
        self.live += 1
        tree.live += 1
        return process, theirs

    def keep(self, process: Process, node: Node) -> None:
        process.phase = IDLE
        process.node = node
        node.process = process
        if node.parent is not None:
            node.parent.live_children += 1
        self.touch(node)

    def touch(self, node: Node) -> None:
        self.idle[node.id] = node
        self.idle.move_to_end(node.id)

    def evict(self, node: Node) -> None:
        if node.process is not None:
            self.counts["evictions"] += 1
            self.kill(node.process)

    def release(self, node: Node) -> None:
        node.busy -= 1
        if node.busy == 0 and node.evict_when_free:
            node.evict_when_free = False
            self.evict(node)

    # ------------------------------------------------------------------ listening

    def _on_listener(self, listener: int, mask: int) -> None:
        if not mask & select.EPOLLIN:
            self.loop.unregister(listener)
            os.close(listener)
            return
        buffer = bytearray(isolation.NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, isolation.NOTIFICATION_RECEIVE, buffer)
        except OSError:
            return
        number, pid, _, call, _, _, flags, *_ = isolation.NOTIFICATION.unpack(buffer)
        process = self.by_pid.get(pid)
        right_call = (call, flags) == (56, isolation.FORK_FLAGS)
        if process is not None and process.permits > 0 and right_call:
            process.permits -= 1
            process.granted.append(time.monotonic())
            reply = isolation.NOTIFICATION_REPLY.pack(number, 0, 0, isolation.NOTIFICATION_CONTINUE)
        else:
            self.counts["forks_refused"] += 1
            reply = isolation.NOTIFICATION_REPLY.pack(number, 0, -1, 0)
        with contextlib.suppress(OSError):
            fcntl.ioctl(listener, isolation.NOTIFICATION_SEND, reply)

    def _on_channel(self, process: Process, mask: int) -> None:
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
            self.kill(process)

    def _on_hello(self, process: Process) -> None:
        try:
            data, pid, rights = _receive_hello(process.channel)
        except BlockingIOError:
            return
        except OSError:
            data, pid, rights = b"", 0, []
        is_root = process.job is None
        if is_root and rights:
            process.listener = rights.pop(0)
        for descriptor in rights:
            os.close(descriptor)
        if not data:
            self.spawn_failed(process)
            return
        if pid <= 0 or pid in self.by_pid or data[:1] != (ROOT_HELLO if is_root else HELLO):
            # only a parent that user code has taken over can get here
            parent = process.parent
            if parent is not None and parent.node is not None:
                parent.node.poisoned = True
                self.release(parent.node)
                self.kill(parent)
            self._give_up(process, "protocol_error", "Hello", "forged by the parent state")
            return
        process.pid = pid
        self.by_pid[pid] = process
        parent, process.parent = process.parent, None
        granted = parent is not None and parent.granted
        process.started = granted.popleft() if granted else time.monotonic()
        if parent is not None and parent.node is not None:
            self.release(parent.node)
        process.phase = RUNNING
        if process.job is None:
            if (listener := process.listener) is not None:
                self.loop.register(listener, lambda mask: self._on_listener(listener, mask))
            self.outcomes.root_ready(process, json.loads(data[1:]))
        else:
            # from its first word on: before that it was its parent that waited for a core
            process.running_since = time.monotonic()
            process.deadline = process.running_since + process.job.limits["wall_s"]
        exited = self._early_exits.pop(pid, None)
        if exited is not None:
            self._on_exit(process, *exited)

    def _on_reply_part(self, process: Process, data: bytes) -> None:
        job = process.job
        assert job is not None
        process.parts.append(data)
        process.received += len(data)
        head = process.parts[0]
        if len(head) < REPLY.size:
            self._give_up(process, "protocol_error", "Protocol", "short reply")
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
            self._give_up(process, "protocol_error", "Protocol", "malformed reply")
            return
        if process.received < expected:
            return
        body = head if len(process.parts) == 1 else b"".join(process.parts)
        process.parts = []
        start = REPLY.size
        middle, end = start + lengths[0], start + lengths[0] + lengths[1]
        output = body[start:middle]
        name = REPLY_STATUSES[status]
        result = step_result(
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
            self.outcomes.finish(job, result, process, digest)
        else:
            self.kill(process)
            self.outcomes.finish(job, result, None)

    def _usage(self, process: Process) -> dict[str, float]:
        usage = {"wall_s": time.monotonic() - process.started, "cpu_s": 0.0, "memory_mib": 0.0}
        with contextlib.suppress(OSError):
            usage["cpu_s"] = cpu_seconds(process.pid)
            usage["memory_mib"] = resident_bytes(process.pid) / 2**20
        return usage

    def _on_eof(self, process: Process) -> None:
        """The channel closed: normally the process is dying; if not, `tick` kills it."""
        self.loop.unregister(process.channel.fileno())
        process.eof_at = time.monotonic()
        self.active.add(process)

    # ------------------------------------------------------------------ verdicts of our own

    def _give_up(
        self, process: Process, status: str, kind: str, message: str, **usage: Any
    ) -> None:
        """End a step with a verdict of our own, and its process with it."""
        self.kill(process)
        job, process.job = process.job, None
        if job is not None:
            self.outcomes.finish(job, step_result(status, kind, message, **usage), None)

    def spawn_failed(self, process: Process) -> None:
        """No child came of an order: the parent is gone or could not fork."""
        job, parent, node = process.job, process.parent, process.node
        self.detach(process)
        self.counts["spawn_failures"] += 1
        if job is None:
            if node is not None:
                self.outcomes.root_lost(node, "the root ended before it was ready")
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
            self.release(parent.node)
        self.outcomes.retry(job, "no fork of the parent state")

    # ------------------------------------------------------------------ killing and reaping

    def kill(self, process: Process) -> None:
        """Condemn a process: no longer live, its channel closed; the reaper does the rest."""
        if process.phase == ENDING:
            return
        was_spawning = process.phase == SPAWNING
        if was_spawning:
            self._kill_unheard(process)
        self.detach(process)
        # not if it was reaped meanwhile: the number may be another process's by now
        if not was_spawning and self.by_pid.get(process.pid) is process:
            os.kill(process.pid, signal.SIGKILL)

    def _kill_unheard(self, process: Process) -> None:
        """End a child whose first word nobody has read.

        Its order lies in the channel, which it reads to the end though ours is closed. One that
        has said nothing yet cannot any more, and ends.
        """
        with contextlib.suppress(OSError):
            process.channel.shutdown(socket.SHUT_RD)
            _, pid, rights = _receive_hello(process.channel)
            for descriptor in rights:
                os.close(descriptor)
            # not if it was reaped meanwhile, as below
            if pid > 0 and not (pid in self.by_pid or pid in self._early_exits):
                os.kill(pid, signal.SIGKILL)

    def detach(self, process: Process) -> None:
        if process.phase == ENDING:
            return
        process.phase = ENDING
        self.live -= 1
        process.tree.live -= 1
        self.active.discard(process)
        self.loop.unregister(process.channel.fileno())
        process.channel.close()
        node = process.node
        if node is not None and node.process is process:
            node.process = None
            self.idle.pop(node.id, None)
            if node.parent is not None:
                node.parent.live_children -= 1

    def reap(self) -> None:
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
            elif pid not in self.zygote_pids:
                if len(self._early_exits) > 1000:
                    self._early_exits.clear()
                self._early_exits[pid] = (status, usage)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                    self.last_foreign_s = time.monotonic()

    def _on_exit(self, process: Process, status: int, usage: Any) -> None:
        self.by_pid.pop(process.pid, None)
        if process.phase == RUNNING:
            self._drain(process)
        if process.phase == ENDING:
            return
        node, job = process.node, process.job
        code = os.waitstatus_to_exitcode(status)
        end = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        running = process.phase == RUNNING
        self.detach(process)
        if not running:
            self.counts["idle_deaths"] += 1
            if code == -signal.SIGKILL:
                self.last_foreign_s = time.monotonic()
            elif node is not None:
                node.own_end = end
            return
        process.job = None
        if job is None:
            if node is not None:
                self.outcomes.root_lost(node, f"the root ended with {end}")
            return
        cost = {
            "wall_s": time.monotonic() - process.started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory_mib": usage.ru_maxrss / 1024,
        }
        if code == -signal.SIGXCPU:
            verdict = ("timeout", "CpuLimit", "over the CPU limit")
        elif code == -signal.SIGSYS:
            verdict = ("denied", end, "a system call of another architecture")
        elif process.lived_on:
            message = "closed its channel and went on running"
            verdict = ("protocol_error", "Protocol", message)
        elif code == -signal.SIGKILL:
            # nobody here sent it: the kernel's out-of-memory killer, or someone outside
            base_mib = process.tree.base_resident / 2**20
            if cost["memory_mib"] - base_mib <= 0.5 * job.limits["memory_mib"]:
                self.counts["foreign_kills"] += 1
                job.blameless = True
                self.outcomes.retry(job, "killed from outside the sandbox")
                return
            verdict = ("memory", end, "killed by the kernel for memory")
        else:
            verdict = ("died", end, f"the process ended without an answer: {end}")
        self.outcomes.finish(job, step_result(*verdict, **cost), None)

    def _drain(self, process: Process) -> None:
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
            self.detach(process)

    # ------------------------------------------------------------------ the clock

    def tick(self, now: float) -> None:
        for process in list(self.active):
            if process.phase == ENDING:
                continue
            if process.eof_at:
                if now - process.eof_at > EOF_GRACE_S and not process.lived_on:
                    process.lived_on = True
                    os.kill(process.pid, signal.SIGKILL)
            elif process.phase == SPAWNING:
                if now >= process.deadline:
                    parent = process.parent
                    if parent is not None:
                        self.kill(parent)
                    self.spawn_failed(process)
            elif process.job is not None:
                self._check_limits(process, process.job, now)
        if not self.supervised and now >= self._next_watch:
            self._next_watch = now + TICK_S
            self._kill_unordered()

    def _check_limits(self, process: Process, job: Job, now: float) -> None:
        age = now - process.running_since
        if age < FAST_S and now < process.deadline:
            return
        limits = job.limits
        try:
            cpu_s = cpu_seconds(process.pid)
            resident = resident_bytes(process.pid)
        except OSError:
            return
        process.burning = cpu_s - process.cpu_s > 0 and cpu_s > 0.2 * age
        usage = {"wall_s": age, "cpu_s": cpu_s, "memory_mib": resident / 2**20}
        if now >= process.deadline:
            waited = run_delay_seconds(process.pid)
            due_s = due_seconds(age, cpu_s, waited, limits)
            if age < due_s:
                self.counts["contended_extensions"] += 1
                process.deadline = process.running_since + due_s
            elif starved(age, cpu_s, waited) and age - waited < limits["wall_s"]:
                message = f"no core was free for it in {waited:.1f} of {age:.1f} s"
                self._give_up(process, "infra_error", "Contended", message, **usage)
            else:
                message = f"no answer within {limits['wall_s']:g} s"
                self._give_up(process, "timeout", "WallLimit", message, **usage)
        elif cpu_s > limits["cpu_s"]:
            message = f"used more than {limits['cpu_s']:g} s of CPU"
            self._give_up(process, "timeout", "CpuLimit", message, **usage)
        elif resident > process.tree.base_resident + limits["memory_mib"] * 2**20:
            message = f"used more than {limits['memory_mib']} MiB"
            self._give_up(process, "memory", "MemoryLimit", message, **usage)

    def _kill_unordered(self) -> None:
        """Without fork supervision: end every child that no order of ours explains."""
        expected = sum(1 for process in self.active if process.phase == SPAWNING)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        known = self.zygote_pids | self.by_pid.keys()
        strangers = [int(pid) for pid in children if int(pid) not in known]
        if len(strangers) > expected:
            for pid in strangers:
                self.counts["unordered_children"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def end_everything(self) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            try:
                left = [int(pid) for pid in children.read_text().split()]
            except OSError:
                left = [*self.by_pid, *self.zygote_pids]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while True:
                    os.wait4(-1, 0)
            except ChildProcessError:
                return
