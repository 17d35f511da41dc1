from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.fleet.config import ActorConfig
from cluster.fleet.learner_group import LearnerGroup, Mailbox, Outcome, _find_store
from learner.fit import FitProgress, FitRequest, LearnerError, PolicyTrainConfig
from rollout.store import RunStore


def request(name: str = "round=1/policy") -> FitRequest:
    return FitRequest(
        fit_id=name,
        kind="policy",
        round=1,
        base="base",
        data="data",
        checkpoints="checkpoints",
        config=PolicyTrainConfig(),
    )


def at_step(step: int) -> FitProgress:
    return FitProgress(fit_id="f", step=step, num_steps=9, loss=1.0, tokens_per_s=1.0)


def test_rank_on_a_machine_without_the_runs_store_trains_nothing(tmp_path: Path):
    run_id = RunStore(tmp_path / "run").identify()
    _find_store(RunStore(tmp_path / "run", run_id=run_id))
    with pytest.raises(LearnerError, match=r"elsewhere is not there on machine .*mount"):
        _find_store(RunStore(tmp_path / "elsewhere", run_id=run_id))
    assert not (tmp_path / "elsewhere").exists()


async def test_rank_waits_until_a_request_comes():
    mailbox = Mailbox(max_attempts=3)
    waiting = asyncio.create_task(mailbox.take("a", done=0, timeout_s=5.0))
    await asyncio.sleep(0)
    assert not waiting.done()

    number = await mailbox.put(request())
    ticket = await waiting
    assert (ticket.number, ticket.attempt, ticket.request) == (number, 1, request())


async def test_every_rank_of_a_group_gets_the_request_once():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    tickets = [await mailbox.take("a", done=0, timeout_s=1.0) for _ in range(2)]
    assert [t.attempt for t in tickets] == [1, 1]
    assert await mailbox.take("a", done=number, timeout_s=0.01) is None


async def test_answered_request_is_not_given_to_a_group_started_anew():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    await mailbox.take("a", done=0, timeout_s=1.0)
    await mailbox.finish(number, Outcome(error="loss is nan"))
    assert await mailbox.take("b", done=0, timeout_s=0.01) is None
    assert (await mailbox.watch(number, None, 1.0))[1] == Outcome(error="loss is nan")


async def test_group_started_anew_finds_the_open_request_again():
    mailbox = Mailbox(max_attempts=2)
    await mailbox.put(request())
    await mailbox.take("a", done=0, timeout_s=1.0)
    again = await mailbox.take("b", done=0, timeout_s=1.0)
    assert again.attempt == 2


async def test_request_that_cost_too_many_groups_fails_with_the_last_cause():
    mailbox = Mailbox(max_attempts=2)
    number = await mailbox.put(request())
    for incarnation in ("a", "b"):
        await mailbox.take(incarnation, done=0, timeout_s=1.0)
        await mailbox.note_failure(incarnation, f"rank 1: {incarnation} broke")
        await mailbox.note_failure(incarnation, "rank 0: connection reset by peer")

    # Neither rank of the third group gets it.
    assert await mailbox.take("c", done=0, timeout_s=0.01) is None
    assert await mailbox.take("c", done=0, timeout_s=0.01) is None
    _, outcome = await mailbox.watch(number, None, 1.0)
    assert outcome.error == "fit 'round=1/policy' failed 2 times; last: rank 1: b broke"


async def test_watch_returns_progress_as_soon_as_it_is_news():
    mailbox = Mailbox(max_attempts=3)
    number = await mailbox.put(request())
    await mailbox.report(number, at_step(1))
    assert await mailbox.watch(number, None, 5.0) == (at_step(1), None)

    waiting = asyncio.create_task(mailbox.watch(number, at_step(1), 5.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await mailbox.report(number, at_step(2))
    assert await waiting == (at_step(2), None)
    assert await mailbox.watch(number, at_step(2), 0.01) == (at_step(2), None)


async def test_late_report_or_answer_to_an_earlier_request_is_ignored():
    mailbox = Mailbox(max_attempts=3)
    first = await mailbox.put(request("first"))
    await mailbox.finish(first, Outcome(error="bad"))
    second = await mailbox.put(request("second"))
    await mailbox.report(first, at_step(7))
    await mailbox.finish(first, Outcome(error="worse"))
    assert await mailbox.watch(second, None, 0.01) == (None, None)


async def test_second_request_while_one_is_open_is_refused():
    mailbox = Mailbox(max_attempts=3)
    await mailbox.put(request("first"))
    with pytest.raises(ValueError, match="'first' is still running"):
        await mailbox.put(request("second"))


async def test_stop_ends_the_wait_of_every_rank():
    mailbox = Mailbox(max_attempts=3)
    waiting = [asyncio.create_task(mailbox.take("a", 0, 5.0)) for _ in range(2)]
    await asyncio.sleep(0)
    await mailbox.stop()
    assert await asyncio.gather(*waiting) == ["stop", "stop"]


def test_group_that_finds_no_place_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Method:
        def remote(self) -> int:
            return 0

    class Nobody:
        joined = Method()

    monkeypatch.setattr("cluster.fleet.learner_group.ray.get", lambda answer: answer)
    monkeypatch.setattr("cluster.fleet.learner_group.PLACEMENT_S", 0.0)
    pending = [True]
    monkeypatch.setattr("cluster.fleet.learner_group._group_is_pending", lambda: pending[0])
    notes: list[str] = []
    group = LearnerGroup(
        ActorConfig(replicas=2),
        "unused",
        start_timeout_s=0.3,
        why_pending=lambda: "the engines hold the GPU.",
        note=notes.append,
    )
    group._mailbox, group._started_s = Nobody(), time.monotonic()
    with pytest.raises(LearnerError, match="did not start within 0 s: the engines hold the GPU"):
        group.wait_ready()
    assert notes == ["the learner waits for a place: the engines hold the GPU."]
    # With its place it only takes long to start, and holds what would seem to be missing.
    pending[0] = False
    with pytest.raises(LearnerError, match="it has its place, so the machine may be too slow"):
        group.wait_ready()
    assert len(notes) == 1
