"""The life of a step, from the request that asks for it to the result that answers it.

    place -> answered at once | joins an equal step | queue -launch-> forked -> finish | retry
                                                        |-- parent evicted: waits for its replay

Equal codes on one state run once. A node whose process has gone is made again by running its path
from the nearest live ancestor; each output is compared by its hash with that of the first run.

Scheduling: a step counts against the cores for its first 25 ms; after that only while it burns CPU,
and then against three times the cores, so a few hung steps never hold back their siblings.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from verifier.eviction import Eviction
from verifier.sandbox_wire import FRAME_BYTES, REQUEST, REQUEST_MAGIC, SPAWN
from verifier.state_processes import FAST_S, FOREIGN_WINDOW_S, Processes
from verifier.tree_records import (
    IDLE,
    NOT_ABOUT_THE_CODE,
    Forest,
    Job,
    Node,
    Process,
    Request,
    step_result,
)

MAX_ATTEMPTS = 3
MAX_RUNNING = 64
MAX_QUEUE = 20_000

_STEP_LIMITS = (
    *("wall_s", "wall_stretch", "cpu_s", "memory_mib"),
    *("output_kib", "output_accepted_kib", "error_kib", "code_kib"),
)
_POISONED = "the parent state broke the protocol while it waited"


class Steps:
    """The queue of steps, and who waits for each; its methods are called by the loop only."""

    def __init__(
        self,
        limits: dict[str, Any],
        cores: int,
        forest: Forest,
        processes: Processes,
        eviction: Eviction,
        order_root: Callable[[Node], None],
    ) -> None:
        self.limits, self.cores, self.forest = limits, cores, forest
        self.processes, self.eviction, self.order_root = processes, eviction, order_root
        self.counts: Counter[str] = processes.counts
        self.queue: deque[Job] = deque()
        self._nonce = 1

    # ------------------------------------------------------------------ placing and launching

    def place(
        self, request: Request, index: int, node: Node, code: str, limits: dict[str, Any]
    ) -> None:
        """Answer without running if possible, join an equal step, or queue a new one."""
        text = code.encode("utf-8", "surrogatepass")
        if len(text) > limits["code_kib"] * 1024:
            message = f"the code is {len(text)} bytes, at most {limits['code_kib']} KiB are run"
            self._put(request, index, step_result("denied", "CodeSize", message))
            return
        if _is_empty(code):
            self._put(request, index, step_result("ok", state=node.id))
            return
        if node.depth >= self.limits["depth"]:
            message = f"depth {node.depth + 1} is above the limit of {self.limits['depth']}"
            self._put(request, index, step_result("denied", "Depth", message))
            return
        if node.poisoned:
            self._put(request, index, step_result("protocol_error", "ParentState", _POISONED))
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
                self._put(request, index, step_result("pool_overloaded", "Queue", message))
                return
            job = Job(node, code, key, limits)
            node.running[key] = job
            self.queue.append(job)
        else:
            self.counts["shared_results"] += 1
        job.waiters.append((request, index))

    def _put(self, request: Request, index: int, result: dict[str, Any]) -> None:
        self.counts["steps/" + result["status"]] += 1
        request.put(index, result)

    def _may_launch(self, now: float) -> bool:
        if len(self.processes.active) < self.cores:
            return True
        if len(self.processes.active) >= MAX_RUNNING:
            return False
        fast = burning = 0
        for process in self.processes.active:
            if now - process.started < FAST_S:
                fast += 1
            elif process.burning:
                burning += 1
        return fast < self.cores and fast + burning < 3 * self.cores

    def pump(self, now: float) -> None:
        waiting: list[Job] = []
        while self.queue and self._may_launch(now) and len(waiting) < MAX_RUNNING:
            job = self.queue.popleft()
            if job.parent.id in self.forest.nodes and not self._launch(job, now):
                waiting.append(job)
        self.queue.extendleft(reversed(waiting))

    def _launch(self, job: Job, now: float) -> bool:
        """Order the fork for a step; False if it must wait until running steps make room."""
        node = job.parent
        parent = node.process
        if parent is None or parent.phase != IDLE:
            self._restore(job)
            return True
        if not self.eviction.make_room(node.tree, spare=node):
            if self.processes.active:
                return False
            live = f"{node.tree.live} live in the tree, {self.processes.live} in all"
            message = f"no room for a state: {live}"
            self.finish(job, step_result("pool_overloaded", "LiveStates", message), None)
            return True
        job.attempts += 1
        process, theirs = self.processes.expect(node.tree, job, now)
        process.parent = parent
        process.listener = parent.listener
        process.nonce = self._nonce = (self._nonce + 1) & 0xFFFFFFFF
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
        node.busy += 1
        self.counts["forks"] += 1
        self.processes.touch(node)
        request = header + text
        with theirs:
            try:
                for start in range(0, len(request), FRAME_BYTES):
                    process.channel.send(request[start : start + FRAME_BYTES])
                parent.permits += 1
                socket.send_fds(parent.channel, [SPAWN], [theirs.fileno()])
            except OSError:
                self.processes.kill(parent)
                self.processes.spawn_failed(process)
        return True

    def _restore(self, job: Job) -> None:
        """Put a job aside until its parent lives again, and see to that."""
        node = job.parent
        node.waiting.append(job)
        if len(node.waiting) > 1:
            return
        self.counts["replays"] += 1
        if node.parent is None:
            self.order_root(node)
            return
        replay = Job(node.parent, node.code, ("replay", node.id), node.limits)
        replay.replay_of = node
        self.queue.appendleft(replay)

    def wake_waiting(self, node: Node, replayed: int) -> None:
        waiting, node.waiting = node.waiting, []
        for job in waiting:
            job.replayed += replayed
            self.queue.appendleft(job)

    def fail_waiting(self, node: Node, result: dict[str, Any]) -> None:
        waiting, node.waiting = node.waiting, []
        for job in waiting:
            self.finish(job, dict(result), None)

    # ------------------------------------------------------------------ the end of a step

    def retry(self, job: Job, reason: str) -> None:
        self.counts["retries"] += 1
        if job.parent.id not in self.forest.nodes:
            return
        if job.parent.poisoned:
            self.finish(job, step_result("protocol_error", "ParentState", _POISONED), None)
        elif job.attempts < MAX_ATTEMPTS:
            if job.parent.process is not None:
                # the parent lives but could not fork: make room before the next try
                self.eviction.evict_some(4, job.parent)
            self.queue.append(job)
        elif job.blameless or time.monotonic() - self.processes.last_foreign_s < FOREIGN_WINDOW_S:
            self.finish(job, step_result("infra_error", "Infrastructure", reason), None)
        else:
            end = job.parent.own_end or "its children end before their first word"
            message = f"the parent state does not survive its own step: {end}"
            self.finish(job, step_result("died", "ParentState", message), None)

    def finish(
        self, job: Job, result: dict[str, Any], process: Process | None, digest: str = ""
    ) -> None:
        parent = job.parent
        if (job.replay_of or parent).id not in self.forest.nodes:
            if process is not None:
                self.processes.kill(process)
            return
        if job.replay_of is not None:
            self._finish_replay(job, job.replay_of, result, process, digest)
            return
        result["replayed"], result["attempts"] = job.replayed, max(job.attempts, 1)
        if process is not None:
            node = self.forest.add_new(parent.tree, parent, job.code)
            node.digest, node.limits = digest, job.limits
            result["state"] = node.id
            result["journal"] = {
                "state": node.id,
                "digest": digest,
                "problem_id": parent.tree.problem_id,
            }
            self.processes.keep(process, node)
        parent.running.pop(job.key, None)
        if result["status"] not in NOT_ABOUT_THE_CODE:
            parent.cached[job.key] = result
        self.deliver(job, result)

    def deliver(self, job: Job, result: dict[str, Any]) -> None:
        waiters, job.waiters = job.waiters, []
        for request, index in waiters:
            self._put(request, index, dict(result))

    def _finish_replay(
        self, job: Job, node: Node, result: dict[str, Any], process: Process | None, digest: str
    ) -> None:
        if process is not None and digest == node.digest:
            self.processes.keep(process, node)
            self.wake_waiting(node, 1 + job.replayed)
            return
        if process is not None:
            self.processes.kill(process)
        if result["status"] in NOT_ABOUT_THE_CODE or result["error_type"] == "ParentState":
            self.fail_waiting(node, result)
            return
        self.counts["divergences"] += 1
        what = "printed something else" if process is not None else f"ended {result['status']}"
        message = f"step {node.depth} of the path ({node.id}) {what} when run again"
        self.fail_waiting(node, step_result("replay_diverged", "Replay", message))


def _is_empty(code: str) -> bool:
    """Whether the code has no statement at all: only blank lines and comments."""
    if "\0" in code:
        return False
    for line in code.replace("\r", "\n").split("\n"):
        stripped = line.strip(" \t\f")
        if stripped and (stripped[0] != "#" or not stripped.isprintable()):
            return False
    return True
