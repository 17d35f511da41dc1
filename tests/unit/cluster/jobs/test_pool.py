"""Pools over fake actor handles: choice, bounds, deadlines, retries."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import pickle
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.jobs import pace
from cluster.jobs import pool as pool_module
from cluster.jobs.admission import EnginePressure
from cluster.jobs.pool import Load, PolicyPool, PoolConfig, PreferencePool, SandboxPool, choose
from cluster.jobs.sandbox_worker import SandboxWorker
from rollout.engine import EngineError, EvaluationRequest, GenerationReply, GenerationRequest
from tests.clock import set_clock
from tests.fakes import Failure, ScriptedPolicy, ScriptedSandbox, TablePreference
from verifier import SandboxError
from verifier.sandbox_wire import TWIN


class Handle:
    """What an actor handle looks like to its caller: `handle.method.remote(...)`, awaited."""

    def __init__(self, actor: object) -> None:
        self.actor = actor
        self.error: Exception | None = None
        self.calls = 0

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)

        class Method:
            def remote(_, *arguments: Any) -> Coroutine[Any, Any, Any]:
                return self._run(getattr(self.actor, method), arguments)

        return Method()

    async def _run(self, method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return await method(*arguments)

    def die(self) -> None:
        """Every call from now on fails as with an actor that is gone."""
        self.error = ActorDiedError()


def policy(**other: Any) -> Handle:
    return Handle(ScriptedPolicy({"": ["step<end_of_step>"]}, **other))


def request(key: str = "") -> GenerationRequest:
    return GenerationRequest(prompt="q", num_candidates=1, max_tokens=8, routing_key=key)


def calls(**handles: Handle) -> dict[str, int]:
    return {name: handle.calls for name, handle in handles.items()}


# -- the choice


def test_a_key_always_chooses_the_same_replica() -> None:
    loads = [Load("a", 3), Load("b", 0), Load("c", 5)]
    chosen = {key: choose(loads, key, spill_over=9) for key in map(str, range(50))}
    assert chosen == {key: choose(loads[::-1], key, spill_over=9) for key in chosen}


def test_keys_spread_over_replicas() -> None:
    loads = [Load(name, 0) for name in "abcd"]
    counts = Counter(choose(loads, f"problem-{n}", spill_over=0) for n in range(1000))
    assert set(counts) == set("abcd")
    assert all(200 < count < 300 for count in counts.values())


def test_a_lost_replica_moves_only_its_own_keys() -> None:
    four = [Load(name, 0) for name in "abcd"]
    for key in map(str, range(100)):
        before, after = choose(four, key, 0), choose(four[:3], key, 0)
        assert before == after or before == "d"


@pytest.mark.parametrize(
    ("own_load", "other_load", "spills"),
    [(0, 0, False), (4, 0, False), (5, 0, True), (14, 10, False), (15, 10, True)],
)
def test_a_key_spills_over_beyond_the_threshold(
    own_load: int, other_load: int, spills: bool
) -> None:
    own = choose([Load("a", 0), Load("b", 0)], "k", 4)
    other = {"a": "b", "b": "a"}[own]
    loads = [Load(own, own_load), Load(other, other_load)]
    assert choose(loads, "k", spill_over=4) == (other if spills else own)


def test_without_a_key_the_least_loaded_is_chosen() -> None:
    assert choose([Load("a", 3), Load("b", 1), Load("c", 2)], "", spill_over=99) == "b"


def test_a_full_replica_is_passed_over_unless_all_are() -> None:
    own = choose([Load("a", 0), Load("b", 0)], "k", 4)
    other = {"a": "b", "b": "a"}[own]
    assert choose([Load(own, 1, full=True), Load(other, 2)], "k", 4) == other
    assert choose([Load(own, 1, full=True), Load(other, 2, full=True)], "k", 4) == own


def test_the_load_of_a_slow_replica_counts_as_often_as_it_is_slower() -> None:
    own = choose([Load("a", 0), Load("b", 0)], "k", 4)
    other = {"a": "b", "b": "a"}[own]
    for pace_s, chosen in ((0.14, own), (0.4, other), (None, own)):
        loads = [Load(own, 5, pace_s=pace_s), Load(other, 5, pace_s=0.1)]
        assert choose(loads, "k", spill_over=4) == chosen


def test_a_tree_that_spills_over_goes_to_the_same_second_replica() -> None:
    names = "abcdef"
    for key in map(str, range(40)):
        own = choose([Load(name, 0) for name in names], key, 4)
        second = {
            choose([Load(n, 99 if n == own else load) for n in names], key, 4) for load in range(5)
        }
        assert len(second) == 1 and own not in second


def test_choosing_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no replica"):
        choose([], "k", 0)


# -- replicas that come and go


async def test_call_waits_for_a_new_replica_where_none_is_left() -> None:
    first, second = policy(), policy()
    pool = PolicyPool({"a": first}, PoolConfig(vacancy_s=5, rest_s=0))
    first.die()
    call = asyncio.create_task(pool.generate(request()))
    while pool._replicas:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert not call.done()
    pool.set_replicas({"b": second}, 1)
    assert (await call).completions
    assert calls(first=first, second=second) == {"first": 1, "second": 1}


async def test_vacancy_that_lasts_is_an_error() -> None:
    pool = PolicyPool({}, PoolConfig(vacancy_s=0.01))
    with pytest.raises(EngineError, match="no policy replica is left"):
        await pool.generate(request())


async def test_replicas_are_exchanged_as_a_whole_and_an_old_list_is_ignored() -> None:
    handles = {name: policy() for name in "abc"}
    pool = PolicyPool({"a": handles["a"], "b": handles["b"]})
    kept = pool._replicas["b"]
    pool.set_replicas({"b": handles["b"], "c": handles["c"]}, 2)
    pool.set_replicas({"a": handles["a"]}, 1)
    assert sorted(pool._replicas) == ["b", "c"]
    assert pool._replicas["b"] is kept


# -- calls


async def test_requests_of_one_tree_go_to_one_replica() -> None:
    a, b = policy(), policy()
    pool = PolicyPool({"a": a, "b": b})
    for _ in range(10):
        reply = await pool.generate(request("tree-1"))
        assert reply.completions[0].text == "<code>step<end_of_step>"
    assert sorted(calls(a=a, b=b).values()) == [0, 10]


async def test_preferences_are_asked_the_same_way() -> None:
    pool = PreferencePool({"a": Handle(TablePreference({"good": 0.5}))})
    reply = await pool.evaluate(EvaluationRequest(texts=("is good", "is bad")))
    assert reply.values == (0.5, 0.0)


async def test_a_tree_spills_over_only_while_its_replica_is_too_busy() -> None:
    gate = asyncio.Event()
    a, b = policy(gate=gate), policy(gate=gate)
    pool = PolicyPool({"a": a, "b": b}, PoolConfig(spill_over=2))
    tasks = [asyncio.create_task(pool.generate(request("tree-1"))) for _ in range(4)]
    while a.calls + b.calls < 4:
        await asyncio.sleep(0)
    assert sorted(calls(a=a, b=b).values()) == [1, 3]
    gate.set()
    await asyncio.gather(*tasks)
    await pool.generate(request("tree-1"))
    assert sorted(calls(a=a, b=b).values()) == [1, 4]


def pressure(requests: int, **other: Any) -> EnginePressure:
    said = {"running": 8 * requests, "waiting": 0, "kv_usage": 0.5, "preemptions": 0}
    return EnginePressure(requests=requests, **said | other)


async def test_what_other_workers_have_at_a_replica_counts_until_it_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    set_clock(monkeypatch, pool_module, monotonic=lambda: now_s)
    pool = PolicyPool({"a": None, "b": None})
    own = (await pool._reserve("tree", now_s)).name
    pool.set_pressures({own: pressure(200), "gone": pressure(9)})
    pool.set_pressures({other: pressure(50) for other in {"a", "b"} - {own}})
    assert pool._replicas[own].load(now_s).load == 200
    assert (await pool._reserve("tree", now_s)).name != own
    now_s += pool_module.FORGET_PRESSURE_S + 1
    assert (await pool._reserve("tree", now_s)).name == own


class Machine:
    """A replica that slows down with the requests in it, as batched decoding does."""

    def __init__(self, slowness: float) -> None:
        self.slowness = slowness
        self.requests = self.served = 0

    def seconds(self) -> float:
        return self.slowness * (1.0 + self.requests / 16)


async def searched(
    monkeypatch: pytest.MonkeyPatch, slowness: Sequence[float], *, told: bool
) -> tuple[list[Machine], float, float]:
    """36 workers, 24 trees each, 6 requests a tree with a pause between: in virtual time.

    Returns:
        The machines, when all was done, and the share of requests to a tree's first replica.
    """
    clock, number = [0.0], itertools.count()
    set_clock(monkeypatch, pool_module, monotonic=lambda: clock[0])
    machines = {f"policy-{i}": Machine(slow) for i, slow in enumerate(slowness)}
    pools = [PolicyPool(dict.fromkeys(machines)) for _ in range(36)]
    first: dict[str, str] = {}
    stayed = asked = 0
    events: list[tuple[float, int, str, Any]] = [(1.0, next(number), "tell", None)]
    for worker, pool in enumerate(pools):
        for tree in range(24):
            start_s = (24 * worker + tree) / 864
            heapq.heappush(events, (start_s, next(number), "ask", (pool, f"{worker}-{tree}", 6)))
    open_trees = 864
    while open_trees:
        clock[0], _, what, about = heapq.heappop(events)
        if what == "tell":
            said = {
                name: pressure(machine.requests, pace_s=machine.seconds() / 100)
                for name, machine in machines.items()
            }
            for pool in pools if told else ():
                pool.set_pressures(said)
            heapq.heappush(events, (clock[0] + 1.0, next(number), "tell", None))
        elif what == "ask":
            pool, key, left = about
            replica = await pool._reserve(key, clock[0])
            asked += 1
            stayed += first.setdefault(key, replica.name) == replica.name
            machine = machines[replica.name]
            machine.requests += 1
            done_s = clock[0] + machine.seconds()
            heapq.heappush(events, (done_s, next(number), "answer", (pool, key, left, replica)))
        else:
            pool, key, left, replica = about
            replica.in_flight -= 1
            machines[replica.name].requests -= 1
            machines[replica.name].served += 1
            open_trees -= left == 1
            if left > 1:
                heapq.heappush(events, (clock[0] + 1.0, next(number), "ask", (pool, key, left - 1)))
    return list(machines.values()), clock[0], stayed / asked


async def test_at_36_by_36_a_slow_replica_gets_fewer_trees_and_the_others_keep_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowness = [5.0, *[1.0] * 35]
    blind, blind_s, never_left = await searched(monkeypatch, slowness, told=False)
    seen, seen_s, stayed = await searched(monkeypatch, slowness, told=True)
    others = sum(machine.served for machine in seen[1:]) / 35
    assert never_left == 1.0  # by what one worker knows alone
    assert 0 < seen[0].served < 0.5 * blind[0].served
    assert seen[0].served < 0.5 * others
    assert seen_s < 0.7 * blind_s
    assert stayed > 0.95


async def test_at_36_by_36_equal_replicas_keep_every_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, stayed = await searched(monkeypatch, [1.0] * 36, told=True)
    assert stayed > 0.98


async def test_in_flight_is_bounded_and_the_rest_waits_its_turn() -> None:
    gate = asyncio.Event()
    engine = ScriptedPolicy({"": ["x"]}, gate=gate)
    pool = PolicyPool({"a": Handle(engine)}, PoolConfig(max_in_flight=3))
    tasks = [asyncio.create_task(pool.generate(request(str(n)))) for n in range(10)]
    while len(pool._waiters) < 7:
        await asyncio.sleep(0)
    assert engine.in_flight == 3
    gate.set()
    await asyncio.gather(*tasks)
    assert engine.max_in_flight == 3
    assert not pool._waiters and pool._replicas["a"].in_flight == 0


async def test_it_says_whom_its_callers_wait_for_and_since_when(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    set_clock(monkeypatch, pool_module, monotonic=lambda: now[0])
    gate = asyncio.Event()

    engine = ScriptedPolicy({"": ["x"]}, gate=gate)
    pool = PolicyPool({"a": Handle(engine)}, PoolConfig(max_in_flight=2, deadline_s=1000.0))
    assert pool.waits() == {}
    callers = []
    for at_s in (100.0, 103.0, 107.0):
        now[0] = at_s
        callers.append(asyncio.create_task(pool.generate(request())))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    now[0] = 110.0
    assert pool.waits() == {"a": (2, 10.0), "": (1, 3.0)}
    gate.set()
    await asyncio.gather(*callers)
    assert pool.waits() == {}


async def test_a_dead_replica_is_forgotten_and_its_request_answered_by_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handles = {"a": policy(), "b": policy()}
    pool = PolicyPool(handles)
    await pool.generate(request("tree"))
    own = next(name for name, handle in handles.items() if handle.calls)
    handles[own].die()
    for _ in range(3):
        await pool.generate(request("tree"))
    assert handles[own].calls == 2
    assert own not in pool._replicas and caplog.text.count("A call is tried again") == 1


async def test_no_replica_left_is_an_engine_error() -> None:
    handles = {"a": policy(), "b": policy()}
    pool = PolicyPool(handles)
    for handle in handles.values():
        handle.die()
    with pytest.raises(EngineError, match=r"no policy replica is left \(gone: [ab], [ab]\)"):
        await pool.generate(request())
    pool.set_replicas({"c": policy()}, 1)
    assert (await pool.generate(request())).policy_version == "scripted-policy"


async def test_callers_that_wait_for_a_slot_learn_that_none_is_left() -> None:
    gate = asyncio.Event()
    pool = PolicyPool({"a": policy(gate=gate)}, PoolConfig(max_in_flight=1))
    tasks = [asyncio.create_task(pool.generate(request())) for _ in range(2)]
    while not pool._waiters:
        await asyncio.sleep(0)
    pool.set_replicas({}, 1)
    with pytest.raises(EngineError, match="no policy replica is left"):
        await tasks[1]
    gate.set()
    await tasks[0]  # the request it had is still answered


async def test_a_failing_engine_is_rested_and_another_asked() -> None:
    bad, good = policy(failures=1), policy()
    pool = PolicyPool({"bad": bad, "good": good}, PoolConfig(rest_s=3600))
    keys = [f"k{n}" for n in range(20)]
    for key in keys:
        await pool.generate(request(key))
    assert bad.calls == 1 and good.calls == 20
    assert pool._replicas["bad"].rests_until_s > time.monotonic()


async def test_a_restarting_actor_is_waited_for() -> None:
    only = policy()
    only.error = ActorUnavailableError("restarting", None)
    pool = PolicyPool({"a": only}, PoolConfig(rest_s=0.02, attempts=5))
    task = asyncio.create_task(pool.generate(request()))
    while only.calls < 2:
        await asyncio.sleep(0.005)
    only.error = None
    await task
    assert list(pool._replicas) == ["a"]


async def test_attempts_are_bounded() -> None:
    handle = policy(failures=99)
    pool = PolicyPool({"a": handle}, PoolConfig(rest_s=0, attempts=3))
    with pytest.raises(EngineError, match="policy call generate failed 3 times, last on a: Engine"):
        await pool.generate(request())
    assert handle.calls == 3


async def test_a_request_beyond_its_deadline_goes_elsewhere() -> None:
    hung, good = policy(gate=asyncio.Event()), policy()
    pool = PolicyPool({"hung": hung, "good": good}, PoolConfig(deadline_s=0.05, rest_s=3600))
    await asyncio.gather(*(pool.generate(request(f"k{n}")) for n in range(8)))
    assert hung.calls > 0 and good.calls == 8
    assert pool._replicas["hung"].in_flight == 0


class SlowPolicy(ScriptedPolicy):
    """Takes its time for every answer."""

    delay_s = 0.01

    async def generate(self, request: GenerationRequest) -> GenerationReply:
        await asyncio.sleep(self.delay_s)
        return await super().generate(request)


async def test_a_request_is_given_up_by_the_tokens_it_may_write_and_the_pace_of_its_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long step on a slow card takes longer than the least limit and is waited for."""
    monkeypatch.setattr(pace, "MIN_LIMIT_S", 0.05)
    engine = SlowPolicy({"": ["one two three four<end_of_step>"]})
    pool = PolicyPool({"a": Handle(engine)}, PoolConfig(attempts=1, rest_s=0))
    await pool.generate(request())
    engine.delay_s = 0.2
    with pytest.raises(EngineError, match=r"no answer within 0\.05 s"):
        await pool.generate(replace(request(), max_tokens=1))
    await pool.generate(replace(request(), max_tokens=4000))


async def test_waiting_for_a_slot_counts_into_the_deadline() -> None:
    pool = PolicyPool(
        {"a": policy(gate=asyncio.Event())},
        PoolConfig(max_in_flight=1, deadline_s=0.05, attempts=1),
    )
    results = await asyncio.gather(
        *(pool.generate(request()) for _ in range(2)), return_exceptions=True
    )
    assert [type(r) for r in results] == [EngineError, EngineError]
    assert pool._replicas["a"].in_flight == 0


async def test_what_the_method_raises_is_the_callers() -> None:
    handle = Handle(ScriptedPolicy({"known": ["x"]}))
    with pytest.raises(KeyError):
        await PolicyPool({"a": handle}).generate(request())
    assert handle.calls == 1


async def test_a_cancelled_caller_frees_its_slot() -> None:
    gate = asyncio.Event()
    pool = PolicyPool({"a": policy(gate=gate)}, PoolConfig(max_in_flight=1))
    tasks = [asyncio.create_task(pool.generate(request())) for _ in range(3)]
    while len(pool._waiters) < 2:
        await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    gate.set()
    await tasks[2]
    assert not pool._waiters and pool._replicas["a"].in_flight == 0


def test_a_pickled_pool_starts_with_nothing_in_flight() -> None:
    pool = PolicyPool({"a": None}, PoolConfig(max_in_flight=7))
    copy = pickle.loads(pickle.dumps(pool))
    assert list(copy._replicas) == ["a"] and copy.config.max_in_flight == 7


# -- sandboxes


def sandbox_pool(**sandboxes: ScriptedSandbox) -> tuple[SandboxPool, dict[str, Handle]]:
    handles = {name: Handle(SandboxWorker(sandbox=s)) for name, s in sandboxes.items()}
    return SandboxPool(handles, PoolConfig(rest_s=0)), handles


async def test_a_tree_stays_on_the_worker_that_opened_it() -> None:
    one, two = ScriptedSandbox({"a": "1\n"}), ScriptedSandbox({"a": "1\n"})
    pool, _ = sandbox_pool(one=one, two=two)
    roots = [await pool.open(f"tree-{n}") for n in range(4)]
    assert len(one.open_trees) == len(two.open_trees) == 2
    for root in roots:
        results = await pool.run(root, ["a", "b"])
        assert [r.stdout for r in results] == ["1\n", ""]
        deeper = await pool.run(results[0].state or "", ["c"])
        assert deeper[0].ok
    for n in range(4):
        await pool.close(f"tree-{n}")
        await pool.close(f"tree-{n}")
    assert not one.open_trees and not two.open_trees


async def test_failing_code_has_no_state_and_is_no_engine_error() -> None:
    pool, _ = sandbox_pool(one=ScriptedSandbox({"1/0": Failure(error_type="ZeroDivisionError")}))
    (result,) = await pool.run(await pool.open("t"), ["1/0"])
    assert result.state is None and result.error_type == "ZeroDivisionError"


async def test_a_tree_whose_worker_died_ends_with_an_engine_error_and_opens_elsewhere() -> None:
    pool, handles = sandbox_pool(one=ScriptedSandbox(), two=ScriptedSandbox())
    root = await pool.open("t")
    worker = root.split("/")[0]
    handles[worker].die()
    with pytest.raises(EngineError, match=f"sandbox call run failed on {worker}"):
        await pool.run(root, ["a"])
    with pytest.raises(EngineError, match=f"no sandbox {worker} is left"):
        await pool.run(root, ["a"])
    await pool.close("t")
    assert (await pool.open("t")).split("/")[0] != worker


async def test_a_state_lost_by_a_restart_is_an_engine_error() -> None:
    pool, handles = sandbox_pool(one=ScriptedSandbox())
    root = await pool.open("t")
    handles["one"].actor = SandboxWorker(sandbox=ScriptedSandbox())
    with pytest.raises(EngineError, match="is not one of an open tree"):
        await pool.run(root, ["a"])
    await pool.close("t")
    assert (await pool.run(await pool.open("t"), ["a"]))[0].ok


async def test_a_slash_in_a_sandbox_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no slash, got 'a/b'"):
        SandboxPool({"a/b": None})


# -- the worker around a sandbox


async def test_two_owners_of_one_tree_do_not_meet() -> None:
    inner = ScriptedSandbox()
    worker = SandboxWorker(sandbox=inner)
    one, two = await worker.open("t", "one"), await worker.open("t", "two")
    assert inner.open_trees == ["t", f"t{TWIN}two"]
    await worker.close("t", "two")
    assert (await worker.run(one, ["a"]))[0].ok
    with pytest.raises(SandboxError, match="not one of an open tree"):
        await worker.run(two, ["a"])


async def test_an_owner_that_opens_again_gets_a_fresh_tree() -> None:
    inner = ScriptedSandbox()
    worker = SandboxWorker(sandbox=inner)
    await worker.open("t", "one")
    await worker.open("t", "one")
    assert inner.events == [("open", "t"), ("close", "t"), ("open", "t")]


async def test_trees_nobody_uses_are_closed() -> None:
    now = [0.0]
    inner = ScriptedSandbox()
    worker = SandboxWorker(sandbox=inner, tree_idle_s=60, clock=lambda: now[0])
    await worker.open("left", "gone")
    used = await worker.open("used", "w")
    now[0] = 61
    await worker.run(used, ["a"])
    await worker.open("new", "w")
    assert inner.open_trees == ["used", "new"]
