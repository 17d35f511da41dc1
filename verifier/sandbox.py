"""The step sandbox: run untrusted code on a branch of a live interpreter.

    with Sandbox(limits=SandboxLimits(wall_s=5.0), isolation="strict") as sandbox:
        root = sandbox.open("problem-17")
        results = sandbox.run(root, ["x = 6*7\\nprint(x)", "1/0"])   # siblings, order kept
        again = sandbox.run(results[0].state, ["print(x + 1)"])       # "43\\n"; x is still there
        sandbox.close("problem-17")

A *tree* belongs to one problem; its root is a fresh `__main__`; a *state* is the interpreter after
the steps on the path to it. `run` executes each code on its own copy of the parent state, so
siblings never see each other and the parent never changes; a step costs the same at any depth.
States are kept while memory allows; the least recently used are dropped and come back by running
their path again, checked against the output of the first run.

`Sandbox` blocks its caller, `AsyncSandbox` awaits; both may be used from any thread, need no
signal, and speak to one supervisor process per sandbox (`fork_tree`). What isolates a step:
`isolation`.

Not covered: the last expression's value is not echoed, only what is printed counts as output;
open files, threads and child processes do not exist or do not outlive a step.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal, Self, TypeAlias

from verifier.sandbox_client import SandboxError, SupervisorClient

__all__ = [
    "AsyncSandbox",
    "Isolation",
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "StateId",
    "StepResult",
    "StepStatus",
]

StateId: TypeAlias = str
"""Names a state for the life of its sandbox, also after eviction or a supervisor restart."""

Isolation: TypeAlias = Literal["strict", "best_effort"]


class StepStatus(StrEnum):
    """How a step ended. Compares equal to its plain text, `result.status == "ok"`."""

    OK = "ok"
    ERROR = "error"
    """The code raised (SyntaxError and SystemExit included)."""
    TIMEOUT = "timeout"
    """Over the wall or CPU limit; killed."""
    MEMORY = "memory"
    """Over the memory limit: killed, or an uncaught MemoryError."""
    OUTPUT_LIMIT = "output_limit"
    """Printed more than is accepted."""
    DIED = "died"
    """The process ended without an answer: crash, `os._exit`, stack overflow in C."""
    PROTOCOL_ERROR = "protocol_error"
    """The process answered what no honest step answers, or closed its channel and lived on."""
    DENIED = "denied"
    """Refused: code over its size or depth limit, or an operation the isolation forbids."""
    REPLAY_DIVERGED = "replay_diverged"
    """The parent had been evicted and running its path again printed something else."""
    POOL_OVERLOADED = "pool_overloaded"
    """Too many requests are waiting; nothing was run."""
    INFRA_ERROR = "infra_error"
    """The sandbox failed, not the code, and was tried again; or the machine had no core for it."""


INFRASTRUCTURE_STATUSES = frozenset(
    {StepStatus.REPLAY_DIVERGED, StepStatus.POOL_OVERLOADED, StepStatus.INFRA_ERROR}
)
"""Say nothing about the code: never to be turned into a label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Limits of one step, and of the tree and pool around it. Every number must be above zero."""

    wall_s: float = 10.0
    """Seconds from the start of the step to its answer."""
    wall_stretch: float = 3.0
    """A step that stood ready without a core gets that time back, up to this many times wall_s in
    all; 1 gives none back."""
    cpu_s: float | None = None
    """CPU seconds of the step; None means wall_s + 1."""
    memory_mib: int = 1024
    """Address space above the warm interpreter's own, shared by all steps of a path."""
    output_kib: int = 64
    """UTF-8 output kept per step, its start and end; at most 1024."""
    output_accepted_kib: int = 4096
    """Output (1024 characters each) after which a step is ended as `output_limit`."""
    error_kib: int = 2
    """Text kept of an error message; at most 64."""
    code_kib: int = 64
    """UTF-8 code per step; longer is `denied`; at most 128."""
    depth: int = 64
    """Steps on a path; a deeper one is `denied`."""
    live_states_per_tree: int = 256
    """Processes kept per tree; above it the least recently used are evicted."""
    live_states: int = 2000
    """Processes kept by the whole sandbox; lowered to what pids, descriptors and memory allow."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cpu_s" and value is None:
                continue
            whole = field.name not in ("wall_s", "wall_stretch", "cpu_s")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise TypeError(f"SandboxLimits.{field.name} must be {kind}, got {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"SandboxLimits.{field.name} must be above 0, got {value!r}")
        if self.wall_stretch < 1:
            raise ValueError(
                f"SandboxLimits.wall_stretch must be at least 1, got {self.wall_stretch}"
            )
        for name, most in (
            ("output_kib", 1024),
            ("error_kib", 64),
            ("code_kib", 128),
            ("output_accepted_kib", 1 << 20),
            ("memory_mib", 1 << 24),
            ("wall_s", 86_400),
        ):
            if (value := getattr(self, name)) > most:
                raise ValueError(f"SandboxLimits.{name} must be at most {most}, got {value}")

    @property
    def cpu_limit_s(self) -> float:
        return self.wall_s + 1.0 if self.cpu_s is None else self.cpu_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What became of one step."""

    status: StepStatus
    state: StateId | None
    """The state after the step; None unless the status is ok."""
    stdout: str = ""
    """What the step printed, start and end of it if longer than kept."""
    error_type: str = ""
    """Name of the exception, signal or limit; empty when ok."""
    error_message: str = ""
    truncated: bool = False
    """Whether output was cut from the middle of stdout."""
    wall_s: float = 0.0
    """Seconds from the fork to the answer or the kill, by the supervisor's clock."""
    cpu_s: float = 0.0
    """CPU seconds of the step's process, fork included, from the kernel."""
    exec_s: float = 0.0
    """Seconds inside the user's code as told by the step itself: for measurement only."""
    memory_mib: float = 0.0
    """Resident memory at the answer or peak at the end, shared pages included, from the kernel."""
    replayed: int = 0
    """Steps that ran again first, because the parent had been evicted."""
    attempts: int = 1
    """Executions of this step; above 1 only after infrastructure failures."""

    @property
    def ok(self) -> bool:
        return self.status is StepStatus.OK


class _Base:
    """Settings, checks and wire forms shared by the two forms of the client."""

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        isolation: Isolation = "strict",
        *,
        cores: int | None = None,
        share: float = 1.0,
        withheld_layers: Sequence[str] = (),
    ) -> None:
        """Start the supervisor and the warm interpreter; takes 1 to 3 s.

        Args:
            limits: defaults of every step, and the limits of trees and pool.
            isolation: "strict" refuses to start when a required layer is missing; "best_effort"
                starts, logs what is missing and says so in `capabilities()`.
            cores: steps to run at once; None means the cores this process may use.
            share: part of this machine, above 0 and at most 1, that the sandbox has: of its cores
                (unless `cores` says), pids and memory.
            withheld_layers: isolation layers to treat as missing, to test `best_effort`.
        Raises:
            ValueError: unknown isolation, cores < 1, share out of range.
            SandboxError: the sandbox cannot start here; the message names the missing layers.
        """
        if isolation not in ("strict", "best_effort"):
            raise ValueError(f"isolation must be 'strict' or 'best_effort', got {isolation!r}")
        if cores is not None and cores < 1:
            raise ValueError(f"cores must be at least 1, got {cores}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        self.limits = limits or SandboxLimits()
        if not isinstance(self.limits, SandboxLimits):
            raise TypeError(f"limits must be SandboxLimits, got {type(limits).__name__}")
        self._client = SupervisorClient(
            {
                "limits": _limits_to_wire(self.limits),
                "isolation": isolation,
                "cores": cores,
                "share": share,
                "withheld": tuple(withheld_layers),
            }
        )

    def capabilities(self) -> Mapping[str, Any]:
        """Layer -> "on" or why it is off, with the Landlock version and the pool's limits."""
        return self._client.capabilities

    def _open(self, problem_id: str, flavour: str, seed: int) -> Future[Any]:
        if not isinstance(problem_id, str) or not problem_id:
            raise ValueError(f"problem_id must be a non-empty string, got {problem_id!r}")
        if flavour not in ("base", "scipy"):
            raise ValueError(f"flavour must be 'base' or 'scipy', got {flavour!r}")
        return self._client.request("open", problem_id=problem_id, flavour=flavour, seed=int(seed))

    def _run(
        self, state: StateId, codes: Sequence[str], limits: SandboxLimits | None
    ) -> Future[Any]:
        if isinstance(codes, str | bytes):
            raise TypeError("codes must be a sequence of strings, got a single string")
        codes = list(codes)
        for index, code in enumerate(codes):
            if not isinstance(code, str):
                raise TypeError(f"codes[{index}] must be a string, got {type(code).__name__}")
        if limits is not None and limits.memory_mib > self.limits.memory_mib:
            raise ValueError(
                f"limits.memory_mib={limits.memory_mib} is above the sandbox's own "
                f"{self.limits.memory_mib}, which is fixed when a tree is opened"
            )
        return self._client.request(
            "run",
            state=_checked_state(state),
            codes=codes,
            limits=None if limits is None else _limits_to_wire(limits),
        )

    def _close_tree(self, problem_id: str) -> Future[Any]:
        return self._client.request("close", problem_id=problem_id)

    def _evict(self, state: StateId) -> Future[Any]:
        return self._client.request("evict", state=_checked_state(state))

    def shutdown(self) -> None:
        """End the supervisor and every process of the sandbox; harmless when repeated."""
        self._client.shutdown()


class Sandbox(_Base):
    """The blocking form. Use as a context manager or call `shutdown`."""

    def open(self, problem_id: str, *, flavour: str = "base", seed: int = 0) -> StateId:
        """Start a tree and return its root state.

        Args:
            flavour: "base" (sympy, numpy, standard library) or "scipy", whose forks cost twice as
            much. seed: with problem_id, up to a `TWIN` in it, seeds `random` and `numpy.random` in
            the root.
        Raises:
            ValueError: the problem is already open. SandboxError: no root could be made.
        """
        return self._open(problem_id, flavour, seed).result()["state"]

    def run(
        self, state: StateId, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        """Run each code on its own copy of `state`; one result per code, order kept.

        Equal codes run once and share their result and state, also across calls; a code that is
        empty or only comments returns `state` itself.
        Args:
            limits: for these steps only; its tree and pool fields are not looked at.
        Raises:
            ValueError: unknown state, its tree closed, or memory_mib above the sandbox's own.
            SandboxError: the sandbox is shut down or could not be restarted.
        """
        return _results(self._run(state, codes, limits).result())

    def evict(self, state: StateId) -> None:
        """Free the state's process; the next run from it replays. ValueError if unknown."""
        self._evict(state).result()

    def close(self, problem_id: str) -> None:
        """Free every state of a tree; its state ids end. ValueError if it is not open."""
        self._close_tree(problem_id).result()

    def stats(self) -> dict[str, Any]:
        """Counters since the start and gauges of now; see `fork_tree.Supervisor.stats`."""
        return self._client.request("stats").result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


class AsyncSandbox(_Base):
    """The awaiting form, same methods and meaning; any number of calls may be in flight.

    Starting blocks for 1 to 3 s: in a running event loop use `await AsyncSandbox.start(...)`.
    """

    @classmethod
    async def start(
        cls, limits: SandboxLimits | None = None, isolation: Isolation = "strict", **settings: Any
    ) -> Self:
        return await asyncio.to_thread(cls, limits, isolation, **settings)

    async def open(self, problem_id: str, *, flavour: str = "base", seed: int = 0) -> StateId:
        return (await asyncio.wrap_future(self._open(problem_id, flavour, seed)))["state"]

    async def run(
        self, state: StateId, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        return _results(await asyncio.wrap_future(self._run(state, codes, limits)))

    async def evict(self, state: StateId) -> None:
        await asyncio.wrap_future(self._evict(state))

    async def close(self, problem_id: str) -> None:
        await asyncio.wrap_future(self._close_tree(problem_id))

    async def stats(self) -> dict[str, Any]:
        return await asyncio.wrap_future(self._client.request("stats"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)


def _checked_state(state: StateId) -> StateId:
    if not isinstance(state, str):
        raise ValueError(f"a state id is a string, got {state!r}")
    return state


def _limits_to_wire(limits: SandboxLimits) -> dict[str, Any]:
    return {**asdict(limits), "cpu_s": limits.cpu_limit_s}


def _results(reply: Mapping[str, Any]) -> list[StepResult]:
    return [
        StepResult(**{**entry, "status": StepStatus(entry["status"])}) for entry in reply["results"]
    ]
