from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.serve.config import ServiceConfig
from cluster.serve.service import (
    Ask,
    BusyError,
    Engines,
    NeverBegunError,
    Service,
    Standing,
    StoppingError,
)
from cluster.telemetry import metrics
from rollout.engine import EngineError
from rollout.methods import Ending, Event, Method, MethodConfig, Solver
from rollout.problem import Level, Problem
from rollout.search import SearchConfig
from tests.fakes import ScriptedPolicy, ScriptedSandbox, TablePreference, random_steps
from tests.scripted_replicas import hash_value
from tests.serving import Stuck
from verifier.sandbox_wire import TWIN

SEARCH = SearchConfig(template="short", num_candidates=3)


def problem(text: str = "3") -> Problem:
    return Problem(id=f"asked-{text}", source="test", level=Level.MATH, text=text)


def ask(text: str = "3", *, timeout_s: float = 20.0, seed: int = 0, **method: Any) -> Ask:
    return Ask(
        problem=problem(text),
        method=MethodConfig(**{"name": Method.MCTS, "num_trajectories": 4} | method),
        search=SEARCH,
        seed=seed,
        timeout_s=timeout_s,
    )


def engines(**other: Any) -> Engines:
    return Engines(
        policy=ScriptedPolicy(random_steps, **other),
        preference=TablePreference(hash_value),
        sandbox=ScriptedSandbox(default="3\n"),
    )


def service(own: Engines | None = None, **config: Any) -> Service:
    return Service(own or engines(), ServiceConfig(**config))


async def asked(service: Service, ask: Ask, user: str = "me", **other: Any) -> Any:
    with service.admitted((user,)) as (ticket,):
        return await service.solve(ticket, ask, **other)


@pytest.mark.parametrize("method", list(Method))
async def test_answer_is_the_one_of_the_solver_alone(method: Method) -> None:
    own = engines()
    alone = await Solver(
        config=MethodConfig(name=method, num_trajectories=4),
        search=SEARCH,
        policy=own.policy,
        preference=own.preference,
        sandbox=ScriptedSandbox(default="3\n"),
    ).solve(problem(), seed=7)
    served = await asked(service(own), ask(name=method, seed=7))
    assert served.ranked == alone.ranked
    assert served.solutions == alone.solutions
    assert (served.cost.generated_tokens, served.cost.scored_tokens) == (
        alone.cost.generated_tokens,
        alone.cost.scored_tokens,
    )


async def test_equal_requests_at_one_time_have_sandboxes_of_their_own() -> None:
    own = engines()
    running = service(own)
    found = await asyncio.gather(*(asked(running, ask()) for _ in range(8)))
    assert len({result.ranked for result in found}) == 1
    await running.settled()
    names = {event[1] for event in own.sandbox.events if event[0] == "open"}  # type: ignore[attr-defined]
    assert len(names) == 8 and len({name.partition(TWIN)[0] for name in names}) == 1
    assert own.sandbox.open_trees == []  # type: ignore[attr-defined]


async def test_searches_run_up_to_their_number_and_the_rest_in_turn() -> None:
    gate = asyncio.Event()
    own = engines(gate=gate)
    running = service(own, max_running=2, max_queued=3)
    tasks = [asyncio.create_task(asked(running, ask(str(n)), user=str(n))) for n in range(5)]
    await asyncio.sleep(0.05)
    assert running.standing == Standing(running=2, waiting=3)
    with pytest.raises(BusyError) as caught:
        await asked(running, ask())
    assert (caught.value.retry_after_s, "3 searches wait" in str(caught.value)) == (20, True)
    gate.set()
    assert [result.problem_id for result in await asyncio.gather(*tasks)] == [
        f"asked-{n}" for n in range(5)
    ]
    assert running.standing == Standing(running=0, waiting=0)


async def test_searches_at_a_time_follow_the_replicas() -> None:
    gate = asyncio.Event()
    running = service(engines(gate=gate), max_running=2, max_queued=20)
    tasks = [asyncio.create_task(asked(running, ask(), user=str(n))) for n in range(8)]
    await asyncio.sleep(0)
    assert running.standing == Standing(running=2, waiting=6)
    running.scale(3)
    assert running.max_running == 6 and running.standing == Standing(running=6, waiting=2)
    running.scale(0)  # all died: what runs goes on, and none begins
    assert running.standing == Standing(running=6, waiting=2)
    gate.set()
    assert len(await asyncio.gather(*tasks)) == 8 and running.max_running == 2


async def test_several_searches_are_admitted_all_or_none() -> None:
    running = service(max_running=1, max_queued=2)
    with pytest.raises(BusyError), running.admitted(("me",), 4):
        pass
    with running.admitted(("me",), 3) as tickets:
        assert len(tickets) == 3
    assert running.standing == Standing(running=0, waiting=0)


@pytest.mark.parametrize("at", ["policy", "sandbox", "waiting"])
async def test_cancelled_search_frees_its_place_its_requests_and_its_sandbox(at: str) -> None:
    gate = asyncio.Event()
    own = Engines(
        policy=ScriptedPolicy(random_steps, gate=None if at == "sandbox" else gate),
        preference=None,
        sandbox=ScriptedSandbox(default="3\n", gate=gate if at == "sandbox" else None),
    )
    running = service(own, max_running=1)
    if at == "waiting":
        first = asyncio.create_task(asked(running, ask()))
    task = asyncio.create_task(asked(running, ask("other")))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if at == "waiting":
        assert running.standing == Standing(running=1, waiting=0)
        gate.set()
        assert (await first).ranked
    await running.settled()
    assert running.standing == Standing(running=0, waiting=0)
    assert own.policy.in_flight == own.sandbox.in_flight == 0  # type: ignore[attr-defined]
    assert own.sandbox.open_trees == []  # type: ignore[attr-defined]


async def test_tree_that_opens_after_its_search_was_cancelled_is_closed() -> None:
    class SlowSandbox(ScriptedSandbox):
        async def open(self, tree_id: str, **other: Any) -> str:
            await asyncio.sleep(0.1)
            return await super().open(tree_id)

    own = Engines(policy=ScriptedPolicy(random_steps), preference=None, sandbox=SlowSandbox())
    running = service(own)
    task = asyncio.create_task(asked(running, ask()))
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.15)
    await running.settled()
    assert [event[0] for event in own.sandbox.events] == ["open", "close"]  # type: ignore[attr-defined]
    assert own.sandbox.open_trees == []  # type: ignore[attr-defined]


async def test_deadline_gives_the_best_answer_so_far() -> None:
    own = Engines(
        policy=Stuck(14), preference=TablePreference(hash_value), sandbox=ScriptedSandbox()
    )
    own.sandbox.default = "3\n"  # type: ignore[attr-defined]
    result = await asked(service(own), ask(timeout_s=0.3, num_trajectories=50))
    assert result.ended is Ending.TIME and result.answer in ("3", "4")


async def test_request_whose_turn_does_not_come_in_time_is_told_so() -> None:
    running = service(Engines(policy=Stuck(0), preference=None, sandbox=ScriptedSandbox()))
    running._queue.max_running = 1
    first = asyncio.create_task(asked(running, ask()))
    await asyncio.sleep(0)
    with pytest.raises(NeverBegunError, match=r"waited 0\.1 s for its turn") as refused:
        await asked(running, ask(timeout_s=0.1))
    assert refused.value.retry_after_s == 20  # two searches of ten seconds, one at a time
    assert running.standing == Standing(running=1, waiting=0)
    first.cancel()


async def test_search_that_lost_an_actor_begins_again_and_finds_the_same() -> None:
    whole = await asked(service(), ask())
    again = await asked(service(engines(failures=2)), ask())
    assert again.ranked == whole.ranked
    with pytest.raises(EngineError, match="scripted failure"):
        await asked(service(engines(failures=3)), ask())


async def test_many_users_are_served_in_turns() -> None:
    gate = asyncio.Event()
    running = service(engines(gate=gate), max_running=1)
    ended: list[str] = []

    async def one(user: str) -> None:
        await asked(running, ask(), user)
        ended.append(user)

    tasks = [asyncio.create_task(one(user)) for user in [*["many"] * 6, "few", "other"]]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(*tasks)
    assert set(ended[:3]) == {"many", "few", "other"}


async def test_held_service_lets_searches_end_and_begins_none_until_it_is_released() -> None:
    gate = asyncio.Event()
    running = service(engines(gate=gate))
    first = asyncio.create_task(asked(running, ask()))
    await asyncio.sleep(0.02)
    entered = asyncio.Event()
    release = asyncio.Event()

    async def hold() -> None:
        async with running.held(10.0):
            entered.set()
            await release.wait()

    holding = asyncio.create_task(hold())
    await asyncio.sleep(0.02)
    second = asyncio.create_task(asked(running, ask("other")))
    await asyncio.sleep(0.02)
    assert not entered.is_set() and running.standing == Standing(running=1, waiting=1)
    gate.set()
    await entered.wait()
    assert first.done() or await first
    await asyncio.sleep(0.05)
    assert not second.done() and running.standing == Standing(running=0, waiting=1)
    release.set()
    assert (await second).ranked
    await holding


async def test_search_that_does_not_end_holds_nobody_up_for_ever() -> None:
    running = service(Engines(policy=Stuck(0), preference=None, sandbox=ScriptedSandbox()))
    first = asyncio.create_task(asked(running, ask()))
    await asyncio.sleep(0)
    async with running.held(0.05):
        assert running.standing.running == 1
    first.cancel()


async def test_stopping_server_ends_what_it_has_and_takes_nothing_more() -> None:
    gate = asyncio.Event()
    running = service(engines(gate=gate), max_running=1)
    tasks = [asyncio.create_task(asked(running, ask(str(n)))) for n in range(3)]
    await asyncio.sleep(0.02)
    stopping = asyncio.create_task(running.stop())
    await asyncio.sleep(0.02)
    with pytest.raises(StoppingError):
        await asked(running, ask())
    gate.set()
    await stopping
    assert all(result.ranked for result in await asyncio.gather(*tasks))


async def test_events_are_those_of_the_search_and_waits_are_counted() -> None:
    events: list[Event] = []
    with metrics.recorded() as counted:
        await asked(service(), ask(), on_event=events.append)
    assert events and events[0].text == ""
    waited = [key for key in counted.values if key[0] == metrics.SERVE_WAIT.name]
    assert waited == [(metrics.SERVE_WAIT.name, (("method", "mcts"),))]
