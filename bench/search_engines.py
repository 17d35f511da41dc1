"""Engines of the search bench: scripted, recorded, modelled, and waiting for each other.

ScriptedEngines     cost nothing: what is left is the search itself
Recorder            passes requests on and keeps them with their replies
ModelledPolicy      gives recorded replies after the time a latency curve says
Barrier             holds every tree until all wait: the lock-step driver
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollout.engine import (
    Completion,
    EvaluationReply,
    EvaluationRequest,
    FinishReason,
    GenerationReply,
    GenerationRequest,
    PolicyEngine,
    PreferenceEngine,
)
from rollout.prompt import CODE, END_OF_ANSWER, END_OF_CODE, END_OF_STEP
from verifier import StepResult, StepStatus

Curve = Sequence[tuple[int, float]]
"""(sequences in flight, tokens per second of all of them together), ascending."""


# --------------------------------------------------------------------------- at no cost


class ScriptedEngines:
    """Policy, PPM and sandbox in one: `num_steps` code steps, then an answer, at no cost.

    Every path goes on to an answer, candidates differ, every answer is 0.
    """

    def __init__(self, num_steps: int, step_text: str = "x = {n}\n") -> None:
        self.num_steps = num_steps
        self.step_text = step_text
        self._numbers = itertools.count()

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        await asyncio.sleep(0)
        depth = request.prompt.count(END_OF_STEP) + request.prompt.count(END_OF_CODE)
        if depth < self.num_steps:
            end = END_OF_STEP if depth < self.num_steps - 1 else END_OF_CODE
            opening = CODE if depth == 0 else ""
            texts = [
                opening + self.step_text.format(n=next(self._numbers)) + end
                for _ in range(request.num_candidates)
            ]
        else:
            end = END_OF_ANSWER
            texts = [
                f"<answer>\\boxed{{0}} ({next(self._numbers)}){end}"
                for _ in range(request.num_candidates)
            ]
        completions = tuple(
            Completion(text=text, finish=FinishReason.STOP, stop_string=end, num_tokens=20)
            for text in texts
        )
        return GenerationReply(completions=completions, prompt_tokens=100, policy_version="script")

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        await asyncio.sleep(0)
        values = tuple((len(text) % 7 - 3) / 4 for text in request.texts)
        return EvaluationReply(values=values, num_tokens=100, preference_version="script")

    async def open(self, tree_id: str) -> str:
        return "root"

    async def run(self, state: str, codes: Sequence[str]) -> list[StepResult]:
        return [StepResult(status=StepStatus.OK, state=f"{state}/{n}") for n in range(len(codes))]

    async def close(self, tree_id: str) -> None:
        return None


# --------------------------------------------------------------------------- recorded


@dataclass(frozen=True, slots=True)
class Answered:
    """A policy request with its reply, and when that came."""

    request: GenerationRequest
    reply: GenerationReply
    at_s: float

    @property
    def num_tokens(self) -> int:
        return sum(completion.num_tokens for completion in self.reply.completions)


class OpensCode:
    """A policy that writes anything; its first steps open as the grammar asks all the same."""

    def __init__(self, policy: PolicyEngine) -> None:
        self._policy = policy

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        if END_OF_STEP in request.prompt:
            return await self._policy.generate(request)
        reply = await self._policy.generate(replace(request, prompt=request.prompt + CODE))
        opened = tuple(replace(one, text=CODE + one.text) for one in reply.completions)
        return replace(reply, completions=opened)


class Recorder:
    """Passes requests on to a policy and a PPM, and keeps them with their replies."""

    def __init__(self, policy: PolicyEngine, preference: PreferenceEngine) -> None:
        self._policy = policy
        self._preference = preference
        self.answered: list[Answered] = []
        self.values: dict[str, float] = {}
        self.evaluations: list[EvaluationRequest] = []

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        reply = await self._policy.generate(request)
        self.answered.append(Answered(request, reply, time.monotonic()))
        return reply

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        reply = await self._preference.evaluate(request)
        self.evaluations.append(request)
        self.values.update(zip(request.texts, reply.values, strict=True))
        return reply

    def tokens(self, since_s: float, until_s: float) -> int:
        """Generated tokens of the requests answered between two times."""
        return sum(a.num_tokens for a in self.answered if since_s <= a.at_s <= until_s)


# --------------------------------------------------------------------------- modelled


def tokens_per_s(curve: Curve, in_flight: float) -> float:
    """The curve at a number of sequences, linear between its points."""
    before = (0.0, 0.0)
    for point in curve:
        if in_flight <= point[0]:
            share = (in_flight - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = (float(point[0]), point[1])
    return before[1]


class ModelledPolicy:
    """Recorded replies after the time a latency curve says: an engine with no CPU of its own.

    Every sequence of a request gets its share of the curve's tokens per second at the number of
    sequences then in flight, at most `cap`; further ones wait in line. The engine sleeps until the
    next sequence ends. Prefill is in the curve only as far as its measurement had some.
    """

    def __init__(self, answered: Sequence[Answered], curve: Curve, cap: int) -> None:
        self._replies = {(a.request.prompt, a.request.seed): a.reply for a in answered}
        self._curve = curve
        self._cap = cap
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._arrived = asyncio.Event()
        self.sequence_s = 0.0
        self.idle_s = 0.0
        self.generated: list[tuple[float, int]] = []
        """(when, tokens) of each ended sequence."""

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        reply = self._replies[request.prompt, request.seed]
        ended = [asyncio.get_running_loop().create_future() for _ in reply.completions]
        for completion, end in zip(reply.completions, ended, strict=True):
            self._waiting.append(
                _Sequence(float(completion.num_tokens), completion.num_tokens, end)
            )
        self._arrived.set()
        await asyncio.gather(*ended)
        return reply

    async def run(self) -> None:
        """The engine's loop; cancel it to stop."""
        last_s = time.monotonic()
        while True:
            room = self._cap - len(self._running)
            if room > 0 and self._waiting:
                self._running += self._waiting[:room]
                del self._waiting[:room]
            self._arrived.clear()
            if not self._running:
                await self._arrived.wait()
                now_s = time.monotonic()
                self.idle_s += now_s - last_s
                last_s = now_s
                continue
            rate = tokens_per_s(self._curve, len(self._running)) / len(self._running)
            least = min(sequence.left for sequence in self._running)
            try:
                async with asyncio.timeout(max(least / rate, 0.0)):
                    await self._arrived.wait()
            except TimeoutError:
                pass
            now_s = time.monotonic()
            done = (now_s - last_s) * rate
            last_s = now_s
            going_on = []
            for sequence in self._running:
                sequence.left -= done
                if sequence.left > 0:
                    going_on.append(sequence)
                else:
                    sequence.ended.set_result(None)
                    self.generated.append((now_s, sequence.num_tokens))
            self._running = going_on


@dataclass(slots=True)
class _Sequence:
    left: float
    num_tokens: int
    ended: asyncio.Future[None]


class RecordedPreference:
    """Recorded values, at once."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReply:
        return EvaluationReply(values=tuple(self._values[text] for text in request.texts))


# --------------------------------------------------------------------------- lock step


Stage = Callable[[list[Any]], list[Any]]
"""Runs one stage for all trees that wait for it; one result for each request."""


class Barrier:
    """Trees in lock step: a stage runs when every open tree waits for one, for all of them at once.

    Stages run in the order given, so that all trees go through generation, code and values
    together, as the released code does.
    """

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = stages
        self._waiting: dict[str, list[tuple[Any, asyncio.Future[Any]]]] = {n: [] for n in stages}
        self._open = 0
        self.seconds = dict.fromkeys(stages, 0.0)

    async def ask(self, stage: str, request: Any) -> Any:
        """Wait for the stage that answers this request."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting[stage].append((request, answer))
        self._run_if_all_wait()
        return await answer

    async def run(self, searches: Sequence[Awaitable[Any]]) -> list[Any]:
        """Run searches that ask this barrier; returns what they return."""
        self._open = len(searches)
        return list(await asyncio.gather(*(self._count(search) for search in searches)))

    async def _count(self, search: Awaitable[Any]) -> Any:
        try:
            return await search
        finally:
            self._open -= 1
            self._run_if_all_wait()

    def _run_if_all_wait(self) -> None:
        if not self._open or sum(map(len, self._waiting.values())) < self._open:
            return
        for name, stage in self._stages.items():
            waiting = self._waiting[name]
            if waiting:
                self._waiting[name] = []
                started = time.monotonic()
                results = stage([request for request, _ in waiting])
                self.seconds[name] += time.monotonic() - started
                for (_, answer), result in zip(waiting, results, strict=True):
                    answer.set_result(result)
                return
