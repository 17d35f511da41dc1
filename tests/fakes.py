"""Scripted engines: they replay a script, keep what they were asked, and need no model.

    ScriptedPolicy    prompt -> completions, by table or by function
    TablePreference   text   -> value
    ScriptedSandbox   code   -> stdout or failure

A table is looked up by *suffix*: the longest key the prompt (or text) ends with wins, and the key
"" matches everything. So a script can name the last step of a prompt and leave out the question.
`gate` lets a test hold every call until it opens the event; `failures` makes the first calls fail
as a broken engine does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from rollout.engine import (
    Completion,
    EngineError,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    LogprobReply,
    LogprobRequest,
)
from rollout.prompt import CODE, END_OF_CODE, END_OF_OUTPUT, END_OF_STEP
from verifier import SandboxLimits, StepResult, StepStatus

T = TypeVar("T")

PolicyScript = (
    Mapping[str, Sequence[str | Completion]]
    | Callable[[GenerationRequest], Sequence[str | Completion]]
)


def completion(text: str, stop: Sequence[str] = (), logprob: float | None = None) -> Completion:
    """A completion of one token per four characters that ended on the stop string it ends with."""
    stop_string = next((s for s in stop if text.endswith(s)), None)
    return Completion(
        text=text,
        finish=FinishReason.STOP if stop_string is not None else FinishReason.LENGTH,
        stop_string=stop_string,
        num_tokens=max(1, len(text) // 4),
        logprob=logprob,
    )


def random_steps(request: GenerationRequest) -> list[str]:
    """Steps, programs, answers, failing code and garbage, drawn from the request's seed alone.

    A policy script for the question "3": `bad` is code that a `ScriptedSandbox` may be told to
    fail on, and its default output should be "3\\n".
    """
    rng = random.Random(request.seed)
    depth = request.prompt.count("<end_of_step>")
    if request.prompt.endswith("<end_of_output>\n"):
        choices = [
            "<answer>It is \\boxed{3}<end_of_answer>",
            "<answer>It is \\boxed{4}<end_of_answer>",
            "<answer>none<end_of_answer>",
        ]
    else:
        choices = [
            f"a = {rng.randrange(3)}\n<end_of_step>",
            "bad\n<end_of_step>",
            f"print({depth})\n<end_of_code>",
            "cut",
        ]
    return [rng.choice(choices) for _ in range(request.num_candidates)]


def by_suffix(table: Mapping[str, T], text: str) -> T:
    """The entry with the longest key that `text` ends with.

    Raises:
        KeyError: no key fits.
    """
    fitting = [key for key in table if text.endswith(key)]
    if not fitting:
        raise KeyError(f"the script has no entry for text ending in {text[-80:]!r}")
    return table[max(fitting, key=len)]


class _Gated:
    """What the engines share: a gate, a number of failures to give first, calls in flight."""

    def __init__(self, gate: asyncio.Event | None, failures: int) -> None:
        self.gate = gate
        self.failures = failures
        self.in_flight = 0
        self.max_in_flight = 0

    async def _enter(self) -> None:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self.gate is not None:
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
            if self.failures > 0:
                self.failures -= 1
                raise EngineError("scripted failure")
        finally:
            self.in_flight -= 1


def opened(text: str, prompt: str) -> str:
    """`text` with `<code>` before it where it is the first step of a solution."""
    first = not prompt.endswith((END_OF_STEP, END_OF_OUTPUT + "\n"))
    code = text.endswith((END_OF_STEP, END_OF_CODE))
    return CODE + text if first and code and not text.startswith(CODE) else text


class ScriptedPolicy(_Gated):
    """A policy that answers from a script; a short entry is repeated, a long one cut.

    A script may leave out the `<code>` of first steps, except in a `Completion`.
    """

    def __init__(
        self,
        script: PolicyScript,
        *,
        version: str = "scripted-policy",
        gate: asyncio.Event | None = None,
        failures: int = 0,
    ) -> None:
        super().__init__(gate, failures)
        self.script = script
        self.version = version
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        """Replay the entry for `request.prompt`."""
        self.requests.append(request)
        await self._enter()
        if callable(self.script):
            entry = self.script(request)
        else:
            entry = by_suffix(self.script, request.prompt)
        texts = [entry[i % len(entry)] for i in range(request.num_candidates)]
        return GenerationReply(
            completions=tuple(
                t
                if isinstance(t, Completion)
                else replace(completion(t, request.stop), text=opened(t, request.prompt))
                for t in texts
            ),
            prompt_tokens=max(1, len(request.prompt) // 4),
            policy_version=self.version,
        )

    async def logprobs(self, request: LogprobRequest) -> LogprobReply:
        """The less was written, the likelier."""
        await self._enter()
        return LogprobReply(
            values=tuple(
                -float(sum(len(segment.text) for segment in text if segment.trained))
                for text in request.texts
            ),
            policy_version=self.version,
        )


class TablePreference(_Gated):
    """A preference model that looks values up; a text without an entry is worth `default`."""

    def __init__(
        self,
        values: Mapping[str, float] | Callable[[str], float],
        *,
        default: float = 0.0,
        version: str = "table-preference",
        gate: asyncio.Event | None = None,
        failures: int = 0,
    ) -> None:
        super().__init__(gate, failures)
        self.values = values
        self.default = default
        self.version = version
        self.requests: list[EvaluationRequest] = []

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        """Look up each text."""
        self.requests.append(request)
        await self._enter()
        return EvaluationReply(
            values=tuple(self._value(text) for text in request.texts),
            num_tokens=sum(max(1, len(text) // 4) for text in request.texts),
            preference_version=self.version,
        )

    def _value(self, text: str) -> float:
        if callable(self.values):
            return self.values(text)
        try:
            return by_suffix(self.values, text)
        except KeyError:
            return self.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a scripted code fails."""

    status: str = "error"
    error_type: str = "ValueError"
    error_message: str = "scripted"
    stdout: str = ""


@dataclass(slots=True)
class _OpenTree:
    codes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Codes run from the root to each state."""


class ScriptedSandbox(_Gated):
    """A sandbox that looks outputs up by code (exact match); other code prints `default`.

    `events` keeps the order of ("open", tree), ("run", state, codes) and ("close", tree);
    `paths` the codes that led to each live state; `open_trees` what was not closed.
    """

    def __init__(
        self,
        outputs: Mapping[str, str | Failure] | None = None,
        *,
        default: str | Failure = "",
        gate: asyncio.Event | None = None,
        failures: int = 0,
    ) -> None:
        super().__init__(gate, failures)
        self.outputs = dict(outputs or {})
        self.default = default
        self.events: list[tuple[object, ...]] = []
        self._trees: dict[str, _OpenTree] = {}
        self._tree_of: dict[str, str] = {}

    @property
    def open_trees(self) -> list[str]:
        return list(self._trees)

    def path(self, state: str) -> tuple[str, ...]:
        """Codes run from the root to `state`."""
        return self._trees[self._tree_of[state]].codes[state]

    async def open(self, tree_id: str, *, flavour: str = "base", seed: int = 0) -> str:
        """Start a tree; flavour and seed make no difference.

        Raises:
            ValueError: it is open already.
        """
        self.events.append(("open", tree_id))
        if tree_id in self._trees:
            raise ValueError(f"tree {tree_id} is open already")
        root = f"{tree_id}:0"
        self._trees[tree_id] = _OpenTree({root: ()})
        self._tree_of[root] = tree_id
        return root

    async def run(
        self, state: str, codes: Sequence[str], limits: SandboxLimits | None = None
    ) -> list[StepResult]:
        """Look up each code, without limits.

        Raises:
            ValueError: the state is not one of an open tree.
        """
        self.events.append(("run", state, tuple(codes)))
        await self._enter()
        if state not in self._tree_of:
            raise ValueError(f"state {state} is not open")
        return [self._run_one(state, code) for code in codes]

    def _run_one(self, state: str, code: str) -> StepResult:
        output = self.outputs.get(code, self.default)
        if isinstance(output, Failure):
            return StepResult(
                status=StepStatus(output.status),
                stdout=output.stdout,
                state=None,
                error_type=output.error_type,
                error_message=output.error_message,
            )
        tree_id = self._tree_of[state]
        tree = self._trees[tree_id]
        child = f"{tree_id}:{len(tree.codes)}"
        tree.codes[child] = (*tree.codes[state], code)
        self._tree_of[child] = tree_id
        return StepResult(
            status=StepStatus.OK, stdout=output, state=child, error_type="", error_message=""
        )

    async def close(self, tree_id: str) -> None:
        """Forget the tree's states; closing twice is harmless."""
        self.events.append(("close", tree_id))
        tree = self._trees.pop(tree_id, None)
        for state in tree.codes if tree is not None else ():
            del self._tree_of[state]

    async def stats(self) -> dict[str, object]:
        """Number of calls so far."""
        return {"calls": len(self.events)}

    def shutdown(self) -> None:
        """Nothing to end."""
