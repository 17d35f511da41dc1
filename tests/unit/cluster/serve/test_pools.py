"""The service over the pools a fleet has, with actors that die: nothing lost, nothing mixed up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from ray.exceptions import ActorDiedError

from cluster.jobs.pool import PolicyPool, PoolConfig, PreferencePool, SandboxPool
from cluster.jobs.sandbox_worker import SandboxWorker
from cluster.serve.service import Engines, Service, Standing
from rollout.engine import GenerationRequest
from rollout.methods import Method, SolveResult
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference
from tests.scripted_replicas import hash_value
from tests.serving import serve_config
from tests.unit.cluster.serve.test_service import ask


class Actor:
    """A handle of an actor that answers after a moment, until it dies."""

    def __init__(self, inner: Any, delay_s: float = 0.001) -> None:
        self.inner, self.delay_s = inner, delay_s
        self.dead = asyncio.Event()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Method(self, getattr(self.inner, name))


class _Method:
    def __init__(self, actor: Actor, method: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._actor, self._method = actor, method

    async def remote(self, *arguments: Any) -> Any:
        self._actor.calls += 1
        try:
            async with asyncio.timeout(self._actor.delay_s):
                await self._actor.dead.wait()
        except TimeoutError:
            return await self._method(*arguments)
        raise ActorDiedError()


def echo(request: GenerationRequest) -> list[str]:
    """Programs that differ, whose answer names the problem."""
    number = request.prompt.split("#")[1]
    if request.prompt.endswith("<end_of_output>\n"):
        return [f"<answer>\\boxed{{{number}}}<end_of_answer>"]
    rng = random.Random(request.seed)
    return [f"print({rng.randrange(9)} * 0 + {number})\n<end_of_code>" for _ in range(3)]


async def test_dying_replicas_and_leaving_clients_cost_no_other_request_anything() -> None:
    policies = {name: Actor(ScriptedPolicy(echo)) for name in ("policy-0", "policy-1")}
    sandboxes = [ScriptedSandbox(default="1\n") for _ in range(2)]
    workers = {f"sandbox-{n}": Actor(SandboxWorker(sandbox=s)) for n, s in enumerate(sandboxes)}
    pool = PoolConfig(rest_s=0, vacancy_s=5)
    own = Engines(
        policy=PolicyPool(policies, pool),
        preference=PreferencePool({"ppm-0": Actor(TablePreference(hash_value))}, pool),
        sandbox=SandboxPool(workers, pool),
    )
    config = serve_config(serve={"max_running": 16, "max_queued": 600}).serve
    service = Service(own, config)
    methods = (Method.GREEDY, Method.MAJORITY, Method.MCTS, Method.BEAM)

    async def one(number: int) -> SolveResult:
        wanted = ask(f"#{number}#", name=methods[number % 4], num_trajectories=3, seed=number)
        with service.admitted(("me", str(number % 7))) as (ticket,):
            return await service.solve(ticket, wanted)

    tasks = [asyncio.create_task(one(number)) for number in range(300)]
    for number in range(0, 300, 10):
        asyncio.get_running_loop().call_later(0.003 * number, tasks[number].cancel)
    while sum(task.done() for task in tasks) < 80:
        await asyncio.sleep(0.01)
    policies["policy-0"].dead.set()
    workers["sandbox-0"].dead.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    await service.settled()
    for number, result in enumerate(found):
        if number % 10 == 0 and isinstance(result, asyncio.CancelledError):
            continue
        assert isinstance(result, SolveResult), result
        assert (result.problem_id, result.answer) == (
            ask(f"#{number}#").problem.id,
            str(number),
        )
    assert service.standing == Standing(running=0, waiting=0)
    assert policies["policy-1"].calls > 0 and sandboxes[1].open_trees == []
    assert own.policy._replicas["policy-1"].in_flight == 0  # type: ignore[attr-defined]
